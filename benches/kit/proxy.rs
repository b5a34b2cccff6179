//! A TCP proxy that holds every byte back for half a millisecond, each way, as a network would.
//!
//! A chunk is passed on half a millisecond after it came, whatever came before or after it: order and bandwidth stay as
//! they are. It has a thread of its own and smol's timers, which are exact to some microseconds; those of tokio are to a
//! millisecond.

use std::io;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use smol::channel::{Receiver, Sender, bounded};
use smol::io::{AsyncReadExt, AsyncWriteExt};
use smol::net::{TcpListener, TcpStream};
use smol::{LocalExecutor, Timer, future};

pub const DELAY: Duration = Duration::from_micros(500);

/// How much is on its way at most, each way: chunks of up to 64 KiB.
const CHUNKS: usize = 1024;
const CHUNK: usize = 64 * 1024;

/// Ends when it is dropped, and its connections with it.
pub struct Proxy {
    address: SocketAddr,
    _alive: Sender<()>,
}

impl Proxy {
    pub fn start(server: SocketAddr) -> io::Result<Self> {
        let listener = smol::block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let (alive, ended) = bounded(1);
        thread::Builder::new().name("delay".into()).spawn(move || serve(&listener, server, &ended))?;
        Ok(Self { address, _alive: alive })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn serve(listener: &TcpListener, server: SocketAddr, ended: &Receiver<()>) {
    let executor = LocalExecutor::new();
    let accept = async {
        while let Ok((client, _)) = listener.accept().await {
            // A connection that cannot be made is closed, and one that breaks is closed both ways.
            executor.spawn(async move { connect(client, server).await.ok() }).detach();
        }
    };
    let until_dropped = async {
        // An error is the end: nothing is ever sent.
        let _ = ended.recv().await;
    };
    smol::block_on(executor.run(future::or(until_dropped, accept)));
}

async fn connect(client: TcpStream, server: SocketAddr) -> io::Result<()> {
    let server = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    future::try_zip(pass(client.clone(), server.clone()), pass(server, client)).await?;
    Ok(())
}

async fn pass(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    let (send, receive) = bounded::<(Instant, Vec<u8>)>(CHUNKS);
    let read = async move {
        let mut chunk = vec![0; CHUNK];
        loop {
            let length = from.read(&mut chunk).await?;
            let due = Instant::now() + DELAY;
            if length == 0 || send.send((due, chunk[..length].to_vec())).await.is_err() {
                return Ok(());
            }
        }
    };
    let write = async {
        while let Ok((due, chunk)) = receive.recv().await {
            Timer::at(due).await;
            to.write_all(&chunk).await?;
        }
        to.close().await
    };
    future::try_zip(read, write).await?;
    Ok(())
}

//! A man in the middle: reads the messages that pass in both directions, stops at one of them, and asks what to do.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pg_session::SessionConfig;
use pg_session::testing::PgServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};

use super::Database;
use super::frames::{Frame, Frames, message};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// Whether this is the message: tag and body.
pub type Like = Box<dyn Fn(u8, &[u8]) -> bool + Send>;

/// Where to stop. Counted from the arming on, over all connections, without what opens a connection.
pub enum At {
    Before(usize),
    After(usize),
    /// Inside a message.
    Byte(usize),
    /// Before the first message that is like this.
    Like(Like),
}

/// What to do at a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Pass,
    /// Close both sides.
    Fin,
    /// The same without a good-bye.
    Rst,
    /// Pass nothing any more in this direction.
    Stall,
    /// Have the server refuse this message with an ERROR of its own.
    Refuse,
    /// Wait for the server's end, and pass all that came at once.
    PassTogether,
}

/// Somebody waits for what to do.
#[derive(Debug)]
pub struct Stop {
    /// The server's process.
    pub pid: i32,
    then: oneshot::Sender<Then>,
}

impl Stop {
    pub fn then(self, then: Then) {
        let _ = self.then.send(then);
    }
}

struct Shared {
    port: u16,
    armed: Mutex<Option<(Direction, At)>>,
    messages: [AtomicUsize; 2],
    bytes: [AtomicUsize; 2],
    /// The end of the server's side is kept from the client.
    withhold_fin: AtomicBool,
    last_pid: AtomicI32,
    stops: mpsc::UnboundedSender<Stop>,
    cut: Notify,
}

pub struct Middle {
    shared: Arc<Shared>,
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
    stops: mpsc::UnboundedReceiver<Stop>,
}

impl Middle {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (sender, stops) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            port: PgServer::shared().expect("a server").port(),
            armed: Mutex::default(),
            messages: Default::default(),
            bytes: Default::default(),
            withhold_fin: AtomicBool::new(false),
            last_pid: AtomicI32::new(0),
            stops: sender,
            cut: Notify::new(),
        });
        let task = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(serve(client, Arc::clone(&shared)));
                }
            }
        });
        Self { shared, address, task, stops }
    }

    /// The URL of a database, by way of the middle.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}/{database}", self.address)
    }

    /// A database's configuration, by way of the middle.
    pub fn config(&self, database: &Database) -> SessionConfig {
        self.url(database.database.name()).parse().expect("a URL")
    }

    /// Counts from zero, and stops once.
    pub fn arm(&mut self, direction: Direction, at: At) {
        while self.stops.try_recv().is_ok() {} // what nobody answered passes
        let mut armed = self.shared.armed.lock().unwrap();
        self.count();
        *armed = Some((direction, at));
    }

    /// Counts from zero, and stops nowhere.
    pub fn disarm(&mut self) {
        *self.shared.armed.lock().unwrap() = None;
        while self.stops.try_recv().is_ok() {}
        self.withhold_fin(false);
        self.count();
    }

    fn count(&self) {
        for counter in self.shared.messages.iter().chain(&self.shared.bytes) {
            counter.store(0, SeqCst);
        }
    }

    /// Messages to the server and to the client, so far.
    pub fn messages(&self) -> [usize; 2] {
        [0, 1].map(|direction| self.shared.messages[direction].load(SeqCst))
    }

    pub fn bytes(&self) -> [usize; 2] {
        [0, 1].map(|direction| self.shared.bytes[direction].load(SeqCst))
    }

    /// The end of the server's side is kept from the client from now on.
    pub fn withhold_fin(&self, withhold: bool) {
        self.shared.withhold_fin.store(withhold, SeqCst);
    }

    /// Closes every connection.
    pub fn cut_all(&self) {
        self.shared.cut.notify_waiters();
    }

    pub async fn stop(&mut self) -> Stop {
        self.stops.recv().await.expect("held by itself")
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.task.abort();
        self.cut_all();
    }
}

enum End {
    Fin,
    Rst,
}

async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", shared.port)).await else { return };
    let (_, _) = (client.set_nodelay(true), server.set_nodelay(true));
    let pid = AtomicI32::new(0);
    let (mut client_in, mut client_out) = client.into_split();
    let (mut server_in, mut server_out) = server.into_split();
    let cut = shared.cut.notified();
    let end = tokio::select! {
        end = pump(Direction::ToServer, &mut client_in, &mut server_out, &pid, &shared) => end,
        end = pump(Direction::ToClient, &mut server_in, &mut client_out, &pid, &shared) => end,
        () = cut => End::Fin,
    };
    match end {
        End::Rst => {
            for stream in [client_in.as_ref(), server_in.as_ref()] {
                let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
            }
        }
        End::Fin => {
            drop((server_in, server_out));
            let _ = client_out.shutdown().await;
            // Data that nobody reads would make a reset of it.
            let mut rest = Vec::new();
            let _ = tokio::time::timeout(Duration::from_secs(1), client_in.read_to_end(&mut rest)).await;
        }
    }
}

async fn pump(
    direction: Direction,
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    pid: &AtomicI32,
    shared: &Shared,
) -> End {
    let mut frames = if direction == Direction::ToServer { Frames::of_client() } else { Frames::default() };
    let mut chunk = vec![0; 65536];
    // Nothing is passed any more: stalled, or the other side takes nothing.
    let mut deaf = false;
    loop {
        let mut out = Vec::new();
        while let Some(frame) = frames.take() {
            // The first message of a client has no tag; a request to cancel is a message of 16 bytes.
            if !frame.has_tag() && frame.bytes().len() != 16 {
                out.extend_from_slice(frame.bytes());
                continue;
            }
            if direction == Direction::ToClient && frame.tag() == b'K' {
                pid.store(i32::from_be_bytes(frame.body()[..4].try_into().unwrap()), SeqCst);
                shared.last_pid.store(pid.load(SeqCst), SeqCst);
            }
            let Some(at) = shared.met(direction, &frame) else {
                out.extend_from_slice(frame.bytes());
                continue;
            };
            let (passed, held) = frame.bytes().split_at(at);
            out.extend_from_slice(passed);
            deaf |= !out.is_empty() && to.write_all(&out).await.is_err();
            out.clear();
            match ask(pid, shared).await {
                Then::Pass => out.extend_from_slice(held),
                Then::Fin => return End::Fin,
                Then::Rst => return End::Rst,
                Then::Stall => deaf = true,
                Then::Refuse if !frame.has_tag() => out.extend_from_slice(held),
                Then::Refuse => out.extend(refused(&frame)),
                Then::PassTogether => {
                    out.extend_from_slice(held);
                    out.extend_from_slice(&frames.take_rest());
                    let _ = from.read_to_end(&mut out).await;
                }
            }
        }
        if !deaf && !out.is_empty() {
            deaf |= to.write_all(&out).await.is_err();
        }
        match from.read(&mut chunk).await {
            Ok(n @ 1..) => frames.feed(&chunk[..n]),
            _ if direction == Direction::ToServer => return End::Fin,
            _ => {
                if !shared.withhold_fin.load(SeqCst) {
                    let _ = to.shutdown().await;
                }
                // The client's own end is what ends the connection then.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Shared {
    /// How much of this message is passed before the stop, if it is here.
    fn met(&self, direction: Direction, message: &Frame) -> Option<usize> {
        let length = message.bytes().len();
        let mut armed = self.armed.lock().unwrap();
        let number = self.messages[direction as usize].fetch_add(1, SeqCst);
        let before = self.bytes[direction as usize].fetch_add(length, SeqCst);
        let (_, at) = armed.as_ref().filter(|(armed, _)| *armed == direction)?;
        let at = match at {
            At::Before(n) => (*n == number).then_some(0),
            At::After(n) => (*n == number).then_some(length),
            At::Byte(n) => (before..before + length).contains(n).then(|| n - before),
            At::Like(like) => like(message.tag(), message.body()).then_some(0),
        }?;
        *armed = None;
        Some(at)
    }
}

async fn ask(pid: &AtomicI32, shared: &Shared) -> Then {
    let (then, answer) = oneshot::channel();
    // A request to cancel comes on a connection of its own.
    let pid = Some(pid.load(SeqCst)).filter(|pid| *pid != 0).unwrap_or(shared.last_pid.load(SeqCst));
    let _ = shared.stops.send(Stop { pid, then });
    answer.await.unwrap_or(Then::Pass)
}

/// The message, made such that the server refuses it.
fn refused(original: &Frame) -> Vec<u8> {
    match original.tag() {
        b'Q' => {
            let mut body = b"DO $$ BEGIN RAISE SQLSTATE '57014'; END $$;".to_vec();
            body.extend_from_slice(original.body());
            message(b'Q', &body)
        }
        b'd' | b'c' => [&message(b'f', b"refused by a test\0")[..], original.bytes()].concat(),
        b'P' | b'B' | b'D' | b'E' | b'C' | b'H' | b'S' => {
            [&message(b'P', b"\0refused by a test\0\0\0")[..], original.bytes()].concat()
        }
        _ => original.bytes().to_vec(),
    }
}

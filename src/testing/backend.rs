//! One real connection to the server in the relay's hands: how it is made, given orders, and brought to rest.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, UnixStream, lookup_host},
    time::timeout,
};
use tokio_postgres::{NoTls, config::Host};

use super::frames::{Frame, Io, Peer, Stream, columns, error_field, split_zero};
use crate::lock::lock;

/// How long one server address may take to answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How long the server may take to pass a cancel request on.
const CANCEL_LIMIT: Duration = Duration::from_secs(5);

/// How long a cancelled statement gets before it is cancelled again: it may not have begun when the signal came.
const CANCEL_AGAIN: Duration = Duration::from_millis(50);

/// The address of the server that answered: a cancel request must go to the same one.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// The addresses a configuration names, in order.
    async fn all(config: &tokio_postgres::Config) -> io::Result<Vec<Self>> {
        let ports = config.get_ports();
        let port = |i: usize| ports.get(i).or(ports.first()).copied().unwrap_or(5432);
        let mut addresses = Vec::new();
        for (i, address) in config.get_hostaddrs().iter().enumerate() {
            addresses.push(Self::Tcp((*address, port(i)).into()));
        }
        if addresses.is_empty() {
            for (i, host) in config.get_hosts().iter().enumerate() {
                match host {
                    Host::Tcp(name) => {
                        addresses.extend(lookup_host((name.as_str(), port(i))).await?.map(Self::Tcp));
                    }
                    Host::Unix(directory) => {
                        addresses.push(Self::Unix(directory.join(format!(".s.PGSQL.{}", port(i)))));
                    }
                }
            }
        }
        if addresses.is_empty() {
            addresses.extend(lookup_host(("localhost", port(0))).await?.map(Self::Tcp));
        }
        Ok(addresses)
    }

    async fn open(&self) -> io::Result<Stream> {
        let open = async {
            Ok(match self {
                Self::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Box::new(stream) as Stream
                }
                Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
            })
        };
        timeout(CONNECT_LIMIT, open).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Opens a socket to the first server that answers.
    pub(super) async fn reach(config: &tokio_postgres::Config) -> io::Result<(Self, Stream)> {
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for address in Self::all(config).await? {
            match address.open().await {
                Ok(stream) => return Ok((address, stream)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Hands a cancel request to the server, and returns once the server has passed the signal on: it closes the
    /// socket only then (manual, chapter 54.2.8).
    pub(super) async fn cancel(&self, request: &[u8]) -> io::Result<()> {
        let cancel = async {
            let mut stream = self.open().await?;
            stream.write_all(request).await?;
            stream.flush().await?;
            match stream.read(&mut [0; 1]).await {
                Ok(_) => Ok(()),
                // A server may reset the socket instead of closing it: the signal was sent all the same.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
                Err(error) => Err(error),
            }
        };
        timeout(CANCEL_LIMIT, cancel).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// What the server reported of itself at start-up, kept up to date: ParameterStatus by name.
pub(super) type Parameters = Arc<Mutex<BTreeMap<Bytes, Bytes>>>;

/// A connection to the server. What it is in the middle of is kept here, so that whoever holds it next can bring it to
/// rest.
pub(super) struct Backend {
    pub(super) peer: Peer,
    address: Address,
    cancel_request: BytesMut,
    parameters: Parameters,
    /// The transaction status of the last ReadyForQuery.
    pub(super) status: u8,
    /// A request was sent whose ReadyForQuery has not come.
    pub(super) busy: bool,
    /// The request is of the extended protocol, and its Sync has not been sent.
    pub(super) unsynced: bool,
    /// The server waits for CopyData.
    pub(super) copying: bool,
    /// A cancel request was sent since the last fence, and its signal may still be on its way.
    pub(super) cancelled: bool,
    /// The server's last words.
    fatal: Option<String>,
}

/// What came of an order of the relay's own.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) failed: bool,
    /// The ErrorResponse, if it failed.
    pub(super) error: BytesMut,
    /// Notices and parameters, which are the client's business whoever caused them.
    pub(super) asides: BytesMut,
    /// The columns of the last row.
    pub(super) row: Vec<Option<String>>,
}

impl Backend {
    /// Connects and logs in as the configuration says.
    pub(super) async fn log_in(config: &tokio_postgres::Config) -> Result<Self, LogInError> {
        let (address, stream) = Address::reach(config).await.map_err(LogInError::Io)?;
        let socket = Arc::new(Mutex::new(Tee { stream: Some(stream), read: BytesMut::new() }));
        // The driver does the talking, so that every way of authentication works that it knows.
        let logged_in = config.connect_raw(Shared(Arc::clone(&socket)), NoTls).await;
        drop(logged_in.map_err(LogInError::Driver)?);
        let (stream, mut greeting) = {
            let mut tee = lock(&socket);
            (tee.stream.take(), std::mem::take(&mut tee.read))
        };
        let Some(stream) = stream else { return Err(LogInError::Io(io::ErrorKind::NotConnected.into())) };
        let mut backend = Self::new(stream, address);
        backend.peer.receive(&mut greeting);
        // Noted as they are taken.
        while backend.pop().map_err(LogInError::Io)?.is_some() {}
        Ok(backend)
    }

    pub(super) fn new(stream: Stream, address: Address) -> Self {
        Self {
            peer: Peer::new(stream),
            address,
            cancel_request: BytesMut::new(),
            parameters: Parameters::default(),
            status: b'I',
            busy: false,
            unsynced: false,
            copying: false,
            cancelled: false,
            fatal: None,
        }
    }

    pub(super) fn parameters(&self) -> Parameters {
        Arc::clone(&self.parameters)
    }

    /// The backend's process id, as it stands in BackendKeyData.
    pub(super) fn process_id(&self) -> [u8; 4] {
        self.cancel_request.get(8..12).and_then(|id| id.first_chunk().copied()).unwrap_or_default()
    }

    /// Takes the next frame that has come, and notes what it says of the session.
    pub(super) fn pop(&mut self) -> io::Result<Option<Frame>> {
        let frame = self.peer.pop()?;
        match &frame {
            Some(frame) => self.note(frame),
            None if self.peer.has_ended() => return Err(io::ErrorKind::UnexpectedEof.into()),
            None => {}
        }
        Ok(frame)
    }

    fn note(&mut self, frame: &Frame) {
        let body = frame.body();
        match frame.tag() {
            b'Z' => {
                self.status = body.first().copied().unwrap_or(b'I');
                self.busy = false;
                self.unsynced = false;
                self.copying = false;
            }
            b'G' => self.copying = true,
            b'E' => {
                self.copying = false;
                if matches!(error_field(body, b'V').as_deref(), Some("FATAL" | "PANIC")) {
                    self.fatal = error_field(body, b'M');
                }
            }
            b'S' => {
                if let Some((name, _)) = split_zero(body) {
                    let (name, frame) = (Bytes::copy_from_slice(name), Bytes::copy_from_slice(frame.bytes()));
                    lock(&self.parameters).insert(name, frame);
                }
            }
            b'K' => {
                if let Some(key) = body.get(..8) {
                    let number = |part: &[u8]| part.first_chunk().map_or(0, |n| i32::from_be_bytes(*n));
                    self.cancel_request.clear();
                    frontend::cancel_request(number(key), number(&key[4..]), &mut self.cancel_request);
                }
            }
            _ => {}
        }
    }

    /// Why it is gone, in the server's words if it had any.
    pub(super) fn why_gone(&self, error: &io::Error) -> String {
        self.fatal.clone().unwrap_or_else(|| format!("the connection to the server is lost: {error}"))
    }

    /// Whether the server has said why it goes.
    pub(super) fn told_fatal(&self) -> bool {
        self.fatal.is_some()
    }

    /// Queues a simple query.
    pub(super) fn send_query(&mut self, sql: &[u8]) {
        self.busy = true;
        super::frames::put(self.peer.outbox(), b'Q', &[sql, b"\0"]);
    }

    pub(super) fn send_sync(&mut self) {
        self.busy = true;
        self.unsynced = false;
        frontend::sync(self.peer.outbox());
    }

    /// Has the server do something of the relay's own. At rest before and after.
    pub(super) async fn run(&mut self, sql: &str) -> io::Result<Outcome> {
        self.send_query(sql.as_bytes());
        let mut outcome = Outcome::default();
        self.drain(|frame| match frame.tag() {
            b'E' => {
                outcome.failed = true;
                outcome.error.extend_from_slice(frame.bytes());
            }
            b'N' | b'S' | b'A' => outcome.asides.extend_from_slice(frame.bytes()),
            b'D' => outcome.row = columns(frame.body()),
            _ => {}
        })
        .await?;
        Ok(outcome)
    }

    /// Reads up to ReadyForQuery; ends a COPY on the way.
    async fn drain(&mut self, mut on: impl FnMut(&Frame)) -> io::Result<()> {
        while self.busy {
            while let Some(frame) = self.pop()? {
                on(&frame);
                if frame.tag() == b'Z' {
                    return Ok(());
                }
                if frame.tag() == b'G' {
                    self.fail_copy()?;
                }
            }
            self.peer.step(true).await?;
        }
        Ok(())
    }

    /// Ends a COPY whose client is not there any more. The server ignored the Sync that came before its end.
    fn fail_copy(&mut self) -> io::Result<()> {
        self.copying = false;
        frontend::copy_fail("the client has gone", self.peer.outbox())?;
        frontend::sync(self.peer.outbox());
        self.unsynced = false;
        Ok(())
    }

    /// Cancels what runs.
    pub(super) async fn cancel(&mut self) -> io::Result<()> {
        self.cancelled = true;
        self.address.cancel(&self.cancel_request).await
    }

    /// A round trip that takes up the signal of a cancel request, should it come late, and stray ReadyForQuerys: an
    /// empty query is answered by more than that (manual, chapter 54.2.2).
    pub(super) async fn fence(&mut self) -> io::Result<()> {
        self.send_query(b"");
        let mut answered = false;
        while !answered {
            self.busy = true;
            self.drain(|frame| answered |= matches!(frame.tag(), b'I' | b'E')).await?;
        }
        self.cancelled = false;
        Ok(())
    }

    /// Brings it to rest, whatever it is in the middle of: nobody waits for that any more.
    pub(super) async fn settle(&mut self) -> io::Result<()> {
        if !self.busy {
            return Ok(());
        }
        if self.copying {
            self.fail_copy()?;
        } else if self.unsynced {
            self.send_sync();
        }
        loop {
            // A server that refuses the request, being full say, may accept the next.
            let _ = self.cancel().await;
            if let Ok(drained) = timeout(CANCEL_AGAIN, self.drain(|_| {})).await {
                drained?;
                return self.fence().await;
            }
        }
    }

    /// Drops prepared statements.
    pub(super) async fn close_statements(&mut self, names: &[Vec<u8>]) -> io::Result<()> {
        for name in names {
            super::frames::put(self.peer.outbox(), b'C', &[b"S", name, b"\0"]);
        }
        self.send_sync();
        self.drain(|_| {}).await
    }

    /// Says farewell and waits until the server has closed the connection, which it does when all is undone.
    pub(super) async fn part(&mut self) -> io::Result<()> {
        frontend::terminate(self.peer.outbox());
        self.peer.flush().await?;
        self.peer.read_to_end().await
    }
}

/// Why logging in failed.
#[derive(Debug)]
pub(super) enum LogInError {
    Io(io::Error),
    Driver(tokio_postgres::Error),
}

/// A socket, and a copy of all that was read from it.
struct Tee {
    stream: Option<Stream>,
    read: BytesMut,
}

/// The driver's handle on the socket while it logs in; afterwards the socket is taken away from it.
struct Shared(Arc<Mutex<Tee>>);

impl Shared {
    fn with<T>(
        &self,
        f: impl FnOnce(Pin<&mut dyn Io>, &mut BytesMut) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let tee = &mut *lock(&self.0);
        match &mut tee.stream {
            Some(stream) => f(Pin::new(&mut **stream), &mut tee.read),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for Shared {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|stream, read| {
            let before = buf.filled().len();
            ready!(stream.poll_read(cx, buf))?;
            read.extend_from_slice(&buf.filled()[before..]);
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream, _| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream, _| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream, _| stream.poll_shutdown(cx))
    }
}

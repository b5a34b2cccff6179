//! From a configuration to a connection that is logged in: name, socket, start-up and the choice of server.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_postgres::config::{Host, LoadBalanceHosts};
use tokio_postgres::tls::NoTlsStream;
use tokio_postgres::{Client, Connection, NoTls};

use super::{Observed, Place, Wire};
use crate::config::{SessionConfig, TargetSessionAttrs};
use crate::error::{ConnectCause, ConnectError, DriverError};

/// A connection that is logged in and not yet driven.
pub(crate) struct Dialled {
    pub(crate) client: Client,
    pub(crate) connection: Connection<Observed<Stream>, NoTlsStream>,
    pub(crate) wire: Arc<Wire>,
    pub(crate) route: Route,
    /// When the server it is connected to was first tried.
    pub(crate) started: Instant,
}

/// The address a connection was made to: a cancel request must go to the same server.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    Tcp(SocketAddr),
    #[cfg(unix)]
    Unix(PathBuf),
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            #[cfg(unix)]
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl Route {
    async fn open(&self, config: &tokio_postgres::Config) -> io::Result<Socket> {
        match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let socket = SockRef::from(&stream);
                if config.get_keepalives() {
                    let mut keepalive = TcpKeepalive::new().with_time(config.get_keepalives_idle());
                    if let Some(interval) = config.get_keepalives_interval() {
                        keepalive = keepalive.with_interval(interval);
                    }
                    if let Some(retries) = config.get_keepalives_retries() {
                        keepalive = keepalive.with_retries(retries);
                    }
                    socket.set_tcp_keepalive(&keepalive)?;
                }
                #[cfg(target_os = "linux")]
                socket.set_tcp_user_timeout(config.get_tcp_user_timeout().copied())?;
                Ok(Socket::Tcp(stream))
            }
            #[cfg(unix)]
            Self::Unix(path) => Ok(Socket::Unix(UnixStream::connect(path).await?)),
        }
    }

    /// Asks the server to cancel whatever the backend is doing, and returns once it has passed the signal on.
    ///
    /// The request names a backend, not a statement, and the server closes the socket only after it sent the signal
    /// (manual, chapter 54.2.8). So until the end of file is read, the signal may still hit a later statement.
    pub(crate) async fn cancel(&self, config: &tokio_postgres::Config, wire: &Wire) -> io::Result<()> {
        let mut stream = self.open(config).await?;
        let mut request = bytes::BytesMut::with_capacity(16);
        postgres_protocol::message::frontend::cancel_request(
            wire.process_id(),
            wire.secret_key(),
            &mut request,
        );
        stream.write_all(&request).await?;
        stream.flush().await?;
        match stream.read(&mut [0; 1]).await {
            // A server may reset the socket instead of closing it: the signal was sent all the same.
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// Tries the hosts in order until one will do, each of their addresses within the connect timeout.
pub(crate) async fn dial(config: &SessionConfig, place: &Arc<Place>) -> Result<Dialled, ConnectError> {
    let mut progress = Progress { target: config.targets(), phase: "resolving the host" };
    let hosts = hosts(&config.postgres);
    let passes: &[TargetSessionAttrs] = match config.target {
        TargetSessionAttrs::PreferStandby => &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any],
        ref one => std::slice::from_ref(one),
    };
    let mut last = None;
    for target in passes {
        for (host, port) in &hosts {
            match dial_host(config, place, host, *port, *target, &mut progress).await {
                Ok(dialled) => return Ok(dialled),
                Err(e) => last = Some(e),
            }
        }
    }
    Err(last.unwrap_or_else(|| progress.failed(ConnectCause::Refused("no host is configured".into()))))
}

/// Takes one step within the connect timeout; longer, it takes no place either.
async fn in_time<T>(
    config: &SessionConfig,
    place: &Place,
    step: impl Future<Output = T>,
) -> Result<T, ConnectCause> {
    place.limit(config.connect_timeout.saturating_add(config.cleanup_timeout));
    timeout(config.connect_timeout, step).await.map_err(|_| ConnectCause::TimedOut(config.connect_timeout))
}

/// What is being tried, for the error if time runs out.
struct Progress {
    target: String,
    phase: &'static str,
}

impl Progress {
    fn failed(&self, cause: ConnectCause) -> ConnectError {
        ConnectError { target: self.target.clone(), phase: self.phase, cause }
    }
}

/// The hosts with their ports, shuffled if asked for. Where an address is given beside a name, the address is dialled.
fn hosts(config: &tokio_postgres::Config) -> Vec<(Host, u16)> {
    let ports = config.get_ports();
    let port = |i: usize| ports.get(i).or(ports.first()).copied().unwrap_or(5432);
    let names = config.get_hosts();
    let addresses = config.get_hostaddrs();
    let mut hosts: Vec<_> = (0..names.len().max(addresses.len()))
        .filter_map(|i| match addresses.get(i) {
            Some(address) => Some((Host::Tcp(address.to_string()), port(i))),
            None => names.get(i).map(|name| (name.clone(), port(i))),
        })
        .collect();
    if hosts.is_empty() {
        hosts.push((Host::Tcp("localhost".into()), port(0)));
    }
    if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
        fastrand::shuffle(&mut hosts);
    }
    hosts
}

async fn dial_host(
    config: &SessionConfig,
    place: &Arc<Place>,
    host: &Host,
    port: u16,
    target: TargetSessionAttrs,
    progress: &mut Progress,
) -> Result<Dialled, ConnectError> {
    let routes = match host {
        Host::Tcp(name) => {
            progress.target = format!("{name}:{port}");
            progress.phase = "resolving the host";
            let addresses = in_time(config, place, tokio::net::lookup_host((name.as_str(), port)))
                .await
                .and_then(|found| found.map_err(ConnectCause::Io))
                .map_err(|cause| progress.failed(cause))?;
            let mut routes: Vec<_> = addresses.map(Route::Tcp).collect();
            if config.postgres.get_load_balance_hosts() == LoadBalanceHosts::Random {
                fastrand::shuffle(&mut routes);
            }
            routes
        }
        #[cfg(unix)]
        Host::Unix(dir) => vec![Route::Unix(dir.join(format!(".s.PGSQL.{port}")))],
        #[cfg(not(unix))]
        _ => Vec::new(),
    };
    let mut last = None;
    for route in routes {
        progress.target = route.to_string();
        let dialled = in_time(config, place, dial_route(config, place, route, target, progress)).await;
        match dialled.unwrap_or_else(|late| Err(progress.failed(late))) {
            Ok(dialled) => return Ok(dialled),
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| progress.failed(ConnectCause::Refused("the host has no address".into()))))
}

async fn dial_route(
    config: &SessionConfig,
    place: &Arc<Place>,
    route: Route,
    target: TargetSessionAttrs,
    progress: &mut Progress,
) -> Result<Dialled, ConnectError> {
    let started = Instant::now();
    progress.phase = "opening the socket";
    let socket = route.open(&config.postgres).await.map_err(|e| progress.failed(ConnectCause::Io(e)))?;
    let stream = Stream::new(socket, Arc::clone(place), config.cleanup_timeout);
    progress.phase = "start-up and authentication";
    let wire = Arc::new(Wire::default());
    // The seam for TLS: wrap the stream, and observe what comes out of the wrapping.
    let stream = Observed::new(stream, Arc::clone(&wire));
    let (client, connection) = config
        .postgres
        .connect_raw(stream, NoTls)
        .await
        .map_err(|e| progress.failed(ConnectCause::Driver(DriverError(e))))?;
    progress.phase = "checking the server";
    check_server(&connection, target).map_err(|why| progress.failed(ConnectCause::Refused(why)))?;
    Ok(Dialled { client, connection, wire, route, started })
}

/// Whether the server is new enough and in the role asked for: told from the parameters that servers since 14 report
/// at start-up, so without a round trip.
fn check_server<S, T>(connection: &Connection<S, T>, target: TargetSessionAttrs) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let version = connection.parameter("server_version").unwrap_or("0");
    let major = version.split(|c: char| !c.is_ascii_digit()).next().and_then(|v| v.parse::<u32>().ok());
    if major.is_none_or(|v| v < 14) {
        return Err(format!("the server is PostgreSQL {version}; 14 or later is needed"));
    }
    let is = |name| connection.parameter(name) == Some("on");
    let (standby, read_only) = (is("in_hot_standby"), is("default_transaction_read_only"));
    let (fits, wanted) = match target {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => (true, ""),
        TargetSessionAttrs::ReadWrite => (!standby && !read_only, "read-write"),
        TargetSessionAttrs::ReadOnly => (standby || read_only, "read-only"),
        TargetSessionAttrs::Primary => (!standby, "a primary"),
        TargetSessionAttrs::Standby => (standby, "a standby"),
    };
    if fits { Ok(()) } else { Err(format!("the server is not {wanted}, as target_session_attrs asks")) }
}

/// The socket of one of a pool's connections. Dropped, it tells the server the end, and keeps its place until the server
/// has closed its end too, or for so long.
#[derive(Debug)]
pub(crate) struct Stream {
    /// `None` only while being dropped.
    socket: Option<Socket>,
    place: Arc<Place>,
    limit: Duration,
    runtime: Handle,
}

impl Stream {
    fn new(socket: Socket, place: Arc<Place>, limit: Duration) -> Self {
        Self { socket: Some(socket), place, limit, runtime: Handle::current() }
    }

    fn with<T>(
        self: Pin<&mut Self>,
        poll: impl FnOnce(Pin<&mut Socket>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut self.get_mut().socket {
            Some(socket) => poll(Pin::new(socket)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Some(mut socket) = self.socket.take() else { return };
        let (place, limit) = (Arc::clone(&self.place), self.limit);
        // A runtime that is shut down drops this at once.
        self.runtime.spawn(async move {
            let _ = timeout(limit, socket.close()).await;
            drop(socket);
            drop(place);
        });
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| socket.poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|socket| socket.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| socket.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| socket.poll_shutdown(cx))
    }
}

/// A socket of either kind.
#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl Socket {
    /// Closes this end, and waits until the other is closed; what still comes is of no use to anyone.
    async fn close(&mut self) -> io::Result<()> {
        self.shutdown().await?;
        let mut rest = [0; 4096];
        while self.read(&mut rest).await? > 0 {}
        Ok(())
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            #[cfg(unix)]
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            #[cfg(unix)]
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(unix)]
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(unix)]
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

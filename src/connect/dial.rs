//! From a configuration to a connection that is logged in: name, socket, start-up and the choice of server.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio_postgres::config::{Host, LoadBalanceHosts};
use tokio_postgres::tls::NoTlsStream;
use tokio_postgres::{Client, Connection, NoTls};

use super::{Observed, Wire};
use crate::config::{SessionConfig, TargetSessionAttrs};
use crate::error::{ConnectCause, ConnectError, DriverError};

/// A connection that is logged in and not yet driven.
pub(crate) struct Dialled {
    pub(crate) client: Client,
    pub(crate) connection: Connection<Observed<Stream>, NoTlsStream>,
    pub(crate) wire: Arc<Wire>,
    pub(crate) route: Route,
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
    async fn open(&self, config: &tokio_postgres::Config) -> io::Result<Stream> {
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
                Ok(Stream::Tcp(stream))
            }
            #[cfg(unix)]
            Self::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
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

/// Tries the hosts in order until one will do, all within the connect timeout.
pub(crate) async fn dial(config: &SessionConfig) -> Result<Dialled, ConnectError> {
    let mut progress = Progress { target: config.targets(), phase: "resolving the host" };
    match tokio::time::timeout(config.connect_timeout, dial_any(config, &mut progress)).await {
        Ok(result) => result,
        Err(_) => Err(progress.failed(ConnectCause::TimedOut(config.connect_timeout))),
    }
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

async fn dial_any(config: &SessionConfig, progress: &mut Progress) -> Result<Dialled, ConnectError> {
    let hosts = hosts(&config.postgres);
    let passes: &[TargetSessionAttrs] = match config.target {
        TargetSessionAttrs::PreferStandby => &[TargetSessionAttrs::Standby, TargetSessionAttrs::Any],
        ref one => std::slice::from_ref(one),
    };
    let mut last = None;
    for target in passes {
        for (host, port) in &hosts {
            match dial_host(config, host, *port, *target, progress).await {
                Ok(dialled) => return Ok(dialled),
                Err(e) => last = Some(e),
            }
        }
    }
    Err(last.unwrap_or_else(|| progress.failed(ConnectCause::Refused("no host is configured".into()))))
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
    host: &Host,
    port: u16,
    target: TargetSessionAttrs,
    progress: &mut Progress,
) -> Result<Dialled, ConnectError> {
    let routes = match host {
        Host::Tcp(name) => {
            progress.target = format!("{name}:{port}");
            progress.phase = "resolving the host";
            let addresses = tokio::net::lookup_host((name.as_str(), port))
                .await
                .map_err(|e| progress.failed(ConnectCause::Io(e)))?;
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
        match dial_route(config, route, target, progress).await {
            Ok(dialled) => return Ok(dialled),
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| progress.failed(ConnectCause::Refused("the host has no address".into()))))
}

async fn dial_route(
    config: &SessionConfig,
    route: Route,
    target: TargetSessionAttrs,
    progress: &mut Progress,
) -> Result<Dialled, ConnectError> {
    progress.phase = "opening the socket";
    let stream = route.open(&config.postgres).await.map_err(|e| progress.failed(ConnectCause::Io(e)))?;
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
    Ok(Dialled { client, connection, wire, route })
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

/// A socket of either kind.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            #[cfg(unix)]
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
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

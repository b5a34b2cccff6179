//! The server that is measured on, a database of the run's own on it, and the way there through the delay.

use std::fmt::Write as _;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Instant;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use pg_session::testing::{PgServer, TestDatabase};
use tokio_postgres::config::Host;
use tokio_postgres::{Client, Config, NoTls};

use super::Failure;
use super::proxy::{DELAY, Proxy};

/// Where a contender connects to.
#[derive(Clone, Debug)]
pub struct Target {
    pub address: SocketAddr,
    pub user: String,
    pub password: Option<String>,
    pub dbname: String,
}

impl Target {
    pub fn at(url: &str) -> Result<Self, Failure> {
        let config: Config = url.parse()?;
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let address = match (config.get_hostaddrs().first(), config.get_hosts().first()) {
            (Some(address), _) => (*address, port).into(),
            (None, Some(Host::Tcp(name))) => {
                (name.as_str(), port).to_socket_addrs()?.next().ok_or("the server's name has no address")?
            }
            _ => return Err("DATABASE_URL must name a server by TCP: everybody takes the same way".into()),
        };
        let password = config.get_password().map(|password| String::from_utf8_lossy(password).into_owned());
        Ok(Self {
            address,
            user: config.get_user().ok_or("DATABASE_URL must name a user")?.to_owned(),
            password,
            dbname: config.get_dbname().ok_or("a database has a name")?.to_owned(),
        })
    }

    pub fn url(&self) -> String {
        let encoded = |part: &str| utf8_percent_encode(part, NON_ALPHANUMERIC).to_string();
        let password = self.password.as_deref().map(|p| format!(":{}", encoded(p))).unwrap_or_default();
        let (user, dbname) = (encoded(&self.user), encoded(&self.dbname));
        format!("postgres://{user}{password}@{}/{dbname}", self.address)
    }

    pub async fn connect(&self) -> Result<Client, Failure> {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await?;
        // What goes wrong is told to whoever uses the client.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }
}

/// A server with an empty database of the run's own, which is dropped with this value.
pub struct Server {
    pub direct: Target,
    /// Half a millisecond away.
    pub delayed: Target,
    pub client: Client,
    _database: TestDatabase,
    _proxy: Proxy,
}

impl Server {
    /// The server of `DATABASE_URL`, or else a throw-away one.
    pub async fn find() -> Result<Self, Failure> {
        let database = match std::env::var("DATABASE_URL") {
            Ok(url) if !url.is_empty() => TestDatabase::create_at(&url).await?,
            _ => TestDatabase::create(PgServer::shared()?).await?,
        };
        let direct = Target::at(database.url())?;
        let proxy = Proxy::start(direct.address)?;
        let delayed = Target { address: proxy.address(), ..direct.clone() };
        let client = direct.connect().await?;
        Ok(Self { direct, delayed, client, _database: database, _proxy: proxy })
    }

    /// Which server, how durable, how far away.
    pub async fn describe(&self) -> Result<String, Failure> {
        let mut text = String::from("PostgreSQL");
        for setting in ["server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers"]
        {
            let row = self.client.query_one("SELECT current_setting($1)", &[&setting]).await?;
            match setting {
                "server_version" => write!(text, " {}", row.get::<_, &str>(0))?,
                _ => write!(text, ", {setting} {}", row.get::<_, &str>(0))?,
            }
        }
        let (near, far) = (empty_round_trip(&self.direct).await?, empty_round_trip(&self.delayed).await?);
        write!(
            text,
            ". An empty round trip takes {:.0} µs; with {} ms each way, {:.0} µs, of which {:.0} are the proxy's own.",
            near * 1e6,
            DELAY.as_secs_f64() * 1e3,
            far * 1e6,
            (far - near - 2.0 * DELAY.as_secs_f64()) * 1e6,
        )?;
        Ok(text)
    }
}

/// The median of some empty queries, in seconds.
async fn empty_round_trip(target: &Target) -> Result<f64, Failure> {
    let client = target.connect().await?;
    let mut times = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        client.batch_execute("").await?;
        times.push(begun.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

//! Everything that can be set, with its default and why.

use std::borrow::Cow;
use std::env;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use tokio_postgres::config::{Host, SslMode};

use crate::error::Error;
use crate::options::TransactionOptions;

/// Where to connect, and how to pool: plain data, read from a URL, a key/value string, the environment, or set by
/// name.
///
/// | setting | default | why |
/// |---|---|---|
/// | [`max_size`](Self::max_size) | 10 | the field's habit; more connections than the server has cores for rarely helps |
/// | [`max_waiting`](Self::max_waiting) | unlimited | |
/// | [`acquire_timeout`](Self::acquire_timeout) | 30 s | behind HTTP, 2–5 s serve better |
/// | [`connect_timeout`](Self::connect_timeout) | 10 s | for each host: socket, authentication and set-up together |
/// | [`max_lifetime`](Self::max_lifetime) | 30 min, less up to 10 % | spreads reconnects, lets servers be replaced |
/// | [`idle_timeout`](Self::idle_timeout) | 10 min | |
/// | [`check_after_idle`](Self::check_after_idle) | 1 s | a connection idle for longer is asked whether it lives |
/// | [`statement_cache_capacity`](Self::statement_cache_capacity) | 100 | per connection, least recently used goes first |
/// | [`reset`](Self::reset) | [`Reset::WhenDirty`] | |
/// | [`cleanup_timeout`](Self::cleanup_timeout) | 2 s | past it, a connection in doubt is closed |
/// | [`commit_timeout`](Self::commit_timeout) | 30 s | past it, a commit's outcome is unknown |
/// | [`shutdown_timeout`](Self::shutdown_timeout) | 30 s | how long `close` waits for lent sessions |
///
/// ```
/// use pg_session::SessionConfig;
/// use std::time::Duration;
///
/// let config: SessionConfig = "postgres://app:secret@db.example.com/shop".parse()?;
/// let config = config.max_size(20).acquire_timeout(Duration::from_secs(3));
/// assert!(!format!("{config:?}").contains("secret"));
/// # Ok::<_, pg_session::Error>(())
/// ```
#[derive(Clone)]
pub struct SessionConfig {
    pub(crate) postgres: tokio_postgres::Config,
    pub(crate) target: TargetSessionAttrs,
    pub(crate) max_size: usize,
    pub(crate) max_waiting: Option<usize>,
    pub(crate) acquire_timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) max_lifetime: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) check_after_idle: Duration,
    pub(crate) statement_cache_capacity: usize,
    pub(crate) reset: Reset,
    pub(crate) cleanup_timeout: Duration,
    pub(crate) commit_timeout: Duration,
    pub(crate) shutdown_timeout: Duration,
    pub(crate) transactions: TransactionOptions,
    tls: Option<Box<str>>,
}

/// What a server can be given by `max_connections` (`MAX_BACKENDS` in its source).
const MAX_SIZE_LIMIT: usize = 262_143;
/// Room for them is made with each connection, and the server's own memory for so many is counted in hundreds of MB.
const STATEMENT_CACHE_LIMIT: usize = 10_000;

/// What is done to a returned session's state before the next borrower gets it.
///
/// An open transaction is always rolled back, whatever is chosen here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reset {
    /// Settings, role, temporary tables, cursors, LISTEN, advisory locks, SQL-prepared statements and sequence state
    /// are reset if the session ran SQL that can leave any of them behind. The default.
    ///
    /// That is told from the SQL text: commands such as `SET`, `LISTEN`, `CREATE`, `DO` or `CALL`, the functions that
    /// leave session state, everything sent by `batch_execute`, and any use of the raw client. A function of your own
    /// that hides such a command inside a plain `SELECT f()` is not seen: choose [`Always`](Self::Always) then. Nor is an
    /// INSERT that takes a number from a sequence: the next borrower's `lastval()` may tell it. With
    /// `standard_conforming_strings` off, text may be misread. Whatever is chosen, the seed of `random()` stays: the
    /// server has no way to undo `setseed`.
    WhenDirty,
    /// After every session: costs one round trip in the background, during which the connection counts as in use.
    Always,
    /// Never: what a session leaves behind, the next one finds. For connections behind a pooler that resets.
    Never,
}

/// Which servers of a multi-host configuration will do, as in libpq (PostgreSQL manual, chapter 34.1.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetSessionAttrs {
    /// The first that answers. The default.
    #[default]
    Any,
    /// Not in recovery, and transactions are read-write by default.
    ReadWrite,
    /// In recovery, or transactions are read-only by default.
    ReadOnly,
    /// Not in recovery.
    Primary,
    /// In recovery.
    Standby,
    /// A standby if one of the hosts is one, else any.
    PreferStandby,
}

impl Default for SessionConfig {
    /// The defaults above; user, database and host as [`from_env`](Self::from_env) finds none: the operating system's
    /// user name and `localhost`.
    fn default() -> Self {
        let mut postgres = tokio_postgres::Config::new();
        postgres.application_name("pg-session").ssl_mode(SslMode::Disable);
        Self {
            postgres,
            target: TargetSessionAttrs::Any,
            max_size: 10,
            max_waiting: None,
            acquire_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            max_lifetime: Some(Duration::from_secs(30 * 60)),
            idle_timeout: Some(Duration::from_secs(10 * 60)),
            check_after_idle: Duration::from_secs(1),
            statement_cache_capacity: 100,
            reset: Reset::WhenDirty,
            cleanup_timeout: Duration::from_secs(2),
            commit_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(30),
            transactions: TransactionOptions::default(),
            tls: None,
        }
    }
}

impl SessionConfig {
    /// The defaults: see [`Default`](Self#impl-Default-for-SessionConfig).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads `DATABASE_URL`, or else libpq's variables: `PGHOST`, `PGHOSTADDR`, `PGPORT`, `PGDATABASE`, `PGUSER`,
    /// `PGPASSWORD`, `PGAPPNAME`, `PGOPTIONS`, `PGSSLMODE`, `PGCONNECT_TIMEOUT`, `PGTARGETSESSIONATTRS` (PostgreSQL
    /// manual, chapter 34.15).
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if a value cannot be used; the message names the variable or key and never the password.
    pub fn from_env() -> Result<Self, Error> {
        if let Some(url) = variable("DATABASE_URL")? {
            return url.parse().map_err(|e| match e {
                Error::Config(why) => Error::config(format!("DATABASE_URL: {why}")),
                e => e,
            });
        }
        const VARIABLES: [(&str, &str); 11] = [
            ("PGHOST", "host"),
            ("PGHOSTADDR", "hostaddr"),
            ("PGPORT", "port"),
            ("PGDATABASE", "dbname"),
            ("PGUSER", "user"),
            ("PGPASSWORD", "password"),
            ("PGAPPNAME", "application_name"),
            ("PGOPTIONS", "options"),
            ("PGSSLMODE", "sslmode"),
            ("PGCONNECT_TIMEOUT", "connect_timeout"),
            ("PGTARGETSESSIONATTRS", "target_session_attrs"),
        ];
        let mut pairs = Vec::new();
        for (name, key) in VARIABLES {
            if let Some(value) = variable(name)? {
                pairs.push((key.to_owned(), value));
            }
        }
        Self::from_pairs(pairs)
    }

    /// Applies the keys this crate reads itself, and gives the driver the rest.
    fn from_pairs(pairs: Vec<(String, String)>) -> Result<Self, Error> {
        let mut config = Self::default();
        let mut rest = String::new();
        for (key, value) in pairs {
            match key.as_str() {
                "sslmode" => match value.as_str() {
                    "disable" | "allow" | "prefer" => {}
                    "require" | "verify-ca" | "verify-full" => config.tls = Some(value.into()),
                    _ => return Err(invalid(&key)),
                },
                "sslnegotiation" => match value.as_str() {
                    "postgres" => {}
                    "direct" => config.tls = Some("require (sslnegotiation=direct)".into()),
                    _ => return Err(invalid(&key)),
                },
                "target_session_attrs" => {
                    config.target = match value.as_str() {
                        "any" => TargetSessionAttrs::Any,
                        "read-write" => TargetSessionAttrs::ReadWrite,
                        "read-only" => TargetSessionAttrs::ReadOnly,
                        "primary" => TargetSessionAttrs::Primary,
                        "standby" => TargetSessionAttrs::Standby,
                        "prefer-standby" => TargetSessionAttrs::PreferStandby,
                        _ => return Err(invalid(&key)),
                    }
                }
                "connect_timeout" => {
                    // libpq: zero or less means no limit. Nothing here waits for ever, so the default stays.
                    let seconds: i64 = value.parse().map_err(|_| invalid(&key))?;
                    if let Some(seconds) = u64::try_from(seconds).ok().filter(|s| *s > 0) {
                        config.connect_timeout = Duration::from_secs(seconds);
                    }
                }
                "tcp_user_timeout" => {
                    // Milliseconds, as libpq has it; the driver would read seconds.
                    let millis = value.parse().map_err(|_| invalid(&key))?;
                    config.postgres.tcp_user_timeout(Duration::from_millis(millis));
                }
                _ => {
                    let key = if key == "keepalives_count" { "keepalives_retries" } else { &key };
                    let value = value.replace('\\', "\\\\").replace('\'', "\\'");
                    rest.push_str(&format!("{key}='{value}' "));
                }
            }
        }
        let user_timeout = config.postgres.get_tcp_user_timeout().copied();
        config.postgres = tokio_postgres::Config::from_str(&rest).map_err(|e| driver_config_error(&e))?;
        if config.postgres.get_application_name().is_none() {
            config.postgres.application_name("pg-session");
        }
        if let Some(timeout) = user_timeout {
            config.postgres.tcp_user_timeout(timeout);
        }
        config.postgres.ssl_mode(SslMode::Disable);
        Ok(config)
    }

    /// Checks what can only be judged as a whole.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        if let Some(mode) = &self.tls {
            return Err(Error::config(format!(
                "sslmode={mode} asks for TLS, which this version cannot do yet; it will not send anything in plain \
                 text instead. Use sslmode=prefer or disable, or a TLS proxy on the same host"
            )));
        }
        for (name, number, most) in [
            ("max_size", self.max_size, MAX_SIZE_LIMIT),
            ("statement_cache_capacity", self.statement_cache_capacity, STATEMENT_CACHE_LIMIT),
        ] {
            if !(1..=most).contains(&number) {
                return Err(Error::config(format!("{name} must be at least 1 and at most {most}")));
            }
        }
        let hosts = self.postgres.get_hosts().len();
        let addresses = self.postgres.get_hostaddrs().len();
        if hosts > 0 && addresses > 0 && hosts != addresses {
            return Err(Error::config(format!("{hosts} hosts, but {addresses} host addresses")));
        }
        let ports = self.postgres.get_ports().len();
        if ports > 1 && ports != hosts.max(addresses) {
            return Err(Error::config(format!("{ports} ports for {} hosts", hosts.max(addresses))));
        }
        self.transactions.validate()
    }

    /// Adds a host: a name, an address, or a directory with a Unix socket (it begins with `/`). Several are tried in
    /// order. Default `localhost`.
    #[must_use]
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.postgres.host(host);
        self
    }

    /// The port of the host added last. Default 5432.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.postgres.port(port);
        self
    }

    /// The user to log in as. Default: the operating system's user name.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.postgres.user(user);
        self
    }

    /// The password. It is never printed.
    #[must_use]
    pub fn password(mut self, password: impl AsRef<[u8]>) -> Self {
        self.postgres.password(password);
        self
    }

    /// The database. Default: the same name as the user.
    #[must_use]
    pub fn dbname(mut self, dbname: impl Into<String>) -> Self {
        self.postgres.dbname(dbname);
        self
    }

    /// The name shown in `pg_stat_activity`. Default `pg-session`.
    #[must_use]
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.postgres.application_name(name);
        self
    }

    /// Which servers will do. Default [`TargetSessionAttrs::Any`].
    #[must_use]
    pub fn target_session_attrs(mut self, target: TargetSessionAttrs) -> Self {
        self.target = target;
        self
    }

    /// The most connections that the server has of this manager at once, those that it has not finished closing included.
    /// Default 10; at least 1 and at most 262143, as for the server's own `max_connections`.
    #[must_use]
    pub fn max_size(mut self, connections: usize) -> Self {
        self.max_size = connections;
        self
    }

    /// The most callers that may wait for a session; one more gets an error at once. Default `None`: any number.
    #[must_use]
    pub fn max_waiting(mut self, callers: impl Into<Option<usize>>) -> Self {
        self.max_waiting = callers.into();
        self
    }

    /// How long `acquire` may take in all: waiting, connecting and checking. Default 30 s.
    #[must_use]
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.acquire_timeout = timeout;
        self
    }

    /// How long making a connection to one host may take: socket, authentication and set-up together, and before that
    /// finding its address. Default 10 s.
    ///
    /// As in libpq it is a limit for each host, and for each address of a host: one that accepts and stays silent is passed
    /// over after that time, and the next is tried. All of them together are bounded by the caller's
    /// [`acquire_timeout`](Self::acquire_timeout), which should leave time for more than one.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// The age at which a connection is replaced, less up to 10 % so that they do not all go at once; checked when
    /// it is lent and when it returns. Default 30 min; `None`: any age.
    #[must_use]
    pub fn max_lifetime(mut self, lifetime: impl Into<Option<Duration>>) -> Self {
        self.max_lifetime = lifetime.into();
        self
    }

    /// How long a connection may sit in the pool unused before it is closed. Default 10 min; `None`: for ever.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.idle_timeout = timeout.into();
        self
    }

    /// A connection that was idle for longer is asked for a sign of life (one round trip) before it is lent.
    /// Default 1 s.
    #[must_use]
    pub fn check_after_idle(mut self, idle: Duration) -> Self {
        self.check_after_idle = idle;
        self
    }

    /// How many prepared statements each connection keeps. Default 100; at least 1 and at most 10000.
    #[must_use]
    pub fn statement_cache_capacity(mut self, statements: usize) -> Self {
        self.statement_cache_capacity = statements;
        self
    }

    /// What is done to a returned session's state. Default [`Reset::WhenDirty`].
    #[must_use]
    pub fn reset(mut self, reset: Reset) -> Self {
        self.reset = reset;
        self
    }

    /// How long cancelling, draining and rolling back may take before the connection is closed instead, and how long the
    /// server may then take to close its end before the connection's place is free. Default 2 s.
    #[must_use]
    pub fn cleanup_timeout(mut self, timeout: Duration) -> Self {
        self.cleanup_timeout = timeout;
        self
    }

    /// How long COMMIT may go unanswered before its outcome counts as unknown. Default 30 s.
    ///
    /// The server's `statement_timeout` does not bound a COMMIT that waits for a synchronous standby; this does.
    #[must_use]
    pub fn commit_timeout(mut self, timeout: Duration) -> Self {
        self.commit_timeout = timeout;
        self
    }

    /// How long [`close`](crate::SessionManager::close) waits for lent sessions before it cuts them. Default 30 s.
    #[must_use]
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.shutdown_timeout = timeout;
        self
    }

    /// The options of every transaction that is not given its own.
    #[must_use]
    pub fn transactions(mut self, options: TransactionOptions) -> Self {
        self.transactions = options;
        self
    }

    /// The hosts with their ports, for messages: no user, no password.
    pub(crate) fn targets(&self) -> String {
        let ports = self.postgres.get_ports();
        let port = |i: usize| ports.get(i).or(ports.first()).copied().unwrap_or(5432);
        let hosts: Vec<Cow<'_, str>> = self
            .postgres
            .get_hosts()
            .iter()
            .enumerate()
            .map(|(i, host)| match host {
                Host::Tcp(name) => format!("{name}:{}", port(i)).into(),
                Host::Unix(dir) => format!("{}/.s.PGSQL.{}", dir.display(), port(i)).into(),
            })
            .collect();
        if hosts.is_empty() { format!("localhost:{}", port(0)) } else { hosts.join(", ") }
    }
}

impl fmt::Debug for SessionConfig {
    /// Shows where and how, and neither the password nor `options`, which can carry secrets too.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionConfig")
            .field("targets", &self.targets())
            .field("user", &self.postgres.get_user())
            .field("dbname", &self.postgres.get_dbname())
            .field("target_session_attrs", &self.target)
            .field("max_size", &self.max_size)
            .field("max_waiting", &self.max_waiting)
            .field("acquire_timeout", &self.acquire_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("max_lifetime", &self.max_lifetime)
            .field("idle_timeout", &self.idle_timeout)
            .field("check_after_idle", &self.check_after_idle)
            .field("statement_cache_capacity", &self.statement_cache_capacity)
            .field("reset", &self.reset)
            .field("cleanup_timeout", &self.cleanup_timeout)
            .field("commit_timeout", &self.commit_timeout)
            .field("shutdown_timeout", &self.shutdown_timeout)
            .field("transactions", &self.transactions)
            .finish()
    }
}

impl FromStr for SessionConfig {
    type Err = Error;

    /// Reads `postgres://user:password@host:port/database?key=value` or `host=… user=… password=…`.
    ///
    /// Keys are libpq's (PostgreSQL manual, chapter 34.1.2), as far as the driver knows them; an unknown one is an
    /// error. A driver name in the scheme, as SQLAlchemy has it (`postgresql+asyncpg://`), is accepted and ignored.
    fn from_str(text: &str) -> Result<Self, Error> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Self::from_pairs(key_values(text)?);
        };
        match scheme.split('+').next() {
            Some("postgres" | "postgresql") => {}
            _ => {
                return Err(Error::config(
                    "the URL does not begin with postgres:// or postgresql:// (nothing more is shown, as it may hold \
                     a password)",
                ));
            }
        }
        Self::from_pairs(url_pairs(rest)?)
    }
}

fn variable(name: &str) -> Result<Option<String>, Error> {
    match env::var(name) {
        Ok(value) if value.is_empty() => Ok(None),
        Ok(value) => Ok(Some(value)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => Err(Error::config(format!("{name} is not UTF-8"))),
    }
}

fn invalid(key: &str) -> Error {
    Error::config(format!("invalid value for `{key}`"))
}

/// The driver names the key in the source of its error, and never the value.
fn driver_config_error(e: &tokio_postgres::Error) -> Error {
    match std::error::Error::source(e) {
        Some(cause) => Error::config(cause.to_string()),
        None => Error::config(e.to_string()),
    }
}

fn decode(part: &str) -> Result<String, Error> {
    percent_decode_str(part)
        .decode_utf8()
        .map(Cow::into_owned)
        .map_err(|_| Error::config("the URL has a percent-encoded part that is not UTF-8"))
}

/// The parts of a URL after its scheme as libpq's keys (PostgreSQL manual, chapter 34.1.1.2).
fn url_pairs(rest: &str) -> Result<Vec<(String, String)>, Error> {
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(r, q)| (r, Some(q)));
    let (authority, dbname) = rest.split_once('/').map_or((rest, ""), |(a, d)| (a, d));
    let (login, hosts) = authority.rsplit_once('@').map_or((None, authority), |(l, h)| (Some(l), h));
    let mut pairs = Vec::new();
    let mut push = |key: &str, value: String| pairs.push((key.to_owned(), value));
    if let Some(login) = login {
        let (user, password) = login.split_once(':').map_or((login, None), |(u, p)| (u, Some(p)));
        if !user.is_empty() {
            push("user", decode(user)?);
        }
        if let Some(password) = password {
            push("password", decode(password)?);
        }
    }
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',').filter(|h| !h.is_empty()) {
        let (name, port) = if let Some(v6) = host.strip_prefix('[') {
            let (name, after) =
                v6.split_once(']').ok_or_else(|| Error::config("the URL has a `[` without its `]`"))?;
            (name, after.strip_prefix(':').unwrap_or(""))
        } else {
            host.split_once(':').unwrap_or((host, ""))
        };
        names.push(decode(name)?);
        if !port.is_empty() && port.parse::<u16>().is_err() {
            return Err(invalid("port"));
        }
        ports.push(if port.is_empty() { "5432" } else { port });
    }
    if names.iter().any(|n| !n.is_empty()) {
        push("host", names.join(","));
    }
    if !ports.is_empty() {
        push("port", ports.join(","));
    }
    if !dbname.is_empty() {
        push("dbname", decode(dbname)?);
    }
    for pair in query.into_iter().flat_map(|q| q.split('&')).filter(|p| !p.is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| Error::config("the URL has a query key without `=`"))?;
        push(&decode(key)?, decode(value)?);
    }
    Ok(pairs)
}

/// The pairs of a `key=value` string, values quoted with `'` and escaped with `\` as libpq has it.
fn key_values(text: &str) -> Result<Vec<(String, String)>, Error> {
    let mut pairs = Vec::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let mut key = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if key.is_empty() && chars.peek().is_none() {
            return Ok(pairs);
        }
        if chars.next() != Some('=') || key.is_empty() {
            // The text is not shown: what stands where a key should be may be a password.
            return Err(Error::config("expected `key=value` pairs or a postgres:// URL"));
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let mut value = String::new();
        let quoted = chars.next_if_eq(&'\'').is_some();
        loop {
            match chars.next() {
                Some('\\') => value.extend(chars.next()),
                Some('\'') if quoted => break,
                Some(c) if !quoted && c.is_whitespace() => break,
                Some(c) => value.push(c),
                None if quoted => {
                    return Err(Error::config(format!("the value of `{key}` lacks its closing `'`")));
                }
                None => break,
            }
        }
        pairs.push((key, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> SessionConfig {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn refused(text: &str) -> String {
        text.parse::<SessionConfig>().and_then(|c| c.validate()).expect_err(text).to_string()
    }

    #[test]
    fn a_url_and_its_key_value_form_mean_the_same() {
        let url = parse(
            "postgres://al%40ice:s%3Acret@[::1]:5433,%2Ftmp/my%20db?application_name=a%27b&connect_timeout=3",
        );
        let pairs = parse(
            r"user='al@ice' password=s:cret host=::1,/tmp port=5433,5432 dbname='my db' application_name='a\'b' connect_timeout = 3",
        );
        for c in [url, pairs] {
            assert_eq!(c.postgres.get_user(), Some("al@ice"));
            assert_eq!(c.postgres.get_password(), Some(&b"s:cret"[..]));
            assert_eq!(c.targets(), "::1:5433, /tmp/.s.PGSQL.5432");
            assert_eq!(c.postgres.get_dbname(), Some("my db"));
            assert_eq!(c.postgres.get_application_name(), Some("a'b"));
            assert_eq!(c.connect_timeout, Duration::from_secs(3));
        }
    }

    #[test]
    fn sqlalchemy_urls_are_understood() {
        assert_eq!(parse("postgresql+asyncpg://u:p@h/d").targets(), "h:5432");
    }

    #[test]
    fn units_and_names_are_libpqs() {
        let c = parse("host=h tcp_user_timeout=1500 keepalives_count=3 target_session_attrs=prefer-standby");
        assert_eq!(c.postgres.get_tcp_user_timeout(), Some(&Duration::from_millis(1500)));
        assert_eq!(c.postgres.get_keepalives_retries(), Some(3));
        assert_eq!(c.target, TargetSessionAttrs::PreferStandby);
    }

    #[test]
    fn tls_is_refused_rather_than_left_out() {
        for mode in ["require", "verify-ca", "verify-full"] {
            assert!(refused(&format!("postgres://h/d?sslmode={mode}")).contains("TLS"), "{mode}");
        }
        for mode in ["disable", "allow", "prefer"] {
            parse(&format!("postgres://h/d?sslmode={mode}")).validate().expect(mode);
        }
        assert!(refused("host=h sslmode=always").contains("sslmode"));
    }

    #[test]
    fn bad_input_is_named_and_secrets_are_not() {
        for (text, says) in [
            ("mysql://u:hunter2@h/d", "postgres://"),
            ("postgres://u:hunter2@h/d?colour=red", "colour"),
            ("postgres://u:hunter2@h:99999/d", "port"),
            ("postgres://u:hunter2@h/d?connect_timeout=soon", "connect_timeout"),
            ("postgres://u:hunter2@[::1/d", "]"),
            ("postgres://u:hunter2@h/d?nonsense", "="),
            ("postgres://u:hunter2%ff@h/d", "UTF-8"),
            ("host=h password='hunter2", "password"),
            ("hunter2", "key=value"),
            ("host=a,b port=1,2,3 password=hunter2", "ports"),
        ] {
            let message = refused(text);
            assert!(message.contains(says), "{text}: {message}");
            assert!(!message.contains("hunter2"), "{text}: {message}");
        }
        let debug = format!("{:?}", parse("host=h password=hunter2 options='-c my.key=hunter2'"));
        assert!(!debug.contains("hunter2"), "{debug}");
    }
}

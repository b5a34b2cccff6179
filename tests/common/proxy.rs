//! A proxy that stands between the crate and the server: counts flights, and cuts, holds or swallows what passes.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use pg_session::SessionConfig;
use pg_session::testing::PgServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use super::Database;
use super::frames::{Frame, Frames};

/// What to do at a COMMIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtCommit {
    Pass,
    /// Close both sides before the server sees it.
    CutBefore,
    /// Let the server have it and close the client's side instead of passing on the answer.
    CutAfter,
    /// Let the server have it and never answer.
    Swallow,
}

#[derive(Debug)]
struct Shared {
    flights: AtomicUsize,
    at_commit: Mutex<AtCommit>,
    /// New connections are accepted and get no answer.
    silent: AtomicBool,
    cut: Notify,
}

#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn start() -> Self {
        let server = PgServer::shared().expect("a server");
        Self::to(server.port()).await
    }

    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            flights: AtomicUsize::new(0),
            at_commit: Mutex::new(AtCommit::Pass),
            silent: AtomicBool::new(false),
            cut: Notify::new(),
        });
        let task = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(serve(client, port, Arc::clone(&shared)));
                }
            }
        });
        Self { shared, address, task }
    }

    /// The URL of a database, by way of the proxy.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}/{database}", self.address)
    }

    /// A database's configuration, by way of the proxy.
    pub fn config(&self, database: &Database) -> SessionConfig {
        self.url(database.database.name()).parse().expect("a URL")
    }

    /// How many times the client has sent something after everything before it was answered.
    pub fn flights(&self) -> usize {
        self.shared.flights.load(SeqCst)
    }

    pub fn at_commit(&self, what: AtCommit) {
        *self.shared.at_commit.lock().unwrap() = what;
    }

    pub fn be_silent(&self, silent: bool) {
        self.shared.silent.store(silent, SeqCst);
    }

    /// Closes every connection.
    pub fn cut_all(&self) {
        self.shared.cut.notify_waiters();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.cut.notify_waiters();
    }
}

async fn serve(mut client: TcpStream, port: u16, shared: Arc<Shared>) {
    let cut = shared.cut.notified();
    let relay = async {
        if shared.silent.load(SeqCst) {
            std::future::pending::<()>().await;
        }
        let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
        let _ = client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        let (mut from_client, mut from_server) = ([0; 65536], [0; 65536]);
        // Requests whose ReadyForQuery has not come; start-up counts as one.
        let mut open: i64 = 1;
        let mut requests = Frames::of_client();
        let mut commits = Commits::default();
        let mut answers = Frames::default();
        let mut swallow = false;
        let mut cut_after = false;
        let mut swallowed = false;
        loop {
            tokio::select! {
                n = client.read(&mut from_client) => {
                    let Ok(n @ 1..) = n else { return };
                    let bytes = &from_client[..n];
                    let mut commit = false;
                    let before = open;
                    requests.feed(bytes);
                    while let Some(request) = requests.take() {
                        // Everything that ends in a ReadyForQuery.
                        open += i64::from(matches!(request.tag(), b'Q' | b'S'));
                        commit |= commits.is_sent_by(&request);
                    }
                    if before <= 0 && open > 0 {
                        shared.flights.fetch_add(1, SeqCst);
                    }
                    if commit {
                        match *shared.at_commit.lock().unwrap() {
                            AtCommit::Pass => {}
                            AtCommit::CutBefore => return,
                            AtCommit::CutAfter => cut_after = true,
                            AtCommit::Swallow => swallow = true,
                        }
                    }
                    if server.write_all(bytes).await.is_err() { return }
                }
                n = server.read(&mut from_server) => {
                    let Ok(n @ 1..) = n else { return };
                    let mut bytes = Vec::with_capacity(n);
                    // From the answer to COMMIT on, nothing is passed.
                    let mut committed = false;
                    answers.feed(&from_server[..n]);
                    while let Some(answer) = answers.take() {
                        open -= i64::from(answer.tag() == b'Z');
                        let is_commit = answer.tag() == b'C' && answer.body() == b"COMMIT\0";
                        committed |= (cut_after || swallow) && is_commit;
                        if !committed && !swallowed {
                            bytes.extend_from_slice(answer.bytes());
                        }
                    }
                    if client.write_all(&bytes).await.is_err() || committed && cut_after { return }
                    swallowed |= committed;
                }
            }
        }
    };
    tokio::select! {
        () = relay => {}
        () = cut => {}
    }
}

/// Knows COMMIT when it sees it: alone, or behind the statements of its flight, be it prepared by name.
#[derive(Debug, Default)]
struct Commits {
    /// The names of prepared statements that are COMMIT.
    names: HashSet<Vec<u8>>,
}

impl Commits {
    fn is_sent_by(&mut self, request: &Frame) -> bool {
        let mut texts = request.body().split(|b| *b == 0);
        let mut text = || texts.next().unwrap_or_default();
        match request.tag() {
            b'Q' => request.body().ends_with(b"COMMIT\0"),
            b'P' => {
                let (name, sql) = (text(), text());
                if sql == b"COMMIT" {
                    self.names.insert(name.to_vec());
                } else {
                    self.names.remove(name);
                }
                false
            }
            b'B' => {
                let (_portal, name) = (text(), text());
                self.names.contains(name)
            }
            _ => false,
        }
    }
}

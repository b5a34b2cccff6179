//! What a service does over HTTP, whichever framework serves it: every scenario is run against both.
#![allow(
    unreachable_pub,
    unnameable_types,
    missing_docs,
    missing_debug_implementations,
    reason = "shared by two test binaries"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pg_session::{Connection, Error, Problems, SessionManager};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, oneshot};

use crate::common::{Database, until_returned, within};

/// What a framework has to serve. The routes are in `web_axum.rs` and `web_actix.rs`, side by side.
#[derive(Clone)]
pub struct App {
    pub sessions: SessionManager,
    pub problems: Problems,
    pub deadline: Option<Duration>,
    pub hooks_after_response: bool,
    /// Where hooks tell that they ran.
    pub events: UnboundedSender<&'static str>,
    /// Where handlers, and hooks, wait until the test lets them go.
    pub gate: Arc<Semaphore>,
}

impl App {
    /// Waits until the test has opened the gate.
    pub async fn pass_gate(&self) {
        self.gate.acquire().await.expect("a gate").forget();
    }
}

pub trait Framework {
    /// Whether a client that goes away takes its running request with it.
    const NOTICES_CLIENTS_THAT_LEAVE: bool;

    /// Starts a server on a thread of its own.
    fn serve(app: App) -> Server;
}

/// A server under test; stopped gracefully when dropped or told to.
pub struct Server {
    pub address: SocketAddr,
    pub stop: Option<oneshot::Sender<()>>,
    pub thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Asks it to finish what it has begun, and to end.
    fn begin_to_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until it has ended.
    async fn stopped(mut self) {
        self.begin_to_stop();
        let thread = self.thread.take().expect("not stopped yet");
        within(tokio::task::spawn_blocking(|| thread.join().expect("no panic"))).await.expect("joined");
    }
}

// What handlers of both frameworks do.

pub async fn name(db: &Connection, id: i64) -> Result<Option<String>, Error> {
    Ok(db.query_opt("SELECT name FROM items WHERE id = $1", &[&id]).await?.map(|row| row.get(0)))
}

pub async fn insert(db: &Connection, id: i64) -> Result<(), Error> {
    db.execute("INSERT INTO items VALUES ($1, 'new')", &[&id]).await.map(drop)
}

pub async fn audit(db: &Connection, what: &str) -> Result<(), Error> {
    db.execute("INSERT INTO audit VALUES ($1)", &[&what]).await.map(drop)
}

/// The length of a line: so that a few hundred are more than sockets buffer.
const LINE: i32 = 65_536;

/// `n` long lines, read from the database as they are sent.
pub fn lines(
    sessions: SessionManager,
    n: i64,
) -> impl futures_util::Stream<Item = Result<bytes::Bytes, Error>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        let send = async {
            let session = sessions.acquire().await?;
            let mut rows = session
                .query_stream("SELECT rpad(generate_series(1, $1::bigint)::text, $2::int)", &[&n, &LINE])
                .await?;
            while let Some(row) = rows.next().await {
                let line = row?.get::<_, String>(0);
                if sender.send(Ok(line.into())).await.is_err() {
                    break; // nobody reads any more
                }
            }
            Ok(())
        };
        if let Err(e) = send.await {
            let _ = sender.send(Err(e)).await;
        }
    });
    futures_util::stream::unfold(receiver, async |mut receiver| {
        receiver.recv().await.map(|line| (line, receiver))
    })
}

const SCHEMA: &str = "
    CREATE TABLE items (id bigint PRIMARY KEY, name text NOT NULL);
    CREATE TABLE refs (item bigint REFERENCES items DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE audit (what text);
    INSERT INTO items VALUES (1, 'one');
    CREATE FUNCTION raise(state text) RETURNS void LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'secret message' USING ERRCODE = state, DETAIL = 'secret detail'; END $$;";

/// A database, the service on it, and a client.
struct Stage {
    database: Database,
    app: App,
    server: Server,
    client: Client,
    events: UnboundedReceiver<&'static str>,
}

impl Stage {
    async fn set<F: Framework>(max_size: usize, change: impl FnOnce(&mut App)) -> Self {
        let database = Database::new().await;
        database.run(SCHEMA).await;
        let config = database.config().max_size(max_size).acquire_timeout(Duration::from_secs(10));
        let (events, received) = unbounded_channel();
        let mut app = App {
            sessions: SessionManager::new(config).expect("a configuration"),
            problems: Problems::new(),
            deadline: None,
            hooks_after_response: false,
            events,
            gate: Arc::new(Semaphore::new(0)),
        };
        change(&mut app);
        let server = F::serve(app.clone());
        Self { database, app, server, client: Client::new(), events: received }
    }

    async fn plain<F: Framework>() -> Self {
        Self::set::<F>(4, |_| {}).await
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address)
    }

    async fn get(&self, path: &str) -> Response {
        within(self.client.get(self.url(path)).send()).await.expect(path)
    }

    async fn post(&self, path: &str) -> Response {
        within(self.client.post(self.url(path)).send()).await.expect(path)
    }

    async fn items(&self) -> i64 {
        self.database.number("SELECT count(*) FROM items").await
    }

    /// Every session is back, and no backend is in a transaction.
    async fn quiet(&self) {
        until_returned(&self.app.sessions).await;
        self.database.until_quiet().await;
    }
}

/// Checks that a response is a problem as RFC 9457 has it, and nothing more.
async fn is_problem(response: Response, status: u16, code: &str) {
    assert_eq!(response.status().as_u16(), status, "{code}");
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let retry_after = response.headers().get("retry-after").map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(retry_after.is_some(), status == 503, "{code}: {retry_after:?}");
    let body: Value = response.json().await.expect("JSON");
    let object = body.as_object().expect("an object");
    assert_eq!(object["status"], status);
    assert_eq!(object["code"], code);
    for key in object.keys() {
        assert!(["title", "status", "detail", "code"].contains(&key.as_str()), "{body}");
    }
    let text = body.to_string();
    for word in ["secret", "SELECT", "items", "127.0.0.1"] {
        assert!(!text.contains(word), "{text}");
    }
}

pub async fn a_session_is_lent_for_a_request_and_given_back<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    let response = stage.get("/name/1").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.text().await.unwrap(), "one");
    is_problem(stage.get("/name/2").await, 404, "item_not_found").await;
    stage.quiet().await;
    assert_eq!(stage.app.sessions.status().size, 1);
}

pub async fn a_lazy_session_is_taken_only_when_asked_for<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    assert_eq!(stage.get("/lazy/0").await.text().await.unwrap(), "cached");
    assert_eq!(stage.app.sessions.status().size, 0);
    assert_eq!(stage.get("/lazy/1").await.text().await.unwrap(), "one");
    stage.quiet().await;
}

pub async fn success_commits_before_the_response_and_failure_rolls_back<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    for (id, status) in [(200, 200), (201, 201), (303, 303), (400, 400), (404, 404), (500, 500)] {
        let client = Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
        let url = stage.url(&format!("/insert/{id}/{status}"));
        let response = within(client.post(url).send()).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        let stored = stage.database.number(&format!("SELECT count(*) FROM items WHERE id = {id}")).await;
        assert_eq!(stored == 1, status < 400, "{status}");
        assert_eq!(
            stage.database.number("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'").await,
            0
        );
    }
    stage.quiet().await;
}

pub async fn a_request_that_does_not_use_its_transaction_costs_nothing<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    assert_eq!(stage.get("/untouched").await.status(), 200);
    assert_eq!(stage.app.sessions.status().size, 0);
}

pub async fn each_class_of_error_has_its_status<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    let table = [
        ("23505", 409, "unique_violation"),
        ("23503", 409, "foreign_key_violation"),
        ("23P01", 409, "exclusion_violation"),
        ("23502", 422, "not_null_violation"),
        ("23514", 422, "check_violation"),
        ("22003", 422, "data_exception"),
        ("40001", 503, "contention"),
        ("55P03", 503, "lock_not_available"),
        ("53300", 503, "database_unavailable"),
        ("57014", 504, "timeout"),
        ("40003", 500, "commit_unknown"),
        ("42501", 500, "internal"),
        ("P0001", 500, "internal"),
    ];
    for (state, status, code) in table {
        for path in ["/raise/", "/raise_in_tx/"] {
            is_problem(stage.post(&format!("{path}{state}")).await, status, code).await;
        }
    }
    // As the server itself raises it.
    is_problem(stage.post("/insert/1/201").await, 409, "unique_violation").await;
    stage.quiet().await;
}

pub async fn a_team_has_its_own_table<F: Framework>() {
    let problems = Problems::new().status("42501", 403).status("check_violation", 400).constraint(
        "items_pkey",
        409,
        "item_exists",
    );
    let stage = Stage::set::<F>(4, |app| app.problems = problems).await;
    is_problem(stage.post("/raise/42501").await, 403, "internal").await;
    is_problem(stage.post("/raise/23514").await, 400, "check_violation").await;
    is_problem(stage.post("/raise/23505").await, 409, "unique_violation").await;
    is_problem(stage.post("/insert/1/201").await, 409, "item_exists").await;
    // A failure that is the layer's, not the handler's.
    is_problem(stage.post("/swallow/1").await, 409, "item_exists").await;
    // The service's own problems stay.
    is_problem(stage.get("/name/2").await, 404, "item_not_found").await;
}

pub async fn a_commit_that_fails_becomes_the_response<F: Framework>() {
    let mut stage = Stage::plain::<F>().await;
    // A deferred constraint is checked at COMMIT.
    is_problem(stage.post("/orphan/7").await, 409, "foreign_key_violation").await;
    assert_eq!(stage.database.number("SELECT count(*) FROM refs").await, 0);
    // The handler ignored a failed statement.
    is_problem(stage.post("/swallow/1").await, 409, "unique_violation").await;
    assert_eq!(stage.items().await, 1);
    assert!(stage.events.try_recv().is_err(), "hooks run only if it is committed");
    stage.quiet().await;
}

pub async fn a_panic_rolls_back<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    let result = within(stage.client.post(stage.url("/panic/7")).send()).await;
    assert!(result.is_err() || result.is_ok_and(|response| response.status().is_server_error()));
    stage.quiet().await;
    assert_eq!(stage.items().await, 1);
    assert_eq!(stage.app.sessions.status().size, 0, "a connection that a panic unwound through is closed");
    assert_eq!(stage.get("/name/1").await.status(), 200);
}

pub async fn a_client_that_leaves_takes_its_statement_with_it<F: Framework>() {
    let deadline = if F::NOTICES_CLIENTS_THAT_LEAVE { None } else { Some(Duration::from_secs(1)) };
    let stage = Stage::set::<F>(4, |app| app.deadline = deadline).await;
    let mut socket = TcpStream::connect(stage.server.address).await.unwrap();
    socket.write_all(b"POST /slow/7 HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    stage.database.until("EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database())").await;
    let left = std::time::Instant::now();
    drop(socket);
    stage.quiet().await;
    // Far less than the minute it sleeps; the bound on cleaning up is 2 s.
    assert!(left.elapsed() < Duration::from_secs(10), "{:?}", left.elapsed());
    assert_eq!(stage.items().await, 1);
    assert_eq!(stage.get("/name/1").await.status(), 200);
    assert_eq!(stage.app.sessions.status().size, 1, "the connection was kept");
}

pub async fn a_deadline_cancels_what_runs<F: Framework>() {
    let stage = Stage::set::<F>(4, |app| app.deadline = Some(Duration::from_millis(300))).await;
    is_problem(stage.post("/slow/7").await, 504, "timeout").await;
    stage.quiet().await;
    assert_eq!(stage.items().await, 1);
    assert_eq!(stage.post("/insert/7/201").await.status(), 201);
}

pub async fn five_hundred_requests_share_eight_connections<F: Framework>() {
    let stage = Stage::set::<F>(8, |_| {}).await;
    let requests: Vec<_> = (1000..1500)
        .map(|id| {
            let (client, url) = (stage.client.clone(), stage.url(&format!("/insert/{id}/201")));
            tokio::spawn(async move { client.post(url).send().await.expect("a response").status() })
        })
        .collect();
    for request in requests {
        assert_eq!(within(request).await.unwrap(), 201);
    }
    assert_eq!(stage.items().await, 501);
    assert!(stage.app.sessions.status().size <= 8);
    stage.quiet().await;
}

pub async fn a_full_pool_is_a_503_that_says_when_to_come_again<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    let config = stage.database.config().max_size(1).acquire_timeout(Duration::from_millis(100));
    let sessions = SessionManager::new(config).unwrap();
    let stage = Stage::set::<F>(1, |app| app.sessions = sessions).await;
    let holder = tokio::spawn({
        let (client, url) = (stage.client.clone(), stage.url("/hold"));
        async move { client.get(url).send().await.expect("a response").status() }
    });
    while stage.app.sessions.status().in_use < 1 {
        tokio::task::yield_now().await;
    }
    for path in ["/name/1", "/isolation"] {
        let response = stage.get(path).await;
        assert_eq!(response.headers()["retry-after"], "1");
        is_problem(response, 503, "pool_exhausted").await;
    }
    stage.app.gate.add_permits(1);
    assert_eq!(within(holder).await.unwrap(), 200);
}

pub async fn a_body_is_streamed_without_a_transaction<F: Framework>() {
    let stage = Stage::set::<F>(1, |_| {}).await;
    let n = 500;
    let mut response = stage.get(&format!("/stream/{n}")).await;
    let first = within(response.chunk()).await.unwrap().expect("a chunk");
    assert!(first.starts_with(b"1 "));
    // While the rest is not read, the stream has the only session, outside of any transaction block.
    assert_eq!(stage.app.sessions.status().in_use, 1);
    assert_eq!(
        stage
            .database
            .number(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
            )
            .await,
        0
    );
    let mut length = first.len();
    while let Some(chunk) = within(response.chunk()).await.unwrap() {
        length += chunk.len();
    }
    assert_eq!(length, n * LINE as usize);
    stage.quiet().await;

    // A client that reads only the beginning.
    let mut response = stage.get(&format!("/stream/{}", 50_000_000)).await;
    within(response.chunk()).await.unwrap().expect("a chunk");
    drop(response);
    stage.quiet().await;
    assert_eq!(stage.get("/name/1").await.status(), 200);
}

pub async fn middleware_and_handler_use_one_transaction<F: Framework>() {
    let stage = Stage::set::<F>(1, |_| {}).await;
    assert_eq!(stage.post("/both/7/201").await.status(), 201);
    assert_eq!(stage.items().await, 2);
    assert_eq!(stage.database.number("SELECT count(*) FROM audit").await, 2);
    let transactions = "SELECT count(DISTINCT x) FROM (SELECT xmin::text AS x FROM items WHERE id = 7 \
        UNION ALL SELECT xmin::text FROM audit) AS t";
    assert_eq!(stage.database.number(transactions).await, 1);

    assert_eq!(stage.post("/both/8/400").await.status(), 400);
    assert_eq!(stage.items().await, 2);
    assert_eq!(stage.database.number("SELECT count(*) FROM audit").await, 2);
    stage.quiet().await;
}

pub async fn two_arguments_are_one_transaction<F: Framework>() {
    // actix-web asks for both at once; there is one connection.
    let stage = Stage::set::<F>(1, |_| {}).await;
    assert_eq!(stage.post("/twice/7").await.status(), 201);
    assert_eq!(stage.items().await, 3);
    assert_eq!(stage.database.number("SELECT count(DISTINCT xmin::text) FROM items WHERE id > 1").await, 1);
    stage.quiet().await;
}

pub async fn a_route_chooses_isolation_and_access_mode<F: Framework>() {
    let stage = Stage::set::<F>(1, |_| {}).await;
    assert_eq!(stage.get("/isolation").await.text().await.unwrap(), "serializable on");
    // One layer around all routes and one around this: still one transaction, on the one connection there is.
    assert_eq!(stage.post("/insert/7/201").await.status(), 201);
    // Too late: a middleware further out has begun it.
    is_problem(stage.get("/too_late").await, 500, "internal").await;
    stage.quiet().await;
}

pub async fn a_transaction_kept_beyond_its_handler_is_rolled_back<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    is_problem(stage.post("/keep/7").await, 500, "internal").await;
    assert_eq!(stage.items().await, 1);
    stage.app.gate.add_permits(1); // the task that kept it ends
    stage.quiet().await;
    assert_eq!(stage.app.sessions.status().size, 0);
}

pub async fn a_handler_can_decide_to_roll_back<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    assert_eq!(stage.post("/rollback_only/7").await.status(), 200);
    assert_eq!(stage.items().await, 1);
    stage.quiet().await;
}

pub async fn a_savepoint_undoes_a_part<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    assert_eq!(stage.post("/savepoint/7").await.status(), 201);
    assert_eq!(stage.items().await, 2);
    stage.quiet().await;
}

pub async fn hooks_run_before_the_response<F: Framework>() {
    let mut stage = Stage::plain::<F>().await;
    stage.app.gate.add_permits(1);
    assert_eq!(stage.post("/hook/7/201").await.status(), 201);
    assert_eq!(stage.events.try_recv(), Ok("committed"));
    // Not if it is rolled back.
    assert_eq!(stage.post("/hook/8/400").await.status(), 400);
    assert!(stage.events.try_recv().is_err());
}

pub async fn hooks_run_after_the_response_if_so_chosen<F: Framework>() {
    let mut stage = Stage::set::<F>(1, |app| app.hooks_after_response = true).await;
    // The hook waits at the gate, and still the response comes.
    let response = stage.post("/hook/7/201").await;
    assert_eq!(response.status(), 201);
    assert_eq!(response.text().await.unwrap(), "stored");
    // And the session is back: hooks hold none.
    assert_eq!(stage.get("/name/7").await.text().await.unwrap(), "new");
    assert!(stage.events.try_recv().is_err());
    stage.app.gate.add_permits(1);
    assert_eq!(within(stage.events.recv()).await, Some("committed"));
    assert_eq!(stage.post("/hook/8/400").await.status(), 400);
    assert!(stage.events.try_recv().is_err());
}

pub async fn a_transaction_without_its_layer_is_an_error_that_says_so<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    is_problem(stage.get("/unlayered").await, 500, "internal").await;
}

pub async fn probes_get_the_pool_in_numbers<F: Framework>() {
    let stage = Stage::plain::<F>().await;
    let live: Value = stage.get("/health/live").await.json().await.unwrap();
    assert_eq!(live, json!({ "status": "live" }));
    assert_eq!(stage.app.sessions.status().size, 0);
    let ready = stage.get("/health/ready").await;
    assert_eq!(
        (ready.status().as_u16(), ready.headers()["cache-control"].to_str().unwrap()),
        (200, "no-store")
    );
    assert_eq!(
        ready.json::<Value>().await.unwrap(),
        json!({
            "status": "ready",
            "pool": { "max_size": 4, "size": 1, "idle": 1, "in_use": 0, "connecting": 0, "waiting": 0 }
        })
    );
    assert_eq!(stage.app.sessions.close().await, 0);
    let ready = stage.get("/health/ready").await;
    assert_eq!(ready.status(), 503);
    assert_eq!(ready.json::<Value>().await.unwrap()["code"], "shutting_down");
    is_problem(stage.get("/name/1").await, 503, "shutting_down").await;
    assert_eq!(stage.get("/health/live").await.status(), 200);
}

pub async fn a_graceful_shutdown_loses_no_request<F: Framework>() {
    let mut stage = Stage::set::<F>(8, |_| {}).await;
    let requests: Vec<_> = (1000..1064)
        .map(|id| {
            let (client, url) = (stage.client.clone(), stage.url(&format!("/gated/{id}")));
            tokio::spawn(async move { client.post(url).send().await.expect("a response").status() })
        })
        .collect();
    // All have arrived: eight have a session, the others wait for one.
    within(async {
        while (stage.app.sessions.status().in_use, stage.app.sessions.status().waiting) != (8, 56) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    stage.server.begin_to_stop();
    stage.app.gate.add_permits(64);
    for request in requests {
        assert_eq!(within(request).await.unwrap(), 201);
    }
    stage.server.stopped().await;
    assert_eq!(within(stage.app.sessions.close()).await, 0);
    assert_eq!(stage.database.number("SELECT count(*) FROM items").await, 65);
}

/// Every scenario as a test of this framework.
macro_rules! scenarios {
    ($framework:ty: $($name:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                crate::web::$name::<$framework>().await;
            }
        )*
    };
    ($framework:ty) => {
        crate::web::scenarios! { $framework:
            a_session_is_lent_for_a_request_and_given_back
            a_lazy_session_is_taken_only_when_asked_for
            success_commits_before_the_response_and_failure_rolls_back
            a_request_that_does_not_use_its_transaction_costs_nothing
            each_class_of_error_has_its_status
            a_team_has_its_own_table
            a_commit_that_fails_becomes_the_response
            a_panic_rolls_back
            a_client_that_leaves_takes_its_statement_with_it
            a_deadline_cancels_what_runs
            five_hundred_requests_share_eight_connections
            a_full_pool_is_a_503_that_says_when_to_come_again
            a_body_is_streamed_without_a_transaction
            middleware_and_handler_use_one_transaction
            two_arguments_are_one_transaction
            a_route_chooses_isolation_and_access_mode
            a_transaction_kept_beyond_its_handler_is_rolled_back
            a_handler_can_decide_to_roll_back
            a_savepoint_undoes_a_part
            hooks_run_before_the_response
            hooks_run_after_the_response_if_so_chosen
            a_transaction_without_its_layer_is_an_error_that_says_so
            probes_get_the_pool_in_numbers
            a_graceful_shutdown_loses_no_request
        }
    };
}
pub(crate) use scenarios;

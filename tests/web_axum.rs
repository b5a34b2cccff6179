//! The scenarios of `web/mod.rs`, served by axum.
#![cfg(all(feature = "axum", feature = "testing"))]

mod common;
mod web;

use std::net::TcpListener;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRef, Path, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{get, post};
use pg_session::axum::{liveness, readiness};
use pg_session::{
    Error, LazySession, Problem, RequestTransactions, Session, SessionManager, TransactionOptions, Tx,
};
use tokio::sync::oneshot;
use web::{App, Framework, Server, audit, insert, lines};

struct Axum;

web::scenarios!(Axum);

impl FromRef<App> for SessionManager {
    fn from_ref(app: &App) -> Self {
        app.sessions.clone()
    }
}

impl Framework for Axum {
    const NOTICES_CLIENTS_THAT_LEAVE: bool = true;

    fn serve(app: App) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        listener.set_nonblocking(true).expect("a socket");
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
                let serve = axum::serve(listener, router(app));
                let stopped = async { drop(stopped.await) };
                serve.with_graceful_shutdown(stopped).await.expect("served");
            });
        });
        Server { address, stop: Some(stop), thread: Some(thread) }
    }
}

fn router(app: App) -> Router {
    let mut options = TransactionOptions::new();
    if let Some(deadline) = app.deadline {
        options = options.deadline(deadline);
    }
    let mut transactions = RequestTransactions::new(app.sessions.clone()).options(options);
    if app.hooks_after_response {
        transactions = transactions.hooks_after_response();
    }
    let read_only = RequestTransactions::new(app.sessions.clone())
        .options(TransactionOptions::serializable().read_only());
    Router::new()
        .route("/untouched", get(async || "fine"))
        .route("/insert/{id}/{status}", post(insert_and_say))
        .route("/raise_in_tx/{state}", post(raise_in_tx))
        .route("/twice/{id}", post(twice))
        .route("/orphan/{id}", post(orphan))
        .route("/swallow/{id}", post(swallow))
        .route("/panic/{id}", post(panic_after_insert))
        .route("/slow/{id}", post(slow))
        .route("/both/{id}/{status}", post(insert_and_say).layer(from_fn(audited)))
        .route("/isolation", get(isolation).layer(read_only.clone()))
        .route("/too_late", get(isolation).layer(read_only).layer(from_fn(audited)))
        .route("/keep/{id}", post(keep))
        .route("/rollback_only/{id}", post(rollback_only))
        .route("/savepoint/{id}", post(savepoint))
        .route("/hook/{id}/{status}", post(hook))
        .route("/gated/{id}", post(gated))
        .layer(transactions)
        .route("/name/{id}", get(name))
        .route("/lazy/{id}", get(lazy))
        .route("/raise/{state}", post(raise))
        .route("/hold", get(hold))
        .route("/stream/{n}", get(stream))
        .route("/unlayered", get(isolation))
        .route("/health/live", get(liveness))
        .route("/health/ready", get(readiness))
        .layer(app.problems.clone())
        .with_state(app)
}

fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).expect("a status")
}

async fn name(session: Session, Path(id): Path<i64>) -> Result<String, Problem> {
    web::name(&session, id).await?.ok_or_else(|| Problem::new(404, "item_not_found"))
}

async fn lazy(mut session: LazySession, Path(id): Path<i64>) -> Result<String, Problem> {
    if id == 0 {
        return Ok("cached".into());
    }
    Ok(web::name(session.acquire().await?, id).await?.unwrap_or_default())
}

async fn raise(session: Session, Path(state): Path<String>) -> Result<(), Error> {
    session.execute("SELECT raise($1)", &[&state]).await.map(drop)
}

async fn raise_in_tx(tx: Tx, Path(state): Path<String>) -> Result<(), Problem> {
    tx.execute("SELECT raise($1)", &[&state]).await?;
    Ok(())
}

async fn insert_and_say(tx: Tx, Path((id, code)): Path<(i64, u16)>) -> Result<StatusCode, Problem> {
    insert(&tx, id).await?;
    Ok(status(code))
}

async fn twice(one: Tx, other: Tx, Path(id): Path<i64>) -> Result<StatusCode, Problem> {
    insert(&one, id).await?;
    insert(&other, id + 1).await?;
    Ok(StatusCode::CREATED)
}

async fn orphan(tx: Tx, State(app): State<App>, Path(id): Path<i64>) -> Result<StatusCode, Error> {
    tx.execute("INSERT INTO refs VALUES ($1)", &[&id]).await?;
    tx.on_commit(async move || app.events.send("committed").expect("a test"));
    Ok(StatusCode::CREATED)
}

async fn swallow(tx: Tx, Path(id): Path<i64>) -> StatusCode {
    let _ = insert(&tx, id).await;
    StatusCode::CREATED
}

async fn panic_after_insert(tx: Tx, Path(id): Path<i64>) -> StatusCode {
    insert(&tx, id).await.expect("a row");
    panic!("as the test wants it");
}

async fn slow(tx: Tx, Path(id): Path<i64>) -> Result<StatusCode, Error> {
    insert(&tx, id).await?;
    tx.execute("SELECT pg_sleep(60)", &[]).await?;
    Ok(StatusCode::CREATED)
}

async fn audited(tx: Tx, request: Request, next: Next) -> Result<Response, Error> {
    audit(&tx, "before").await?;
    let response = next.run(request).await;
    audit(&tx, "after").await?;
    Ok(response)
}

async fn isolation(tx: Tx) -> Result<String, Error> {
    let sql = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')";
    let row = tx.query_one(sql, &[]).await?;
    Ok(format!("{} {}", row.get::<_, String>(0), row.get::<_, String>(1)))
}

async fn keep(tx: Tx, State(app): State<App>, Path(id): Path<i64>) -> Result<StatusCode, Error> {
    insert(&tx, id).await?;
    tokio::spawn(async move {
        app.pass_gate().await;
        drop(tx);
    });
    Ok(StatusCode::CREATED)
}

async fn rollback_only(tx: Tx, Path(id): Path<i64>) -> Result<StatusCode, Error> {
    insert(&tx, id).await?;
    tx.set_rollback_only();
    Ok(StatusCode::OK)
}

async fn savepoint(mut tx: Tx, Path(id): Path<i64>) -> Result<StatusCode, Error> {
    let mut other = tx.clone();
    let exists = tx
        .savepoint(async |sp| {
            let refused = other.savepoint(async |_| Ok::<_, Error>(())).await;
            assert!(matches!(refused, Err(Error::SavepointOpen)));
            insert(sp, 1).await
        })
        .await;
    assert!(exists.is_err_and(|e| e.is_unique_violation()));
    tx.savepoint(async |sp| insert(sp, id).await).await?;
    Ok(StatusCode::CREATED)
}

async fn hook(
    tx: Tx,
    State(app): State<App>,
    Path((id, code)): Path<(i64, u16)>,
) -> Result<(StatusCode, &'static str), Error> {
    insert(&tx, id).await?;
    tx.on_commit(async move || {
        app.pass_gate().await;
        app.events.send("committed").expect("a test");
    });
    Ok((status(code), "stored"))
}

async fn gated(tx: Tx, State(app): State<App>, Path(id): Path<i64>) -> Result<StatusCode, Error> {
    app.pass_gate().await;
    insert(&tx, id).await?;
    Ok(StatusCode::CREATED)
}

async fn hold(_session: Session, State(app): State<App>) -> StatusCode {
    app.pass_gate().await;
    StatusCode::OK
}

async fn stream(sessions: SessionManager, Path(n): Path<i64>) -> Body {
    Body::from_stream(lines(sessions, n))
}

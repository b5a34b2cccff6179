//! The scenarios of `web/mod.rs`, served by actix-web.
#![cfg(all(feature = "actix-web", feature = "testing"))]

mod common;
mod web;

use std::net::TcpListener;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::StatusCode;
use actix_web::middleware::{Next, from_fn};
use actix_web::web::{Data, Path, get, post, resource, scope};
use actix_web::{App as ActixApp, HttpResponse, HttpServer};
use pg_session::actix_web::{liveness, readiness};
use pg_session::{
    Error, LazySession, Problem, RequestTransactions, Session, SessionManager, TransactionOptions, Tx,
};
use tokio::sync::oneshot;
use web::{App, Framework, Server, audit, insert, lines};

struct Actix;

web::scenarios!(Actix);

impl Framework for Actix {
    const NOTICES_CLIENTS_THAT_LEAVE: bool = false;

    fn serve(app: App) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            actix_web::rt::System::new().block_on(async {
                let factory = move || {
                    let problems = app.problems.clone();
                    ActixApp::new().wrap(problems).configure(|config| routes(config, &app))
                };
                let server = HttpServer::new(factory).workers(2).disable_signals().shutdown_timeout(20);
                let server = server.listen(listener).expect("a socket").run();
                let handle = server.handle();
                actix_web::rt::spawn(async move {
                    drop(stopped.await);
                    handle.stop(true).await;
                });
                server.await.expect("served");
            });
        });
        Server { address, stop: Some(stop), thread: Some(thread) }
    }
}

fn routes(config: &mut actix_web::web::ServiceConfig, app: &App) {
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
    config
        .app_data(Data::new(app.sessions.clone()))
        .app_data(Data::new(app.clone()))
        .route("/name/{id}", get().to(name))
        .route("/lazy/{id}", get().to(lazy))
        .route("/raise/{state}", post().to(raise))
        .route("/hold", get().to(hold))
        .route("/stream/{n}", get().to(stream))
        .route("/unlayered", get().to(isolation))
        .route("/health/live", get().to(liveness))
        .route("/health/ready", get().to(readiness))
        .service(
            scope("")
                .route("/untouched", get().to(async || "fine"))
                .route("/insert/{id}/{status}", post().to(insert_and_say))
                .route("/raise_in_tx/{state}", post().to(raise_in_tx))
                .route("/twice/{id}", post().to(twice))
                .route("/orphan/{id}", post().to(orphan))
                .route("/swallow/{id}", post().to(swallow))
                .route("/panic/{id}", post().to(panic_after_insert))
                .route("/slow/{id}", post().to(slow))
                .service(
                    resource("/both/{id}/{status}").wrap(from_fn(audited)).route(post().to(insert_and_say)),
                )
                .service(resource("/isolation").wrap(read_only.clone()).route(get().to(isolation)))
                .service(
                    resource("/too_late").wrap(read_only).wrap(from_fn(audited)).route(get().to(isolation)),
                )
                .route("/keep/{id}", post().to(keep))
                .route("/rollback_only/{id}", post().to(rollback_only))
                .route("/savepoint/{id}", post().to(savepoint))
                .route("/hook/{id}/{status}", post().to(hook))
                .route("/gated/{id}", post().to(gated))
                .wrap(transactions),
        );
}

fn answer(code: u16) -> HttpResponse {
    HttpResponse::new(StatusCode::from_u16(code).expect("a status"))
}

async fn name(session: Session, id: Path<i64>) -> Result<String, Problem> {
    web::name(&session, *id).await?.ok_or_else(|| Problem::new(404, "item_not_found"))
}

async fn lazy(mut session: LazySession, id: Path<i64>) -> Result<String, Problem> {
    if *id == 0 {
        return Ok("cached".into());
    }
    Ok(web::name(session.acquire().await?, *id).await?.unwrap_or_default())
}

async fn raise(session: Session, state: Path<String>) -> Result<&'static str, Error> {
    session.execute("SELECT raise($1)", &[&*state]).await.map(|_| "")
}

async fn raise_in_tx(tx: Tx, state: Path<String>) -> Result<&'static str, Problem> {
    tx.execute("SELECT raise($1)", &[&*state]).await?;
    Ok("")
}

async fn insert_and_say(tx: Tx, path: Path<(i64, u16)>) -> Result<HttpResponse, Problem> {
    let (id, code) = *path;
    insert(&tx, id).await?;
    Ok(answer(code))
}

async fn twice(one: Tx, other: Tx, id: Path<i64>) -> Result<HttpResponse, Problem> {
    insert(&one, *id).await?;
    insert(&other, *id + 1).await?;
    Ok(answer(201))
}

async fn orphan(tx: Tx, app: Data<App>, id: Path<i64>) -> Result<HttpResponse, Error> {
    tx.execute("INSERT INTO refs VALUES ($1)", &[&*id]).await?;
    let events = app.events.clone();
    tx.on_commit(async move || events.send("committed").expect("a test"));
    Ok(answer(201))
}

async fn swallow(tx: Tx, id: Path<i64>) -> HttpResponse {
    let _ = insert(&tx, *id).await;
    answer(201)
}

async fn panic_after_insert(tx: Tx, id: Path<i64>) -> HttpResponse {
    insert(&tx, *id).await.expect("a row");
    panic!("as the test wants it");
}

async fn slow(tx: Tx, id: Path<i64>) -> Result<HttpResponse, Error> {
    insert(&tx, *id).await?;
    tx.execute("SELECT pg_sleep(60)", &[]).await?;
    Ok(answer(201))
}

async fn audited(
    tx: Tx,
    request: ServiceRequest,
    next: Next<impl MessageBody>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    audit(&tx, "before").await?;
    let response = next.call(request).await?;
    audit(&tx, "after").await?;
    Ok(response)
}

async fn isolation(tx: Tx) -> Result<String, Error> {
    let sql = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')";
    let row = tx.query_one(sql, &[]).await?;
    Ok(format!("{} {}", row.get::<_, String>(0), row.get::<_, String>(1)))
}

async fn keep(tx: Tx, app: Data<App>, id: Path<i64>) -> Result<HttpResponse, Error> {
    insert(&tx, *id).await?;
    let app = App::clone(&app);
    tokio::spawn(async move {
        app.pass_gate().await;
        drop(tx);
    });
    Ok(answer(201))
}

async fn rollback_only(tx: Tx, id: Path<i64>) -> Result<HttpResponse, Error> {
    insert(&tx, *id).await?;
    tx.set_rollback_only();
    Ok(answer(200))
}

async fn savepoint(mut tx: Tx, id: Path<i64>) -> Result<HttpResponse, Error> {
    let mut other = tx.clone();
    let exists = tx
        .savepoint(async |sp| {
            let refused = other.savepoint(async |_| Ok::<_, Error>(())).await;
            assert!(matches!(refused, Err(Error::SavepointOpen)));
            insert(sp, 1).await
        })
        .await;
    assert!(exists.is_err_and(|e| e.is_unique_violation()));
    tx.savepoint(async |sp| insert(sp, *id).await).await?;
    Ok(answer(201))
}

async fn hook(tx: Tx, app: Data<App>, path: Path<(i64, u16)>) -> Result<HttpResponse, Error> {
    let (id, code) = *path;
    insert(&tx, id).await?;
    let app = App::clone(&app);
    tx.on_commit(async move || {
        app.pass_gate().await;
        app.events.send("committed").expect("a test");
    });
    Ok(answer(code).map_body(|_, _| "stored").map_into_boxed_body())
}

async fn gated(tx: Tx, app: Data<App>, id: Path<i64>) -> Result<HttpResponse, Error> {
    app.pass_gate().await;
    insert(&tx, *id).await?;
    Ok(answer(201))
}

async fn hold(_session: Session, app: Data<App>) -> HttpResponse {
    app.pass_gate().await;
    answer(200)
}

async fn stream(sessions: SessionManager, n: Path<i64>) -> HttpResponse {
    HttpResponse::Ok().streaming(lines(sessions, *n))
}

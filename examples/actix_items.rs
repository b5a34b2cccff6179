//! A small REST service on actix-web: `cargo run --example actix_items --features actix-web,testing`
//!
//! The same service as `axum_items`, whose head shows how to call it; what they share is in `items/`.

pub(crate) mod items;

use actix_web::error::JsonPayloadError;
use actix_web::http::header;
use actix_web::web::{Data, JsonConfig, PathConfig, Payload, QueryConfig, ServiceConfig, resource};
use actix_web::web::{Json, Path, Query, get, post, scope};
use actix_web::{App, HttpResponse, HttpServer};
use items::{NewItem, Paging, Transfer, start};
use pg_session::actix_web::{liveness, readiness};
use pg_session::{Problem, RequestTransactions, Session, SessionManager, Tx};

#[actix_web::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    start::log();
    // Made here and shared by all workers: its connections live on this runtime.
    let (sessions, _server) = start::database().await?;
    let listener = std::net::TcpListener::bind(start::address())?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    let server = HttpServer::new({
        let sessions = sessions.clone();
        move || App::new().wrap(items::problems()).configure(|config| routes(config, &sessions))
    })
    .disable_signals()
    .shutdown_timeout(30)
    .listen(listener)?
    .run();
    let handle = server.handle();
    actix_web::rt::spawn(async move {
        start::stop_signal().await;
        handle.stop(true).await;
    });
    server.await?;
    let cut = sessions.close().await;
    tracing::info!("stopped; {cut} sessions had to be cut");
    Ok(())
}

pub(crate) fn routes(config: &mut ServiceConfig, sessions: &SessionManager) {
    // Problems for what cannot be read.
    let json = JsonConfig::default().error_handler(|e, _| {
        let status = match &e {
            JsonPayloadError::ContentType => 415,
            JsonPayloadError::Overflow { .. } | JsonPayloadError::OverflowKnownLength { .. } => 413,
            JsonPayloadError::Deserialize(e) if e.is_data() => 422,
            _ => 400,
        };
        Problem::new(status, "body_unreadable").detail(e.to_string()).into()
    });
    let path = PathConfig::default().error_handler(|_, _| Problem::new(404, "item_not_found").into());
    let query = QueryConfig::default().error_handler(|e, _| items::invalid(e.to_string()).into());
    config
        .app_data(json)
        .app_data(path)
        .app_data(query)
        .app_data(Data::new(sessions.clone()))
        .route("/health/live", get().to(liveness))
        .route("/health/ready", get().to(readiness))
        .route("/items/bulk", post().to(load))
        .route("/transfers", post().to(transfer))
        .service(
            // A transaction for each request that takes a `Tx`.
            scope("/items")
                .wrap(RequestTransactions::new(sessions.clone()))
                .service(resource("").post(create).get(list))
                .service(resource("/{id}").get(read).put(update).delete(delete)),
        );
}

async fn create(tx: Tx, new: Json<NewItem>) -> Result<HttpResponse, Problem> {
    let item = items::create(&tx, &new).await?;
    let name = item.name.clone();
    tx.on_commit(async move || tracing::info!("{name} is for sale"));
    let location = format!("/items/{}", item.id);
    Ok(HttpResponse::Created().insert_header((header::LOCATION, location)).json(item))
}

async fn read(session: Session, id: Path<i64>) -> Result<HttpResponse, Problem> {
    Ok(HttpResponse::Ok().json(items::read(&session, *id).await?))
}

async fn list(session: Session, paging: Query<Paging>) -> Result<HttpResponse, Problem> {
    Ok(HttpResponse::Ok().json(items::list(&session, &paging).await?))
}

async fn update(tx: Tx, id: Path<i64>, new: Json<NewItem>) -> Result<HttpResponse, Problem> {
    Ok(HttpResponse::Ok().json(items::update(&tx, *id, &new).await?))
}

async fn delete(tx: Tx, id: Path<i64>) -> Result<HttpResponse, Problem> {
    items::delete(&tx, *id).await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn load(sessions: SessionManager, body: Payload) -> Result<HttpResponse, Problem> {
    let loaded = items::load(&sessions, body).await?;
    Ok(HttpResponse::Created().json(serde_json::json!({ "loaded": loaded })))
}

async fn transfer(sessions: SessionManager, order: Json<Transfer>) -> Result<HttpResponse, Problem> {
    items::transfer(&sessions, &order).await?;
    Ok(HttpResponse::NoContent().finish())
}

//! A small REST service on axum: `cargo run --example axum_items --features axum,testing`
//!
//! ```console
//! $ curl -i localhost:8080/items -H 'content-type: application/json' -d '{"name":"lamp","price_cents":4900,"stock":3}'
//! $ curl -i localhost:8080/items/1
//! $ curl -i 'localhost:8080/items?limit=10&after=0'
//! $ curl -i -X PUT localhost:8080/items/1 -H 'content-type: application/json' -d '{"name":"lamp","price_cents":3900,"stock":5}'
//! $ curl -i -X DELETE localhost:8080/items/1
//! $ printf '{"name":"a","price_cents":1,"stock":9}\n{"name":"b","price_cents":2}\n' | curl -i localhost:8080/items/bulk --data-binary @-
//! $ curl -i localhost:8080/transfers -H 'content-type: application/json' -d '{"from":2,"to":3,"quantity":4}'
//! $ curl -i localhost:8080/health/ready
//! ```
//!
//! `DATABASE_URL` says which database, else it starts a throw-away server; `LISTEN` where to listen. `actix_items` is the
//! same service on actix-web; what they share is in `items/`.

pub(crate) mod items;

use axum::body::Body;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Router, serve};
use items::{NewItem, Paging, Transfer, start};
use pg_session::axum::{liveness, readiness};
use pg_session::{Problem, RequestTransactions, Session, SessionManager, Tx};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    start::log();
    let (sessions, _server) = start::database().await?;
    let listener = tokio::net::TcpListener::bind(start::address()).await?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    serve(listener, router(sessions.clone())).with_graceful_shutdown(start::stop_signal()).await?;
    let cut = sessions.close().await;
    tracing::info!("stopped; {cut} sessions had to be cut");
    Ok(())
}

pub(crate) fn router(sessions: SessionManager) -> Router {
    // A transaction for each request that writes; what reads takes a session.
    let transactions = RequestTransactions::new(sessions.clone());
    Router::new()
        .route("/items", post(create).layer(transactions.clone()).get(list))
        .route("/items/{id}", put(update).delete(delete).layer(transactions).get(read))
        .route("/items/bulk", post(load))
        .route("/transfers", post(transfer))
        .route("/health/live", get(liveness))
        .route("/health/ready", get(readiness))
        .layer(items::problems())
        .with_state(sessions)
}

/// JSON both ways, with problems for what cannot be read.
#[derive(FromRequest)]
#[from_request(via(axum::Json), rejection(Refused))]
struct Json<T>(T);

impl<T: serde::Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Refused))]
struct Path<T>(T);

#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Refused))]
struct Query<T>(T);

struct Refused(Problem);

impl From<JsonRejection> for Refused {
    fn from(e: JsonRejection) -> Self {
        Self(Problem::new(e.status().as_u16(), "body_unreadable").detail(e.body_text()))
    }
}

impl From<PathRejection> for Refused {
    fn from(_: PathRejection) -> Self {
        Self(Problem::new(404, "item_not_found"))
    }
}

impl From<QueryRejection> for Refused {
    fn from(e: QueryRejection) -> Self {
        Self(items::invalid(e.body_text()))
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

async fn create(tx: Tx, Json(new): Json<NewItem>) -> Result<impl IntoResponse, Problem> {
    let item = items::create(&tx, &new).await?;
    let name = item.name.clone();
    tx.on_commit(async move || tracing::info!("{name} is for sale"));
    let location = format!("/items/{}", item.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(item)))
}

async fn read(session: Session, Path(id): Path<i64>) -> Result<impl IntoResponse, Problem> {
    Ok(Json(items::read(&session, id).await?))
}

async fn list(session: Session, Query(paging): Query<Paging>) -> Result<impl IntoResponse, Problem> {
    Ok(Json(items::list(&session, &paging).await?))
}

async fn update(tx: Tx, Path(id): Path<i64>, Json(new): Json<NewItem>) -> Result<impl IntoResponse, Problem> {
    Ok(Json(items::update(&tx, id, &new).await?))
}

async fn delete(tx: Tx, Path(id): Path<i64>) -> Result<StatusCode, Problem> {
    items::delete(&tx, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn load(sessions: SessionManager, body: Body) -> Result<impl IntoResponse, Problem> {
    let loaded = items::load(&sessions, body.into_data_stream()).await?;
    Ok((StatusCode::CREATED, Json(serde_json::json!({ "loaded": loaded }))))
}

async fn transfer(sessions: SessionManager, Json(order): Json<Transfer>) -> Result<StatusCode, Problem> {
    items::transfer(&sessions, &order).await?;
    Ok(StatusCode::NO_CONTENT)
}

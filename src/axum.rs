//! The adapter for axum: extractors, responses, and the layers.
//!
//! | as | what it does |
//! |---|---|
//! | extractor | [`Session`]: acquired for the request; [`LazySession`]: when first asked for; [`SessionManager`] itself |
//! | extractor | [`Tx`]: the request's transaction, see [`RequestTransactions`] |
//! | layer | [`RequestTransactions`]: a transaction per request; [`Problems`]: another table of statuses |
//! | response | [`Error`] and [`Problem`]: `application/problem+json` by that table; a handler's error type is either |
//! | handler | [`liveness`] and [`readiness`] |
//!
//! The state of the router holds the [`SessionManager`], or *is* it; `FromRef` says where:
//!
//! ```
//! use axum::extract::{FromRef, Path};
//! use axum::http::StatusCode;
//! use axum::routing::{get, post};
//! use axum::{Json, Router};
//! use pg_session::{Problem, RequestTransactions, Session, SessionManager, TransactionOptions, Tx};
//!
//! #[derive(Clone, FromRef)]
//! struct App {
//!     sessions: SessionManager,
//! }
//!
//! async fn name(session: Session, Path(id): Path<i64>) -> Result<String, Problem> {
//!     match session.query_opt("SELECT name FROM users WHERE id = $1", &[&id]).await? {
//!         Some(row) => Ok(row.get(0)),
//!         None => Err(Problem::new(404, "user_not_found")),
//!     }
//! }
//!
//! async fn create(tx: Tx, Json(name): Json<String>) -> Result<StatusCode, Problem> {
//!     tx.execute("INSERT INTO users (name) VALUES ($1)", &[&name]).await?;
//!     tx.on_commit(async || println!("a user was created"));
//!     Ok(StatusCode::CREATED) // committed before it is sent
//! }
//!
//! fn router(sessions: SessionManager) -> Router {
//!     Router::new()
//!         .route("/users/{id}", get(name))
//!         .route("/users", post(create))
//!         .layer(RequestTransactions::new(sessions.clone()))
//!         .route("/health/live", get(pg_session::axum::liveness))
//!         .route("/health/ready", get(pg_session::axum::readiness))
//!         .with_state(App { sessions })
//! }
//! # async fn serve(sessions: SessionManager) -> std::io::Result<()> {
//! # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! axum::serve(listener, router(sessions)).await
//! # }
//! ```
//!
//! A client that goes away takes its request with it: what the handler runs is cancelled on the server, and its
//! transaction is rolled back.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum_core::BoxError;
use axum_core::body::Body;
use axum_core::extract::{FromRef, FromRequestParts};
use axum_core::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderValue, Request, StatusCode, response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::error::Error;
use crate::health::Health;
use crate::lazy_session::LazySession;
use crate::manager::SessionManager;
use crate::problem::{Problem, Problems};
use crate::request::{AfterResponse, Ended, RequestTransaction, RequestTransactions, Scoped, Tx};
use crate::session::Session;

impl<S> FromRequestParts<S> for SessionManager
where
    S: Send + Sync,
    Self: FromRef<S>,
{
    type Rejection = Infallible;

    async fn from_request_parts(_: &mut Parts, state: &S) -> Result<Self, Infallible> {
        Ok(Self::from_ref(state))
    }
}

impl<S> FromRequestParts<S> for Session
where
    S: Send + Sync,
    SessionManager: FromRef<S>,
{
    type Rejection = Error;

    async fn from_request_parts(_: &mut Parts, state: &S) -> Result<Self, Error> {
        SessionManager::from_ref(state).acquire().await
    }
}

impl<S> FromRequestParts<S> for LazySession
where
    S: Send + Sync,
    SessionManager: FromRef<S>,
{
    type Rejection = Infallible;

    async fn from_request_parts(_: &mut Parts, state: &S) -> Result<Self, Infallible> {
        Ok(Self::new(SessionManager::from_ref(state)))
    }
}

impl<S: Sync> FromRequestParts<S> for Tx {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let transaction = parts.extensions.get::<RequestTransaction>();
        transaction.ok_or_else(RequestTransaction::missing)?.tx().await
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        Problem::from(self).into_response()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        self.log();
        render(self, Response::new(()).into_parts().0)
    }
}

/// Makes a response say this problem, whatever it said before; other headers stay.
fn render(problem: Problem, mut head: response::Parts) -> Response {
    head.status = StatusCode::from_u16(problem.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for header in [CONTENT_LENGTH, CONTENT_ENCODING, RETRY_AFTER] {
        head.headers.remove(header);
    }
    head.headers.insert(CONTENT_TYPE, HeaderValue::from_static(Problem::CONTENT_TYPE));
    if let Some(seconds) = problem.retry_after() {
        head.headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    let body = Body::from(problem.body());
    head.extensions.insert(problem); // for another table further out
    Response::from_parts(head, body)
}

/// Whether this process runs: 200, without asking the database. For restarting what hangs.
pub async fn liveness() -> Response {
    health(Health::live())
}

/// Whether requests can be served: 200 if the database answers through the pool within two seconds, else 503 with a
/// code as in [`Problems`]; the pool's numbers in both cases. For sending requests elsewhere meanwhile.
///
/// ```json
/// {"status":"ready","pool":{"max_size":10,"size":3,"idle":2,"in_use":1,"connecting":0,"waiting":0}}
/// ```
pub async fn readiness(sessions: SessionManager) -> Response {
    health(Health::ready(&sessions).await)
}

fn health(health: Health) -> Response {
    let status = StatusCode::from_u16(health.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let headers = [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")];
    (status, headers, health.body).into_response()
}

impl<S> Layer<S> for RequestTransactions {
    type Service = TransactionService<S>;

    fn layer(&self, inner: S) -> TransactionService<S> {
        TransactionService { settings: self.clone(), inner }
    }
}

/// The service that [`RequestTransactions`] wraps around another.
#[derive(Clone, Debug)]
pub struct TransactionService<S> {
    settings: RequestTransactions,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for TransactionService<S>
where
    S: Service<Request<B>, Response = http::Response<R>>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = TransactionFuture<S::Future, R, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let scope = match self.settings.enter(request.extensions().get()) {
            Ok(scope) => scope,
            Err(e) => return TransactionFuture { scoped: None, refused: Some(e) },
        };
        request.extensions_mut().insert(scope.transaction().clone());
        let rest = self.inner.call(request);
        let scoped = scope.run(rest, |response: &http::Response<R>| response.status().as_u16());
        TransactionFuture { scoped: Some(scoped), refused: None }
    }
}

pin_project! {
    /// The future of a [`TransactionService`].
    pub struct TransactionFuture<F, R, E> {
        #[pin]
        scoped: Option<Scoped<F, http::Response<R>, E>>,
        refused: Option<Error>,
    }
}

impl<F, R, E> fmt::Debug for TransactionFuture<F, R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransactionFuture").finish_non_exhaustive()
    }
}

impl<F, R, E> Future for TransactionFuture<F, R, E>
where
    F: Future<Output = Result<http::Response<R>, E>>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let ended = match (this.scoped.as_pin_mut(), this.refused.take()) {
            (Some(scoped), _) => ready!(scoped.poll(cx)),
            (None, Some(e)) => Err(e),
            // It is polled again after its end.
            (None, None) => return Poll::Pending,
        };
        Poll::Ready(match ended {
            Ok(Ended::Response(response, None)) => Ok(response.map(Body::new)),
            Ok(Ended::Response(response, Some(hooks))) => {
                Ok(response.map(|body| Body::new(WithHooks { body: Body::new(body), _hooks: hooks })))
            }
            Ok(Ended::Failed(e)) => Err(e),
            Err(e) => Ok(e.into_response()),
        })
    }
}

/// A body that takes the hooks along: they run when the server has done with it.
struct WithHooks {
    body: Body,
    _hooks: AfterResponse,
}

impl HttpBody for WithHooks {
    type Data = Bytes;
    type Error = axum_core::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum_core::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<S> Layer<S> for Problems {
    type Service = ProblemService<S>;

    fn layer(&self, inner: S) -> ProblemService<S> {
        ProblemService { problems: self.clone(), inner }
    }
}

/// The service that [`Problems`] wraps around another.
#[derive(Clone, Debug)]
pub struct ProblemService<S> {
    problems: Problems,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for ProblemService<S>
where
    S: Service<Request<B>, Response = http::Response<R>>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = ProblemFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        ProblemFuture { rest: self.inner.call(request), problems: self.problems.clone() }
    }
}

pin_project! {
    /// The future of a [`ProblemService`].
    #[derive(Debug)]
    pub struct ProblemFuture<F> {
        #[pin]
        rest: F,
        problems: Problems,
    }
}

impl<F, R, E> Future for ProblemFuture<F>
where
    F: Future<Output = Result<http::Response<R>, E>>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.rest.poll(cx))?;
        Poll::Ready(Ok(match response.extensions_mut().remove::<Problem>() {
            Some(problem) => render(this.problems.apply(problem), response.into_parts().0),
            None => response.map(Body::new),
        }))
    }
}

//! The adapter for actix-web: extractors, responses, and the middlewares.
//!
//! | as | what it does |
//! |---|---|
//! | extractor | [`Session`]: acquired for the request; [`LazySession`]: when first asked for; [`SessionManager`] itself |
//! | extractor | [`Tx`]: the request's transaction, see [`RequestTransactions`] |
//! | middleware | [`RequestTransactions`]: a transaction per request; [`Problems`]: another table of statuses |
//! | response | [`Error`] and [`Problem`]: `application/problem+json` by that table; a handler's error type is either |
//! | handler | [`liveness`] and [`readiness`] |
//!
//! The app's data holds the [`SessionManager`], as it is or in a [`web::Data`]. Make it once, *outside* of the closure
//! that makes the apps, so that all workers share one pool:
//!
//! ```
//! use actix_web::{App, HttpResponse, HttpServer, web};
//! use pg_session::{Problem, RequestTransactions, Session, SessionManager, Tx};
//!
//! async fn name(session: Session, id: web::Path<i64>) -> Result<String, Problem> {
//!     match session.query_opt("SELECT name FROM users WHERE id = $1", &[&*id]).await? {
//!         Some(row) => Ok(row.get(0)),
//!         None => Err(Problem::new(404, "user_not_found")),
//!     }
//! }
//!
//! async fn create(tx: Tx, name: web::Json<String>) -> Result<HttpResponse, Problem> {
//!     tx.execute("INSERT INTO users (name) VALUES ($1)", &[&*name]).await?;
//!     tx.on_commit(async || println!("a user was created"));
//!     Ok(HttpResponse::Created().finish()) // committed before it is sent
//! }
//!
//! # async fn serve(sessions: SessionManager) -> std::io::Result<()> {
//! HttpServer::new(move || {
//!     App::new()
//!         .app_data(web::Data::new(sessions.clone()))
//!         .route("/health/live", web::get().to(pg_session::actix_web::liveness))
//!         .route("/health/ready", web::get().to(pg_session::actix_web::readiness))
//!         .service(
//!             web::scope("/users")
//!                 .wrap(RequestTransactions::new(sessions.clone()))
//!                 .route("/{id}", web::get().to(name))
//!                 .route("", web::post().to(create)),
//!         )
//! })
//! .bind("127.0.0.1:0")?
//! # ; Ok(()) }
//! ```
//!
//! # Workers
//!
//! Each worker of actix-web is a runtime of its own. A manager that was made in `main` keeps its connections on the
//! runtime there, so none ends with the worker that needed it first, and what a request left running is cleaned up even
//! if its worker stops. Another runtime can be [chosen](crate::SessionManagerBuilder::runtime).
//!
//! # Clients that go away
//!
//! actix-web does not notice that a client has gone while a handler runs, so the handler runs to its end. Give
//! [`RequestTransactions`] a [deadline](crate::TransactionOptions::deadline): when it passes, what the handler runs is
//! cancelled on the server, and the transaction is rolled back. A request that actix-web does drop, as at a forced
//! shutdown, is cleaned up at once.
//!
//! # Shutdown
//!
//! `ServerHandle::stop(true)` waits for the requests under way, but only since `actix-server` 2.9.1: an earlier one may drop
//! them all, which rolls their transactions back (actix-net, pull request 945). `cargo update -p actix-server` gets a newer
//! one, which needs Rust 1.89. Close the [`SessionManager`] after the server has ended.

use std::error::Error as StdError;
use std::future::{Future, Ready, ready};
use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{Payload, Service, ServiceRequest, ServiceResponse, Transform, forward_ready};
use actix_web::http::StatusCode;
use actix_web::http::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER,
};
use actix_web::{FromRequest, HttpMessage, HttpRequest, HttpResponse, ResponseError, web};
use bytes::Bytes;

use crate::error::Error;
use crate::health::Health;
use crate::lazy_session::LazySession;
use crate::manager::SessionManager;
use crate::problem::{Problem, Problems};
use crate::request::{AfterResponse, Ended, RequestTransaction, RequestTransactions, Tx};
use crate::session::Session;

type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

fn sessions(request: &HttpRequest) -> Result<SessionManager, Error> {
    let shared = request.app_data::<web::Data<SessionManager>>().map(|data| data.get_ref());
    shared.or_else(|| request.app_data()).cloned().ok_or_else(|| {
        Error::config("the app has no SessionManager among its data: add .app_data(web::Data::new(sessions))")
    })
}

impl FromRequest for SessionManager {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(sessions(request))
    }
}

impl FromRequest for Session {
    type Error = Error;
    type Future = LocalFuture<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let sessions = sessions(request);
        Box::pin(async move { sessions?.acquire().await })
    }
}

impl FromRequest for LazySession {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(sessions(request).map(Self::new))
    }
}

impl FromRequest for Tx {
    type Error = Error;
    type Future = LocalFuture<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let transaction = request.extensions().get::<RequestTransaction>().cloned();
        Box::pin(async move { transaction.ok_or_else(RequestTransaction::missing)?.tx().await })
    }
}

impl ResponseError for Error {
    fn status_code(&self) -> StatusCode {
        status(&Problems::new().describe(self))
    }

    fn error_response(&self) -> HttpResponse {
        let problem = Problems::new().describe(self);
        problem.log_as_made_from(self);
        response(&problem)
    }
}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        status(self)
    }

    fn error_response(&self) -> HttpResponse {
        self.log();
        response(self)
    }
}

fn status(problem: &Problem) -> StatusCode {
    StatusCode::from_u16(problem.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn response(problem: &Problem) -> HttpResponse {
    let mut response = HttpResponse::build(status(problem)).body(problem.body());
    set_headers(problem, response.headers_mut());
    response
}

fn set_headers(problem: &Problem, headers: &mut HeaderMap) {
    for header in [CONTENT_LENGTH, CONTENT_ENCODING, RETRY_AFTER] {
        headers.remove(header);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(Problem::CONTENT_TYPE));
    if let Some(seconds) = problem.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
}

/// Whether this process runs: 200, without asking the database. For restarting what hangs.
pub async fn liveness() -> HttpResponse {
    health(Health::live())
}

/// Whether requests can be served: 200 if the database answers through the pool within two seconds, else 503 with a
/// code as in [`Problems`]; the pool's numbers in both cases. For sending requests elsewhere meanwhile.
///
/// ```json
/// {"status":"ready","pool":{"max_size":10,"size":3,"idle":2,"in_use":1,"connecting":0,"waiting":0}}
/// ```
pub async fn readiness(sessions: SessionManager) -> HttpResponse {
    health(Health::ready(&sessions).await)
}

fn health(health: Health) -> HttpResponse {
    HttpResponse::build(StatusCode::from_u16(health.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE))
        .insert_header((CONTENT_TYPE, "application/json"))
        .insert_header((CACHE_CONTROL, "no-store"))
        .body(health.body)
}

impl<S, B> Transform<S, ServiceRequest> for RequestTransactions
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = actix_web::Error>,
    S::Future: 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<BoxBody>;
    type Error = actix_web::Error;
    type Transform = TransactionService<S>;
    type InitError = ();
    type Future = Ready<Result<TransactionService<S>, ()>>;

    fn new_transform(&self, inner: S) -> Self::Future {
        ready(Ok(TransactionService { settings: self.clone(), inner }))
    }
}

/// The service that [`RequestTransactions`] wraps around another.
#[derive(Debug)]
pub struct TransactionService<S> {
    settings: RequestTransactions,
    inner: S,
}

impl<S, B> Service<ServiceRequest> for TransactionService<S>
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = actix_web::Error>,
    S::Future: 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<BoxBody>;
    type Error = actix_web::Error;
    type Future = LocalFuture<Result<Self::Response, actix_web::Error>>;

    forward_ready!(inner);

    fn call(&self, request: ServiceRequest) -> Self::Future {
        let scope = self.settings.enter(request.extensions().get());
        let scope = match scope {
            Ok(scope) => scope,
            Err(e) => return Box::pin(ready(Ok(request.error_response(e)))),
        };
        request.extensions_mut().insert(scope.transaction().clone());
        let rest = self.inner.call(request);
        Box::pin(async move {
            match scope.run(rest, |response: &ServiceResponse<B>| response.status().as_u16()).await {
                Ok(Ended::Response(response, None)) => Ok(response.map_into_boxed_body()),
                Ok(Ended::Response(response, Some(hooks))) => Ok(response
                    .map_body(|_, body| BoxBody::new(WithHooks { body: body.boxed(), _hooks: hooks }))),
                Ok(Ended::Failed(e)) => Err(e),
                Err(e) => Err(e.into()),
            }
        })
    }
}

/// A body that takes the hooks along: they run when the server has done with it.
struct WithHooks {
    body: BoxBody,
    _hooks: AfterResponse,
}

impl MessageBody for WithHooks {
    type Error = Box<dyn StdError>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.body).poll_next(cx)
    }
}

impl<S, B> Transform<S, ServiceRequest> for Problems
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = actix_web::Error>,
    S::Future: 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<BoxBody>;
    type Error = actix_web::Error;
    type Transform = ProblemService<S>;
    type InitError = ();
    type Future = Ready<Result<ProblemService<S>, ()>>;

    fn new_transform(&self, inner: S) -> Self::Future {
        ready(Ok(ProblemService { problems: self.clone(), inner }))
    }
}

/// The service that [`Problems`] wraps around another.
#[derive(Debug)]
pub struct ProblemService<S> {
    problems: Problems,
    inner: S,
}

impl<S> ProblemService<S> {
    /// What the table makes of an error, if it is one of ours.
    fn problem(problems: &Problems, error: &actix_web::Error) -> Option<Problem> {
        match (error.as_error::<Error>(), error.as_error::<Problem>()) {
            (Some(error), _) => Some(problems.describe(error)),
            (None, Some(problem)) => Some(problems.apply(problem.clone())),
            (None, None) => None,
        }
    }
}

impl<S, B> Service<ServiceRequest> for ProblemService<S>
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = actix_web::Error>,
    S::Future: 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<BoxBody>;
    type Error = actix_web::Error;
    type Future = LocalFuture<Result<Self::Response, actix_web::Error>>;

    forward_ready!(inner);

    fn call(&self, request: ServiceRequest) -> Self::Future {
        let problems = self.problems.clone();
        let rest = self.inner.call(request);
        Box::pin(async move {
            let mut response = match rest.await {
                Ok(response) => response.map_into_boxed_body(),
                Err(e) => {
                    let Some(problem) = Self::problem(&problems, &e) else { return Err(e) };
                    if e.as_error::<Error>().is_some() {
                        // Its own response is not sent, but this is where it goes to the log.
                        drop(e.as_response_error().error_response());
                    }
                    return Err(problem.into());
                }
            };
            let problem = response.response().error().and_then(|e| Self::problem(&problems, e));
            let Some(problem) = problem else { return Ok(response) };
            response.response_mut().head_mut().status = status(&problem);
            set_headers(&problem, response.headers_mut());
            Ok(response.map_body(|_, _| BoxBody::new(problem.body())))
        })
    }
}

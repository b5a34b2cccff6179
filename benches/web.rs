//! Not a benchmark by itself: the services that `scripts/web` puts under load. The items examples on axum and actix-web,
//! and a handler on axum and deadpool-postgres as one would write it by hand, on one server; each with ten connections.

#![allow(clippy::duplicate_mod, reason = "each example brings along what both share")]

#[path = "../examples/actix_items.rs"]
#[allow(dead_code, reason = "its routes are served from here")]
mod actix_items;
#[path = "../examples/axum_items.rs"]
#[allow(dead_code, reason = "its routes are served from here")]
mod axum_items;

use std::io::Read;
use std::net::TcpListener;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod};
use pg_session::SessionManager;
use pg_session::testing::PgServer;
use pg_session::tokio_postgres::NoTls;

fn main() {
    let server = PgServer::start().expect("a server");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let sessions = runtime.block_on(async {
        let sessions = SessionManager::new(server.url().parse().expect("a URL")).expect("a configuration");
        axum_items::items::start::migrate(&sessions).await.expect("migrated");
        let sql = "INSERT INTO items (name, price_cents, stock) \
            SELECT 'item ' || n, n, 1 FROM generate_series(1, 1000) AS n";
        sessions.acquire().await.expect("a session").execute(sql, &[]).await.expect("rows");
        sessions
    });

    let config = server.url().parse().expect("a URL");
    let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let pool = Pool::builder(Manager::from_config(config, NoTls, manager)).max_size(10).build();
    let by_hand = Router::new().route("/items/{id}", get(read)).with_state(pool.expect("a pool"));

    for (name, router) in [("by-hand", by_hand), ("axum", axum_items::router(sessions.clone()))] {
        let (listener, address) = listen();
        println!("{name} http://{address}/items/500");
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
            axum::serve(listener, router).await.expect("served");
        });
    }
    let (listener, address) = listen();
    println!("actix-web http://{address}/items/500");
    std::thread::spawn(move || {
        use actix_web::{App, HttpServer};
        actix_web::rt::System::new().block_on(async {
            let server = HttpServer::new(move || {
                App::new().configure(|config| actix_items::routes(config, &sessions))
            });
            let server = server.workers(2).disable_signals().listen(listener).expect("a socket");
            server.run().await.expect("served");
        });
    });
    // Until whoever started it has had enough.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

fn listen() -> (TcpListener, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a socket");
    let address = listener.local_addr().expect("an address");
    (listener, address)
}

async fn read(
    State(pool): State<Pool>,
    Path(id): Path<i64>,
) -> Result<Json<axum_items::items::Item>, StatusCode> {
    let failed = |_| StatusCode::INTERNAL_SERVER_ERROR;
    let client = pool.get().await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let statement = client.prepare_cached("SELECT * FROM items WHERE id = $1").await.map_err(failed)?;
    let row = client.query_opt(&statement, &[&id]).await.map_err(failed)?;
    row.map(|row| Json(row.into())).ok_or(StatusCode::NOT_FOUND)
}

//! The examples `axum_items` and `actix_items`, whole and over real HTTP, each in a sandbox: the way a user tests a service.
#![cfg(all(feature = "axum", feature = "actix-web", feature = "testing"))]
#![allow(clippy::duplicate_mod, reason = "each example brings along what both share")]

#[path = "../examples/actix_items.rs"]
#[allow(dead_code, reason = "served from here, without its main")]
mod actix_items;
#[path = "../examples/axum_items.rs"]
#[allow(dead_code, reason = "served from here, without its main")]
mod axum_items;

use std::net::SocketAddr;

use pg_session::SessionManager;
use pg_session::testing::{PgServer, Sandbox, Template, TestDatabase};
use reqwest::{Client, Response};
use serde_json::{Value, json};

/// One database for all tests in this file, migrated once.
async fn database() -> TestDatabase {
    let server = PgServer::shared().expect("a server");
    let template = Template::prepare(server, "items", async |url| {
        let sessions = SessionManager::new(url.parse()?)?;
        axum_items::items::start::migrate(&sessions).await?;
        Ok(())
    });
    TestDatabase::from_template(&template.await.expect("a template")).await.expect("a database")
}

async fn serve_axum(sessions: SessionManager) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, axum_items::router(sessions)).await });
    address
}

async fn serve_actix(sessions: SessionManager) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        actix_web::rt::System::new().block_on(async {
            let app = move || {
                let app = actix_web::App::new().wrap(actix_items::items::problems());
                app.configure(|config| actix_items::routes(config, &sessions))
            };
            let server = actix_web::HttpServer::new(app).workers(2).disable_signals();
            server.listen(listener).expect("a socket").run().await
        })
    });
    address
}

struct Api {
    client: Client,
    address: SocketAddr,
}

impl Api {
    fn new(address: SocketAddr) -> Self {
        // A server that refuses a bulk load before its end closes the connection, and a client that wants to use it
        // again cannot know.
        let client = Client::builder().pool_max_idle_per_host(0).build().expect("a client");
        Self { client, address }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    async fn get(&self, path: &str) -> Response {
        self.client.get(self.url(path)).send().await.expect(path)
    }

    async fn post(&self, path: &str, body: &Value) -> Response {
        self.client.post(self.url(path)).json(body).send().await.expect(path)
    }

    async fn put(&self, path: &str, body: &Value) -> Response {
        self.client.put(self.url(path)).json(body).send().await.expect(path)
    }

    async fn delete(&self, path: &str) -> Response {
        self.client.delete(self.url(path)).send().await.expect(path)
    }

    async fn create(&self, name: &str, stock: i64) -> i64 {
        let new = json!({ "name": name, "price_cents": 100, "stock": stock });
        let response = self.post("/items", &new).await;
        assert_eq!(response.status(), 201);
        let location = response.headers()["location"].to_str().expect("text").to_owned();
        let item: Value = response.json().await.expect("JSON");
        let id = item["id"].as_i64().expect("a number");
        assert_eq!(location, format!("/items/{id}"));
        id
    }

    async fn stock(&self, id: i64) -> i64 {
        let item: Value = self.get(&format!("/items/{id}")).await.json().await.expect("JSON");
        item["stock"].as_i64().expect("a number")
    }
}

async fn refused(response: Response, status: u16, code: &str) {
    assert_eq!(response.status().as_u16(), status, "{code}");
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let problem: Value = response.json().await.expect("JSON");
    assert_eq!((&problem["status"], &problem["code"]), (&json!(status), &json!(code)));
}

async fn whole_api(api: &Api) {
    // Create, read, update, delete.
    let lamp = api.create("lamp", 3).await;
    let item = json!({ "id": lamp, "name": "lamp", "price_cents": 100, "stock": 3 });
    assert_eq!(api.get(&format!("/items/{lamp}")).await.json::<Value>().await.unwrap(), item);
    let changed = json!({ "name": "lamp", "price_cents": 90, "stock": 5 });
    let response = api.put(&format!("/items/{lamp}"), &changed).await;
    assert_eq!(response.json::<Value>().await.unwrap()["price_cents"], 90);
    assert_eq!(api.delete(&format!("/items/{lamp}")).await.status(), 204);
    for path in [format!("/items/{lamp}"), "/items/9999999".into(), "/items/none".into()] {
        refused(api.get(&path).await, 404, "item_not_found").await;
    }
    refused(api.delete(&format!("/items/{lamp}")).await, 404, "item_not_found").await;
    refused(api.put("/items/9999999", &changed).await, 404, "item_not_found").await;

    // What is refused.
    let chair = api.create("chair", 9).await;
    refused(api.post("/items", &json!({ "name": "chair", "price_cents": 1 })).await, 409, "name_taken").await;
    for bad in [
        json!({ "name": "", "price_cents": 1 }),
        json!({ "name": "x".repeat(101), "price_cents": 1 }),
        json!({ "name": "nul\0", "price_cents": 1 }),
        json!({ "name": "x", "price_cents": -1 }),
    ] {
        refused(api.post("/items", &bad).await, 422, "invalid").await;
    }
    refused(api.post("/items", &json!({ "name": 7 })).await, 422, "body_unreadable").await;
    let text = api.client.post(api.url("/items")).body("lamp").send().await.unwrap();
    refused(text, 415, "body_unreadable").await;

    // Bulk, all or nothing: 2,500 lines are three statements.
    let lines: String =
        (0..2500).map(|n| format!("{{\"name\":\"bulk {n}\",\"price_cents\":{n},\"stock\":1}}\n")).collect();
    let bulk = async |body: String| api.client.post(api.url("/items/bulk")).body(body).send().await.unwrap();
    let response = bulk(lines.clone()).await;
    assert_eq!(response.status(), 201);
    assert_eq!(response.json::<Value>().await.unwrap(), json!({ "loaded": 2500 }));
    let others = lines.replace("bulk", "more");
    let response = bulk(format!("{others}{{\"name\":\"last\"}}")).await;
    assert_eq!(response.status(), 422);
    let problem: Value = response.json().await.unwrap();
    assert!(problem["detail"].as_str().unwrap().starts_with("line 2501: missing field"), "{problem}");
    refused(bulk(lines.replace("bulk 1000\"", "chair\"")).await, 409, "name_taken").await;

    // The list, page by page.
    let mut seen = Vec::new();
    let mut next = Some(0);
    while let Some(after) = next {
        let page: Value = api.get(&format!("/items?limit=100&after={after}")).await.json().await.unwrap();
        seen.extend(page["items"].as_array().unwrap().iter().map(|item| item["id"].as_i64().unwrap()));
        next = page["next"].as_i64();
    }
    assert_eq!(seen.len(), 2501);
    assert!(seen.is_sorted());
    let page: Value = api.get("/items").await.json().await.unwrap();
    assert_eq!(page["items"].as_array().unwrap().len(), 20);
    for query in ["limit=0", "limit=101", "limit=many"] {
        refused(api.get(&format!("/items?{query}")).await, 422, "invalid").await;
    }

    // Transfers, 16 of them at once.
    let table = api.create("table", 0).await;
    let order = |quantity: i64| json!({ "from": chair, "to": table, "quantity": quantity });
    let transfers = (0..16).map(|_| async { api.post("/transfers", &order(1)).await.status().as_u16() });
    let mut statuses = futures_util::future::join_all(transfers).await;
    statuses.sort_unstable();
    assert_eq!(statuses, [vec![204; 9], vec![409; 7]].concat());
    assert_eq!((api.stock(chair).await, api.stock(table).await), (0, 9));
    refused(api.post("/transfers", &order(1)).await, 409, "insufficient_stock").await;
    refused(api.post("/transfers", &order(0)).await, 422, "invalid").await;
    let nowhere = json!({ "from": table, "to": 9999999, "quantity": 1 });
    refused(api.post("/transfers", &nowhere).await, 404, "item_not_found").await;
    assert_eq!(api.stock(table).await, 9);

    assert_eq!(api.get("/health/live").await.status(), 200);
    let ready: Value = api.get("/health/ready").await.json().await.unwrap();
    assert_eq!(ready["status"], "ready");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_serve_the_whole_api_in_sandboxes_on_one_database() {
    let database = database().await;
    let (axum, actix) = tokio::join!(Sandbox::start(database.url()), Sandbox::start(database.url()));
    let (axum, actix) = (axum.expect("a sandbox"), actix.expect("a sandbox"));

    whole_api(&Api::new(serve_axum(axum.sessions()).await)).await;
    axum.finish().await.expect("nothing left open");
    // The same names again: nothing of the first is there.
    whole_api(&Api::new(serve_actix(actix.sessions()).await)).await;
    actix.finish().await.expect("nothing left open");

    let session = database.sessions().acquire().await.expect("a session");
    let rows: i64 = session.query_one("SELECT count(*) FROM items", &[]).await.expect("a count").get(0);
    assert_eq!(rows, 0, "no residue");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_serve_the_whole_api_on_a_database_of_their_own() {
    let database = database().await;
    whole_api(&Api::new(serve_axum(database.sessions()).await)).await;
    let database = self::database().await;
    whole_api(&Api::new(serve_actix(database.sessions()).await)).await;
}

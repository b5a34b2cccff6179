//! The items of a small shop, over any web framework: what `axum_items` and `actix_items` have in common.
//!
//! Nothing in here knows HTTP but [`Problem`], the error type of both services.

#![allow(unreachable_pub, reason = "shared by two examples")]

pub mod start;

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use pg_session::{
    Connection, Error, Problem, Problems, Row, SessionManager, Transaction, TransactionOptions,
};
use serde::{Deserialize, Serialize};

/// Names for what the constraints refuse.
pub fn problems() -> Problems {
    Problems::new().constraint("items_name_key", 409, "name_taken")
}

#[derive(Clone, Debug, Serialize)]
pub struct Item {
    pub id: i64,
    pub name: String,
    pub price_cents: i64,
    pub stock: i64,
}

impl From<Row> for Item {
    fn from(row: Row) -> Self {
        Self {
            id: row.get("id"),
            name: row.get("name"),
            price_cents: row.get("price_cents"),
            stock: row.get("stock"),
        }
    }
}

/// An item as clients send it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewItem {
    pub name: String,
    pub price_cents: i64,
    #[serde(default)]
    pub stock: i64,
}

const NAME_LIMIT: usize = 100;

impl NewItem {
    /// What can be said without asking the database.
    fn check(&self) -> Result<(), String> {
        if self.name.trim().is_empty() || self.name.chars().count() > NAME_LIMIT || self.name.contains('\0') {
            return Err(format!("name must have 1 to {NAME_LIMIT} characters"));
        }
        if self.price_cents < 0 || self.stock < 0 {
            return Err("price_cents and stock must not be negative".into());
        }
        Ok(())
    }
}

pub fn invalid(detail: impl Into<String>) -> Problem {
    Problem::new(422, "invalid").detail(detail.into())
}

fn not_found() -> Problem {
    Problem::new(404, "item_not_found")
}

pub async fn create(db: &Connection, new: &NewItem) -> Result<Item, Problem> {
    new.check().map_err(invalid)?;
    let sql = "INSERT INTO items (name, price_cents, stock) VALUES ($1, $2, $3) RETURNING *";
    Ok(db.query_one(sql, &[&new.name, &new.price_cents, &new.stock]).await?.into())
}

pub async fn read(db: &Connection, id: i64) -> Result<Item, Problem> {
    let row = db.query_opt("SELECT * FROM items WHERE id = $1", &[&id]).await?;
    row.map(Item::from).ok_or_else(not_found)
}

pub async fn update(db: &Connection, id: i64, new: &NewItem) -> Result<Item, Problem> {
    new.check().map_err(invalid)?;
    let sql = "UPDATE items SET name = $2, price_cents = $3, stock = $4 WHERE id = $1 RETURNING *";
    let row = db.query_opt(sql, &[&id, &new.name, &new.price_cents, &new.stock]).await?;
    row.map(Item::from).ok_or_else(not_found)
}

pub async fn delete(db: &Connection, id: i64) -> Result<(), Problem> {
    match db.execute("DELETE FROM items WHERE id = $1", &[&id]).await? {
        0 => Err(not_found()),
        _ => Ok(()),
    }
}

/// Which page of the list: those after an id, so that a page costs the same wherever it is.
#[derive(Debug, Deserialize)]
pub struct Paging {
    #[serde(default)]
    pub after: i64,
    #[serde(default = "Paging::default_limit")]
    pub limit: i64,
}

impl Paging {
    const MAX: i64 = 100;

    fn default_limit() -> i64 {
        20
    }
}

#[derive(Debug, Serialize)]
pub struct Page {
    pub items: Vec<Item>,
    /// The `after` of the next page, if there is one.
    pub next: Option<i64>,
}

pub async fn list(db: &Connection, paging: &Paging) -> Result<Page, Problem> {
    if !(1..=Paging::MAX).contains(&paging.limit) {
        return Err(invalid(format!("limit must be 1 to {}", Paging::MAX)));
    }
    // One more than asked for tells whether there is a next page.
    let sql = "SELECT * FROM items WHERE id > $1 ORDER BY id LIMIT $2";
    let rows = db.query(sql, &[&paging.after, &(paging.limit + 1)]).await?;
    let mut items: Vec<Item> = rows.into_iter().map(Item::from).collect();
    let more = items.len() as i64 > paging.limit;
    if more {
        items.pop();
    }
    let next = items.last().filter(|_| more).map(|item| item.id);
    Ok(Page { items, next })
}

#[derive(Debug, Deserialize)]
pub struct Transfer {
    pub from: i64,
    pub to: i64,
    pub quantity: i64,
}

/// Moves stock from one item to another. Under SERIALIZABLE, and so run again when others get in between.
pub async fn transfer(sessions: &SessionManager, transfer: &Transfer) -> Result<(), Problem> {
    let Transfer { from, to, quantity } = transfer;
    if *quantity <= 0 || from == to {
        return Err(invalid("quantity must be positive, from and to must differ"));
    }
    let options = TransactionOptions::serializable().name("transfer");
    sessions
        .transaction_with(options, async |tx: &mut Transaction<'_>| {
            let stock = async |id: &i64, change: i64| {
                let sql = "UPDATE items SET stock = stock + $2 WHERE id = $1 AND stock + $2 >= 0";
                tx.execute(sql, &[id, &change]).await
            };
            if stock(from, -quantity).await? == 0 {
                read(tx, *from).await?; // or it does not exist
                return Err(Problem::new(409, "insufficient_stock").detail("there is not enough of it"));
            }
            if stock(to, *quantity).await? == 0 {
                return Err(not_found());
            }
            let sql = "INSERT INTO transfers (source, target, quantity) VALUES ($1, $2, $3)";
            tx.execute(sql, &[from, to, quantity]).await?;
            Ok(())
        })
        .await
}

/// How many rows travel with one statement.
const CHUNK: usize = 1000;
/// The longest line that is taken, and so the most that is held beside a chunk of rows.
const LINE_LIMIT: usize = 64 * 1024;

/// Loads items from lines of JSON, as they arrive: all of them, or none. Returns how many.
///
/// The transaction is begun when the first chunk is there, so a body that comes slowly holds a connection only from then
/// on; memory is bounded by a chunk of lines.
pub async fn load<S, E>(sessions: &SessionManager, mut body: S) -> Result<u64, Problem>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    let mut lines = Lines::default();
    let mut tx = None;
    let mut loaded = 0;
    loop {
        let ended = match body.next().await {
            Some(Ok(bytes)) => {
                lines.push(bytes)?;
                false
            }
            Some(Err(_)) => return Err(Problem::new(400, "body_unreadable")),
            None => {
                lines.end();
                true
            }
        };
        while lines.ready.len() >= CHUNK || (ended && !lines.ready.is_empty()) {
            let rows: Vec<NewItem> = lines.take(CHUNK)?;
            let tx: &Transaction<'_> = match &mut tx {
                Some(tx) => tx,
                none => none.insert(sessions.begin().await?),
            };
            loaded += insert(tx, &rows).await?;
        }
        if ended {
            if let Some(tx) = tx {
                tx.commit().await?;
            }
            return Ok(loaded);
        }
    }
}

async fn insert(db: &Connection, rows: &[NewItem]) -> Result<u64, Error> {
    let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    let prices: Vec<i64> = rows.iter().map(|row| row.price_cents).collect();
    let stocks: Vec<i64> = rows.iter().map(|row| row.stock).collect();
    let sql = "INSERT INTO items (name, price_cents, stock) \
        SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[])";
    db.execute(sql, &[&names, &prices, &stocks]).await
}

/// Cuts a body into lines.
#[derive(Default)]
struct Lines {
    partial: BytesMut,
    ready: VecDeque<Bytes>,
    taken: usize,
}

impl Lines {
    fn push(&mut self, mut bytes: Bytes) -> Result<(), Problem> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(&bytes.split_to(end));
            bytes.advance(1);
            self.ready.push_back(self.partial.split().freeze());
        }
        self.partial.extend_from_slice(&bytes);
        if self.partial.len() > LINE_LIMIT {
            return Err(invalid(format!("line {} is too long", self.taken + self.ready.len() + 1)));
        }
        Ok(())
    }

    /// The last line need not end with a newline.
    fn end(&mut self) {
        if !self.partial.is_empty() {
            self.ready.push_back(self.partial.split().freeze());
        }
    }

    /// Reads as many lines as that; empty ones count for their number only.
    fn take(&mut self, most: usize) -> Result<Vec<NewItem>, Problem> {
        let mut items = Vec::with_capacity(most.min(self.ready.len()));
        while items.len() < most {
            let Some(line) = self.ready.pop_front() else { break };
            self.taken += 1;
            if line.trim_ascii().is_empty() {
                continue;
            }
            let item = serde_json::from_slice::<NewItem>(&line).map_err(|e| e.to_string());
            let item = item.and_then(|item| item.check().map(|()| item));
            items.push(item.map_err(|why| invalid(format!("line {}: {why}", self.taken)))?);
        }
        Ok(items)
    }
}

//! Errors of the user's own.

use std::fmt;

use pg_session::{Error, Session, SessionManager};

#[derive(Debug)]
enum ShopError {
    SoldOut,
    Database(Error),
}

impl From<Error> for ShopError {
    fn from(e: Error) -> Self {
        Self::Database(e)
    }
}

impl fmt::Display for ShopError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SoldOut => f.write_str("sold out"),
            Self::Database(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for ShopError {}

type Boxed = Box<dyn std::error::Error + Send + Sync>;

async fn buy(session: &mut Session, item: i64) -> Result<i64, ShopError> {
    session
        .transaction(async |tx| {
            let left: i64 = tx.query_one("SELECT n FROM stock WHERE id = $1", &[&item]).await?.get(0);
            if left == 0 {
                return Err(ShopError::SoldOut);
            }
            tx.savepoint(async |sp| {
                sp.execute("UPDATE stock SET n = n - 1 WHERE id = $1", &[&item]).await?;
                Ok::<_, ShopError>(())
            })
            .await?;
            Ok(left)
        })
        .await
}

async fn anything(sessions: &SessionManager, number: &str) -> Result<u64, Boxed> {
    sessions
        .transaction(async |tx| {
            let number: i64 = number.parse()?;
            if number < 0 {
                return Err("negative".into());
            }
            Ok(tx.execute("INSERT INTO a VALUES ($1)", &[&number]).await?)
        })
        .await
}

fn spawned(sessions: SessionManager, number: String) {
    tokio::spawn(async move { anything(&sessions, &number).await });
}

fn main() {
    let _ = (buy, spawned);
}

// What one attempt changes would still be there in the next.

use pg_session::{Error, Session};

async fn f(session: &mut Session) -> Result<(), Error> {
    let mut names: Vec<String> = Vec::new();
    session
        .transaction(async |tx| {
            let row = tx.query_one("SELECT name FROM users", &[]).await?;
            names.push(row.get(0));
            Ok(())
        })
        .await
}

fn main() {}

// A session has one transaction at a time.

use pg_session::{Error, Session};

async fn f(session: &mut Session) -> Result<(), Error> {
    let first = session.begin().await?;
    let second = session.begin().await?;
    second.commit().await?;
    first.commit().await
}

fn main() {}

// There would be no transaction behind it any more.

use pg_session::{Error, Session};

async fn f(session: &mut Session) -> Result<(), Error> {
    let tx = session.transaction(async |tx| Ok::<_, Error>(tx)).await?;
    tx.execute("DELETE FROM a", &[]).await?;
    Ok(())
}

fn main() {}

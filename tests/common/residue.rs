//! What a session can inherit from whoever had its connection before.

use pg_session::Session;

/// Everything a session can inherit, asked of the server.
const RESIDUE: &str = "
    SELECT concat_ws(', ',
        CASE WHEN current_setting('app.trace', true) <> '' THEN 'custom setting' END,
        CASE WHEN current_setting('search_path') <> '\"$user\", public' THEN 'search_path' END,
        CASE WHEN current_setting('statement_timeout') <> '0' THEN 'statement_timeout' END,
        CASE WHEN current_setting('work_mem') <> '4MB' THEN 'work_mem' END,
        CASE WHEN current_setting('default_transaction_read_only') <> 'off' THEN 'read only' END,
        CASE WHEN current_setting('default_transaction_isolation') <> 'read committed' THEN 'isolation' END,
        CASE WHEN current_user <> 'postgres' OR session_user <> 'postgres' THEN 'role' END,
        CASE WHEN EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')
             THEN 'advisory lock' END,
        CASE WHEN EXISTS (SELECT FROM pg_class WHERE relnamespace = pg_my_temp_schema())
             THEN 'temporary table' END,
        CASE WHEN EXISTS (SELECT FROM pg_listening_channels()) THEN 'channel' END,
        CASE WHEN EXISTS (SELECT FROM pg_cursors WHERE is_holdable) THEN 'cursor' END,
        CASE WHEN EXISTS (SELECT FROM pg_prepared_statements WHERE from_sql) THEN 'prepared statement' END)";

/// The session is as if it were new.
pub async fn assert_pristine(session: &Session, after: &str) {
    // VACUUM is refused inside a transaction block, and an aborted one refuses everything.
    session.execute("VACUUM pg_language", &[]).await.unwrap_or_else(|e| panic!("after {after}: {e}"));
    let residue: String = session.query_one(RESIDUE, &[]).await.unwrap().get(0);
    assert_eq!(residue, "", "after {after}");
    let lastval = session.query_one("SELECT lastval()", &[]).await.unwrap_err();
    assert_eq!(lastval.code().unwrap().code(), "55000", "lastval after {after}");
}

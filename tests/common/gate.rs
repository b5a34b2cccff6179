//! A gate in front of COMMIT: while it is closed, whoever has inserted into `t` waits there, with COMMIT sent.

use super::Database;

pub struct Gate<'d>(&'d Database);

impl<'d> Gate<'d> {
    /// Open at first.
    pub async fn at_commits(db: &'d Database) -> Self {
        db.run(
            "CREATE FUNCTION pass_gate() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION pass_gate()",
        )
        .await;
        Self(db)
    }

    pub async fn close(&self) {
        self.0.run("SELECT pg_advisory_lock(7)").await;
    }

    pub async fn open(&self) {
        self.0.run("SELECT pg_advisory_unlock(7)").await;
    }

    /// Waits until somebody stands at the closed gate.
    pub async fn until_reached(&self) {
        self.0.until_blocked().await;
    }
}

//! What the crate wants to reach beside its peers, as ratios within one run.

use crate::kit::report::ratio_text;
use crate::kit::rounds::{Entry, Results};

/// What an entry is compared with.
enum Base {
    Entry(&'static str),
    BestPeer,
}

struct Target {
    /// Of a section.
    slug: &'static str,
    entry: &'static str,
    base: Base,
    at_least: f64,
}

use Base::{BestPeer, Entry as Of};

const TARGETS: [Target; 16] = [
    target("acquire", "pg-session, acquire", Of("deadpool-postgres, get"), 1.0 / 1.3),
    target("read", "pg-session, query_one", Of("tokio-postgres, prepared"), 0.97),
    target("read", "pg-session, query_one", Of("sqlx, query"), 1.5),
    target("read", "pg-session, query_one", Of("deadpool-postgres, plain"), 2.5),
    target("update", "pg-session, closure", BestPeer, 1.15),
    target("update", "pg-session, closure", Of("pgbench, -M prepared"), 1.0),
    target("update", "pg-session, batch, one flight", BestPeer, 1.5),
    target("update-delayed", "pg-session, closure", BestPeer, 1.4),
    target("tpcb-delayed", "pg-session, closure", BestPeer, 1.15),
    target("tpcb-delayed", "pg-session, batch, one flight", BestPeer, 2.5),
    target("insert", "pg-session, execute_many", Of("pg-session, loop"), 8.0),
    target("insert", "pg-session, COPY", Of("psql, \\copy"), 0.9),
    target("counter", "pg-session, closure", Of("tokio-postgres, immediate retry"), 1.5),
    target("counter", "pg-session, closure", BestPeer, 1.5),
    target("counter-delayed", "pg-session, closure", Of("tokio-postgres, immediate retry"), 1.5),
    target("counter-delayed", "pg-session, closure", BestPeer, 1.5),
];

const fn target(slug: &'static str, entry: &'static str, base: Base, at_least: f64) -> Target {
    Target { slug, entry, base, at_least }
}

/// A table of the targets whose sections were measured; the speed of a noisy machine decides nothing here.
pub fn table(sections: &[Results]) -> String {
    let mut text =
        String::from("| work | who | beside | × median (range) | wanted | |\n|---|---|---|---:|---:|---|\n");
    for target in &TARGETS {
        let Some(results) = sections.iter().find(|results| results.section.slug() == target.slug) else {
            continue;
        };
        let base: Option<&Entry> = match target.base {
            Of(name) => results.entry(name),
            BestPeer => results.best_peer(),
        };
        let ratio = results.entry(target.entry).zip(base).and_then(|(entry, base)| entry.ratio(base));
        let (shown, verdict) = match ratio {
            Some(ratio) if ratio.median >= target.at_least => (ratio.show(ratio_text), "reached"),
            Some(ratio) => (ratio.show(ratio_text), "NOT reached"),
            None => ("–".to_owned(), "not measured"),
        };
        let beside = match (&target.base, base) {
            (BestPeer, Some(base)) => format!("the best peer ({})", base.name),
            (BestPeer, None) => "the best peer".to_owned(),
            (Of(name), _) => (*name).to_owned(),
        };
        text += &format!(
            "| {} | {} | {beside} | {shown} | ≥ {} | {verdict} |\n",
            results.section.title(),
            target.entry,
            ratio_text(target.at_least)
        );
    }
    text
}

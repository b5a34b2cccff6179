//! Rounds: contenders take turns in changing order, each turn is checked, and they are compared within each round.

use super::arguments::Plan;
use super::contender::{Contender, Role, Turn, Way};
use super::load::{Load, Sample};
use super::section::Section;
use super::server::Server;
use super::{Failure, chain};

/// What came of one way of one contender.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    pub role: Role,
    /// A sample for each round, or the first failure.
    pub samples: Result<Vec<Sample>, String>,
}

/// A median with the least and the greatest.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, least, most })
    }
}

impl Entry {
    /// The samples, none if it failed.
    pub fn samples(&self) -> &[Sample] {
        self.samples.as_deref().unwrap_or_default()
    }

    pub fn rate(&self) -> Option<Spread> {
        Spread::of(self.samples().iter().map(|sample| sample.rate))
    }

    /// How much more it did than another, in each round.
    pub fn ratio(&self, other: &Self) -> Option<Spread> {
        Spread::of(self.samples().iter().zip(other.samples()).map(|(own, other)| own.rate / other.rate))
    }

    pub fn failed(&self) -> bool {
        self.samples.is_err()
    }
}

/// A section with what came of it.
#[derive(Clone, Debug)]
pub struct Results {
    pub section: Section,
    pub entries: Vec<Entry>,
}

impl Results {
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The peer of the greatest median rate.
    pub fn best_peer(&self) -> Option<&Entry> {
        let rate = |entry: &Entry| entry.rate().map_or(0.0, |rate| rate.median);
        let peers =
            self.entries.iter().filter(|entry| entry.role == Role::Peer && !entry.samples().is_empty());
        peers.max_by(|a, b| rate(a).total_cmp(&rate(b)))
    }
}

/// Measures one section.
pub async fn run(
    section: Section,
    contenders: &[Box<dyn Contender>],
    server: &Server,
    plan: &Plan,
) -> Results {
    let ways = contenders.iter().flat_map(|contender| {
        contender.ways(section.work).into_iter().map(move |way| (contender.as_ref(), way))
    });
    let ways: Vec<(&dyn Contender, Way)> = ways.collect();
    let mut entries: Vec<Entry> = ways
        .iter()
        .map(|(contender, way)| Entry {
            name: format!("{}, {}", contender.name(), way.name),
            role: way.role,
            samples: Ok(Vec::new()),
        })
        .collect();
    for round in 0..plan.rounds {
        for turn in 0..ways.len() {
            // Nobody always comes first, nor always after the same.
            let i = (round + if round % 2 == 0 { turn } else { ways.len() - 1 - turn }) % ways.len();
            let (contender, way) = ways[i];
            let entry = &mut entries[i];
            if let Ok(samples) = &mut entry.samples {
                match measure(&section, contender, way, server, plan).await {
                    Ok(sample) => samples.push(sample),
                    Err(e) => {
                        eprintln!("FAILED: {}: {}: {}", section.title(), entry.name, chain(e.as_ref()));
                        entry.samples = Err(format!("FAILED: {}", chain(e.as_ref())));
                    }
                }
            }
        }
    }
    Results { section, entries }
}

async fn measure(
    section: &Section,
    contender: &dyn Contender,
    way: Way,
    server: &Server,
    plan: &Plan,
) -> Result<Sample, Failure> {
    let target = if section.delayed { &server.delayed } else { &server.direct };
    let turn = Turn {
        work: section.work,
        way: way.name,
        target: target.clone(),
        load: Load { tasks: section.tasks, warm_up: plan.warm_up, time: plan.time },
        rows: section.rows,
        scale: plan.scale,
    };
    let before = section.work.prepare(&server.client).await?;
    // Whatever hangs is a failure, too. The greatest part of a short turn is the way there.
    let limit = plan.time * 10 + std::time::Duration::from_secs(60);
    let sample = tokio::time::timeout(limit, contender.run(&turn)).await??;
    section.work.check(&server.client, &before, &sample, section.rows).await?;
    Ok(sample)
}

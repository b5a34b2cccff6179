//! The report: a Markdown table for each section on standard output, plots and a page with all of it in a directory.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use super::Failure;
use super::load::Sample;
use super::plot;
use super::rounds::{Entry, Results, Spread};

pub struct Report {
    directory: PathBuf,
    page: String,
    sections: Vec<Results>,
}

impl Report {
    /// Into a directory, which is emptied of older plots.
    pub fn new(directory: PathBuf, title: &str, description: &str) -> Result<Self, Failure> {
        fs::create_dir_all(&directory)?;
        for file in fs::read_dir(&directory)? {
            let path = file?.path();
            if path.extension().is_some_and(|extension| extension == "svg") {
                fs::remove_file(path)?;
            }
        }
        println!("# {title}\n\n{description}");
        let page = format!(
            "<!doctype html><meta charset=\"utf-8\"><title>{0}</title>\n<style>body {{ font-family: sans-serif }}</style>\n\
             <h1>{0}</h1>\n<p>{1}</p>\n",
            escaped(title),
            escaped(description)
        );
        Ok(Self { directory, page, sections: Vec::new() })
    }

    pub fn sections(&self) -> &[Results] {
        &self.sections
    }

    /// Prints and draws a section that is done.
    pub fn add(&mut self, results: Results) -> Result<(), Failure> {
        let title = results.section.title();
        println!("\n## {title}\n\n{}", table(&results));
        let svg = plot::bars(&results)?;
        self.draw(&title, &results.section.slug(), &svg)?;
        self.text(&table(&results));
        self.sections.push(results);
        Ok(())
    }

    fn draw(&mut self, title: &str, slug: &str, svg: &str) -> Result<(), Failure> {
        fs::write(self.directory.join(format!("{slug}.svg")), svg)?;
        write!(self.page, "<h2>{}</h2>\n{svg}\n", escaped(title))?;
        Ok(())
    }

    /// More text for the page.
    pub fn text(&mut self, text: &str) {
        self.page += &format!("<pre>{}</pre>\n", escaped(text));
    }

    /// Draws what goes over several sections, writes the page, and fails if anything has failed.
    pub fn finish(mut self) -> Result<(), Failure> {
        for delayed in [false, true] {
            let of =
                |results: &&Results| (results.section.name, results.section.delayed) == ("tasks", delayed);
            let sweep: Vec<&Results> = self.sections.iter().filter(of).collect();
            let [first, _, ..] = sweep[..] else { continue };
            let (distance, far) = (first.section.distance(), if delayed { "-delayed" } else { "" });
            for (title, slug, svg) in plot::sweep(&sweep)? {
                self.draw(&format!("{title}{distance}"), &format!("{slug}{far}"), &svg)?;
            }
        }
        let page = self.directory.join("index.html");
        fs::write(&page, &self.page)?;
        println!("\nPlots: {}", page.display());
        let entries = self.sections.iter().flat_map(|results| &results.entries);
        match entries.filter(|entry| entry.failed()).count() {
            0 => Ok(()),
            failed => Err(format!("{failed} entries failed").into()),
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn table(results: &Results) -> String {
    let section = &results.section;
    let more = match section.name {
        "counter" => " attempts |",
        "fairness" => " reads of a task: least / median / most |",
        _ => "",
    };
    let rules = if more.is_empty() { "" } else { "---:|" };
    let best = results.best_peer();
    let mut text = format!(
        "| who | {}: median (range) | × {}: median (range) | p50 | p99 |{more}\n|---|---:|---:|---:|---:|{rules}\n",
        section.unit(),
        best.map_or("best peer", |best| &best.name),
    );
    for entry in &results.entries {
        let mut cells = vec![entry.name.clone()];
        match &entry.samples {
            Err(why) => {
                cells.push(why.replace(['|', '\n'], " "));
                cells.extend(vec!["–".to_owned(); 3 + usize::from(!more.is_empty())]);
            }
            Ok(_) => {
                let rate = entry.rate().map(|rate| rate.times(section.units()));
                cells.push(rate.map_or_else(dash, |rate| rate.show(count)));
                let ratio = best.and_then(|best| entry.ratio(best));
                cells.push(ratio.map_or_else(dash, |ratio| ratio.show(ratio_text)));
                cells.push(latency(entry, 0.5).map_or_else(dash, time));
                cells.push(latency(entry, 0.99).map_or_else(dash, time));
                match section.name {
                    "counter" => cells.push(attempts(entry).map_or_else(dash, |n| format!("{n:.2}"))),
                    "fairness" => cells.push(shares(entry).unwrap_or_else(dash)),
                    _ => {}
                }
            }
        }
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text
}

impl Spread {
    #[must_use]
    pub fn times(self, n: f64) -> Self {
        Self { median: self.median * n, least: self.least * n, most: self.most * n }
    }

    pub fn show(self, text: fn(f64) -> String) -> String {
        format!("{} ({} – {})", text(self.median), text(self.least), text(self.most))
    }
}

/// The median over the rounds of what this part of the operations did not exceed, in seconds.
pub fn latency(entry: &Entry, part: f64) -> Option<f64> {
    let latencies = entry.samples().iter().filter_map(|sample| sample.latency(part));
    Spread::of(latencies).map(|spread| spread.median)
}

fn attempts(entry: &Entry) -> Option<f64> {
    let attempts = entry.samples().iter().filter_map(|sample| sample.attempts);
    Spread::of(attempts).map(|spread| spread.median)
}

/// Over all rounds.
fn shares(entry: &Entry) -> Option<String> {
    let shares = entry.samples().iter().flat_map(|sample: &Sample| &sample.shares);
    let spread = Spread::of(shares.map(|share| *share as f64))?;
    Some(format!("{:.0} / {:.0} / {:.0}", spread.least, spread.median, spread.most))
}

fn dash() -> String {
    "–".to_owned()
}

pub fn ratio_text(ratio: f64) -> String {
    format!("{ratio:.2}")
}

/// A number with groups of three digits.
fn count(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-5 => format!("{:.2} µs", s * 1e6),
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

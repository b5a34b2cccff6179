//! Plots, as SVG that needs no other file.

use plotters::coord::ranged1d::SegmentValue;
use plotters::prelude::*;

use super::Failure;
use super::contender::Role;
use super::report::latency;
use super::rounds::{Entry, Results};

const WIDTH: u32 = 960;

/// A bar for each entry: its median rate, with a line from the least to the most.
pub fn bars(results: &Results) -> Result<String, Failure> {
    let entries: Vec<&Entry> = results.entries.iter().rev().filter(|e| e.rate().is_some()).collect();
    let units = results.section.units();
    let rates: Vec<_> = entries.iter().filter_map(|e| e.rate()).map(|rate| rate.times(units)).collect();
    let most = rates.iter().map(|rate| rate.most).fold(1.0, f64::max);
    let mut svg = String::new();
    {
        let root =
            SVGBackend::with_string(&mut svg, (WIDTH, 70 + 26 * entries.len() as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .margin_right(40)
            .x_label_area_size(40)
            .y_label_area_size(270)
            .build_cartesian_2d(0.0..most * 1.02, (0..entries.len()).into_segmented())?;
        let name = |y: &SegmentValue<usize>| match y {
            SegmentValue::CenterOf(i) => entries.get(*i).map(|e| e.name.clone()).unwrap_or_default(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .max_light_lines(1)
            .x_desc(results.section.unit())
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_labels(entries.len())
            .y_label_formatter(&name)
            .draw()?;
        chart.draw_series(entries.iter().zip(&rates).enumerate().map(|(i, (entry, rate))| {
            let ends = [(0.0, SegmentValue::Exact(i)), (rate.median, SegmentValue::Exact(i + 1))];
            let mut bar = Rectangle::new(ends, color(entry.role).filled());
            bar.set_margin(4, 4, 0, 0);
            bar
        }))?;
        chart.draw_series(rates.iter().enumerate().map(|(i, rate)| {
            let range = [(rate.least, SegmentValue::CenterOf(i)), (rate.most, SegmentValue::CenterOf(i))];
            PathElement::new(range, BLACK.stroke_width(2))
        }))?;
        root.present()?;
    }
    Ok(svg)
}

fn color(role: Role) -> RGBColor {
    match role {
        Role::Ours => RGBColor(0x1f, 0x77, 0xb4),
        Role::Peer => RGBColor(0xff, 0x9f, 0x40),
        Role::Yardstick => RGBColor(0xbb, 0xbb, 0xbb),
    }
}

/// Throughput, p50 and p99 over the number of tasks: title, name for a file, picture.
pub fn sweep(sections: &[&Results]) -> Result<Vec<(&'static str, &'static str, String)>, Failure> {
    let milliseconds = |entry: &Entry, part| latency(entry, part).map(|seconds| seconds * 1e3);
    Ok(vec![
        (
            "Reads per second over tasks",
            "tasks-rate",
            lines(sections, "reads/s", |entry| Some(entry.rate()?.median))?,
        ),
        ("p50 over tasks", "tasks-p50", lines(sections, "p50, ms", |entry| milliseconds(entry, 0.5))?),
        ("p99 over tasks", "tasks-p99", lines(sections, "p99, ms", |entry| milliseconds(entry, 0.99))?),
    ])
}

fn lines(
    sections: &[&Results],
    what: &str,
    value: impl Fn(&Entry) -> Option<f64>,
) -> Result<String, Failure> {
    let names: Vec<&str> = sections[0].entries.iter().map(|entry| entry.name.as_str()).collect();
    let line = |name: &str| -> Vec<(f64, f64)> {
        let point = |results: &&Results| Some((results.section.tasks as f64, value(results.entry(name)?)?));
        sections.iter().filter_map(point).collect()
    };
    let lines: Vec<(&str, Vec<(f64, f64)>)> = names.into_iter().map(|name| (name, line(name))).collect();
    let points = || lines.iter().flat_map(|(_, points)| points);
    let most_tasks = points().map(|point| point.0).fold(2.0, f64::max);
    let most = points().map(|point| point.1).fold(0.0, f64::max);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, 540)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .margin_right(40)
            .x_label_area_size(40)
            .y_label_area_size(90)
            .build_cartesian_2d((1.0..most_tasks).log_scale().base(2.0), 0.0..most * 1.05)?;
        chart
            .configure_mesh()
            .max_light_lines(1)
            .x_desc("tasks")
            .y_desc(what)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y}"))
            .draw()?;
        for (i, (name, points)) in lines.iter().enumerate() {
            let style = Palette99::pick(i).stroke_width(2);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}

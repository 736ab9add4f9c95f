//! The curves of runs over their steps.

use crate::Run;
use crate::chart::{Chart, Curve, Mark};
use crate::run::Update;
use crate::scale::{Kind, Unit};
use crate::series::{Point, smoothed};
use crate::text::count;

/// Charts of losses and of what went with them, in the order of the page.
pub(crate) fn training(runs: &[Run]) -> String {
    let made = runs.iter().map(|run| run.updates.len()).filter(|updates| *updates > 0);
    let spans: Vec<usize> = made.map(|updates| (updates / 50).max(1)).collect();
    let note = match (spans.iter().min(), spans.iter().max()) {
        (_, Some(1)) | (None, _) | (_, None) => "nats".to_owned(),
        (Some(a), Some(b)) if a == b => format!("nats, averaged over about {a} steps"),
        (Some(a), Some(b)) => format!("nats, averaged over about {a} to {b} steps"),
    };
    let over_steps = |field: fn(&Update) -> Option<f64>, smooth: bool| {
        curves(runs, move |run| {
            let updates = run.updates.iter();
            let points = updates.filter_map(|u| Some((u.step as f64, field(u)?)));
            let raw: Vec<Point> = points.collect();
            let span = raw.len() / 50;
            if smooth && span > 1 { (smoothed(&raw, span), raw) } else { (raw, Vec::new()) }
        })
    };
    let validations = curves(runs, |run| {
        (run.validations.iter().map(|(step, loss)| (*step as f64, *loss)).collect(), Vec::new())
    });
    let (number, end) = (Unit::Number, last_step(runs));
    let charts = [
        Chart {
            wide: true,
            marks: marks(runs),
            ..chart(end, "Training loss", &note, Kind::Log, number, over_steps(|u| u.loss, true))
        },
        Chart {
            marks: marks(runs),
            ..chart(end, "Validation loss", "nats, held-out text", Kind::Log, number, validations)
        },
        chart(
            end,
            "Learning rate",
            "",
            Kind::FromZero,
            number,
            over_steps(|u| u.learning_rate, false),
        ),
        chart(
            end,
            "Gradient norm",
            "global, before clipping",
            Kind::Log,
            number,
            over_steps(|u| u.grad_norm, true),
        ),
        chart(
            end,
            "Speed",
            "tokens per second",
            Kind::FromZero,
            Unit::Count,
            over_steps(|u| u.tokens_per_second, true),
        ),
    ];
    charts.iter().filter_map(Chart::html).collect()
}

/// Charts of what the trits did, over all projections; empty where nothing was collected.
pub(crate) fn ternary(runs: &[Run]) -> String {
    let measure = |name: &'static str| {
        curves(runs, move |run| {
            let point = |c: &crate::run::Collection| Some((c.step as f64, *c.all.get(name)?));
            (run.collections.iter().filter_map(point).collect(), Vec::new())
        })
    };
    let (share, end) = (Unit::Share, last_step(runs));
    let charts = [
        chart(
            end,
            "Flips",
            "share of trits changed by one update",
            Kind::Log,
            share,
            measure("flips_by_update"),
        ),
        chart(end, "Zeros", "share of trits that are 0", Kind::Linear, share, measure("zero")),
        chart(
            end,
            "Near a threshold",
            "share of masters within 0.05 scales of it",
            Kind::Linear,
            share,
            measure("near_threshold"),
        ),
        chart(
            end,
            "Zero activations",
            "share of int8 codes that are 0",
            Kind::Linear,
            share,
            measure("zero_codes"),
        ),
    ];
    charts.iter().filter_map(Chart::html).collect()
}

fn chart<'a>(
    end: f64,
    title: &'a str,
    note: &'a str,
    kind: Kind,
    unit: Unit,
    curves: Vec<Curve>,
) -> Chart<'a> {
    Chart {
        title,
        note,
        x: "step",
        xs: [0.0, end],
        wide: false,
        kind,
        unit,
        dots: true,
        runs: true,
        curves,
        marks: Vec::new(),
    }
}

/// The step up to which all charts go, so that one can be read below another.
fn last_step(runs: &[Run]) -> f64 {
    runs.iter().map(Run::step).max().unwrap_or(0) as f64
}

/// One curve for every run that has points; `of` gives them, and what they are smoothed from.
fn curves(runs: &[Run], of: impl Fn(&Run) -> (Vec<Point>, Vec<Point>)) -> Vec<Curve> {
    let curve = |(index, run): (usize, &Run)| {
        let (points, raw) = of(run);
        Curve { name: run.name.clone(), index, points, raw }
    };
    runs.iter().enumerate().map(curve).filter(|curve| !curve.points.is_empty()).collect()
}

/// Most marks of a run: one that spikes in every step is seen to do so.
const MARKS: usize = 200;

fn marks(runs: &[Run]) -> Vec<Mark> {
    let of_run = |(index, run): (usize, &Run)| {
        let mark = |event: &crate::run::Event| Mark {
            x: event.step as f64,
            index,
            label: format!("{}: {} at step {}", run.name, event.kind, count(event.step)),
        };
        run.events.iter().take(MARKS).map(mark).collect::<Vec<_>>()
    };
    runs.iter().enumerate().flat_map(of_run).collect()
}

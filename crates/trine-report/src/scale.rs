//! Axes: from values to places, and where the ticks are.

use crate::series::Point;
use crate::text::{count, significant};

/// How values are laid out along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Evenly.
    Linear,
    /// Evenly, and 0 belongs to it.
    FromZero,
    /// By their logarithms; only positive values have a place.
    Log,
}

/// What the numbers on an axis mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A plain number.
    Number,
    /// A count.
    Count,
    /// A share, shown as percent.
    Share,
}

/// An axis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis {
    log: bool,
    unit: Unit,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Axis {
    /// An axis that shows `values`.
    pub(crate) fn of(kind: Kind, unit: Unit, values: impl Iterator<Item = f64>) -> Self {
        let log = kind == Kind::Log;
        let values = values.filter(|v| v.is_finite() && (!log || *v > 0.0));
        let bounds = values.fold(None, |bounds: Option<Point>, v| {
            Some(bounds.map_or((v, v), |(low, high)| (low.min(v), high.max(v))))
        });
        let (mut low, mut high) = bounds.unwrap_or((if log { 1.0 } else { 0.0 }, 1.0));
        if kind == Kind::FromZero {
            (low, high) = (low.min(0.0), high.max(0.0));
        }
        if log {
            // A tenth of a decade at least, and a little air.
            let (a, b) = (low.ln(), high.ln());
            let air = (0.04 * (b - a)).max(0.05);
            (low, high) = ((a - air).exp(), (b + air).exp());
        } else {
            let least = if high > low {
                0.0
            } else if low == 0.0 {
                1.0
            } else {
                0.1 * low.abs()
            };
            let air = (0.04 * (high - low)).max(least);
            // What is never negative has no negative part of an axis.
            low = if low >= 0.0 { (low - air).max(0.0) } else { low - air };
            high = if high < 0.0 { (high + air).min(0.0) } else { high + air };
        }
        Self { log, unit, low, high }
    }

    /// As [`Self::of`] with `Linear`, without air at the ends.
    pub(crate) fn tight(unit: Unit, values: impl Iterator<Item = f64>) -> Self {
        let finite = values.filter(|v| v.is_finite());
        let (low, high) = finite
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        let (low, high) = match low < high {
            true => (low, high),
            false if low.is_finite() => (low - 0.5, low + 0.5),
            false => (0.0, 1.0),
        };
        Self { log: false, unit, low, high }
    }

    pub(crate) fn is_log(&self) -> bool {
        self.log
    }

    pub(crate) fn unit(&self) -> Unit {
        self.unit
    }

    /// Where a value lies, from 0 at the low end to 1; none where it has no place.
    pub(crate) fn place(&self, value: f64) -> Option<f64> {
        self.project(value).filter(|place| (-1e-9..=1.0 + 1e-9).contains(place))
    }

    /// As [`Self::place`], and outside of the axis a number below 0 or above 1.
    pub(crate) fn project(&self, value: f64) -> Option<f64> {
        let map = |v: f64| if self.log { v.ln() } else { v };
        let place = (map(value) - map(self.low)) / (map(self.high) - map(self.low));
        place.is_finite().then_some(place)
    }

    /// About `most` round values with their labels.
    pub(crate) fn ticks(&self, most: usize) -> Vec<(f64, String)> {
        let factor = if self.unit == Unit::Share { 100.0 } else { 1.0 };
        let (low, high) = (self.low * factor, self.high * factor);
        let values = match self.log && high / low > 8.0 {
            true => log_ticks(low, high, most),
            false => even_ticks(low, high, most, self.unit == Unit::Count),
        };
        let step = |i: usize| match values.get(i.max(1)) {
            // Powers of ten have each their own decimals.
            Some(_) if self.log && high / low > 8.0 => values[i],
            Some(next) => next - values[i.max(1) - 1],
            None => values[i],
        };
        let label = |i: usize| match self.unit {
            Unit::Count => big(values[i]),
            Unit::Share => format!("{}\u{202f}%", plain(values[i], step(i))),
            Unit::Number => plain(values[i], step(i)),
        };
        (0..values.len()).map(|i| (values[i] / factor, label(i))).collect()
    }
}

/// A tick's number, in the decimals that tell it from its neighbours.
fn plain(value: f64, step: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if value.abs() >= 10_000.0 {
        return big(value);
    }
    let decimals = (0..5usize).find(|d| {
        let shifted = step * 10f64.powi(*d as i32);
        shifted > 0.5 && (shifted - shifted.round()).abs() < 1e-6 * shifted
    });
    match decimals {
        Some(decimals) => format!("{value:.decimals$}"),
        None => significant(value, 2).replace(".0e", "e"),
    }
}

/// A count on an axis: 12k rather than 12,000.
fn big(value: f64) -> String {
    let part = |value: f64, unit: &str| format!("{}{unit}", (value * 1e3).round() / 1e3);
    match value.abs() {
        v if v >= 1e9 => part(value / 1e9, "B"),
        v if v >= 1e6 => part(value / 1e6, "M"),
        v if v >= 1e4 => part(value / 1e3, "k"),
        _ if value < 0.0 => format!("\u{2212}{}", count(-value as u64)),
        _ => count(value.round() as u64),
    }
}

/// Multiples of 1, 2 or 5 times a power of ten.
fn even_ticks(low: f64, high: f64, most: usize, whole: bool) -> Vec<f64> {
    let rough = (high - low) / most.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= rough * 0.7);
    let mut step = factor.unwrap_or(10.0) * power;
    if whole {
        step = step.max(1.0);
    }
    let (first, last) = ((low / step - 1e-9).ceil(), (high / step + 1e-9).floor());
    // Bounded, whatever the numbers in the file were.
    let n = ((last - first).max(0.0) as usize).min(4 * most);
    (0..=n).map(|i| (first + i as f64) * step).filter(|v| *v <= high + 1e-9 * step).collect()
}

/// Powers of ten, with their doubles and fives where there is room.
fn log_ticks(low: f64, high: f64, most: usize) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let inside = |v: &f64| (low..=high).contains(v);
    let with = |factors: &[f64], stride: i32| -> Vec<f64> {
        let powers = (first..=last).filter(|e| e.rem_euclid(stride) == 0);
        powers.flat_map(|e| factors.iter().map(move |f| f * 10f64.powi(e))).filter(inside).collect()
    };
    let choices = [with(&[1.0, 2.0, 5.0], 1), with(&[1.0, 3.0], 1), with(&[1.0], 1)];
    let fitting = choices.into_iter().find(|ticks| ticks.len() <= most + 1);
    fitting.unwrap_or_else(|| with(&[1.0], ((last - first) / most.max(1) as i32).max(1) + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: Axis, most: usize) -> Vec<String> {
        axis.ticks(most).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = |kind, unit, low, high| Axis::of(kind, unit, [low, high].into_iter());
        let steps = Axis::tight(Unit::Count, [1.0, 1500.0].into_iter());
        assert_eq!(labels(steps, 5), ["500", "1,000", "1,500"]);
        assert_eq!(
            labels(axis(Kind::FromZero, Unit::Share, 0.1, 0.42), 5),
            ["0\u{202f}%", "10\u{202f}%", "20\u{202f}%", "30\u{202f}%", "40\u{202f}%"]
        );
        assert_eq!(labels(axis(Kind::Log, Unit::Number, 0.9, 8.0), 5), ["1", "2", "5"]);
        assert_eq!(labels(axis(Kind::Log, Unit::Number, 1e-6, 0.5), 4).len(), 3);
        let close = labels(axis(Kind::Log, Unit::Number, 1.41, 1.52), 5);
        assert!(close.contains(&"1.45".to_owned()), "{close:?}");
        for kind in [Kind::Linear, Kind::FromZero, Kind::Log] {
            for (low, high) in [(0.0, 0.0), (5.0, 5.0), (1e-9, 1e9), (f64::NAN, 1.0)] {
                let axis = axis(kind, Unit::Number, low, high);
                let ticks = axis.ticks(5);
                assert!(ticks.len() < 20, "{ticks:?}");
                assert!(ticks.iter().all(|(v, _)| axis.place(*v).is_some()), "{axis:?} {ticks:?}");
            }
        }
    }

    #[test]
    fn small_ticks_have_the_digits_they_need() {
        for (value, step, label) in [
            (0.0005, 0.0005, "0.0005"),
            (0.001, 0.0005, "0.0010"),
            (1e-7, 1e-7, "1e\u{2212}7"),
            (2.5e6, 5e5, "2.5M"),
        ] {
            assert_eq!(plain(value, step), label);
        }
    }

    #[test]
    fn places_run_from_low_to_high() {
        let axis = Axis::of(Kind::Log, Unit::Number, [1.0, 100.0].into_iter());
        assert!((axis.place(10.0).unwrap() - 0.5).abs() < 1e-9);
        assert_eq!((axis.place(0.0), axis.place(-1.0)), (None, None));
        assert!(axis.place(1.0).unwrap() > 0.0 && axis.place(100.0).unwrap() < 1.0);
        let one = Axis::tight(Unit::Count, [3.0].into_iter());
        assert_eq!(one.place(3.0), Some(0.5));
    }
}

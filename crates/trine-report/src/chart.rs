//! A chart: curves over an axis of steps or layers.
//!
//! Curves and grid are an SVG that is stretched to its place, with strokes that are not; labels are
//! HTML at percentages of it. So a chart has the width it is given and text of one size, on a
//! telephone as on a wide screen.

use std::fmt::Write;

use serde_json::json;

use crate::scale::{Axis, Kind, Unit};
use crate::series::{Point, extremes, thinned};
use crate::text::{escape, rounded, script_json};

/// Side of the SVG's own coordinates.
const SIDE: f64 = 1000.0;

/// Number of colours; more curves repeat them with dashes.
pub(crate) const COLORS: usize = 7;

/// A curve.
pub(crate) struct Curve {
    pub(crate) name: String,
    /// Which of all curves that are shown together; decides the colour.
    pub(crate) index: usize,
    pub(crate) points: Vec<Point>,
    /// What `points` is a smoothed form of; empty where it is not.
    pub(crate) raw: Vec<Point>,
}

/// Something that happened at a step of a run.
pub(crate) struct Mark {
    pub(crate) x: f64,
    /// As [`Curve::index`].
    pub(crate) index: usize,
    pub(crate) label: String,
}

/// What a chart shows.
pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    /// Unit and what else has to be known.
    pub(crate) note: &'a str,
    /// What the horizontal axis counts: `step` or `layer`.
    pub(crate) x: &'a str,
    /// What the horizontal axis shows at least.
    pub(crate) xs: [f64; 2],
    /// Whether it takes a row for itself.
    pub(crate) wide: bool,
    pub(crate) kind: Kind,
    pub(crate) unit: Unit,
    /// Whether single points are marked.
    pub(crate) dots: bool,
    /// Whether the curves are runs, which the legend of the page switches on and off.
    pub(crate) runs: bool,
    pub(crate) curves: Vec<Curve>,
    pub(crate) marks: Vec<Mark>,
}

impl Chart<'_> {
    /// The chart as HTML; none where there is nothing to show.
    pub(crate) fn html(&self) -> Option<String> {
        let points = || self.curves.iter().flat_map(|curve| curve.points.iter());
        points().next()?;
        let x = Axis::tight(Unit::Count, points().map(|p| p.0).chain(self.xs));
        let raw = self.curves.iter().flat_map(|curve| inner(&curve.raw));
        let y = Axis::of(self.kind, self.unit, points().map(|p| p.1).chain(raw));
        let (title, note) = (escape(self.title), escape(self.note));
        let class = if self.wide { "chart broad" } else { "chart" };
        let mut out = format!(
            "<figure class=\"{class}\"><figcaption><b>{title}</b> <span>{note}</span></figcaption>\
             <div class=\"plot\">"
        );
        self.svg(&mut out, &x, &y);
        labels(&mut out, &x, &y);
        for mark in self.marks.iter().filter(|mark| x.place(mark.x).is_some()) {
            let left = 100.0 * x.place(mark.x).unwrap_or_default();
            let (class, runs) = (color(mark.index), self.attribute(mark.index));
            let label = escape(&mark.label);
            let _ = write!(
                out,
                "<i class=\"mark {class}\"{runs} style=\"left:{left:.2}%\" title=\"{label}\"></i>"
            );
        }
        let _ = write!(
            out,
            "<i class=\"cursor\"></i><span class=\"what\">{}</span></div><script \
             type=\"application/json\">{}</script></figure>",
            escape(self.x),
            script_json(&self.data(&x, &y))
        );
        Some(out)
    }

    fn svg(&self, out: &mut String, x: &Axis, y: &Axis) {
        out.push_str("<svg viewBox=\"0 0 1000 1000\" preserveAspectRatio=\"none\">");
        let mut grid = String::new();
        for (value, _) in y.ticks(5) {
            let at = SIDE * (1.0 - y.place(value).unwrap_or_default());
            let _ = write!(grid, "M0 {at:.1}H1000");
        }
        let _ = write!(out, "<path class=\"grid\" d=\"{grid}\"/>");
        for curve in &self.curves {
            let d = path(&extremes(&curve.raw), x, y);
            if !d.is_empty() {
                let (class, runs) = (color(curve.index), self.attribute(curve.index));
                let _ = write!(out, "<path class=\"raw {class}\"{runs} d=\"{d}\"/>");
            }
        }
        for curve in &self.curves {
            let points = thinned(&curve.points);
            let (class, runs) = (color(curve.index), self.attribute(curve.index));
            let d = path(&points, x, y);
            let _ = write!(out, "<path class=\"curve {class}\"{runs} d=\"{d}\"/>");
            // A single point makes no line; many make no dots.
            if points.len() == 1 || self.dots && points.len() <= 60 {
                let d = dots(&points, x, y);
                let _ = write!(out, "<path class=\"dots {class}\"{runs} d=\"{d}\"/>");
            }
        }
        out.push_str("</svg>");
    }

    fn attribute(&self, index: usize) -> String {
        if self.runs { format!(" data-run=\"{index}\"") } else { String::new() }
    }

    /// What the script needs to show values under the pointer.
    fn data(&self, x: &Axis, y: &Axis) -> serde_json::Value {
        let curve = |curve: &Curve| {
            let points = thinned(&curve.points);
            let (x, y): (Vec<f64>, Vec<f64>) =
                points.into_iter().map(|(x, y)| (x, rounded(y))).unzip();
            json!({ "name": curve.name, "class": color(curve.index), "run": self.runs.then_some(curve.index), "x": x, "y": y })
        };
        json!({
            "x": self.x,
            "share": y.unit() == Unit::Share,
            "log": y.is_log(),
            "xs": [x.low, x.high],
            "ys": [y.low, y.high],
            "curves": self.curves.iter().map(curve).collect::<Vec<_>>(),
        })
    }
}

/// Classes that give a curve its colour and dashes.
pub(crate) fn color(index: usize) -> String {
    match index / COLORS {
        0 => format!("c{index}"),
        round => format!("c{} d{}", index % COLORS, round.min(2)),
    }
}

/// Values without the outermost hundredth at each end: a few outliers do not decide an axis.
fn inner(raw: &[Point]) -> Vec<f64> {
    let mut values: Vec<f64> = raw.iter().map(|p| p.1).collect();
    values.sort_by(f64::total_cmp);
    let cut = values.len() / 100;
    values[cut..values.len() - cut].to_vec()
}

/// A line through points; it is broken where one has no place.
fn path(points: &[Point], x: &Axis, y: &Axis) -> String {
    let mut d = String::new();
    let mut broken = true;
    for (at, value) in points {
        let (Some(left), Some(up)) = (x.project(*at), y.project(*value)) else {
            broken = true;
            continue;
        };
        let command = if broken { 'M' } else { 'L' };
        // Outliers run along the edge.
        let up = up.clamp(-0.01, 1.01);
        let _ = write!(d, "{command}{:.1} {:.1}", SIDE * left, SIDE * (1.0 - up));
        broken = false;
    }
    d
}

/// Lines without length, which round caps make dots.
fn dots(points: &[Point], x: &Axis, y: &Axis) -> String {
    let mut d = String::new();
    for (at, value) in points {
        if let (Some(left), Some(up)) = (x.place(*at), y.place(*value)) {
            let _ = write!(d, "M{:.1} {:.1}h0", SIDE * left, SIDE * (1.0 - up));
        }
    }
    d
}

/// Tick labels at percentages of the plot.
fn labels(out: &mut String, x: &Axis, y: &Axis) {
    for (value, label) in y.ticks(5) {
        let top = 100.0 * (1.0 - y.place(value).unwrap_or_default());
        let _ = write!(out, "<span class=\"y\" style=\"top:{top:.2}%\">{}</span>", escape(&label));
    }
    for (value, label) in x.ticks(5) {
        let left = 100.0 * x.place(value).unwrap_or_default();
        let _ =
            write!(out, "<span class=\"x\" style=\"left:{left:.2}%\">{}</span>", escape(&label));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<Point>, raw: Vec<Point>) -> Chart<'static> {
        Chart {
            title: "t",
            note: "<n>",
            x: "step",
            xs: [1.0, 3.0],
            wide: false,
            kind: Kind::Log,
            unit: Unit::Number,
            dots: true,
            runs: true,
            curves: vec![Curve { name: "</script>".to_owned(), index: 8, points, raw }],
            marks: vec![Mark { x: 2.0, index: 8, label: "\"spike".to_owned() }],
        }
    }

    #[test]
    fn charts_show_their_points_and_escape_their_texts() {
        let html = chart(vec![(1.0, 1.0), (2.0, 10.0), (3.0, 100.0)], vec![]).html().unwrap();
        assert!(html.contains("class=\"curve c1 d1\" data-run=\"8\" d=\"M0.0 963.0"), "{html}");
        assert!(html.contains("L500.0 500.0L1000.0 37"), "{html}");
        assert!(html.contains("&lt;n&gt;") && html.contains("title=\"&quot;spike\""), "{html}");
        assert_eq!(html.matches("</script>").count(), 1);
        assert!(html.contains("left:50.00%"), "{html}");
    }

    #[test]
    fn a_chart_without_points_is_none_and_a_line_breaks_where_a_value_has_no_place() {
        assert!(chart(vec![], vec![(1.0, 1.0)]).html().is_none());
        let html = chart(vec![(1.0, 1.0), (2.0, 0.0), (3.0, 100.0)], vec![]).html().unwrap();
        let curve = html.split("class=\"curve").nth(1).unwrap();
        assert_eq!(curve.split("/>").next().unwrap().matches('M').count(), 2);
    }

    #[test]
    fn outliers_do_not_decide_an_axis() {
        let mut raw: Vec<Point> = (0..300).map(|i| (f64::from(i), 1.0)).collect();
        raw[7].1 = 1e6;
        assert_eq!(inner(&raw).iter().copied().fold(0.0, f64::max), 1.0);
        assert!(inner(&[]).is_empty());
    }
}

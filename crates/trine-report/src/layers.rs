//! Where in the network: trits, scales and gradients of every projection, at the last collection.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::Run;
use crate::chart::{Chart, Curve};
use crate::run::{Collection, Measures, layer_and_part};
use crate::scale::{Kind, Unit};
use crate::text::{count, escape, percent};

/// The projections of a layer, in the order in which a forward pass meets them.
const PARTS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

/// Most columns of the map of flips.
const COLUMNS: usize = 60;

/// What is shown of each projection: measure, title, note.
const MEASURES: [(&str, &str, &str, Kind, Unit); 6] = [
    ("scale", "Scale", "mean magnitude of masters", Kind::Linear, Unit::Number),
    ("grad_norm", "Gradient norm", "before clipping", Kind::Log, Unit::Number),
    ("near_threshold", "Near a threshold", "share of masters", Kind::Linear, Unit::Share),
    ("flips_by_update", "Flips", "by the last update", Kind::Linear, Unit::Share),
    (
        "saturated",
        "Saturated activations",
        "share of codes at \u{b1}127",
        Kind::Linear,
        Unit::Share,
    ),
    ("zero_codes", "Zero activations", "share of codes that are 0", Kind::Linear, Unit::Share),
];

/// One part of the page for every run with diagnostics; of many runs they are folded up.
pub(crate) fn html(runs: &[Run]) -> String {
    let open = if runs.len() <= 2 { " open" } else { "" };
    let mut out = String::new();
    for (index, run) in runs.iter().enumerate() {
        let (Some(last), false) = (run.collections.last(), run.layers.is_empty()) else { continue };
        let class = crate::chart::color(index);
        let _ = write!(
            out,
            "<details class=\"layers\"{open}><summary><i class=\"chip {class}\"></i>{} <span>after \
             step {}</span></summary>",
            escape(&run.name),
            count(last.step)
        );
        out.push_str(&trits(&run.layers));
        out.push_str(&measures(&run.layers));
        out.push_str(&flips(&run.collections));
        out.push_str("</details>");
    }
    out
}

/// Projections by part, each with its layers.
fn by_part(layers: &BTreeMap<String, Measures>) -> Vec<(&str, BTreeMap<usize, &Measures>)> {
    let mut parts: Vec<(&str, BTreeMap<usize, &Measures>)> =
        PARTS.iter().map(|part| (*part, BTreeMap::new())).collect();
    for (name, measures) in layers {
        if let Some((layer, part)) = layer_and_part(name)
            && let Some((_, found)) = parts.iter_mut().find(|(name, _)| *name == part)
        {
            found.insert(layer, measures);
        }
    }
    parts.retain(|(_, layers)| !layers.is_empty());
    parts
}

/// Stacked bars: one panel for every part, one bar for every layer.
fn trits(layers: &BTreeMap<String, Measures>) -> String {
    let mut out = String::new();
    for (part, layers) in by_part(layers) {
        let shares =
            |m: &Measures| Some([*m.get("negative")?, *m.get("zero")?, *m.get("positive")?]);
        let bars: Vec<(usize, [f64; 3])> =
            layers.iter().filter_map(|(layer, m)| Some((*layer, shares(m)?))).collect();
        let Some((last, _)) = bars.last().copied() else { continue };
        let _ = write!(
            out,
            "<figure class=\"trits\"><figcaption><b>{}</b></figcaption><svg viewBox=\"0 0 {} 100\" \
             preserveAspectRatio=\"none\">",
            escape(part),
            last + 1
        );
        for (layer, shares) in &bars {
            let label = format!(
                "layer {layer}: \u{2212}1 {}, 0 {}, +1 {}",
                percent(shares[0]),
                percent(shares[1]),
                percent(shares[2])
            );
            let _ = write!(out, "<g><title>{label}</title>");
            let mut top = 100.0;
            for (share, class) in shares.iter().zip(["minus", "zero", "plus"]) {
                let height = 100.0 * share.clamp(0.0, 1.0);
                top -= height;
                let x = *layer as f64 + 0.06;
                let _ = write!(
                    out,
                    "<rect class=\"{class}\" x=\"{x:.2}\" y=\"{top:.2}\" width=\".88\" \
                     height=\"{height:.2}\"/>"
                );
            }
            out.push_str("</g>");
        }
        let ends = if last == 0 { "layer 0".to_owned() } else { format!("layer 0\u{2013}{last}") };
        let _ = write!(out, "</svg><div class=\"axis\">{ends}</div></figure>");
    }
    if out.is_empty() {
        return out;
    }
    format!(
        "<h3>Trits</h3><p class=\"legend\"><span><i class=\"box plus\"></i>+1</span><span><i \
         class=\"box zero\"></i>0</span><span><i class=\"box minus\"></i>\u{2212}1</span></p><div \
         class=\"panels\">{out}</div>"
    )
}

/// A small chart for every measure: over the layers, a curve for every part.
fn measures(layers: &BTreeMap<String, Measures>) -> String {
    let parts = by_part(layers);
    let mut charts = String::new();
    for (measure, title, note, kind, unit) in MEASURES {
        let curve = |(part, layers): &(&str, BTreeMap<usize, &Measures>)| {
            let index = PARTS.iter().position(|p| p == part).unwrap_or_default();
            let point = |(layer, m): (&usize, &&Measures)| Some((*layer as f64, *m.get(measure)?));
            let points = layers.iter().filter_map(point).collect();
            Curve { name: (*part).to_owned(), index, points, raw: Vec::new() }
        };
        let curves: Vec<Curve> =
            parts.iter().map(curve).filter(|curve| !curve.points.is_empty()).collect();
        let chart = Chart {
            title,
            note,
            x: "layer",
            xs: [0.0; 2],
            wide: false,
            kind,
            unit,
            dots: true,
            runs: false,
            curves,
            marks: Vec::new(),
        };
        charts.extend(chart.html());
    }
    let chip = |(index, part): (usize, &&str)| {
        format!("<span><i class=\"chip {}\"></i>{part}</span>", crate::chart::color(index))
    };
    let legend: String = PARTS.iter().enumerate().map(chip).collect();
    format!(
        "<h3>Projections</h3><p class=\"legend\">{legend}</p><div class=\"charts small\">{charts}\
         </div>"
    )
}

/// A map of flips: time to the right, depth upwards, the darker the more.
fn flips(collections: &[Collection]) -> String {
    let layers = collections.iter().map(|c| c.flips_by_layer.len()).max().unwrap_or(0);
    let columns: Vec<&[Collection]> =
        collections.chunks(collections.len().div_ceil(COLUMNS).max(1)).collect();
    let mean = |column: &[Collection], layer: usize| -> Option<f64> {
        let known = column.iter().filter_map(|c| *c.flips_by_layer.get(layer)?);
        let (n, sum) = known.fold((0.0, 0.0), |(n, sum), share| (n + 1.0, sum + share));
        (n > 0.0).then(|| sum / n)
    };
    let cells = || {
        let of = |(x, column)| (0..layers).filter_map(move |y| Some((x, y, mean(column, y)?)));
        columns.iter().copied().enumerate().flat_map(of)
    };
    let positive = || cells().map(|cell| cell.2).filter(|share| *share > 0.0);
    let (Some(least), Some(most)) = (positive().reduce(f64::min), positive().reduce(f64::max))
    else {
        return String::new();
    };
    if columns.len() < 3 {
        return String::new();
    }
    let mut rects = String::new();
    for (x, y, share) in cells().filter(|cell| cell.2 > 0.0) {
        // By the logarithm, from a twentieth to all of the colour.
        let part = if most > least { (share / least).ln() / (most / least).ln() } else { 1.0 };
        let _ = write!(
            rects,
            "<rect x=\"{x}\" y=\"{}\" width=\"1.02\" height=\"1.02\" fill-opacity=\"{:.2}\"/>",
            layers - 1 - y,
            0.05 + 0.95 * part
        );
    }
    let step = |collection: Option<&Collection>| count(collection.map_or(0, |c| c.step));
    format!(
        "<h3>Flips over time</h3><p class=\"legend\"><span>share of trits that one update changed, \
         by layer: {}</span><i class=\"ramp\"></i><span>{}</span></p><figure class=\"map\"><span \
         class=\"top\">layer {}</span><span class=\"bottom\">layer 0</span><svg viewBox=\"0 0 {} \
         {layers}\" preserveAspectRatio=\"none\">{rects}</svg><div class=\"axis ends\"><span>step \
         {}</span><span>step {}</span></div></figure>",
        percent(least),
        percent(most),
        layers - 1,
        columns.len(),
        step(collections.first()),
        step(collections.last())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measures_of(values: &[(&str, f64)]) -> Measures {
        values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    fn run() -> Run {
        let layer =
            measures_of(&[("negative", 0.25), ("zero", 0.5), ("positive", 0.25), ("scale", 0.02)]);
        let names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "odd"];
        let collection = |step| Collection {
            step,
            all: Measures::new(),
            flips_by_layer: vec![Some(1e-4 * step as f64), Some(0.0)],
        };
        Run {
            name: "<a>".to_owned(),
            layers: names.into_iter().map(|name| (name.to_owned(), layer.clone())).collect(),
            collections: [10, 20, 30].map(collection).into(),
            ..Run::default()
        }
    }

    #[test]
    fn every_layer_has_a_bar_of_three_shares() {
        let html = html(&[run()]);
        assert_eq!(html.matches("class=\"zero\"").count(), 2);
        assert!(html.contains("y=\"25.00\" width=\".88\" height=\"50.00\""), "{html}");
        assert!(html.contains("layer 1: \u{2212}1 25.0") && html.contains("&lt;a&gt;"), "{html}");
    }

    #[test]
    fn the_map_of_flips_leaves_out_what_did_not_flip() {
        let map = flips(&run().collections);
        assert_eq!(map.matches("<rect").count(), 3);
        assert!(map.contains("fill-opacity=\"0.05\"") && map.contains("fill-opacity=\"1.00\""));
        assert!(flips(&run().collections[..2]).is_empty() && flips(&[]).is_empty());
    }

    #[test]
    fn runs_without_diagnostics_have_no_part() {
        assert!(html(&[Run::default()]).is_empty());
    }
}

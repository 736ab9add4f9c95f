//! What merging an adapter into ternary weights cost, for people and programs.

use serde_json::{Map, Value, json};
use trine_export::{MergeCost, MergeCosts};
use trine_format::names;

use crate::output;

/// By projection.
pub(super) fn json(costs: &MergeCosts) -> Value {
    let cost = |(p, cost): (_, MergeCost)| {
        let value = json!({
            "weights": cost.weights,
            "changed_trits": cost.changed,
            "adapter_change": cost.adapter_change(),
            "error": cost.error(),
            "kept": cost.kept(),
        });
        (names::module(p).to_owned(), value)
    };
    costs.by_projection().into_iter().map(cost).collect::<Map<_, _>>().into()
}

/// One line for each projection, and a word where merging does not pay.
pub(super) fn note(costs: &MergeCosts) {
    let costs = costs.by_projection();
    for (p, cost) in &costs {
        output::note!(
            "merged {}: {} of {} trits turned; the adapter changes weights by {:.2} %, of which \
             {:.0} % are kept; error {:.2} %",
            names::module(*p),
            output::count(cost.changed),
            output::count(cost.weights),
            100.0 * cost.adapter_change(),
            100.0 * cost.kept(),
            100.0 * cost.error()
        );
    }
    if costs.iter().any(|(_, cost)| cost.error() >= cost.adapter_change() && cost.weights > 0) {
        output::note!(
            "warning: rounding to trits costs more than the adapter changes: such merged weights are no \
             nearer to the adapted ones than the model without it; --adapter runs it exactly"
        );
    }
}

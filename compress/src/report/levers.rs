//! The same bytes spent in several ways, side by side.

use super::table::{bytes, table};
use crate::run::Lever;

/// A row's name: `bits`, `prune.easy_ep + bits`, `bits + dropping`.
fn name(lever: &Lever) -> String {
    let bits = if lever.dropped.is_some() { "bits + dropping" } else { "bits" };
    lever.by.as_ref().map_or_else(|| bits.to_owned(), |by| format!("{by} + {bits}"))
}

/// Every way, and the best of each kind: bits only, prune + bits, merge + bits, all.
pub fn levers(found: &[Lever]) -> String {
    let head = ["", "experts a layer", "dropped", "bytes", "loss of removal", "of widths", "predicted"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for lever in found {
        let dropped = lever.dropped.map_or(String::new(), |n| n.to_string());
        let losses = [lever.removal, lever.widths, lever.loss()].map(|loss| format!("{loss:.6}"));
        rows.push([name(lever), lever.experts.to_string(), dropped, bytes(lever.bytes)].into_iter().chain(losses).collect());
    }
    let best = |of: &dyn Fn(&Lever) -> bool| found.iter().filter(|lever| of(lever)).min_by(|a, b| a.loss().total_cmp(&b.loss()));
    let by =
        |what: &'static str| move |lever: &Lever| lever.dropped.is_none() && lever.by.as_deref().is_some_and(|by| by.starts_with(what));
    let kinds: [(&str, Option<&Lever>); 4] = [
        ("bits only", best(&|lever| lever.by.is_none() && lever.dropped.is_none())),
        ("prune + bits", best(&by("prune."))),
        ("merge + bits", best(&by("merge."))),
        ("all", best(&|_| true)),
    ];
    let line = |(kind, lever): &(&str, Option<&Lever>)| {
        lever.map(|lever| format!("{kind}: {:.6} ({}, {} experts a layer)\n", lever.loss(), name(lever), lever.experts))
    };
    let note = "Removal is measured on the validation split of the calibration texts, widths are predicted on what is left; the order of removal is \
                the pruner's, groups are the merger's, and the count that stays is the loop's.";
    format!("{}\n{}\n{note}\n", table(&rows), kinds.iter().filter_map(line).collect::<String>())
}

/// The same as CSV, numbers in full.
pub fn levers_csv(found: &[Lever]) -> String {
    let line = |lever: &Lever| {
        let dropped = lever.dropped.map_or(String::new(), |n| n.to_string());
        format!(
            "{},{},{dropped},{},{:e},{:e},{:e}\n",
            lever.by.as_deref().unwrap_or(""),
            lever.experts,
            lever.bytes,
            lever.removal,
            lever.widths,
            lever.loss()
        )
    };
    std::iter::once("by,experts,dropped,bytes,removal,widths,predicted\n".to_owned()).chain(found.iter().map(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_every_kind_is_named() {
        let lever = |by: Option<&str>, experts, dropped, removal, widths| Lever {
            by: by.map(str::to_owned),
            experts,
            dropped,
            bytes: 1000,
            removal,
            widths,
        };
        let found = [
            lever(None, 16, None, 0.0, 0.5),
            lever(None, 16, Some(3), 0.0, 0.25),
            lever(Some("prune.easy_ep"), 12, None, 0.125, 0.25),
            lever(Some("prune.easy_ep"), 8, None, 0.5, 0.125),
            lever(Some("prune.easy_ep"), 12, Some(2), 0.125, 0.0625),
        ];
        let text = levers(&found);
        for part in [
            "bits only: 0.500000 (bits, 16 experts a layer)",
            "prune + bits: 0.375000 (prune.easy_ep + bits, 12 experts a layer)",
            "all: 0.187500 (prune.easy_ep + bits + dropping, 12 experts a layer)",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("merge + bits"), "{text}");
        assert_eq!(levers_csv(&found).lines().nth(2), Some(",16,3,1000,0e0,2.5e-1,2.5e-1"));
    }
}

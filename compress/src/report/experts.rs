//! Which experts stay, for a person.

use super::table::table;
use crate::plan::{Experts, Fate};
use crate::reduce::resample::Sureness;

fn cells<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// Which experts of each layer stay and how clear the cut was; with `sureness` what domains share and how stable the choice is.
pub fn experts(experts: &Experts, sureness: Option<&Sureness>) -> String {
    let Experts { by, before, after, domains, .. } = experts;
    let mut text = format!("{by} on {}: {after} of {before} experts a layer\n\n", domains.join(", "));
    let mut rows = vec![cells(["layer", "lowest that stays", "highest that goes", "gap", "stable", "experts"])];
    for (layer, fate) in &experts.layers {
        let [stays, goes, gap] = match fate.edge {
            Some((stays, goes)) => [format!("{stays:.4e}"), format!("{goes:.4e}"), format!("{:.1}%", 100.0 * (1.0 - goes / stays))],
            None => ["-", "-", "-"].map(str::to_owned),
        };
        let stable = sureness.and_then(|s| s.stability.get(layer)).map_or("-".to_owned(), |share| format!("{:.0}%", 100.0 * share));
        rows.push(vec![layer.to_string(), stays, goes, gap, stable, listed(fate)]);
    }
    text += &table(&rows);
    let repaired: Vec<_> = experts.layers.iter().filter_map(|(layer, fate)| Some((layer, fate.repaired?))).collect();
    if !repaired.is_empty() {
        let mut rows = vec![cells(["layer", "block error before repair", "after"])];
        let row =
            |(layer, r): (&usize, crate::plan::Repaired)| vec![layer.to_string(), format!("{:.4}", r.before), format!("{:.4}", r.after)];
        rows.extend(repaired.into_iter().map(row));
        text += &format!("\n{}", table(&rows));
    }
    let Some(sureness) = sureness else { return text };
    let mut rows = vec![[vec!["also kept by".to_owned()], sureness.domains.clone()].concat()];
    for (domain, shares) in sureness.domains.iter().zip(&sureness.overlap) {
        rows.push(std::iter::once(domain.clone()).chain(shares.iter().map(|share| format!("{:.0}%", 100.0 * share))).collect());
    }
    text + &format!("\n{}\nstable: share of the experts that stay in draws that leave out a quarter of the samples\n", table(&rows))
}

/// The experts that stay, merged ones in brackets.
fn listed(fate: &Fate) -> String {
    let one = |members: &Vec<usize>| match members.as_slice() {
        [single] => single.to_string(),
        several => format!("({})", several.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")),
    };
    fate.experts.iter().map(one).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_cut_is_shown_with_its_gap() {
    let fate = Fate { experts: vec![vec![1], vec![0, 3]], scores: vec![0.1; 4], edge: Some((0.4, 0.3)), ..Fate::default() };
    let shown = Experts {
        model: String::new(),
        corpus: String::new(),
        by: "prune.reap".into(),
        domains: vec!["en".into()],
        before: 4,
        after: 2,
        mtp: None,
        layers: [(3, fate)].into(),
    };
    let sureness = Sureness { domains: vec!["en".into()], overlap: vec![vec![1.0]], stability: [(3, 0.75)].into() };
    let text = experts(&shown, Some(&sureness));
    assert!(text.contains("prune.reap on en: 2 of 4 experts a layer") && text.contains("25.0%"), "{text}");
    assert!(text.contains("75%") && text.contains("1 (0 3)") && text.contains("100%"), "{text}");
    assert!(!experts(&shown, None).contains("also kept by"));
}

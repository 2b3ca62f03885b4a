//! One program a layer, as PMQ has it: every layer has its share of the bytes, and an expert one width for all its matrices.

use std::collections::BTreeMap;

use calib::arch::{Kind, Part};

use super::constraints::{Constraints, Runtime};
use super::decide::{Account, Case, Decision, Undecided, of_classes};
use super::hull;
use super::pmq::{Params, Presence, choose};
use super::program;

/// A width for every expert with the least loss within each layer's share of `bytes`; every other matrix has its only width.
///
/// A layer's share goes by its weights. The bound is that of the layers' relaxations without the presence rule, the price that of the
/// layer that would gain most.
///
/// # Errors
///
/// [`Undecided`].
pub fn decide(case: &Case<'_>, bytes: u64, rules: &Constraints, params: &Params) -> Result<Decision, Undecided> {
    let mut layers: BTreeMap<usize, BTreeMap<usize, Vec<usize>>> = BTreeMap::new();
    let (mut chosen, mut spent) = (vec![None; case.matrices.len()], 0);
    for (m, matrix) in case.matrices.iter().enumerate() {
        if let Part::Expert(expert, _) = matrix.part {
            layers.entry(matrix.layer).or_default().entry(expert).or_default().push(m);
        } else {
            let (open, options) = of_classes(case, rules, &[vec![m]])?;
            chosen[m] = Some(open[0][0]);
            spent += options[0][0].bytes;
        }
    }
    let weights = |members: &BTreeMap<usize, Vec<usize>>| members.values().flatten().map(|&m| case.matrices[m].weights()).sum::<u64>();
    let all: u64 = layers.values().map(weights).sum();
    let left = bytes.checked_sub(spent).ok_or(Undecided::Budget { budget: bytes, least: spent, weights: all })?;
    let (mut loss, mut bound, mut price) = (0.0, 0.0, 0.0_f64);
    for (layer, members) in &layers {
        let share = (left as f64 * weights(members) as f64 / all.max(1) as f64).floor() as u64;
        let classes: Vec<Vec<usize>> = members.values().cloned().collect();
        let (open, options) = of_classes(case, rules, &classes)?;
        let required: Vec<usize> = match params.presence {
            Presence::Required => [3, 2].iter().filter_map(|&bits| open[0].iter().position(|&o| case.choices[o].bits == bits)).collect(),
            Presence::Free => Vec::new(),
        };
        let options_of = choose(&options, share, &required).ok_or_else(|| Undecided::Layer {
            layer: *layer,
            budget: share,
            least: options.iter().map(|o| o.iter().map(|o| o.bytes).min().unwrap_or(0)).sum(),
        })?;
        for ((class, options), (open, &option)) in classes.iter().zip(&options).zip(open.iter().zip(&options_of)) {
            class.iter().for_each(|&m| chosen[m] = Some(open[option]));
            spent += options[option].bytes;
            loss += options[option].loss;
        }
        let walk = hull::walk(&options, share);
        bound += walk.bound;
        price = price.max(walk.price);
    }
    let other = |classes: Vec<Vec<usize>>| -> Result<f64, Undecided> {
        let (_, options) = of_classes(case, rules, &classes)?;
        // The same bytes over all layers at once, which an allocation of their shares meets.
        Ok(program::solve(&options, bytes).map_or(loss, |found| found.loss))
    };
    let experts = layers.values().map(BTreeMap::len).sum::<usize>();
    let others = case.matrices.iter().filter(|m| m.kind() != Kind::Expert).count();
    let account = Account {
        cost: case.cost.to_owned(),
        runtime: rules.runtime,
        budget: bytes,
        bytes: spent,
        classes: experts + others,
        loss,
        bound,
        price,
        proven: true,
        loss_free: other((0..case.matrices.len()).map(|m| vec![m]).collect())?,
        loss_native: other(Constraints { runtime: Some(Runtime::Native), ..*rules }.classes(case.matrices))?,
        dropped: None,
        loss_whole: None,
        beside: Vec::new(),
    };
    Ok(Decision { chosen, account })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::{Choice, Matrix};
    use crate::quantize::Grid;
    use calib::arch::Projection;
    use kernels::{Group, ScaleType};

    fn matrices() -> Vec<Matrix> {
        let matrix = |layer, e, p| Matrix {
            name: format!("{layer}.{e}.{p:?}"),
            layer,
            part: Part::Expert(e, p),
            shape: [4, 128],
            scale: ScaleType::Bf16,
        };
        (0..2).flat_map(|layer| (0..3).flat_map(move |e| [Projection::Gate, Projection::Down].map(|p| matrix(layer, e, p)))).collect()
    }

    #[test]
    fn every_layer_keeps_its_share_and_the_rule() {
        let choices = [1, 2, 3].map(|bits| Choice { bits, group: Group::Size(128), grid: Grid::Half });
        // Layer 0 would take everything; experts of layer 1 lose next to nothing.
        let loss = |m: &Matrix| [9.0, 5.0, 1.0].map(|loss| if m.layer == 0 { loss * 100.0 } else { loss }).to_vec();
        let matrices = matrices();
        let losses: Vec<Vec<f64>> = matrices.iter().map(loss).collect();
        let case = Case { matrices: &matrices, choices: &choices, losses: &losses, cost: "pmq", droppable: &[] };
        let rules = Constraints::default();
        // 4 · 128 weights take 64 bytes a bit and 8 of scales; 6 bits over three experts of two matrices.
        let bytes = 2 * (2 * 6 * 64 + 6 * 8);
        let with = decide(&case, bytes, &rules, &Params::default()).unwrap();
        let bits = |found: &Decision| -> Vec<u8> { found.chosen.iter().step_by(2).map(|o| choices[o.unwrap()].bits).collect() };
        let mut first = bits(&with)[..3].to_vec();
        first.sort_unstable();
        assert_eq!((first, with.account.bytes), (vec![1, 2, 3], bytes));
        assert!(with.chosen.chunks(2).all(|pair| pair[0] == pair[1]));
        assert!(with.account.loss_free < with.account.loss);
        let tight = decide(&case, 2 * (2 * 5 * 64 + 6 * 8), &rules, &Params::default()).unwrap_err().to_string();
        assert!(tight.contains("layer 0") && tight.contains("688 bytes"), "{tight}");
        decide(&case, 2 * (2 * 5 * 64 + 6 * 8), &rules, &Params { presence: Presence::Free, ..Params::default() }).unwrap();
    }
}

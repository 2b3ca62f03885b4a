//! NAEE (ACL 2024; specs: methods 6.5): the set of experts whose block comes closest to the whole one.
//!
//! Dropped logits count as −∞ before the router chooses, so survivors take over as they would in the pruned model. The loss of a set is
//! `Σ_t ‖y_t − y_t(set)‖²` over a sample of tokens (the paper sums Frobenius norms of batches; with one batch the order is the same).
//! Up to 16 experts all sets are tried; beyond, one expert after the other is dropped, the one that costs least.
//!
//! A set costs no matrix product: with the Gram matrix of the experts' outputs `G_t[i,j] = F_i·F_j` and `b_t[i] = y_t·F_i`, a token's
//! loss is `‖y‖² − 2 Σ w_i b_i + ΣΣ w_i w_j G_ij` over the experts that the router chooses.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mtp::Mtp;

/// Experts up to which all sets are tried.
pub const ALL_SETS: usize = 16;

/// Knobs of the search.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Exhaustive")]
pub struct Params {
    /// Share of the experts of a layer that stays. This or `experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,
    /// Experts of a layer that stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Texts of the corpus, by file stem, that count; all of them without it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<String>,
    /// Tokens, spread evenly over the samples that count, that a set is judged by.
    pub tokens: usize,
    /// What becomes of multi-token-prediction layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
}

impl Default for Params {
    fn default() -> Self {
        Self { keep: None, experts: None, domains: Vec::new(), tokens: 1024, mtp: None }
    }
}

impl Params {
    /// How many of a layer's experts stay.
    pub fn count(&self, before: usize) -> usize {
        super::Pruner::Exhaustive(self.clone()).asked().count(before)
    }
}

/// One token, as far as a set's loss depends on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Router logits, `[experts]`.
    pub logits: Vec<f32>,
    /// `F_i · F_j`, `[experts, experts]`.
    pub gram: Vec<f64>,
    /// `y · F_i` with the whole block's routed output, `[experts]`.
    pub along: Vec<f64>,
    /// `‖y‖²`.
    pub energy: f64,
}

/// Chooses for one row of logits, of which those of dropped experts are −∞: experts and their weights.
pub type Route<'a> = dyn Fn(&[f32]) -> (Vec<usize>, Vec<f32>) + Sync + 'a;

/// The set of `count` experts that loses least, rising, and what it loses.
///
/// `allowed` judges a set before its loss is computed (whole groups, for routers that have them). Of equal losses the first set in
/// lexical order stays.
pub fn search(
    tokens: &[Token],
    experts: usize,
    count: usize,
    route: &Route<'_>,
    allowed: impl Fn(&[usize]) -> bool + Sync,
) -> (Vec<usize>, f64) {
    use rayon::prelude::*;
    if experts <= ALL_SETS {
        let sets: Vec<Vec<usize>> = sets(experts, count).into_iter().filter(|set| allowed(set)).collect();
        let losses: Vec<f64> = sets.par_iter().map(|set| loss(tokens, set, experts, route)).collect();
        let least = (0..sets.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b]));
        return least.map_or_else(|| (Vec::new(), f64::INFINITY), |at| (sets[at].clone(), losses[at]));
    }
    let (mut kept, mut least): (Vec<usize>, f64) = ((0..experts).collect(), 0.0);
    while kept.len() > count {
        let without = |gone: &usize| kept.iter().copied().filter(|e| e != gone).collect::<Vec<_>>();
        let sets: Vec<Vec<usize>> = kept.iter().map(without).filter(|set| allowed(set)).collect();
        let losses: Vec<f64> = sets.par_iter().map(|set| loss(tokens, set, experts, route)).collect();
        let Some(at) = (0..sets.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])) else { break };
        (kept, least) = (sets[at].clone(), losses[at]);
    }
    (kept, least)
}

/// `Σ_t ‖y_t − y_t(set)‖²`.
pub fn loss(tokens: &[Token], set: &[usize], experts: usize, route: &Route<'_>) -> f64 {
    let of = |token: &Token| {
        let mut logits = vec![f32::NEG_INFINITY; experts];
        set.iter().for_each(|&e| logits[e] = token.logits[e]);
        let (chosen, weights) = route(&logits);
        let pairs = || chosen.iter().zip(&weights).map(|(&e, &w)| (e, f64::from(w)));
        let along: f64 = pairs().map(|(e, w)| w * token.along[e]).sum();
        let own: f64 =
            pairs().flat_map(|(i, a)| pairs().map(move |(j, b)| (i, j, a * b))).map(|(i, j, w)| w * token.gram[i * experts + j]).sum();
        token.energy - 2.0 * along + own
    };
    tokens.iter().map(of).sum()
}

/// All sets of `count` of `experts`, in lexical order.
fn sets(experts: usize, count: usize) -> Vec<Vec<usize>> {
    let mut found = Vec::new();
    let mut set: Vec<usize> = (0..count).collect();
    if count > experts {
        return found;
    }
    loop {
        found.push(set.clone());
        let Some(at) = (0..count).rev().find(|&at| set[at] < experts - count + at) else { return found };
        set[at] += 1;
        for next in at + 1..count {
            set[next] = set[next - 1] + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Top-1 with weight 1.
    fn first(logits: &[f32]) -> (Vec<usize>, Vec<f32>) {
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        (vec![best], vec![1.0])
    }

    /// Experts that put out one number each, with the router's first choice as the whole block.
    fn token(logits: &[f32], outputs: &[f64]) -> Token {
        let y = outputs[first(logits).0[0]];
        let gram = outputs.iter().flat_map(|a| outputs.iter().map(move |b| a * b)).collect();
        Token { logits: logits.to_vec(), gram, along: outputs.iter().map(|f| y * f).collect(), energy: y * y }
    }

    #[test]
    fn three_experts_by_hand() {
        // Token 0 chooses 0 (output 1), else 1 (output 3): without 0 it loses 4. Token 1 chooses 2 (output 5), else 0 (output 4): 1.
        let tokens = [token(&[3.0, 2.0, 1.0], &[1.0, 3.0, 0.0]), token(&[2.0, 1.0, 3.0], &[4.0, 9.0, 5.0])];
        assert_eq!(loss(&tokens, &[0, 1, 2], 3, &first), 0.0);
        assert_eq!(loss(&tokens, &[1, 2], 3, &first), 4.0);
        assert_eq!(loss(&tokens, &[0, 1], 3, &first), 1.0);
        assert_eq!(search(&tokens, 3, 2, &first, |_| true), (vec![0, 2], 0.0));
        assert_eq!(search(&tokens, 3, 1, &first, |set| set != [0]), (vec![2], 1.0));
    }

    #[test]
    fn all_sets_are_tried_once() {
        assert_eq!(sets(4, 2), [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
        assert_eq!((sets(16, 8).len(), sets(3, 3), sets(2, 3).len()), (12870, vec![vec![0, 1, 2]], 0));
    }

    #[test]
    fn beyond_sixteen_the_cheapest_goes_first() {
        // Only expert 19's token differs, and only slightly: what nobody uses goes first.
        let outputs: Vec<f64> = (0..20).map(f64::from).collect();
        let logits: Vec<f32> = (0..20).map(|e| e as f32).collect();
        let (kept, loss) = search(&[token(&logits, &outputs)], 20, 3, &first, |_| true);
        assert_eq!((kept.len(), kept.contains(&19), loss), (3, true, 0.0));
    }
}

//! NAEE (ACL 2024; specs: methods 6.5): the set of experts whose block comes closest to the whole one.
//!
//! Dropped logits count as −∞ before the router chooses, so survivors take over as they would in the pruned model. The loss of a set is
//! `Σ_t ‖y_t − y_t(set)‖²` over a sample of tokens (the paper sums Frobenius norms of batches; with one batch the order is the same).
//! Up to 16 experts all sets are tried; beyond, one expert after the other is dropped, the one that costs least.
//!
//! A set costs no matrix product: with the Gram matrix of the experts' outputs `G_t[i,j] = F_i·F_j` and `b_t[i] = y_t·F_i`, a token's
//! loss is `‖y‖² − 2 Σ w_i b_i + ΣΣ w_i w_j G_ij` over the experts that the router chooses. Where weights depend on the chosen experts
//! alone, a token has few different losses, and each is computed once (16 experts, top 2: 120 for 12,870 sets).

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

/// What the weights of a router depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depend {
    /// The logits of the chosen experts, which are the largest (a softmax renormalized over them, without groups or selection bias).
    Chosen,
    /// Those of the whole set.
    Set,
}

/// The set of `count` experts that loses least, rising, and what it loses.
///
/// `allowed` judges a set before its loss is computed (whole groups, for routers that have them). Of equal losses the first set in
/// lexical order stays.
pub fn search(
    tokens: &[Token],
    experts: usize,
    count: usize,
    (route, depend): (&Route<'_>, Depend),
    allowed: impl Fn(&[usize]) -> bool + Sync,
) -> (Vec<usize>, f64) {
    use rayon::prelude::*;
    if experts <= ALL_SETS {
        let sets: Vec<Vec<usize>> = sets(experts, count).into_iter().filter(|set| allowed(set)).collect();
        let losses: Vec<f64> = match depend {
            Depend::Chosen => remembered(tokens, &sets, experts, route),
            Depend::Set => sets.par_iter().map(|set| loss(tokens, set, experts, route)).collect(),
        };
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

/// Tokens whose losses are added up before they meet the others'.
const RUN: usize = 64;

/// [`loss`] of every set, `[sets]`, for weights that depend on the chosen experts alone.
fn remembered(tokens: &[Token], sets: &[Vec<usize>], experts: usize, route: &Route<'_>) -> Vec<f64> {
    use rayon::prelude::*;
    let masks: Vec<usize> = sets.iter().map(|set| set.iter().fold(0, |mask, &e| mask | 1 << e)).collect();
    let of_run = |run: &[Token]| {
        let mut sums = vec![0.0; sets.len()];
        for token in run {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| token.logits[b].total_cmp(&token.logits[a]).then(a.cmp(&b)));
            let top_k = route(&token.logits).0.len();
            let mut known = vec![f64::NAN; 1 << experts];
            for ((sum, &mask), set) in sums.iter_mut().zip(&masks).zip(sets) {
                let chosen = order.iter().filter(|e| mask >> **e & 1 == 1).take(top_k).fold(0, |chosen, &e| chosen | 1 << e);
                if f64::is_nan(known[chosen]) {
                    known[chosen] = token_loss(token, set, experts, route);
                }
                *sum += known[chosen];
            }
        }
        sums
    };
    let runs: Vec<Vec<f64>> = tokens.par_chunks(RUN).map(of_run).collect();
    // In order: the sums do not depend on the threads.
    runs.into_iter().fold(vec![0.0; sets.len()], |mut sums, run| {
        sums.iter_mut().zip(run).for_each(|(sum, more)| *sum += more);
        sums
    })
}

/// `Σ_t ‖y_t − y_t(set)‖²`.
pub fn loss(tokens: &[Token], set: &[usize], experts: usize, route: &Route<'_>) -> f64 {
    tokens.iter().map(|token| token_loss(token, set, experts, route)).sum()
}

fn token_loss(token: &Token, set: &[usize], experts: usize, route: &Route<'_>) -> f64 {
    let mut logits = vec![f32::NEG_INFINITY; experts];
    set.iter().for_each(|&e| logits[e] = token.logits[e]);
    let (chosen, weights) = route(&logits);
    let pairs = || chosen.iter().zip(&weights).map(|(&e, &w)| (e, f64::from(w)));
    let along: f64 = pairs().map(|(e, w)| w * token.along[e]).sum();
    let own: f64 =
        pairs().flat_map(|(i, a)| pairs().map(move |(j, b)| (i, j, a * b))).map(|(i, j, w)| w * token.gram[i * experts + j]).sum();
    token.energy - 2.0 * along + own
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
        assert_eq!(search(&tokens, 3, 2, (&first, Depend::Set), |_| true), (vec![0, 2], 0.0));
        assert_eq!(search(&tokens, 3, 1, (&first, Depend::Set), |set| set != [0]), (vec![2], 1.0));
    }

    #[test]
    fn remembered_losses_are_the_losses() {
        // Weights in proportion to e^logit of the best two.
        let two = |logits: &[f32]| {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            let (a, b) = (logits[order[0]].exp(), logits[order[1]].exp());
            (order[..2].to_vec(), vec![a / (a + b), b / (a + b)])
        };
        let logits = |t: usize| (0..6).map(|e| ((t * 7 + e * 5) % 11) as f32 * 0.3).collect::<Vec<f32>>();
        let outputs = |t: usize| (0..6).map(|e| ((t * 3 + e * e) % 7) as f64 - 2.0).collect::<Vec<f64>>();
        let tokens: Vec<Token> = (0..100).map(|t| token(&logits(t), &outputs(t))).collect();
        let sets = sets(6, 3);
        for (set, found) in sets.iter().zip(remembered(&tokens, &sets, 6, &two)) {
            let expected = loss(&tokens, set, 6, &two);
            assert!((found - expected).abs() <= 1e-12 * expected.abs(), "{set:?}: {found} {expected}");
        }
        let search = |depend| search(&tokens, 6, 3, (&two, depend), |_| true).0;
        assert_eq!(search(Depend::Chosen), search(Depend::Set));
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
        let (kept, loss) = search(&[token(&logits, &outputs)], 20, 3, (&first, Depend::Set), |_| true);
        assert_eq!((kept.len(), kept.contains(&19), loss), (3, true, 0.0));
    }
}

//! From router logits to chosen experts and their weights, row by row on the CPU.
//!
//! Equal scores: the lower index is chosen, of experts and of groups.

use super::tap::Routing;
use crate::arch::{GroupScore, Groups, Moe, Router, Score};
use crate::{Error, Result};

/// Where the logits of a batch stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The decoder layer.
    pub layer: usize,
    /// The batch's first row over all samples.
    pub first: usize,
}

/// Chooses experts for the rows of one batch.
///
/// `logits` is `[rows, experts]`; `correction` is the selection bias `[experts]`, where the router has one.
///
/// # Errors
///
/// [`Error::RouterNotFinite`] where a logit is NaN or infinite: what follows would be a choice by accident.
pub fn route(moe: &Moe, correction: Option<&[f32]>, logits: Vec<f32>, at: At) -> Result<Routing> {
    let experts = moe.experts;
    if let Some(bad) = logits.iter().position(|z| !z.is_finite()) {
        return Err(Error::RouterNotFinite { layer: at.layer, row: at.first + bad / experts, expert: bad % experts });
    }
    let rows = logits.len() / experts;
    let mut routing = Routing {
        first: at.first,
        rows,
        experts,
        top_k: moe.top_k,
        scores: Vec::with_capacity(logits.len()),
        chosen: Vec::with_capacity(rows * moe.top_k),
        weights: Vec::with_capacity(rows * moe.top_k),
        logits,
    };
    for row in routing.logits.chunks_exact(experts) {
        let scores = scores(moe.router.score, row);
        let (chosen, weights) = match moe.router.score {
            Score::SparseMixer { jitter } => sparse_mixer(row, jitter),
            Score::Softmax | Score::Sigmoid => choose(&moe.router, moe.top_k, correction, &scores),
        };
        routing.scores.extend(scores);
        routing.chosen.extend(chosen.into_iter().map(|e| e as u32));
        routing.weights.extend(weights);
    }
    Ok(routing)
}

/// Scores before the choice, one an expert.
fn scores(score: Score, logits: &[f32]) -> Vec<f32> {
    match score {
        Score::Softmax | Score::SparseMixer { .. } => softmax(logits),
        Score::Sigmoid => logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
    }
}

/// Softmax of one row; −∞ becomes 0.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f32> = logits.iter().map(|z| (z - largest).exp()).collect();
    let sum: f32 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
    p
}

/// The `top_k` best by biased score within the kept groups, weighed by their unbiased scores.
fn choose(router: &Router, top_k: usize, correction: Option<&[f32]>, scores: &[f32]) -> (Vec<usize>, Vec<f32>) {
    let mut biased: Vec<f32> = match correction {
        Some(correction) => scores.iter().zip(correction).map(|(s, c)| s + c).collect(),
        None => scores.to_vec(),
    };
    if let Some(groups) = router.groups {
        mask_groups(groups, &mut biased);
    }
    let chosen = best(&biased, top_k);
    let mut weights: Vec<f32> = chosen.iter().map(|&e| scores[e]).collect();
    if let Some(eps) = router.renormalize {
        let sum = weights.iter().sum::<f32>() + eps;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.iter_mut().for_each(|w| *w *= router.scale);
    (chosen, weights)
}

/// Overwrites the scores outside the best groups.
fn mask_groups(groups: Groups, scores: &mut [f32]) {
    let size = scores.len() / groups.count;
    let judged: Vec<f32> = scores
        .chunks_exact(size)
        .map(|group| match groups.by {
            GroupScore::Max => group.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            GroupScore::TopTwo => best(group, 2).into_iter().map(|e| group[e]).sum(),
        })
        .collect();
    let kept = best(&judged, groups.keep);
    for (index, group) in scores.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&index) {
            group.fill(groups.masked);
        }
    }
}

/// Indices of the `count` largest, best first; of equals the lower index first.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut kept: Vec<usize> = Vec::with_capacity(count + 1);
    for (index, score) in scores.iter().enumerate() {
        if kept.len() == count && kept.last().is_none_or(|&last| *score <= scores[last]) {
            continue;
        }
        let place = kept.partition_point(|&other| scores[other] >= *score);
        kept.insert(place, index);
        kept.truncate(count);
    }
    kept
}

/// SparseMixer at evaluation (arXiv 2409.12136): two experts, each the best of what is left, each weighed by a softmax over
/// the logits that lie within `2 · jitter` of it, relatively. The two weights do not add up to 1.
fn sparse_mixer(logits: &[f32], jitter: f32) -> (Vec<usize>, Vec<f32>) {
    let picks = sparse_mixer_picks(logits, jitter);
    picks.into_iter().map(|(first, p)| (first, p[first])).unzip()
}

/// The two experts, each with the softmax that it was weighed by.
fn sparse_mixer_picks(logits: &[f32], jitter: f32) -> [(usize, Vec<f32>); 2] {
    let mut left = logits.to_vec();
    let mut pick = || {
        let first = best(&left, 1)[0];
        let largest = left[first];
        let near = |z: f32| (largest - z) / z.abs().max(largest) <= 2.0 * jitter || z == largest;
        let kept: Vec<f32> = left.iter().zip(logits).map(|(&l, &z)| if near(z) { l } else { f32::NEG_INFINITY }).collect();
        left[first] = f32::NEG_INFINITY;
        (first, softmax(&kept))
    };
    [pick(), pick()]
}

/// The gradient at the logits, `[rows, experts]`, from `d_weights`, that at the final routing weights, `[rows, top_k]`. The
/// choice itself has none.
pub fn backward(moe: &Moe, routing: &Routing, d_weights: &[f32]) -> Vec<f32> {
    let (experts, top_k) = (routing.experts, routing.top_k);
    let row = |i: usize| {
        let (logits, scores) = (&routing.logits[i * experts..][..experts], &routing.scores[i * experts..][..experts]);
        let (chosen, d_weights) = (&routing.chosen[i * top_k..][..top_k], &d_weights[i * top_k..][..top_k]);
        let d_scores = || weights_backward(&moe.router, scores, chosen, d_weights);
        match moe.router.score {
            Score::Softmax => softmax_backward(scores, &d_scores()),
            Score::Sigmoid => scores.iter().map(|&s| f64::from(s)).zip(d_scores()).map(|(s, d)| d * s * (1.0 - s)).collect(),
            Score::SparseMixer { jitter } => sparse_mixer_backward(logits, jitter, d_weights),
        }
    };
    (0..routing.rows).flat_map(row).map(|d| d as f32).collect()
}

/// The gradient at the logits of one row from that at its two weights, each of which has a softmax of its own.
fn sparse_mixer_backward(logits: &[f32], jitter: f32, d_weights: &[f32]) -> Vec<f64> {
    let mut d = vec![0.0; logits.len()];
    for ((first, p), &d_weight) in sparse_mixer_picks(logits, jitter).iter().zip(d_weights) {
        let mut d_scores = vec![0.0; logits.len()];
        d_scores[*first] = f64::from(d_weight);
        d.iter_mut().zip(softmax_backward(p, &d_scores)).for_each(|(d, more)| *d += more);
    }
    d
}

/// The gradient at the scores of one row from that at its weights.
///
/// With the chosen scores `s`, `S = Σ s + eps` and the factor `a`: the weights are `w = a·s / S`, so
/// `ds = a / S · (dw − Σ dw·s / S)`; without renormalization `ds = a·dw`.
fn weights_backward(router: &Router, scores: &[f32], chosen: &[u32], d_weights: &[f32]) -> Vec<f64> {
    let mut d_scores = vec![0.0; scores.len()];
    let pairs = || chosen.iter().zip(d_weights).map(|(&e, &d)| (e as usize, f64::from(scores[e as usize]), f64::from(d)));
    let (sum, mean) = match router.renormalize {
        Some(eps) => {
            let sum = pairs().map(|(_, s, _)| s).sum::<f64>() + f64::from(eps);
            (sum, pairs().map(|(_, s, d)| s * d).sum::<f64>() / sum)
        }
        None => (1.0, 0.0),
    };
    for (expert, _, d) in pairs() {
        d_scores[expert] = f64::from(router.scale) / sum * (d - mean);
    }
    d_scores
}

/// `dz = p ⊙ (dp − Σ p·dp)`.
fn softmax_backward(p: &[f32], d: &[f64]) -> Vec<f64> {
    let mean: f64 = p.iter().zip(d).map(|(&p, d)| f64::from(p) * d).sum();
    p.iter().zip(d).map(|(&p, d)| f64::from(p) * (d - mean)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moe(experts: usize, top_k: usize, score: Score) -> Moe {
        let router = Router { score, correction: false, groups: None, renormalize: None, scale: 1.0 };
        Moe { experts, top_k, inner: 1, router, shared: None }
    }

    fn run(moe: &Moe, correction: Option<&[f32]>, logits: &[f32]) -> Routing {
        route(moe, correction, logits.to_vec(), At { layer: 0, first: 0 }).unwrap()
    }

    fn close(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6)
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let logits = [0.3, 1.4, -0.7, 1.1, 0.9, 1.3];
        let d_weights = [0.7, -1.3];
        let mut cases = vec![moe(6, 2, Score::Softmax), moe(6, 2, Score::Sigmoid), moe(6, 2, Score::SparseMixer { jitter: 0.2 })];
        for case in 0..2 {
            let mut normed = cases[case].clone();
            (normed.router.renormalize, normed.router.scale) = (Some(0.1), 2.5);
            cases.push(normed);
        }
        for moe in cases {
            let value = |expert: usize, by: f32| {
                let mut logits = logits;
                logits[expert] += by;
                let weights = run(&moe, None, &logits).weights;
                weights.iter().zip(d_weights).map(|(w, d)| f64::from(*w) * f64::from(d)).sum::<f64>()
            };
            let found = backward(&moe, &run(&moe, None, &logits), &d_weights);
            for (expert, d) in found.iter().enumerate() {
                let slope = (8.0 * (value(expert, 0.01) - value(expert, -0.01)) - value(expert, 0.02) + value(expert, -0.02)) / 0.12;
                assert!((slope - f64::from(*d)).abs() < 1e-4, "{:?}, expert {expert}: {d} for {slope}", moe.router);
            }
        }
    }

    #[test]
    fn softmax_with_and_without_renormalization() {
        // e^0 : e^ln 2 : e^ln 5 = 1 : 2 : 5
        let logits = [0.0, 2.0_f32.ln(), 5.0_f32.ln()];
        let mut moe = moe(3, 2, Score::Softmax);
        let plain = run(&moe, None, &logits);
        assert_eq!(plain.chosen, [2, 1]);
        assert!(close(&plain.scores, &[0.125, 0.25, 0.625]) && close(&plain.weights, &[0.625, 0.25]));
        moe.router.renormalize = Some(0.0);
        moe.router.scale = 3.5;
        // 5/7 and 2/7, times 3.5
        assert!(close(&run(&moe, None, &logits).weights, &[2.5, 1.0]));
    }

    #[test]
    fn equal_scores_choose_the_lower_index() {
        let moe = moe(5, 3, Score::Softmax);
        assert_eq!(run(&moe, None, &[1.0, 2.0, 1.0, 2.0, 1.0]).chosen, [1, 3, 0]);
        assert_eq!(run(&moe, None, &[0.0; 5]).chosen, [0, 1, 2]);
    }

    #[test]
    fn all_experts_chosen() {
        let moe = moe(3, 3, Score::Softmax);
        let routing = run(&moe, None, &[0.0, 1.0, 2.0]);
        assert_eq!(routing.chosen, [2, 1, 0]);
        assert!((routing.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_correction_chooses_and_does_not_weigh() {
        // Sigmoids 0.5, 0.75, 0.9 (logits 0, ln 3, ln 9); the bias lifts expert 0 over the others.
        let mut moe = moe(3, 2, Score::Sigmoid);
        moe.router.renormalize = Some(1e-20);
        let logits = [0.0, 3.0_f32.ln(), 9.0_f32.ln()];
        let routing = run(&moe, Some(&[1.0, 0.0, 0.0]), &logits);
        assert_eq!(routing.chosen, [0, 2]);
        assert!(close(&routing.weights, &[0.5 / 1.4, 0.9 / 1.4]));
    }

    #[test]
    fn groups_by_their_two_best_and_by_their_best() {
        // Sigmoid is monotonic, so logits may be read as scores. Group 0 holds the best expert, group 1 the best pair.
        let logits = [3.0, -9.0, 2.0, 2.0];
        let mut moe = moe(4, 2, Score::Sigmoid);
        let groups = Groups { count: 2, keep: 1, by: GroupScore::TopTwo, masked: f32::NEG_INFINITY };
        moe.router.groups = Some(groups);
        assert_eq!(run(&moe, None, &logits).chosen, [2, 3]);
        moe.router.groups = Some(Groups { by: GroupScore::Max, ..groups });
        assert_eq!(run(&moe, None, &logits).chosen, [0, 1]);
    }

    #[test]
    fn a_group_masked_to_zero_can_win_over_negative_scores() {
        // Biased scores −1.5, −1.5 in the kept group; the masked group reads 0 in one convention and −∞ in the other.
        let mut moe = moe(4, 1, Score::Sigmoid);
        let groups = Groups { count: 2, keep: 1, by: GroupScore::TopTwo, masked: f32::NEG_INFINITY };
        let correction = [-2.0, -2.0, -3.0, -3.0];
        moe.router.groups = Some(groups);
        assert_eq!(run(&moe, Some(&correction), &[0.0; 4]).chosen, [0]);
        moe.router.groups = Some(Groups { masked: 0.0, ..groups });
        assert_eq!(run(&moe, Some(&correction), &[0.0; 4]).chosen, [2]);
    }

    #[test]
    fn sparse_mixer_by_hand() {
        // 2ε = 0.2. First: expert 1 (10). (10 − 9) / max(9, 10) = 0.1 stays, (10 − 7) / 10 = 0.3 and the rest go:
        // 1 / (1 + e⁻¹). Second: expert 0 (9). (9 − 7) / 9 = 0.22 goes: weight 1.
        let moe = moe(4, 2, Score::SparseMixer { jitter: 0.1 });
        let routing = run(&moe, None, &[9.0, 10.0, 7.0, -1.0]);
        assert_eq!(routing.chosen, [1, 0]);
        assert!(close(&routing.weights, &[1.0 / (1.0 + (-1.0_f32).exp()), 1.0]));
    }

    #[test]
    fn sparse_mixer_below_zero_divides_by_the_other_logit() {
        // First −1: (−1 + 1.2) / max(1.2, −1) = 0.167 stays, (−1 + 4) / 4 goes. Second −1.2: −4 goes.
        let moe = moe(3, 2, Score::SparseMixer { jitter: 0.1 });
        let routing = run(&moe, None, &[-1.2, -1.0, -4.0]);
        assert_eq!(routing.chosen, [1, 0]);
        assert!(close(&routing.weights, &[1.0 / (1.0 + (-0.2_f32).exp()), 1.0]));
    }

    #[test]
    fn a_logit_that_is_not_a_number_is_named() {
        let moe = moe(2, 1, Score::Softmax);
        let error = route(&moe, None, vec![0.0, 1.0, 2.0, f32::NAN], At { layer: 7, first: 40 }).unwrap_err();
        assert!(matches!(error, Error::RouterNotFinite { layer: 7, row: 41, expert: 1 }), "{error}");
    }
}

//! REAM (arXiv 2604.04356; specs: methods 6.9): the most salient experts stay and the others join them.
//!
//! The `K` experts of the highest REAP saliency lead. From the most salient on, each takes the `members − 1` experts that are most like
//! it and not yet taken; so most leads stay alone, exactly as they were, and a few absorb the rest. Likeness is the mean of
//! `(cos(a_i, a_j) + 1) / 2` over mean gated outputs `a_e = mean_t p_e(x_t) F_e(x_t)` with the full softmax `p`, and of
//! `1 − D_ij / max D` over the unit-normalized vectors of router logits over tokens. A group is averaged by saliency and keeps its
//! lead's router row. Saliency here is the mean over all tokens that chose the expert (the published code averages chunks).

use ndarray::{Array1, Array2, Axis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Group, Seen, shares};
use crate::mtp::Mtp;

/// Knobs of the merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Ream")]
pub struct Params {
    /// Share of the experts of a layer that is left; rounded to the nearest number. This or `experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,
    /// Experts of a layer that are left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Most experts of a group, its lead among them.
    pub members: usize,
    /// Bring neurons into one order before they are averaged.
    pub align: bool,
    /// Tokens, spread evenly over the samples, that every expert is run on.
    pub tokens: usize,
    /// What becomes of multi-token-prediction layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
}

impl Default for Params {
    fn default() -> Self {
        Self { keep: None, experts: None, members: 16, align: true, tokens: 1024, mtp: None }
    }
}

/// What an expert that no token chose counts at most, so that it can be merged.
const UNSEEN: f64 = 0.5;

/// The groups, in the order of their leads' old numbers.
///
/// # Errors
///
/// In words, where `count` groups of `members` cannot hold all experts.
pub fn groups(params: &Params, seen: &Seen, count: usize) -> Result<Vec<Group>, String> {
    let experts = seen.saliency.len();
    if count * params.members.max(1) < experts {
        let least = experts.div_ceil(params.members.max(1));
        return Err(format!(
            "{count} groups of at most {} experts do not hold {experts}; keep {least}, or allow more members",
            params.members
        ));
    }
    let least = seen.saliency.iter().copied().filter(|s| *s > 0.0).fold(UNSEEN, f64::min);
    let saliency: Vec<f64> = seen.saliency.iter().map(|&s| if s > 0.0 { s } else { least }).collect();
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by(|&a, &b| seen.saliency[b].total_cmp(&seen.saliency[a]).then_with(|| seen.hashes[a].cmp(&seen.hashes[b])));
    let alike = likeness(seen);
    let mut free: Vec<usize> = order[count..].to_vec();
    let mut groups = Vec::with_capacity(count);
    for &lead in &order[..count] {
        free.sort_by(|&a, &b| alike[(lead, b)].total_cmp(&alike[(lead, a)]).then_with(|| seen.hashes[a].cmp(&seen.hashes[b])));
        let taken = free.drain(..free.len().min(params.members.max(1) - 1));
        let members: Vec<usize> = std::iter::once(lead).chain(taken).collect();
        let weights = shares(&members, &saliency);
        groups.push(Group { members, weights });
    }
    groups.sort_by_key(|group| group.members[0]);
    Ok(groups)
}

/// How alike any two experts are, `[experts, experts]`, from 0 to 1.
fn likeness(seen: &Seen) -> Array2<f64> {
    let (experts, tokens, hidden) = seen.outputs.dim();
    let mut gated = Array2::<f64>::zeros((experts, hidden));
    let mut directions = seen.logits.mapv(f64::from);
    for (t, logits) in seen.logits.rows().into_iter().enumerate() {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let p: Array1<f64> = logits.mapv(|z| f64::from(z - top).exp());
        let sum = p.sum();
        for e in 0..experts {
            let row = seen.outputs.slice(ndarray::s![e, t, ..]);
            gated.row_mut(e).zip_mut_with(&row, |a, &x| *a += p[e] / sum * f64::from(x) / tokens as f64);
        }
    }
    let length = |v: ndarray::ArrayView1<'_, f64>| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    for mut column in directions.axis_iter_mut(Axis(1)) {
        let norm = length(column.view());
        column.mapv_inplace(|x| if norm > 0.0 { x / norm } else { 0.0 });
    }
    let apart = Array2::from_shape_fn((experts, experts), |(i, j)| {
        directions.column(i).iter().zip(directions.column(j)).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    });
    let farthest = apart.iter().copied().fold(0.0, f64::max);
    Array2::from_shape_fn((experts, experts), |(i, j)| {
        let (a, b) = (gated.row(i), gated.row(j));
        let lengths = length(a) * length(b);
        let cosine = if lengths > 0.0 { a.dot(&b) / lengths } else { 0.0 };
        let near = if farthest > 0.0 { 1.0 - apart[(i, j)] / farthest } else { 1.0 };
        f64::midpoint(f64::midpoint(cosine, 1.0), near)
    })
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, array};

    use super::*;

    fn seen(saliency: [f64; 4]) -> Seen {
        // Outputs of one token in the plane: 0 and 3 along one axis, 1 and 2 along the other; equal logits.
        let at = [[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0_f32]];
        Seen {
            outputs: Array3::from_shape_fn((4, 1, 2), |(e, _, d)| at[e][d]),
            logits: array![[1.0, 1.0, 1.0, 1.0]],
            counts: vec![1.0; 4],
            saliency: saliency.into(),
            hashes: ["a", "b", "c", "d"].map(str::to_owned).into(),
        }
    }

    fn members(params: &Params, saliency: [f64; 4], count: usize) -> Vec<Vec<usize>> {
        groups(params, &seen(saliency), count).unwrap().into_iter().map(|g| g.members).collect()
    }

    #[test]
    fn the_salient_lead_and_the_first_takes_all_it_may() {
        let params = Params::default();
        // 0 leads before 1; it takes both others, the one like it first, and 1 stays alone.
        assert_eq!(members(&params, [9.0, 8.0, 1.0, 2.0], 2), [vec![0, 3, 2], vec![1]]);
        // With at most two each takes its own.
        assert_eq!(members(&Params { members: 2, ..params.clone() }, [9.0, 8.0, 1.0, 2.0], 2), [vec![0, 3], vec![1, 2]]);
        let said = groups(&Params { members: 1, ..params }, &seen([1.0; 4]), 2).unwrap_err();
        assert!(said.contains("do not hold 4; keep 4"), "{said}");
    }

    #[test]
    fn likeness_by_hand() {
        // Equal logits: no distance, so the second half is 1. Cosine 1 and 0 give 1 and 3/4.
        let alike = likeness(&seen([1.0; 4]));
        assert!((alike[(0, 3)] - 1.0).abs() < 1e-12 && (alike[(0, 1)] - 0.75).abs() < 1e-12);
    }

    #[test]
    fn an_unseen_expert_weighs_little_but_something() {
        let group = groups(&Params::default(), &seen([0.3, 0.0, 0.1, 0.2]), 1).unwrap().remove(0);
        // The smallest saliency, 0.1, stands for the unseen one's.
        assert_eq!(group.members[0], 0);
        let of = |expert: usize| group.weights[group.members.iter().position(|m| *m == expert).unwrap()];
        assert!((of(1) - 0.1 / 0.7).abs() < 1e-12 && (of(0) - 0.3 / 0.7).abs() < 1e-12);
    }
}

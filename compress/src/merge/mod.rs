//! Which routed experts can become one, and what that one is.
//!
//! First the experts of a layer fall into groups ([`cluster`], or REAM's own way, [`ream`]); then each group becomes one expert: a
//! weighted mean ([`weighted_mean`]) or a mean in a shared subspace ([`subspace`]), after its neurons were brought into one order
//! ([`align`]). The router keeps one row a group. Pure functions over matrices; everything is the same whatever the numbering of the
//! experts.

pub mod align;
pub mod cluster;
pub mod ream;
pub mod subspace;
pub mod weighted_mean;

use ndarray::{Array2, Array3};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mtp::Mtp;

pub use cluster::Clustering;

/// Who makes one expert of several. Every merger takes `keep` (a share) or `experts` (a number a layer).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Merger {
    /// The most salient experts stay, the others join them (REAM).
    Ream(ream::Params),
    /// Clusters of alike experts, a mean by how often each is chosen (HC-SMoE).
    WeightedMean(weighted_mean::Params),
    /// The same in the subspace that a cluster's matrices share (Sub-MoE).
    Subspace(subspace::Params),
}

/// What row of the router a merged expert gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouterRow {
    /// The weighted mean of its members' rows, with the weights of the merge.
    #[default]
    Mean,
    /// That of its heaviest member.
    Heaviest,
}

/// The three matrices of one expert, `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrices {
    /// `[inner, hidden]`.
    pub gate: Array2<f64>,
    /// `[inner, hidden]`.
    pub up: Array2<f64>,
    /// `[hidden, inner]`.
    pub down: Array2<f64>,
}

/// What is known of a layer's experts on a sample of tokens, which every expert was run on.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Outputs `F_e(x_t)`, `[experts, tokens, hidden]`.
    pub outputs: Array3<f32>,
    /// Router logits, `[tokens, experts]`.
    pub logits: Array2<f32>,
    /// How often each expert is chosen, in calibration, `[experts]`.
    pub counts: Vec<f64>,
    /// REAP's saliency, in calibration, `[experts]`.
    pub saliency: Vec<f64>,
    /// A hash of each expert's weights, which decides where nothing else does.
    pub hashes: Vec<String>,
}

/// Several experts that become one, with the weight of each; the first is the one the others are brought in line with.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The experts.
    pub members: Vec<usize>,
    /// Their weights, which add up to 1.
    pub weights: Vec<f64>,
}

/// What a merger is asked for beside its own knobs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Asked {
    /// Share that stays.
    pub keep: Option<f64>,
    /// Number that stays.
    pub experts: Option<usize>,
    /// The router's rows.
    pub router: RouterRow,
    /// Whether neurons are brought into one order.
    pub align: bool,
    /// Tokens that every expert is run on.
    pub tokens: usize,
    /// What becomes of MTP layers.
    pub mtp: Option<Mtp>,
}

impl Merger {
    /// Its name in a recipe.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ream(_) => "ream",
            Self::WeightedMean(_) => "weighted_mean",
            Self::Subspace(_) => "subspace",
        }
    }

    /// What is asked for.
    pub fn asked(&self) -> Asked {
        match self {
            Self::Ream(p) => {
                Asked { keep: p.keep, experts: p.experts, router: RouterRow::Heaviest, align: p.align, tokens: p.tokens, mtp: p.mtp }
            }
            Self::WeightedMean(p) => {
                Asked { keep: p.keep, experts: p.experts, router: p.router, align: p.align, tokens: p.tokens, mtp: p.mtp }
            }
            Self::Subspace(p) => Asked { keep: p.keep, experts: p.experts, router: p.router, align: p.align, tokens: p.tokens, mtp: p.mtp },
        }
    }

    /// The groups of `count` that a layer's experts fall into, ordered by their first member's old number; a group of one stays as it is.
    ///
    /// # Errors
    ///
    /// In words: outputs that are all zero and so alike to nothing, or a count that REAM's groups cannot reach.
    pub fn groups(&self, seen: &Seen, count: usize) -> Result<Vec<Group>, String> {
        match self {
            Self::Ream(params) => ream::groups(params, seen, count),
            Self::WeightedMean(params) => clustered(params.cluster, seen, count),
            Self::Subspace(params) => clustered(params.cluster, seen, count),
        }
    }

    /// One expert of a group's, already aligned.
    ///
    /// # Errors
    ///
    /// A decomposition that does not converge.
    pub fn merged(&self, members: &[Matrices], weights: &[f64]) -> calib::Result<Matrices> {
        match self {
            Self::Ream(_) | Self::WeightedMean(_) => Ok(weighted_mean::merge(members, weights)),
            Self::Subspace(params) => subspace::merge(members, weights, params.rank),
        }
    }
}

impl Asked {
    /// How many experts of `before` stay.
    pub fn count(&self, before: usize) -> usize {
        match (self.experts, self.keep) {
            (Some(experts), _) => experts,
            (None, Some(keep)) => (keep * before as f64).round() as usize,
            (None, None) => before,
        }
    }
}

/// Clusters by the outputs' mean cosine, each expert weighed by how often it is chosen.
fn clustered(how: Clustering, seen: &Seen, count: usize) -> Result<Vec<Group>, String> {
    if let Some(silent) = seen.outputs.outer_iter().position(|rows| rows.iter().all(|x| *x == 0.0)) {
        return Err(format!("expert {silent} puts out nothing but zeros, which are alike to no other expert; prune it instead"));
    }
    let cosines = calib::stats::Similarity::of(seen.outputs.clone()).mean();
    let distances = cosines.mapv(|cosine| 1.0 - cosine);
    let labels = match how {
        Clustering::AverageLinkage => cluster::average_linkage(&distances, count, &seen.hashes),
        Clustering::KMeans => cluster::k_means(&distances, count, &seen.hashes),
    };
    Ok(by_weight(&labels, count, &seen.counts, &seen.hashes))
}

/// Groups from labels: the heaviest member first, the groups by the old number of their first member.
fn by_weight(labels: &[usize], count: usize, counts: &[f64], hashes: &[String]) -> Vec<Group> {
    let mut groups: Vec<Group> = (0..count)
        .map(|label| {
            let mut members: Vec<usize> = (0..labels.len()).filter(|&e| labels[e] == label).collect();
            members.sort_by(|&a, &b| counts[b].total_cmp(&counts[a]).then_with(|| hashes[a].cmp(&hashes[b])));
            let weights = shares(&members, counts);
            Group { members, weights }
        })
        .collect();
    groups.sort_by_key(|group| group.members.first().copied());
    groups
}

/// The members' shares of their sum; equal ones where nobody has any.
fn shares(members: &[usize], weights: &[f64]) -> Vec<f64> {
    let sum: f64 = members.iter().map(|&e| weights[e]).sum();
    let even = 1.0 / members.len().max(1) as f64;
    members.iter().map(|&e| if sum > 0.0 { weights[e] / sum } else { even }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four experts in two pairs of alike outputs over three tokens of width 2.
    fn seen() -> Seen {
        let lean = [0.0_f32, 1.5, 0.1, 1.6];
        let outputs = Array3::from_shape_fn((4, 3, 2), |(e, t, d)| {
            let angle = lean[e] + t as f32;
            if d == 0 { angle.cos() } else { angle.sin() }
        });
        Seen {
            outputs,
            logits: Array2::from_shape_fn((3, 4), |(t, e)| (t * 4 + e) as f32),
            counts: vec![1.0, 4.0, 3.0, 0.0],
            saliency: vec![1.0, 4.0, 3.0, 2.0],
            hashes: ["c", "a", "d", "b"].map(str::to_owned).into(),
        }
    }

    fn turned(seen: &Seen, to: &[usize]) -> Seen {
        let pick = |v: &[f64]| to.iter().map(|&e| v[e]).collect();
        Seen {
            outputs: seen.outputs.select(ndarray::Axis(0), to),
            logits: seen.logits.select(ndarray::Axis(1), to),
            counts: pick(&seen.counts),
            saliency: pick(&seen.saliency),
            hashes: to.iter().map(|&e| seen.hashes[e].clone()).collect(),
        }
    }

    fn mergers() -> Vec<Merger> {
        let parse = |text: &str| {
            #[derive(Deserialize)]
            struct Doc {
                merge: Merger,
            }
            toml::from_str::<Doc>(text).unwrap().merge
        };
        ["[merge.ream]", "[merge.weighted_mean]", "[merge.weighted_mean]\ncluster = \"k_means\"", "[merge.subspace]"].map(parse).into()
    }

    #[test]
    fn alike_experts_share_a_group_by_hand() {
        let groups = mergers()[1].groups(&seen(), 2).unwrap();
        // 0 and 2 lean alike, 1 and 3 too. Of counts 1 and 3 the second leads with 3/4; 3 was never chosen.
        let group = |members: [usize; 2], weights: [f64; 2]| Group { members: members.into(), weights: weights.into() };
        assert_eq!(groups, [group([1, 3], [1.0, 0.0]), group([2, 0], [0.75, 0.25])]);
    }

    #[test]
    fn renumbering_renumbers_the_groups() {
        let order = [2, 3, 0, 1];
        for merger in mergers() {
            let name = |groups: Vec<Group>, to: &dyn Fn(usize) -> usize| {
                let mut named: Vec<Vec<usize>> = groups.into_iter().map(|g| g.members.into_iter().map(to).collect()).collect();
                named.sort();
                named
            };
            let plain = name(merger.groups(&seen(), 2).unwrap(), &|e| e);
            assert_eq!(plain, name(merger.groups(&turned(&seen(), &order), 2).unwrap(), &|e| order[e]), "{}", merger.name());
        }
    }

    #[test]
    fn as_many_groups_as_experts_leave_each_alone_and_none_is_empty() {
        for merger in mergers() {
            for count in 2..=4 {
                let groups = merger.groups(&seen(), count).unwrap();
                assert_eq!((groups.len(), groups.iter().map(|g| g.members.len()).sum::<usize>()), (count, 4), "{}", merger.name());
                assert!(groups.iter().all(|g| !g.members.is_empty() && (g.weights.iter().sum::<f64>() - 1.0).abs() < 1e-12));
            }
        }
    }

    #[test]
    fn an_expert_that_says_nothing_is_named() {
        let mut silent = seen();
        silent.outputs.index_axis_mut(ndarray::Axis(0), 2).fill(0.0);
        assert!(mergers()[1].groups(&silent, 2).unwrap_err().contains("expert 2"));
    }
}

//! Which routed experts a layer can do without.
//!
//! A pruner gives every expert of a layer a score from what calibration measured; [`select`] keeps the best, the same number in every
//! layer. Scores of sums over tokens are divided by their sum a domain and then averaged over the domains, so that each counts the same
//! (EASY-EP's rule for mixed domains; specs: methods 4.1). One file a method, pure functions over [`ExpertStats`].

pub mod ean;
pub mod easy_ep;
pub mod exhaustive;
pub mod frequency;
mod protect;
pub mod random;
pub mod reap;
pub mod routing_mass;
mod select;
mod show;

use calib::arch::Moe;
use calib::stats::ExpertStats;
use ndarray::Array2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mtp::Mtp;

pub use protect::super_experts;
pub use select::{Cut, select};
pub use show::{overlap, stability};

/// Who chooses the experts that stay. Every pruner takes `keep` (a share) or `experts` (a number a layer).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Pruner {
    /// What the expert adds, times how far the block turns the residual stream on that token (EASY-EP).
    EasyEp(Params),
    /// The mean of routing weight times output norm over the tokens that chose the expert (REAP).
    Reap(Params),
    /// How often the expert is chosen.
    Frequency(Params),
    /// Its share of the full softmax over the tokens that chose it.
    RoutingMass(Params),
    /// The sum of its outputs' norms (expert activation norm).
    Ean(Params),
    /// By lot: the control.
    Random(random::Params),
    /// The set of experts whose block differs least from the whole one, over all sets of up to 16 experts; greedily beyond (NAEE).
    Exhaustive(exhaustive::Params),
}

/// Knobs of a pruner that scores experts by what calibration measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Prune")]
pub struct Params {
    /// Share of the experts of a layer that stays; rounded to the nearest number. This or `experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,
    /// Experts of a layer that stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// Texts of the corpus, by file stem, that count; all of them without it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<String>,
    /// Keep experts whose outputs are extraordinarily large, whatever their score (REAP's super-experts).
    pub protect_super_experts: bool,
    /// What becomes of multi-token-prediction layers, which stand under the same count of experts and have no scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
}

/// What a pruner is asked for beside its own knobs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Asked<'a> {
    /// Share that stays.
    pub keep: Option<f64>,
    /// Number that stays.
    pub experts: Option<usize>,
    /// Domains that count; none: all.
    pub domains: &'a [String],
    /// Whether super-experts stay.
    pub protect: bool,
    /// What becomes of MTP layers.
    pub mtp: Option<Mtp>,
}

impl Pruner {
    /// Its name in a recipe.
    pub fn name(&self) -> &'static str {
        match self {
            Self::EasyEp(_) => "easy_ep",
            Self::Reap(_) => "reap",
            Self::Frequency(_) => "frequency",
            Self::RoutingMass(_) => "routing_mass",
            Self::Ean(_) => "ean",
            Self::Random(_) => "random",
            Self::Exhaustive(_) => "exhaustive",
        }
    }

    /// What is asked for.
    pub fn asked(&self) -> Asked<'_> {
        match self {
            Self::EasyEp(p) | Self::Reap(p) | Self::Frequency(p) | Self::RoutingMass(p) | Self::Ean(p) => {
                Asked { keep: p.keep, experts: p.experts, domains: &p.domains, protect: p.protect_super_experts, mtp: p.mtp }
            }
            Self::Random(p) => Asked { keep: p.keep, experts: p.experts, domains: &[], protect: false, mtp: p.mtp },
            Self::Exhaustive(p) => Asked { keep: p.keep, experts: p.experts, domains: &p.domains, protect: false, mtp: p.mtp },
        }
    }

    /// Every expert's score from the statistics of the domains that count, `[experts]`; `None` for a pruner that does not score by
    /// statistics.
    pub fn scores(&self, stats: &ExpertStats, domains: &[usize]) -> Option<Vec<f64>> {
        Some(match self {
            Self::EasyEp(_) => easy_ep::scores(&stats.outputs, domains),
            Self::Reap(_) => reap::scores(&stats.outputs, domains),
            Self::Frequency(_) => frequency::scores(&stats.router, domains),
            Self::RoutingMass(_) => routing_mass::scores(&stats.router, domains),
            Self::Ean(_) => ean::scores(&stats.outputs, domains),
            Self::Random(_) | Self::Exhaustive(_) => return None,
        })
    }
}

impl Asked<'_> {
    /// How many experts of `before` stay.
    pub fn count(&self, before: usize) -> usize {
        match (self.experts, self.keep) {
            (Some(experts), _) => experts,
            (None, Some(keep)) => (keep * before as f64).round() as usize,
            (None, None) => before,
        }
    }
}

/// Why `count` experts cannot take the place of a block's, in words; `None` if they can.
pub fn objection(moe: &Moe, count: usize) -> Option<String> {
    let (experts, top_k) = (moe.experts, moe.top_k);
    if count > experts {
        return Some(format!("{count} experts cannot stay of {experts}; ask for at most {experts}"));
    }
    if count < top_k.max(1) {
        return Some(format!("{count} of {experts} experts would stay, but every token takes {top_k}; keep at least {top_k}"));
    }
    let groups = moe.router.groups?;
    // A group is judged by its two best, or its best: fewer than two each and DeepSeek-V3's score has nothing to add up.
    let least = 2.max(top_k.div_ceil(groups.keep.max(1)));
    let (each, nearest) = (count / groups.count, (count.div_ceil(groups.count)).max(least) * groups.count);
    if !count.is_multiple_of(groups.count) {
        let groups = groups.count;
        return Some(format!("{count} experts do not divide into the router's {groups} groups (n_group); keep {nearest} of {experts}"));
    }
    let (keep, best) = (groups.keep, nearest.min(experts));
    (each < least).then(|| {
        format!(
            "{each} experts a group would stay, but a token takes {top_k} from {keep} groups of at least {least}; keep {best} of {experts}"
        )
    })
}

/// A logit, or a selection bias, that is never chosen while enough others are there, and still a number.
pub const UNLIKELY: f32 = -1e30;

/// Sums of the domains that count, each divided by its own total and then averaged, `[experts]`. A domain without any sum is left out.
fn averaged(sums: &Array2<f64>, domains: &[usize]) -> Vec<f64> {
    let mut scores = vec![0.0; sums.ncols()];
    let totals: Vec<(usize, f64)> = domains.iter().map(|&d| (d, sums.row(d).sum())).filter(|(_, total)| *total > 0.0).collect();
    for &(d, total) in &totals {
        scores.iter_mut().zip(sums.row(d)).for_each(|(score, sum)| *score += sum / total / totals.len() as f64);
    }
    scores
}

#[cfg(test)]
mod tests {
    use calib::arch::{GroupScore, Groups, Router, Score};
    use ndarray::array;

    use super::*;

    fn moe(groups: Option<(usize, usize)>) -> Moe {
        let groups = groups.map(|(count, keep)| Groups { count, keep, by: GroupScore::TopTwo, masked: f32::NEG_INFINITY });
        let router = Router { score: Score::Sigmoid, correction: true, groups, renormalize: Some(0.0), scale: 1.0 };
        Moe { experts: 16, top_k: 4, inner: 8, router, shared: None }
    }

    #[test]
    fn domains_count_the_same_whatever_their_size() {
        // 3/4 and 1/4, 100/400 and 300/400: the mean is 1/2 each. A domain that saw nothing takes no part.
        let sums = array![[3.0, 1.0], [100.0, 300.0], [0.0, 0.0]];
        assert_eq!(averaged(&sums, &[0, 1]), [0.5, 0.5]);
        assert_eq!(averaged(&sums, &[0, 2]), [0.75, 0.25]);
        assert_eq!(averaged(&sums, &[2]), [0.0, 0.0]);
    }

    #[test]
    fn counts_that_a_block_cannot_take_are_explained() {
        let said = |groups, count| objection(&moe(groups), count).unwrap_or_default();
        assert_eq!([said(None, 16), said(None, 4), said(Some((4, 2)), 8)], ["", "", ""]);
        assert!(said(None, 17).contains("at most 16"));
        assert!(said(None, 3).contains("every token takes 4; keep at least 4"));
        assert!(said(Some((4, 2)), 10).contains("4 groups (n_group); keep 12 of 16"));
        assert!(said(Some((4, 2)), 4).contains("keep 8 of 16"));
        // One group of four serves four experts a token only with all of them.
        assert!(said(Some((4, 1)), 12).contains("keep 16 of 16"));
    }

    #[test]
    fn a_share_is_rounded() {
        let count = |text: &str| toml::from_str::<Params>(text).map(|p| Pruner::Reap(p).asked().count(10)).unwrap();
        assert_eq!([count("keep = 0.75"), count("keep = 0.5"), count("experts = 3"), count("")], [8, 5, 3, 10]);
    }
}

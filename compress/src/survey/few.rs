//! Experts that too few tokens reached: what a change of their matrices is taken to cost.
//!
//! Their own tokens say too little of it, and an expert that none of them reached would cost nothing at any width. So their losses
//! are measured with the blended moment that the recipe's rule is about ([`crate::blend`]): at the trace of the expert's own, and
//! where it saw none as if it had seen one token of the layer's average weight. With the rule `rtn` they are those of rounding.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use calib::arch::Site;
use calib::stats::Undercalibrated;

use super::held;
use crate::blend::LayerRows;

/// What is kept of one layer for them.
#[derive(Default)]
pub(super) struct Few {
    /// What enters the layer's experts, where one of them saw too few tokens.
    layer: Mutex<Option<Arc<LayerRows>>>,
    /// Rows and the sum of their token weights, by site; those of no row wait for the layer's end.
    weights: Mutex<BTreeMap<Site, (u64, f64)>>,
}

impl Few {
    pub fn enter(&self, rows: LayerRows) {
        *held(&self.layer) = Some(Arc::new(rows));
    }

    pub fn layer(&self) -> Option<Arc<LayerRows>> {
        held(&self.layer).clone()
    }

    /// Token weights of further rows of a site; of experts' alone.
    pub fn weigh(&self, site: Site, v: &[f32]) {
        if !of_expert(site) {
            return;
        }
        let (rows, sum) = (v.len() as u64, v.iter().map(|&v| f64::from(v)).sum::<f64>());
        let mut weights = held(&self.weights);
        let at = weights.entry(site).or_default();
        (at.0, at.1) = (at.0 + rows, at.1 + sum);
    }

    /// A site that no row entered.
    pub fn unseen(&self, site: Site) {
        held(&self.weights).entry(site).or_default();
    }

    /// The layer is over: sites that no row entered, each with the mean token weight of all rows at sites of its kind; and what
    /// entered the layer's experts.
    pub fn finish(&self) -> (Vec<(Site, f64)>, Option<Arc<LayerRows>>) {
        let weights = std::mem::take(&mut *held(&self.weights));
        let down = |site: &Site| matches!(site, Site::ExpertDown(_));
        let mean = |like: bool| {
            let of_kind = weights.iter().filter(|(site, _)| down(site) == like).map(|(_, of)| of);
            let (rows, sum) = of_kind.fold((0, 0.0), |all, of| (all.0 + of.0, all.1 + of.1));
            if rows > 0 { sum / rows as f64 } else { 1.0 }
        };
        let means = [mean(false), mean(true)];
        let unseen = weights.iter().filter(|(_, (rows, _))| *rows == 0).map(|(site, _)| (*site, means[usize::from(down(site))])).collect();
        (unseen, held(&self.layer).take())
    }
}

/// Whether `rows` are too few for the site of an expert with `inputs` inputs; other sites always have what the samples have.
pub(super) fn too_few(rule: Undercalibrated, site: Site, rows: u64, inputs: usize) -> bool {
    of_expert(site) && rows < rule.wanted(inputs)
}

fn of_expert(site: Site) -> bool {
    matches!(site, Site::ExpertIn(_) | Site::ExpertDown(_))
}

#[test]
fn an_unseen_site_takes_the_mean_weight_of_its_kind() {
    let few = Few::default();
    few.weigh(Site::ExpertIn(0), &[1.0, 0.5]);
    few.weigh(Site::ExpertIn(2), &[0.0]);
    few.weigh(Site::AttentionIn, &[9.0]);
    few.weigh(Site::ExpertDown(0), &[4.0]);
    few.unseen(Site::ExpertIn(1));
    few.unseen(Site::ExpertDown(1));
    let (unseen, layer) = few.finish();
    assert_eq!(unseen, [(Site::ExpertIn(1), 0.5), (Site::ExpertDown(1), 4.0)]);
    assert!(layer.is_none() && few.finish().0.is_empty());
}

#[test]
fn only_experts_can_be_reached_by_too_few() {
    let rule = Undercalibrated::default();
    assert!(too_few(rule, Site::ExpertIn(1), 3, 8) && !too_few(rule, Site::ExpertIn(1), 4, 8));
    assert!(!too_few(rule, Site::AttentionIn, 3, 8));
}

//! What is measured of a model: sums over tokens, one set a decoder layer.
//!
//! Every statistic is a sum (or a maximum) over tokens and has `merge`, so that partial passes add up: over batches,
//! restarts and machines. A mean is computed when it is read, never stored. Scalars are summed in f64, in the order of the
//! samples. What is kept per domain has one row for each text of the corpus.
//!
//! [`RouterSums`]: what the router chose and with what weight. [`OutputSums`]: what the experts' outputs were.
//! [`BlockSums`]: what the block changes. [`ChannelSums`]: the size of each input channel of each Linear matrix.
//! [`GateSums`]: what an error before the activation weighs behind it. [`Similarity`]: how alike experts are. [`Moment`]: `Σ x xᵀ`
//! of one site, which is made, used and dropped within a layer, because all of a model's are too large to be files.
//! [`end_loss`]: what a change of weights costs at the end of the model, from a backward pass. [`store`]: the rest as files.

mod block;
mod channels;
mod coverage;
pub mod end_loss;
mod fields;
mod gates;
mod merge;
mod moment;
mod outputs;
mod router;
mod similarity;
pub mod store;
mod undercalibrated;

use std::collections::BTreeMap;

use crate::arch::{Attention, Mlp, Site, Spec};
use crate::{Error, Result};

pub use block::{BlockSums, cosine};
pub use channels::ChannelSums;
pub use coverage::Coverage;
pub use gates::GateSums;
pub use moment::{First, Moment};
pub use outputs::{OutputChunk, OutputSums};
pub use router::{RouterSums, imbalance};
pub use similarity::Similarity;
pub use store::{Manifest, Part, Store};
pub use undercalibrated::{Threshold, Undercalibrated};

/// The statistics of one decoder layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerStats {
    /// What a layer of experts has beside.
    pub experts: Option<ExpertStats>,
    /// Input channels of every site.
    pub channels: BTreeMap<Site, ChannelSums>,
    /// The gates of every MLP, by the site that its product enters.
    pub gates: BTreeMap<Site, GateSums>,
}

/// The statistics of a layer's routed experts.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertStats {
    /// The router's choices.
    pub router: RouterSums,
    /// The experts' outputs.
    pub outputs: OutputSums,
    /// What the block changes.
    pub block: BlockSums,
    /// How alike the experts are, where it was asked for.
    pub similarity: Option<Similarity>,
}

impl LayerStats {
    /// Nothing seen yet of this layer.
    pub fn new(spec: &Spec, layer: usize, domains: usize) -> Self {
        let before = layer.checked_sub(1).and_then(|before| spec.moe(before)).map(|moe| moe.experts);
        let experts = spec.moe(layer).map(|moe| ExpertStats {
            router: RouterSums::new(domains, moe.experts, before),
            outputs: OutputSums::new(domains, moe.experts, spec.hidden),
            block: BlockSums::new(domains),
            similarity: None,
        });
        let sites = sites(spec, layer);
        let down = |site: &Site| matches!(site, Site::DenseDown | Site::SharedDown | Site::ExpertDown(_));
        let gates = sites.iter().filter(|(site, _)| down(site)).map(|&(site, width)| (site, GateSums::new(width))).collect();
        Self { experts, channels: sites.into_iter().map(|(site, width)| (site, ChannelSums::new(width))).collect(), gates }
    }

    /// Adds the same layer's statistics over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`] where the two are not of one model and one list of domains.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if !self.channels.keys().eq(other.channels.keys()) || !self.gates.keys().eq(other.gates.keys()) {
            return Err(Error::StatsDiffer { what: "sites", ours: self.channels.len(), theirs: other.channels.len() });
        }
        match (&mut self.experts, &other.experts) {
            (Some(ours), Some(theirs)) => ours.merge(theirs)?,
            (ours, theirs) => same("routers", ours.iter().len(), theirs.iter().len())?,
        }
        self.gates.values_mut().zip(other.gates.values()).try_for_each(|(ours, theirs)| ours.merge(theirs))?;
        self.channels.values_mut().zip(other.channels.values()).try_for_each(|(ours, theirs)| ours.merge(theirs))
    }

    /// The same statistics with domain `d` as domain `to[d]` of `domains`.
    pub fn with_domains(&self, to: &[usize], domains: usize) -> Self {
        let experts = self.experts.as_ref().map(|experts| ExpertStats {
            router: experts.router.with_domains(to, domains),
            outputs: experts.outputs.with_domains(to, domains),
            block: experts.block.with_domains(to, domains),
            similarity: experts.similarity.clone(),
        });
        Self { experts, ..self.clone() }
    }
}

impl ExpertStats {
    fn merge(&mut self, other: &Self) -> Result<()> {
        self.router.merge(&other.router)?;
        self.outputs.merge(&other.outputs)?;
        self.block.merge(&other.block)?;
        match (&mut self.similarity, &other.similarity) {
            (Some(ours), Some(theirs)) => ours.merge(theirs),
            (ours, theirs) => same("similarity matrices", ours.iter().len(), theirs.iter().len()),
        }
    }
}

/// The sites of a decoder layer and the width of what enters each.
pub fn sites(spec: &Spec, layer: usize) -> Vec<(Site, usize)> {
    let mut sites = vec![(Site::AttentionIn, spec.hidden)];
    match &spec.attention {
        Attention::Grouped(a) => sites.push((Site::AttentionOut, a.heads * a.head_dim)),
        Attention::Latent(a) => {
            sites.extend(a.q_rank.map(|rank| (Site::QueryB, rank)));
            sites.extend([(Site::KvB, a.kv_rank), (Site::AttentionOut, a.heads * a.value_dim)]);
        }
    }
    match &spec.layers[layer].mlp {
        Mlp::Dense { inner } => sites.extend([(Site::DenseIn, spec.hidden), (Site::DenseDown, *inner)]),
        Mlp::Moe(moe) => {
            if let Some(shared) = &moe.shared {
                sites.extend([(Site::SharedIn, spec.hidden), (Site::SharedDown, shared.inner)]);
            }
            sites.extend((0..moe.experts).flat_map(|e| [(Site::ExpertIn(e), spec.hidden), (Site::ExpertDown(e), moe.inner)]));
        }
    }
    sites
}

/// Refuses to add what is not of one shape.
fn same(what: &'static str, ours: usize, theirs: usize) -> Result<()> {
    if ours == theirs { Ok(()) } else { Err(Error::StatsDiffer { what, ours, theirs }) }
}

/// `[from, experts]` as `[domains, experts]`: row `d` becomes row `to[d]`.
fn spread<T: Clone + Default>(rows: &ndarray::Array2<T>, to: &[usize], domains: usize) -> ndarray::Array2<T> {
    let mut out = ndarray::Array2::default((domains, rows.ncols()));
    for (row, &d) in rows.rows().into_iter().zip(to) {
        out.row_mut(d).assign(&row);
    }
    out
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn layers_of_different_models_do_not_add_up() {
        let mut dense = LayerStats::default();
        let experts = ExpertStats {
            router: RouterSums::new(1, 2, None),
            outputs: OutputSums::new(1, 2, 3),
            block: BlockSums::new(1),
            similarity: None,
        };
        let alike = ExpertStats { similarity: Some(Similarity::new(2)), ..experts.clone() };
        let mut sparse = LayerStats { experts: Some(experts), ..Default::default() };
        let error = dense.merge(&sparse).unwrap_err().to_string();
        assert!(error.contains("0 and 1 routers"), "{error}");
        let other = LayerStats { channels: [(Site::AttentionIn, ChannelSums::new(3))].into(), ..Default::default() };
        assert!(dense.merge(&other).is_err());
        let alike = LayerStats { experts: Some(alike), ..Default::default() };
        assert!(sparse.merge(&alike).unwrap_err().to_string().contains("0 and 1 similarity matrices"));
    }

    #[test]
    fn rows_move_to_their_domain() {
        let rows = array![[1, 2], [3, 4]];
        assert_eq!(spread(&rows, &[2, 0], 3), array![[3, 4], [0, 0], [1, 2]]);
    }
}

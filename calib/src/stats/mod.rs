//! What is measured of a model: sums over tokens, one set a decoder layer.
//!
//! Every statistic is a sum (or a maximum) over tokens and has `merge`, so that partial passes add up: over batches,
//! restarts and machines. A mean is computed when it is read, never stored. Scalars are summed in f64, in the order of the
//! samples. What is kept per domain has one row for each text of the corpus.
//!
//! [`RouterSums`]: what the router chose and with what weight. [`OutputSums`]: what the experts' outputs were.
//! [`ChannelSums`]: the size of each input channel of each Linear matrix. [`Moment`]: `Σ x xᵀ` of one site, which is made,
//! used and dropped within a layer, because all of a model's are too large to be files. [`end_loss`]: what a change of weights
//! costs at the end of the model, from a backward pass. [`store`]: the rest as files.

mod channels;
pub mod end_loss;
mod moment;
mod outputs;
mod router;
pub mod store;

use std::collections::BTreeMap;

use crate::arch::{Attention, Mlp, Site, Spec};
use crate::{Error, Result};

pub use channels::ChannelSums;
pub use moment::Moment;
pub use outputs::{OutputChunk, OutputSums};
pub use router::RouterSums;
pub use store::{Manifest, Part, Store};

/// The statistics of one decoder layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerStats {
    /// The router's choices, where the layer has one.
    pub router: Option<RouterSums>,
    /// The experts' outputs, where the layer has experts.
    pub outputs: Option<OutputSums>,
    /// Input channels of every site.
    pub channels: BTreeMap<Site, ChannelSums>,
}

impl LayerStats {
    /// Nothing seen yet of this layer.
    pub fn new(spec: &Spec, layer: usize, domains: usize) -> Self {
        let moe = spec.moe(layer);
        Self {
            router: moe.map(|m| RouterSums::new(domains, m.experts)),
            outputs: moe.map(|m| OutputSums::new(domains, m.experts, spec.hidden)),
            channels: sites(spec, layer).into_iter().map(|(site, width)| (site, ChannelSums::new(width))).collect(),
        }
    }

    /// Adds the same layer's statistics over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`] where the two are not of one model and one list of domains.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if !self.channels.keys().eq(other.channels.keys()) {
            return Err(Error::StatsDiffer { what: "sites", ours: self.channels.len(), theirs: other.channels.len() });
        }
        match (&mut self.router, &other.router) {
            (Some(ours), Some(theirs)) => ours.merge(theirs)?,
            (None, None) => {}
            _ => return Err(Error::StatsDiffer { what: "routers", ours: self.router.iter().len(), theirs: other.router.iter().len() }),
        }
        match (&mut self.outputs, &other.outputs) {
            (Some(ours), Some(theirs)) => ours.merge(theirs)?,
            (None, None) => {}
            _ => {
                return Err(Error::StatsDiffer {
                    what: "expert outputs",
                    ours: self.outputs.iter().len(),
                    theirs: other.outputs.iter().len(),
                });
            }
        }
        self.channels.values_mut().zip(other.channels.values()).try_for_each(|(ours, theirs)| ours.merge(theirs))
    }

    /// The same statistics with domain `d` as domain `to[d]` of `domains`.
    pub fn with_domains(&self, to: &[usize], domains: usize) -> Self {
        Self {
            router: self.router.as_ref().map(|r| r.with_domains(to, domains)),
            outputs: self.outputs.as_ref().map(|o| o.with_domains(to, domains)),
            channels: self.channels.clone(),
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
        let sparse = LayerStats { router: Some(RouterSums::new(1, 2)), ..Default::default() };
        let error = dense.merge(&sparse).unwrap_err().to_string();
        assert!(error.contains("0 and 1 routers"), "{error}");
        let other = LayerStats { channels: [(Site::AttentionIn, ChannelSums::new(3))].into(), ..Default::default() };
        assert!(dense.merge(&other).is_err());
    }

    #[test]
    fn rows_move_to_their_domain() {
        let rows = array![[1, 2], [3, 4]];
        assert_eq!(spread(&rows, &[2, 0], 3), array![[3, 4], [0, 0], [1, 2]]);
    }
}

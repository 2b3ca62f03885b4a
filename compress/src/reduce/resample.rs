//! How sure a choice of experts is: what each domain alone would keep, and what other draws of the same texts would.

use std::collections::BTreeMap;
use std::path::Path;

use calib::pass;
use calib::sample::{Calibrate, Samples};
use calib::stats::{ExpertStats, LayerStats, Store};
use serde::Serialize;

use super::{Request, decide};
use crate::plan::Experts;
use crate::prune::{Pruner, overlap, stability};
use crate::{Error, Result};

/// Parts that the samples are cut into; each draw leaves one out.
pub const FOLDS: usize = 4;

/// The experts that stay, by layer.
type Kept = BTreeMap<usize, Vec<usize>>;

/// How sure a choice is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sureness {
    /// The domains, in the order of the rows and columns of `overlap`.
    pub domains: Vec<String>,
    /// Share of the experts that one domain alone keeps and another keeps too, mean over layers, `[domains][domains]`.
    pub overlap: Vec<Vec<f64>>,
    /// Share of the experts that stay in draws that leave a quarter of the samples out, mean over draws, by layer.
    pub stability: BTreeMap<usize, f64>,
}

/// Judges a choice; `dir` is where the parts' statistics go.
///
/// # Errors
///
/// [`Error::Prune`] for a pruner that scores no statistics, or too few samples; whatever running the model says.
pub fn sureness(request: &Request<'_>, experts: &Experts, calibrate: &Calibrate, dir: &Path) -> Result<Sureness> {
    let refused = |what: String| Error::Prune { layer: experts.layers.keys().next().copied().unwrap_or(0), what };
    let scored = request.pruner.filter(|pruner| !matches!(pruner, Pruner::Exhaustive(_) | Pruner::Random(_)));
    let Some(pruner) = scored else { return Err(refused("there is no pruner that scores experts by statistics".into())) };
    let names = &request.samples.domains;
    let all = decide::domains(pruner.asked().domains, names)?;
    let whole = read(request.store, experts)?;
    let alone = names.iter().enumerate().map(|(d, _)| kept(request, pruner, &whole, &[d])).collect::<Result<Vec<Kept>>>()?;
    let mean = |a: &Kept, b: &Kept| a.iter().map(|(layer, a)| overlap(a, &b[layer])).sum::<f64>() / a.len().max(1) as f64;
    let overlap = alone.iter().map(|a| alone.iter().map(|b| mean(a, b)).collect()).collect();
    if request.samples.ids.len() < FOLDS * names.len() {
        return Err(refused(format!("{} samples of {} texts cannot be cut into {FOLDS} parts", request.samples.ids.len(), names.len())));
    }
    let parts = (0..FOLDS).map(|fold| part(request, calibrate, fold, dir)).collect::<Result<Vec<Store>>>()?;
    let mut draws: BTreeMap<usize, Vec<Vec<usize>>> = BTreeMap::new();
    for left_out in 0..FOLDS {
        let stores: Vec<&Store> = parts.iter().enumerate().filter(|(fold, _)| *fold != left_out).map(|(_, store)| store).collect();
        let stats = experts.layers.keys().map(|&layer| Ok((layer, summed(&stores, layer)?))).collect::<Result<BTreeMap<_, _>>>()?;
        for (layer, kept) in kept(request, pruner, &stats, &all)? {
            draws.entry(layer).or_default().push(kept);
        }
    }
    let stays = |layer: usize| experts.layers[&layer].experts.concat();
    let stability = draws.into_iter().map(|(layer, others)| (layer, stability(&stays(layer), &others))).collect();
    Ok(Sureness { domains: names.clone(), overlap, stability })
}

/// Statistics of every layer of experts.
fn read(store: &Store, experts: &Experts) -> Result<BTreeMap<usize, ExpertStats>> {
    experts.layers.keys().map(|&layer| Ok((layer, summed(&[store], layer)?))).collect()
}

/// Statistics of one layer's experts, added up.
fn summed(stores: &[&Store], layer: usize) -> Result<ExpertStats> {
    let missing = || Error::Prune { layer, what: "calibration left no statistics of its experts".into() };
    let mut sum: Option<LayerStats> = None;
    for store in stores {
        let stats = store.get(layer)?;
        match &mut sum {
            Some(sum) => sum.merge(&stats)?,
            None => sum = Some(stats),
        }
    }
    sum.and_then(|stats| stats.experts).ok_or_else(missing)
}

/// What stays by these statistics.
fn kept(request: &Request<'_>, pruner: &Pruner, stats: &BTreeMap<usize, ExpertStats>, domains: &[usize]) -> Result<Kept> {
    let protected = decide::protected(pruner.asked().protect, stats);
    let count = pruner.asked().count(crate::plan::experts::count(request.model));
    let of = |((&layer, stats), protected): ((&usize, &ExpertStats), &Vec<bool>)| {
        Ok((layer, decide::fate(request.model, pruner, (layer, stats), domains, protected, count)?.experts.concat()))
    };
    stats.iter().zip(&protected).map(of).collect()
}

/// Measures every fourth sample of each text.
fn part(request: &Request<'_>, calibrate: &Calibrate, fold: usize, dir: &Path) -> Result<Store> {
    let Samples { ids, domains, .. } = request.samples;
    let which: Vec<usize> = (0..ids.len()).filter(|sample| sample / domains.len().max(1) % FOLDS == fold).collect();
    let (samples, store) = (request.samples.only(&which), Store::new(dir.join(format!("part-{fold}"))));
    let fingerprint = request.model.checkpoint().fingerprint();
    let pass = pass::Pass {
        weights: request.model,
        fingerprint,
        samples: &samples,
        calibrate,
        store: &store,
        watch: None,
        progress: request.progress,
    };
    pass::run(&pass, request.device)?;
    Ok(store)
}

//! From measured experts to a model with fewer of them, which everything after reads as if it were the checkpoint.
//!
//! [`run`] decides (or lets tokens decide), writes into `OUT/moepress/reduced` what the result does not take over as it stands (router
//! rows, merged experts), one file a layer, and leaves the decision beside as `experts.json`, which plan.json repeats. [`open`] puts the
//! two on top of the original checkpoint: the kept experts are not copied, they only have another number.
//!
//! **Memory.** Without tokens, one router. With tokens, the hidden states of the samples, twice where a repaired layer changes what the
//! next one sees, and of one layer what its experts say of the tokens that it is judged by: `4 · tokens · hidden` bytes an expert where
//! all are run on all (searches, merges). Where routers are fitted, of 4,096 tokens at a time what each of `2 k + 2` experts says, and of
//! all tokens the products of these; where down projections are, `4 · tokens · k · (inner + hidden)` bytes.

mod decide;
mod mend;
pub mod resample;
mod stream;
#[cfg(test)]
mod tests;
mod tokens;
mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::Model;
use calib::checkpoint::{Derived, hash_bytes};
use calib::device::Device;
use calib::progress::Progress;
use calib::sample::Samples;
use calib::stats::Store;

pub use mend::CHUNK as CANDIDATES;
pub use weights::{Own, Owned};

use crate::export::config;
use crate::merge::Merger;
use crate::mtp::{self, Mtp};
use crate::plan::Experts;
use crate::prune::Pruner;
use crate::repair::removal;
use crate::tensorfile::{Create, Declared, Element, write_whole};
use crate::{Error, Result};

/// Config keys that count routed experts, under any family's name.
const COUNTS: [&str; 4] = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];

/// What a model is reduced from and by.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The model.
    pub model: &'a Model,
    /// Who chooses the experts that stay.
    pub pruner: Option<&'a Pruner>,
    /// Who makes one expert of several, of those that stay.
    pub merger: Option<&'a Merger>,
    /// How routers are fitted afterwards.
    pub repair: Option<&'a removal::Params>,
    /// The calibration samples.
    pub samples: &'a Samples,
    /// Where the model runs.
    pub device: Device,
    /// Hears of every finished layer.
    pub progress: &'a dyn Progress,
    /// What calibration measured.
    pub store: &'a Store,
    /// `OUT/moepress`.
    pub dir: &'a Path,
}

impl Request<'_> {
    /// What becomes of multi-token-prediction layers.
    fn mtp(&self) -> Option<Mtp> {
        let pruner = self.pruner.and_then(|pruner| pruner.asked().mtp);
        pruner.or_else(|| self.merger.and_then(|merger| merger.asked().mtp))
    }
}

/// The folder of what is made anew.
fn folder(dir: &Path) -> PathBuf {
    dir.join("reduced")
}

fn layer_path(dir: &Path, layer: usize) -> PathBuf {
    folder(dir).join(format!("layer-{layer:05}.safetensors"))
}

/// Decides, writes what is made anew, and last of all the decision.
///
/// # Errors
///
/// [`Error::Stage`] if the calibration pass is not finished; [`Error::NoDomain`]; [`Error::Prune`] for a layer whose experts cannot be
/// chosen or merged as asked; what running the model says; an IO error.
pub fn run(request: &Request<'_>) -> Result<Experts> {
    let Request { model, pruner, merger, repair, dir, .. } = *request;
    let mut experts = decide::decide(request)?;
    fs_err::create_dir_all(folder(dir))?;
    if merger.is_some() || repair.is_some() || matches!(pruner, Some(Pruner::Exhaustive(_))) {
        let domains = pruner.map(|pruner| decide::domains(pruner.asked().domains, &request.samples.domains)).transpose()?;
        let domains = domains.unwrap_or_else(|| (0..request.samples.domains.len()).collect());
        let pass = stream::Pass { request, samples: request.samples, decided: experts.into(), domains };
        experts = request.device.run(pass)?;
    } else {
        for (&layer, fate) in &experts.layers {
            write_layer(model, dir, layer, &weights::sliced(model, layer, fate)?)?;
        }
    }
    let text = serde_json::to_string_pretty(&experts).map_err(std::io::Error::from)? + "\n";
    let path = dir.join("experts.json");
    write_whole(&path, text.as_bytes())?;
    // As every later run will see it: the last digit of a number may change on the way.
    Experts::read(&path)
}

/// Writes what a layer does not take over; nothing where there is nothing.
fn write_layer(model: &Model, dir: &Path, layer: usize, own: &Owned) -> Result<()> {
    let path = layer_path(dir, layer);
    if own.is_empty() {
        return if path.exists() { Ok(fs_err::remove_file(path)?) } else { Ok(()) };
    }
    let mut declared = Vec::new();
    let mut named = Vec::new();
    for (&role, tensor) in own {
        let name = model.family().names.of(role).unwrap_or_default();
        let Some(dtype) = Element::of(tensor.dtype) else {
            return Err(Error::PlanMisfit { name, what: "its type is none that a router or an expert is made anew in" });
        };
        declared.push(Declared { name: name.clone(), dtype, shape: tensor.shape.clone() });
        named.push((name, &tensor.bytes));
    }
    let file = Create::new(&path, declared, &BTreeMap::new())?;
    named.iter().try_for_each(|(name, bytes)| file.put(name, bytes))?;
    file.finish()
}

/// The reduced model that [`run`] left in `dir`, on top of the original.
///
/// # Errors
///
/// An IO error; [`Error::OtherModel`]; [`Error::Stage`] where the config does not count its experts; as [`Model::from_checkpoint`].
pub fn open(model: &Model, dir: &Path) -> Result<Model> {
    let path = dir.join("experts.json");
    let experts = Experts::read(&path)?;
    let key = hash_bytes(&fs_err::read(&path)?);
    let changed: Vec<PathBuf> = experts.layers.keys().map(|&layer| layer_path(dir, layer)).filter(|path| path.is_file()).collect();
    let derived = Derived { config: config_of(model, &experts)?, renamed: experts.renamed(model)?, changed: &changed, key: &key };
    Ok(Model::from_checkpoint(model.checkpoint().derive(&derived)?)?)
}

/// The config with every count of experts, and of MTP layers that are left out, as it is in the result.
fn config_of(model: &Model, experts: &Experts) -> Result<String> {
    let text = model.checkpoint().config_text();
    let wrong = || Error::Config;
    let mut edited = text.to_owned();
    if experts.after != experts.before {
        edited = config::set_counts(&edited, &COUNTS, experts.after as u64, model.family().experts).ok_or_else(wrong)?;
    }
    if experts.mtp.is_some() {
        edited = config::set_counts(&edited, &mtp::COUNTS, 0, mtp::COUNTS[0]).ok_or_else(wrong)?;
    }
    Ok(edited)
}

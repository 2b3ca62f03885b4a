//! From a model to the same model with other scales inside, or with its residual stream rotated ([`rotate`]), which everything after reads as if it were the checkpoint.
//!
//! [`run`] chooses the scales of input channels ([`crate::repair::awq`]), layer by layer, and writes into `OUT/moepress/folded` every
//! tensor that they change: matrices whose columns are multiplied, and the norms and rows that are divided in return. What was done
//! and what was left out stands in `awq.json`. [`open`] puts the folder on top of the original checkpoint.
//!
//! The model computes what it did before, up to the rounding of changed tensors to their own type. The gain of a norm is rounded
//! first and the scale taken from what became of it, so that norms do not add to that.
//!
//! **Memory.** One matrix in f32, with a scaled copy and its codes for each exponent that is tried at once: under `4 · 4` bytes a weight
//! a thread. **Disk**: the decoder layers once more.

mod choose;
pub mod rotate;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::arch::{Attention, Spec};
use calib::checkpoint::{Derived, hash_bytes};
use calib::progress::Progress;
use calib::stats::Store;
use calib::{Model, Weights};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::allocate::Allocate;
use crate::plan::{self, Shape, matrices};
use crate::quantize::{Quantizer, Width};
use crate::repair::awq::{Fold, Params};
use crate::tensorfile::write_whole;
use crate::{Error, Result};

/// What is folded, and for whom.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its shape.
    pub shape: &'a Shape,
    /// Which matrices are quantized, and to what.
    pub allocate: &'a Allocate,
    /// Who quantizes them.
    pub quantizer: &'a Quantizer,
    /// How scales are chosen.
    pub params: &'a Params,
    /// What calibration measured.
    pub store: &'a Store,
    /// `OUT/moepress`.
    pub dir: &'a Path,
    /// Hears of every finished layer.
    pub progress: &'a dyn Progress,
}

/// What became of each fold, by the tensor that stands for it: the norm, or the matrix whose inputs are scaled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// Fingerprint of the model.
    pub model: String,
    /// Hash of the calibration samples.
    pub corpus: String,
    /// Scales that were chosen.
    pub folds: BTreeMap<String, Folded>,
    /// What was not scaled, and why.
    pub left_out: BTreeMap<String, String>,
}

/// One choice of scales.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Folded {
    /// The exponent; 0 for no scale.
    pub alpha: f64,
    /// The weighted error of rounding to nearest without scales.
    pub before: f64,
    /// The same with these.
    pub after: f64,
}

impl Account {
    /// Folds with an exponent above 0, and the error with all scales as a share of that without.
    pub fn gain(&self) -> (usize, f64) {
        let sum = |of: fn(&Folded) -> f64| self.folds.values().map(of).sum::<f64>();
        let before = sum(|fold| fold.before);
        let share = if before > 0.0 { sum(|fold| fold.after) / before } else { 1.0 };
        (self.folds.values().filter(|fold| fold.alpha > 0.0).count(), share)
    }
}

/// Why a family does not allow a fold, if it does not.
pub fn objection(spec: &Spec, fold: Fold) -> Option<&'static str> {
    match (fold, &spec.attention) {
        (Fold::AttentionOut, Attention::Latent(_)) => Some("latent attention has no value projection of its own"),
        (Fold::AttentionOut, Attention::Grouped(attention)) if attention.clip.is_some() => {
            Some("values are clamped (clip_qkv), and scaled ones would be clamped elsewhere")
        }
        _ => None,
    }
}

/// The width that exponents are chosen at; `None` where the recipe names none.
pub fn width_of(allocate: &Allocate, params: &Params, scale_type: kernels::ScaleType) -> Option<Width> {
    let choice = allocate.options().into_iter().find(|choice| params.bits.is_none_or(|bits| bits == choice.bits))?;
    Some(Width { bits: choice.bits, group: choice.group, scale_type, grid: choice.grid })
}

fn folder(dir: &Path) -> PathBuf {
    dir.join("folded")
}

fn layer_path(dir: &Path, layer: usize) -> PathBuf {
    folder(dir).join(format!("layer-{layer:05}.safetensors"))
}

/// Chooses scales, writes every tensor that they change, and last of all what was done.
///
/// # Errors
///
/// [`Error::Stage`] if the calibration pass is not finished; what rounding a matrix says; an IO error.
pub fn run(request: &Request<'_>) -> Result<Account> {
    let Request { model, shape, allocate, params, store, dir, progress, .. } = *request;
    let manifest = plan::finished(store)?;
    fs_err::create_dir_all(folder(dir))?;
    let corpus = manifest.corpus();
    let mut account = Account { model: shape.fingerprint.clone(), corpus, ..Account::default() };
    let quantized = matrices(allocate, shape).into_iter().map(|m| (m.name, m.scale)).collect();
    let folds: Vec<Fold> = params.folds.clone().unwrap_or_else(|| Fold::ALL.into());
    let layers = model.spec().layers.len();
    progress.start("fold", layers as u64);
    for layer in 0..layers {
        let choosing = choose::Layer { request, layer, stats: &store.get(layer)?, quantized: &quantized };
        let factors = choosing.choose(&folds, &mut account)?;
        write::layer(model, layer, &factors, &layer_path(dir, layer))?;
        progress.tick(1);
    }
    progress.finish();
    let text = serde_json::to_string_pretty(&account).map_err(std::io::Error::from)? + "\n";
    write_whole(&dir.join("awq.json"), text.as_bytes())?;
    Ok(account)
}

/// What `path` says was done to this model, `of` giving the fingerprint in it; and the file's hash.
fn account<T: DeserializeOwned>(model: &Model, path: PathBuf, of: impl Fn(&T) -> &str) -> Result<(T, String)> {
    let text = fs_err::read(&path)?;
    let account: T = serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })?;
    let (planned, found) = (of(&account), model.checkpoint().fingerprint());
    if planned != found {
        return Err(Error::OtherModel { planned: planned.to_owned(), found: found.to_owned() });
    }
    Ok((account, hash_bytes(&text)))
}

/// The model with the scales that [`run`] left in `dir`, on top of the original.
///
/// # Errors
///
/// An IO error; [`Error::OtherModel`]; as [`Model::from_checkpoint`].
pub fn open(model: &Model, dir: &Path) -> Result<Model> {
    let (_, key) = account(model, dir.join("awq.json"), |account: &Account| &account.model)?;
    let changed: Vec<PathBuf> = (0..model.spec().layers.len()).map(|layer| layer_path(dir, layer)).filter(|path| path.is_file()).collect();
    let renamed = model.layout().tensors().iter().map(|tensor| (tensor.name.clone(), tensor.name.clone())).collect();
    let config = model.checkpoint().config_text().to_owned();
    let derived = Derived { config, renamed, changed: &changed, key: &key };
    Ok(Model::from_checkpoint(model.checkpoint().derive(&derived)?)?)
}

//! The same model with its residual stream rotated ([`crate::repair::rotate`]).
//!
//! Every tensor of a decoder layer that reads or writes the stream, the embedding and the head are written anew into
//! `OUT/moepress/folded`; gains of norms become 1. A head that was the embedding cannot be it any more, because the last norm's gain goes
//! into the one and not into the other: it is stored, and its bytes count like all others. `rotated.json` says what was done.
//!
//! **Memory**: one matrix in f32 and two copies of a row a thread. **Disk**: the model once more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::arch::{NormKind, Part, Projection, Role, Spec};
use calib::checkpoint::Derived;
use calib::progress::Progress;
use calib::tensor;
use calib::{Model, Weights};
use kernels::ScaleType;
use ndarray::{Array2, Axis};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::write::stored;
use super::{account, folder, layer_path};
use crate::export::config;
use crate::mtp;
use crate::plan::{Shape, Tensor};
use crate::repair::rotate::{Params, Rotation};
use crate::tensorfile::{Create, Declared, Element, write_whole};
use crate::{Error, Result};

use Projection::{Down, Gate, Up};

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotated {
    /// Fingerprint of the model.
    pub model: String,
    /// The knobs.
    pub params: Params,
    /// The sides of the random orthogonal and of the Hadamard part.
    pub sides: (usize, usize),
    /// Bytes of a head that was the embedding.
    pub untied: Option<u64>,
}

/// Why a family cannot be rotated, if it cannot.
pub fn objection(spec: &Spec) -> Option<&'static str> {
    match spec.norm.kind {
        NormKind::Rms => None,
        NormKind::Layer => Some("its LayerNorms take the mean off the residual stream, and a rotation moves the mean"),
    }
}

/// What a tensor is to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// It reads it behind the norm with this gain.
    Reads(Part),
    /// It adds to it: a matrix `[hidden, in]` or a bias.
    Writes,
    /// It is a gain that what reads it takes over.
    Gain,
    /// It never sees it.
    Nothing,
}

/// Said of every part there is, so that a new one has to be decided. Biases of norms are those of families that are refused.
fn does(part: Part) -> Does {
    match part {
        Part::InputNorm | Part::PostNorm => Does::Gain,
        Part::Query | Part::Key | Part::Value | Part::QueryA | Part::KvA => Does::Reads(Part::InputNorm),
        Part::Router | Part::SharedGate => Does::Reads(Part::PostNorm),
        Part::Expert(_, Gate | Up) | Part::Shared(Gate | Up) | Part::Dense(Gate | Up) => Does::Reads(Part::PostNorm),
        Part::Output | Part::OutputBias => Does::Writes,
        Part::Expert(_, Down) | Part::Shared(Down) | Part::Dense(Down) => Does::Writes,
        Part::InputNormBias | Part::PostNormBias => Does::Nothing,
        Part::QueryBias | Part::KeyBias | Part::ValueBias | Part::QueryNorm | Part::KeyNorm => Does::Nothing,
        Part::QueryABias | Part::QueryANorm | Part::QueryB | Part::KvABias | Part::KvANorm | Part::KvB => Does::Nothing,
        Part::RouterCorrection => Does::Nothing,
    }
}

/// One tensor to write.
struct Job {
    name: String,
    /// Where its values come from.
    role: Role,
    shape: Vec<usize>,
    dtype: tensor::Dtype,
    does: Does,
}

/// The model, and what turns it.
struct Turning<'a> {
    model: &'a Model,
    rotation: Rotation,
}

/// Rotates a model, and says last of all what was done.
///
/// # Errors
///
/// What reading the model brings up; an IO error.
pub fn run(model: &Model, params: &Params, dir: &Path, progress: &dyn Progress) -> Result<Rotated> {
    fs_err::create_dir_all(folder(dir))?;
    let spec = model.spec();
    let turning = Turning { model, rotation: Rotation::new(spec.hidden, params.seed) };
    let layers = spec.layers.len();
    progress.start("rotate", layers as u64 + 1);
    for layer in 0..=layers {
        turning.write(&turning.jobs(layer)?, &layer_path(dir, layer))?;
        progress.tick(1);
    }
    progress.finish();
    let untied = head(model).map(|head| head.bytes);
    let rotated =
        Rotated { model: model.checkpoint().fingerprint().to_owned(), params: params.clone(), sides: turning.rotation.sides(), untied };
    let text = serde_json::to_string_pretty(&rotated).map_err(std::io::Error::from)? + "\n";
    write_whole(&dir.join("rotated.json"), text.as_bytes())?;
    Ok(rotated)
}

/// The rotated model that [`run`] left in `dir`, on top of the original.
///
/// # Errors
///
/// An IO error; [`Error::OtherModel`]; as [`Model::from_checkpoint`].
pub fn open(model: &Model, dir: &Path) -> Result<Model> {
    let (rotated, key) = account(model, dir.join("rotated.json"), |rotated: &Rotated| &rotated.model)?;
    let changed: Vec<PathBuf> = (0..=model.spec().layers.len()).map(|layer| layer_path(dir, layer)).collect();
    let dropped = rotated.params.mtp.is_some();
    let mut config = model.checkpoint().config_text().to_owned();
    if model.spec().tied {
        config = config::edit(&config, &[], Some(("tie_word_embeddings", &false.into()))).ok_or(Error::Config)?;
    }
    if dropped {
        config = config::set_counts(&config, &mtp::COUNTS, 0, mtp::COUNTS[0]).ok_or(Error::Config)?;
    }
    let tensors = model.layout().tensors().iter().filter(|tensor| !(dropped && tensor.role == Role::Mtp));
    let renamed = tensors.map(|tensor| (tensor.name.clone(), tensor.name.clone())).collect();
    let derived = Derived { config, renamed, changed: &changed, key: &key };
    Ok(Model::from_checkpoint(model.checkpoint().derive(&derived)?)?)
}

/// The head that a model with tied embeddings gets.
fn head(model: &Model) -> Option<Tensor> {
    let embedding = model.layout().get(Role::Embedding).filter(|_| model.spec().tied)?;
    let dtype = stored(model, &embedding.name).ok()?;
    Some(Tensor {
        name: model.family().names.of(Role::Head)?,
        shape: embedding.shape.clone(),
        role: Role::Head,
        scale: if dtype == tensor::Dtype::F16 { ScaleType::F16 } else { ScaleType::Bf16 },
        bytes: embedding.shape.iter().map(|&side| side as u64).product::<u64>() * Element::of(dtype)?.size() as u64,
    })
}

/// The shape of a model after it was rotated, as far as it is known before.
pub fn shape(model: &Model, params: &Params, shape: &Shape) -> Shape {
    let head = head(model);
    let stays = |tensor: &&Tensor| match tensor.role {
        Role::Mtp => params.mtp.is_none(),
        // The stored copy of a tied head is where the head will be.
        Role::Buffer => head.as_ref().is_none_or(|head| head.name != tensor.name),
        _ => true,
    };
    let mut tensors: Vec<Tensor> = shape.tensors.iter().filter(stays).cloned().chain(head.clone()).collect();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Shape { fingerprint: shape.fingerprint.clone(), tensors }
}

impl Turning<'_> {
    /// The tensors of a layer that change; those of the number after the last are the ends of the model.
    fn jobs(&self, layer: usize) -> Result<Vec<Job>> {
        let mut jobs = Vec::new();
        for tensor in self.model.layout().tensors() {
            let does = match tensor.role {
                Role::Layer(at, part) if at == layer => does(part),
                Role::Embedding | Role::Head | Role::FinalNorm if layer == self.model.spec().layers.len() => match tensor.role {
                    Role::FinalNorm => Does::Gain,
                    // Its rows are values of the stream as they are.
                    _ => Does::Writes,
                },
                _ => Does::Nothing,
            };
            if does != Does::Nothing {
                let dtype = stored(self.model, &tensor.name)?;
                jobs.push(Job { name: tensor.name.clone(), role: tensor.role, shape: tensor.shape.clone(), dtype, does });
            }
        }
        if layer == self.model.spec().layers.len()
            && let Some(head) = head(self.model)
        {
            let dtype = stored(self.model, self.model.layout().name(Role::Embedding).unwrap_or_default())?;
            jobs.push(Job { name: head.name, role: Role::Head, shape: head.shape, dtype, does: Does::Writes });
        }
        Ok(jobs)
    }

    fn write(&self, jobs: &[Job], path: &Path) -> Result<()> {
        let element = |job: &Job| Element::of(job.dtype).ok_or_else(|| misfit(&job.name));
        let declared = |job: &Job| Ok(Declared { name: job.name.clone(), dtype: element(job)?, shape: job.shape.clone() });
        let file = Create::new(path, jobs.iter().map(declared).collect::<Result<_>>()?, &BTreeMap::new())?;
        jobs.par_iter().try_for_each(|job| {
            let values: Vec<f32> = self.turned(job)?.iter().copied().collect();
            file.put(&job.name, &tensor::encode(job.dtype, &values).ok_or_else(|| misfit(&job.name))?)
        })?;
        file.finish()
    }

    /// A tensor's new values; a vector is one row.
    fn turned(&self, job: &Job) -> Result<Array2<f32>> {
        let (model, rotation) = (self.model, &self.rotation);
        match (job.does, job.role) {
            (Does::Gain, _) => Ok(Array2::ones((1, job.shape.iter().product()))),
            (Does::Reads(norm), Role::Layer(layer, _)) => self.reader(job.role, Role::Layer(layer, norm)),
            (Does::Writes, Role::Head) => self.reader(if model.spec().tied { Role::Embedding } else { Role::Head }, Role::FinalNorm),
            (Does::Writes, Role::Layer(..)) if job.shape.len() == 2 => {
                let mut w = model.matrix(job.role)?;
                rotation.columns(w.view_mut());
                Ok(w)
            }
            _ => {
                let mut w = if job.shape.len() == 2 { model.matrix(job.role)? } else { model.vector(job.role)?.insert_axis(Axis(0)) };
                rotation.rows(w.view_mut());
                Ok(w)
            }
        }
    }

    /// `W · diag(g) · Q`.
    fn reader(&self, matrix: Role, norm: Role) -> Result<Array2<f32>> {
        let mut w = self.model.matrix(matrix)?;
        w *= &self.model.vector(norm)?;
        self.rotation.rows(w.view_mut());
        Ok(w)
    }
}

fn misfit(name: &str) -> Error {
    Error::PlanMisfit { name: name.to_owned(), what: "its type holds no rotated values" }
}

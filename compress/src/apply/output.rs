//! From solved layers to the formats asked for.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use calib::arch::{Part, Role};
use calib::progress::Progress;
use calib::tensor::{self, Dtype};
use calib::{Model, Weights};
use kernels::{QuantizedMatrix, ScaleType};

use super::work;
use crate::allocate::Substitute;
use crate::constants::Outputs;
use crate::export::{self, Constant, Contents, Exports, Form, Scheme, Source, Tensor, Written};
use crate::plan::{Action, Plan, Quantize, zero_of};
use crate::solved::{LayerRead, Solved};
use crate::{Error, Result};

/// Writes every format asked for: the first at the top of `out`, every further one in a folder of its name.
///
/// `dir` is where [`solve`](super::solve) left the codes.
///
/// # Errors
///
/// As [`export::write`]; [`Error::Unsolved`] if a layer is missing; [`Error::OtherModel`], [`Error::PlanMisfit`], [`Error::OtherPlan`].
pub fn write(model: &Model, plan: &Plan, dir: &Path, exports: &Exports, out: &Path, progress: &dyn Progress) -> Result<Vec<Written>> {
    let source = FromSolved::open(model, plan, dir)?;
    export::write(&source.contents()?, exports, out, progress)
}

/// Every tensor that an output of this plan holds, in no format yet: what [`export::refusals`] asks before any work is done.
///
/// # Errors
///
/// [`Error::PlanMisfit`] for a tensor that the model does not have.
pub fn contents_of(model: &Model, plan: &Plan) -> Result<Vec<Tensor>> {
    let checkpoint = model.checkpoint();
    let mut tensors = Vec::new();
    for (name, action) in &plan.tensors {
        // A head that is yet to be untied is what the embedding is.
        let head = model.spec().tied && model.family().names.of(Role::Head).as_deref() == Some(name);
        let known = if head { model.layout().name(Role::Embedding).unwrap_or_default() } else { name };
        let info = checkpoint.info(known).ok_or_else(|| Error::PlanMisfit { name: name.clone(), what: "the model does not have it" })?;
        let form = match action {
            Action::Drop { .. } => continue,
            Action::Substitute(Substitute::Zero) => Form::Constant(Constant::Zero),
            Action::Substitute(Substitute::Mean) => Form::Constant(Constant::Mean(match work::mean_type(model, name) {
                ScaleType::F16 => Dtype::F16,
                ScaleType::Bf16 | ScaleType::F32 => Dtype::Bf16,
            })),
            Action::Keep | Action::Refit => Form::Kept(kept_as(info.dtype)),
            Action::Quantize(how) => Form::Quantized(scheme(how)),
        };
        let role = if head { Some(Role::Head) } else { model.layout().role(name) };
        let role = role.ok_or_else(|| Error::PlanMisfit { name: name.clone(), what: "it has no role in the model" })?;
        tensors.push(Tensor { name: name.clone(), shape: info.shape.clone(), role, form });
    }
    Ok(tensors)
}

/// The config of an output no longer says fp8, so what is kept cannot be fp8 either.
fn kept_as(stored: Dtype) -> Dtype {
    match stored {
        Dtype::F8E4m3 | Dtype::F8E5m2 => Dtype::Bf16,
        other => other,
    }
}

/// Values in the type that a tensor is kept in.
pub(super) fn as_kept(model: &Model, name: &str, values: &[f32]) -> Result<Vec<u8>> {
    let misfit = |what| Error::PlanMisfit { name: name.to_owned(), what };
    let stored = model.checkpoint().info(name).ok_or_else(|| misfit("the model does not have it"))?.dtype;
    tensor::encode(kept_as(stored), values).ok_or_else(|| misfit("its values cannot be converted to the type that it is kept in"))
}

/// What [`as_kept`] makes of values, as numbers.
pub(super) fn rounded_as_kept(model: &Model, name: &str, values: &[f32]) -> Result<Vec<f32>> {
    let stored = model.checkpoint().info(name).map_or(Dtype::F32, |info| info.dtype);
    let bytes = as_kept(model, name, values)?;
    let what = "its type holds no numbers";
    tensor::decode(kept_as(stored), &bytes).ok_or_else(|| Error::PlanMisfit { name: name.to_owned(), what })
}

fn scheme(how: &Quantize) -> Scheme {
    Scheme { bits: how.bits, group: how.group, zero: zero_of(how.grid), scale: how.scale }
}

/// What was solved, and what the model holds beside it.
pub(super) struct FromSolved<'a> {
    model: &'a Model,
    plan: &'a Plan,
    solved: Solved,
    /// What dropped experts put out.
    dropped: Outputs,
    /// The layer opened last: matrices are asked for by name, so mostly a layer at a time.
    open: Mutex<Option<(usize, Arc<LayerRead>)>>,
}

impl<'a> FromSolved<'a> {
    /// Opens the layers that [`solve`](super::solve) left in `dir`; all of them must be there.
    pub fn open(model: &'a Model, plan: &'a Plan, dir: &Path) -> Result<Self> {
        let layers = work::by_layer(model, plan)?.len();
        let dropped = work::dropped(model, plan, dir)?;
        Ok(Self { model, plan, solved: Solved::finished(dir, plan, layers)?, dropped, open: Mutex::new(None) })
    }

    /// The compressed model in no format yet.
    pub fn contents(&self) -> Result<Contents<'_>> {
        let checkpoint = self.model.checkpoint();
        Ok(Contents {
            config: checkpoint.config_text().to_owned(),
            files: checkpoint.files().to_vec(),
            tensors: contents_of(self.model, self.plan)?,
            source: self,
        })
    }

    fn layer(&self, layer: usize) -> Result<Arc<LayerRead>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = open.as_ref().filter(|(at, _)| *at == layer) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(self.solved.open(layer)?);
        *open = Some((layer, Arc::clone(&file)));
        Ok(file)
    }
}

impl Source for FromSolved<'_> {
    fn kept(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let checkpoint = self.model.checkpoint();
        if let (Some(Action::Refit), Some(Role::Layer(layer, _))) = (self.plan.tensors.get(name), self.model.layout().role(name)) {
            let (values, _) = self.layer(layer)?.router(name)?;
            return Ok(Cow::Owned(as_kept(self.model, name, &values)?));
        }
        let stored = checkpoint.info(name).map(|info| info.dtype);
        match stored.filter(|&dtype| kept_as(dtype) != dtype) {
            None => Ok(Cow::Borrowed(checkpoint.bytes(name)?)),
            Some(_) => Ok(Cow::Owned(as_kept(self.model, name, &checkpoint.floats(name)?)?)),
        }
    }

    fn quantized(&self, name: &str) -> Result<QuantizedMatrix> {
        let (Some(Action::Quantize(how)), Some(role)) = (self.plan.tensors.get(name), self.model.layout().role(name)) else {
            return Err(Error::PlanMisfit { name: name.to_owned(), what: "it is not quantized" });
        };
        let layers = self.model.spec().layers.len();
        let misfit = || Error::PlanMisfit { name: name.to_owned(), what: "it stands in no layer" };
        let layer = work::file_of(role, layers).ok_or_else(misfit)?;
        let shape = self.model.checkpoint().info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let shape = <[usize; 2]>::try_from(shape).map_err(|shape| Error::NotAMatrix { name: name.to_owned(), shape })?;
        self.layer(layer)?.matrix(name, shape, how)
    }

    fn mean(&self, name: &str) -> Result<Vec<f32>> {
        let output = match self.model.layout().role(name) {
            Some(Role::Layer(layer, Part::Expert(expert, _))) => self.dropped.get(&(layer, expert)),
            _ => None,
        };
        output.cloned().ok_or_else(|| Error::PlanMisfit { name: name.to_owned(), what: "its expert is not dropped" })
    }
}

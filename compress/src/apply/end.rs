//! Learned refinement of all layers at once, after each was solved: gradient steps against the divergence of the model's predictions.
//!
//! The steps of [`crate::quantize::learned`] with another loss than [`super::learned`]'s: `Σ_t KL` between what the original and the
//! compressed model predict. A layer's own output says neither which of its errors the next layers undo nor which matter at the end.
//! Samples that no step sees judge, as there.
//!
//! The layers' files stay as they are: what is learned goes into files of the folder `ended`, which counts when its account is written.
//! A run that was killed before starts these steps over, and ends with the same bytes.
//!
//! **Memory**: 29 bytes a solved weight of the model (as in [`super::learned`]), 4 one that is rounded alone; the original's last hidden
//! states; two heads; and one step's samples in the backward pass, with what entered every layer (`crate::run::memory` adds it up).

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;
use calib::arch::{Part, Role, Spec};
use calib::backward::Reference;
use calib::device::Job as DeviceJob;
use calib::progress::Progress;
use calib::{Model, Weights};
use kernels::QuantizedMatrix;
use ndarray::{Array1, Array2};
use rayon::prelude::*;

use super::declared;
use super::learned::{held_out, shuffle};
use super::sequential::fitted;
use super::work::Job;
use crate::plan::Plan;
use crate::quantize::learned::{End, Learner, Params};
use crate::solved::{By, Judged, Report, Solved};
use crate::{Error, Result};

/// The steps.
pub(super) struct Ending<'a> {
    pub model: &'a Model,
    pub plan: &'a Plan,
    pub layers: &'a [Vec<Job<'a>>],
    pub solved: &'a Solved,
    pub ids: &'a [Vec<u32>],
    pub params: (&'a Params, &'a End),
    pub progress: &'a dyn Progress,
}

/// The model as it is now.
struct Now<'a> {
    model: &'a Model,
    matrices: BTreeMap<Role, Array2<f32>>,
}

impl Weights for Now<'_> {
    fn spec(&self) -> &Spec {
        self.model.spec()
    }

    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        self.matrices.get(&role).map_or_else(|| self.model.matrix(role), |matrix| Ok(matrix.clone()))
    }

    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.model.vector(role)
    }
}

type Learners = BTreeMap<(usize, Part), Learner>;

impl DeviceJob for Ending<'_> {
    type Output = Result<()>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<()> {
        let (params, end) = self.params;
        if self.ids.len() <= params.held_out {
            return Err(Error::HeldOut { samples: self.ids.len(), held_out: params.held_out });
        }
        let (mut learners, matrices) = self.start()?;
        let mut now = Now { model: self.model, matrices };
        let reference = Reference::<B>::of(self.model, self.ids, device)?;
        let held_out = held_out(self.ids.len(), params.held_out);
        let tokens: usize = held_out.iter().map(|&sample| self.ids[sample].len()).sum();
        let judge = |now: &Now<'_>| -> Result<f64> { Ok(reference.divergence(now, self.ids, &held_out, device)? / tokens.max(1) as f64) };
        let before = judge(&now)?;
        let mut best = (Judged { before, after: before, step: 0 }, quantized(&learners));
        let mut order: Vec<usize> = (0..self.ids.len()).filter(|sample| !held_out.contains(sample)).collect();
        shuffle(&mut order, params.seed);
        let a_step = end.samples.clamp(1, order.len());
        let every = (end.steps / end.judged.max(1)).max(1);
        self.progress.start("steps against the end of the model", u64::from(end.steps));
        for step in 1..=end.steps {
            let first = (step as usize - 1) * a_step;
            let mut taken: Vec<usize> = (first..first + a_step).map(|i| order[i % order.len()]).collect();
            taken.sort_unstable();
            let wanted = |layer, part| learners.contains_key(&(layer, part));
            let found = reference.gradients(&now, self.ids, &taken, &wanted, device)?;
            let left = 1.0 - (step - 1) as f32 / end.steps as f32;
            learners.par_iter_mut().for_each(|(at, learner)| {
                if let Some(gradient) = found.matrices.get(at) {
                    learner.step(gradient, end.rate * left, end.scale_rate * left);
                }
            });
            now.matrices.par_extend(weights(&learners));
            if step % every == 0 || step == end.steps {
                let after = judge(&now)?;
                let seen = found.divergence / taken.iter().map(|&sample| self.ids[sample].len()).sum::<usize>().max(1) as f64;
                tracing::debug!("end, step {step}: {after:.6} nats held out, {before:.6} before; {seen:.6} on its own samples");
                if after < best.0.after {
                    best = (Judged { before, after, step }, quantized(&learners));
                }
            }
            self.progress.tick(1);
        }
        self.progress.finish();
        self.write(best.1, best.0)
    }
}

fn weights(learners: &Learners) -> impl ParallelIterator<Item = (Role, Array2<f32>)> {
    learners.par_iter().map(|(&(layer, part), learner)| (Role::Layer(layer, part), learner.weights()))
}

fn quantized(learners: &Learners) -> BTreeMap<(usize, Part), QuantizedMatrix> {
    learners.iter().map(|(&at, learner)| (at, learner.matrix())).collect()
}

impl Ending<'_> {
    /// What the layers' files hold: the matrices that were solved against tokens, and all that differs from the original.
    fn start(&self) -> Result<(Learners, BTreeMap<Role, Array2<f32>>)> {
        let (mut learners, mut matrices) = (Learners::new(), BTreeMap::new());
        for (layer, jobs) in self.layers.iter().enumerate() {
            let file = self.solved.open_layer(layer)?;
            if let Some((role, router)) = fitted(self.model, self.plan, layer, &file)? {
                matrices.insert(role, router);
            }
            for job in jobs {
                let matrix = file.matrix(job.name, job.shape, job.how)?;
                matrices.insert(job.role, matrix.dequantize());
                if let Role::Layer(layer, part) = job.role
                    && file.report(job.name)?.solved.is_some()
                {
                    let w = self.model.matrix(job.role)?;
                    learners.insert((layer, part), Learner::new(w.view(), matrix, self.params.0)?);
                }
            }
        }
        Ok((learners, matrices))
    }

    fn write(&self, mut learned: BTreeMap<(usize, Part), QuantizedMatrix>, judged: Judged) -> Result<()> {
        let ended = self.solved.ended()?;
        for (layer, jobs) in self.layers.iter().enumerate() {
            let from = self.solved.open_layer(layer)?;
            let router = super::router(self.model, self.plan, layer);
            let file = ended.create(layer, &declared(jobs), router.as_ref().map(|(name, shape)| (name.as_str(), *shape)))?;
            if let Some((name, _)) = &router {
                let (values, refit) = from.router(name)?;
                file.put_router(name, &values, &refit)?;
            }
            for job in jobs {
                let matrix = match job.role {
                    Role::Layer(layer, part) => learned.remove(&(layer, part)),
                    _ => None,
                };
                let report = from.report(job.name)?;
                match matrix {
                    Some(matrix) => file.put(job.name, &matrix, &Report { by: By::GptqLearned, ..report })?,
                    None => file.put(job.name, &from.matrix(job.name, job.shape, job.how)?, &report)?,
                }
            }
            file.finish()?;
        }
        ended.finish_ended(&judged)
    }
}

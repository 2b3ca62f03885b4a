//! Does what the plan says: the only loop over layers that writes.
//!
//! [`solve`] chooses every matrix's codes and leaves them in `DIR/solved`, one file a layer ([`crate::solved`]); [`write`] turns
//! those into the formats asked for. There is no threshold, no default and no fallback here: what the plan does not say is an error.
//!
//! **Rounding** reads one matrix after the other. **GPTQ** is the second pass: samples go through the original model layer by layer
//! (so every layer sees the inputs it has there, order `independent`), and each site's second moment is solved and dropped as soon as
//! its rows have all been seen. The hidden states between two layers are kept on disk: a run that was killed goes on after the last
//! finished layer, with the same bytes.
//!
//! Order `sequential` is [`sequential`]'s.
//!
//! **Memory**, beside the forward pass's own (`calib::forward`). Rounding holds matrices of at most twice the weights of the layer's
//! largest at once, each in f32 with its codes: under `4 · 4` bytes a weight of the largest (tests/memory.rs holds it to that). GPTQ holds
//! for every site in flight, with `K` inputs, `12 · K²` bytes while its moment is factorized and `4 · K²` while its matrices are solved, one
//! after the other, with 12 bytes a weight; a layer with experts that the plan blends also rows that stand for all of its tokens
//! (`crate::blend`). One Qwen3-30B-A3B-shaped layer (128 experts of 2048 × 768, 8192 tokens, 2 threads) peaks at
//! 621 MiB of anonymous memory; its experts alone are 1.2 GB in bf16.

mod aim;
mod end;
mod learned;
mod moments;
mod output;
mod sequential;
#[cfg(test)]
mod tests;
mod tokens;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use calib::arch::{Part, Role};
use calib::backward::{self, OutputMoments};
use calib::device::{Cpu, Device, Job as DeviceJob};
use calib::forward::{NoTap, Options, Tap, decoder_layer};
use calib::pass::{Stream, stream_layers};
use calib::progress::Progress;
use calib::{Model, Weights};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use output::{contents_of, write};
pub(crate) use tokens::boxed;
pub use work::{Gone, gone};

use crate::constants::Outputs;
use crate::objective::{OutputWeight, TokenWeights};
use crate::plan::{Action, Plan, Solver as Who};
use crate::quantize::rtn::{self, rtn};
use crate::quantize::{Quantizer, Refine, hqq};
use crate::repair::Order;
use crate::solved::{By, Judged, LayerFile, Refit, Report, Solved};
use crate::{Error, Result};
use moments::{Keep, Write as WriteMoments};
use work::Job;

/// What solving a model came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Decoder layers.
    pub layers: usize,
    /// Layers that an earlier run had finished.
    #[serde(skip)]
    pub resumed: usize,
    /// Matrices, by how their codes were chosen.
    pub matrices: BTreeMap<By, usize>,
    /// Matrices that the plan solves against their layer's tokens too, because few reached them.
    pub blended: usize,
    /// Matrices that the plan rounds instead of solving, because few tokens reached them.
    pub rounded: usize,
    /// Sum of `tr(ΔW · H · ΔWᵀ)` over the matrices that were solved against tokens.
    pub loss: f64,
    /// Matrices whose second moment took more damping than was asked for, and how much, as a share of its mean diagonal.
    pub damped: BTreeMap<String, f64>,
    /// Routers that were fitted, by layer.
    pub routers: BTreeMap<usize, Refit>,
    /// What steps against the end of the model came to: nats on calibration samples that no step saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<Judged>,
}

/// Chooses the codes of every matrix that the plan quantizes, and leaves them under `dir` (`OUT/moepress`).
///
/// Goes on after the last layer that an earlier run of the same plan finished. `samples` are token ids, and are needed where the plan's
/// quantizer solves against tokens. The bits do not depend on the number of threads, nor on interruptions.
///
/// # Errors
///
/// [`Error::OtherModel`], [`Error::PlanMisfit`], [`Error::OtherPlan`], [`Error::NoSamples`] before any work; [`Error::Unreached`]; whatever
/// reading the model, the forward pass, a quantizer or writing brings up.
pub fn solve(
    model: &Model,
    plan: &Plan,
    samples: Option<&[Vec<u32>]>,
    dir: &Path,
    device: Device,
    progress: &dyn Progress,
) -> Result<Outcome> {
    let layers = work::by_layer(model, plan)?;
    let dropped = work::dropped(model, plan, dir)?;
    let solved = Solved::begin(dir, plan, layers.len())?;
    let resumed = solved.done();
    let snapshots = solved.snapshots();
    let rest = &layers[resumed..];
    let keep = Keep::new(dir, plan)?;
    let refits = plan.tensors.values().any(|action| *action == Action::Refit);
    let weights = TokenWeights::new(dir, &plan.model, plan.corpus.as_deref().unwrap_or_default(), &plan.end_loss);
    let kept = keep.as_ref().map(|keep| keep.all(plan, rest, resumed)).transpose()?.flatten();
    if kept.is_none() && (refits || rest.iter().flatten().any(|job| job.needs_tokens(plan))) {
        let ids = samples.ok_or(Error::NoSamples)?;
        // A snapshot is only as good as the layers before it.
        if snapshots.next_layer()?.is_some_and(|next| next > resumed) {
            snapshots.remove()?;
        }
        let stream = Stream { weights: model, ids, snapshots: Some(&snapshots), progress };
        let (keep, outputs) = (keep.as_ref(), output_moments(model, plan, &layers, ids, device, progress)?);
        device.run(Run { stream, model, plan, layers: &layers, solved: &solved, dropped: &dropped, weights, keep, outputs })?;
    } else {
        if kept.is_some() {
            tracing::info!("second moments that an earlier plan kept: no forward pass");
        }
        progress.start("layers", rest.len() as u64);
        for (layer, jobs) in layers.iter().enumerate().skip(resumed) {
            let file = solved.create(layer, &declared(jobs), None)?;
            round(model, plan, jobs, &file)?;
            if let Some(moments) = kept.as_ref().and_then(|kept| kept.get(layer - resumed))
                && let Some(solver) = tokens::Solver::new(model, plan, (layer, jobs), &file, &weights)?
            {
                solver.solve_kept(moments, Options::of::<Cpu>().in_flight)?;
            }
            file.finish()?;
            progress.tick(1);
        }
        progress.finish();
    }
    snapshots.remove()?;
    solved.snapshots_of("original.safetensors").remove()?;
    if let (Some(Refine::Learned(params @ learned::Params { end: Some(end), .. })), None) = (&plan.refine, solved.judged()?) {
        let ids = samples.ok_or(Error::NoSamples)?;
        device.run(end::Ending { model, plan, layers: &layers, solved: &solved, ids, params: (params, end), progress })?;
    }
    outcome(model, plan, &solved, (&layers, resumed))
}

/// Second moments of the gradients at the outputs of the matrices that are solved, where the objective lets them count.
fn output_moments(
    model: &Model,
    plan: &Plan,
    layers: &[Vec<Job<'_>>],
    ids: &[Vec<u32>],
    device: Device,
    progress: &dyn Progress,
) -> Result<Option<OutputMoments>> {
    if plan.objective.output_weight == OutputWeight::None {
        return Ok(None);
    }
    let roles: BTreeSet<Role> = layers.iter().flatten().filter(|job| job.needs_tokens(plan)).map(|job| job.role).collect();
    let wanted = |layer, part| roles.contains(&Role::Layer(layer, part));
    Ok(Some(device.run(backward::Outputs { weights: model, ids, params: &plan.end_loss, wanted: &wanted, progress })?))
}

/// The second pass: tokens go through the original layers, and each layer's matrices are solved on the way.
struct Run<'a> {
    stream: Stream<'a>,
    model: &'a Model,
    plan: &'a Plan,
    layers: &'a [Vec<Job<'a>>],
    solved: &'a Solved,
    /// What dropped experts put out.
    dropped: &'a Outputs,
    weights: TokenWeights,
    keep: Option<&'a Keep>,
    /// Second moments of the gradients at outputs, where they count.
    outputs: Option<OutputMoments>,
}

impl DeviceJob for Run<'_> {
    type Output = Result<()>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<()> {
        if self.plan.repair.order == Order::Sequential {
            let mut beside = self.beside::<B>(device)?;
            let each = &mut |layer, hidden: &mut [Tensor<B, 3>]| self.sequential(layer, hidden, beside.as_mut()).map_err(tokens::boxed);
            stream_layers::<B>(&self.stream, device, each)?;
            return Ok(());
        }
        stream_layers::<B>(&self.stream, device, &mut |layer, hidden| self.layer(layer, hidden).map_err(tokens::boxed))?;
        Ok(())
    }
}

impl Run<'_> {
    fn layer<B: Backend>(&self, layer: usize, hidden: &mut [Tensor<B, 3>]) -> Result<()> {
        let (options, jobs) = (Options::of::<B>(), &self.layers[layer]);
        // Killed after a layer's file was finished and before its hidden states were: they are made again.
        if self.solved.path(layer).exists() {
            return Ok(decoder_layer(self.model, layer, hidden, &NoTap, options)?);
        }
        let file = self.solved.create(layer, &declared(jobs), None)?;
        round(self.model, self.plan, jobs, &file)?;
        let waiting = self.waiting();
        let inputs = waiting.as_ref().map(|_| hidden.to_vec());
        let solver = tokens::Solver::new(self.model, self.plan, (layer, jobs), &file, &self.weights)?;
        let moments = self.keep.map(|keep| keep.create(layer, self.plan, jobs)).transpose()?;
        let solver = solver.map(|solver| {
            let waiting = waiting.as_ref().map(|(waiting, _)| waiting);
            solver.with_outputs(self.outputs.as_ref()).handing(waiting).storing(moments.as_ref())
        });
        let tap: &dyn Tap<B> = match &solver {
            Some(solver) => solver,
            None => &NoTap,
        };
        decoder_layer(self.model, layer, hidden, tap, options)?;
        drop(solver);
        moments.map_or(Ok(()), WriteMoments::finish)?;
        if let (Some((waiting, params)), Some(inputs)) = (waiting, inputs) {
            let at = learned::Layer { model: self.model, rest: self.model, layer, inputs: &inputs, targets: hidden };
            waiting.finish(&at, params, &file)?;
        }
        file.finish()
    }

    /// Where a layer's solved matrices wait to be learned from, if they are to be.
    fn waiting(&self) -> Option<(learned::Waiting, &learned::Params)> {
        match &self.plan.refine {
            Some(Refine::Learned(params)) => Some((learned::Waiting::default(), params)),
            Some(Refine::Descent(_)) | None => None,
        }
    }
}

/// A layer's router, if it is to be fitted: name and `[experts, hidden]`.
fn router(model: &Model, plan: &Plan, layer: usize) -> Option<(String, [usize; 2])> {
    let name = model.layout().name(Role::Layer(layer, Part::Router))?;
    let moe = model.spec().moe(layer)?;
    matches!(plan.tensors.get(name), Some(Action::Refit)).then(|| (name.to_owned(), [moe.experts, model.spec().hidden]))
}

fn declared<'a>(jobs: &[Job<'a>]) -> Vec<(&'a str, [usize; 2], &'a crate::plan::Quantize)> {
    jobs.iter().map(|job| (job.name, job.shape, job.how)).collect()
}

/// Rounds the matrices that need no tokens, a few at a time.
fn round(model: &Model, plan: &Plan, jobs: &[Job<'_>], file: &LayerFile) -> Result<()> {
    let jobs: Vec<Job<'_>> = jobs.iter().filter(|job| !job.needs_tokens(plan)).cloned().collect();
    let params = rounding(plan);
    let largest = jobs.iter().map(Job::weights).max().unwrap_or(0);
    for run in work::runs(&jobs, 2 * largest) {
        run.par_iter().try_for_each(|job| {
            let (w, width) = (model.matrix(job.role)?, job.how.width());
            let (matrix, by) = match (&plan.quantizer, &job.how.solver) {
                (Some(Quantizer::Hqq(_)), Who::Planned) => (hqq::hqq(w.view(), &width)?, By::Hqq),
                _ => (rtn(w.view(), &width, &params)?, By::Rtn),
            };
            file.put(job.name, &matrix, &Report { by, solved: None, learned: None })
        })?;
    }
    Ok(())
}

/// The knobs of rounding: the plan's own, or GPTQ's search for scales where the plan rounds what it cannot solve.
fn rounding(plan: &Plan) -> rtn::Params {
    match &plan.quantizer {
        Some(Quantizer::Rtn(params)) => params.clone(),
        Some(Quantizer::Gptq(params)) => rtn::Params { clips: params.clips },
        Some(Quantizer::Hqq(_) | Quantizer::Pmq(_)) | None => rtn::Params::default(),
    }
}

fn outcome(model: &Model, plan: &Plan, solved: &Solved, (layers, resumed): (&[Vec<Job<'_>>], usize)) -> Result<Outcome> {
    let mut outcome = Outcome { layers: layers.len(), resumed, end: solved.judged()?, ..Outcome::default() };
    for (layer, jobs) in layers.iter().enumerate() {
        let file = solved.open(layer)?;
        let router = model.layout().name(Role::Layer(layer, Part::Router));
        if let Some(name) = router.filter(|name| plan.tensors.get(*name) == Some(&Action::Refit)) {
            outcome.routers.insert(layer, file.router(name)?.1);
        }
        for job in jobs {
            let report = file.report(job.name)?;
            *outcome.matrices.entry(report.by).or_default() += 1;
            outcome.blended += usize::from(matches!(job.how.solver, Who::Blended { .. }));
            outcome.rounded += usize::from(matches!(job.how.solver, Who::Rounded { .. }));
            if let (Some(account), Some(Quantizer::Gptq(params))) = (&report.solved, &plan.quantizer)
                && account.damping > params.damping
            {
                outcome.damped.insert(job.name.to_owned(), account.damping);
            }
            outcome.loss += report.solved.map_or(0.0, |account| account.loss.undamped);
        }
    }
    Ok(outcome)
}

//! Order `sequential`: every layer is solved on what the compressed layers before it give.
//!
//! A layer takes four steps. Attention is solved on the disturbed hidden states. The router is fitted to what then enters the experts,
//! where the plan says so. Experts are solved on a second run of the layer, with its attention compressed. Then the finished
//! layer carries the hidden states on. So attention runs four times and every expert twice.
//!
//! Where something aims at the original ([`propagate`](crate::repair::propagate), the router), the original model's hidden states
//! stream along, one layer ahead, and a layer's original inputs are kept while it is solved.
//!
//! **Memory**, beside the independent order's: one more copy of the hidden states, `4` bytes a weight of the layer's attention, and
//! with the original beside it `4 · R · (3·d + q + E)` bytes for `R` tokens, hidden width `d`, queries `q` wide and `E` experts.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use calib::arch::{Part, Role, Spec};
use calib::forward::{NoTap, Options, attention_alone, decoder_layer, embed, values};
use calib::linalg::product;
use calib::pass::Snapshots;
use calib::{Applied, Model, Weights};
use ndarray::{Array1, Array2, ArrayView2};

use super::aim::{Choices, Original, overlap};
use super::learned::{Layer, Waiting};
use super::work::Job;
use super::{Run, declared, output, round, router, tokens};
use crate::constants::{Constant, Outputs};
use crate::plan::{Action, Plan};
use crate::repair::refit;
use crate::solved::{LayerFile, LayerRead, Refit};
use crate::{Error, Result};

/// The original model with some of a layer's matrices replaced.
struct Overlay<'a> {
    model: &'a Model,
    replaced: BTreeMap<Role, Array2<f32>>,
}

impl Weights for Overlay<'_> {
    fn spec(&self) -> &Spec {
        self.model.spec()
    }

    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        self.replaced.get(&role).map_or_else(|| self.model.matrix(role), |matrix| Ok(matrix.clone()))
    }

    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.model.vector(role)
    }
}

/// A finished layer: what its file holds, and the original for the rest.
struct Finished<'a> {
    model: &'a Model,
    plan: &'a Plan,
    file: LayerRead,
    dropped: &'a Outputs,
}

impl Finished<'_> {
    fn read(&self, role: Role) -> Result<Array2<f32>> {
        let name = self.model.layout().name(role).unwrap_or_default();
        let shape = self.model.checkpoint().info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let matrix_shape = || <[usize; 2]>::try_from(shape.clone()).map_err(|shape| Error::NotAMatrix { name: name.to_owned(), shape });
        match self.plan.tensors.get(name) {
            Some(Action::Quantize(how)) => Ok(self.file.matrix(name, matrix_shape()?, how)?.dequantize()),
            Some(Action::Refit) => router_of(name, matrix_shape()?, &self.file),
            _ => Ok(self.model.matrix(role)?),
        }
    }
}

impl Weights for Finished<'_> {
    fn spec(&self) -> &Spec {
        self.model.spec()
    }

    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        self.read(role).map_err(tokens::boxed)
    }

    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.model.vector(role)
    }

    fn applied(&self, layer: usize, expert: usize) -> calib::Result<Option<Box<dyn Applied>>> {
        let inner = self.spec().moe(layer).map_or(0, |moe| moe.inner);
        let constant = |output: &Vec<f32>| Box::new(Constant { output: output.clone(), inner }) as Box<dyn Applied>;
        Ok(self.dropped.get(&(layer, expert)).map(constant))
    }
}

/// A fitted router of a layer's file.
fn router_of(name: &str, shape: [usize; 2], file: &LayerRead) -> Result<Array2<f32>> {
    let (values, _) = file.router(name)?;
    let misfit = |_| Error::PlanMisfit { name: name.to_owned(), what: "the fitted router has another shape" };
    Array2::from_shape_vec(shape, values).map_err(misfit)
}

/// The router that a layer's file holds, if it was fitted.
pub(super) fn fitted(model: &Model, plan: &Plan, layer: usize, file: &LayerRead) -> Result<Option<(Role, Array2<f32>)>> {
    let Some((name, shape)) = router(model, plan, layer) else { return Ok(None) };
    Ok(Some((Role::Layer(layer, Part::Router), router_of(&name, shape, file)?)))
}

/// The original model's hidden states, which stream along.
pub(super) struct Beside<B: Backend> {
    /// What enters the layer `next`.
    hidden: Vec<Tensor<B, 3>>,
    next: usize,
    snapshots: Snapshots,
}

impl<B: Backend> Beside<B> {
    /// At the layer that the snapshot enters, or at the first.
    fn open(run: &Run<'_>, device: &B::Device) -> Result<Self> {
        let snapshots = run.solved.snapshots_of("original.safetensors");
        let (next, hidden) = match snapshots.load::<B>(device)? {
            Some(found) => found,
            None => (0, embed(run.model, run.stream.ids, device)?),
        };
        Ok(Self { hidden, next, snapshots })
    }

    /// Moves on to what enters `layer`. A run that was killed between two snapshots has this one a layer ahead: it starts over.
    fn reach(&mut self, run: &Run<'_>, layer: usize) -> Result<()> {
        if self.next > layer {
            let device = self.hidden.first().map(Tensor::device).unwrap_or_default();
            (self.next, self.hidden) = (0, embed(run.model, run.stream.ids, &device)?);
        }
        while self.next < layer {
            decoder_layer(run.model, self.next, &mut self.hidden, &NoTap, Options::of::<B>())?;
            self.next += 1;
        }
        Ok(())
    }

    /// Runs `layer`, and keeps what enters its sites.
    fn run(&mut self, run: &Run<'_>, layer: usize) -> Result<Original> {
        self.reach(run, layer)?;
        let kept = Original::new(run.plan.repair.propagate.is_some());
        decoder_layer(run.model, layer, &mut self.hidden, &kept, Options::of::<B>())?;
        self.next += 1;
        Ok(kept)
    }

    /// Writes the hidden states, if more layers are to come.
    fn save(&self, layers: usize) -> Result<()> {
        if self.next < layers { Ok(self.snapshots.save(self.next, &self.hidden)?) } else { Ok(()) }
    }
}

impl Run<'_> {
    /// The original model's hidden states, where something aims at them.
    pub(super) fn beside<B: Backend>(&self, device: &B::Device) -> Result<Option<Beside<B>>> {
        let repair = &self.plan.repair;
        let wanted = repair.propagate.is_some() || repair.router_repair.is_some() || self.waiting().is_some();
        wanted.then(|| Beside::open(self, device)).transpose()
    }

    /// Solves a layer on the hidden states of the compressed layers before it, and carries them on.
    pub(super) fn sequential<B: Backend>(&self, layer: usize, hidden: &mut [Tensor<B, 3>], beside: Option<&mut Beside<B>>) -> Result<()> {
        let layers = self.layers.len();
        if self.solved.path(layer).exists() {
            // Killed after the layer's file was finished: its outputs are made again.
            self.carry_on(layer, hidden)?;
            return beside.map_or(Ok(()), |beside| {
                beside.reach(self, layer + 1)?;
                beside.save(layers)
            });
        }
        let jobs = &self.layers[layer];
        let router = router(self.model, self.plan, layer);
        let file = self.solved.create(layer, &declared(jobs), router.as_ref().map(|(name, shape)| (name.as_str(), *shape)))?;
        round(self.model, self.plan, jobs, &file)?;
        let mut beside = beside;
        let original = beside.as_mut().map(|beside| beside.run(self, layer)).transpose()?;
        let waiting = self.waiting();
        let rest = self.solve_layer(layer, hidden, (&file, router), (original.as_ref(), waiting.as_ref().map(|(waiting, _)| waiting)))?;
        if let (Some((waiting, params)), Some(beside)) = (waiting, &beside) {
            let at = Layer { model: self.model, rest: &rest, layer, inputs: hidden, targets: &beside.hidden };
            waiting.finish(&at, params, &file)?;
        }
        file.finish()?;
        self.carry_on(layer, hidden)?;
        beside.map_or(Ok(()), |beside| beside.save(layers))
    }

    fn carry_on<B: Backend>(&self, layer: usize, hidden: &mut [Tensor<B, 3>]) -> Result<()> {
        let file = self.solved.open(layer)?;
        let finished = Finished { model: self.model, plan: self.plan, file, dropped: self.dropped };
        Ok(decoder_layer(&finished, layer, hidden, &NoTap, Options::of::<B>())?)
    }

    /// Attention, then the router, then what stands behind it; gives the layer with its attention compressed and its router fitted.
    fn solve_layer<B: Backend>(
        &self,
        layer: usize,
        hidden: &[Tensor<B, 3>],
        (file, router): (&LayerFile, Option<(String, [usize; 2])>),
        (original, waiting): (Option<&Original>, Option<&Waiting>),
    ) -> Result<Overlay<'_>> {
        let options = Options::of::<B>();
        let (attention, rest): (Vec<Job<'_>>, Vec<Job<'_>>) = self.layers[layer].iter().cloned().partition(Job::is_attention);
        let aim = original.filter(|_| self.plan.repair.propagate.is_some());
        let mut overlay = Overlay { model: self.model, replaced: BTreeMap::new() };
        if let Some(solver) = tokens::Solver::new(self.model, self.plan, (layer, &attention), file, &self.weights)? {
            let solver = solver.aiming(aim).with_outputs(self.outputs.as_ref()).keeping().handing(waiting);
            attention_alone(self.model, layer, hidden, &solver, options)?;
            overlay.replaced = solver.into_kept();
        }
        let fitted = match (router, original) {
            (Some((name, _)), Some(original)) => Some(self.fit(layer, hidden, &mut overlay, (name, original))?),
            _ => None,
        };
        let solver = tokens::Solver::new(self.model, self.plan, (layer, &rest), file, &self.weights)?;
        let solver = solver.map(|solver| solver.aiming(aim).with_outputs(self.outputs.as_ref()).handing(waiting));
        if solver.is_none() && fitted.is_none() {
            return Ok(overlay);
        }
        let seen = Choices::over(solver.as_ref());
        let mut copy = hidden.to_vec();
        decoder_layer(&overlay, layer, &mut copy, &seen, options)?;
        if let (Some(Fitted { name, values, before }), Some(original)) = (fitted, original) {
            let overlap_after = overlap(&original.chosen(), &seen.chosen());
            let tokens = hidden.iter().map(|x| (x.dims()[0] * x.dims()[1]) as u64).sum();
            file.put_router(&name, &values, &Refit { tokens, overlap_before: before, overlap_after })?;
        }
        Ok(overlay)
    }

    /// Fits the layer's router to what enters the experts behind compressed attention, and puts it into `overlay`.
    fn fit<B: Backend>(
        &self,
        layer: usize,
        hidden: &[Tensor<B, 3>],
        overlay: &mut Overlay<'_>,
        (name, original): (String, &Original),
    ) -> Result<Fitted> {
        let role = Role::Layer(layer, Part::Router);
        let (w, width) = (self.model.matrix(role)?, self.model.spec().hidden);
        let mut rows = Vec::new();
        for batch in attention_alone(overlay, layer, hidden, &NoTap, Options::of::<B>())? {
            rows.extend(values(batch, "what enters the experts")?);
        }
        let misfit = |_| Error::PlanMisfit { name: name.clone(), what: "its inputs have another width" };
        let x = ArrayView2::from_shape((rows.len() / width, width), &rows).map_err(misfit)?;
        let (logits, chosen) = (original.logits(), original.chosen());
        let logits = ArrayView2::from_shape((x.nrows(), w.nrows()), &logits).map_err(misfit)?;
        let before = match self.model.spec().moe(layer) {
            Some(moe) => {
                let disturbed = product(x, w.t()).into_iter().collect();
                let correction =
                    moe.router.correction.then(|| self.model.vector(Role::Layer(layer, Part::RouterCorrection))).transpose()?;
                let correction = correction.as_ref().and_then(|c| c.as_slice());
                let at = calib::forward::router::At { layer, first: 0 };
                overlap(&chosen, &calib::forward::router::route(moe, correction, disturbed, at)?.chosen)
            }
            None => 1.0,
        };
        let params = self.plan.repair.router_repair.clone().unwrap_or_default();
        let counts = refit::near_the_boundary(logits, chosen.len() / x.nrows().max(1));
        let fitted = refit::fit(w.view(), x, logits, &counts, &params)?;
        let values = output::rounded_as_kept(self.model, &name, &fitted.iter().copied().collect::<Vec<f32>>())?;
        overlay.replaced.insert(role, Array2::from_shape_vec(w.dim(), values.clone()).map_err(misfit)?);
        Ok(Fitted { name, values, before })
    }
}

/// A fitted router, row by row, and how many of the original's choices the router made as it was.
struct Fitted {
    name: String,
    values: Vec<f32>,
    before: f64,
}

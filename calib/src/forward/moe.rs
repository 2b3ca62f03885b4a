//! The second half of a decoder layer: a gated MLP, or routed experts with an optional shared one.

use std::sync::Arc;

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData, activation::sigmoid, activation::silu, backend::Backend};

use ndarray::Array2;

use super::adjoint::SiteRows;
use super::layer::{Context, Experts};
use super::linear::{Linear, Source, check};
use super::parallel::{in_blocks, on_cpu, together};
use super::router::{At, route};
use super::tap::{Routed, Routing};
use crate::arch::{Moe, Part, Projection, Role, Shared, Site};
use crate::{Applied, Error, Result};

/// Most rows of one expert that are run at once.
pub(crate) const CHUNK: usize = 8192;

/// `W_d (silu(W_g x) ⊙ (W_u x))`.
#[derive(Clone, Debug)]
pub(crate) struct GatedMlp<B: Backend> {
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> GatedMlp<B> {
    /// Loads the three matrices that `part` names; `inner` is the width between them.
    pub fn load(source: &Source<'_, B>, part: impl Fn(Projection) -> Part, inner: usize) -> Result<Self> {
        let hidden = source.weights.spec().hidden;
        Ok(Self {
            gate: source.linear(part(Projection::Gate), None, [inner, hidden])?,
            up: source.linear(part(Projection::Up), None, [inner, hidden])?,
            down: source.linear(part(Projection::Down), None, [hidden, inner])?,
        })
    }

    /// What the gate and the up projection give, `[rows, inner]` each.
    fn gates(&self, x: Tensor<B, 2>) -> [Tensor<B, 2>; 2] {
        [self.gate.apply(x.clone()), self.up.apply(x)]
    }

    /// The down projection, `[rows, hidden]`.
    pub fn down(&self, activation: Tensor<B, 2>) -> Tensor<B, 2> {
        self.down.apply(activation)
    }

    /// From the rows `x` that entered and `dy`, the gradient at the weighted output, both `[rows, hidden]`; `weights` is what
    /// the output is multiplied by, `[rows, 1]`. `sites` name the rows, `part` the matrices.
    pub fn backward(
        &self,
        x: Tensor<B, 2>,
        dy: Tensor<B, 2>,
        weights: Option<Tensor<B, 2>>,
        (sites, part): ([Site; 2], impl Fn(Projection) -> Part),
    ) -> MlpAdjoint<B> {
        let (gate, up) = (self.gate.apply(x.clone()), self.up.apply(x.clone()));
        let silu = silu(gate.clone());
        let activation = silu.clone() * up.clone();
        let unweighted = self.down.backward(dy.clone());
        let weight = (unweighted.clone() * activation.clone()).sum_dim(1);
        let (dy, d_activation) = match weights {
            Some(weights) => (dy * weights.clone(), unweighted * weights),
            None => (dy, unweighted),
        };
        // silu'(g) = σ + g·σ·(1 − σ) = σ + silu·(1 − σ)
        let sigmoid = sigmoid(gate);
        let slope = sigmoid.clone() + silu.clone() * (sigmoid.neg() + 1.0);
        let (d_gate, d_up) = (d_activation.clone() * up * slope, d_activation * silu);
        let input = self.gate.backward(d_gate.clone()) + self.up.backward(d_up.clone());
        let outputs = vec![(part(Projection::Gate), d_gate), (part(Projection::Up), d_up)];
        let enter = SiteRows { site: sites[0], rows: x, outputs };
        let down = SiteRows { site: sites[1], rows: activation, outputs: vec![(part(Projection::Down), dy)] };
        MlpAdjoint { input, weight, sites: [enter, down] }
    }

    /// Runs every row of every batch, shows the rows at the two sites, and hands each batch's output to `then`.
    pub fn run_all(
        &self,
        context: &Context<'_, B>,
        [enter, down]: [Site; 2],
        batches: &[Tensor<B, 2>],
        mut then: impl FnMut(usize, Tensor<B, 2>) -> Result<()>,
    ) -> Result<()> {
        let wants = |site| context.tap.wants(context.layer, site);
        let task = |(index, x): (usize, &Tensor<B, 2>)| {
            let gates = self.gates(x.clone());
            let shown = context.tap.wants_gates().then(|| gates.clone());
            let activation = activate(gates);
            let kept = wants(down).then(|| activation.clone());
            Ok((index, shown, kept, self.down(activation)))
        };
        in_blocks(context.options.in_flight, batches.iter().enumerate(), task, |(index, shown, kept, out)| {
            if let Some([gate, up]) = shown {
                context.tap.gates(context.layer, down, &gate, &up, None)?;
            }
            if wants(enter) {
                context.tap.rows(context.layer, enter, &batches[index], None)?;
            }
            if let Some(activation) = kept {
                context.tap.rows(context.layer, down, &activation, None)?;
            }
            then(index, out)
        })?;
        context.done([enter, down])
    }
}

/// `silu(gate) ⊙ up`.
fn activate<B: Backend>([gate, up]: [Tensor<B, 2>; 2]) -> Tensor<B, 2> {
    silu(gate) * up
}

/// What a gated MLP gives on the way back.
pub(crate) struct MlpAdjoint<B: Backend> {
    /// The gradient at the rows that entered, `[rows, hidden]`.
    pub input: Tensor<B, 2>,
    /// The gradient at the weight of each row, `[rows, 1]`.
    pub weight: Tensor<B, 2>,
    /// What entered gate and up, and what entered down.
    pub sites: [SiteRows<B>; 2],
}

/// A block of routed experts.
#[derive(Clone, Debug)]
pub(crate) struct MoeBlock<B: Backend> {
    pub(crate) moe: Moe,
    pub(crate) router: Linear<B>,
    pub(crate) correction: Option<Vec<f32>>,
    pub(crate) shared: Option<SharedExpert<B>>,
    /// All routed experts, where they are held.
    resident: Option<Vec<Routable<B>>>,
}

/// A routed expert, ready to run.
#[derive(Clone, Debug)]
enum Routable<B: Backend> {
    /// Its matrices are multiplied here.
    Matrices(GatedMlp<B>),
    /// It multiplies rows itself.
    Applied(Arc<dyn Applied>),
}

impl<B: Backend> Routable<B> {
    fn load(source: &Source<'_, B>, moe: &Moe, index: usize) -> Result<Self> {
        Ok(match source.weights.applied(source.layer, index)? {
            Some(applied) => Self::Applied(applied.into()),
            None => Self::Matrices(expert(source, moe, index)?),
        })
    }

    fn gates(&self, x: Tensor<B, 2>) -> Result<[Tensor<B, 2>; 2]> {
        match self {
            Self::Matrices(mlp) => Ok(mlp.gates(x)),
            Self::Applied(applied) => {
                let (rows, device) = (x.dims()[0], x.device());
                Ok(applied.gates(&values(x, "expert inputs")?).map(|out| rows_of(out, rows, &device)))
            }
        }
    }

    fn down(&self, x: Tensor<B, 2>) -> Result<Tensor<B, 2>> {
        match self {
            Self::Matrices(mlp) => Ok(mlp.down(x)),
            Self::Applied(applied) => {
                let (rows, device) = (x.dims()[0], x.device());
                Ok(rows_of(applied.down(&values(x, "expert activations")?), rows, &device))
            }
        }
    }
}

fn rows_of<B: Backend>(values: Vec<f32>, rows: usize, device: &B::Device) -> Tensor<B, 2> {
    let width = values.len() / rows.max(1);
    Tensor::from_data(TensorData::new(values, [rows, width]), device)
}

/// An expert that every token passes.
#[derive(Clone, Debug)]
pub(crate) struct SharedExpert<B: Backend> {
    pub(crate) mlp: GatedMlp<B>,
    pub(crate) gate: Option<Linear<B>>,
}

/// The rows that an expert was given.
#[derive(Clone, Debug, Default)]
pub(crate) struct Load {
    pub(crate) tokens: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

/// A chunk of an expert's weighted output, and the rows that it belongs to.
pub(crate) struct Output<B: Backend> {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) rows: Tensor<B, 2>,
}

/// Consecutive rows of a chunk that lie in one batch.
pub(crate) struct Piece {
    batch: usize,
    /// Rows within the batch, rising.
    rows: Vec<i32>,
}

impl<B: Backend> MoeBlock<B> {
    pub fn load(source: &Source<'_, B>, moe: &Moe, experts: Experts) -> Result<Self> {
        let held = || (0..moe.experts).map(|index| Routable::load(source, moe, index)).collect::<Result<_>>();
        Ok(Self {
            router: source.linear(Part::Router, None, [moe.experts, source.weights.spec().hidden])?,
            correction: moe.router.correction.then(|| correction(source, moe)).transpose()?,
            shared: moe.shared.as_ref().map(|shared| SharedExpert::load(source, shared)).transpose()?,
            resident: (experts == Experts::Resident).then(held).transpose()?,
            moe: moe.clone(),
        })
    }

    /// Adds the block's output for `normed` rows to `residual`, batch by batch `[rows, hidden]`.
    pub fn forward(&self, context: &Context<'_, B>, normed: &[Tensor<B, 2>], residual: &mut [Tensor<B, 2>]) -> Result<()> {
        let loads = self.choose(context, normed)?;
        let mut shown = context.tap.wants_blocks().then(|| normed.iter().map(Tensor::zeros_like).collect::<Vec<_>>());
        let starts = starts(normed);
        let rows = normed.iter().map(|x| x.dims()[0]).sum();
        for block in blocks(&loads, context.options.in_flight, rows) {
            let task = |expert| self.run_expert(context, normed, &starts, expert, &loads[expert]);
            for output in together(block, task)?.into_iter().flatten() {
                add(output, residual, shown.as_deref_mut())?;
            }
        }
        if let Some(shown) = &shown {
            context.show_all("moe.routed_out", shown)?;
        }
        if let Some(shared) = &self.shared {
            shared.forward(context, normed, |batch, out| {
                accumulate(&mut residual[batch], out.clone());
                shown.iter_mut().for_each(|shown| accumulate(&mut shown[batch], out.clone()));
                Ok(())
            })?;
        }
        shown.map_or(Ok(()), |shown| context.show_all("moe.out", &shown))
    }

    /// Routes all rows; the rows of each expert.
    pub(crate) fn choose(&self, context: &Context<'_, B>, normed: &[Tensor<B, 2>]) -> Result<Vec<Load>> {
        let mut loads = vec![Load::default(); self.moe.experts];
        let starts = starts(normed);
        let task = |(index, x): (usize, &Tensor<B, 2>)| {
            let logits = values(self.router.apply(x.clone()), "router logits")?;
            route(&self.moe, self.correction.as_deref(), logits, At { layer: context.layer, first: starts[index] })
        };
        in_blocks(context.options.in_flight, normed.iter().enumerate(), task, |routing| {
            context.tap.routing(context.layer, &routing)?;
            assign(&routing, &mut loads);
            Ok(())
        })?;
        if context.tap.wants_blocks() {
            context.show_all("moe.in", normed)?;
        }
        let given: Vec<u64> = loads.iter().map(|load| load.tokens.len() as u64).collect();
        context.tap.entered(context.layer, normed, &given)?;
        Ok(loads)
    }

    /// Runs one expert over its rows; its weighted outputs, chunk by chunk. Without rows its weights are not read, unless every row is
    /// wanted.
    fn run_expert(
        &self,
        context: &Context<'_, B>,
        normed: &[Tensor<B, 2>],
        starts: &[usize],
        expert: usize,
        load: &Load,
    ) -> Result<Vec<Output<B>>> {
        let (enter, down) = (Site::ExpertIn(expert), Site::ExpertDown(expert));
        let every = context.tap.wants_every_row();
        let mut outputs = Vec::new();
        if every || !load.tokens.is_empty() {
            let mlp = match &self.resident {
                Some(experts) => experts[expert].clone(),
                None => Routable::load(&context.source(), &self.moe, expert)?,
            };
            if every {
                show_every_row(context, normed, starts, (expert, load), &mlp)?;
            }
            let tap = context.tap;
            for (tokens, weights) in load.tokens.chunks(CHUNK).zip(load.weights.chunks(CHUNK)) {
                let pieces = pieces(tokens, starts);
                let x = gather(normed, &pieces, context.device);
                let routed = Routed { tokens: tokens.to_vec(), weights: weights.to_vec() };
                let activation = if every { activate(mlp.gates(x)?) } else { show_rows(context, expert, x, &routed, &mlp)? };
                let out = mlp.down(activation)?;
                tap.expert_output(context.layer, expert, &out, &routed)?;
                let weights = Tensor::from_data(TensorData::new(routed.weights, [tokens.len(), 1]), context.device);
                outputs.push(Output { pieces, rows: out * weights });
            }
        }
        context.done([enter, down])?;
        Ok(outputs)
    }
}

/// Shows rows at an expert's two sites; what enters its down projection.
fn show_rows<B: Backend>(
    context: &Context<'_, B>,
    expert: usize,
    x: Tensor<B, 2>,
    routed: &Routed,
    mlp: &Routable<B>,
) -> Result<Tensor<B, 2>> {
    let (enter, down, tap) = (Site::ExpertIn(expert), Site::ExpertDown(expert), context.tap);
    if tap.wants(context.layer, enter) {
        tap.rows(context.layer, enter, &x, Some(routed))?;
    }
    let gates = mlp.gates(x)?;
    if tap.wants_gates() {
        tap.gates(context.layer, down, &gates[0], &gates[1], Some(routed))?;
    }
    let activation = activate(gates);
    if tap.wants(context.layer, down) {
        tap.rows(context.layer, down, &activation, Some(routed))?;
    }
    Ok(activation)
}

/// Shows all rows at an expert's sites, in chunks that together, over the experts in flight, hold no more rows than there are.
fn show_every_row<B: Backend>(
    context: &Context<'_, B>,
    normed: &[Tensor<B, 2>],
    starts: &[usize],
    (expert, load): (usize, &Load),
    mlp: &Routable<B>,
) -> Result<()> {
    let rows: usize = normed.iter().map(|x| x.dims()[0]).sum();
    let step = rows.div_ceil(context.options.in_flight.max(1)).clamp(1, CHUNK);
    let mut chosen = load.tokens.iter().zip(&load.weights).peekable();
    for first in (0..rows).step_by(step) {
        let tokens: Vec<u32> = (first..rows.min(first + step)).map(|row| row as u32).collect();
        let weight = |&token: &u32| chosen.next_if(|(row, _)| **row == token).map_or(0.0, |(_, weight)| *weight);
        let routed = Routed { weights: tokens.iter().map(weight).collect(), tokens };
        let x = gather(normed, &pieces(&routed.tokens, starts), context.device);
        show_rows(context, expert, x, &routed, mlp)?;
    }
    Ok(())
}

impl<B: Backend> SharedExpert<B> {
    fn load(source: &Source<'_, B>, shared: &Shared) -> Result<Self> {
        let gate = || source.linear(Part::SharedGate, None, [1, source.weights.spec().hidden]);
        Ok(Self { mlp: GatedMlp::load(source, Part::Shared, shared.inner)?, gate: shared.gated.then(gate).transpose()? })
    }

    /// Runs every row and hands each batch's output to `then`.
    fn forward(
        &self,
        context: &Context<'_, B>,
        normed: &[Tensor<B, 2>],
        mut then: impl FnMut(usize, Tensor<B, 2>) -> Result<()>,
    ) -> Result<()> {
        self.mlp.run_all(context, [Site::SharedIn, Site::SharedDown], normed, |batch, out| match &self.gate {
            Some(gate) => then(batch, out * sigmoid(gate.apply(normed[batch].clone()))),
            None => then(batch, out),
        })
    }
}

/// Reads the selection bias, `[experts]`.
fn correction<B: Backend>(source: &Source<'_, B>, moe: &Moe) -> Result<Vec<f32>> {
    let role = Role::Layer(source.layer, Part::RouterCorrection);
    let bias = source.weights.vector(role)?;
    check(role, &[moe.experts], bias.shape())?;
    Ok(bias.to_vec())
}

/// Reads one routed expert.
pub(crate) fn expert<B: Backend>(source: &Source<'_, B>, moe: &Moe, expert: usize) -> Result<GatedMlp<B>> {
    GatedMlp::load(source, |projection| Part::Expert(expert, projection), moe.inner)
}

/// The values of a tensor, row by row; `what` names it in the error. Copies nothing on the CPU where the tensor is not shared.
///
/// # Errors
///
/// [`Error::Device`] if the device does not hand them out.
pub fn values<B: Backend, const D: usize>(x: Tensor<B, D>, what: &'static str) -> Result<Vec<f32>> {
    let failed = |message: String| Error::Device { what, message };
    let data = x.try_into_data().map_err(|e| failed(format!("{e:?}")))?;
    data.convert::<f32>().into_vec().map_err(|e| failed(format!("{e:?}")))
}

/// First row of each batch over all samples.
pub(crate) fn starts<B: Backend>(batches: &[Tensor<B, 2>]) -> Vec<usize> {
    let mut next = 0;
    let mut starts = Vec::with_capacity(batches.len());
    for batch in batches {
        starts.push(next);
        next += batch.dims()[0];
    }
    starts
}

/// Hands a batch's rows to the experts they chose.
fn assign(routing: &Routing, loads: &mut [Load]) {
    let chosen = routing.chosen.chunks_exact(routing.top_k).zip(routing.weights.chunks_exact(routing.top_k));
    for (row, (experts, weights)) in chosen.enumerate() {
        for (&expert, &weight) in experts.iter().zip(weights) {
            let load = &mut loads[expert as usize];
            load.tokens.push((routing.first + row) as u32);
            load.weights.push(weight);
        }
    }
}

/// Cuts the experts, in order, into blocks of at most `in_flight` that together were given no more than `cap` rows, or one
/// expert. With all rows as the cap, the outputs that wait are at most one more copy of the hidden states.
pub(crate) fn blocks(loads: &[Load], in_flight: usize, cap: usize) -> Vec<Vec<usize>> {
    let mut blocks: Vec<Vec<usize>> = Vec::new();
    let mut rows = 0;
    for (expert, load) in loads.iter().enumerate() {
        match blocks.last_mut() {
            Some(block) if block.len() < in_flight && rows + load.tokens.len() <= cap => block.push(expert),
            _ => {
                blocks.push(vec![expert]);
                rows = 0;
            }
        }
        rows += load.tokens.len();
    }
    blocks
}

/// Cuts rising rows over all samples at the bounds of the batches.
pub(crate) fn pieces(tokens: &[u32], starts: &[usize]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for &token in tokens {
        let batch = starts.partition_point(|&start| start <= token as usize) - 1;
        let row = (token as usize - starts[batch]) as i32;
        match pieces.last_mut() {
            Some(piece) if piece.batch == batch => piece.rows.push(row),
            _ => pieces.push(Piece { batch, rows: vec![row] }),
        }
    }
    pieces
}

/// Rows within a batch as an index tensor.
fn index<B: Backend>(rows: &[i32], device: &B::Device) -> Tensor<B, 1, Int> {
    Tensor::from_data(TensorData::new(rows.to_vec(), [rows.len()]), device)
}

/// Collects the rows of the pieces, `[rows, hidden]`.
pub(crate) fn gather<B: Backend>(batches: &[Tensor<B, 2>], pieces: &[Piece], device: &B::Device) -> Tensor<B, 2> {
    let mut parts: Vec<_> = pieces.iter().map(|piece| batches[piece.batch].clone().select(0, index(&piece.rows, device))).collect();
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 0) }
}

/// At most `most` rows of the batches, spread evenly over all of them, `[rows, hidden]`.
///
/// # Errors
///
/// As [`values`].
pub fn spread<B: Backend>(batches: &[Tensor<B, 2>], most: usize) -> Result<Array2<f32>> {
    let all: usize = batches.iter().map(|x| x.dims()[0]).sum();
    let width = batches.first().map_or(0, |x| x.dims()[1]);
    let count = all.min(most);
    let tokens: Vec<u32> = (0..count).map(|i| (i * all / count) as u32).collect();
    let mut rows = Vec::with_capacity(count * width);
    for piece in pieces(&tokens, &starts(batches)) {
        let batch = &batches[piece.batch];
        rows.extend(values(batch.clone().select(0, index(&piece.rows, &batch.device())), "what enters the experts")?);
    }
    Array2::from_shape_vec((count, width), rows).map_err(|e| Error::Device { what: "what enters the experts", message: e.to_string() })
}

/// Adds an expert's output to the rows that it belongs to.
pub(crate) fn add<B: Backend>(output: Output<B>, residual: &mut [Tensor<B, 2>], mut shown: Option<&mut [Tensor<B, 2>]>) -> Result<()> {
    let mut first = 0;
    for piece in &output.pieces {
        let values = output.rows.clone().narrow(0, first, piece.rows.len());
        first += piece.rows.len();
        if let Some(shown) = &mut shown {
            scatter(&mut shown[piece.batch], &piece.rows, values.clone())?;
        }
        scatter(&mut residual[piece.batch], &piece.rows, values)?;
    }
    Ok(())
}

/// `into[rows] += values`.
///
/// On the CPU in plain Rust: burn's flex copies the whole target for every call (0.21), here it is taken apart and put
/// together without a copy.
fn scatter<B: Backend>(into: &mut Tensor<B, 2>, rows: &[i32], added: Tensor<B, 2>) -> Result<()> {
    let device = into.device();
    let target = std::mem::replace(into, Tensor::empty([1, 1], &device));
    if !on_cpu::<B>() {
        *into = target.select_assign(0, index(rows, &device), added, IndexingUpdateOp::Add);
        return Ok(());
    }
    let width = target.dims()[1];
    let shape = target.dims();
    let mut sums = values(target, "hidden states")?;
    let added = values(added, "an expert's output")?;
    for (&row, added) in rows.iter().zip(added.chunks_exact(width)) {
        let sums = &mut sums[row as usize * width..][..width];
        sums.iter_mut().zip(added).for_each(|(sum, value)| *sum += value);
    }
    *into = Tensor::from_data(TensorData::new(sums, shape), &device);
    Ok(())
}

/// `into += added`, in place.
pub(crate) fn accumulate<B: Backend>(into: &mut Tensor<B, 2>, added: Tensor<B, 2>) {
    let device = into.device();
    let target = std::mem::replace(into, Tensor::empty([1, 1], &device));
    *into = target + added;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;

    fn load(rows: usize) -> Load {
        Load { tokens: (0..rows as u32).collect(), weights: vec![1.0; rows] }
    }

    #[test]
    fn blocks_hold_no_more_rows_than_there_are() {
        // 10 rows: 6 + 4 fit together, then 3, and 10 with the empty ones, which cost nothing.
        let loads = [6, 4, 3, 10, 0, 0].map(load);
        assert_eq!(blocks(&loads, 4, 10), [vec![0, 1], vec![2], vec![3, 4, 5]]);
        assert_eq!(blocks(&loads, 1, 10).len(), 6);
    }

    #[test]
    fn pieces_end_where_batches_end() {
        let pieces = pieces(&[0, 3, 4, 9], &[0, 4, 8]);
        let found: Vec<_> = pieces.iter().map(|p| (p.batch, p.rows.as_slice())).collect();
        assert_eq!(found, [(0, [0, 3].as_slice()), (1, &[0]), (2, &[1])]);
    }

    #[test]
    fn scatter_adds_to_its_rows_alone() {
        let device = Default::default();
        let mut into = Tensor::<Cpu, 2>::from_data([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device);
        scatter(&mut into, &[2, 0], Tensor::from_data([[10.0, 20.0], [30.0, 40.0]], &device)).unwrap();
        assert_eq!(into.into_data().to_vec::<f32>().unwrap(), [31.0, 42.0, 3.0, 4.0, 15.0, 26.0]);
    }
}

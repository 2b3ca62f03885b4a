//! One decoder layer, backward.

use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, TensorData, activation::sigmoid, backend::Backend};
use rayon::prelude::*;

use super::sums::Sink;
use crate::arch::{Part, Projection, Site};
use crate::forward::router::{self, At, route};
use crate::forward::{
    Adjoint, CHUNK, Context, DecoderLayer, Experts, GatedMlp, Load, MlpAdjoint, MlpKind, MoeBlock, NoTap, Options, Output, Routing,
    SharedExpert, SiteRows, Tap, accumulate, add, blocks, expert, gather, in_blocks, pieces, rows, starts, together, values,
};
use crate::stats::sites;
use crate::{Result, Weights};

/// What a layer is taken back with.
pub(super) struct Walk<'a, B: Backend> {
    pub weights: &'a dyn Weights,
    pub device: &'a B::Device,
    pub options: Options,
    pub sink: &'a dyn Sink<B>,
}

/// Keeps which experts were chosen, `[rows, top_k]` over all batches.
#[derive(Default)]
struct Chosen(Mutex<Vec<u32>>);

impl<B: Backend> Tap<B> for Chosen {
    fn routing(&self, _layer: usize, routing: &Routing) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(&routing.chosen);
        Ok(())
    }
}

/// What one chunk of an expert's rows gives back.
struct Back<B: Backend> {
    /// The gradient at the rows that entered.
    input: Output<B>,
    /// The rows' numbers, and the gradient at each one's routing weight.
    weights: Vec<(u32, f32)>,
}

impl<B: Backend> Walk<'_, B> {
    /// Replaces `gradient`, batches `[samples, tokens, hidden]` at the layer's output, by that at its input. `inputs` is what
    /// entered the layer.
    pub fn layer(&self, index: usize, inputs: Vec<Tensor<B, 3>>, gradient: &mut [Tensor<B, 3>]) -> Result<()> {
        let layer = DecoderLayer::load(self.weights, index, self.device, Experts::Streamed)?;
        let attended = self.attend(&layer, index, &inputs)?;
        self.back(&layer, index, inputs, attended, gradient)
    }

    /// The first half of the layer: what enters its second norm, `[rows, hidden]` a batch.
    pub fn attend(&self, layer: &DecoderLayer<B>, index: usize, inputs: &[Tensor<B, 3>]) -> Result<Vec<Tensor<B, 2>>> {
        let mut attended = inputs.to_vec();
        layer.attend(&self.context(index, &NoTap), &mut attended, &mut [])?;
        Ok(attended.into_iter().map(rows).collect())
    }

    /// The second half: adds the block's output to what [`Walk::attend`] gave.
    pub fn finish(&self, layer: &DecoderLayer<B>, index: usize, attended: &mut [Tensor<B, 2>]) -> Result<()> {
        layer.feed_forward(&self.context(index, &NoTap), attended)
    }

    /// As [`Walk::layer`], with `attended` from [`Walk::attend`].
    pub fn back(
        &self,
        layer: &DecoderLayer<B>,
        index: usize,
        inputs: Vec<Tensor<B, 3>>,
        attended: Vec<Tensor<B, 2>>,
        gradient: &mut [Tensor<B, 3>],
    ) -> Result<()> {
        let shapes: Vec<[usize; 3]> = inputs.iter().map(|x| x.dims()).collect();
        let mut after: Vec<Tensor<B, 2>> =
            gradient.iter_mut().map(|g| rows(std::mem::replace(g, Tensor::empty([1, 1, 1], self.device)))).collect();
        self.feed_forward(layer, index, attended, &mut after)?;
        let task = |(batch, (x, after)): (usize, (Tensor<B, 3>, Tensor<B, 2>))| {
            let [samples, tokens, _] = shapes[batch];
            Ok((batch, layer.attend_backward(rows(x), after, [samples, tokens])))
        };
        in_blocks(self.options.in_flight, inputs.into_iter().zip(after).enumerate(), task, |(batch, Adjoint { input, sites })| {
            gradient[batch] = input.reshape(shapes[batch]);
            sites.into_par_iter().try_for_each(|seen| self.sink.rows(index, seen, None))
        })?;
        let attention = |site: &Site| matches!(site, Site::AttentionIn | Site::QueryB | Site::KvB | Site::AttentionOut);
        let done: Vec<Site> = sites(self.weights.spec(), index).into_iter().map(|(site, _)| site).filter(attention).collect();
        done.into_par_iter().try_for_each(|site| self.sink.done(index, site))
    }

    /// The second half: from the gradient at the layer's output to that before the second norm, in place.
    fn feed_forward(
        &self,
        layer: &DecoderLayer<B>,
        index: usize,
        attended: Vec<Tensor<B, 2>>,
        gradient: &mut [Tensor<B, 2>],
    ) -> Result<()> {
        let mut normed = Vec::with_capacity(attended.len());
        in_blocks(
            self.options.in_flight,
            &attended,
            |x| Ok(layer.post_norm.apply(x.clone())),
            |x| {
                normed.push(x);
                Ok(())
            },
        )?;
        let back = match &layer.mlp {
            MlpKind::Dense(mlp) => self.dense(index, mlp, &normed, gradient)?,
            MlpKind::Moe(block) => self.moe(index, block, &normed, gradient)?,
        };
        drop(normed);
        let task = |(batch, (x, dy)): (usize, (Tensor<B, 2>, Tensor<B, 2>))| Ok((batch, layer.post_norm.backward(x, dy)));
        in_blocks(self.options.in_flight, attended.into_iter().zip(back).enumerate(), task, |(batch, dx)| {
            accumulate(&mut gradient[batch], dx);
            Ok(())
        })
    }

    fn context<'a>(&'a self, layer: usize, tap: &'a dyn Tap<B>) -> Context<'a, B> {
        Context { weights: self.weights, layer, device: self.device, tap, options: self.options }
    }

    /// Through an MLP that all rows pass: the gradient at its input, batch by batch.
    fn dense(&self, index: usize, mlp: &GatedMlp<B>, normed: &[Tensor<B, 2>], gradient: &[Tensor<B, 2>]) -> Result<Vec<Tensor<B, 2>>> {
        let names = [Site::DenseIn, Site::DenseDown];
        let task = |(x, dy): (&Tensor<B, 2>, &Tensor<B, 2>)| Ok(mlp.backward(x.clone(), dy.clone(), None, (names, Part::Dense)));
        let mut back = Vec::with_capacity(normed.len());
        in_blocks(self.options.in_flight, normed.iter().zip(gradient), task, |MlpAdjoint { input, sites, .. }| {
            back.push(input);
            self.show(index, sites, None)
        })?;
        self.done(index, names)?;
        Ok(back)
    }

    /// Hands two sites' rows on, at the same time.
    fn show(&self, index: usize, [enter, down]: [SiteRows<B>; 2], tokens: Option<&[u32]>) -> Result<()> {
        let (a, b) = rayon::join(|| self.sink.rows(index, enter, tokens), || self.sink.rows(index, down, tokens));
        a.and(b)
    }

    fn done(&self, index: usize, [enter, down]: [Site; 2]) -> Result<()> {
        let (a, b) = rayon::join(|| self.sink.done(index, enter), || self.sink.done(index, down));
        a.and(b)
    }

    /// Through routed experts, the shared one and the router: the gradient at the block's input, batch by batch.
    fn moe(&self, index: usize, block: &MoeBlock<B>, normed: &[Tensor<B, 2>], gradient: &[Tensor<B, 2>]) -> Result<Vec<Tensor<B, 2>>> {
        let chosen = Chosen::default();
        let loads = block.choose(&self.context(index, &chosen), normed)?;
        let given: Vec<u64> = loads.iter().map(|load| load.tokens.len() as u64).collect();
        self.sink.entered(index, normed, &given)?;
        let chosen = chosen.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let total = normed.iter().map(|x| x.dims()[0]).sum();
        let mut back: Vec<Tensor<B, 2>> = normed.iter().map(Tensor::zeros_like).collect();
        let mut d_weights = vec![0.0; chosen.len()];
        for experts in blocks(&loads, self.options.in_flight, total) {
            let outputs = together(experts, |e| Ok((e, self.expert(index, block, (normed, gradient), e, &loads[e])?)))?;
            for (e, Back { input, weights }) in outputs.into_iter().flat_map(|(e, chunks)| chunks.into_iter().map(move |chunk| (e, chunk)))
            {
                add(input, &mut back, None)?;
                for (token, weight) in weights {
                    let first = token as usize * block.moe.top_k;
                    let slots = chosen[first..first + block.moe.top_k].iter().zip(&mut d_weights[first..]);
                    slots.filter(|(chosen, _)| **chosen as usize == e).for_each(|(_, d)| *d = weight);
                }
            }
        }
        if let Some(shared) = &block.shared {
            self.shared(index, shared, normed, gradient, &mut back)?;
        }
        self.router(index, block, normed, &d_weights, &mut back)?;
        Ok(back)
    }

    /// One routed expert over its rows, chunk by chunk. Without rows its weights are not read.
    fn expert(
        &self,
        index: usize,
        block: &MoeBlock<B>,
        (normed, gradient): (&[Tensor<B, 2>], &[Tensor<B, 2>]),
        e: usize,
        load: &Load,
    ) -> Result<Vec<Back<B>>> {
        let names = [Site::ExpertIn(e), Site::ExpertDown(e)];
        let part = |projection: Projection| Part::Expert(e, projection);
        let mut backs = Vec::new();
        if !load.tokens.is_empty() {
            let mlp = expert(&self.context(index, &NoTap).source(), &block.moe, e)?;
            let starts = starts(normed);
            for (tokens, weights) in load.tokens.chunks(CHUNK).zip(load.weights.chunks(CHUNK)) {
                let pieces = pieces(tokens, &starts);
                let (x, dy) = (gather(normed, &pieces, self.device), gather(gradient, &pieces, self.device));
                let weights = Tensor::from_data(TensorData::new(weights.to_vec(), [tokens.len(), 1]), self.device);
                let MlpAdjoint { input, weight, sites } = mlp.backward(x, dy, Some(weights), (names, part));
                let weights = tokens.iter().copied().zip(values(weight, "gradients of routing weights")?).collect();
                backs.push(Back { input: Output { pieces, rows: input }, weights });
                self.show(index, sites, Some(tokens))?;
            }
        }
        self.done(index, names)?;
        Ok(backs)
    }

    /// Adds the shared expert's part to `back`.
    fn shared(
        &self,
        index: usize,
        shared: &SharedExpert<B>,
        normed: &[Tensor<B, 2>],
        gradient: &[Tensor<B, 2>],
        back: &mut [Tensor<B, 2>],
    ) -> Result<()> {
        let names = [Site::SharedIn, Site::SharedDown];
        let task = |(batch, x): (usize, &Tensor<B, 2>)| {
            let dy = gradient[batch].clone();
            let weights = shared.gate.as_ref().map(|gate| sigmoid(gate.apply(x.clone())));
            let MlpAdjoint { mut input, weight, sites } = shared.mlp.backward(x.clone(), dy, weights.clone(), (names, Part::Shared));
            if let (Some(gate), Some(s)) = (&shared.gate, weights) {
                input = input + gate.backward(weight * s.clone() * (s.neg() + 1.0));
            }
            Ok((batch, input, sites))
        };
        in_blocks(self.options.in_flight, normed.iter().enumerate(), task, |(batch, input, sites)| {
            accumulate(&mut back[batch], input);
            self.show(index, sites, None)
        })?;
        self.done(index, names)
    }

    /// Adds the router's part to `back`, from the gradient at the routing weights, `[rows, top_k]`.
    fn router(
        &self,
        index: usize,
        block: &MoeBlock<B>,
        normed: &[Tensor<B, 2>],
        d_weights: &[f32],
        back: &mut [Tensor<B, 2>],
    ) -> Result<()> {
        let starts = starts(normed);
        let task = |(batch, x): (usize, &Tensor<B, 2>)| {
            let logits = values(block.router.apply(x.clone()), "router logits")?;
            let routing = route(&block.moe, block.correction.as_deref(), logits, At { layer: index, first: starts[batch] })?;
            let top_k = block.moe.top_k;
            let own = &d_weights[routing.first * top_k..][..routing.rows * top_k];
            let d_logits = TensorData::new(router::backward(&block.moe, &routing, own), [routing.rows, routing.experts]);
            Ok((batch, block.router.backward(Tensor::from_data(d_logits, self.device))))
        };
        in_blocks(self.options.in_flight, normed.iter().enumerate(), task, |(batch, input)| {
            accumulate(&mut back[batch], input);
            Ok(())
        })
    }
}

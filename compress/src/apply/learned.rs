//! Learned refinement of one decoder layer: the gradient steps of [`crate::quantize::learned`] against the layer's output.
//!
//! All matrices of a layer that were solved against tokens learn together. A step takes some calibration samples, runs the layer as it
//! is now on what enters it, and moves codes and scales against the gradient of the squared distance to the original layer's
//! output. Samples that no step sees judge: the step with the least error on them is kept, and the start where none is better, so
//! by that measure no layer is left worse than it was.
//!
//! **Memory**, beside what enters the layer and what should leave it (`4·R·d` bytes each): a layer's solved weights at 29 bytes
//! each (weight, position, two memories, gradient, codes of the start, of now and of the best step, scales aside), 21 under
//! [`Optimizer::Sign`](crate::quantize::learned::Optimizer::Sign), and one step's samples in the backward pass. That is the
//! whole layer at once, not a block of its experts.
//!
//! **Bits depend neither on threads nor on interruptions**: a layer starts from its own solved matrices and a seed of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use calib::Weights;
use calib::arch::{Part, Role, Spec};
use calib::backward::{layer_error, layer_gradients};
use calib::forward::{BATCH_TOKENS, Options};
use kernels::QuantizedMatrix;
use ndarray::{Array1, Array2};
use rayon::prelude::*;

use crate::quantize::learned::Learner;
pub use crate::quantize::learned::Params;
use crate::solved::{Account, By, Judged, LayerFile, Report};
use crate::{Error, Result};

/// One layer, and what it is refined on.
pub struct Layer<'a, B: Backend> {
    /// The original model.
    pub model: &'a dyn Weights,
    /// Whatever is not solved: the original model, with a router that was fitted.
    pub rest: &'a dyn Weights,
    /// The layer's number.
    pub layer: usize,
    /// What enters it, batches `[samples, tokens, hidden]`.
    pub inputs: &'a [Tensor<B, 3>],
    /// What should leave it.
    pub targets: &'a [Tensor<B, 3>],
}

/// Solved matrices of one layer that wait until it is whole.
#[derive(Default)]
pub struct Waiting(Mutex<BTreeMap<Part, Solved>>);

/// One of them.
struct Solved {
    name: String,
    matrix: QuantizedMatrix,
    account: Account,
}

impl Waiting {
    /// One more.
    pub fn put(&self, part: Part, name: &str, matrix: QuantizedMatrix, account: Account) {
        let solved = Solved { name: name.to_owned(), matrix, account };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(part, solved);
    }

    /// Refines them and writes them into the layer's file.
    ///
    /// # Errors
    ///
    /// As [`refine`]; an IO error.
    pub fn finish<B: Backend>(self, at: &Layer<'_, B>, params: &Params, file: &LayerFile) -> Result<()> {
        let mut told = Vec::new();
        let mut start = BTreeMap::new();
        for (part, Solved { name, matrix, account }) in self.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
            told.push((name, account));
            start.insert(part, matrix);
        }
        let (matrices, judged) = refine(at, start, params)?;
        for ((name, account), matrix) in told.into_iter().zip(matrices.values()) {
            file.put(&name, matrix, &Report { by: By::GptqLearned, solved: Some(account), learned: Some(judged) })?;
        }
        Ok(())
    }
}

/// A model with some matrices of one layer replaced.
struct Replaced<'a> {
    model: &'a dyn Weights,
    layer: usize,
    matrices: BTreeMap<Part, Array2<f32>>,
}

impl Weights for Replaced<'_> {
    fn spec(&self) -> &Spec {
        self.model.spec()
    }

    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        match role {
            Role::Layer(layer, part) if layer == self.layer => match self.matrices.get(&part) {
                Some(matrix) => Ok(matrix.clone()),
                None => self.model.matrix(role),
            },
            _ => self.model.matrix(role),
        }
    }

    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.model.vector(role)
    }
}

/// What came out: the matrices, and what the held-out samples said.
pub type Refined = (BTreeMap<Part, QuantizedMatrix>, Judged);

/// Refines the solved matrices of a layer.
///
/// # Errors
///
/// [`Error::HeldOut`] where no sample is left to learn from; what running the layer says.
pub fn refine<B: Backend>(at: &Layer<'_, B>, start: BTreeMap<Part, QuantizedMatrix>, params: &Params) -> Result<Refined> {
    let samples = Samples::of(at, params)?;
    let learner = |(part, matrix): (Part, QuantizedMatrix)| {
        let w = at.model.matrix(Role::Layer(at.layer, part))?;
        Ok((part, Learner::new(w.view(), matrix, params)?))
    };
    let mut learners: BTreeMap<Part, Learner> = start.into_iter().map(learner).collect::<Result<_>>()?;
    let mut now = Replaced { model: at.rest, layer: at.layer, matrices: dequantized(&learners) };
    if learners.is_empty() {
        return Ok((BTreeMap::new(), Judged { before: 0.0, after: 0.0, step: 0 }));
    }
    let options = Options::of::<B>();
    let names: BTreeSet<Part> = learners.keys().copied().collect();
    let held_out = samples.held_out();
    let judge = |now: &Replaced<'_>| -> Result<f64> {
        let (inputs, targets) = &held_out;
        Ok(layer_error(now, at.layer, inputs, targets, options)? / samples.values(&samples.held_out))
    };
    let before = judge(&now)?;
    let mut best = (Judged { before, after: before, step: 0 }, matrices(&learners));
    let every = (params.steps / params.judged.max(1)).max(1);
    for step in 1..=params.steps {
        let (inputs, targets) = samples.of_step(step);
        let found = layer_gradients(&now, at.layer, inputs, &targets, &|part| names.contains(&part), options)?;
        let left = 1.0 - (step - 1) as f32 / params.steps as f32;
        learners.par_iter_mut().for_each(|(part, learner)| {
            if let Some(gradient) = found.matrices.get(part) {
                learner.step(gradient, params.rate * left, params.scale_rate * left);
            }
        });
        now.matrices = dequantized(&learners);
        if step % every == 0 || step == params.steps {
            let after = judge(&now)?;
            tracing::debug!("layer {}, step {step}: {after:.6e} held out, {:.6e} before", at.layer, before);
            if after < best.0.after {
                best = (Judged { before, after, step }, matrices(&learners));
            }
        }
    }
    Ok((best.1, best.0))
}

fn dequantized(learners: &BTreeMap<Part, Learner>) -> BTreeMap<Part, Array2<f32>> {
    learners.par_iter().map(|(part, learner)| (*part, learner.weights())).collect()
}

fn matrices(learners: &BTreeMap<Part, Learner>) -> BTreeMap<Part, QuantizedMatrix> {
    learners.iter().map(|(part, learner)| (*part, learner.matrix())).collect()
}

/// The samples by number, and who sees which.
struct Samples<'a, B: Backend> {
    at: &'a Layer<'a, B>,
    /// Batch and place in it.
    places: Vec<(usize, usize)>,
    /// In the order in which steps take them, over and over.
    steps: Vec<usize>,
    held_out: Vec<usize>,
    a_step: usize,
}

/// Inputs and targets of some samples.
type Pair<B> = (Vec<Tensor<B, 3>>, Vec<Tensor<B, 3>>);

impl<'a, B: Backend> Samples<'a, B> {
    fn of(at: &'a Layer<'a, B>, params: &Params) -> Result<Self> {
        let in_batch = |(batch, x): (usize, &Tensor<B, 3>)| (0..x.dims()[0]).map(move |sample| (batch, sample));
        let places: Vec<(usize, usize)> = at.inputs.iter().enumerate().flat_map(in_batch).collect();
        if places.len() <= params.held_out {
            return Err(Error::HeldOut { samples: places.len(), held_out: params.held_out });
        }
        let held_out = held_out(places.len(), params.held_out);
        let mut steps: Vec<usize> = (0..places.len()).filter(|sample| !held_out.contains(sample)).collect();
        shuffle(&mut steps, params.seed.wrapping_add(at.layer as u64));
        Ok(Self { at, places, held_out, a_step: params.samples.clamp(1, steps.len()), steps })
    }

    /// Values of the outputs of these samples.
    fn values(&self, samples: &[usize]) -> f64 {
        let of = |&sample: &usize| self.at.targets[self.places[sample].0].dims()[1..].iter().product::<usize>();
        samples.iter().map(of).sum::<usize>() as f64
    }

    fn held_out(&self) -> Pair<B> {
        self.pair(&self.held_out)
    }

    /// What step `step`, from 1 on, sees.
    fn of_step(&self, step: u32) -> Pair<B> {
        let first = (step as usize - 1) * self.a_step;
        let mut taken: Vec<usize> = (first..first + self.a_step).map(|i| self.steps[i % self.steps.len()]).collect();
        taken.sort_unstable();
        self.pair(&taken)
    }

    fn pair(&self, samples: &[usize]) -> Pair<B> {
        (self.batches(self.at.inputs, samples), self.batches(self.at.targets, samples))
    }

    /// These samples, neighbors of one length joined.
    fn batches(&self, from: &[Tensor<B, 3>], samples: &[usize]) -> Vec<Tensor<B, 3>> {
        let mut groups: Vec<Vec<Tensor<B, 3>>> = Vec::new();
        for &sample in samples {
            let (batch, place) = self.places[sample];
            let x = from[batch].clone().narrow(0, place, 1);
            let tokens = x.dims()[1];
            match groups.last_mut() {
                Some(group) if group[0].dims()[1] == tokens && (group.len() + 1) * tokens <= BATCH_TOKENS => group.push(x),
                _ => groups.push(vec![x]),
            }
        }
        groups.into_iter().map(|group| Tensor::cat(group, 0)).collect()
    }
}

/// Samples that no step sees, spread evenly: texts stand interleaved in the samples, so each text has its share.
pub(super) fn held_out(samples: usize, count: usize) -> Vec<usize> {
    (0..count).map(|i| (2 * i + 1) * samples / (2 * count)).collect()
}

/// Fisher and Yates, with splitmix64.
pub(super) fn shuffle(order: &mut [usize], seed: u64) {
    let mut state = seed;
    for last in (1..order.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        // The bias of a remainder of 64 bits by a few thousand samples is below 1e-15.
        order.swap(last, ((z ^ z >> 31) % (last as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffle_is_a_permutation_of_its_seed() {
        let shuffled = |seed| {
            let mut order: Vec<usize> = (0..50).collect();
            shuffle(&mut order, seed);
            order
        };
        assert!(shuffled(1) != shuffled(2) && shuffled(1) == shuffled(1));
        let mut sorted = shuffled(1);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }
}

//! How far a model's predictions are from a reference's, and the gradient of that at the weights of every layer.
//!
//! `ℓ = Σ_t KL(p_t ‖ q_t)` with the reference's distribution `p` and the model's `q`; at the logits `∂ℓ/∂z = q − p`. From there the
//! gradient goes back as [`run`](super::run)'s does.
//!
//! **Memory**: what entered every layer, `4·L·R·d` bytes for the samples given, beside one layer's backward pass; the gradients, 4 bytes
//! a wanted weight.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, TensorData, backend::Backend};
use ndarray::Array2;
use rayon::prelude::*;

use super::gradients::MatrixSums;
use super::layer::Walk;
use crate::arch::Part;
use crate::evaluate::LOGITS;
use crate::forward::{Head, NoTap, Options, decoder_layer, embed, rows, values};
use crate::{Error, Result, Weights};

/// What the reference says of some samples: its last hidden states, and the head that makes logits of them.
pub struct Reference<B: Backend> {
    head: Head<B>,
    /// `[tokens, hidden]`, a sample each.
    samples: Vec<Tensor<B, 2>>,
}

/// A model's divergence and its gradient.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelGradients {
    /// `Σ_t KL(p_t ‖ q_t)` in nats.
    pub divergence: f64,
    /// `∂ℓ/∂W` of every wanted matrix that a row reached, `[out, in]`, by layer.
    pub matrices: BTreeMap<(usize, Part), Array2<f32>>,
}

impl<B: Backend> Reference<B> {
    /// Runs the reference over `ids`.
    ///
    /// # Errors
    ///
    /// What running the model says.
    pub fn of(weights: &dyn Weights, ids: &[Vec<u32>], device: &B::Device) -> Result<Self> {
        let mut hidden = embed(weights, ids, device)?;
        for layer in 0..weights.spec().layers.len() {
            decoder_layer(weights, layer, &mut hidden, &NoTap, Options::of::<B>())?;
        }
        let mut samples = Vec::with_capacity(ids.len());
        for batch in hidden {
            let [count, tokens, width] = batch.dims();
            samples.extend((0..count).map(|sample| batch.clone().narrow(0, sample, 1).reshape([tokens, width])));
        }
        Ok(Self { head: Head::load(weights, device)?, samples })
    }

    /// `Σ_t KL(p_t ‖ q_t)` of a model over some of the samples, by their numbers; `ids` are all of them.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`], or what running the model says.
    pub fn divergence(&self, weights: &dyn Weights, ids: &[Vec<u32>], of: &[usize], device: &B::Device) -> Result<f64> {
        let mut hidden = embed(weights, &chosen(ids, of), device)?;
        for layer in 0..weights.spec().layers.len() {
            decoder_layer(weights, layer, &mut hidden, &NoTap, Options::of::<B>())?;
        }
        self.last(&Head::load(weights, device)?, &mut hidden, of, false)
    }

    /// As [`Reference::divergence`], with the gradient at the matrices that `wanted` names.
    ///
    /// # Errors
    ///
    /// As [`Reference::divergence`].
    pub fn gradients(
        &self,
        weights: &dyn Weights,
        ids: &[Vec<u32>],
        of: &[usize],
        wanted: &(dyn Fn(usize, Part) -> bool + Sync),
        device: &B::Device,
    ) -> Result<ModelGradients> {
        let layers = weights.spec().layers.len();
        let mut gradient = embed(weights, &chosen(ids, of), device)?;
        let mut inputs = Vec::with_capacity(layers);
        for layer in 0..layers {
            inputs.push(gradient.clone());
            decoder_layer(weights, layer, &mut gradient, &NoTap, Options::of::<B>())?;
        }
        let divergence = self.last(&Head::load(weights, device)?, &mut gradient, of, true)?;
        let mut matrices = BTreeMap::new();
        for (layer, inputs) in inputs.into_iter().enumerate().rev() {
            let wanted = |part| wanted(layer, part);
            let sink = MatrixSums { wanted: &wanted, sums: Mutex::default() };
            Walk { weights, device, options: Options::of::<B>(), sink: &sink }.layer(layer, inputs, &mut gradient)?;
            let sums = sink.sums.into_inner().unwrap_or_else(PoisonError::into_inner);
            matrices.extend(sums.into_iter().map(|(part, sum)| ((layer, part), sum)));
        }
        Ok(ModelGradients { divergence, matrices })
    }

    /// The divergence from a model's last hidden states, batches in the order of `of`, which become its gradient if that is asked for.
    fn last(&self, head: &Head<B>, hidden: &mut [Tensor<B, 3>], of: &[usize], gradient: bool) -> Result<f64> {
        let (mut total, mut next) = (0.0, 0);
        for batch in hidden {
            let shape = batch.dims();
            let reference = of[next..next + shape[0]].iter().map(|&sample| self.samples[sample].clone()).collect();
            let (x, reference) = (rows(batch.clone()), Tensor::cat(reference, 0));
            next += shape[0];
            let (mut parts, mut first, count) = (Vec::new(), 0, x.dims()[0]);
            while first < count {
                let step = (LOGITS / head.vocab()).clamp(1, count - first);
                let (x, reference) = (x.clone().narrow(0, first, step), reference.clone().narrow(0, first, step));
                let logits = head.logits(x.clone());
                let shape = logits.dims();
                let mut logits = values(logits, "logits")?;
                let wanted = values(self.head.logits(reference), "logits")?;
                let rows = logits.par_chunks_exact_mut(shape[1]).zip(wanted.par_chunks_exact(shape[1]));
                let found: Vec<f64> = rows.map(|(row, wanted)| differentiate(row, wanted)).collect();
                let sum: f64 = found.iter().sum();
                if !sum.is_finite() {
                    return Err(Error::NotFinite { domain: "the calibration samples".to_owned(), tokens: shape[0] });
                }
                total += sum;
                if gradient {
                    parts.push(head.backward(x.clone(), Tensor::from_data(TensorData::new(logits, shape), &x.device())));
                }
                first += step;
            }
            if gradient {
                *batch = Tensor::cat(parts, 0).reshape(shape);
            }
        }
        Ok(total)
    }
}

fn chosen(ids: &[Vec<u32>], of: &[usize]) -> Vec<Vec<u32>> {
    of.iter().map(|&sample| ids[sample].clone()).collect()
}

/// Turns one position's logits into `q − p` and gives `KL(p ‖ q)`; `wanted` are the logits of `p`.
fn differentiate(row: &mut [f32], wanted: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        largest + row.iter().map(|&z| (f64::from(z) - largest).exp()).sum::<f64>().ln()
    };
    let (own, reference) = (log_sum(row), log_sum(wanted));
    let mut divergence = 0.0;
    for (z, &r) in row.iter_mut().zip(wanted) {
        let (log_q, log_p) = (f64::from(*z) - own, f64::from(r) - reference);
        let p = log_p.exp();
        divergence += p * (log_p - log_q);
        *z = (log_q.exp() - p) as f32;
    }
    divergence
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{Projection, Role};
    use crate::device::Cpu;
    use crate::forward::testing::{grouped_spec, random, samples};

    #[test]
    fn one_position_by_hand() {
        // p = (½, ½), q = (¼, ¾): ½ ln 2 + ½ ln ⅔.
        let mut row = [0.25_f32, 0.75].map(|q| q.ln() - 2.0);
        let divergence = differentiate(&mut row, &[3.0, 3.0]);
        assert!((divergence - (0.5 * 2.0_f64.ln() + 0.5 * (2.0_f64 / 3.0).ln())).abs() < 1e-6, "{divergence}");
        assert!((row[0] + 0.25).abs() < 1e-6 && (row[1] - 0.25).abs() < 1e-6, "{row:?}");
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (reference, model) = (random(grouped_spec(), 5), random(grouped_spec(), 6));
        let (ids, device) = (samples(&[9, 9, 6], reference.spec.vocab), Default::default());
        let said = Reference::<Cpu>::of(&reference, &ids, &device).unwrap();
        assert!(said.divergence(&reference, &ids, &[0, 1, 2], &device).unwrap().abs() < 1e-9);
        let of = [2, 0];
        let down = |part: Part| matches!(part, Part::Expert(_, Projection::Down));
        let found = said.gradients(&model, &ids, &of, &|_, part| down(part), &device).unwrap();
        let before = said.divergence(&model, &ids, &of, &device).unwrap();
        assert!((found.divergence / before - 1.0).abs() < 1e-9);
        // Behind the last layer's down projections nothing is chosen.
        let (&(layer, part), gradient) = found.matrices.last_key_value().unwrap();
        assert_eq!(layer, 1);
        let square: f64 = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        let at = |step: f64| {
            let mut moved = model.clone();
            let w = moved.tensors[&Role::Layer(layer, part)].clone();
            moved.put(Role::Layer(layer, part), w + &gradient.mapv(|g| (f64::from(g) * step) as f32));
            said.divergence(&moved, &ids, &of, &device).unwrap()
        };
        let h = 1e-3 * before / square;
        let slope = (at(h) - at(-h)) / (2.0 * h);
        assert!((slope / square - 1.0).abs() < 0.02, "{slope} by differences, {square} by derivatives");
    }
}

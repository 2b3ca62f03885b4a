//! How far a decoder layer's output is from where it should be, and the gradient of that at the layer's weights.
//!
//! `ℓ = ‖Y − Y*‖²` over all rows; `∂ℓ/∂W = Σ_t (∂ℓ/∂z_t) x_tᵀ` for every Linear matrix, with the exact derivatives of the backward
//! pass: through attention, norms, experts, and the routing weights (which experts are chosen has no gradient).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use ndarray::Array2;

use super::layer::Walk;
use super::sums::Sink;
use crate::arch::{Part, Site};
use crate::forward::{DecoderLayer, Experts, NoTap, Options, SiteRows, decoder_layer, rows, values};
use crate::{Error, Result, Weights};

/// A layer's squared error and its gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGradients {
    /// `‖Y − Y*‖²`, summed over rows and channels.
    pub error: f64,
    /// `½ ∂ℓ/∂W` of every wanted matrix that a row reached, `[out, in]`.
    pub matrices: BTreeMap<Part, Array2<f32>>,
}

/// The squared error of layer `layer`, run on `inputs`, against `targets`, both batches `[samples, tokens, hidden]`.
///
/// # Errors
///
/// What running the layer says.
pub fn layer_error<B: Backend>(
    weights: &dyn Weights,
    layer: usize,
    inputs: &[Tensor<B, 3>],
    targets: &[Tensor<B, 3>],
    options: Options,
) -> Result<f64> {
    let mut outputs = inputs.to_vec();
    decoder_layer(weights, layer, &mut outputs, &NoTap, options)?;
    outputs.into_iter().zip(targets).map(|(y, target)| squares(y - target.clone())).sum()
}

/// As [`layer_error`], with the gradients at the matrices that `wanted` names.
///
/// # Errors
///
/// As [`layer_error`].
pub fn layer_gradients<B: Backend>(
    weights: &dyn Weights,
    layer: usize,
    inputs: Vec<Tensor<B, 3>>,
    targets: &[Tensor<B, 3>],
    wanted: &(dyn Fn(Part) -> bool + Sync),
    options: Options,
) -> Result<LayerGradients> {
    let Some(device) = inputs.first().map(Tensor::device) else { return Ok(LayerGradients { error: 0.0, matrices: BTreeMap::new() }) };
    let sink = MatrixSums { wanted, sums: Mutex::default() };
    let walk = Walk { weights, device: &device, options, sink: &sink };
    let block = DecoderLayer::load(weights, layer, &device, Experts::Streamed)?;
    let attended = walk.attend(&block, layer, &inputs)?;
    let mut outputs = attended.clone();
    walk.finish(&block, layer, &mut outputs)?;
    let (mut gradient, mut error) = (Vec::with_capacity(targets.len()), 0.0);
    for (y, target) in outputs.into_iter().zip(targets) {
        let off = y - rows(target.clone());
        error += squares(off.clone().unsqueeze())?;
        gradient.push(off.reshape(target.dims()));
    }
    walk.back(&block, layer, inputs, attended, &mut gradient)?;
    Ok(LayerGradients { error, matrices: sink.sums.into_inner().unwrap_or_else(PoisonError::into_inner) })
}

fn squares<B: Backend>(off: Tensor<B, 3>) -> Result<f64> {
    Ok(values(off, "a layer's error")?.iter().map(|&x| f64::from(x) * f64::from(x)).sum())
}

/// Adds up `Σ_t (∂ℓ/∂z_t) x_tᵀ` of the wanted matrices.
pub(super) struct MatrixSums<'a> {
    pub wanted: &'a (dyn Fn(Part) -> bool + Sync),
    pub sums: Mutex<BTreeMap<Part, Array2<f32>>>,
}

impl<B: Backend> Sink<B> for MatrixSums<'_> {
    fn rows(&self, _layer: usize, seen: SiteRows<B>, _tokens: Option<&[u32]>) -> Result<()> {
        for (part, dz) in seen.outputs.into_iter().filter(|(part, _)| (self.wanted)(*part)) {
            let gradient = dz.transpose().matmul(seen.rows.clone());
            let [out, width] = gradient.dims();
            let wrong = |e: ndarray::ShapeError| Error::Device { what: "gradients", message: e.to_string() };
            let gradient = Array2::from_shape_vec((out, width), values(gradient, "gradients")?).map_err(wrong)?;
            // A matrix's rows come in order from one thread at a time: the sum does not depend on others.
            let before = self.sums.lock().unwrap_or_else(PoisonError::into_inner).remove(&part);
            let sum = before.map_or(gradient.clone(), |before| before + &gradient);
            self.sums.lock().unwrap_or_else(PoisonError::into_inner).insert(part, sum);
        }
        Ok(())
    }

    fn done(&self, _layer: usize, _site: Site) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{Projection, Role};
    use crate::device::Cpu;
    use crate::forward::embed;
    use crate::forward::testing::{grouped_spec, latent_spec, random, samples};

    #[test]
    fn the_error_of_a_down_projection_has_the_slope_that_its_gradient_says() {
        for spec in [grouped_spec(), latent_spec()] {
            let (table, options) = (random(spec, 5), Options { in_flight: 2 });
            let inputs = embed::<Cpu>(&table, &samples(&[40; 3], table.spec.vocab), &Default::default()).unwrap();
            // Far from the target, so that the error is not dominated by what the step adds.
            let targets: Vec<_> = inputs.iter().map(|x| x.clone() * 3.0).collect();
            let layer = 1;
            let found = layer_gradients(&table, layer, inputs.clone(), &targets, &|part| part.site().is_some(), options).unwrap();
            let before = layer_error(&table, layer, &inputs, &targets, options).unwrap();
            assert!((found.error / before - 1.0).abs() < 1e-5, "{} {before}", found.error);
            assert!(found.matrices.len() > 5 && found.matrices.keys().any(|part| matches!(part, Part::Expert(_, Projection::Down))));
            // Nothing stands behind a down projection, so the error is a square of it and differences are exact; the other
            // matrices' sums are made alike, and held to finite differences in the tests of the pass.
            let down = |part: &Part| matches!(part, Part::Expert(_, Projection::Down) | Part::Shared(Projection::Down));
            for (&part, gradient) in found.matrices.iter().filter(|(part, _)| down(part)) {
                let norm = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
                let error = |step: f64| {
                    let mut moved = table.clone();
                    let role = Role::Layer(layer, part);
                    let w = moved.tensors.get_mut(&role).unwrap();
                    w.scaled_add((step / norm) as f32, gradient);
                    layer_error(&moved, layer, &inputs, &targets, options).unwrap()
                };
                let (step, expected) = (1e-2, 2.0 * norm);
                let slope = (error(step) - error(-step)) / (2.0 * step);
                // f32 sums of this size leave a few parts in ten million of the error.
                let noise = 4e-7 * before / step;
                assert!((slope - expected).abs() < 0.03 * expected + noise, "{part:?}: {slope} {expected}");
            }
        }
    }
}

//! Second moments of the gradients at the outputs of matrices: `Σ_t g_t g_tᵀ`, `g = ∂ℓ/∂z`.
//!
//! Which directions of a matrix's output matter at the end of the model, as its token weights say which tokens do: the two sides of a
//! Kronecker-factored Hessian of the final KL (YAQA, arXiv 2505.22988).
//!
//! **Memory**: what entered every layer, `4·L·R·d` bytes, beside one layer's backward pass; the moments, `4·out²` a wanted matrix.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use burn::tensor::backend::Backend;
use ndarray::{Array2, ArrayView2};

use super::layer::Walk;
use super::sums::Sink;
use super::{Params, loss};
use crate::arch::{Part, Site};
use crate::device::Job;
use crate::forward::{Head, NoTap, Options, SiteRows, decoder_layer, embed, values};
use crate::progress::Progress;
use crate::stats::Moment;
use crate::{Error, Result, Weights};

/// By layer and matrix: `[out, out]`, and the rows that it sums over.
pub type OutputMoments = BTreeMap<(usize, Part), (Array2<f32>, u64)>;

/// A backward pass that adds them up.
#[derive(Clone, Copy)]
pub struct Outputs<'a> {
    /// The model.
    pub weights: &'a dyn Weights,
    /// Token ids of the samples.
    pub ids: &'a [Vec<u32>],
    /// How the loss is made.
    pub params: &'a Params,
    /// The matrices that are asked for.
    pub wanted: &'a (dyn Fn(usize, Part) -> bool + Sync),
    /// Hears of every layer, forward and backward.
    pub progress: &'a dyn Progress,
}

impl Job for Outputs<'_> {
    type Output = Result<OutputMoments>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<OutputMoments> {
        let Self { weights, ids, params, wanted, progress } = self;
        let (layers, options) = (weights.spec().layers.len(), Options::of::<B>());
        let mut gradient = embed::<B>(weights, ids, device)?;
        let mut inputs = Vec::with_capacity(layers);
        progress.start("moments of output gradients", 2 * layers as u64);
        for layer in 0..layers {
            inputs.push(gradient.clone());
            decoder_layer(weights, layer, &mut gradient, &NoTap, options)?;
            progress.tick(1);
        }
        loss::to_gradient(&Head::load(weights, device)?, &mut gradient, ids, params)?;
        let mut found = BTreeMap::new();
        for (layer, inputs) in inputs.into_iter().enumerate().rev() {
            let of_layer = |part| wanted(layer, part);
            let sink = Grams { wanted: &of_layer, sums: Mutex::default() };
            Walk { weights, device, options, sink: &sink }.layer(layer, inputs, &mut gradient)?;
            let sums = sink.sums.into_inner().unwrap_or_else(PoisonError::into_inner);
            for (part, moment) in sums {
                let rows = moment.tokens();
                found.insert((layer, part), (moment.into_matrix(), rows));
            }
            progress.tick(1);
        }
        progress.finish();
        Ok(found)
    }
}

struct Grams<'a> {
    wanted: &'a (dyn Fn(Part) -> bool + Sync),
    sums: Mutex<BTreeMap<Part, Moment>>,
}

impl<B: Backend> Sink<B> for Grams<'_> {
    fn rows(&self, _layer: usize, seen: SiteRows<B>, _tokens: Option<&[u32]>) -> Result<()> {
        for (part, dz) in seen.outputs.into_iter().filter(|(part, _)| (self.wanted)(*part)) {
            let [rows, width] = dz.dims();
            let dz = values(dz, "gradients")?;
            let wrong = |e: ndarray::ShapeError| Error::Device { what: "gradients", message: e.to_string() };
            let dz = ArrayView2::from_shape((rows, width), &dz).map_err(wrong)?;
            // A matrix's rows come in order from one thread at a time: the sum does not depend on others.
            let before = self.sums.lock().unwrap_or_else(PoisonError::into_inner).remove(&part);
            let mut moment = before.unwrap_or_else(|| Moment::new(width));
            moment.add(dz, None);
            self.sums.lock().unwrap_or_else(PoisonError::into_inner).insert(part, moment);
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
    use crate::arch::Projection;
    use crate::backward::{Backward, Receive, Scratch, run};
    use crate::device::Device;
    use crate::forward::testing::{grouped_spec, random, samples};
    use crate::progress::Quiet;
    use crate::stats::end_loss::{LayerWeights, SiteLoss};

    /// Keeps the channels' shares of the pass that the table of losses is made from.
    #[derive(Default)]
    struct Kept(Mutex<BTreeMap<(usize, Part), Vec<f64>>>);

    impl Receive for Kept {
        fn site(&self, layer: usize, loss: SiteLoss) -> Result<()> {
            self.0.lock().unwrap().extend(loss.outputs.into_iter().map(|(part, r)| ((layer, part), r.to_vec())));
            Ok(())
        }
        fn layer(&self, _layer: usize, _weights: LayerWeights) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_diagonal_is_what_the_other_pass_finds() {
        let table = random(grouped_spec(), 5);
        let (ids, params) = (samples(&[9, 9, 6], table.spec.vocab), Params::default());
        let wanted = |_: usize, part: Part| part.site().is_some();
        let outputs = Outputs { weights: &table, ids: &ids, params: &params, wanted: &wanted, progress: &Quiet };
        let found = Device::Cpu.run(outputs).unwrap();
        let kept = Kept::default();
        let pass = Backward { weights: &table, ids: &ids, params: &params, scratch: &Scratch::Memory, progress: &Quiet };
        run(&pass, &kept, Device::Cpu).unwrap();
        let kept = kept.0.into_inner().unwrap();
        assert!(found.len() > 8 && found.keys().any(|(_, part)| matches!(part, Part::Expert(_, Projection::Down))));
        let rows: usize = ids.iter().map(Vec::len).sum();
        for ((layer, part), (moment, seen)) in &found {
            assert_eq!(*seen == rows as u64, !matches!(part, Part::Expert(..)), "{part:?}");
            assert!(moment.iter().zip(moment.t()).all(|(a, b)| a == b), "symmetric");
            // The other pass divides by the mean over the matrices of a site: down projections stand alone at theirs.
            if matches!(part, Part::Expert(_, Projection::Down)) {
                let mean = moment.diag().mean().unwrap();
                let shares = &kept[&(*layer, *part)];
                assert!(moment.diag().iter().zip(shares).all(|(d, r)| (f64::from(d / mean) - r).abs() < 1e-3 * r.max(1.0)), "{part:?}");
            }
        }
    }
}

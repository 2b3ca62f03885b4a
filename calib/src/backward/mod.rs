//! The backward pass: layers stream past in reverse, each with the gradient of the loss at its output.
//!
//! [`run`] carries the samples forward, keeping what enters each layer; draws a target for every position from the model's
//! own distribution; and takes the gradient of `ℓ = Σ_t −log p(y_t)`, a sum over positions, back through one layer after the
//! other: attention, norms, routed and shared experts, and the router's weights (which experts are chosen has no gradient).
//! At every Linear matrix that may be quantized it makes the quantities of [`stats::end_loss`](crate::stats::end_loss) and
//! hands them to a [`Receive`]: a site's second moment as soon as it is whole, a layer's token weights at its end.
//!
//! Derivatives are written out by hand beside what they are derivatives of, in [`forward`](crate::forward).
//!
//! **Memory.** In the letters of [`forward`](crate::forward), with the narrowest token weight `w = Σ sites' rows` (at most
//! `R · (6 + 2·k)`) of one layer, the peak of one layer is, in f32,
//!
//! `4 · ( 6·R·d + n · max( b · (8·q + 8·d) + 4·s , 3·f·d + min(R, CHUNK) · (6·d + 9·f) + d² + f² ) + W + its second moments +
//! 2·k·R + w )` bytes, with `s` scores at once and `W` the weights of attention, router and shared expert ([`peak_bytes`] computes
//! it, and a test holds the pass to it):
//!
//! what entered the layer, what entered its second half and its normed copy, the gradients at both, and one more copy waiting
//! to be added. With [`Scratch::Memory`] another `4·L·R·d` for what entered the layers; with [`Scratch::Disk`] that lies on
//! disk. The head takes itself and logits of at most [`LOGITS`](crate::evaluate::LOGITS) values.
//!
//! **Bits do not depend on the number of threads**, as in the forward pass.

mod divergence;
mod gradients;
mod inputs;
mod layer;
mod loss;
mod outputs;
mod peak;
mod sums;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::arch::Site;
use crate::device::{Device, Job};
use crate::forward::{Head, NoTap, Options, decoder_layer, embed, rows, values};
use crate::pass::Spread;
use crate::progress::Progress;
use crate::stats::end_loss::{LayerWeights, SiteLoss};
use crate::{Result, Weights};

pub use divergence::{ModelGradients, Reference};
pub use gradients::{LayerGradients, layer_error, layer_gradients};
use inputs::Inputs;
use layer::Walk;
pub use outputs::{OutputMoments, Outputs};
pub use peak::peak_bytes;
use sums::Sums;

/// `end_loss`: how the loss is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "EndLoss")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Seed of the targets.
    pub seed: u64,
    /// Where targets come from.
    pub targets: Targets,
}

/// Where the target of each position comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Targets {
    /// Drawn from the model's own distribution: costs are those of the KL divergence from the model as it is.
    #[default]
    Own,
    /// The token that follows in the text: the empirical Fisher information. The last position of a sample has no loss.
    Text,
}

/// Where what entered each layer is kept until the pass comes back to it.
#[derive(Clone, Debug)]
pub enum Scratch<'a> {
    /// In memory; a run that is killed starts over.
    Memory,
    /// In files of this folder, one a layer, which are deleted as they are used. A killed run goes on at the last finished
    /// layer. The key holds what must not have changed (`model files`, `calibration samples`).
    Disk(&'a Path, BTreeMap<String, String>),
}

/// Who makes something of what the pass finds.
pub trait Receive: Sync {
    /// Whether the second moment of this site is wanted: without it the site costs next to nothing.
    fn wants(&self, _layer: usize, _site: Site) -> bool {
        true
    }

    /// What enters a layer's experts, and how many rows each of them was given, `[experts]`; before any of its experts' sites.
    ///
    /// # Errors
    ///
    /// As [`Receive::site`].
    fn entered(&self, _layer: usize, _rows: &Spread<'_>, _loads: &[u64]) -> Result<()> {
        Ok(())
    }

    /// All of a wanted site, also of an expert that no token reached. Sites of one layer may come from several threads at
    /// once.
    ///
    /// # Errors
    ///
    /// Whatever the receiver finds wrong; the pass stops with it.
    fn site(&self, layer: usize, loss: SiteLoss) -> Result<()>;

    /// The layer is done; layers come from the last to the first. A run that resumes does not come back to a layer for which
    /// this has returned, but it may come back to one for which [`Receive::site`] has.
    ///
    /// # Errors
    ///
    /// As [`Receive::site`].
    fn layer(&self, layer: usize, weights: LayerWeights) -> Result<()>;
}

/// A backward pass.
#[derive(Clone, Copy)]
pub struct Backward<'a> {
    /// The model.
    pub weights: &'a dyn Weights,
    /// Token ids of the samples.
    pub ids: &'a [Vec<u32>],
    /// How the loss is made.
    pub params: &'a Params,
    /// Where what entered the layers is kept.
    pub scratch: &'a Scratch<'a>,
    /// Hears of every layer, forward and backward.
    pub progress: &'a dyn Progress,
}

/// Runs a backward pass.
///
/// # Errors
///
/// [`Error::Changed`](crate::Error::Changed) where the scratch folder is of another model, samples or parameters, an IO error,
/// [`Error::NotFinite`](crate::Error::NotFinite), what running the model says, or what the receiver finds wrong.
pub fn run(pass: &Backward<'_>, receiver: &dyn Receive, device: Device) -> Result<()> {
    device.run(On { pass, receiver })
}

struct On<'a> {
    pass: &'a Backward<'a>,
    receiver: &'a dyn Receive,
}

impl Job for On<'_> {
    type Output = Result<()>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<()> {
        let Self { pass, receiver } = self;
        let layers = pass.weights.spec().layers.len();
        let mut inputs = Inputs::<B>::new(pass.scratch, pass.params);
        pass.progress.start("layers, forward and backward", 2 * layers as u64);
        let (next, mut gradient) = match inputs.gradient(device)? {
            Some(found) => found,
            None => (layers, pass.forward(&mut inputs, device)?),
        };
        pass.progress.tick((2 * layers - next) as u64);
        let sums = Sums::new(pass.weights.spec(), receiver, pass.tokens());
        let walk = Walk { weights: pass.weights, device, options: Options::of::<B>(), sink: &sums };
        for layer in (0..next).rev() {
            let squares = mean_squares(&gradient)?;
            walk.layer(layer, inputs.take(layer, device)?, &mut gradient)?;
            receiver.layer(layer, sums.finish(squares))?;
            inputs.finish(layer, &gradient)?;
            pass.progress.tick(1);
        }
        pass.progress.finish();
        inputs.remove()
    }
}

impl Backward<'_> {
    /// Tokens that have a target.
    fn tokens(&self) -> u64 {
        let all: usize = self.ids.iter().map(Vec::len).sum();
        let without = if self.params.targets == Targets::Text { self.ids.len() } else { 0 };
        (all - without) as u64
    }

    /// Carries the samples to the end, and gives the gradient there.
    fn forward<B: Backend>(&self, inputs: &mut Inputs<B>, device: &B::Device) -> Result<Vec<Tensor<B, 3>>> {
        let (first, mut hidden) = match inputs.last(self.weights.spec().layers.len(), device)? {
            Some(found) => found,
            None => {
                let hidden = embed(self.weights, self.ids, device)?;
                inputs.put(0, &hidden)?;
                (0, hidden)
            }
        };
        for layer in first..self.weights.spec().layers.len() {
            decoder_layer(self.weights, layer, &mut hidden, &NoTap, Options::of::<B>())?;
            if layer + 1 < self.weights.spec().layers.len() {
                inputs.put(layer + 1, &hidden)?;
            }
        }
        let head = Head::load(self.weights, device)?;
        loss::to_gradient(&head, &mut hidden, self.ids, self.params)?;
        inputs.finish(self.weights.spec().layers.len(), &hidden)?;
        Ok(hidden)
    }
}

/// Mean over the channels of the squared gradient of every row.
fn mean_squares<B: Backend>(gradient: &[Tensor<B, 3>]) -> Result<Vec<f32>> {
    let mut means = Vec::new();
    for batch in gradient {
        let rows = rows(batch.clone());
        let width = rows.dims()[1];
        let square = |row: &[f32]| row.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
        means.extend(values(rows, "gradients")?.chunks_exact(width).map(|row| (square(row) / width as f64) as f32));
    }
    Ok(means)
}

//! What the forward pass shows to whoever measures it.

use burn::tensor::{Tensor, backend::Backend};

use crate::Result;
use crate::arch::Site;

/// Which rows of the samples an expert was given, and with what weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    /// Rows over all samples, rising: `sample · tokens + position`. `[rows]`.
    pub tokens: Vec<u32>,
    /// The final routing weight that multiplies the expert's output; 0 for a row that chose other experts, where
    /// [`Tap::wants_every_row`] shows it all the same. `[rows]`.
    pub weights: Vec<f32>,
}

/// The router's doings on one batch of rows. The three quantities that methods tell apart are kept apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// First row of this batch over all samples.
    pub first: usize,
    /// Rows of this batch.
    pub rows: usize,
    /// Routed experts.
    pub experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Raw logits, `[rows, experts]`.
    pub logits: Vec<f32>,
    /// Scores before the choice (softmax over all experts or sigmoid, no bias), `[rows, experts]`.
    pub scores: Vec<f32>,
    /// Chosen experts, best first, `[rows, top_k]`.
    pub chosen: Vec<u32>,
    /// Final routing weights after renormalization and scaling, `[rows, top_k]`.
    pub weights: Vec<f32>,
}

/// Receives what passes through one decoder layer. Every method has an empty default.
///
/// Rows of one site arrive in chunks, in rising order of token; `done` follows the last chunk. Different sites may be
/// served from different threads; one site is always served from one thread at a time.
///
/// Hold no lock while multiplying tensors: a thread that waits for a product may take up another expert meanwhile and come
/// back through the tap.
pub trait Tap<B: Backend>: Sync {
    /// Whether the rows of this site are wanted (converting and gathering them is not free).
    fn wants(&self, _layer: usize, _site: Site) -> bool {
        false
    }

    /// A chunk of rows `[rows, width]` enters a site. `routed` stands at expert sites and is aligned with the rows.
    ///
    /// # Errors
    ///
    /// Whatever the receiver finds wrong; the pass stops with it.
    fn rows(&self, _layer: usize, _site: Site, _rows: &Tensor<B, 2>, _routed: Option<&Routed>) -> Result<()> {
        Ok(())
    }

    /// Whether the sites of every expert are to be shown all rows, also those that chose other experts, with a routing weight of 0. It
    /// changes no output and costs experts / top-k times the experts' work.
    fn wants_every_row(&self) -> bool {
        false
    }

    /// Whether [`Tap::gates`] is wanted (the two are kept apart for it).
    fn wants_gates(&self) -> bool {
        false
    }

    /// What a gated MLP's gate and up projections gave for a chunk of rows, before the activation, `[rows, inner]` each;
    /// `down` is the site that `silu(gate) ⊙ up` enters. Otherwise as [`Tap::rows`].
    ///
    /// # Errors
    ///
    /// As [`Tap::rows`].
    fn gates(&self, _layer: usize, _down: Site, _gate: &Tensor<B, 2>, _up: &Tensor<B, 2>, _routed: Option<&Routed>) -> Result<()> {
        Ok(())
    }

    /// All rows of this site have been seen. Called for every site that is wanted, also where no row came.
    ///
    /// # Errors
    ///
    /// As [`Tap::rows`].
    fn done(&self, _layer: usize, _site: Site) -> Result<()> {
        Ok(())
    }

    /// The router has chosen for one batch.
    ///
    /// # Errors
    ///
    /// As [`Tap::rows`].
    fn routing(&self, _layer: usize, _routing: &Routing) -> Result<()> {
        Ok(())
    }

    /// What enters a layer's experts, batches `[rows, hidden]`, and how many rows each expert was given, `[experts]`. Comes
    /// after the last batch was routed and before any expert runs.
    ///
    /// # Errors
    ///
    /// As [`Tap::rows`].
    fn entered(&self, _layer: usize, _x: &[Tensor<B, 2>], _loads: &[u64]) -> Result<()> {
        Ok(())
    }

    /// Output of one routed expert before its routing weight, `[rows, hidden]`, a chunk at a time.
    ///
    /// # Errors
    ///
    /// As [`Tap::rows`].
    fn expert_output(&self, _layer: usize, _expert: usize, _out: &Tensor<B, 2>, _routed: &Routed) -> Result<()> {
        Ok(())
    }

    /// A whole block's tensor of one batch, `[rows, hidden]`, by name: `attn` (attention's output before the residual sum),
    /// `moe.in`, `moe.routed_out`, `moe.out`, `hidden` (the layer's output).
    ///
    /// # Errors
    ///
    /// As [`Tap::rows`].
    fn block(&self, _layer: usize, _name: &'static str, _batch: usize, _x: &Tensor<B, 2>) -> Result<()> {
        Ok(())
    }

    /// Whether [`Tap::block`] is wanted.
    fn wants_blocks(&self) -> bool {
        false
    }
}

/// Looks at nothing.
pub struct NoTap;
impl<B: Backend> Tap<B> for NoTap {}

//! What pieces of a layer give on the way back: gradients, and the rows and gradients at their Linear matrices.
//!
//! Every piece of the forward pass has its derivative beside it, written out by hand: exact, in blocks of the forward's size,
//! and in parallel like the forward. burn's autodiff was the alternative; its graphs are locked for as long as they run, which
//! a thread that steals work while it waits for a product inside of one does not survive, and it keeps every intermediate.

use burn::tensor::{Tensor, backend::Backend};

use super::rope::Rotary;
use crate::arch::{Part, Site};

/// Rows that entered a site, `[rows, in]`, and the gradient at what each matrix made of them, `[rows, out]`.
pub(crate) struct SiteRows<B: Backend> {
    /// The site.
    pub site: Site,
    /// What entered.
    pub rows: Tensor<B, 2>,
    /// `∂ℓ/∂z` of each matrix.
    pub outputs: Vec<(Part, Tensor<B, 2>)>,
}

/// What a piece gives on the way back.
pub(crate) struct Adjoint<B: Backend> {
    /// The gradient at its input, `[rows, hidden]`.
    pub input: Tensor<B, 2>,
    /// What passed its matrices.
    pub sites: Vec<SiteRows<B>>,
}

/// How the rows of one batch stand in their samples.
pub(crate) struct Frame<'a, B: Backend> {
    /// Samples and tokens of each.
    pub shape: [usize; 2],
    /// Their positions.
    pub rotary: &'a Rotary<B>,
    /// The layer's sliding window.
    pub window: Option<usize>,
}

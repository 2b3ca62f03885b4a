//! The one thing the forward pass asks of a model: its values, by role.

use ndarray::{Array1, Array2};

use crate::Result;
use crate::arch::{Role, Spec};

/// A model that can be run: the original checkpoint, or a compressed output read back.
///
/// Nothing is read ahead: each call reads and converts one tensor.
pub trait Weights: Sync {
    /// The model's arithmetic.
    fn spec(&self) -> &Spec;

    /// A two-dimensional tensor, `[out, in]` (the embedding: `[vocab, hidden]`), in f32.
    ///
    /// # Errors
    ///
    /// An IO error, a value that is not finite, or a role that this model does not have.
    fn matrix(&self, role: Role) -> Result<Array2<f32>>;

    /// A one-dimensional tensor, in f32.
    ///
    /// # Errors
    ///
    /// As [`Weights::matrix`].
    fn vector(&self, role: Role) -> Result<Array1<f32>>;
}

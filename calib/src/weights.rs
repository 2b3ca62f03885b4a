//! The one thing the forward pass asks of a model: its values, by role.

use ndarray::{Array1, Array2};

use crate::Result;
use crate::arch::{Role, Spec};

/// A model that can be run: the original checkpoint, a compressed output read back, or a packed one that stays packed.
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

    /// A routed expert that multiplies rows itself, such as one whose matrices stay packed; `None`: its matrices are read and multiplied.
    ///
    /// # Errors
    ///
    /// As [`Weights::matrix`].
    fn applied(&self, _layer: usize, _expert: usize) -> Result<Option<Box<dyn Applied>>> {
        Ok(None)
    }
}

/// A routed expert `down(silu(gate x) ⊙ up x)` that multiplies rows itself.
pub trait Applied: Send + Sync + std::fmt::Debug {
    /// What gate and up give for rows `[rows, hidden]`: `[rows, inner]` each.
    fn gates(&self, x: &[f32]) -> [Vec<f32>; 2];

    /// What down gives for rows `[rows, inner]`: `[rows, hidden]`.
    fn down(&self, x: &[f32]) -> Vec<f32>;
}

//! What a plan is made from beside the recipe: the checkpoint's shape, and what calibration saw.

use std::collections::BTreeMap;

use calib::arch::{Part, Role, Site};
use kernels::ScaleType;

/// A checkpoint as far as a plan depends on it: its tensors, without their data.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// The checkpoint's fingerprint.
    pub fingerprint: String,
    /// Every tensor, FP8 companions folded away, by name.
    pub tensors: Vec<Tensor>,
}

/// One tensor of a [`Shape`].
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its dimensions; a Linear matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// What it is to the model.
    pub role: Role,
    /// The type that scales are stored in if it is quantized: the model's own 16-bit type.
    pub scale: ScaleType,
    /// Bytes that it takes in the checkpoint, FP8 scales included.
    pub bytes: u64,
}

impl Tensor {
    /// Inputs of a matrix that a quantizer may change, with its layer and part.
    pub fn quantizable(&self) -> Option<(usize, Part, usize)> {
        match (self.role, self.shape.as_slice()) {
            (Role::Layer(layer, part), &[_, inputs]) if self.role.is_quantizable() => Some((layer, part, inputs)),
            _ => None,
        }
    }
}

/// What the calibration pass saw, as far as a plan depends on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Hash of the samples.
    pub corpus: String,
    /// What entered each site of each layer.
    pub sites: BTreeMap<(usize, Site), Seen>,
}

/// What entered one site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Rows (tokens).
    pub rows: u64,
    /// Input channels that were zero in every row.
    pub dead: usize,
}


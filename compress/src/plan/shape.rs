//! What a plan is made from beside the recipe: the checkpoint's shape, and what calibration saw.

use std::collections::BTreeMap;

use calib::Model;
use calib::arch::{Part, Role, Site};
use calib::stats::{Manifest, Store};
use calib::tensor::Dtype;
use kernels::ScaleType;

use crate::allocate::sensitivity::Table;
use crate::{Error, Result};

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

impl Shape {
    /// The shape of an open model.
    pub fn of(model: &Model) -> Self {
        let checkpoint = model.checkpoint();
        let bytes = |name: &str| checkpoint.info(name).map_or(0, |info| info.bytes.end - info.bytes.start);
        let tensor = |claimed: &calib::arch::Claimed| Tensor {
            name: claimed.name.clone(),
            shape: claimed.shape.clone(),
            role: claimed.role,
            scale: match checkpoint.info(&claimed.name).map(|info| info.dtype) {
                Some(Dtype::F16) => ScaleType::F16,
                _ => ScaleType::Bf16,
            },
            bytes: bytes(&claimed.name) + bytes(&format!("{}_scale_inv", claimed.name)),
        };
        let mut tensors: Vec<Tensor> = model.layout().tensors().iter().map(tensor).collect();
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Self { fingerprint: checkpoint.fingerprint().to_owned(), tensors }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }
}

/// What a calibration pass left, if it is finished.
///
/// # Errors
///
/// [`Error::Stage`] if it is not; an IO error, or a manifest that is none.
pub fn finished(store: &Store) -> Result<Manifest> {
    let unfinished = || Error::Stage { path: store.dir().to_owned(), what: "the calibration pass has left no manifest here".into() };
    store.manifest()?.ok_or_else(unfinished)
}

impl Measured {
    /// Reads what a finished calibration pass left.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if the pass is not finished; an IO error, or a file that is not one of these.
    pub fn read(store: &Store, table: Option<Table>) -> Result<Self> {
        let manifest = finished(store)?;
        let corpus = manifest.corpus();
        let mut sites = BTreeMap::new();
        for layer in 0..manifest.layers {
            for (site, sums) in store.get(layer)?.channels {
                let dead = sums.squares.iter().filter(|square| **square == 0.0).count();
                sites.insert((layer, site), Seen { rows: sums.tokens, dead });
            }
        }
        Ok(Self { corpus, sites, table })
    }
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
    /// Predicted losses, where widths are shared out.
    pub table: Option<Table>,
}

/// What entered one site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Rows (tokens).
    pub rows: u64,
    /// Input channels that were zero in every row.
    pub dead: usize,
}

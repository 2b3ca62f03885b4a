//! A plan in numbers.

use std::collections::{BTreeMap, BTreeSet};

use calib::arch::{Part, Role};
use kernels::ScaleType;
use serde::{Deserialize, Serialize};

use super::{Action, Plan, Quantize, Shape, Solver};

/// A plan in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Matrices that are quantized.
    pub matrices: usize,
    /// Weights in them.
    pub weights: u64,
    /// Bytes that they take in the checkpoint.
    pub bytes_before: u64,
    /// Bytes of their codes and scales.
    pub bytes_after: u64,
    /// Tensors carried over.
    pub kept: usize,
    /// Bytes of them.
    pub bytes_kept: u64,
    /// Matrices among them that `exclude` names.
    pub excluded: usize,
    /// Tensors left out.
    pub dropped: usize,
    /// Bytes of them.
    pub bytes_dropped: u64,
    /// Experts that are rounded to nearest because no token reached them.
    pub rounded_experts: usize,
    /// Input channels that no token excited, each counted once for all matrices that it enters.
    pub dead_channels: usize,
}

impl Summary {
    /// Stored bits a quantized weight, scales counted; `None` where nothing is quantized.
    pub fn bits_per_weight(&self) -> Option<f64> {
        (self.weights > 0).then(|| self.bytes_after as f64 * 8.0 / self.weights as f64)
    }
}

impl Plan {
    /// The plan in numbers.
    pub fn summary(&self, shape: &Shape) -> Summary {
        let mut sum = Summary::default();
        let (mut rounded, mut dead) = (BTreeSet::new(), BTreeMap::new());
        for tensor in &shape.tensors {
            match self.tensors.get(&tensor.name) {
                Some(Action::Quantize(q)) => {
                    sum.matrices += 1;
                    sum.weights += tensor.shape.iter().product::<usize>() as u64;
                    sum.bytes_before += tensor.bytes;
                    sum.bytes_after += q.bytes(&tensor.shape);
                    let Role::Layer(layer, part) = tensor.role else { continue };
                    if let (Solver::Rounded { .. }, Part::Expert(expert, _)) = (&q.solver, part) {
                        rounded.insert((layer, expert));
                    }
                    dead.insert((layer, part.site()), q.dead_channels);
                }
                Some(Action::Drop { .. }) => {
                    sum.dropped += 1;
                    sum.bytes_dropped += tensor.bytes;
                }
                _ => {
                    sum.kept += 1;
                    sum.excluded += usize::from(tensor.role.is_quantizable());
                    sum.bytes_kept += tensor.bytes;
                }
            }
        }
        sum.rounded_experts = rounded.len();
        sum.dead_channels = dead.values().sum();
        sum
    }
}

impl Quantize {
    /// Bytes of the packed codes (a row is a whole number of 32-bit words) and scales of a matrix `[out, in]`.
    pub fn bytes(&self, shape: &[usize]) -> u64 {
        let &[outputs, inputs] = shape else { return 0 };
        let words = (inputs * usize::from(self.bits)).div_ceil(32);
        let scale = match self.scale {
            ScaleType::Bf16 | ScaleType::F16 => 2,
            ScaleType::F32 => 4,
        };
        (outputs * (words * 4 + inputs.div_ceil(self.group.len(inputs)) * scale)) as u64
    }
}

//! A plan in numbers.

use std::collections::{BTreeMap, BTreeSet};

use calib::arch::{Part, Role};
use serde::{Deserialize, Serialize};

use crate::allocate::{Account, Choice};

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
    /// Experts that are solved against their layer's tokens too because few reached them.
    #[serde(default)]
    pub blended_experts: usize,
    /// Experts that are rounded to nearest because few tokens reached them.
    pub rounded_experts: usize,
    /// Input channels that no token excited, each counted once for all matrices that it enters.
    pub dead_channels: usize,
    /// Matrices by kind and width, where widths are shared out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub widths: BTreeMap<String, BTreeMap<String, usize>>,
    /// How they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Account>,
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
        let mut sum = Summary { allocation: self.allocation.clone(), ..Summary::default() };
        let (mut blended, mut rounded, mut dead) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        for tensor in &shape.tensors {
            match self.tensors.get(&tensor.name) {
                Some(Action::Quantize(q)) => {
                    sum.matrices += 1;
                    sum.weights += tensor.shape.iter().product::<usize>() as u64;
                    sum.bytes_before += tensor.bytes;
                    sum.bytes_after += q.bytes(&tensor.shape);
                    if self.allocation.is_some() {
                        let choice = Choice { bits: q.bits, group: q.group, grid: q.grid };
                        *sum.widths.entry(tensor.role.kind().to_string()).or_default().entry(choice.to_string()).or_default() += 1;
                    }
                    let Role::Layer(layer, part) = tensor.role else { continue };
                    if let Part::Expert(expert, _) = part {
                        match &q.solver {
                            Solver::Planned => false,
                            Solver::Blended { .. } => blended.insert((layer, expert)),
                            Solver::Rounded { .. } => rounded.insert((layer, expert)),
                        };
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
        (sum.blended_experts, sum.rounded_experts) = (blended.len(), rounded.len());
        sum.dead_channels = dead.values().sum();
        sum
    }
}

impl Quantize {
    /// Bytes of the packed codes, scales and zeros of a matrix `[out, in]`.
    pub fn bytes(&self, shape: &[usize]) -> u64 {
        let &[outputs, inputs] = shape else { return 0 };
        self.width().stored_bytes(outputs, inputs)
    }
}

//! A plan in numbers.

use std::collections::{BTreeMap, BTreeSet};

use calib::arch::{Part, Projection, Role};
use serde::{Deserialize, Serialize};

use crate::allocate::{Account, Choice, Substitute};

use super::{Action, Plan, Quantize, Shape, Solver, Tensor};

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
    /// Routed experts a layer before and after, and who chose, where some go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<(usize, usize, String)>,
    /// Matrices by kind and width, where widths are shared out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub widths: BTreeMap<String, BTreeMap<String, usize>>,
    /// Experts of each layer that put out a constant instead, where any do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub substituted: Option<Substituted>,
    /// How they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Account>,
}

/// Experts that put out a constant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Substituted {
    /// Which.
    pub by: Substitute,
    /// How many, by layer.
    pub experts: BTreeMap<usize, usize>,
    /// Weights that they had.
    pub weights: u64,
    /// Bytes of those in the checkpoint.
    pub bytes_before: u64,
    /// Bytes of their constants.
    pub bytes_after: u64,
}

impl Substituted {
    /// Adds one matrix of such an expert, `[out, in]`.
    fn add(found: &mut Option<Self>, by: Substitute, tensor: &Tensor) {
        let empty = || Self { by, experts: BTreeMap::new(), weights: 0, bytes_before: 0, bytes_after: 0 };
        let all = found.get_or_insert_with(empty);
        all.weights += tensor.shape.iter().product::<usize>() as u64;
        all.bytes_before += tensor.bytes;
        // One of its three stands for the expert.
        if let Role::Layer(layer, Part::Expert(_, Projection::Down)) = tensor.role {
            *all.experts.entry(layer).or_default() += 1;
            all.bytes_after += by.bytes(tensor.shape[0]);
        }
    }
}

impl Summary {
    /// Stored bits a quantized weight, scales counted, those of dropped experts and their constants among them; `None` where nothing is
    /// quantized.
    pub fn bits_per_weight(&self) -> Option<f64> {
        let (weights, bytes) = self.substituted.as_ref().map_or((0, 0), |dropped| (dropped.weights, dropped.bytes_after));
        (self.weights > 0).then(|| (self.bytes_after + bytes) as f64 * 8.0 / (self.weights + weights) as f64)
    }
}

impl Plan {
    /// The plan in numbers.
    pub fn summary(&self, shape: &Shape) -> Summary {
        let experts = self.experts.as_ref().map(|experts| (experts.before, experts.after, experts.by.clone()));
        let mut sum = Summary { allocation: self.allocation.clone(), experts, ..Summary::default() };
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
                Some(Action::Substitute(by)) => Substituted::add(&mut sum.substituted, *by, tensor),
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

//! The plan: what becomes of every tensor. Above it everything decides, below it everything obeys.
//!
//! `plan.json` holds no time stamp and no absolute path, and its keys are sorted: the same inputs give the same bytes.

use std::collections::BTreeMap;

use kernels::{Group, ScaleType};
use serde::{Deserialize, Serialize};

use crate::quantize::{Grid, Quantizer};

/// What becomes of one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this file's form.
    pub schema: u32,
    /// Fingerprint of the checkpoint that it was made for.
    pub model: String,
    /// Hash of the calibration samples, where a pass was needed.
    pub corpus: Option<String>,
    /// The solver of every tensor whose action says `Solver::Planned`.
    pub quantizer: Option<Quantizer>,
    /// One entry for every tensor of the checkpoint (FP8 companions folded away), by name.
    pub tensors: BTreeMap<String, Action>,
}

/// What becomes of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// Carried over bit for bit (FP8 is converted to bf16, because the output's config no longer says fp8).
    Keep,
    /// Left out of the output.
    Drop {
        /// Why.
        reason: String,
    },
    /// Quantized.
    Quantize(Quantize),
}

/// How one matrix is quantized.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    /// Bits a code.
    pub bits: u8,
    /// Inputs that share a scale.
    pub group: Group,
    /// Where zero lies.
    pub grid: Grid,
    /// Stored type of the scales.
    pub scale: ScaleType,
    /// Who chooses the codes.
    pub solver: Solver,
    /// Input channels that no calibration token excited: their weights are rounded, not solved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dead_channels: usize,
}

/// Who chooses the codes of one matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Solver {
    /// The plan's quantizer.
    Planned,
    /// Rounding to nearest instead, and why (an expert that saw no token).
    Rounded {
        /// Why.
        reason: String,
    },
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

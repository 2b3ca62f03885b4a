//! The best codes for a given width: everything that happens to one matrix once its width is known.
//!
//! Pure functions over matrices. [`rtn`] rounds, [`hqq`] fits zero points, [`gptq`] solves against a second moment of the inputs
//! and [`descent`] improves what it left; one search of scales and zero points serves the first and the third.

pub mod both;
mod codes;
mod columns;
pub mod descent;
pub mod factor;
pub mod gptq;
mod grid;
pub mod hqq;
pub mod learned;
pub mod pmq;
pub mod rtn;
#[cfg(test)]
mod testing;

use kernels::{Group, QuantizedMatrix, ScaleType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Where zero lies between the codes; `w = (u − z) · s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// `z = 2^(b−1)`: symmetric, nothing stored; from 2 bits.
    Sym,
    /// `z = (2^b − 1) / 2`: half-integer, nothing stored; levels `±s/2, ±3s/2, …`. One bit is this.
    Half,
    /// An integer zero a group, stored like a code; from 2 bits.
    Asym,
    /// A real zero a group, stored like a scale; from 2 bits.
    Offset,
}

impl Grid {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sym, Self::Half, Self::Asym, Self::Offset];

    /// Bits below which the grid makes no sense.
    pub fn fewest_bits(self) -> u8 {
        if self == Self::Half { 1 } else { 2 }
    }

    /// What an error about too few bits adds.
    pub(crate) fn hint(self) -> &'static str {
        if self == Self::Half { "" } else { "; 1 bit is the grid half" }
    }
}

/// What a matrix is quantized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Width {
    /// Bits a code, 1 to 8.
    pub bits: u8,
    /// Inputs that share a scale.
    pub group: Group,
    /// The type that scales (and real zeros) are stored in.
    pub scale_type: ScaleType,
    /// Where zero lies.
    pub grid: Grid,
}

impl Width {
    /// Largest code: `2^bits − 1`.
    pub fn top(&self) -> u8 {
        u8::MAX >> (8 - self.bits)
    }

    /// Inputs a group in a matrix of `inputs` inputs, when this width is possible there.
    ///
    /// # Errors
    ///
    /// [`Error::GridBits`], [`Error::GroupSize`].
    pub fn group_len(&self, inputs: usize) -> Result<usize> {
        if !(self.grid.fewest_bits()..=8).contains(&self.bits) {
            return Err(Error::GridBits { bits: self.bits, grid: self.grid });
        }
        let group = self.group.len(inputs);
        if inputs == 0 || group != 0 && inputs.is_multiple_of(group) {
            return Ok(group.max(1));
        }
        let nearest = (1..=inputs).filter(|&divisor| inputs.is_multiple_of(divisor)).min_by_key(|divisor| divisor.abs_diff(group));
        Err(Error::GroupSize { group, inputs, nearest: nearest.unwrap_or(1) })
    }

    /// Bytes of a matrix `[outputs, inputs]` as it is stored: a row of codes is a whole number of 32-bit words, integer zeros are
    /// packed down each column of groups.
    pub fn stored_bytes(&self, outputs: usize, inputs: usize) -> u64 {
        let groups = inputs.div_ceil(self.group.len(inputs).max(1));
        let scale = match self.scale_type {
            ScaleType::Bf16 | ScaleType::F16 => 2,
            ScaleType::F32 => 4,
        };
        let zeros = match self.grid {
            Grid::Sym | Grid::Half => 0,
            Grid::Asym => 4 * kernels::pack::words(outputs, self.bits) * groups,
            Grid::Offset => scale * outputs * groups,
        };
        (4 * outputs * kernels::pack::words(inputs, self.bits) + scale * outputs * groups + zeros) as u64
    }

    /// Bits a weight as stored, scales and zero points counted, in a matrix of `inputs` inputs.
    pub fn bits_per_weight(&self, inputs: usize) -> f64 {
        let scale = match self.scale_type {
            ScaleType::Bf16 | ScaleType::F16 => 16.0,
            ScaleType::F32 => 32.0,
        };
        let zero = match self.grid {
            Grid::Sym | Grid::Half => 0.0,
            Grid::Asym => f64::from(self.bits),
            Grid::Offset => scale,
        };
        f64::from(self.bits) + (scale + zero) / self.group.len(inputs).max(1) as f64
    }
}

/// Who chooses the codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Quantizer {
    /// Rounding to nearest: needs no calibration.
    Rtn(rtn::Params),
    /// HQQ: fitted zero points, without calibration.
    Hqq(hqq::Params),
    /// GPTQ: each column's error is made up for by the columns after it.
    Gptq(gptq::Params),
    /// MC-MoE's variant of GPTQ, for comparison with what it published: worse than `gptq` at 3 bits and below.
    Pmq(pmq::Params),
}

impl Quantizer {
    /// Whether it solves against second moments of a calibration pass.
    pub fn needs_calibration(&self) -> bool {
        matches!(self, Self::Gptq(_) | Self::Pmq(_))
    }
}

/// What improves a solver's codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Refine {
    /// Coordinate descent over the codes and refits of the scales, in turn, against the second moment that the solver used.
    Descent(descent::Params),
    /// Gradient steps on codes and scales against the output of the decoder layer; after a descent unless its `start` says not.
    Learned(learned::Params),
}

impl Refine {
    /// The descent that follows the solver, if one does.
    pub fn descent(&self) -> Option<descent::Params> {
        match self {
            Self::Descent(params) => Some(params.clone()),
            Self::Learned(learned::Params { start: learned::Start::Descent, .. }) => Some(descent::Params::default()),
            Self::Learned(learned::Params { start: learned::Start::Solver, .. }) => None,
        }
    }
}

/// `tr(ΔW · H · ΔWᵀ)`: what a change of the weights costs in squared output error, summed over the calibration tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// In the second moment as it was measured.
    pub undamped: f64,
    /// In the damped one that the solver used.
    pub damped: f64,
}

/// Whose codes a matrix has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// GPTQ's, or those of MC-MoE's variant.
    Gptq,
    /// Those of rounding to nearest on the same scales, because GPTQ's loss in the damped second moment was above theirs.
    Rtn,
}

/// A solved matrix, and how well it went.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// The codes.
    pub matrix: QuantizedMatrix,
    /// Whose codes they are.
    pub kept: Kept,
    /// What they cost.
    pub loss: Loss,
    /// Damping that was used, as a share of the mean diagonal.
    pub damping: f64,
    /// Inputs that no token excited; their weights are rounded.
    pub dead_channels: usize,
}

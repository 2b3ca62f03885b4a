//! AWQ: scales of input channels by how strongly they are excited (arXiv 2306.00978, eq. 4 and 5).
//!
//! A matrix is quantized as `Q(W · diag(s))`, and whoever makes its inputs makes them `s` times smaller: the product is the same, but
//! channels with large inputs are rounded more finely. With `m` the root mean square of a channel's inputs, `s = m^α / √(max · min)` over
//! the channels; `α` is the one of a grid over `[0, 1)` at which the error is least, the matrices rounded to nearest:
//! `Σ_t v_t ‖Q(W · diag s) · diag(s)⁻¹ x_t − W x_t‖²`, here on the diagonal of the second moment of the inputs,
//! `Σ_j d_j Σ_i Δ_ij²` with `d_j = Σ_t v_t x_tj²`. MoEQuant's affinity-guided form (arXiv 2505.03804) weighs tokens: `v = g²` with the
//! routing weight `g`, since an expert's output is multiplied with it.

use ndarray::{ArrayView2, Axis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::quantize::Width;
use crate::quantize::rtn::{self, rtn_weighted};

/// Knobs of the scaling of input channels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Awq")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Exponents that are tried, `i / exponents` for `i` from 0; 20 in AWQ's code.
    #[schemars(range(min = 2))]
    pub exponents: usize,
    /// Where widths are shared out: the one of them that exponents are chosen at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// What the error of a token counts.
    pub token_weight: TokenWeight,
    /// Which inputs are scaled; left out, all that the family allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folds: Option<Vec<Fold>>,
}

impl Default for Params {
    fn default() -> Self {
        Self { exponents: 20, bits: None, token_weight: TokenWeight::Affinity, folds: None }
    }
}

/// What the error of a token counts where exponents are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "AwqTokenWeight")]
#[serde(rename_all = "snake_case")]
pub enum TokenWeight {
    /// One as much as the other.
    None,
    /// The square of the weight with which the router multiplies the expert's output; 1 where there is none.
    #[default]
    Affinity,
}

/// Inputs that are scaled, and what makes them smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fold {
    /// Of the query, key and value projections (in latent attention of its first ones): the norm before them.
    AttentionIn,
    /// Of attention's output projection: the rows of the value projection, one scale for all heads that read a value.
    AttentionOut,
    /// Of gate and up, one scale for all experts, shared experts and the router of a layer: the norm before them.
    MlpIn,
    /// Of down, each MLP's own: the rows of its up projection.
    Down,
}

impl Fold {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::AttentionIn, Self::AttentionOut, Self::MlpIn, Self::Down];

    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::AttentionIn => "attention_in",
            Self::AttentionOut => "attention_out",
            Self::MlpIn => "mlp_in",
            Self::Down => "down",
        }
    }
}

/// `m^α / √(max · min)` for channels whose inputs have the sums of squares `squares`, `[channels]`; 1 for one that was never excited.
pub fn scales(squares: &[f64], alpha: f64) -> Vec<f32> {
    let raw: Vec<f64> = squares.iter().map(|square| square.sqrt().powf(alpha)).collect();
    let excited = || raw.iter().zip(squares).filter(|(_, square)| **square > 0.0).map(|(raw, _)| *raw);
    let (least, most) = excited().fold((f64::INFINITY, 0.0_f64), |(least, most), raw| (least.min(raw), most.max(raw)));
    let middle = (least * most).sqrt();
    raw.iter().zip(squares).map(|(raw, &square)| if square > 0.0 { (raw / middle) as f32 } else { 1.0 }).collect()
}

/// `Σ_j d_j Σ_i (Q(W · diag s) · diag(s)⁻¹ − W)²_ij` of `w`, `[out, in]`, with `d` and `s` `[in]` and `Q` rounding to nearest on scales
/// out of `clips` candidates that are chosen by the same error.
///
/// # Errors
///
/// As [`rtn_weighted`].
pub fn error(w: ArrayView2<'_, f32>, d: &[f32], s: &[f32], width: &Width, clips: u16) -> Result<f64> {
    let mut scaled = w.to_owned();
    scaled.axis_iter_mut(Axis(1)).zip(s).for_each(|(mut column, &s)| column *= s);
    let weights: Vec<f32> = d.iter().zip(s).map(|(d, s)| d / (s * s)).collect();
    let rounded = rtn_weighted(scaled.view(), &weights, width, &rtn::Params { clips })?.dequantize();
    let row = |(w, q): (ndarray::ArrayView1<'_, f32>, ndarray::ArrayView1<'_, f32>)| {
        w.iter().zip(q).zip(&weights).map(|((w, q), &d)| f64::from(d) * f64::from(q - w).powi(2)).sum::<f64>()
    };
    Ok(scaled.rows().into_iter().zip(rounded.rows()).map(row).sum())
}

/// The first of the least errors: an exponent that gains nothing is none.
pub fn least(errors: &[f64]) -> usize {
    let below = |best: usize, (i, error): (usize, &f64)| if *error < errors[best] { i } else { best };
    errors.iter().enumerate().fold(0, below)
}

#[cfg(test)]
mod tests {
    use kernels::{Group, ScaleType};
    use ndarray::array;

    use super::*;
    use crate::quantize::Grid;

    const BITS3: Width = Width { bits: 3, group: Group::PerChannel, scale_type: ScaleType::F32, grid: Grid::Sym };

    #[test]
    fn scales_by_hand() {
        // m = 4, 1, 16; α = ½: 2, 1, 4; √(4 · 1) = 2. The last channel was never excited.
        assert_eq!(scales(&[16.0, 1.0, 256.0, 0.0], 0.5), [1.0, 0.5, 2.0, 1.0]);
        assert_eq!(scales(&[16.0, 1.0, 0.0], 0.0), [1.0, 1.0, 1.0]);
        assert_eq!(scales(&[0.0, 0.0], 0.5), [1.0, 1.0]);
    }

    #[test]
    fn an_error_by_hand() {
        // 3 bits: s = 3.5 / 3.5 = 1; 3.5 → 3, 1.4 → 1: 4 · 0.25 + 100 · 0.16 = 17.
        let w = array![[3.5_f32, 1.4]];
        assert!((error(w.view(), &[4.0, 100.0], &[1.0, 1.0], &BITS3, 1).unwrap() - 17.0).abs() < 1e-4);
        // Twice as wide the second is 2.8 → 3, back to 1.5: 4 · 0.25 + 100 · 0.01 = 2.
        assert!((error(w.view(), &[4.0, 100.0], &[1.0, 2.0], &BITS3, 1).unwrap() - 2.0).abs() < 1e-4);
    }

    #[test]
    fn the_first_of_equal_errors_is_taken() {
        assert_eq!((least(&[2.0, 1.0, 1.0]), least(&[1.0]), least(&[1.0, 1.0])), (1, 0, 0));
    }

    #[test]
    fn channels_with_outsized_inputs_gain() {
        // Sums of twelve numbers of a small generator: normal enough.
        let mut state = 7_u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        };
        let w = ndarray::Array2::from_shape_simple_fn((64, 128), || (0..12).map(|_| uniform()).sum::<f32>());
        // Two channels of 128 are excited 100 times as strongly as the others.
        let squares: Vec<f64> = (0..128).map(|j| if j % 64 == 5 { 1e4 } else { 1.0 }).collect();
        let d: Vec<f32> = squares.iter().map(|&x| x as f32).collect();
        let at = |alpha| error(w.view(), &d, &scales(&squares, alpha), &BITS3, 1).unwrap();
        let errors: Vec<f64> = (0..20).map(|i| at(f64::from(i) / 20.0)).collect();
        let best = least(&errors);
        assert!(best > 0 && errors[best] < 0.5 * errors[0], "{best}: {errors:?}");
    }
}

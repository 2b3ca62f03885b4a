//! MC-MoE's own quantizers, as its published code has them (arXiv 2410.06270; specs: the trial quantizer of its ε and its GPTQ variant).
//!
//! They are here so that its allocations can be reproduced, not because they are good. Both are its structure in f32, not its bits
//! (it computes in f16).
//!
//! [`trial`], behind `ε_{e,b}`: rounding to nearest on the range with 0 forced into it, `s = (max − min)/(2^b − 1)`,
//! `z = round(−min/s)`; at 1 bit `ŵ = mean|w|·sign(w)` with `sign(0) = +1`.
//!
//! [`gptq`], `[quantize.pmq]`: columns in their own order, a real zero `z = −min/s`, both ends of the range scaled by the one of 101 factors between 0.9
//! and 1.1 with the least `Σ|w − ŵ|^2.4`, chosen on the weights as they are when the group is entered; 1 bit as above. Dead channels
//! become zeros; scales are as their type stores them. **At 3 bits and below the errors of a column are not carried to the other columns of its group**, only to those
//! after it.

use kernels::{Group, QuantizedMatrix, ScaleType, Zeros};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis, s};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::columns::check_finite;
use super::grid::floor;
use super::{Grid, Kept, Loss, Solved, Width};
use crate::{Error, Result};

/// Knobs of MC-MoE's GPTQ: none, its code has them fixed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "PmqQuantizer")]
#[serde(deny_unknown_fields, default)]
pub struct Params {}

/// Damping, as a share of the mean diagonal.
const DAMPING: f64 = 0.01;

/// The exponent of the errors that choose a clip.
const NORM: f32 = 2.4;

/// The largest width at which a group's columns do not make up for one another.
const UNCOMPENSATED: u8 = 3;

/// The codes behind `ε_{e,b}`: `w`, `[out, in]`, rounded to `bits` in groups of `group` inputs, scales in f32.
///
/// The grid is `asym`, at 1 bit `half` with `s = 2·mean|w|`.
///
/// # Errors
///
/// [`Error::GridBits`] for 0 or more than 8 bits, [`Error::GroupSize`], [`Error::WeightNotFinite`].
pub fn trial(w: ArrayView2<'_, f32>, bits: u8, group: Group) -> Result<QuantizedMatrix> {
    let (width, len) = width(bits, group, Grid::Asym, w.ncols())?;
    check_finite(w)?;
    let mut matrix = empty(w, &width, len);
    let top = f32::from(width.top());
    let mut zeros = Vec::with_capacity(matrix.scales.capacity());
    for row in w.rows() {
        for run in row.axis_chunks_iter(Axis(0), len) {
            let Fit { scale, zero } = if bits == 1 { binary(run) } else { ranged(run, 1.0, top) };
            let zero = if bits == 1 { zero } else { zero.round_ties_even() };
            // As the code has it: rounded before the zero is added.
            let code = |&w: &f32| if bits == 1 { sign(w) } else { ((w / scale).round_ties_even() + zero).clamp(0.0, top) };
            matrix.codes.extend(run.iter().map(|w| code(w) as u8));
            matrix.scales.push(scale);
            zeros.push(zero as u8);
        }
    }
    matrix.zeros = if bits == 1 { Zeros::Half } else { Zeros::Asym(zeros) };
    Ok(matrix)
}

/// Whether MC-MoE's GPTQ has a grid: real zeros, at 1 bit the two signs.
pub fn has(bits: u8, grid: Grid) -> bool {
    grid == if bits == 1 { Grid::Half } else { Grid::Offset }
}

/// MC-MoE's GPTQ of `w`, `[out, in]`, against a second moment `[in, in]` of its inputs, zeros in f32.
///
/// # Errors
///
/// [`Error::PmqGrid`] on another grid than `offset`, at 1 bit `half`; as [`trial`]; [`Error::MomentSize`]; [`Error::Damping`] where 1% of
/// damping is too little; [`Error::ScaleOverflow`] for a scale that its type does not hold.
pub fn gptq(w: ArrayView2<'_, f32>, moment: ArrayView2<'_, f32>, width: &Width) -> Result<Solved> {
    let inputs = w.ncols();
    if !has(width.bits, width.grid) {
        return Err(Error::PmqGrid { bits: width.bits, grid: width.grid });
    }
    let len = width.group_len(inputs)?;
    check_finite(w)?;
    if moment.dim() != (inputs, inputs) {
        return Err(Error::MomentSize { moment: moment.nrows(), inputs });
    }
    let original = w;
    let mut w = w.to_owned();
    let mut h = moment.to_owned();
    let dead: Vec<usize> = (0..inputs).filter(|&j| moment[(j, j)] == 0.0).collect();
    for &dead in &dead {
        h[(dead, dead)] = 1.0;
        w.column_mut(dead).fill(0.0);
    }
    let mean = h.diag().iter().map(|&d| f64::from(d)).sum::<f64>() / inputs.max(1) as f64;
    h.diag_mut().mapv_inplace(|d| d + (DAMPING * mean) as f32);
    let upper = calib::linalg::inverse_factor(h).map_err(|source| Error::Damping { damping: DAMPING, source })?.to_dense();
    let rows: Vec<(Vec<u8>, Vec<Fit>)> =
        w.rows_mut().into_iter().collect::<Vec<_>>().into_par_iter().map(|row| solve_row(row, &upper, len, width)).collect();
    let mut matrix = empty(w.view(), width, len);
    let mut zeros = Vec::with_capacity(matrix.scales.capacity());
    for (row, (codes, fits)) in rows.into_iter().enumerate() {
        if let Some(group) = fits.iter().position(|fit| !fit.scale.is_finite()) {
            return Err(Error::ScaleOverflow { scale: fits[group].scale, row, group, scale_type: width.scale_type });
        }
        matrix.codes.extend(codes);
        matrix.scales.extend(fits.iter().map(|fit| fit.scale));
        zeros.extend(fits.iter().map(|fit| fit.zero));
    }
    matrix.zeros = if width.bits == 1 { Zeros::Half } else { Zeros::Offset(zeros) };
    let loss = loss(&(&matrix.dequantize() - &original), moment, DAMPING * mean);
    Ok(Solved { matrix, kept: Kept::Gptq, loss, damping: DAMPING, dead_channels: dead.len() })
}

/// What a change `[out, in]` costs in a second moment, and in that with `lambda` on its diagonal.
fn loss(change: &Array2<f32>, moment: ArrayView2<'_, f32>, lambda: f64) -> Loss {
    let sum = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
    let undamped = change.iter().zip(&calib::linalg::product(change.view(), moment)).map(sum).sum::<f64>().max(0.0);
    Loss { undamped, damped: undamped + lambda * change.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() }
}

/// Scale and zero of one group.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Fit {
    scale: f32,
    zero: f32,
}

/// One row, solved in place: its codes and fits.
fn solve_row(mut w: ArrayViewMut1<'_, f32>, upper: &Array2<f32>, len: usize, width: &Width) -> (Vec<u8>, Vec<Fit>) {
    let inputs = w.len();
    let top = f32::from(width.top());
    let (mut codes, mut fits) = (Vec::with_capacity(inputs), Vec::new());
    let mut errors = vec![0.0; len];
    for start in (0..inputs).step_by(len) {
        let end = start + len;
        let group = w.slice(s![start..end]);
        let Fit { scale, zero } = if width.bits == 1 { binary(group) } else { clipped(group, top) };
        let fit = Fit { scale: width.scale_type.round(scale).max(floor(width.scale_type)), zero };
        for j in start..end {
            let code = if width.bits == 1 { sign(w[j]) } else { (w[j] / fit.scale + fit.zero).round_ties_even().clamp(0.0, top) };
            let error = (w[j] - (code - fit.zero) * fit.scale) / upper[(j, j)];
            if width.bits > UNCOMPENSATED {
                w.slice_mut(s![j + 1..end]).scaled_add(-error, &upper.slice(s![j, j + 1..end]));
            }
            codes.push(code as u8);
            errors[j - start] = error;
        }
        for (j, &error) in (start..end).zip(&errors) {
            w.slice_mut(s![end..]).scaled_add(-error, &upper.slice(s![j, end..]));
        }
        fits.push(fit);
    }
    (codes, fits)
}

/// 1 and 0 for the two signs; 0 counts as positive.
fn sign(w: f32) -> f32 {
    if w < 0.0 { 0.0 } else { 1.0 }
}

/// One bit: levels `±mean|w|`.
fn binary(w: ArrayView1<'_, f32>) -> Fit {
    let mean = w.iter().map(|w| w.abs()).sum::<f32>() / w.len() as f32;
    Fit { scale: (2.0 * mean).max(floor(ScaleType::F32)), zero: 0.5 }
}

/// The range, 0 within it, both ends scaled by `clip`; a group of zeros has the range −1 .. 1.
fn ranged(w: ArrayView1<'_, f32>, clip: f32, top: f32) -> Fit {
    let (low, high) = w.iter().fold((0.0_f32, 0.0_f32), |(low, high), &w| (low.min(w), high.max(w)));
    let (low, high) = if low == 0.0 && high == 0.0 { (-1.0, 1.0) } else { (low * clip, high * clip) };
    let scale = ((high - low) / top).max(floor(ScaleType::F32));
    Fit { scale, zero: -low / scale }
}

/// The range at the clip with the least error; of equals the first.
fn clipped(w: ArrayView1<'_, f32>, top: f32) -> Fit {
    let (mut best, mut least) = (ranged(w, 1.0, top), f32::INFINITY);
    for clip in (0..=50_u8).map(|i| 1.0 + 0.002 * f32::from(i)).chain((1..=50_u8).map(|i| 1.0 - 0.002 * f32::from(i))) {
        let fit = ranged(w, clip, top);
        let off = |w: f32| (w - ((w / fit.scale + fit.zero).round_ties_even().clamp(0.0, top) - fit.zero) * fit.scale).abs();
        let error = w.iter().map(|&w| off(w).powf(NORM)).sum::<f32>();
        if error < least {
            (best, least) = (fit, error);
        }
    }
    best
}

/// The width, one bit on the half grid, and the length of its groups.
fn width(bits: u8, group: Group, grid: Grid, inputs: usize) -> Result<(Width, usize)> {
    let grid = if bits == 1 { Grid::Half } else { grid };
    let width = Width { bits, group, scale_type: ScaleType::F32, grid };
    let len = width.group_len(inputs)?;
    Ok((width, len))
}

/// A matrix without codes, with room for them.
fn empty(w: ArrayView2<'_, f32>, width: &Width, len: usize) -> QuantizedMatrix {
    let (outputs, inputs) = w.dim();
    QuantizedMatrix {
        outputs,
        inputs,
        bits: width.bits,
        group: width.group,
        scale_type: width.scale_type,
        codes: Vec::with_capacity(outputs * inputs),
        scales: Vec::with_capacity(outputs * (inputs / len)),
        zeros: Zeros::Half,
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::quantize::testing::{Moment, loss_of, moment, normals};

    fn solved(w: &Array2<f32>, h: &Array2<f32>, bits: u8, group: Group) -> Result<Solved> {
        let grid = if bits == 1 { Grid::Half } else { Grid::Offset };
        gptq(w.view(), h.view(), &Width { bits, group, scale_type: ScaleType::F32, grid })
    }

    #[test]
    fn a_trial_by_hand() {
        // Range −1 .. 2 over three steps: s = 1, z = 1. 0.4 → 0 + 1, 2 → 3, −1 → 0, 1.6 → 2 + 1.
        let w = array![[0.4_f32, 2.0, -1.0, 1.6]];
        let matrix = trial(w.view(), 2, Group::Size(4)).unwrap();
        assert_eq!((&matrix.codes[..], &matrix.scales[..], &matrix.zeros), (&[1, 3, 0, 3][..], &[1.0][..], &Zeros::Asym(vec![1])));
        // All positive: 0 is in the range all the same.
        let matrix = trial(array![[1.0_f32, 3.0]].view(), 2, Group::PerChannel).unwrap();
        assert_eq!((&matrix.codes[..], &matrix.zeros), (&[1, 3][..], &Zeros::Asym(vec![0])));
        // One bit: ± the mean of 1, 3, 0 and 4, which is 2; 0 counts as positive.
        let matrix = trial(array![[1.0_f32, -3.0, 0.0, -4.0]].view(), 1, Group::Size(4)).unwrap();
        assert_eq!(matrix.dequantize(), array![[2.0, -2.0, 2.0, -2.0]]);
    }

    #[test]
    fn a_trial_has_the_error_that_was_measured_of_the_published_code() {
        // Relative errors on normal weights in groups of 128 (specs, methods 1.2): 0.600, 0.504, 0.216, 0.101.
        let w = normals(2000, 128, 3);
        for (bits, expected) in [(1, 0.600), (2, 0.504), (3, 0.216), (4, 0.101)] {
            let off = &w - &trial(w.view(), bits, Group::Size(128)).unwrap().dequantize();
            let error = (off.iter().map(|x| x * x).sum::<f32>() / w.iter().map(|x| x * x).sum::<f32>()).sqrt();
            assert!((error / expected - 1.0).abs() < 0.02, "{bits}: {error}");
        }
    }

    #[test]
    fn the_variant_compensates_across_groups_only() {
        // H = ((2, 1), (1, 2)), damped by 0.02; UᵀU = H⁻¹ has U₀₁/U₀₀ = (H⁻¹)₀₁/(H⁻¹)₀₀ = −1/2.02.
        let h = array![[2.0_f32, 1.0], [1.0, 2.0]];
        let w = array![[0.6_f32, 1.0]];
        // Groups of one weight are exact but for the clip: nothing to carry. At 1 bit neither is.
        let single = solved(&w, &h, 1, Group::Size(1)).unwrap().matrix;
        assert_eq!(single.dequantize(), w);
        // One group: mean 0.8, both +; the first column's error of −0.2 stays, because at 1 bit nothing is carried inside a group.
        let pair = solved(&w, &h, 1, Group::Size(2)).unwrap().matrix;
        assert!((&pair.dequantize() - &array![[0.8_f32, 0.8]]).iter().all(|x| x.abs() < 1e-6));
    }

    #[test]
    fn above_three_bits_it_is_gptq_and_below_it_is_worse() {
        let (w, h) = (normals(32, 128, 5), moment(Moment::Correlated, 128, 6));
        let lambda = 0.01 * f64::from(h.diag().mean().unwrap());
        let loss = |matrix: &QuantizedMatrix| loss_of(&w, matrix, &h, lambda);
        for bits in [2, 3, 4, 8] {
            let Solved { matrix, loss: told, .. } = solved(&w, &h, bits, Group::Size(64)).unwrap();
            matrix.check().unwrap();
            assert!((told.damped / loss(&matrix) - 1.0).abs() < 1e-3 && told.undamped < told.damped, "{bits}: {told:?}");
            let gain = loss(&matrix) / loss(&trial(w.view(), bits, Group::Size(64)).unwrap());
            assert!(gain < 1.0, "{bits}: {gain}");
            assert_eq!(bits > UNCOMPENSATED, gain < 0.4, "{bits}: {gain}");
        }
    }

    #[test]
    fn edges() {
        for bits in [1, 2, 4] {
            let zeros = trial(Array2::zeros((2, 4)).view(), bits, Group::Size(4)).unwrap();
            zeros.check().unwrap();
            assert!(zeros.dequantize().iter().all(|x| x.abs() < 1e-6), "{bits}");
            assert_eq!(trial(Array2::zeros((0, 4)).view(), bits, Group::Size(4)).unwrap().codes.len(), 0);
        }
        // A dead channel becomes zero, as in the published code.
        let h = array![[1.0_f32, 0.0], [0.0, 0.0]];
        let told = solved(&array![[0.5_f32, 7.0]], &h, 4, Group::PerChannel).unwrap();
        let back = told.matrix.dequantize();
        assert_eq!(told.dead_channels, 1);
        assert!(back[(0, 1)].abs() < 1e-6 && (back[(0, 0)] - 0.5).abs() < 0.06, "{back}");
        assert!(trial(array![[0.1, f32::NAN]].view(), 2, Group::Size(2)).is_err());
        assert!(trial(array![[0.1, 0.2, 0.3]].view(), 2, Group::Size(2)).unwrap_err().to_string().contains("groups of 2"));
        assert!(trial(array![[0.1, 0.2]].view(), 9, Group::Size(2)).is_err());
        // A scale is what its type holds, and one beyond it has a place.
        let narrow = |w: Array2<f32>| {
            gptq(w.view(), h.view(), &Width { bits: 2, group: Group::Size(2), scale_type: ScaleType::F16, grid: Grid::Offset })
        };
        let matrix = narrow(array![[0.123, 0.0]]).unwrap().matrix;
        assert_eq!(matrix.scales[0], half::f16::from_f32(matrix.scales[0]).to_f32());
        assert!(narrow(array![[1e6, 0.0]]).unwrap_err().to_string().contains("row 0"));
        let sym = Width { bits: 2, group: Group::Size(2), scale_type: ScaleType::F16, grid: Grid::Sym };
        assert!(gptq(array![[0.1, 0.2]].view(), h.view(), &sym).unwrap_err().to_string().contains("offset"));
        let wrong = solved(&array![[0.1, 0.2]], &array![[1.0]], 2, Group::Size(2));
        assert!(wrong.unwrap_err().to_string().contains("a second moment of 1 inputs"));
    }
}

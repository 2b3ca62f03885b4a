//! Descent with the output side of the loss (YAQA, arXiv 2505.22988: a Kronecker-factored Hessian of the model's end).
//!
//! A change `ΔW` moves the outputs of a matrix by `ΔW x`, and which directions of that matter at the end of the model is what the gradients
//! there say: with `H_O = Σ_t g_t g_tᵀ`, `g = ∂ℓ/∂z` `[out]`, the loss is `tr(H_O ΔW H_I ΔWᵀ)`. GPTQ's and the descent's is that with
//! `H_O = 1`: every row for itself. Here a row makes up for what the others have left: all others fixed, its loss is least at
//! `w_i + Σ_{k≠i} H_O,ik / H_O,ii · (W − Ŵ)_k`, and toward that it takes the steps of [`super::descent`], codes and scales; rows in turn, in
//! rounds. No step raises the loss.

use kernels::{QuantizedMatrix, Zeros};
use ndarray::{Array2, ArrayView2, Axis};

use super::Loss;
use super::descent::{self, descent};
use crate::{Error, Result};

/// A matrix after it, and what it costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The codes and scales.
    pub matrix: QuantizedMatrix,
    /// What they cost with every row for itself, as the other solvers say it.
    pub loss: Loss,
    /// The loss of both sides, as a share of what it was.
    pub share: f64,
}

/// Damping of the outputs' moment, as a share of its mean diagonal.
pub const DAMPING: f64 = 0.01;

/// Rounds over all rows, at most.
const ROUNDS: usize = 6;

/// Improves `matrix`, a quantization of `w` `[out, in]`, against the inputs' moment `[in, in]`, `lambda` on its diagonal, and the outputs'
/// `[out, out]`, which is damped by `share` of its mean diagonal.
///
/// # Errors
///
/// As [`descent`]; [`Error::MomentSize`] for a moment of other outputs.
pub fn both(
    w: ArrayView2<'_, f32>,
    matrix: &QuantizedMatrix,
    (moment, lambda): (ArrayView2<'_, f32>, f64),
    (outputs, share): (ArrayView2<'_, f32>, f64),
    params: &descent::Params,
) -> Result<Found> {
    if outputs.dim() != (w.nrows(), w.nrows()) || matrix.outputs != w.nrows() {
        return Err(Error::MomentSize { moment: outputs.nrows(), inputs: w.nrows() });
    }
    let mean = outputs.diag().iter().map(|&d| f64::from(d)).sum::<f64>() / w.nrows().max(1) as f64;
    let mut outputs = outputs.to_owned();
    outputs.diag_mut().mapv_inplace(|d| d + (share * mean) as f32);
    let mut now = matrix.clone();
    // What is missing, W − Ŵ.
    let mut missing = &w - &now.dequantize();
    if mean == 0.0 {
        return Ok(Found { matrix: now, loss: rows(&missing, moment, lambda), share: 1.0 });
    }
    let loss = |missing: &Array2<f32>| {
        let mut through = calib::linalg::product(missing.view(), moment);
        through.scaled_add(lambda as f32, missing);
        let through = calib::linalg::product(outputs.view(), through.view());
        through.iter().zip(missing).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    let before = loss(&missing);
    let mut last = before;
    for _ in 0..ROUNDS {
        for row in 0..w.nrows() {
            let mut weights = outputs.row(row).mapv(|h| h / outputs[(row, row)]);
            weights[row] = 0.0;
            let target = (&weights.dot(&missing) + &w.row(row)).insert_axis(Axis(0));
            let own = descent(target.view(), &row_of(&now, row), moment, lambda, params)?.matrix;
            missing.row_mut(row).assign(&(&w.row(row) - &own.dequantize().row(0)));
            put_row(&mut now, row, own);
        }
        let after = loss(&missing);
        if last - after < params.tolerance * last {
            last = after.min(last);
            break;
        }
        last = after;
    }
    Ok(Found { matrix: now, loss: rows(&missing, moment, lambda), share: if before > 0.0 { last / before } else { 1.0 } })
}

/// The loss with every row for itself.
fn rows(missing: &Array2<f32>, moment: ArrayView2<'_, f32>, lambda: f64) -> Loss {
    let dot = |a: &Array2<f32>, b: &Array2<f32>| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let undamped = dot(&calib::linalg::product(missing.view(), moment), missing).max(0.0);
    Loss { undamped, damped: undamped + lambda * dot(missing, missing) }
}

/// One row as a matrix.
fn row_of(matrix: &QuantizedMatrix, row: usize) -> QuantizedMatrix {
    let (codes, groups) = (row * matrix.inputs..(row + 1) * matrix.inputs, row * matrix.groups()..(row + 1) * matrix.groups());
    let zeros = match &matrix.zeros {
        Zeros::Sym => Zeros::Sym,
        Zeros::Half => Zeros::Half,
        Zeros::Asym(zeros) => Zeros::Asym(zeros[groups.clone()].to_vec()),
        Zeros::Offset(zeros) => Zeros::Offset(zeros[groups.clone()].to_vec()),
    };
    let (codes, scales) = (matrix.codes[codes].to_vec(), matrix.scales[groups].to_vec());
    QuantizedMatrix { outputs: 1, codes, scales, zeros, ..*matrix }
}

/// Puts a row's codes and scales back; zeros are what they were.
fn put_row(matrix: &mut QuantizedMatrix, row: usize, own: QuantizedMatrix) {
    let groups = matrix.groups();
    matrix.codes[row * matrix.inputs..(row + 1) * matrix.inputs].copy_from_slice(&own.codes);
    matrix.scales[row * groups..(row + 1) * groups].copy_from_slice(&own.scales);
}

#[cfg(test)]
mod tests {
    use kernels::{Group, ScaleType};
    use ndarray::array;

    use super::*;
    use crate::quantize::rtn::{self, rtn};
    use crate::quantize::testing::{Moment, moment, normals};
    use crate::quantize::{Grid, Width};

    fn width(bits: u8, grid: Grid) -> Width {
        Width { bits, group: Group::Size(32), scale_type: ScaleType::F32, grid }
    }

    #[test]
    fn a_row_makes_up_for_another_by_hand() {
        // Both outputs are added up afterwards, so only the sum of the rows matters. Codes of scale 1: 0.4 → 0, 0.4 → 0 miss 0.8.
        let w = array![[0.4_f32, 1.0], [0.4, 1.0]];
        let matrix = QuantizedMatrix {
            outputs: 2,
            inputs: 2,
            bits: 3,
            group: Group::PerChannel,
            scale_type: ScaleType::F32,
            codes: vec![4, 5, 4, 5],
            scales: vec![1.0, 1.0],
            zeros: Zeros::Sym,
        };
        let h = array![[1.0_f32, 0.0], [0.0, 1.0]];
        let Found { matrix: found, share, .. } =
            both(w.view(), &matrix, (h.view(), 0.0), (array![[1.0_f32, 1.0], [1.0, 1.0]].view(), 1e-4), &descent::Params::default())
                .unwrap();
        // The first row goes toward (0.8, 1): code 1, scale (0.8 + 1) / 2 = 0.9.
        assert_eq!(&found.codes[..2], [5, 5]);
        let sum = found.dequantize().sum_axis(Axis(0));
        assert!(share < 0.1 && (sum[0] - 0.8).abs() < 0.2 && (sum[1] - 2.0).abs() < 0.2, "{sum} {share}");
    }

    #[test]
    fn the_loss_of_both_sides_falls_and_rows_alone_stay() {
        for (bits, grid) in [(2, Grid::Half), (3, Grid::Asym), (4, Grid::Offset)] {
            let (w, h) = (normals(24, 64, 3), moment(Moment::Correlated, 64, 6));
            let start = rtn(w.view(), &width(bits, grid), &rtn::Params::default()).unwrap();
            let params = descent::Params::default();
            let descended = descent(w.view(), &start, h.view(), 1.0, &params).unwrap();
            let start = descended.matrix;
            let Found { matrix: found, share, loss } =
                both(w.view(), &start, (h.view(), 1.0), (moment(Moment::Correlated, 24, 9).view(), 0.01), &params).unwrap();
            found.check().unwrap();
            // Every row for itself was better before.
            assert!(loss.damped > loss.undamped && loss.damped > 0.99 * descended.after.damped, "{bits}: {loss:?}");
            assert!(share < 0.7, "{bits}: {share}");
            // Where outputs have nothing to do with one another there is little left to gain.
            let Found { share, .. } = both(w.view(), &start, (h.view(), 1.0), (Array2::eye(24).view(), 0.0), &params).unwrap();
            assert!(share > 0.99, "{bits}: {share}");
            let Found { matrix: same, share, .. } =
                both(w.view(), &start, (h.view(), 1.0), (Array2::zeros((24, 24)).view(), 0.01), &params).unwrap();
            assert!(same == start && share == 1.0);
        }
        let (w, h) = (normals(4, 64, 3), moment(Moment::White, 64, 6));
        let start = rtn(w.view(), &width(3, Grid::Half), &rtn::Params::default()).unwrap();
        let wrong = both(w.view(), &start, (h.view(), 0.0), (Array2::eye(5).view(), 0.0), &descent::Params::default());
        assert!(wrong.is_err());
    }
}

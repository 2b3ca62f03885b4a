//! QEP (arXiv 2504.09629): a solver that sees disturbed inputs aims at the output that the original inputs would give.
//!
//! With `x` the original and `x̂` the disturbed input of a token, `Σ v ‖W′x̂ − Wx‖²` is least at `W′ = W + W·C·H⁻¹`, where
//! `C = Σ v (x − x̂) x̂ᵀ` and `H = Σ v x̂ x̂ᵀ`. Solved ridged and taken in part: `W + α·W·C·(H + λ)⁻¹`, `λ` the mean diagonal.

use calib::linalg::{inverse_factor, product};
use ndarray::{Array2, ArrayView2};

use crate::Result;

/// The weights to be quantized instead of `w`, `[out, in]`.
///
/// `cross` is `C` and `h` is `H`, both `[in, in]`, the latter symmetric; `alpha` in `[0, 1]`.
///
/// # Errors
///
/// [`calib::Error::NotPositiveDefinite`] where `h` is not even positive semidefinite.
///
/// # Panics
///
/// If the shapes do not fit together.
pub fn toward(w: ArrayView2<'_, f32>, cross: ArrayView2<'_, f32>, h: ArrayView2<'_, f32>, alpha: f64) -> Result<Array2<f32>> {
    let inputs = w.ncols();
    assert_eq!((cross.dim(), h.dim()), ((inputs, inputs), (inputs, inputs)), "moments of the inputs of a matrix");
    let trace: f64 = h.diag().iter().map(|&d| f64::from(d)).sum();
    if trace <= 0.0 {
        return Ok(w.to_owned());
    }
    let mut ridged = h.to_owned();
    ridged.diag_mut().mapv_inplace(|d| d + (trace / inputs as f64) as f32);
    // (H + λ)⁻¹ = UᵀU
    let upper = inverse_factor(ridged)?.to_dense();
    let through = product(product(w, cross).view(), upper.t());
    let mut aimed = product(through.view(), upper.view());
    aimed.mapv_inplace(|change| alpha as f32 * change);
    aimed += &w;
    Ok(aimed)
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn one_token_by_hand() {
        // x = 3, x̂ = 1, v = 1: C = 2, H = 1, λ = 1: W′ = W + α·W·2/2 = 5 + ½·5.
        let aimed = toward(array![[5.0]].view(), array![[2.0]].view(), array![[1.0]].view(), 0.5).unwrap();
        assert!((aimed[(0, 0)] - 7.5).abs() < 1e-5, "{aimed}");
    }

    #[test]
    fn it_comes_nearer_to_the_original_output() {
        let x = Array2::from_shape_fn((40, 3), |(t, i)| ((t * 7 + i * 3) % 11) as f32 - 5.0);
        let disturbed = Array2::from_shape_fn((40, 3), |(t, i)| 0.8 * x[(t, i)] + 0.3 * x[(t, (i + 1) % 3)]);
        let w = array![[1.0, -2.0, 0.5], [0.25, 1.0, 1.0]];
        let (cross, h) = ((&x - &disturbed).t().dot(&disturbed), disturbed.t().dot(&disturbed));
        let error = |w: &Array2<f32>| (disturbed.dot(&w.t()) - x.dot(&w.t().to_owned())).mapv(|e| e * e).sum();
        let original = x.dot(&w.t());
        let of = |aimed: &Array2<f32>| (disturbed.dot(&aimed.t()) - &original).mapv(|e| e * e).sum();
        let losses: Vec<f32> = [0.0, 0.5, 1.0].map(|alpha| of(&toward(w.view(), cross.view(), h.view(), alpha).unwrap())).into();
        assert!(losses[0] > losses[1] && losses[1] > losses[2], "{losses:?}");
        assert!((losses[0] - error(&w)).abs() <= 1e-3 * losses[0]);
    }

    #[test]
    fn nothing_seen_changes_nothing() {
        let (w, zeros) = (array![[1.0, 2.0]], Array2::zeros((2, 2)));
        assert_eq!(toward(w.view(), zeros.view(), zeros.view(), 1.0).unwrap(), w);
    }
}

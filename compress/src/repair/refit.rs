//! A router for disturbed inputs (EAC-MoE, arXiv 2508.01625, in closed form): logits as near to the original's as they can be.
//!
//! `W′ = argmin Σ_t ω_t ‖W′x̂_t − z_t‖² + λ‖W′ − W‖²` with the original's logits `z` gives
//! `W′ = W + (Σ ω (z − Wx̂) x̂ᵀ)(Σ ω x̂x̂ᵀ + λ)⁻¹`. Tokens near the boundary of the choice count most: with the margin `m` between the
//! last chosen logit and the first that is not, `ω = 1 / (1 + m / m̄)²`.

use calib::linalg::{inverse_factor, product};
use calib::stats::Moment;
use ndarray::{Array2, ArrayView2};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;

/// Knobs of the fit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RouterRepair")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// How strongly the router is held where it was, as a share of its inputs' mean square.
    #[schemars(range(min = 0.0))]
    pub damping: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { damping: 0.01 }
    }
}

/// What each token counts, from the original's logits `[tokens, experts]`, of which `top_k` are chosen. `[tokens]`.
///
/// Where all experts are chosen there is no boundary, and every token counts 1.
pub fn near_the_boundary(logits: ArrayView2<'_, f32>, top_k: usize) -> Vec<f32> {
    if top_k == 0 || top_k >= logits.ncols() {
        return vec![1.0; logits.nrows()];
    }
    let margin = |row: ndarray::ArrayView1<'_, f32>| {
        let mut sorted = row.to_vec();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        f64::from(sorted[top_k - 1] - sorted[top_k])
    };
    let margins: Vec<f64> = logits.rows().into_iter().map(margin).collect();
    let mean = margins.iter().sum::<f64>() / margins.len().max(1) as f64;
    margins.into_iter().map(|m| if mean > 0.0 { (1.0 + m / mean).powi(-2) as f32 } else { 1.0 }).collect()
}

/// The router `[experts, in]` whose logits for the rows `x`, `[tokens, in]`, come nearest to `logits`, `[tokens, experts]`; `counts` is
/// `ω`, `[tokens]`.
///
/// # Errors
///
/// [`calib::Error::NotPositiveDefinite`] where there is no damping and too few tokens.
///
/// # Panics
///
/// If the shapes do not fit together.
pub fn fit(
    w: ArrayView2<'_, f32>,
    x: ArrayView2<'_, f32>,
    logits: ArrayView2<'_, f32>,
    counts: &[f32],
    params: &Params,
) -> Result<Array2<f32>> {
    assert_eq!((x.ncols(), logits.dim()), (w.ncols(), (x.nrows(), w.nrows())), "rows and logits of a router");
    let mut missing = &logits - &product(x, w.t());
    missing.rows_mut().into_iter().zip(counts).for_each(|(mut row, &count)| row *= count);
    let cross = product(missing.t(), x);
    let mut moment = Moment::new(x.ncols());
    moment.add(x, Some(counts));
    let mut h = moment.into_matrix();
    let trace: f64 = h.diag().iter().map(|&d| f64::from(d)).sum();
    if trace <= 0.0 {
        return Ok(w.to_owned());
    }
    h.diag_mut().mapv_inplace(|d| d + (params.damping * trace / x.ncols() as f64) as f32);
    let upper = inverse_factor(h)?.to_dense();
    let change = product(product(cross.view(), upper.t()).view(), upper.view());
    Ok(&w + &change)
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn margins_by_hand() {
        // Margins of top 1: 1 and 3, mean 2: 1 / 1.5² and 1 / 2.5².
        let counts = near_the_boundary(array![[2.0, 1.0, 0.0], [0.0, 1.0, 4.0]].view(), 1);
        assert!((counts[0] - 1.0 / 2.25).abs() < 1e-6 && (counts[1] - 1.0 / 6.25).abs() < 1e-6, "{counts:?}");
        assert_eq!(near_the_boundary(array![[2.0, 1.0]].view(), 2), [1.0]);
    }

    #[test]
    fn a_scaled_input_is_undone() {
        // x̂ = 2x: without damping the router is halved.
        let x = array![[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]];
        let w = array![[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]];
        let logits = x.dot(&w.t());
        let disturbed = &x * 2.0;
        let fitted = fit(w.view(), disturbed.view(), logits.view(), &[1.0; 4], &Params { damping: 0.0 }).unwrap();
        assert!((&fitted - &(&w * 0.5)).iter().all(|e| e.abs() < 1e-4), "{fitted}");
        let held = fit(w.view(), disturbed.view(), logits.view(), &[1.0; 4], &Params { damping: 1e6 }).unwrap();
        assert!((&held - &w).iter().all(|e| e.abs() < 1e-4), "{held}");
    }

    #[test]
    fn tokens_that_count_more_are_met_better() {
        let x = array![[1.0], [1.0]];
        // Two wishes for one number: 0 and 4, counted 3 to 1.
        let fitted = fit(array![[2.0]].view(), x.view(), array![[0.0], [4.0]].view(), &[3.0, 1.0], &Params { damping: 0.0 }).unwrap();
        assert!((fitted[(0, 0)] - 1.0).abs() < 1e-5);
    }
}

//! Sub-MoE (AAAI 2026; specs: methods 3.3): experts merged in the subspace that their matrices share.
//!
//! For the matrices `W_1 … W_n` of one projection, `[W_1 | … | W_n] = U Σ [V_1ᵀ | … | V_nᵀ]`, `V = Σ f_i V_i / Σ f_i`, `W = U_r Σ_r V_rᵀ`. At
//! full rank that is the weighted mean itself, and the short path; at a lower one its projection on the `r` strongest directions,
//! `U_r U_rᵀ Σ f_i W_i`. `V` is cut into the experts' **columns** of the concatenation: reshaping it interleaves the experts, which is
//! the mistake of a published re-implementation (relative error 1.5).

use calib::linalg::{Svd, svd};
use ndarray::{Array2, Axis, concatenate, s};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::weighted_mean::mean;
use super::{Clustering, Matrices, RouterRow};
use crate::mtp::Mtp;

/// Knobs of the merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Subspace")]
pub struct Params {
    /// Share of the experts of a layer that is left; rounded to the nearest number. This or `experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,
    /// Experts of a layer that are left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<usize>,
    /// How experts fall into groups.
    pub cluster: Clustering,
    /// What row of the router a merged expert gets.
    pub router: RouterRow,
    /// Bring neurons into one order before they are merged.
    pub align: bool,
    /// Tokens, spread evenly over the samples, that every expert is run on.
    pub tokens: usize,
    /// What becomes of multi-token-prediction layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
    /// Share of the directions that stay: 1 is the weighted mean.
    pub rank: f64,
}

impl Default for Params {
    fn default() -> Self {
        let (cluster, router) = (Clustering::default(), RouterRow::default());
        Self { keep: None, experts: None, cluster, router, align: true, tokens: 1024, mtp: None, rank: 1.0 }
    }
}

/// One expert of several, already aligned, with `rank` of the directions of each projection.
///
/// # Errors
///
/// As [`svd`].
///
/// # Panics
///
/// Without members, or if their shapes differ.
pub fn merge(members: &[Matrices], weights: &[f64], rank: f64) -> calib::Result<Matrices> {
    let of = |matrix: &dyn Fn(&Matrices) -> &Array2<f64>| {
        let matrices: Vec<&Array2<f64>> = members.iter().map(matrix).collect();
        let full = matrices[0].nrows().min(matrices.iter().map(|m| m.ncols()).sum());
        let rank = ((rank * full as f64).round() as usize).clamp(1, full);
        if rank == full { Ok(mean(&matrices, weights)) } else { decomposed(&matrices, weights, rank) }
    };
    Ok(Matrices { gate: of(&|m| &m.gate)?, up: of(&|m| &m.up)?, down: of(&|m| &m.down)? })
}

/// The decomposition itself, at any rank.
fn decomposed(matrices: &[&Array2<f64>], weights: &[f64], rank: usize) -> calib::Result<Array2<f64>> {
    let views: Vec<_> = matrices.iter().map(|m| m.view()).collect();
    let width = matrices[0].ncols();
    let whole = concatenate(Axis(1), &views).unwrap_or_default();
    let Svd { u, s, v } = svd(whole.view())?;
    let parts: Vec<Array2<f64>> = (0..matrices.len()).map(|i| v.slice(s![i * width..(i + 1) * width, ..rank]).to_owned()).collect();
    let v = mean(&parts.iter().collect::<Vec<_>>(), weights);
    let scaled = &u.slice(s![.., ..rank]) * &ndarray::Array1::from(s[..rank].to_vec());
    Ok(scaled.dot(&v.t()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, columns), || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5
        })
    }

    fn distance(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
        let norm = |m: &Array2<f64>| m.iter().map(|x| x * x).sum::<f64>().sqrt();
        norm(&(a - b)) / norm(b)
    }

    #[test]
    fn the_long_way_at_full_rank_is_the_mean() {
        let (a, b, c) = (matrix(6, 9, 1), matrix(6, 9, 2), matrix(6, 9, 3));
        let (all, weights) = ([&a, &b, &c], [0.5, 0.2, 0.3]);
        assert!(distance(&decomposed(&all, &weights, 6).unwrap(), &mean(&all, &weights)) < 1e-10);
    }

    #[test]
    fn at_a_lower_rank_it_is_the_mean_projected() {
        let (a, b) = (matrix(8, 5, 4), matrix(8, 5, 5));
        let (all, weights) = ([&a, &b], [0.7, 0.3]);
        let gram = a.dot(&a.t()) + b.dot(&b.t());
        let (vectors, _) = calib::linalg::eigh(gram.view()).unwrap();
        let u = vectors.slice(s![.., ..3]);
        let expected = u.dot(&u.t()).dot(&mean(&all, &weights));
        assert!(distance(&decomposed(&all, &weights, 3).unwrap(), &expected) < 1e-10);
    }

    #[test]
    fn interleaved_parts_are_another_matrix() {
        // What cutting V by reshape makes of it: rows 0, 2, 4 … to the first expert.
        let (a, b) = (matrix(6, 6, 7), matrix(6, 6, 8));
        let Svd { u, s, v } = svd(concatenate(Axis(1), &[a.view(), b.view()]).unwrap().view()).unwrap();
        let mixed = (&v.slice(s![..;2, ..]) + &v.slice(s![1..;2, ..])) / 2.0;
        let wrong = (&u * &ndarray::Array1::from(s)).dot(&mixed.t());
        let right = decomposed(&[&a, &b], &[0.5, 0.5], 6).unwrap();
        assert!(distance(&wrong, &mean(&[&a, &b], &[0.5, 0.5])) > 0.5 && distance(&right, &mean(&[&a, &b], &[0.5, 0.5])) < 1e-10);
    }
}

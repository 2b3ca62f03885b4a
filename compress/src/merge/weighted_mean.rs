//! The weighted mean of several experts, matrix by matrix (HC-SMoE, M-SMoE; specs: methods 6.3): `W = Σ f_e W_e / Σ f_e`, in f64.

use ndarray::Array2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Clustering, Matrices, RouterRow};
use crate::mtp::Mtp;

/// Knobs of the merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "WeightedMean")]
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
    /// Bring neurons into one order before they are averaged.
    pub align: bool,
    /// Tokens, spread evenly over the samples, that every expert is run on.
    pub tokens: usize,
    /// What becomes of multi-token-prediction layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
}

impl Default for Params {
    fn default() -> Self {
        let (cluster, router) = (Clustering::default(), RouterRow::default());
        Self { keep: None, experts: None, cluster, router, align: true, tokens: 1024, mtp: None }
    }
}

/// One expert of several, already aligned. A weight of 1 gives that expert itself, bit for bit.
///
/// # Panics
///
/// Without members, or if their shapes differ.
pub fn merge(members: &[Matrices], weights: &[f64]) -> Matrices {
    let of = |matrix: &dyn Fn(&Matrices) -> &Array2<f64>| mean(&members.iter().map(matrix).collect::<Vec<_>>(), weights);
    Matrices { gate: of(&|m| &m.gate), up: of(&|m| &m.up), down: of(&|m| &m.down) }
}

/// `Σ f_i W_i / Σ f_i`.
pub fn mean(matrices: &[&Array2<f64>], weights: &[f64]) -> Array2<f64> {
    let mut sum = Array2::zeros(matrices[0].dim());
    for (matrix, &weight) in matrices.iter().zip(weights) {
        sum.scaled_add(weight, matrix);
    }
    sum / weights.iter().sum::<f64>()
}

#[test]
fn a_mean_by_hand() {
    let of = |x: f64| Matrices { gate: ndarray::array![[x]], up: ndarray::array![[2.0 * x]], down: ndarray::array![[-x]] };
    // (3 · 2 + 1 · 6) / 4 = 3.
    assert_eq!(merge(&[of(2.0), of(6.0)], &[3.0, 1.0]), of(3.0));
    assert_eq!(merge(&[of(0.3), of(6.0)], &[1.0, 0.0]), of(0.3));
}

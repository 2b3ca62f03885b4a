//! What every token's error counts: the weights `v_t` of the second moments `H = Σ_t v_t x_t x_tᵀ` that solvers work with.
//!
//! `affinity` is AGQ's (MoEQuant, arXiv 2505.03804): with `c_t` the weight with which a token uses an MLP, `v = c^p`. The paper's
//! first-order argument gives `p = 1`; the MLP's output is `Σ c F(x)`, so its squared error is weighted with `c²`. Attention has no
//! such weight, and every token counts 1 there. `end_loss` is GuidedQuant's (arXiv 2505.07004): the mean squared gradient of the
//! model's final loss at the outputs of the matrix, from one backward pass ([`calib::backward`]), in one unit for all matrices.

mod store;

use std::sync::{Mutex, PoisonError};

use calib::Weights;
use calib::arch::{Part, Role, Site};
use calib::forward::Routed;
use calib::linalg::product;
use calib::stats::end_loss::RowWeights;
use ndarray::ArrayView2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;

pub use store::{Backwards, TokenWeights};

/// What the error of a token counts, for every solver alike: GPTQ, its search for scales, and refinement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// What the error of a token counts.
    #[serde(default)]
    pub token_weight: TokenWeight,
    /// With `affinity`: the power of the routing weight, 1 or 2; 2 unless it is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2))]
    pub power: Option<u8>,
    /// What an output of a matrix counts in a descent.
    #[serde(default)]
    pub output_weight: OutputWeight,
}

/// What the outputs of a matrix count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputWeight {
    /// One as much as the other, each for itself.
    #[default]
    None,
    /// The second moment of the gradients of the model's loss there, from a backward pass before anything is solved: an output makes up for
    /// what the others have left (YAQA), in matrices that at least as many tokens reached as they have outputs. Holds what entered every layer and `4·out²` bytes a matrix in memory, and so is for small models.
    EndLoss,
}

/// What the error of a token counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenWeight {
    /// One as much as the other.
    #[default]
    None,
    /// A power of the weight with which the router (or a shared expert's gate) multiplies the expert's output; 1 in attention.
    Affinity,
    /// The mean squared gradient of the model's loss at the matrix's outputs, from a backward pass.
    EndLoss,
}

impl Objective {
    /// The power of the routing weight.
    pub fn power(&self) -> u8 {
        self.power.unwrap_or(2)
    }
}

/// The weights with which MLPs' outputs are multiplied, row by row.
pub struct Coefficients<'a> {
    weights: &'a dyn Weights,
    /// What the shared expert's gate gave the last rows: those that enter its down projection next.
    gated: Mutex<Vec<f32>>,
}

impl<'a> Coefficients<'a> {
    /// Of the MLPs of a model.
    pub fn new(weights: &'a dyn Weights) -> Self {
        Self { weights, gated: Mutex::default() }
    }

    /// Whether the rows of `site` must be shown to [`Coefficients::of`] for the sake of another site: a shared expert's gate reads
    /// what enters the expert, and its weights are those of the rows that enter its down projection.
    pub fn needs(&self, layer: usize, site: Site, wanted: impl Fn(Site) -> bool) -> bool {
        site == Site::SharedIn && self.is_gated(layer) && wanted(Site::SharedDown)
    }

    fn is_gated(&self, layer: usize) -> bool {
        self.weights.spec().moe(layer).and_then(|moe| moe.shared.as_ref()).is_some_and(|shared| shared.gated)
    }

    /// `c` of rows `[rows, width]` as they enter a site, in order; `[rows]`. 1 where nothing multiplies.
    ///
    /// # Errors
    ///
    /// What reading the shared expert's gate brings up.
    pub fn of(&self, layer: usize, site: Site, rows: ArrayView2<'_, f32>, routed: Option<&Routed>) -> Result<Vec<f32>> {
        let held = || self.gated.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match (routed, site) {
            (Some(routed), _) => routed.weights.clone(),
            (None, Site::SharedIn) if self.is_gated(layer) => {
                let logits = product(rows, self.weights.matrix(Role::Layer(layer, Part::SharedGate))?.t());
                let weights: Vec<f32> = logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
                held().clone_from(&weights);
                weights
            }
            (None, Site::SharedDown) if self.is_gated(layer) => std::mem::take(&mut *held()),
            _ => vec![1.0; rows.nrows()],
        })
    }
}

/// The token weights of one layer's rows, in the order in which they enter its sites.
pub enum Rows<'a> {
    /// 1 each.
    Alike,
    /// A power of the coefficient.
    Affinity {
        /// The power.
        power: u8,
        /// The coefficients.
        coefficients: Coefficients<'a>,
    },
    /// Those that a backward pass left.
    EndLoss(Box<RowWeights>),
}

impl<'a> Rows<'a> {
    /// Those of `objective`; `weights` is the model that the rows come from, `store` what a backward pass left.
    ///
    /// # Errors
    ///
    /// As [`TokenWeights::layer`].
    pub fn new(objective: &Objective, weights: &'a dyn Weights, layer: usize, store: &TokenWeights) -> Result<Self> {
        Ok(match objective.token_weight {
            TokenWeight::None => Self::Alike,
            TokenWeight::Affinity => Self::Affinity { power: objective.power(), coefficients: Coefficients::new(weights) },
            TokenWeight::EndLoss => Self::EndLoss(Box::new(RowWeights::new(store.layer(layer)?))),
        })
    }

    /// Whether the rows of `site` must be shown to [`Rows::take`] though nobody else wants them.
    pub fn needs(&self, layer: usize, site: Site, wanted: impl Fn(Site) -> bool) -> bool {
        matches!(self, Self::Affinity { coefficients, .. } if coefficients.needs(layer, site, wanted))
    }

    /// `v` of rows `[rows, width]`; `[rows]`. `None`: 1 each.
    ///
    /// # Errors
    ///
    /// As [`Coefficients::of`] and [`RowWeights::take`].
    pub fn take(&self, layer: usize, site: Site, rows: ArrayView2<'_, f32>, routed: Option<&Routed>) -> Result<Option<Vec<f32>>> {
        Ok(match self {
            Self::Alike => None,
            Self::Affinity { power, coefficients } => {
                let c = coefficients.of(layer, site, rows, routed)?;
                Some(c.into_iter().map(|c| c.powi(i32::from(*power))).collect())
            }
            Self::EndLoss(weights) => Some(weights.take(site, rows.nrows(), routed)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    #[test]
    fn a_gate_weighs_what_enters_and_then_what_leaves() {
        let model = crate::testing::fixture("qwen2_moe");
        let coefficients = Coefficients::new(&model);
        let gate = model.matrix(Role::Layer(0, Part::SharedGate)).unwrap();
        // Row r is r times the unit row 0: its weight is σ(r · g_0).
        let mut rows = Array2::zeros((3, gate.ncols()));
        (0..3).for_each(|r| rows[(r, 0)] = r as f32);
        let expected: Vec<f32> = (0..3).map(|r| 1.0 / (1.0 + (-(r as f32) * gate[(0, 0)]).exp())).collect();
        let entered = coefficients.of(0, Site::SharedIn, rows.view(), None).unwrap();
        assert!(entered.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{entered:?} {expected:?}");
        assert_eq!(coefficients.of(0, Site::SharedDown, Array2::zeros((3, 2)).view(), None).unwrap(), entered);
        assert_eq!(coefficients.of(0, Site::AttentionIn, rows.view(), None).unwrap(), [1.0; 3]);
        let routed = Routed { tokens: vec![4, 7, 9], weights: vec![0.5, 0.25, 2.0] };
        assert!(coefficients.needs(0, Site::SharedIn, |site| site == Site::SharedDown));
        assert!(!coefficients.needs(0, Site::SharedIn, |site| site == Site::AttentionIn));
        let rows_of = Rows::Affinity { power: 2, coefficients };
        let squares = rows_of.take(0, Site::ExpertIn(0), rows.view(), Some(&routed)).unwrap();
        assert_eq!(squares, Some(vec![0.25, 0.0625, 4.0]));
        assert_eq!(Rows::Alike.take(0, Site::ExpertIn(0), rows.view(), Some(&routed)).unwrap(), None);
    }
}

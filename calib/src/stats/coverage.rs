//! How well calibration served each layer's experts.

use ndarray::Array1;
use serde::Serialize;

use super::{RouterSums, Store};
use crate::Result;

/// Tokens per expert of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Coverage {
    /// The layer.
    pub layer: usize,
    /// Tokens of each expert, `[experts]`.
    pub tokens: Vec<u64>,
    /// Of the least-served expert.
    pub least: u64,
    /// Half of the experts have no more.
    pub median: u64,
    /// Of the most-served expert.
    pub most: u64,
    /// Standard deviation of the experts' shares of the choices (MoEQuant's σ).
    pub imbalance: f64,
    /// Experts that saw no token.
    pub dead: usize,
    /// Experts that saw some, but fewer than there are input channels: their second moments are singular.
    pub starved: usize,
}

impl Coverage {
    /// Of one layer's router; `hidden` is the width that enters the experts.
    pub fn of(layer: usize, router: &RouterSums, hidden: usize) -> Self {
        let load: Array1<u64> = router.load();
        let mut sorted = load.to_vec();
        sorted.sort_unstable();
        let at = |i: usize| sorted.get(i).copied().unwrap_or(0);
        Self {
            layer,
            least: at(0),
            median: at(sorted.len().saturating_sub(1) / 2),
            most: at(sorted.len().saturating_sub(1)),
            imbalance: router.imbalance(),
            dead: sorted.iter().filter(|&&n| n == 0).count(),
            starved: sorted.iter().filter(|&&n| n > 0 && n < hidden as u64).count(),
            tokens: load.to_vec(),
        }
    }

    /// Of every layer with experts.
    ///
    /// # Errors
    ///
    /// As [`Store::get`].
    pub fn of_store(store: &Store, layers: usize) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for layer in 0..layers {
            if let Some(experts) = store.get(layer)?.experts {
                all.push(Self::of(layer, &experts.router, experts.outputs.outputs.ncols()));
            }
        }
        Ok(all)
    }
}

#[test]
fn one_layer_by_hand() {
    let mut router = RouterSums::new(2, 4, None);
    router.counts = ndarray::array![[0, 3, 50, 20], [0, 1, 50, 4]];
    let coverage = Coverage::of(7, &router, 16);
    assert_eq!(coverage.tokens, [0, 4, 100, 24]);
    assert_eq!((coverage.least, coverage.median, coverage.most, coverage.dead, coverage.starved), (0, 4, 100, 1, 1));
    assert!((coverage.imbalance - router.imbalance()).abs() < 1e-15);
}

//! All experts of a layer on the same tokens.

use ndarray::{Array2, Array3, Axis};
use rayon::prelude::*;

use crate::arch::{Moe, Part, Projection, Role};
use crate::stats::Similarity;
use crate::{Result, Weights, linalg};

/// `count` rows of `rows`, spread evenly; all where there are fewer.
pub(super) fn subset(rows: usize, count: usize) -> Vec<usize> {
    let count = count.min(rows);
    (0..count).map(|i| i * rows / count).collect()
}

/// Runs every expert of a layer on `entered`, `[tokens, hidden]` row by row, on the CPU.
pub(super) fn similarity(weights: &dyn Weights, layer: usize, moe: &Moe, entered: Vec<f32>) -> Result<Similarity> {
    let hidden = weights.spec().hidden;
    let tokens = entered.len() / hidden;
    let x = Array2::from_shape_fn((tokens, hidden), |(t, i)| entered[t * hidden + i]);
    let mut outputs = Array3::zeros((moe.experts, tokens, hidden));
    let experts: Vec<_> = outputs.axis_iter_mut(Axis(0)).enumerate().collect();
    experts.into_par_iter().try_for_each(|(expert, mut out)| -> Result<()> {
        let matrix = |projection| weights.matrix(Role::Layer(layer, Part::Expert(expert, projection)));
        let mut inner = linalg::product(x.view(), matrix(Projection::Gate)?.t());
        let up = linalg::product(x.view(), matrix(Projection::Up)?.t());
        inner.zip_mut_with(&up, |g, &u| *g = *g / (1.0 + (-*g).exp()) * u);
        out.assign(&linalg::product(inner.view(), matrix(Projection::Down)?.t()));
        Ok(())
    })?;
    Ok(Similarity::of(outputs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::testing::{grouped_spec, random};

    #[test]
    fn rows_are_spread_and_never_more_than_there_are() {
        assert_eq!(subset(10, 4), [0, 2, 5, 7]);
        assert_eq!(subset(3, 7), [0, 1, 2]);
        assert!(subset(3, 0).is_empty());
    }

    #[test]
    fn an_expert_is_like_itself_and_like_its_copy() {
        let mut table = random(grouped_spec(), 3);
        for projection in Projection::ALL {
            let one = table.matrix(Role::Layer(1, Part::Expert(1, projection))).unwrap();
            table.put(Role::Layer(1, Part::Expert(4, projection)), one);
        }
        let x: Vec<f32> = (0..50 * 24).map(|i| (i as f32 * 0.7).sin()).collect();
        let moe = table.spec.moe(1).unwrap().clone();
        let mean = similarity(&table, 1, &moe, x).unwrap().mean();
        for expert in 0..6 {
            assert!((mean[(expert, expert)] - 1.0).abs() < 1e-5);
        }
        assert!((mean[(1, 4)] - 1.0).abs() < 1e-5 && mean[(1, 2)] < 0.9, "{mean}");
    }
}

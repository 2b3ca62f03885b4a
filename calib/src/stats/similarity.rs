//! How alike the experts of a layer are on the same tokens: every expert is run on a subset of them, whoever was chosen.

use ndarray::{Array2, Array3, Axis, s};

use super::fields::{Fields, Stored};
use super::same;
use crate::{Result, linalg};

/// Sums over the tokens of the subset.
#[derive(Clone, Debug, PartialEq)]
pub struct Similarity {
    /// Tokens.
    pub tokens: u64,
    /// `Σ cos(F_i, F_j)` of the experts' outputs, `[experts, experts]`, symmetric.
    pub cosines: Array2<f64>,
}

/// Tokens whose products are summed in f32 before they join the f64 sum.
const RUN: usize = 32;

impl Similarity {
    /// Nothing seen.
    pub fn new(experts: usize) -> Self {
        Self { tokens: 0, cosines: Array2::zeros((experts, experts)) }
    }

    /// From the outputs of all experts on the same tokens, `[experts, tokens, hidden]`. A zero output is alike to none.
    pub fn of(mut outputs: Array3<f32>) -> Self {
        let (experts, tokens, _) = outputs.dim();
        for mut row in outputs.lanes_mut(Axis(2)) {
            let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            if length > 0.0 {
                row.mapv_inplace(|x| (f64::from(x) / length) as f32);
            }
        }
        let mut cosines = Array2::zeros((experts, experts));
        for first in (0..tokens).step_by(RUN) {
            let run = outputs.slice(s![.., first..(first + RUN).min(tokens), ..]);
            let columns = run.len() / experts.max(1);
            let rows = Array2::from_shape_fn((experts, columns), |(e, c)| run[[e, c / run.dim().2, c % run.dim().2]]);
            cosines += &linalg::product(rows.view(), rows.t()).mapv(f64::from);
        }
        Self { tokens: tokens as u64, cosines }
    }

    /// Mean cosine of each pair, `[experts, experts]`; 0 without tokens.
    pub fn mean(&self) -> Array2<f64> {
        &self.cosines / self.tokens.max(1) as f64
    }

    /// Adds the same layer's sums over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("experts", self.cosines.nrows(), other.cosines.nrows())?;
        self.tokens += other.tokens;
        self.cosines += &other.cosines;
        Ok(())
    }
}

impl Stored for Similarity {
    fn write(&self, at: &str, to: &mut Fields) {
        to.put(format!("{at}tokens"), &ndarray::Array1::from_elem(1, self.tokens));
        to.put(format!("{at}cosines"), &self.cosines);
    }

    fn read(at: &str, from: &Fields) -> Option<Self> {
        let tokens: ndarray::Array1<u64> = from.get(&format!("{at}tokens"))?;
        let read = Self { tokens: *tokens.first()?, cosines: from.get(&format!("{at}cosines"))? };
        read.cosines.is_square().then_some(read)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn two_tokens_by_hand() {
        // Token 0: (1, 0), (3, 4), (0, 0): cosines 1, 0.6, 0. Token 1: (0, 2), (0, −1), (5, 0): −1 between the first two, else 0.
        let outputs = array![[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [0.0, -1.0]], [[0.0, 0.0], [5.0, 0.0]]];
        let sums = Similarity::of(outputs);
        let expected = array![[2.0, -0.4, 0.0], [-0.4, 2.0, 0.0], [0.0, 0.0, 1.0]];
        assert!(sums.cosines.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{}", sums.cosines);
        assert!((sums.mean()[(0, 1)] + 0.2).abs() < 1e-6);
    }

    #[test]
    fn runs_of_tokens_add_up() {
        let outputs = Array3::from_shape_fn((3, 70, 4), |(e, t, d)| ((e * 7 + t * 3 + d * 5) % 11) as f32 - 5.0);
        let whole = Similarity::of(outputs.clone());
        let mut parts = Similarity::of(outputs.slice(s![.., ..33, ..]).to_owned());
        parts.merge(&Similarity::of(outputs.slice(s![.., 33.., ..]).to_owned())).unwrap();
        assert_eq!((whole.tokens, parts.tokens), (70, 70));
        assert!(whole.cosines.iter().zip(&parts.cosines).all(|(a, b)| (a - b).abs() < 1e-4));
        assert!(parts.merge(&Similarity::new(4)).is_err());
    }
}

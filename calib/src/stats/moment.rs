//! Second moments `Σ v x xᵀ` of what enters a site: the Hessian that solvers work with.
//!
//! A sum over tokens, not a mean, in f32; only the upper triangle is computed. Too large to be a file (one of each expert of
//! Qwen3-30B: 59 GB), so it is made, used and dropped within a layer.

use ndarray::{Array2, ArrayView2};

use super::same;
use crate::{Result, linalg};

/// `Σ v x xᵀ` over the tokens that entered one site.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// The upper triangle; what is below it means nothing.
    sums: Array2<f32>,
    tokens: u64,
}

impl Moment {
    /// Nothing seen.
    pub fn new(width: usize) -> Self {
        Self { sums: Array2::zeros((width, width)), tokens: 0 }
    }

    /// Adds rows `[rows, width]`; `weights` is each row's `v`, `[rows]`, not negative; `None`: 1 each.
    ///
    /// # Panics
    ///
    /// If the rows are not of this width.
    pub fn add(&mut self, rows: ArrayView2<'_, f32>, weights: Option<&[f32]>) {
        assert_eq!(rows.ncols(), self.width(), "inputs of a second moment");
        self.tokens += rows.nrows() as u64;
        match weights {
            None => linalg::add_gram(self.sums.view_mut(), rows),
            Some(weights) => {
                let mut scaled = rows.as_standard_layout().into_owned();
                scaled.rows_mut().into_iter().zip(weights).for_each(|(mut row, v)| row *= v.sqrt());
                linalg::add_gram(self.sums.view_mut(), scaled.view());
            }
        }
    }

    /// Input channels.
    pub fn width(&self) -> usize {
        self.sums.ncols()
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Sum of the diagonal.
    pub fn trace(&self) -> f64 {
        self.sums.diag().iter().map(|&x| f64::from(x)).sum()
    }

    /// Adds the same site's moment over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("input channels", self.width(), other.width())?;
        self.tokens += other.tokens;
        self.sums += &other.sums;
        Ok(())
    }

    /// The whole symmetric matrix, `[width, width]`.
    pub fn into_matrix(mut self) -> Array2<f32> {
        linalg::mirror(self.sums.view_mut());
        self.sums
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn two_rows_by_hand() {
        // (1, 2)ᵀ(1, 2) + (3, −1)ᵀ(3, −1) = ((1 + 9, 2 − 3), (2 − 3, 4 + 1)).
        let rows = array![[1.0_f32, 2.0], [3.0, -1.0]];
        let mut moment = Moment::new(2);
        moment.add(rows.view(), None);
        assert_eq!((moment.tokens(), moment.trace()), (2, 15.0));
        assert_eq!(moment.clone().into_matrix(), array![[10.0, -1.0], [-1.0, 5.0]]);
        // Weights 4 and 0: only the first row, four times.
        let mut weighted = Moment::new(2);
        weighted.add(rows.view(), Some(&[4.0, 0.0]));
        assert_eq!(weighted.clone().into_matrix(), array![[4.0, 8.0], [8.0, 16.0]]);
        moment.merge(&weighted).unwrap();
        assert_eq!(moment.tokens(), 4);
        assert_eq!(moment.into_matrix(), array![[14.0, 7.0], [7.0, 21.0]]);
        assert!(weighted.merge(&Moment::new(3)).is_err());
    }

    #[test]
    fn no_row_is_no_moment() {
        let mut moment = Moment::new(2);
        moment.add(Array2::zeros((0, 2)).view(), None);
        assert_eq!(moment, Moment::new(2));
    }
}

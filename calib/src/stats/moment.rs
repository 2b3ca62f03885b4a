//! Second moments `Σ v x xᵀ` of what enters a site: the Hessian that solvers work with.
//!
//! A sum over tokens, not a mean, in f32; only the upper triangle is computed and kept. Too large to be a file (one of each expert of
//! Qwen3-30B: 59 GB), so it is made, used and dropped within a layer. `Σ v x` and `Σ v` come along: the moment about the mean is what a
//! constant in the place of a linear function of `x` loses.

use ndarray::{Array2, ArrayView2};

use super::same;
use crate::Result;
use crate::linalg::Triangle;

/// `Σ v x xᵀ` over the tokens that entered one site.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    sums: Triangle,
    first: First,
    tokens: u64,
}

/// `Σ v x` and `Σ v` over the tokens that entered one site.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct First {
    /// `Σ v x`, `[width]`.
    pub sums: Vec<f64>,
    /// `Σ v`.
    pub weight: f64,
}

impl First {
    /// `Σ v x / Σ v`, `[width]`; zeros where nothing was seen.
    pub fn mean(&self) -> Vec<f64> {
        let weight = if self.weight > 0.0 { self.weight } else { 1.0 };
        self.sums.iter().map(|sum| sum / weight).collect()
    }

    fn add(&mut self, rows: ArrayView2<'_, f32>, weights: Option<&[f32]>) {
        for (index, row) in rows.rows().into_iter().enumerate() {
            let v = weights.map_or(1.0, |weights| f64::from(weights[index]));
            self.weight += v;
            self.sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += v * f64::from(x));
        }
    }

    fn scale(&mut self, by: f64) {
        self.weight *= by;
        self.sums.iter_mut().for_each(|sum| *sum *= by);
    }

    /// `own · self + with · other`.
    fn combine(&mut self, own: f64, other: &Self, with: f64) {
        self.scale(own);
        self.weight += with * other.weight;
        self.sums.iter_mut().zip(&other.sums).for_each(|(sum, other)| *sum += with * other);
    }
}

impl Moment {
    /// Nothing seen.
    pub fn new(width: usize) -> Self {
        Self { sums: Triangle::new(width), first: First { sums: vec![0.0; width], weight: 0.0 }, tokens: 0 }
    }

    /// From the sums over `tokens` tokens, `[width, width]`, of which the upper triangle is read, and `Σ v x`, `[width]`.
    ///
    /// # Panics
    ///
    /// If they are not square, or not of one width.
    pub fn from_sums(sums: Array2<f32>, first: First, tokens: u64) -> Self {
        assert_eq!(sums.ncols(), first.sums.len(), "inputs of a second moment");
        Self { sums: Triangle::of(sums.view()), first, tokens }
    }

    /// Values that are kept of a moment of this width: a little more than half of its square.
    pub fn stored(width: usize) -> usize {
        Triangle::stored(width)
    }

    /// What is kept of it, [`Moment::stored`] values in an order of its own.
    pub fn values(&self) -> &[f32] {
        self.sums.values()
    }

    /// From [`Moment::values`] and [`Moment::first`] over `tokens` tokens; `None` if they are not as many as a moment of this width keeps.
    pub fn from_values(width: usize, tokens: u64, values: Vec<f32>, first: First) -> Option<Self> {
        (first.sums.len() == width).then_some(Self { sums: Triangle::from_values(width, values)?, first, tokens })
    }

    /// Adds rows `[rows, width]`; `weights` is each row's `v`, `[rows]`, not negative; `None`: 1 each.
    ///
    /// # Panics
    ///
    /// If the rows are not of this width.
    pub fn add(&mut self, rows: ArrayView2<'_, f32>, weights: Option<&[f32]>) {
        assert_eq!(rows.ncols(), self.width(), "inputs of a second moment");
        self.tokens += rows.nrows() as u64;
        self.first.add(rows, weights);
        match weights {
            None => self.sums.add_gram(rows),
            Some(weights) => {
                let mut scaled = rows.as_standard_layout().into_owned();
                scaled.rows_mut().into_iter().zip(weights).for_each(|(mut row, v)| row *= v.sqrt());
                self.sums.add_gram(scaled.view());
            }
        }
    }

    /// Input channels.
    pub fn width(&self) -> usize {
        self.sums.side()
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Sum of the diagonal.
    pub fn trace(&self) -> f64 {
        self.sums.diagonal().map(f64::from).sum()
    }

    /// Adds the same site's moment over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("input channels", self.width(), other.width())?;
        self.tokens += other.tokens;
        self.sums.combine(1.0, &other.sums, 1.0);
        self.first.combine(1.0, &other.first, 1.0);
        Ok(())
    }

    /// Joins it, half and half, with a moment over other tokens that stands in for those it has not seen, `other` scaled to
    /// its trace, which so stays what it was. Where there is none, it becomes `other` over one average token.
    ///
    /// # Errors
    ///
    /// As [`Moment::merge`].
    pub fn blend(&mut self, other: &Self) -> Result<()> {
        same("input channels", self.width(), other.width())?;
        let (own, all) = (self.trace(), other.trace());
        let (keep, take) = match (own > 0.0, all > 0.0) {
            (true, true) => (0.5, (0.5 * own / all) as f32),
            (true, false) => (1.0, 0.0),
            (false, _) => (0.0, 1.0 / other.tokens.max(1) as f32),
        };
        self.sums.combine(keep, &other.sums, take);
        self.first.combine(f64::from(keep), &other.first, f64::from(take));
        Ok(())
    }

    /// Multiplies it, as if every token's weight were so much more.
    pub fn scale(&mut self, by: f32) {
        self.sums.scale(by);
        self.first.scale(f64::from(by));
    }

    /// `Σ v x` and `Σ v`.
    pub fn first(&self) -> &First {
        &self.first
    }

    /// The whole symmetric matrix, `[width, width]`.
    pub fn into_matrix(self) -> Array2<f32> {
        self.sums.to_dense()
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
        let of = |width| Moment::from_values(width, 4, moment.values().to_vec(), moment.first().clone());
        assert_eq!((of(2).as_ref(), of(3), Moment::stored(2)), (Some(&moment), None, 4));
        assert_eq!(moment.tokens(), 4);
        assert_eq!(moment.into_matrix(), array![[14.0, 7.0], [7.0, 21.0]]);
        assert!(weighted.merge(&Moment::new(3)).is_err());
    }

    #[test]
    fn a_blend_keeps_the_trace_and_the_tokens() {
        let of = |rows: Array2<f32>| {
            let mut moment = Moment::new(2);
            moment.add(rows.view(), None);
            moment
        };
        // Own ((4, 0), (0, 0)); all ((2, 1), (1, 6)) of trace 8 over two tokens: half of it at trace 4 is ((0.5, 0.25), (0.25, 1.5)).
        let all = of(array![[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]);
        let mut few = of(array![[2.0, 0.0]]);
        few.blend(&all).unwrap();
        assert_eq!((few.tokens(), few.trace()), (1, 4.0));
        assert_eq!(few.into_matrix(), array![[2.5, 0.25], [0.25, 1.5]]);
        let mut none = Moment::new(2);
        none.blend(&all).unwrap();
        assert_eq!(none.tokens(), 0);
        assert_eq!(none.into_matrix(), array![[0.5, 0.25], [0.25, 1.5]]);
        let mut alone = of(array![[2.0, 0.0]]);
        alone.blend(&Moment::new(2)).unwrap();
        assert_eq!(alone.trace(), 4.0);
        assert!(alone.blend(&Moment::new(3)).is_err());
    }

    #[test]
    fn the_mean_comes_along() {
        // Weights 1 and 3: (1 + 9, 2 − 3) / 4.
        let rows = array![[1.0_f32, 2.0], [3.0, -1.0]];
        let mut moment = Moment::new(2);
        moment.add(rows.view(), Some(&[1.0, 3.0]));
        assert_eq!(moment.first(), &First { sums: vec![10.0, -1.0], weight: 4.0 });
        assert_eq!(moment.first().mean(), [2.5, -0.25]);
        moment.scale(2.0);
        assert_eq!(moment.first().mean(), [2.5, -0.25]);
        let read = Moment::from_sums(moment.clone().into_matrix(), moment.first().clone(), 2);
        assert_eq!(read, moment);
        // Half of each at the trace of the first, 2 · (5 + 30): the other counts 70 / 2 a row.
        let mut other = Moment::new(2);
        other.add(array![[1.0_f32, 0.0], [0.0, 1.0]].view(), None);
        moment.blend(&other).unwrap();
        assert_eq!(moment.first(), &First { sums: vec![0.5 * 20.0 + 17.5, 0.5 * -2.0 + 17.5], weight: 0.5 * 8.0 + 35.0 });
        assert_eq!(Moment::new(2).first().mean(), [0.0, 0.0]);
    }

    #[test]
    fn no_row_is_no_moment() {
        let mut moment = Moment::new(2);
        moment.add(Array2::zeros((0, 2)).view(), None);
        assert_eq!(moment, Moment::new(2));
    }
}

//! Sums of squares of each input channel of a site: the diagonal of its second moment, small enough to be a file.

use ndarray::Array1;

use super::fields::{Fields, Stored};
use super::same;
use crate::Result;

/// Sums over the tokens that entered one site.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelSums {
    /// Tokens.
    pub tokens: u64,
    /// `Σ x²`, `[width]`.
    pub squares: Array1<f64>,
    /// `Σ g² x²` with the routing weight `g` of each token, `[width]`; at sites without routing the same as `squares`.
    pub weighted: Array1<f64>,
}

impl ChannelSums {
    /// Nothing seen.
    pub fn new(width: usize) -> Self {
        Self { tokens: 0, squares: Array1::zeros(width), weighted: Array1::zeros(width) }
    }

    /// Sums over rows `[rows, width]`; `weights` is `[rows]`, `None` at sites without routing.
    pub fn of(rows: &[f32], width: usize, weights: Option<&[f32]>) -> Self {
        let mut sums = Self::new(width);
        let (mut squares, mut weighted) = (vec![0.0; width], vec![0.0; width]);
        for (i, row) in rows.chunks_exact(width).enumerate() {
            let g = weights.map_or(1.0, |w| f64::from(w[i]));
            for ((square, weighted), &x) in squares.iter_mut().zip(&mut weighted).zip(row) {
                let x2 = f64::from(x) * f64::from(x);
                *square += x2;
                *weighted += g * g * x2;
            }
            sums.tokens += 1;
        }
        Self { squares: squares.into(), weighted: weighted.into(), ..sums }
    }

    /// Adds the same site's sums over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("input channels", self.squares.len(), other.squares.len())?;
        self.tokens += other.tokens;
        self.squares += &other.squares;
        self.weighted += &other.weighted;
        Ok(())
    }
}

impl Stored for ChannelSums {
    fn write(&self, at: &str, to: &mut Fields) {
        to.put(format!("{at}tokens"), &Array1::from_elem(1, self.tokens));
        to.put(format!("{at}squares"), &self.squares);
        to.put(format!("{at}weighted"), &self.weighted);
    }

    fn read(at: &str, from: &Fields) -> Option<Self> {
        let tokens: Array1<u64> = from.get(&format!("{at}tokens"))?;
        let read =
            Self { tokens: *tokens.first()?, squares: from.get(&format!("{at}squares"))?, weighted: from.get(&format!("{at}weighted"))? };
        (read.squares.len() == read.weighted.len()).then_some(read)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn two_rows_by_hand() {
        let rows = [1.0, -2.0, 3.0, 4.0];
        let mut sums = ChannelSums::of(&rows, 2, Some(&[0.5, 1.0]));
        assert_eq!(sums.tokens, 2);
        assert_eq!(sums.squares, array![10.0, 20.0]);
        assert_eq!(sums.weighted, array![9.25, 17.0]); // 0.25 · (1, 4) + (9, 16)
        sums.merge(&ChannelSums::of(&rows, 2, None)).unwrap();
        assert_eq!((sums.tokens, sums.squares, sums.weighted), (4, array![20.0, 40.0], array![19.25, 37.0]));
        assert_eq!(ChannelSums::of(&[], 2, None), ChannelSums::new(2));
        assert!(ChannelSums::new(2).merge(&ChannelSums::new(3)).is_err());
    }
}

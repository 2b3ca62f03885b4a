//! What enters and leaves a block of experts on a sample of tokens, and what its experts say of it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use calib::arch::{Part, Projection, Role};
use calib::forward::{Tap, values};
use calib::linalg::product;
use calib::sample::Samples;
use calib::{Result, Weights};
use ndarray::{Array2, ArrayView2};

/// What enters the experts.
pub(super) const ENTERED: &str = "moe.in";
/// What the routed experts say together.
pub(super) const SAID: &str = "moe.routed_out";

/// Keeps rows of a block by number over all samples, `[rows, hidden]` by name.
pub(super) struct Rows<'a> {
    /// Wanted rows, rising.
    wanted: &'a [usize],
    /// First row of each batch.
    starts: Vec<usize>,
    hidden: usize,
    kept: Mutex<BTreeMap<&'static str, Array2<f32>>>,
}

impl<'a> Rows<'a> {
    /// For batches `[samples, tokens, hidden]`.
    pub fn new<B: Backend>(wanted: &'a [usize], batches: &[Tensor<B, 3>]) -> Self {
        let mut next = 0;
        let mut starts = Vec::with_capacity(batches.len());
        let mut hidden = 0;
        for batch in batches {
            let [samples, tokens, width] = batch.dims();
            starts.push(next);
            next += samples * tokens;
            hidden = width;
        }
        Self { wanted, starts, hidden, kept: Mutex::default() }
    }

    /// The rows of one name.
    pub fn take(&self, name: &str) -> Array2<f32> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.remove(name).unwrap_or_else(|| Array2::zeros((0, self.hidden)))
    }
}

impl<B: Backend> Tap<B> for Rows<'_> {
    fn wants_blocks(&self) -> bool {
        true
    }

    fn block(&self, _: usize, name: &'static str, batch: usize, x: &Tensor<B, 2>) -> Result<()> {
        if name != ENTERED && name != SAID {
            return Ok(());
        }
        let (start, rows) = (self.starts[batch], x.dims()[0]);
        let first = self.wanted.partition_point(|&row| row < start);
        let here = self.wanted[first..].iter().take_while(|row| **row < start + rows);
        let all = values(x.clone(), "a block's rows")?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let into = kept.entry(name).or_insert_with(|| Array2::zeros((self.wanted.len(), self.hidden)));
        for (at, &row) in here.enumerate() {
            let from = &all[(row - start) * self.hidden..][..self.hidden];
            into.row_mut(first + at).iter_mut().zip(from).for_each(|(to, &x)| *to = x);
        }
        Ok(())
    }
}

/// `count` rows spread evenly over the samples of these domains, rising; all where there are fewer.
pub(super) fn spread(samples: &Samples, domains: &[usize], count: usize) -> Vec<usize> {
    let of = |(sample, domain): (usize, &usize)| domains.contains(domain).then_some(sample * samples.tokens..(sample + 1) * samples.tokens);
    let rows: Vec<usize> = samples.domain.iter().enumerate().filter_map(of).flatten().collect();
    let count = count.min(rows.len());
    (0..count).map(|i| rows[i * rows.len() / count]).collect()
}

/// Which of these rows a fit does not see: of each domain the last eighth, so that no text is on both sides but at the seam.
pub(super) fn held_out(samples: &Samples, rows: &[usize]) -> Vec<bool> {
    let domain = |row: usize| samples.domain[row / samples.tokens];
    let mut held = vec![false; rows.len()];
    for domain_of in 0..samples.domains.len() {
        let here: Vec<usize> = (0..rows.len()).filter(|&at| domain(rows[at]) == domain_of).collect();
        here[here.len() - here.len().div_ceil(8)..].iter().for_each(|&at| held[at] = true);
    }
    held
}

/// What enters an expert's down projection, `[rows, inner]`.
pub(super) fn inner(weights: &dyn Weights, layer: usize, expert: usize, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
    let matrix = |projection| weights.matrix(Role::Layer(layer, Part::Expert(expert, projection)));
    let mut inner = product(x, matrix(Projection::Gate)?.t());
    let up = product(x, matrix(Projection::Up)?.t());
    inner.zip_mut_with(&up, |g, &u| *g = *g / (1.0 + (-*g).exp()) * u);
    Ok(inner)
}

/// An expert's down projection, `[hidden, inner]`.
pub(super) fn down(weights: &dyn Weights, layer: usize, expert: usize) -> Result<Array2<f32>> {
    weights.matrix(Role::Layer(layer, Part::Expert(expert, Projection::Down)))
}

/// What one expert says, `[rows, hidden]`.
pub(super) fn output(weights: &dyn Weights, layer: usize, expert: usize, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
    Ok(product(inner(weights, layer, expert, x)?.view(), down(weights, layer, expert)?.t()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_from_the_samples_that_count() {
        let samples = Samples {
            domains: vec!["a".into(), "b".into()],
            tokens: 4,
            ids: vec![vec![0; 4]; 3],
            domain: vec![0, 1, 0],
            drawn: calib::sample::Drawn::default(),
        };
        assert_eq!(spread(&samples, &[0], 4), [0, 2, 8, 10]);
        assert_eq!(spread(&samples, &[1], 9), [4, 5, 6, 7]);
        assert!(spread(&samples, &[], 3).is_empty());
        // Eight rows of a lie in samples 0 and 2, four of b in 1: one of each is held out, the last.
        let held = held_out(&samples, &(0..12).collect::<Vec<_>>());
        assert_eq!((0..12).filter(|&row| held[row]).collect::<Vec<_>>(), [7, 11]);
    }
}

//! How much a block of routed experts changes what it is given.

use ndarray::Array1;

use super::fields::{Fields, Stored};
use super::same;
use crate::Result;

/// Sums of cosines over tokens, by domain. A mean near 1 is a block that could be missed (QuantMoE-Bench's importance).
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSums {
    /// Tokens, `[domains]`.
    pub tokens: Array1<u64>,
    /// `cos(h, h + block)` with the residual stream `h` before the block, `[domains]`.
    pub residual: Array1<f64>,
    /// `cos(norm(h), block)`: what enters and what comes out, `[domains]`.
    pub block: Array1<f64>,
}

impl BlockSums {
    /// Nothing seen.
    pub fn new(domains: usize) -> Self {
        Self { tokens: Array1::zeros(domains), residual: Array1::zeros(domains), block: Array1::zeros(domains) }
    }

    /// Adds one token of a domain.
    pub fn add(&mut self, domain: usize, residual: f64, block: f64) {
        self.tokens[domain] += 1;
        self.residual[domain] += residual;
        self.block[domain] += block;
    }

    /// Adds the same block's sums over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("domains", self.tokens.len(), other.tokens.len())?;
        self.tokens += &other.tokens;
        self.residual += &other.residual;
        self.block += &other.block;
        Ok(())
    }

    pub(super) fn with_domains(&self, to: &[usize], domains: usize) -> Self {
        let mut moved = Self::new(domains);
        for (from, &d) in to.iter().enumerate() {
            (moved.tokens[d], moved.residual[d], moved.block[d]) = (self.tokens[from], self.residual[from], self.block[from]);
        }
        moved
    }
}

impl Stored for BlockSums {
    fn write(&self, at: &str, to: &mut Fields) {
        to.put(format!("{at}tokens"), &self.tokens);
        to.put(format!("{at}residual"), &self.residual);
        to.put(format!("{at}block"), &self.block);
    }

    fn read(at: &str, from: &Fields) -> Option<Self> {
        let read = Self {
            tokens: from.get(&format!("{at}tokens"))?,
            residual: from.get(&format!("{at}residual"))?,
            block: from.get(&format!("{at}block"))?,
        };
        (read.residual.len() == read.tokens.len() && read.block.len() == read.tokens.len()).then_some(read)
    }
}

/// Cosine of the angle between two vectors; 0 where one of them is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
}

#[test]
fn cosines_by_hand() {
    assert_eq!(cosine(&[3.0, 4.0], &[6.0, 8.0]), 1.0);
    assert_eq!(cosine(&[3.0, 0.0], &[-2.0, 0.0]), -1.0);
    assert!((cosine(&[1.0, 0.0], &[3.0, 4.0]) - 0.6).abs() < 1e-12);
    assert_eq!(cosine(&[0.0, 0.0], &[3.0, 4.0]), 0.0);
}

#[test]
fn domains_stay_apart_and_add_up() {
    let mut sums = BlockSums::new(2);
    sums.add(1, 0.5, 0.25);
    sums.add(1, 0.25, 0.25);
    let other = sums.clone();
    sums.merge(&other).unwrap();
    assert_eq!((sums.tokens.to_vec(), sums.residual.to_vec(), sums.block.to_vec()), (vec![0, 4], vec![0.0, 1.5], vec![0.0, 1.0]));
    assert_eq!(sums.with_domains(&[2, 0], 3).tokens.to_vec(), [4, 0, 0]);
    assert!(sums.merge(&BlockSums::new(3)).is_err());
}

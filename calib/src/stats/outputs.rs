//! What the routed experts' outputs `F_e(x_t)` were, before their routing weight `g`.
//!
//! `weighted / counts` is REAP's saliency (arXiv 2510.13999: the mean of `g · ‖F‖` over the tokens routed to the expert),
//! `norms` its EAN criterion, `outputs / counts` the mean output that merging aligns experts by. `importance` is EASY-EP's
//! (specs: methods 4.1): `Σ_t g ‖F‖ · s_t` with `s_t = max(0, 1 − cos(h_t, h_t + Σ_i g_i F_i))`, `h` the residual stream
//! before the block and only routed experts in the sum.

use ndarray::{Array1, Array2};

use super::fields::{Fields, Stored};
use super::{same, spread};
use crate::Result;

/// Sums over the tokens routed to each expert.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputSums {
    /// Tokens, `[domains, experts]`.
    pub counts: Array2<u64>,
    /// `‖F‖₂`, `[domains, experts]`.
    pub norms: Array2<f64>,
    /// `‖F‖₂²`, `[domains, experts]`.
    pub norms2: Array2<f64>,
    /// `g · ‖F‖₂`, `[domains, experts]`.
    pub weighted: Array2<f64>,
    /// `g² · ‖F‖₂²`: the expert's energy in the block's output, `[domains, experts]`.
    pub weighted2: Array2<f64>,
    /// `g · ‖F‖₂ · s`, `[domains, experts]`.
    pub importance: Array2<f64>,
    /// `F` itself, `[experts, hidden]`.
    pub outputs: Array2<f64>,
    /// Largest magnitude of an element of `F`, `[experts]`. A maximum.
    pub peaks: Array1<f64>,
}

impl Stored for OutputSums {
    fn write(&self, at: &str, to: &mut Fields) {
        to.put(format!("{at}counts"), &self.counts);
        for (name, sums) in [("norms", &self.norms), ("norms2", &self.norms2), ("weighted", &self.weighted), ("weighted2", &self.weighted2)]
        {
            to.put(format!("{at}{name}"), sums);
        }
        to.put(format!("{at}importance"), &self.importance);
        to.put(format!("{at}outputs"), &self.outputs);
        to.put(format!("{at}peaks"), &self.peaks);
    }

    fn read(at: &str, from: &Fields) -> Option<Self> {
        let sums = |name: &str| from.get::<f64, _>(&format!("{at}{name}"));
        let read = Self {
            counts: from.get(&format!("{at}counts"))?,
            norms: sums("norms")?,
            norms2: sums("norms2")?,
            weighted: sums("weighted")?,
            weighted2: sums("weighted2")?,
            importance: sums("importance")?,
            outputs: sums("outputs")?,
            peaks: from.get(&format!("{at}peaks"))?,
        };
        let dim = read.counts.dim();
        let per_domain = [&read.norms, &read.norms2, &read.weighted, &read.weighted2, &read.importance];
        let whole = per_domain.iter().all(|sums| sums.dim() == dim) && read.outputs.nrows() == dim.1 && read.peaks.len() == dim.1;
        whole.then_some(read)
    }
}

/// Sums over a chunk of one expert's rows, made before they are added.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputChunk {
    /// Of each domain: tokens; norm, norm², weighted, weighted².
    domains: Vec<(u64, [f64; 4])>,
    outputs: Vec<f64>,
    peak: f32,
    /// `g · ‖F‖` of each row.
    contributions: Vec<f64>,
}

impl OutputSums {
    /// Nothing seen.
    pub fn new(domains: usize, experts: usize, hidden: usize) -> Self {
        let zeros = || Array2::zeros((domains, experts));
        let (counts, outputs, peaks) = (Array2::zeros((domains, experts)), Array2::zeros((experts, hidden)), Array1::zeros(experts));
        Self { counts, norms: zeros(), norms2: zeros(), weighted: zeros(), weighted2: zeros(), importance: zeros(), outputs, peaks }
    }

    /// Adds rows of one expert.
    pub fn add(&mut self, expert: usize, chunk: &OutputChunk) {
        for (d, (count, [norm, norm2, weighted, weighted2])) in chunk.domains.iter().enumerate() {
            self.counts[(d, expert)] += count;
            self.norms[(d, expert)] += norm;
            self.norms2[(d, expert)] += norm2;
            self.weighted[(d, expert)] += weighted;
            self.weighted2[(d, expert)] += weighted2;
        }
        self.outputs.row_mut(expert).iter_mut().zip(&chunk.outputs).for_each(|(sum, x)| *sum += x);
        self.peaks[expert] = self.peaks[expert].max(f64::from(chunk.peak));
    }

    /// REAP's saliency of each expert over all domains, `[experts]`; 0 for an expert that saw no token.
    pub fn reap(&self) -> Array1<f64> {
        let all = ndarray::Axis(0);
        let counts = self.counts.sum_axis(all).mapv(|n| n.max(1) as f64);
        self.weighted.sum_axis(all) / counts
    }

    /// Adds the same experts' sums over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("domains", self.counts.nrows(), other.counts.nrows())?;
        same("experts", self.counts.ncols(), other.counts.ncols())?;
        same("hidden", self.outputs.ncols(), other.outputs.ncols())?;
        self.counts += &other.counts;
        self.norms += &other.norms;
        self.norms2 += &other.norms2;
        self.weighted += &other.weighted;
        self.weighted2 += &other.weighted2;
        self.importance += &other.importance;
        self.outputs += &other.outputs;
        self.peaks.zip_mut_with(&other.peaks, |ours, &theirs| *ours = ours.max(theirs));
        Ok(())
    }

    pub(super) fn with_domains(&self, to: &[usize], domains: usize) -> Self {
        Self {
            counts: spread(&self.counts, to, domains),
            norms: spread(&self.norms, to, domains),
            norms2: spread(&self.norms2, to, domains),
            weighted: spread(&self.weighted, to, domains),
            weighted2: spread(&self.weighted2, to, domains),
            importance: spread(&self.importance, to, domains),
            outputs: self.outputs.clone(),
            peaks: self.peaks.clone(),
        }
    }
}

impl OutputChunk {
    /// Sums over `rows`, `[weights.len(), hidden]` row by row; `domain` gives the domain of each row.
    pub fn of(rows: &[f32], weights: &[f32], domains: usize, domain: impl Fn(usize) -> usize) -> Self {
        let hidden = rows.len() / weights.len().max(1);
        let mut chunk = Self { domains: vec![(0, [0.0; 4]); domains], outputs: vec![0.0; hidden], peak: 0.0, contributions: vec![] };
        for (i, (row, &weight)) in rows.chunks_exact(hidden.max(1)).zip(weights).enumerate() {
            let norm2: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let (norm, weight) = (norm2.sqrt(), f64::from(weight));
            let (count, sums) = &mut chunk.domains[domain(i)];
            *count += 1;
            chunk.contributions.push(weight * norm);
            for (sum, term) in sums.iter_mut().zip([norm, norm2, weight * norm, weight * weight * norm2]) {
                *sum += term;
            }
            for (sum, &x) in chunk.outputs.iter_mut().zip(row) {
                *sum += f64::from(x);
                chunk.peak = chunk.peak.max(x.abs());
            }
        }
        chunk
    }

    /// `g · ‖F‖` of each row.
    pub fn contributions(&self) -> &[f64] {
        &self.contributions
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn two_tokens_by_hand() {
        // Outputs (3, −4) and (0, 2): norms 5 and 2; with weights 0.5 and 0.25: 2.5 + 0.5 = 3, mean 1.5.
        let mut sums = OutputSums::new(2, 3, 2);
        sums.add(1, &OutputChunk::of(&[3.0, -4.0, 0.0, 2.0], &[0.5, 0.25], 2, |row| row));
        assert_eq!(sums.counts.column(1), array![1, 1]);
        assert_eq!(sums.norms.column(1), array![5.0, 2.0]);
        assert_eq!(sums.norms2.column(1), array![25.0, 4.0]);
        assert_eq!(sums.weighted.column(1), array![2.5, 0.5]);
        assert_eq!(sums.weighted2.column(1), array![6.25, 0.25]);
        assert_eq!(sums.outputs.row(1), array![3.0, -2.0]);
        assert_eq!(sums.peaks, array![0.0, 4.0, 0.0]);
        assert_eq!(sums.reap(), array![0.0, 1.5, 0.0]);
    }

    #[test]
    fn parts_add_up_and_maxima_stay() {
        let mut one = OutputSums::new(1, 2, 2);
        one.add(0, &OutputChunk::of(&[3.0, -4.0], &[0.5], 1, |_| 0));
        let mut two = OutputSums::new(1, 2, 2);
        two.add(0, &OutputChunk::of(&[0.0, 2.0], &[0.25], 1, |_| 0));
        one.merge(&two).unwrap();
        assert_eq!((one.counts[(0, 0)], one.weighted[(0, 0)], one.peaks[0]), (2, 3.0, 4.0));
        assert!(one.merge(&OutputSums::new(1, 2, 3)).unwrap_err().to_string().contains("2 and 3 hidden"));
    }
}

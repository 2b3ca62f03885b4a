//! What a router chose, per domain and expert. The three quantities that methods tell apart stay apart: raw logits, the
//! full softmax's mass before the choice (PMQ's weight), and the final routing weight (AGQ, REAP, EASY-EP).

use ndarray::{Array1, Array2};

use super::fields::{Fields, Stored};
use super::{same, spread};
use crate::Result;
use crate::forward::Routing;

/// Sums over the tokens of each domain, of the experts that were chosen. Means are the reader's: over `counts` for what an
/// expert sees in use, over `tokens` for its share.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSums {
    /// Tokens routed, `[domains]`.
    pub tokens: Array1<u64>,
    /// Tokens that chose the expert, `[domains, experts]`.
    pub counts: Array2<u64>,
    /// Raw logits of the chosen, `[domains, experts]`.
    pub logits: Array2<f64>,
    /// Probability under the softmax over all experts' raw logits of the chosen, `[domains, experts]`; also for sigmoid routers.
    pub mass: Array2<f64>,
    /// Final routing weights, `[domains, experts]`.
    pub weights: Array2<f64>,
    /// Their squares, `[domains, experts]`.
    pub weights2: Array2<f64>,
    /// Tokens that chose both experts, `[experts, experts]`, symmetric, on the diagonal those that chose the one.
    pub pairs: Array2<u64>,
    /// Tokens that chose expert `i` in the layer before and `j` in this one, `[experts before, experts]`; absent where the
    /// layer before has no experts.
    pub transitions: Option<Array2<u64>>,
}

impl RouterSums {
    /// Nothing seen; `before`: experts of the layer before, if it has any.
    pub fn new(domains: usize, experts: usize, before: Option<usize>) -> Self {
        let zeros = || Array2::zeros((domains, experts));
        Self {
            tokens: Array1::zeros(domains),
            counts: Array2::zeros((domains, experts)),
            logits: zeros(),
            mass: zeros(),
            weights: zeros(),
            weights2: zeros(),
            pairs: Array2::zeros((experts, experts)),
            transitions: before.map(|before| Array2::zeros((before, experts))),
        }
    }

    /// Adds one batch; `domain` gives a row's domain by its number over all samples, `before` are the layer before's choices
    /// of all rows, `[rows, top_k before]`.
    pub fn add(&mut self, routing: &Routing, domain: impl Fn(usize) -> usize, before: Option<&Array2<u16>>) {
        let Routing { first, experts, top_k, .. } = *routing;
        let chosen = routing.chosen.chunks_exact(top_k).zip(routing.weights.chunks_exact(top_k));
        for (row, ((chosen, weights), logits)) in chosen.zip(routing.logits.chunks_exact(experts)).enumerate() {
            let d = domain(first + row);
            self.tokens[d] += 1;
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exp = |logit: f32| (f64::from(logit) - f64::from(top)).exp();
            let all: f64 = logits.iter().map(|&logit| exp(logit)).sum();
            for (&expert, &weight) in chosen.iter().zip(weights) {
                let at = (d, expert as usize);
                self.counts[at] += 1;
                self.logits[at] += f64::from(logits[expert as usize]);
                self.mass[at] += exp(logits[expert as usize]) / all;
                self.weights[at] += f64::from(weight);
                self.weights2[at] += f64::from(weight) * f64::from(weight);
                chosen.iter().for_each(|&other| self.pairs[(expert as usize, other as usize)] += 1);
            }
            if let (Some(transitions), Some(before)) = (&mut self.transitions, before) {
                for &from in before.row(first + row) {
                    chosen.iter().for_each(|&to| transitions[(usize::from(from), to as usize)] += 1);
                }
            }
        }
    }

    /// Tokens of each expert over all domains, `[experts]`.
    pub fn load(&self) -> Array1<u64> {
        self.counts.sum_axis(ndarray::Axis(0))
    }

    /// MoEQuant's balance: the standard deviation of the experts' shares of the routed slots, with `E − 1` (specs 2.1);
    /// 0 for a single expert.
    pub fn imbalance(&self) -> f64 {
        imbalance(&self.load().to_vec())
    }

    /// Adds the same router's sums over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("domains", self.counts.nrows(), other.counts.nrows())?;
        same("experts", self.counts.ncols(), other.counts.ncols())?;
        self.tokens += &other.tokens;
        self.counts += &other.counts;
        self.logits += &other.logits;
        self.mass += &other.mass;
        self.weights += &other.weights;
        self.weights2 += &other.weights2;
        self.pairs += &other.pairs;
        let before = |sums: &Self| sums.transitions.as_ref().map_or(0, Array2::nrows);
        same("experts of the layer before", before(self), before(other))?;
        if let (Some(ours), Some(theirs)) = (&mut self.transitions, &other.transitions) {
            *ours += theirs;
        }
        Ok(())
    }

    pub(super) fn with_domains(&self, to: &[usize], domains: usize) -> Self {
        let mut tokens = Array1::zeros(domains);
        self.tokens.iter().zip(to).for_each(|(&n, &d)| tokens[d] = n);
        Self {
            tokens,
            counts: spread(&self.counts, to, domains),
            logits: spread(&self.logits, to, domains),
            mass: spread(&self.mass, to, domains),
            weights: spread(&self.weights, to, domains),
            weights2: spread(&self.weights2, to, domains),
            pairs: self.pairs.clone(),
            transitions: self.transitions.clone(),
        }
    }
}

impl Stored for RouterSums {
    fn write(&self, at: &str, to: &mut Fields) {
        to.put(format!("{at}tokens"), &self.tokens);
        to.put(format!("{at}counts"), &self.counts);
        for (name, sums) in [("logits", &self.logits), ("mass", &self.mass), ("weights", &self.weights), ("weights2", &self.weights2)] {
            to.put(format!("{at}{name}"), sums);
        }
        to.put(format!("{at}pairs"), &self.pairs);
        if let Some(transitions) = &self.transitions {
            to.put(format!("{at}transitions"), transitions);
        }
    }

    fn read(at: &str, from: &Fields) -> Option<Self> {
        let sums = |name: &str| from.get::<f64, _>(&format!("{at}{name}"));
        let read = Self {
            tokens: from.get(&format!("{at}tokens"))?,
            counts: from.get(&format!("{at}counts"))?,
            logits: sums("logits")?,
            mass: sums("mass")?,
            weights: sums("weights")?,
            weights2: sums("weights2")?,
            pairs: from.get(&format!("{at}pairs"))?,
            transitions: from.get(&format!("{at}transitions")),
        };
        let (domains, experts) = read.counts.dim();
        let per_domain = [&read.logits, &read.mass, &read.weights, &read.weights2];
        let whole = read.tokens.len() == domains
            && per_domain.iter().all(|sums| sums.dim() == (domains, experts))
            && read.pairs.dim() == (experts, experts)
            && read.transitions.as_ref().is_none_or(|t| t.ncols() == experts);
        whole.then_some(read)
    }
}

/// Standard deviation of the shares that counts have of their sum, with `n − 1`; 0 where there is no count or one number.
pub fn imbalance(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    if total == 0 || counts.len() < 2 {
        return 0.0;
    }
    let mean = 1.0 / counts.len() as f64;
    let squares: f64 = counts.iter().map(|&c| (c as f64 / total as f64 - mean).powi(2)).sum();
    (squares / (counts.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    /// Two rows, three experts, top 2. Logits are logarithms, so that the softmax is easy: shares 2/4, 1/4, 1/4 and 1/10, 4/10, 5/10.
    fn batch(first: usize) -> Routing {
        let logits = [2.0_f32, 1.0, 1.0, 1.0, 4.0, 5.0].map(f32::ln).to_vec();
        let chosen = vec![0, 2, 2, 1];
        Routing { first, rows: 2, experts: 3, top_k: 2, scores: logits.clone(), logits, chosen, weights: vec![0.75, 0.25, 0.5, 0.5] }
    }

    fn close(a: &Array2<f64>, b: &Array2<f64>) -> bool {
        a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-7)
    }

    #[test]
    fn two_rows_by_hand() {
        // Row 0 is of domain 0, row 1 of domain 1.
        let mut sums = RouterSums::new(2, 3, Some(4));
        let before = array![[3_u16, 0], [3, 1]];
        sums.add(&batch(0), |row| row, Some(&before));
        assert_eq!(sums.pairs, array![[1, 0, 1], [0, 1, 1], [1, 1, 2]]);
        assert_eq!(sums.transitions, Some(array![[1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 2]]));
        assert_eq!(sums.tokens, array![1, 1]);
        assert_eq!(sums.counts, array![[1, 0, 1], [0, 1, 1]]);
        assert!(close(&sums.mass, &array![[0.5, 0.0, 0.25], [0.0, 0.4, 0.5]]), "{}", sums.mass);
        assert!(close(&sums.logits, &array![[2f64.ln(), 0.0, 0.0], [0.0, 4f64.ln(), 5f64.ln()]]));
        assert_eq!(sums.weights, array![[0.75, 0.0, 0.25], [0.0, 0.5, 0.5]]);
        assert_eq!(sums.weights2, array![[0.5625, 0.0, 0.0625], [0.0, 0.25, 0.25]]);
        assert_eq!(sums.load(), array![1, 1, 2]);
    }

    #[test]
    fn halves_add_up_to_the_whole() {
        let of = |batches: &[usize]| {
            let mut sums = RouterSums::new(2, 3, None);
            batches.iter().for_each(|&first| sums.add(&batch(first), |row| row / 2, None));
            sums
        };
        let (whole, mut first, second) = (of(&[0, 2]), of(&[0]), of(&[2]));
        first.merge(&second).unwrap();
        assert_eq!(first, whole);
        assert!(first.merge(&RouterSums::new(2, 3, Some(2))).is_err());
        assert!(first.merge(&RouterSums::new(2, 4, None)).unwrap_err().to_string().contains("3 and 4 experts"));
    }

    #[test]
    fn imbalance_by_hand() {
        // Shares 0.5, 0.25, 0.25 from a mean of 1/3: squares 1/36 + 2/144 = 1/24, over 2: 1/48.
        assert!((imbalance(&[2, 1, 1]) - (1.0_f64 / 48.0).sqrt()).abs() < 1e-12);
        assert_eq!(imbalance(&[5, 5]), 0.0);
        assert_eq!((imbalance(&[0, 0]), imbalance(&[3]), imbalance(&[])), (0.0, 0.0, 0.0));
    }
}

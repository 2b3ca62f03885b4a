//! Windows chosen so that every expert of every layer gets enough of its own tokens.
//!
//! From a pool of windows whose routing is known, `counts[window][slot]` tokens for each *slot* (an expert of a layer), choose
//! a set in which the least-served slot is served as well as it can be.
//!
//! *Cover.* For a target `t` the served part `f(S) = Σ_slot min(t, Σ_{s ∈ S} counts)` is monotone and submodular, so taking
//! the window that adds most until every slot has `t` needs at most `1 + ln(max_s f({s}))` times the fewest windows that
//! would do (Wolsey 1982). *Budget.* The largest `t` that the greedy cover reaches within the budget is found by bisection
//! (SATURATE, Krause et al. 2008); then windows are exchanged as long as that helps. *Bound.* Whatever the weights `w ≥ 0`
//! with `Σ w = 1`, no choice of `budget` windows, not even of fractions of windows, serves its least-served slot better than
//! the `budget` windows with the largest `Σ_slot w · counts` do on average: multiplicative weights bring that bound down to
//! the optimum of the linear program. Coverage and bound are reported side by side.
//!
//! A slot that the whole pool never reaches cannot be served, is left out and counted.

use std::collections::BinaryHeap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the pool is made and when it is enough.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// Windows in the pool, as a multiple of `samples`; fewer where the texts have fewer.
    #[serde(default = "pool")]
    pub pool: usize,
    /// Stop at this many tokens for every expert that the pool reaches, with at most `samples` windows. Without it `samples`
    /// windows are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<u64>,
}

fn pool() -> usize {
    4
}

impl Default for Params {
    fn default() -> Self {
        Self { pool: pool(), coverage: None }
    }
}

/// What was chosen, and how good that is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    /// Windows of the pool, rising.
    pub windows: Vec<usize>,
    /// Tokens of the least-served slot among those that the pool reaches.
    pub least: u64,
    /// What no choice of as many windows can exceed.
    pub bound: f64,
    /// Slots that no window of the pool reaches.
    pub unreached: usize,
}

/// Rounds of multiplicative weights: the bound is then within a percent or two of the linear program's optimum.
const ROUNDS: usize = 600;

/// Powers of the cost of exchanges, one after the other.
const POWERS: [i32; 4] = [4, 16, 64, 256];

/// Windows that are tried against each other in one exchange.
const TRIED: usize = 24;

/// Chooses from a pool: `counts` is `[windows, slots]`. At most `budget` windows; exactly as many, as far as there are,
/// where no `coverage` is asked for.
pub fn select(counts: &[Vec<u32>], budget: usize, coverage: Option<u64>) -> Selection {
    let pool = Pool::new(counts);
    let budget = budget.min(counts.len());
    let mut windows = match coverage {
        Some(target) => pool.cover(target, budget).windows,
        None => pool.exchange(pool.saturate(budget)),
    };
    windows.sort_unstable();
    let least = pool.least(&pool.served(&windows));
    // Rounding may put the bound a hair below what was reached.
    let bound = pool.bound(windows.len()).max(least as f64);
    Selection { least, bound, unreached: pool.unreached, windows }
}

/// The pool's counts of the slots that it reaches.
struct Pool {
    /// `[windows, slots]`.
    counts: Vec<Vec<u32>>,
    /// Over the whole pool, `[slots]`, all above 0.
    totals: Vec<u64>,
    unreached: usize,
}

/// A greedy cover.
struct Cover {
    windows: Vec<usize>,
    /// Whether every slot has the target, or all that the pool has.
    reached: bool,
}

impl Pool {
    fn new(counts: &[Vec<u32>]) -> Self {
        let slots = counts.first().map_or(0, Vec::len);
        let total = |slot: usize| counts.iter().map(|window| u64::from(window[slot])).sum();
        let totals: Vec<u64> = (0..slots).map(total).collect();
        let reached: Vec<usize> = (0..slots).filter(|&slot| totals[slot] > 0).collect();
        Self {
            counts: counts.iter().map(|window| reached.iter().map(|&slot| window[slot]).collect()).collect(),
            totals: reached.iter().map(|&slot| totals[slot]).collect(),
            unreached: slots - reached.len(),
        }
    }

    fn served(&self, windows: &[usize]) -> Vec<u64> {
        let mut served = vec![0; self.totals.len()];
        windows.iter().for_each(|&window| self.add(&mut served, window));
        served
    }

    fn add(&self, served: &mut [u64], window: usize) {
        served.iter_mut().zip(&self.counts[window]).for_each(|(sum, &n)| *sum += u64::from(n));
    }

    fn least(&self, served: &[u64]) -> u64 {
        served.iter().copied().min().unwrap_or(0)
    }

    /// Greedy cover of `target` tokens a slot with at most `budget` windows. Gains only fall as windows are taken, so a gain
    /// that is still the largest when it is computed anew is the largest of all.
    fn cover(&self, target: u64, budget: usize) -> Cover {
        let mut served = vec![0; self.totals.len()];
        let gain = |served: &[u64], window: usize| -> u64 {
            let slots = served.iter().zip(&self.totals).zip(&self.counts[window]);
            slots.map(|((&has, &total), &n)| target.min(total).saturating_sub(has).min(u64::from(n))).sum()
        };
        let entry = |served: &[u64], window: usize| (gain(served, window), std::cmp::Reverse(window));
        let mut heap: BinaryHeap<_> = (0..self.counts.len()).map(|window| entry(&served, window)).collect();
        let mut windows = Vec::new();
        while windows.len() < budget {
            let Some((known, std::cmp::Reverse(window))) = heap.pop() else { break };
            let now = entry(&served, window);
            if now.0 < known {
                heap.push(now);
            } else if now.0 == 0 {
                break;
            } else {
                self.add(&mut served, window);
                windows.push(window);
            }
        }
        let reached = served.iter().zip(&self.totals).all(|(&has, &total)| has >= target.min(total));
        Cover { windows, reached }
    }

    /// The cover of the largest target that `budget` windows reach, filled up to the budget by going on towards the next.
    fn saturate(&self, budget: usize) -> Vec<usize> {
        // Below every total, so that the least-served slot is what the bisection is about.
        let (mut low, mut high) = (0, self.totals.iter().copied().min().unwrap_or(0) + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.cover(middle, budget).reached { low = middle } else { high = middle }
        }
        let mut windows = self.cover(low, budget).windows;
        let mut served = self.served(&windows);
        while windows.len() < budget {
            let best = (0..self.counts.len())
                .filter(|window| !windows.contains(window))
                .min_by(|&a, &b| self.cost_with(&served, a).total_cmp(&self.cost_with(&served, b)));
            let Some(window) = best else { break };
            self.add(&mut served, window);
            windows.push(window);
        }
        windows
    }

    /// How unevenly slots are served, `Σ (least / served)^power` with `least` from before: the least-served ones decide, the
    /// others break ties.
    fn cost(power: i32, least: u64, served: impl Iterator<Item = u64>) -> f64 {
        served.map(|has| ((1.0 + least as f64) / (1.0 + has as f64)).powi(power)).sum()
    }

    fn cost_with(&self, served: &[u64], window: usize) -> f64 {
        Self::cost(POWERS[0], 0, served.iter().zip(&self.counts[window]).map(|(&has, &n)| has + u64::from(n)))
    }

    /// Exchanges one window at a time for one outside while that lowers the cost; first with all slots in view, then with
    /// ever more weight on the least-served ones.
    fn exchange(&self, mut windows: Vec<usize>) -> Vec<usize> {
        for power in POWERS {
            // Each step lowers the cost, so it ends; the limit only keeps very large pools from taking long.
            for _ in 0..20 * windows.len() {
                match self.better(&windows, power) {
                    Some((out, into)) => {
                        windows.retain(|&window| window != out);
                        windows.push(into);
                    }
                    None => break,
                }
            }
        }
        windows
    }

    /// The exchange that lowers the cost most, among the candidates that the cost's slope ranks first.
    fn better(&self, windows: &[usize], power: i32) -> Option<(usize, usize)> {
        let served = self.served(windows);
        let least = self.least(&served);
        let slope: Vec<f64> = served.iter().map(|&has| ((1.0 + least as f64) / (1.0 + has as f64)).powi(power + 1)).collect();
        let worth = |window: usize| -> f64 { slope.iter().zip(&self.counts[window]).map(|(w, &n)| w * f64::from(n)).sum() };
        let mut taken = vec![false; self.counts.len()];
        windows.iter().for_each(|&window| taken[window] = true);
        let side = |inside: bool| {
            let sign = if inside { 1.0 } else { -1.0 };
            let mut side: Vec<_> = (0..taken.len()).filter(|&w| taken[w] == inside).map(|w| (sign * worth(w), w)).collect();
            side.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            side.truncate(TRIED);
            side
        };
        let after = |out: usize, into: usize| {
            let change = self.counts[out].iter().zip(&self.counts[into]);
            let served = served.iter().zip(change).map(|(&has, (&less, &more))| has - u64::from(less) + u64::from(more));
            Self::cost(power, least, served)
        };
        let (inside, outside) = (side(true), side(false));
        let pairs = inside.iter().flat_map(|&(_, out)| outside.iter().map(move |&(_, into)| (out, into)));
        let best = pairs.map(|(out, into)| (after(out, into), out, into)).min_by(|a, b| a.0.total_cmp(&b.0))?;
        // By more than rounding: the search ends.
        let now = Self::cost(power, least, served.iter().copied());
        (best.0 < now * (1.0 - 1e-9)).then_some((best.1, best.2))
    }

    /// What no choice of `budget` windows, or fractions of windows, can exceed as coverage of the least-served slot.
    fn bound(&self, budget: usize) -> f64 {
        let slots = self.totals.len();
        if slots == 0 || budget == 0 {
            return 0.0;
        }
        let mut log_weights = vec![0.0_f64; slots];
        let mut bound = f64::INFINITY;
        for round in 0..ROUNDS {
            let top = log_weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = log_weights.iter().map(|w| (w - top).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let value = |window: &Vec<u32>| -> f64 { weights.iter().zip(window).map(|(w, &n)| w * f64::from(n)).sum::<f64>() / sum };
            let mut best: Vec<(f64, usize)> = self.counts.iter().map(value).enumerate().map(|(i, v)| (v, i)).collect();
            best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            best.truncate(budget);
            bound = bound.min(best.iter().map(|(v, _)| v).sum());
            let served = self.served(&best.iter().map(|&(_, window)| window).collect::<Vec<_>>());
            // What is served above the bound loses weight; steps shrink with the square root, as regret bounds want.
            let step = 1.0 / (1.0 + round as f64).sqrt();
            for (w, &has) in log_weights.iter_mut().zip(&served) {
                *w -= step * (has as f64 / bound.max(1.0)).min(4.0);
            }
        }
        bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complementary_windows_are_found() {
        // Three slots. Windows 1 and 3 together serve all of them with 4; 0 is the largest and useless with any other.
        let counts = vec![vec![9, 0, 0], vec![4, 4, 0], vec![5, 1, 0], vec![0, 0, 4], vec![1, 1, 1]];
        let chosen = select(&counts, 2, None);
        assert_eq!((chosen.windows, chosen.least, chosen.unreached), (vec![1, 3], 4, 0));
        assert!(chosen.bound >= 4.0 && chosen.bound < 4.01, "{}", chosen.bound);
    }

    #[test]
    fn coverage_is_reached_with_few_windows_and_the_unreachable_is_counted() {
        let counts = vec![vec![3, 0, 0], vec![0, 3, 0], vec![2, 2, 0], vec![2, 2, 0]];
        let chosen = select(&counts, 4, Some(2));
        assert_eq!((chosen.windows.len(), chosen.least, chosen.unreached), (1, 2, 1));
        let chosen = select(&counts, 4, Some(4));
        assert_eq!((chosen.windows.as_slice(), chosen.least), ([2, 3].as_slice(), 4));
        // More than there is: all that helps.
        assert_eq!(select(&counts, 4, Some(100)).least, 7);
    }

    #[test]
    fn the_edges() {
        assert_eq!(select(&[], 3, None), Selection { windows: vec![], least: 0, bound: 0.0, unreached: 0 });
        let all = select(&[vec![1], vec![2]], 5, None);
        assert_eq!((all.windows, all.least), (vec![0, 1], 3));
        let none = select(&[vec![0, 0]], 1, None);
        assert_eq!((none.windows, none.unreached), (vec![0], 2));
    }

    /// A pool in which windows are of domains that prefer experts, as real ones do.
    fn pool(windows: u64, slots: u64, seed: u64) -> Vec<Vec<u32>> {
        let mut state = seed;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let likes: Vec<Vec<u64>> = (0..5).map(|_| (0..slots).map(|_| 1 + next(20) * next(20)).collect()).collect();
        (0..windows).map(|w| likes[(w % 5) as usize].iter().map(|&like| (like * (50 + next(100)) / 100) as u32).collect()).collect()
    }

    #[test]
    fn close_to_the_bound_and_better_than_an_even_choice() {
        for seed in 1..6 {
            let counts = pool(320, 96, seed);
            let chosen = select(&counts, 80, None);
            let even = Pool::new(&counts);
            let even = even.least(&even.served(&(0..320).step_by(4).collect::<Vec<_>>()));
            assert!(chosen.least as f64 >= 0.98 * chosen.bound, "seed {seed}: {} of {}", chosen.least, chosen.bound);
            assert!(chosen.least > even, "seed {seed}: {} and evenly {even}", chosen.least);
        }
    }

    #[test]
    fn renaming_slots_changes_nothing() {
        let counts = pool(60, 12, 3);
        let turned: Vec<Vec<u32>> = counts.iter().map(|w| w.iter().rev().copied().collect()).collect();
        let (one, other) = (select(&counts, 20, None), select(&turned, 20, None));
        assert_eq!(one.least, other.least);
    }
}

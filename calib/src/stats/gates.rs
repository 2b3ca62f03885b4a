//! How much an error in a gated MLP's gate or up projection weighs in its output (specs: methods 6.10, units of a cost).
//!
//! With `h_i = silu(g_i) · u_i` entering the down projection, a small error `δg_i` of the gate's output changes `h_i` by
//! `silu′(g_i) · u_i · δg_i` and one of the up's output by `silu(g_i) · δu_i`. Times `‖W_d[:, i]‖²` the sums here, over the
//! weight `c²` of the tokens, turn the two projections' squared errors into squared errors of the expert's output.

use ndarray::Array1;

use super::fields::{Fields, Stored};
use super::same;
use crate::Result;

/// Sums over the tokens of one MLP, by intermediate channel.
#[derive(Clone, Debug, PartialEq)]
pub struct GateSums {
    /// `Σ c²`, with `c` the routing weight; 1 a token at MLPs without routing.
    pub weight: f64,
    /// `Σ c² (silu′(g) u)²`, `[inner]`.
    pub gate: Array1<f64>,
    /// `Σ c² silu(g)²`, `[inner]`.
    pub up: Array1<f64>,
}

impl GateSums {
    /// Nothing seen.
    pub fn new(inner: usize) -> Self {
        Self { weight: 0.0, gate: Array1::zeros(inner), up: Array1::zeros(inner) }
    }

    /// Sums over rows `[rows, inner]` of the gate's and the up's output; `weights` is `[rows]`, `None`: 1 each.
    pub fn of(gate: &[f32], up: &[f32], inner: usize, weights: Option<&[f32]>) -> Self {
        assert_eq!(gate.len(), up.len(), "gate and up of the same rows");
        let (mut gates, mut ups, mut weight) = (vec![0.0; inner], vec![0.0; inner], 0.0);
        for (i, (gate, up)) in gate.chunks_exact(inner).zip(up.chunks_exact(inner)).enumerate() {
            let c2 = weights.map_or(1.0, |w| f64::from(w[i]) * f64::from(w[i]));
            weight += c2;
            for (((of_gate, of_up), &g), &u) in gates.iter_mut().zip(&mut ups).zip(gate).zip(up) {
                let sigmoid = 1.0 / (1.0 + (-g).exp());
                let (slope, silu) = (sigmoid * (1.0 + g * (1.0 - sigmoid)), g * sigmoid);
                *of_gate += c2 * f64::from(slope * u).powi(2);
                *of_up += c2 * f64::from(silu).powi(2);
            }
        }
        Self { weight, gate: gates.into(), up: ups.into() }
    }

    /// Adds the same MLP's sums over other tokens.
    ///
    /// # Errors
    ///
    /// [`Error::StatsDiffer`](crate::Error::StatsDiffer).
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same("intermediate channels", self.gate.len(), other.gate.len())?;
        self.weight += other.weight;
        self.gate += &other.gate;
        self.up += &other.up;
        Ok(())
    }
}

impl Stored for GateSums {
    fn write(&self, at: &str, to: &mut Fields) {
        to.put(format!("{at}weight"), &Array1::from_elem(1, self.weight));
        to.put(format!("{at}gate"), &self.gate);
        to.put(format!("{at}up"), &self.up);
    }

    fn read(at: &str, from: &Fields) -> Option<Self> {
        let weight: Array1<f64> = from.get(&format!("{at}weight"))?;
        let read = Self { weight: *weight.first()?, gate: from.get(&format!("{at}gate"))?, up: from.get(&format!("{at}up"))? };
        (read.gate.len() == read.up.len()).then_some(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_by_hand() {
        // g = 0: sigmoid ½, silu 0, silu′ ½. With u = 4 and c = ½: ¼ · (½ · 4)² = 1 and 0.
        let sums = GateSums::of(&[0.0], &[4.0], 1, Some(&[0.5]));
        assert_eq!((sums.weight, sums.gate[0], sums.up[0]), (0.25, 1.0, 0.0));
    }

    #[test]
    fn the_slope_is_that_of_silu() {
        let silu = |g: f64| g / (1.0 + (-g).exp());
        for g in [-3.0_f32, -0.7, 0.4, 2.5] {
            let sums = GateSums::of(&[g], &[1.0], 1, None);
            let slope = (silu(f64::from(g) + 1e-5) - silu(f64::from(g) - 1e-5)) / 2e-5;
            assert!((sums.gate[0] - slope * slope).abs() < 1e-5 && (sums.up[0] - silu(f64::from(g)).powi(2)).abs() < 1e-5, "{g}");
        }
    }

    #[test]
    fn parts_add_up() {
        let (gate, up) = ([0.5, -1.0, 2.0, 0.1], [1.0, 2.0, -3.0, 0.5]);
        let mut halves = GateSums::of(&gate[..2], &up[..2], 2, None);
        halves.merge(&GateSums::of(&gate[2..], &up[2..], 2, None)).unwrap();
        assert_eq!(halves, GateSums::of(&gate, &up, 2, None));
        assert!(halves.merge(&GateSums::new(3)).is_err());
    }
}

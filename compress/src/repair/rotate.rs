//! Rotation of the residual stream (QuaRot, arXiv 2404.00456, section 4, stage 1a; SpinQuant, arXiv 2405.16406): outsized channels are spread over all of them.
//!
//! With an orthogonal `Q`, `[hidden, hidden]`, the stream `x` becomes `xQ`: what writes it, `W` `[hidden, in]`, becomes `QᵀW`; what reads it
//! behind a norm of gain `g`, `W` `[out, hidden]`, becomes `W · diag(g) · Q`, and the gain 1. An RMSNorm without a gain commutes with `Q`,
//! since it keeps lengths, so the model computes what it did. A LayerNorm does not: it takes the mean off, which `Q` moves.
//!
//! `Q = diag(±1) · (R_m ⊗ H_n / √n)` with `hidden = m · n`, `n` its largest power of two, `H_n` the Hadamard matrix of Sylvester's construction
//! and `R_m` a random orthogonal matrix of the odd rest (2880 = 45 · 64, 7168 = 7 · 1024; 1 × 1 for a power of two): every channel goes into
//! every other. Signs and `R_m` are drawn from a seed.

use ndarray::{Array2, ArrayViewMut2};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mtp::Mtp;

/// Knobs of the rotation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Rotate")]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Seed of the signs and of the orthogonal part.
    pub seed: u64,
    /// What becomes of multi-token-prediction layers, which cannot follow: `"drop"` leaves them out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
}

/// `Q`, as far as it has to be stored.
#[derive(Clone, Debug)]
pub struct Rotation {
    signs: Vec<f64>,
    /// `R_m`, `[m, m]`.
    mix: Array2<f64>,
}

impl Rotation {
    /// A random one of `side` channels.
    pub fn new(side: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let signs = (0..side).map(|_| if random.next() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        let rest = if side == 0 { 0 } else { side >> side.trailing_zeros() };
        Self { signs, mix: orthogonal(rest, &mut random) }
    }

    /// `m`, the side of the orthogonal part, and `n`, that of the Hadamard part.
    pub fn sides(&self) -> (usize, usize) {
        let mix = self.mix.nrows();
        (mix, self.signs.len() / mix.max(1))
    }

    /// Turns every row `x` into `xQ`: what reads the stream, a bias that is added to it, the embedding.
    ///
    /// # Panics
    ///
    /// If the rows are not as wide as the rotation.
    pub fn rows(&self, mut w: ArrayViewMut2<'_, f32>) {
        assert_eq!(w.ncols(), self.signs.len(), "the width of a rotation");
        w.rows_mut().into_iter().collect::<Vec<_>>().into_par_iter().for_each(|mut row| {
            let mut x: Vec<f64> = row.iter().zip(&self.signs).map(|(&x, sign)| f64::from(x) * sign).collect();
            self.turn(&mut x);
            row.iter_mut().zip(x).for_each(|(to, x)| *to = x as f32);
        });
    }

    /// `QᵀW`: what writes the stream.
    ///
    /// # Panics
    ///
    /// As [`Rotation::rows`], for the columns.
    pub fn columns(&self, w: ArrayViewMut2<'_, f32>) {
        self.rows(w.reversed_axes());
    }

    /// `x (R_m ⊗ H_n / √n)`.
    fn turn(&self, x: &mut [f64]) {
        let (mix, n) = self.sides();
        for block in x.chunks_exact_mut(n.max(1)) {
            hadamard(block);
        }
        if mix < 2 {
            return;
        }
        let mut turned = vec![0.0; x.len()];
        for (i, block) in x.chunks_exact(n).enumerate() {
            for (j, to) in turned.chunks_exact_mut(n).enumerate() {
                let by = self.mix[(i, j)];
                to.iter_mut().zip(block).for_each(|(to, x)| *to += by * x);
            }
        }
        x.copy_from_slice(&turned);
    }
}

/// `x H_n / √n`, in `n log₂ n` additions.
fn hadamard(x: &mut [f64]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let by = 1.0 / (x.len().max(1) as f64).sqrt();
    x.iter_mut().for_each(|x| *x *= by);
}

/// A random orthogonal matrix: normal rows made orthogonal, twice, so that they are to the last digits.
fn orthogonal(side: usize, random: &mut Random) -> Array2<f64> {
    let mut q = Array2::from_shape_simple_fn((side, side), || random.normal());
    if side == 1 {
        // Its sign is among the others.
        q.fill(1.0);
    }
    for i in 0..side {
        for _ in 0..2 {
            for j in 0..i {
                let along = q.row(i).dot(&q.row(j));
                let other = q.row(j).to_owned();
                q.row_mut(i).scaled_add(-along, &other);
            }
            let norm = q.row(i).dot(&q.row(i)).sqrt();
            q.row_mut(i).mapv_inplace(|x| x / norm);
        }
    }
    q
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Box and Muller.
    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::*;

    fn matrix(side: usize, seed: u64) -> Array2<f32> {
        let mut q = Array2::eye(side);
        Rotation::new(side, seed).rows(q.view_mut());
        q
    }

    #[test]
    fn four_channels_by_hand() {
        // (3, 1, 0, 0) with signs +, −, +, +: (3, −1, 0, 0) H₄ / 2 = (2, 4, 2, 4) / 2.
        let rotation = Rotation { signs: vec![1.0, -1.0, 1.0, 1.0], mix: array![[1.0]] };
        let mut x = array![[3.0_f32, 1.0, 0.0, 0.0]];
        rotation.rows(x.view_mut());
        assert_eq!(x, array![[1.0, 2.0, 1.0, 2.0]]);
        // Six are three blocks of two, mixed: here block 0 goes to 2, 1 to 0, 2 to 1.
        let mix = array![[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]];
        let rotation = Rotation { signs: vec![1.0; 6], mix };
        let half = 0.5_f32.sqrt();
        let mut x = array![[1.0_f32, 0.0, 0.0, 2.0, 0.0, 0.0]];
        rotation.rows(x.view_mut());
        assert!((&x - &(array![[2.0_f32, -2.0, 0.0, 0.0, 1.0, 1.0]] * half)).iter().all(|x| x.abs() < 1e-6), "{x}");
        assert_eq!(rotation.sides(), (3, 2));
    }

    #[test]
    fn one_outsized_channel_is_spread_over_all() {
        for side in [128, 192, 720] {
            let mut x = Array2::zeros((1, side));
            x[(0, 5)] = (side as f32).sqrt();
            Rotation::new(side, 3).rows(x.view_mut());
            // R_m is not flat, but no channel keeps half of it.
            assert!(x.iter().all(|x| x.abs() < 0.5 * (side as f32).sqrt()), "{side}");
        }
    }

    #[test]
    fn the_seed_says_which() {
        assert!(matrix(24, 1) == matrix(24, 1) && matrix(24, 1) != matrix(24, 2));
        assert_eq!(Rotation::new(0, 0).sides(), (0, 0));
        assert!(matrix(1, 7)[(0, 0)].abs() == 1.0);
        let sides = [2880, 7168, 2048].map(|side| Rotation::new(side, 0).sides());
        assert_eq!(sides, [(45, 64), (7, 1024), (1, 2048)]);
    }

    proptest! {
        #[test]
        fn a_rotation_is_orthogonal_and_its_two_sides_agree(side in 1_usize..90, seed in 0_u64..9) {
            let q = matrix(side, seed);
            let off = q.dot(&q.t()) - Array2::<f32>::eye(side);
            prop_assert!(off.iter().all(|x| x.abs() < 1e-5));
            let w = Array2::from_shape_fn((side, 3), |(i, j)| (i * 7 + j * 3) as f32 % 5.0 - 2.0);
            let mut turned = w.clone();
            Rotation::new(side, seed).columns(turned.view_mut());
            prop_assert!((q.t().dot(&w) - turned).iter().all(|x| x.abs() < 1e-4));
        }
    }
}

//! Weights and second moments that the tests of several quantizers share.

use kernels::QuantizedMatrix;
use ndarray::Array2;

/// What a second moment is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Moment {
    /// Of independent inputs.
    White,
    /// Of inputs with a common part and scales that differ by a factor of a hundred.
    Correlated,
    /// Eigenvalues over eight decades.
    IllConditioned,
    /// Of a quarter as many tokens as inputs.
    FewTokens,
}

/// Standard normal values, the same for the same seed.
pub(super) fn normals(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        ((state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    };
    let normal = move |_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    Array2::from_shape_simple_fn((rows, columns), {
        let mut normal = normal;
        move || normal(())
    })
}

/// A second moment of `inputs` inputs.
pub(super) fn moment(kind: Moment, inputs: usize, seed: u64) -> Array2<f32> {
    let tokens = if kind == Moment::FewTokens { inputs / 4 } else { 4 * inputs };
    let mut x = normals(tokens, inputs, seed ^ 0xabcd);
    let common = normals(tokens, 1, seed ^ 0x1234);
    for (column, mut values) in x.columns_mut().into_iter().enumerate() {
        let place = (column * 37 % inputs) as f32 / inputs as f32;
        match kind {
            Moment::White => {}
            Moment::Correlated | Moment::FewTokens => {
                values.scaled_add(1.0, &common.column(0));
                values *= 10.0_f32.powf(2.0 * place - 1.0);
            }
            Moment::IllConditioned => {
                values *= 10.0_f32.powf(4.0 * place - 3.0);
                values.scaled_add(0.3, &common.column(0));
            }
        }
    }
    x.t().dot(&x)
}

/// `tr(ΔW (H + λ) ΔWᵀ)` in f64, from the definition.
pub(super) fn loss_of(w: &Array2<f32>, matrix: &QuantizedMatrix, h: &Array2<f32>, lambda: f64) -> f64 {
    let off = (w - &matrix.dequantize()).mapv(f64::from);
    let mut h = h.mapv(f64::from);
    h.diag_mut().mapv_inplace(|d| d + lambda);
    (&off.dot(&h) * &off).sum()
}

//! How far apart two results may be, by width, with where each bound comes from. For the tests of every crate.

/// Relative error `‖w − ŵ‖ / ‖w‖` of rounding normal weights to nearest in groups of up to 128, at most; `bits` is 1 to 8.
///
/// The plain symmetric scale `max|w| / (2^(b−1) − ½)` on N(0, 1) in groups of 128 has 0.550 at 2 bits, 0.238, 0.111, 0.0537,
/// 0.0264, 0.0131 and 0.00652 at 8 (20,000 groups); 1 bit with the mean's scale has √(1 − 2/π) = 0.603. A tenth is added for
/// the draw. Searched scales and smaller groups stay below.
pub fn rounding(bits: u8) -> f64 {
    1.1 * [f64::NAN, 0.603, 0.550, 0.238, 0.111, 0.0537, 0.0264, 0.0131, 0.00652].get(usize::from(bits)).copied().unwrap_or(f64::NAN)
}

/// Relative error of one value rounded to bf16, at most: half a unit in the last of eight bits.
pub const BF16: f64 = 1.0 / 512.0;

/// Relative error of a blocked f32 solver's weighted loss against an unblocked f64 one, at most.
///
/// Not a bound of f32's arithmetic (that would be `K · 2⁻²⁴ · cond`): a code near the middle of two may fall either way, and
/// what that changes averages out over rows. The issue that asked for the solver set it.
pub const SOLVER: f64 = 1e-3;

/// Relative error of an f32 product or factorization of side up to 4096 against f64, at most, at the condition (up to 1e5)
/// that 1% damping leaves: √4096 · 2⁻²⁴ · 1e5 would be 0.4 at worst; 1e-3 is ten times what was seen.
pub const FACTOR: f64 = 1e-3;

/// Relative error of weights whose real zeros were turned into offsets in f32 and back: two roundings of a number up to 2^8 steps from the
/// weight it ends in.
pub const OFFSET: f64 = 512.0 / 16_777_216.0;

/// Relative error of a product in f32 with up to 4096 inputs against f64, at most, whatever the order of its sums: √4096 · 2⁻²⁴ would be
/// 4e-6 for sums of like size; five times that where they cancel, which is also what the specification allows one projection.
pub const EXACT: f64 = 2e-5;

/// The same with activations rounded to signed bytes in runs of 32: a step is 1/127 of the largest, its error 1/√12 of that; for even
/// and for bell-shaped activations 0.4% and 0.7% of their root mean square, and the weights cannot average it away. Twice that.
pub const FAST: f64 = 1.5e-2;

/// Relative error of a whole expert layer with 16-bit activations: what specs ask of the kernels, with the rounding of the output (half a
/// unit in the last of eight bits) and of the activations between the products in it.
pub const LAYER: f64 = 5e-3;

//! Scales and zero points: which grid a group of weights is rounded to.
//!
//! Plain, the grid reaches the widest weight: `s = max|w| / (2^(b−1) − ½)`. Searched, it may clip it: of `clips` scales between
//! 30% and all of that, the one with the least `Σ_j h_j (w_j − ŵ_j)²`, then once more the scale that is best for the codes it
//! gave (least squares). At 2 bits the search takes a quarter of the error away, at 4 bits a few percent. Every scale is
//! rounded to its stored type before it is judged.

// Rows stand side by side in several arrays, and one index names the same row in all of them.
#![allow(clippy::needless_range_loop)]

use kernels::ScaleType;

use super::columns::{LANES, Lane};
use super::{Grid, Width};

/// The least of the searched scales, as a share of the plain one.
const LEAST_CLIP: f32 = 0.3;

/// Added and taken away again, it rounds a value below 2²² to the nearest whole one, half to even, on any CPU.
pub(super) const ROUND: f32 = 12_582_912.0;

/// Scale and zero point of one group in each of [`LANES`] rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fit {
    /// Scales, values of the stored type.
    pub scale: Lane,
    /// One over them.
    pub inverse: Lane,
    /// Zero points, in codes.
    pub zero: Lane,
}

impl Fit {
    #[inline(always)]
    pub fn new(scale: Lane, zero: Lane) -> Self {
        let mut inverse = [0.0; LANES];
        for l in 0..LANES {
            inverse[l] = 1.0 / scale[l];
        }
        Self { scale, inverse, zero }
    }

    /// Codes of one column, before they are bytes.
    #[inline(always)]
    pub fn codes(&self, w: &Lane, top: f32) -> Lane {
        let mut codes = [0.0; LANES];
        for l in 0..LANES {
            codes[l] = nearest(w[l].mul_add(self.inverse[l], self.zero[l]), top);
        }
        codes
    }
}

/// The code nearest to `x`: a whole number from 0 to `top`.
#[inline(always)]
pub(super) fn nearest(x: f32, top: f32) -> f32 {
    // Written so that each is one instruction; NaN becomes 0.
    let x = if x > 0.0 { x } else { 0.0 };
    let x = if x < top { x } else { top };
    (x + ROUND) - ROUND
}

/// The least scale there is: what a group of zeros gets, so that no scale is zero and none overflows when it is inverted.
pub(super) fn floor(scale_type: ScaleType) -> f32 {
    match scale_type {
        ScaleType::F16 => 2.0_f32.powi(-24),
        ScaleType::Bf16 | ScaleType::F32 => 2.0_f32.powi(-64),
    }
}

/// Chooses scales and zero points for one group, `[columns of the group]`, of as many rows as a vector holds.
///
/// `weights` is `h_j`, one a column; `clips` is how many scales are tried, 1 for the plain one. A scale that its type does not
/// hold comes back as an infinity.
#[inline(always)]
pub(super) fn fit(group: &[Lane], weights: &[f32], width: &Width, clips: u16) -> Fit {
    match width.grid {
        Grid::Sym => symmetric(group, weights, width, clips, f32::from(1_u16 << (width.bits - 1))),
        Grid::Half if width.bits == 1 => binary(group, weights, width),
        Grid::Half => symmetric(group, weights, width, clips, f32::from(width.top()) / 2.0),
        Grid::Asym => asymmetric(group, weights, width, clips),
        Grid::Offset => offset(group, weights, width, clips),
    }
}

/// The best fit of each row so far.
struct Best<'a> {
    group: &'a [Lane],
    weights: &'a [f32],
    top: f32,
    fit: Fit,
    error: Lane,
}

impl<'a> Best<'a> {
    #[inline(always)]
    fn new(group: &'a [Lane], weights: &'a [f32], width: &Width) -> Self {
        let fit = Fit { scale: [f32::INFINITY; LANES], inverse: [0.0; LANES], zero: [0.0; LANES] };
        Self { group, weights, top: f32::from(width.top()), fit, error: [f32::INFINITY; LANES] }
    }

    /// Takes `fit` in the rows where it is better than what there is.
    #[inline(always)]
    fn offer(&mut self, fit: &Fit) {
        let error = self.error_of(fit);
        for l in 0..LANES {
            if error[l] < self.error[l] {
                self.error[l] = error[l];
                self.fit.scale[l] = fit.scale[l];
                self.fit.inverse[l] = fit.inverse[l];
                self.fit.zero[l] = fit.zero[l];
            }
        }
    }

    /// `Σ_j h_j (w_j − ŵ_j)²`, a row.
    #[inline(always)]
    fn error_of(&self, fit: &Fit) -> Lane {
        let mut error = [0.0; LANES];
        for (w, &h) in self.group.iter().zip(self.weights) {
            for l in 0..LANES {
                // In steps of the scale, which one product brings back at the end.
                let x = w[l].mul_add(fit.inverse[l], fit.zero[l]);
                let off = x - nearest(x, self.top);
                error[l] = (h * off).mul_add(off, error[l]);
            }
        }
        for l in 0..LANES {
            error[l] *= fit.scale[l] * fit.scale[l];
        }
        error
    }

    /// The scale that is best for the codes of the best fit, its zero kept: `Σ h w c / Σ h c²` with `c = u − z`.
    #[inline(always)]
    fn refit_scale(&self, width: &Width) -> Fit {
        let (mut wc, mut cc) = ([0.0; LANES], [0.0; LANES]);
        for (w, &h) in self.group.iter().zip(self.weights) {
            let u = self.fit.codes(w, self.top);
            for l in 0..LANES {
                let c = u[l] - self.fit.zero[l];
                wc[l] += h * (w[l] * c);
                cc[l] += h * (c * c);
            }
        }
        let mut scale = self.fit.scale;
        for l in 0..LANES {
            if wc[l] > 0.0 && cc[l] > 0.0 {
                scale[l] = wc[l] / cc[l];
            }
        }
        Fit::new(stored(scale, width.scale_type), self.fit.zero)
    }

    /// Scale and zero that are best for the codes of the best fit: the weighted regression `w ≈ s·u − s·z`.
    #[inline(always)]
    fn refit_line(&self, width: &Width) -> Fit {
        let mut sums = [[0.0; LANES]; 5];
        for (w, &h) in self.group.iter().zip(self.weights) {
            let codes = self.fit.codes(w, self.top);
            for l in 0..LANES {
                let u = codes[l];
                sums[0][l] += h;
                sums[1][l] += h * u;
                sums[2][l] += h * w[l];
                sums[3][l] += h * (u * u);
                sums[4][l] += h * (u * w[l]);
            }
        }
        let (mut scale, mut zero) = (self.fit.scale, self.fit.zero);
        for l in 0..LANES {
            let [n, u, w, uu, uw] = [sums[0][l], sums[1][l], sums[2][l], sums[3][l], sums[4][l]];
            let (spread, slope) = (n * uu - u * u, n * uw - u * w);
            if spread > 0.0 && slope > 0.0 {
                scale[l] = slope / spread;
                zero[l] = (u - w / scale[l]) / n;
            }
        }
        Fit::new(stored(scale, width.scale_type), rounded(zero, width.scale_type))
    }
}

/// Sym and half: one scale around a zero that is given.
#[inline(always)]
fn symmetric(group: &[Lane], weights: &[f32], width: &Width, clips: u16, zero: f32) -> Fit {
    let reach = 1.0 / (f32::from(width.top()) / 2.0);
    let mut plain = [0.0_f32; LANES];
    for w in group {
        for l in 0..LANES {
            let w = w[l].abs();
            plain[l] = if w > plain[l] { w } else { plain[l] };
        }
    }
    for l in 0..LANES {
        plain[l] *= reach;
    }
    let mut best = Best::new(group, weights, width);
    if clips > 1 {
        for clip in shares(clips) {
            best.offer(&scaled(&plain, clip, zero, width));
        }
        best.offer(&best.refit_scale(width));
    }
    best.or(&scaled(&plain, 1.0, zero, width))
}

#[inline(always)]
fn scaled(plain: &Lane, clip: f32, zero: f32, width: &Width) -> Fit {
    let mut scale = [0.0; LANES];
    for l in 0..LANES {
        scale[l] = plain[l] * clip;
    }
    Fit::new(stored(scale, width.scale_type), [zero; LANES])
}

/// One bit: the levels are `±s/2`, and `s = 2 Σ h|w| / Σ h` is the best there is.
#[inline(always)]
fn binary(group: &[Lane], weights: &[f32], width: &Width) -> Fit {
    let (mut sum, mut plain, mut total) = ([0.0_f32; LANES], [0.0_f32; LANES], 0.0);
    for (w, &h) in group.iter().zip(weights) {
        total += h;
        for l in 0..LANES {
            sum[l] += h * w[l].abs();
            plain[l] += w[l].abs();
        }
    }
    let count = group.len() as f32;
    let scale = if total > 0.0 { sum.map(|sum| 2.0 * sum / total) } else { plain.map(|sum| 2.0 * sum / count) };
    Fit::new(stored(scale, width.scale_type), [0.5; LANES])
}

/// An integer zero, searched together with the scale; the range holds 0.
#[inline(always)]
fn asymmetric(group: &[Lane], weights: &[f32], width: &Width, clips: u16) -> Fit {
    let range = Range::of(group, [0.0; LANES], [0.0; LANES]);
    let mut best = Best::new(group, weights, width);
    if clips > 1 {
        for clip in shares(clips) {
            for shift in [0.0, -1.0, 1.0] {
                best.offer(&range.asymmetric(clip, shift, width));
            }
        }
        best.offer(&best.refit_scale(width));
    }
    best.or(&range.asymmetric(1.0, 0.0, width))
}

/// A real zero: the range shrinks around its middle, then scale and zero are fitted to the codes, twice.
#[inline(always)]
fn offset(group: &[Lane], weights: &[f32], width: &Width, clips: u16) -> Fit {
    let range = Range::of(group, [f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let mut best = Best::new(group, weights, width);
    if clips > 1 {
        for clip in shares(clips) {
            best.offer(&range.offset(clip, width));
        }
        for _ in 0..2 {
            best.offer(&best.refit_line(width));
        }
    }
    best.or(&range.offset(1.0, width))
}

/// The least and the greatest weight of a group.
struct Range {
    low: Lane,
    high: Lane,
}

impl Range {
    #[inline(always)]
    fn of(group: &[Lane], mut low: Lane, mut high: Lane) -> Self {
        for w in group {
            for l in 0..LANES {
                low[l] = if w[l] < low[l] { w[l] } else { low[l] };
                high[l] = if w[l] > high[l] { w[l] } else { high[l] };
            }
        }
        Self { low, high }
    }

    /// A clipped range's steps, and the whole code where zero lies, moved by `shift`.
    #[inline(always)]
    fn asymmetric(&self, clip: f32, shift: f32, width: &Width) -> Fit {
        let top = f32::from(width.top());
        let (mut scale, mut zero) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            scale[l] = (self.high[l] - self.low[l]) / top * clip;
        }
        let scale = stored(scale, width.scale_type);
        for l in 0..LANES {
            zero[l] = nearest(-self.low[l] * clip / scale[l] + shift, top);
        }
        Fit::new(scale, zero)
    }

    /// A clipped range's steps, and zero where it lies when the range keeps its middle.
    #[inline(always)]
    fn offset(&self, clip: f32, width: &Width) -> Fit {
        let top = f32::from(width.top());
        let (mut scale, mut zero) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            // A zero point that lies thousands of codes away would lose the digits it has for the group's own width.
            let far = self.low[l].abs().max(self.high[l].abs()) / 2048.0;
            scale[l] = ((self.high[l] - self.low[l]) / top * clip).max(far);
        }
        let scale = stored(scale, width.scale_type);
        for l in 0..LANES {
            zero[l] = top / 2.0 - (self.low[l] / 2.0 + self.high[l] / 2.0) / scale[l];
        }
        Fit::new(scale, rounded(zero, width.scale_type))
    }
}

impl Best<'_> {
    /// The best fit, or `plain` in the rows where nothing was: nothing was tried, or errors overflowed.
    #[inline(always)]
    fn or(self, plain: &Fit) -> Fit {
        let mut fit = self.fit;
        for l in 0..LANES {
            if self.error[l] == f32::INFINITY {
                fit.scale[l] = plain.scale[l];
                fit.inverse[l] = plain.inverse[l];
                fit.zero[l] = plain.zero[l];
            }
        }
        fit
    }
}

/// The clips that are tried, from all down to [`LEAST_CLIP`]: of equals the widest is kept.
#[inline(always)]
fn shares(clips: u16) -> impl Iterator<Item = f32> {
    let step = (1.0 - LEAST_CLIP) / f32::from(clips.max(2) - 1);
    (0..clips).map(move |clip| 1.0 - step * f32::from(clip))
}

/// Scales as they are stored, none below the [`floor`].
#[inline(always)]
fn stored(scale: Lane, scale_type: ScaleType) -> Lane {
    let floor = floor(scale_type);
    let mut scale = rounded(scale, scale_type);
    for l in 0..LANES {
        scale[l] = if scale[l] > floor { scale[l] } else { floor };
    }
    scale
}

/// Values as `scale_type` stores them.
#[inline(always)]
fn rounded(mut values: Lane, scale_type: ScaleType) -> Lane {
    match scale_type {
        ScaleType::F32 => {}
        ScaleType::F16 => values.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32()),
        ScaleType::Bf16 => {
            for l in 0..LANES {
                // As half::bf16 rounds, to the nearest and half to even, without its branch for NaN.
                let bits = values[l].to_bits();
                values[l] = f32::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1))) & 0xffff_0000);
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use kernels::Group;

    use super::*;

    const BITS2: Width = Width { bits: 2, group: Group::PerChannel, scale_type: ScaleType::F32, grid: Grid::Sym };

    fn lanes(values: &[f32]) -> Vec<Lane> {
        values.iter().map(|&v| [v; LANES]).collect()
    }

    fn fitted(values: &[f32], width: Width, clips: u16) -> (f32, f32) {
        let fit = fit(&lanes(values), &vec![1.0; values.len()], &width, clips);
        (fit.scale[0], fit.zero[LANES - 1])
    }

    #[test]
    fn plain_scales_by_hand() {
        let w = [-3.0, 1.0, 2.0, 0.0];
        // max|w| / (2 − ½) = 2.
        assert_eq!(fitted(&w, BITS2, 1), (2.0, 2.0));
        assert_eq!(fitted(&w, Width { grid: Grid::Half, ..BITS2 }, 1), (2.0, 1.5));
        // −3 .. 2 over three steps: s = 5/3, z = round(3 / (5/3)) = round(1.8) = 2.
        assert_eq!(fitted(&w, Width { grid: Grid::Asym, ..BITS2 }, 1), (5.0 / 3.0, 2.0));
        // The real zero: code 0 is −3: z = 1.8.
        let (scale, zero) = fitted(&w, Width { grid: Grid::Offset, ..BITS2 }, 1);
        assert!((scale - 5.0 / 3.0).abs() < 1e-6 && (zero - 1.8).abs() < 1e-6);
        // Two levels at ± the mean magnitude, 1.5: s = 3.
        assert_eq!(fitted(&w, Width { bits: 1, grid: Grid::Half, ..BITS2 }, 1), (3.0, 0.5));
    }

    #[test]
    fn a_search_finds_the_grid_that_the_weights_lie_on() {
        // One outlier that the plain scale serves at the cost of all others: the grid of 1 has an error of (8−1)² alone,
        // and with a weight of next to nothing on it none at all.
        let w = [1.0, -1.0, -2.0, 1.0, -2.0, 0.0, 1.0, 3.2];
        let mut weights = vec![1.0; 8];
        weights[7] = 1e-6;
        let fit = fit(&lanes(&w), &weights, &BITS2, 64);
        assert!((fit.scale[3] - 1.0).abs() < 1e-4, "{}", fit.scale[3]);
    }

    #[test]
    fn zeros_and_constants_have_a_grid() {
        for scale_type in [ScaleType::Bf16, ScaleType::F16, ScaleType::F32] {
            for grid in [Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset] {
                for clips in [1, 32] {
                    let width = Width { grid, scale_type, ..BITS2 };
                    let (scale, zero) = fitted(&[0.0; 8], width, clips);
                    assert_eq!(scale, floor(scale_type), "{width:?}");
                    assert!((nearest(zero, 3.0) - zero).abs() * scale <= floor(scale_type) / 2.0);
                    let (scale, zero) = fitted(&[-0.75; 8], width, clips);
                    let back = (nearest(-0.75 / scale + zero, 3.0) - zero) * scale;
                    // Half a step of a plain scale; a searched one comes as near as the next clip.
                    let off = if clips == 1 { scale / 2.0 } else { 0.02 * 0.75 };
                    assert!((back + 0.75).abs() <= off, "{width:?} {clips}: {back}");
                }
            }
        }
    }

    #[test]
    fn stored_scales_are_those_of_their_type() {
        for x in [1.0_f32, 1.003_906_2, 1.003_906_3, 0.1, 3.0e-5, 3.0e38, 7.0] {
            for scale_type in [ScaleType::Bf16, ScaleType::F16, ScaleType::F32] {
                assert_eq!(rounded([x; LANES], scale_type)[1], scale_type.round(x), "{x} {scale_type:?}");
            }
        }
    }

    #[test]
    fn overflow_is_an_infinity() {
        let (scale, _) = fitted(&[3e5, 0.0], Width { scale_type: ScaleType::F16, ..BITS2 }, 1);
        assert_eq!(scale, f32::INFINITY);
        let (scale, _) = fitted(&[3e38, 0.0], Width { scale_type: ScaleType::F16, ..BITS2 }, 32);
        assert_eq!(scale, f32::INFINITY);
    }
}

//! Products with packed matrices that stay packed: what `moepress eval` runs a native checkpoint with, and a decode path for CPUs.
//!
//! A slab of 16 rows by 128 inputs is decoded in registers and the first cache, used, and forgotten. [`Mode::Exact`] multiplies in f32;
//! [`Mode::Fast`] rounds the activations to 8 bits in runs of 32 inputs and multiplies integers.
//!
//! At 2, 4 and 8 bits sixteen words of the layout are one vector: four lanes `t` of one row `g` by four words, and the fields of a word
//! belong to the rows `g` (even fields) and `g + 8`. So activations are brought into the order of these vectors once ([`order`]), and a
//! field costs a shift, a mask and a product. Other widths are widened to 8 bits slab by slab. Sums run in the order of the tiles,
//! whatever the number of threads; vectors of another width give the same bits.

mod exact;
mod fast;
mod widen;

use rayon::prelude::*;

use crate::Group;
use crate::layout::{Grid, Packed, Rows, TILE_INPUTS, TILE_ROWS, packed_row};
use crate::simd::{Lanes, Wide, lanes};

/// What a product may lose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Nothing but roundings of f32.
    Exact,
    /// Activations are rounded to signed bytes, 32 inputs a scale.
    Fast,
}

/// A packed matrix (or gate and up in one) that multiplies rows.
#[derive(Clone, Debug)]
pub struct Linear {
    packed: Packed,
    mode: Mode,
}

/// What the tiles of one block of rows need to know.
struct Job<'a> {
    packed: &'a Packed,
    /// Tiles a row of tiles.
    tiles: usize,
    /// Groups a tile: 4, 2 or 1; 0 where a group is several tiles, which is a whole row.
    per_tile: usize,
}

impl Linear {
    /// Takes a packed matrix.
    pub fn new(packed: Packed, mode: Mode) -> Self {
        Self { packed, mode }
    }

    /// The packed matrix.
    pub fn packed(&self) -> &Packed {
        &self.packed
    }

    /// `x · Wᵀ` for rows `[rows, in]`: `[rows, out]` of each matrix in it, gate before up.
    ///
    /// # Panics
    ///
    /// If `x` is no whole number of rows.
    pub fn apply(&self, x: &[f32]) -> Vec<Vec<f32>> {
        let [outputs, inputs] = self.packed.shape;
        let tokens = x.len().checked_div(inputs).unwrap_or(0);
        assert_eq!(x.len(), tokens * inputs, "rows of {inputs} inputs");
        let [rows, padded] = self.packed.form.padded(self.packed.shape);
        let which = if self.packed.form.rows == Rows::GateUp { 2 } else { 1 };
        let mut out = vec![vec![0.0; tokens * outputs]; which];
        if tokens * outputs == 0 {
            return out;
        }
        let per_tile = match self.packed.form.group {
            Group::Size(size) => TILE_INPUTS / size,
            Group::PerChannel => 0,
        };
        let job = Job { packed: &self.packed, tiles: padded / TILE_INPUTS, per_tile };
        let mut turned = vec![0.0; rows * tokens];
        lanes(Product { mode: self.mode, job: &job, x, out: &mut turned });
        // [rows / 64, tokens, 64], without the padding, by matrix.
        for (which, out) in out.iter_mut().enumerate() {
            out.par_chunks_mut(outputs).enumerate().for_each(|(token, out)| {
                for (row, out) in out.iter_mut().enumerate() {
                    let row = packed_row(self.packed.form.rows, which, row);
                    *out = turned[(row / TILE_ROWS * tokens + token) * TILE_ROWS + row % TILE_ROWS];
                }
            });
        }
        out
    }
}

/// A product in whatever way the CPU has; `out` is `[rows / 64, tokens, 64]`.
struct Product<'a> {
    mode: Mode,
    job: &'a Job<'a>,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Wide for Product<'_> {
    type Out = ();

    fn with(self, lanes: impl Lanes) {
        match self.job.packed.form.bits {
            2 => self.by_width::<2>(lanes),
            4 => self.by_width::<4>(lanes),
            _ => self.by_width::<8>(lanes),
        }
    }
}

impl Product<'_> {
    fn by_width<const B: usize>(self, lanes: impl Lanes) {
        let Self { mode, job, x, out } = self;
        match mode {
            Mode::Exact => exact::by_width::<B, _>(job, x, out, lanes),
            Mode::Fast => fast::by_width::<B, _>(job, x, out, lanes),
        }
    }
}

impl Job<'_> {
    /// Words of a slab.
    fn slab(&self, row_tile: usize, tile: usize, slab: usize) -> &[u32] {
        let words = 64 * usize::from(self.packed.form.bits);
        &self.packed.words[((row_tile * self.tiles + tile) * 4 + slab) * words..][..words]
    }

    /// Groups of a row.
    fn groups(&self) -> usize {
        if self.per_tile == 0 { 1 } else { self.tiles * self.per_tile }
    }

    /// Scales, `[groups of the tile, 64]`.
    fn scales(&self, row_tile: usize, tile: usize) -> &[f32] {
        let count = self.per_tile.max(1);
        let first = if self.per_tile == 0 { 0 } else { tile * count };
        &self.packed.scales[(row_tile * self.groups() + first) * TILE_ROWS..][..count * TILE_ROWS]
    }

    /// Sums of the activations over each group, `[groups]`, of one row of inputs.
    fn sums(&self, x: &[f32]) -> Vec<f32> {
        let length = TILE_INPUTS.checked_div(self.per_tile).unwrap_or(self.tiles * TILE_INPUTS);
        let mut sums = vec![0.0; self.groups()];
        x.chunks(length).zip(&mut sums).for_each(|(x, sum)| *sum = x.iter().map(|&x| f64::from(x)).sum::<f64>() as f32);
        sums
    }

    /// Adds what the zero points make of the sums: `(fixed − z) · s · X` where `fixed` was subtracted already, or `o · X`.
    fn correct(&self, row_tile: usize, fixed: f32, sums: &[f32], out: &mut [f32]) {
        let form = &self.packed.form;
        let meant = form.grid.fixed_zero(form.bits);
        for (group, &sum) in sums.iter().enumerate() {
            let at = (row_tile * self.groups() + group) * TILE_ROWS;
            let scales = &self.packed.scales[at..at + TILE_ROWS];
            match form.grid {
                Grid::Sym | Grid::Half if meant == fixed => return,
                Grid::Sym | Grid::Half => {
                    let each = (fixed - meant) * sum;
                    out.iter_mut().zip(scales).for_each(|(out, s)| *out = s.mul_add(each, *out));
                }
                Grid::Asym => {
                    let zeros = &self.packed.zeros[at..at + TILE_ROWS];
                    out.iter_mut().zip(scales).zip(zeros).for_each(|((out, s), z)| *out += s * (fixed - z) * sum);
                }
                Grid::Offset => {
                    let offsets = &self.packed.zeros[at..at + TILE_ROWS];
                    out.iter_mut().zip(offsets).for_each(|(out, o)| *out = o.mul_add(sum, *out));
                }
            }
        }
    }
}

/// The input within a tile that each element of the eight vectors of a row belongs to. `B` is 2, 4 or 8.
///
/// Vector `(q·F/2 + f/2)·2 + e` (F = 16/B fields) holds, at `4t + s%4`, the field `f` of word `s = 4q + s%4`, half-word `e`.
const fn order<const B: usize>() -> [[usize; 16]; 8] {
    let fields = 16 / B;
    let mut found = [[0; 16]; 8];
    let (mut q, half) = (0, fields / 2);
    while q < B / 2 {
        let mut i = 0;
        while i < half * 32 {
            let (f2, e, d) = (i / 32, i / 16 % 2, i % 16);
            let (t, s) = (d / 4, 4 * q + d % 4);
            let (h, p) = (s / B, s % B * fields + 2 * f2);
            found[(q * half + f2) * 2 + e][d] = 64 * h + 16 * (p / 4) + 8 * (p % 4 / 2) + 2 * t + e;
            i += 1;
        }
        q += 1;
    }
    found
}

/// Which run of 32 inputs each element of the words `4q …` belongs to, whatever the field.
const fn runs<const B: usize>() -> [[usize; 16]; 4] {
    let mut found = [[0; 16]; 4];
    let mut i = 0;
    while i < B / 2 * 16 {
        let s = 4 * (i / 16) + i % 4;
        found[i / 16][i % 16] = 2 * (s / B) + (s % B * (16 / B)) / 8;
        i += 1;
    }
    found
}

/// The scale of each element of the words `4q …` of one row.
#[inline(always)]
fn scale_vectors<const B: usize>(scales: &[f32], per_tile: usize, row: usize) -> [[f32; 16]; 4] {
    let runs = const { runs::<B>() };
    let mut found = [[0.0; 16]; 4];
    for (found, runs) in found.iter_mut().zip(&runs).take(B / 2) {
        for (found, run) in found.iter_mut().zip(runs) {
            *found = scales[run * per_tile / 4 * TILE_ROWS + row];
        }
    }
    found
}

/// `down(silu(gate x) ⊙ up x)` of one expert for rows `[rows, hidden]`; `gates` is one packed tensor with both, or gate and up.
pub fn expert(gates: &[&Linear], down: &Linear, x: &[f32]) -> Vec<f32> {
    let mut both = gates.iter().flat_map(|linear| linear.apply(x));
    let (mut gate, up) = (both.next().unwrap_or_default(), both.next().unwrap_or_default());
    gate.iter_mut().zip(&up).for_each(|(gate, up)| *gate = *gate / (1.0 + (-*gate).exp()) * up);
    down.apply(&gate).pop().unwrap_or_default()
}

#[cfg(test)]
mod tests;

//! f32 activations: a slab becomes 2048 numbers `q − z` in the first cache, which up to eight tokens are multiplied with.

use rayon::prelude::*;

use super::widen::{WORDS, widen};
use super::{Job, order, scale_vectors};
use crate::layout::{TILE_INPUTS, TILE_ROWS};
use crate::simd::widest;

/// Most tokens that share a decoded slab: their sums of a slab stay in the first cache.
const TOKENS: usize = 8;

/// A tile's activations of one token in the order of the vectors.
type Ordered = [[f32; 16]; 8];

/// `out` is `[rows / 64, tokens, 64]`.
pub(super) fn run(job: &Job<'_>, x: &[f32], out: &mut [f32]) {
    match job.packed.form.bits {
        2 => by_width::<2>(job, x, out),
        4 => by_width::<4>(job, x, out),
        _ => by_width::<8>(job, x, out),
    }
}

fn by_width<const B: usize>(job: &Job<'_>, x: &[f32], out: &mut [f32]) {
    let inputs = job.packed.shape[1];
    let order = const { order::<B>() };
    let tokens = x.len() / inputs;
    let ordered: Vec<Ordered> = (0..tokens * job.tiles)
        .into_par_iter()
        .map(|index| {
            let (row, first) = (&x[index / job.tiles * inputs..][..inputs], index % job.tiles * TILE_INPUTS);
            order.map(|vector| vector.map(|k| row.get(first + k).copied().unwrap_or(0.0)))
        })
        .collect();
    let sums: Vec<Vec<f32>> = x.chunks(inputs).map(|x| job.sums(x)).collect();
    let fixed = job.packed.form.grid.fixed_zero(job.packed.form.bits);
    out.par_chunks_mut(tokens * TILE_ROWS).enumerate().for_each(|(row_tile, out)| {
        let blocks = ordered.chunks(TOKENS * job.tiles).zip(out.chunks_mut(TOKENS * TILE_ROWS));
        for (ordered, out) in blocks {
            widest(
                #[inline(always)]
                || match out.len() / TILE_ROWS {
                    1 => rows::<B, 1>(job, row_tile, fixed, ordered, out),
                    2 => rows::<B, 2>(job, row_tile, fixed, ordered, out),
                    3 | 4 => rows::<B, 4>(job, row_tile, fixed, ordered, out),
                    _ => rows::<B, TOKENS>(job, row_tile, fixed, ordered, out),
                },
            );
        }
        out.chunks_mut(TILE_ROWS).zip(&sums).for_each(|(out, sums)| job.correct(row_tile, fixed, sums, out));
    });
}

/// 64 rows for up to `T` tokens.
#[inline(always)]
fn rows<const B: usize, const T: usize>(job: &Job<'_>, row_tile: usize, fixed: f32, ordered: &[Ordered], out: &mut [f32]) {
    let tokens = out.len() / TILE_ROWS;
    let (mut values, mut wide) = ([[[0.0; 16]; 8]; 16], [0; WORDS]);
    for slab in 0..4 {
        let mut totals = [[[0.0_f32; 16]; 16]; T];
        for tile in 0..job.tiles {
            let words = job.slab(row_tile, tile, slab);
            if B == 8 && job.packed.form.bits != 8 {
                widen(job.packed.form.bits, words, &mut wide);
                decode::<B>(&wide, fixed, &mut values);
            } else {
                decode::<B>(words, fixed, &mut values);
            }
            let scales = job.scales(row_tile, tile);
            for (row, values) in values.iter().enumerate() {
                let at = slab * 16 + row;
                if job.per_tile > 1 {
                    let scales = scale_vectors::<B>(scales, job.per_tile, at);
                    for (token, totals) in totals.iter_mut().enumerate().take(tokens) {
                        let x = &ordered[token * job.tiles + tile];
                        for (q, scales) in scales.iter().enumerate().take(B / 2) {
                            let part = dot::<B>(values, x, q * (16 / B));
                            (0..16).for_each(|d| totals[row][d] = part[d].mul_add(scales[d], totals[row][d]));
                        }
                    }
                } else {
                    let scale = scales[at];
                    for (token, totals) in totals.iter_mut().enumerate().take(tokens) {
                        let x = &ordered[token * job.tiles + tile];
                        let part = all(values, x);
                        (0..16).for_each(|d| totals[row][d] = part[d].mul_add(scale, totals[row][d]));
                    }
                }
            }
        }
        for (token, totals) in totals.iter().enumerate().take(tokens) {
            for (row, total) in totals.iter().enumerate() {
                out[token * TILE_ROWS + slab * 16 + row] = total.iter().sum();
            }
        }
    }
}

/// Products of the `16 / B` vectors from `first` on.
#[inline(always)]
fn dot<const B: usize>(values: &Ordered, x: &Ordered, first: usize) -> [f32; 16] {
    let mut sums = [0.0_f32; 16];
    for v in first..first + 16 / B {
        (0..16).for_each(|d| sums[d] = values[v][d].mul_add(x[v][d], sums[d]));
    }
    sums
}

#[inline(always)]
fn all(values: &Ordered, x: &Ordered) -> [f32; 16] {
    let mut sums = [0.0_f32; 16];
    for v in 0..8 {
        (0..16).for_each(|d| sums[d] = values[v][d].mul_add(x[v][d], sums[d]));
    }
    sums
}

/// `q − fixed` of a slab by row, in the order of the vectors.
#[inline(always)]
fn decode<const B: usize>(words: &[u32], fixed: f32, values: &mut [Ordered; 16]) {
    let (vectors, fields, mask) = (words.as_chunks::<16>().0, 16 / B, (1_u32 << B) - 1);
    for g in 0..8 {
        for q in 0..B / 2 {
            let word = &vectors[q * 8 + g];
            for f in 0..fields {
                for e in 0..2 {
                    let to = &mut values[g + 8 * (f % 2)][(q * fields / 2 + f / 2) * 2 + e];
                    (0..16).for_each(|d| to[d] = (word[d] >> (B * f + 16 * e) & mask) as i32 as f32 - fixed);
                }
            }
        }
    }
}

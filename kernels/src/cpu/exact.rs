//! f32 activations: what sixteen words hold becomes numbers `q − z` in registers, which up to eight tokens are multiplied with.

use rayon::prelude::*;

use super::widen::{WORDS, widen};
use super::{Job, order, scale_vectors};
use crate::layout::{TILE_INPUTS, TILE_ROWS};
use crate::simd::Lanes;

/// Most tokens that share what was decoded: their sums of a slab stay in the first cache.
const TOKENS: usize = 8;

/// A tile's activations of one token in the order of the vectors.
type Ordered = [[f32; 16]; 8];

/// `out` is `[rows / 64, tokens, 64]`.
pub(super) fn by_width<const B: usize, L: Lanes>(job: &Job<'_>, x: &[f32], out: &mut [f32], lanes: L) {
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
            lanes.run(
                #[inline(always)]
                || match out.len() / TILE_ROWS {
                    1 => rows::<B, 1, 4, L>(job, row_tile, fixed, ordered, out, lanes),
                    2 => rows::<B, 2, 2, L>(job, row_tile, fixed, ordered, out, lanes),
                    3 | 4 => rows::<B, 4, 1, L>(job, row_tile, fixed, ordered, out, lanes),
                    _ => rows::<B, TOKENS, 1, L>(job, row_tile, fixed, ordered, out, lanes),
                },
            );
        }
        out.chunks_mut(TILE_ROWS).zip(&sums).for_each(|(out, sums)| job.correct(row_tile, fixed, sums, out));
    });
}

/// 64 rows for up to `T` tokens, `S` of the four slabs of a tile at a time: with few tokens memory is read as it lies.
#[inline(always)]
fn rows<const B: usize, const T: usize, const S: usize, L: Lanes>(
    job: &Job<'_>,
    row_tile: usize,
    fixed: f32,
    ordered: &[Ordered],
    out: &mut [f32],
    lanes: L,
) {
    let tokens = out.len() / TILE_ROWS;
    let table = lanes.floats(&std::array::from_fn(|i| (i % (1 << B)) as f32 - fixed));
    let fixed = lanes.splat(fixed);
    let mut wide = [0; WORDS];
    for first in (0..4).step_by(S) {
        let mut totals = [[[lanes.splat(0.0); 16]; S]; T];
        for (tile, slab) in (0..job.tiles).flat_map(|tile| (0..S).map(move |slab| (tile, slab))) {
            let mut words = job.slab(row_tile, tile, first + slab);
            if B == 8 && job.packed.form.bits != 8 {
                widen(job.packed.form.bits, words, &mut wide);
                words = &wide;
            }
            let scales = job.scales(row_tile, tile);
            for g in 0..8 {
                let both = decode::<B, L>(words, g, table, fixed, lanes);
                for (parity, values) in both.iter().enumerate() {
                    let row = g + 8 * parity;
                    let at = (first + slab) * 16 + row;
                    if job.per_tile > 1 {
                        let scales = scale_vectors::<B>(scales, job.per_tile, at);
                        for (token, totals) in totals.iter_mut().enumerate().take(tokens) {
                            let x = &ordered[token * job.tiles + tile];
                            for (q, scales) in scales.iter().enumerate().take(B / 2) {
                                let part = dot(&values[q * (16 / B)..][..16 / B], &x[q * (16 / B)..][..16 / B], lanes);
                                totals[slab][row] = lanes.mul_add(part, lanes.floats(scales), totals[slab][row]);
                            }
                        }
                    } else {
                        let scale = lanes.splat(scales[at]);
                        for (token, totals) in totals.iter_mut().enumerate().take(tokens) {
                            let part = dot(values, &ordered[token * job.tiles + tile], lanes);
                            totals[slab][row] = lanes.mul_add(part, scale, totals[slab][row]);
                        }
                    }
                }
            }
        }
        for (token, totals) in totals.iter().enumerate().take(tokens) {
            for (row, &total) in totals.as_flattened().iter().enumerate() {
                out[token * TILE_ROWS + first * 16 + row] = lanes.array(total).iter().sum();
            }
        }
    }
}

/// Products, one after the other in each lane.
#[inline(always)]
fn dot<L: Lanes>(values: &[L::F], x: &[[f32; 16]], lanes: L) -> L::F {
    values.iter().zip(x).fold(lanes.splat(0.0), |sum, (&value, x)| lanes.mul_add(value, lanes.floats(x), sum))
}

/// `q − fixed` of the rows `g` and `g + 8` of a slab, in the order of the vectors.
#[inline(always)]
fn decode<const B: usize, L: Lanes>(words: &[u32], g: usize, table: L::F, fixed: L::F, lanes: L) -> [[L::F; 8]; 2] {
    let (vectors, fields) = (words.as_chunks::<16>().0, 16 / B);
    let mut values = [[fixed; 8]; 2];
    for q in 0..B / 2 {
        let word = lanes.words(&vectors[q * 8 + g]);
        for f in 0..fields {
            for e in 0..2 {
                values[f % 2][(q * fields / 2 + f / 2) * 2 + e] = lanes.decode::<B>(word, (B * f + 16 * e) as u32, table, fixed);
            }
        }
    }
    values
}

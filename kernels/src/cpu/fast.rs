//! Activations of 8 bits, 32 inputs a scale: integer products, exact within a run of 32.
//!
//! Codes stay unsigned, so `vpdpbusd` takes them as they are; the zero points come in with the sums of the rounded activations.

use rayon::prelude::*;

use super::widen::{WORDS, widen};
use super::{Job, order, runs, scale_vectors};
use crate::layout::{TILE_INPUTS, TILE_ROWS};
use crate::simd::{Lanes, widest};

/// A tile of one token.
#[derive(Clone)]
struct Rounded {
    /// Bytes in the order of the words, two vectors of codes at most.
    bytes: [[u32; 16]; 4],
    /// Scale of each element of the words `4q …`.
    scales: [[f32; 16]; 4],
}

/// `out` is `[rows / 64, tokens, 64]`.
pub(super) fn by_width<const B: usize, L: Lanes>(job: &Job<'_>, x: &[f32], out: &mut [f32], lanes: L) {
    let inputs = job.packed.shape[1];
    let tokens = x.len() / inputs;
    let rounded: Vec<(Vec<Rounded>, Vec<f32>)> = x.par_chunks(inputs).map(|x| round::<B>(job, x)).collect();
    out.par_chunks_mut(tokens * TILE_ROWS).enumerate().for_each(|(row_tile, out)| {
        lanes.run(
            #[inline(always)]
            || match tokens {
                1 => rows::<B, 4, L>(job, row_tile, &rounded, out, lanes),
                _ => rows::<B, 1, L>(job, row_tile, &rounded, out, lanes),
            },
        );
        out.chunks_mut(TILE_ROWS).zip(&rounded).for_each(|(out, (_, sums))| job.correct(row_tile, 0.0, sums, out));
    });
}

/// Rounds a row of inputs; also the sums of what it was rounded to, by the groups of the weights.
fn round<const B: usize>(job: &Job<'_>, x: &[f32]) -> (Vec<Rounded>, Vec<f32>) {
    let mut padded = x.to_vec();
    padded.resize(job.tiles * TILE_INPUTS, 0.0);
    let tiles = widest(
        #[inline(always)]
        || padded.as_chunks_mut::<TILE_INPUTS>().0.iter_mut().map(round_tile::<B>).collect(),
    );
    (tiles, job.sums(&padded))
}

/// Rounds a tile; what it was rounded to is left in it.
#[inline(always)]
fn round_tile<const B: usize>(tile: &mut [f32; TILE_INPUTS]) -> Rounded {
    let (places, runs) = const { (places::<B>(), runs::<B>()) };
    let (mut codes, mut scales) = ([0_i8; TILE_INPUTS], [0.0; TILE_INPUTS / 32]);
    let parts = tile.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks_mut::<32>().0);
    for ((values, codes), scale) in parts.zip(&mut scales) {
        let mut tops = [0.0_f32; 16];
        values.as_chunks::<16>().0.iter().for_each(|x| (0..16).for_each(|i| tops[i] = tops[i].max(x[i].abs())));
        *scale = tops.iter().fold(0.0_f32, |top, &x| top.max(x)) / 127.0;
        for (value, to) in values.iter_mut().zip(codes) {
            let code = if *scale > 0.0 { (*value / *scale).round_ties_even() } else { 0.0 };
            (*to, *value) = (code as i8, code * *scale);
        }
    }
    let bytes = places.map(|words| words.map(|word| u32::from_le_bytes(word.map(|place| codes[usize::from(place)] as u8))));
    Rounded { bytes, scales: runs.map(|runs| runs.map(|run| scales[run])) }
}

/// The input within a tile of every byte.
const fn places<const B: usize>() -> [[[u8; 4]; 16]; 4] {
    let order = order::<B>();
    let mut found = [[[0; 4]; 16]; 4];
    let mut i = 0;
    while i < 256 {
        let (at, d, byte) = (i / 64, i / 4 % 16, i % 4);
        found[at][d][byte] = order[source::<B>(at, byte)][d] as u8;
        i += 1;
    }
    found
}

/// The vector of [`order`] that byte `byte` of the `at`-th vector of bytes comes from.
///
/// At 8 bits a byte is a field of its own row, so both rows find the same activations in the bytes of their half-word; at 4 and 2 bits
/// bytes 0 and 1 of plane `m` are the fields `m` and `m + 8/B`.
const fn source<const B: usize>(at: usize, byte: usize) -> usize {
    let e = byte / 2;
    match B {
        8 => at * 2 + e,
        4 => (at % 2 * 2 + byte % 2) * 2 + e,
        _ => (at % 2 + byte % 2 * 2) * 2 + e,
    }
}

/// 64 rows for every token, one after the other, `S` of the four slabs of a tile at a time: one token reads memory as it lies, for several
/// a slab stays in the first cache.
#[inline(always)]
fn rows<const B: usize, const S: usize, L: Lanes>(
    job: &Job<'_>,
    row_tile: usize,
    rounded: &[(Vec<Rounded>, Vec<f32>)],
    out: &mut [f32],
    lanes: L,
) {
    let mut wide = [0; WORDS];
    for (first, (token, (rounded, _))) in (0..4).step_by(S).flat_map(|first| rounded.iter().enumerate().map(move |token| (first, token))) {
        let mut totals = [[lanes.splat(0.0); 16]; S];
        for (tile, slab) in (0..job.tiles).flat_map(|tile| (0..S).map(move |slab| (tile, slab))) {
            let (x, totals) = (&rounded[tile], &mut totals[slab]);
            let mut words = job.slab(row_tile, tile, first + slab);
            if B == 8 && job.packed.form.bits != 8 {
                widen(job.packed.form.bits, words, &mut wide);
                words = &wide;
            }
            let scales = job.scales(row_tile, tile);
            for g in 0..8 {
                let parts = products::<B, L>(words, g, x, lanes);
                for (parity, parts) in parts.iter().enumerate() {
                    let row = g + 8 * parity;
                    let at = (first + slab) * 16 + row;
                    if job.per_tile > 1 {
                        let scales = scale_vectors::<B>(scales, job.per_tile, at);
                        for (&part, scales) in parts.iter().zip(&scales).take(B / 2) {
                            totals[row] = lanes.mul_add(part, lanes.floats(scales), totals[row]);
                        }
                    } else {
                        let whole = parts[1..B / 2].iter().fold(parts[0], |whole, &part| lanes.sum(whole, part));
                        totals[row] = lanes.mul_add(whole, lanes.splat(scales[at]), totals[row]);
                    }
                }
            }
        }
        for (row, &total) in totals.as_flattened().iter().enumerate() {
            out[token * TILE_ROWS + first * 16 + row] = lanes.array(total).iter().sum();
        }
    }
}

/// Products of the rows `g` and `g + 8`, by the words `4q …`, the activations' scales in them.
#[inline(always)]
fn products<const B: usize, L: Lanes>(words: &[u32], g: usize, x: &Rounded, lanes: L) -> [[L::F; 4]; 2] {
    let vectors = words.as_chunks::<16>().0;
    let mut parts = [[lanes.splat(0.0); 4]; 2];
    for q in 0..B / 2 {
        let word = lanes.words(&vectors[q * 8 + g]);
        let mut sums = [lanes.words(&[0; 16]); 2];
        if B == 8 {
            let bytes = lanes.words(&x.bytes[q]);
            sums[0] = lanes.dot(sums[0], lanes.field(word, 0, 0x00ff_00ff), bytes);
            sums[1] = lanes.dot(sums[1], lanes.field(word, 0, 0xff00_ff00), bytes);
        } else {
            let mask = 0x0101_0101 * ((1 << B) - 1);
            for plane in 0..8 / B {
                let bytes = lanes.words(if B == 4 { &x.bytes[q] } else { &x.bytes[plane / 2] });
                sums[plane % 2] = lanes.dot(sums[plane % 2], lanes.field(word, (B * plane) as u32, mask), bytes);
            }
        }
        let scales = lanes.floats(&x.scales[q]);
        for (parts, &sums) in parts.iter_mut().zip(&sums) {
            parts[q] = lanes.product(lanes.convert(sums), scales);
        }
    }
    parts
}

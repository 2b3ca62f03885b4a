//! Activations of 8 bits, 32 inputs a scale: integer products, exact within a run of 32.
//!
//! Codes stay unsigned, so `vpdpbusd` takes them as they are; the zero points come in with the sums of the rounded activations.

use rayon::prelude::*;

use super::widen::{WORDS, widen};
use super::{Job, order, runs, scale_vectors};
use crate::layout::{TILE_INPUTS, TILE_ROWS};
#[cfg(target_arch = "x86_64")]
use crate::simd::Vnni;
use crate::simd::{Dot, Portable};

/// A tile of one token.
#[derive(Clone)]
struct Rounded {
    /// Bytes in the order of the words, two vectors of codes at most.
    bytes: [[u32; 16]; 4],
    /// Scale of each element of the words `4q …`.
    scales: [[f32; 16]; 4],
}

/// `out` is `[rows / 64, tokens, 64]`.
pub(super) fn run(job: &Job<'_>, x: &[f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(vnni) = Vnni::detect() {
        return by_bits(job, x, out, vnni);
    }
    by_bits(job, x, out, Portable);
}

fn by_bits(job: &Job<'_>, x: &[f32], out: &mut [f32], dot: impl Dot) {
    match job.packed.form.bits {
        2 => by_width::<2>(job, x, out, dot),
        4 => by_width::<4>(job, x, out, dot),
        _ => by_width::<8>(job, x, out, dot),
    }
}

fn by_width<const B: usize>(job: &Job<'_>, x: &[f32], out: &mut [f32], dot: impl Dot) {
    let inputs = job.packed.shape[1];
    let tokens = x.len() / inputs;
    let rounded: Vec<(Vec<Rounded>, Vec<f32>)> = x.par_chunks(inputs).map(|x| round::<B>(job, x)).collect();
    out.par_chunks_mut(tokens * TILE_ROWS).enumerate().for_each(|(row_tile, out)| {
        dot.run(
            #[inline(always)]
            || rows::<B>(job, row_tile, &rounded, out, dot),
        );
        out.chunks_mut(TILE_ROWS).zip(&rounded).for_each(|(out, (_, sums))| job.correct(row_tile, 0.0, sums, out));
    });
}

/// Rounds a row of inputs; also the sums of what it was rounded to, by the groups of the weights.
fn round<const B: usize>(job: &Job<'_>, x: &[f32]) -> (Vec<Rounded>, Vec<f32>) {
    let mut padded = x.to_vec();
    padded.resize(job.tiles * TILE_INPUTS, 0.0);
    let scales: Vec<f32> = padded.chunks(32).map(|run| run.iter().fold(0.0_f32, |top, x| top.max(x.abs())) / 127.0).collect();
    let code = |(k, x): (usize, &f32)| if scales[k / 32] > 0.0 { (x / scales[k / 32]).round_ties_even() } else { 0.0 };
    let codes: Vec<f32> = padded.iter().enumerate().map(code).collect();
    let values: Vec<f32> = codes.iter().enumerate().map(|(k, code)| code * scales[k / 32]).collect();
    let (order, runs) = const { (order::<B>(), runs::<B>()) };
    let tile = |(tile, codes): (usize, &[f32])| {
        let mut bytes = [[0_u32; 16]; 4];
        for (at, words) in bytes.iter_mut().enumerate() {
            for (d, word) in words.iter_mut().enumerate() {
                *word = (0..4).map(|byte| u32::from(codes[order[source::<B>(at, byte)][d]] as i8 as u8) << (8 * byte)).sum();
            }
        }
        let scales = runs.map(|runs| runs.map(|run| scales[tile * 4 + run]));
        Rounded { bytes, scales }
    };
    (codes.chunks(TILE_INPUTS).enumerate().map(tile).collect(), job.sums(&values))
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

/// 64 rows for every token, one after the other: a slab stays in the first cache.
#[inline(always)]
fn rows<const B: usize>(job: &Job<'_>, row_tile: usize, rounded: &[(Vec<Rounded>, Vec<f32>)], out: &mut [f32], dot: impl Dot) {
    let mut wide = [0; WORDS];
    for (slab, (token, (rounded, _))) in (0..4).flat_map(|slab| rounded.iter().enumerate().map(move |token| (slab, token))) {
        let mut totals = [[0.0_f32; 16]; 16];
        for (tile, x) in rounded.iter().enumerate() {
            let mut words = job.slab(row_tile, tile, slab);
            if B == 8 && job.packed.form.bits != 8 {
                widen(job.packed.form.bits, words, &mut wide);
                words = &wide;
            }
            let scales = job.scales(row_tile, tile);
            for g in 0..8 {
                let parts = products::<B>(words, g, x, dot);
                for (parity, parts) in parts.iter().enumerate() {
                    let (row, at) = (g + 8 * parity, slab * 16 + g + 8 * parity);
                    if job.per_tile > 1 {
                        let scales = scale_vectors::<B>(scales, job.per_tile, at);
                        for (part, scales) in parts.iter().zip(&scales).take(B / 2) {
                            (0..16).for_each(|d| totals[row][d] = part[d].mul_add(scales[d], totals[row][d]));
                        }
                    } else {
                        let mut whole = parts[0];
                        for part in parts.iter().take(B / 2).skip(1) {
                            (0..16).for_each(|d| whole[d] += part[d]);
                        }
                        (0..16).for_each(|d| totals[row][d] = whole[d].mul_add(scales[at], totals[row][d]));
                    }
                }
            }
        }
        for (row, total) in totals.iter().enumerate() {
            out[token * TILE_ROWS + slab * 16 + row] = total.iter().sum();
        }
    }
}

/// Products of the rows `g` and `g + 8`, by the words `4q …`, the activations' scales in them.
#[inline(always)]
fn products<const B: usize>(words: &[u32], g: usize, x: &Rounded, dot: impl Dot) -> [[[f32; 16]; 4]; 2] {
    let vectors = words.as_chunks::<16>().0;
    let mut parts = [[[0.0; 16]; 4]; 2];
    for q in 0..B / 2 {
        let word = vectors[q * 8 + g];
        let mut sums = [[0_i32; 16]; 2];
        if B == 8 {
            sums[0] = dot.dot(sums[0], word.map(|w| w & 0x00ff_00ff), x.bytes[q]);
            sums[1] = dot.dot(sums[1], word.map(|w| w & 0xff00_ff00), x.bytes[q]);
        } else {
            let mask = 0x0101_0101 * ((1 << B) - 1);
            for plane in 0..8 / B {
                let bytes = if B == 4 { x.bytes[q] } else { x.bytes[plane / 2] };
                sums[plane % 2] = dot.dot(sums[plane % 2], word.map(|w| w >> (B * plane) & mask), bytes);
            }
        }
        for (parts, sums) in parts.iter_mut().zip(&sums) {
            (0..16).for_each(|d| parts[q][d] = sums[d] as f32 * x.scales[q][d]);
        }
    }
    parts
}

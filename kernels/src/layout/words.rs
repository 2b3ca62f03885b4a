//! Codes of rows <-> words of tiles.

use rayon::prelude::*;

use super::{Form, Rows, TILE_INPUTS, TILE_ROWS, packed_row, source_row};

/// Codes of a slab: 16 rows of 128 inputs.
type Slab = [[u8; TILE_INPUTS]; 16];

/// Puts the codes of pair `p` into a lane's words of one half.
#[inline(always)]
fn put<const B: usize>(words: &mut [u32; B], p: usize, low: u32, high: u32) {
    let both = low | high << 16;
    if B % 2 == 1 && B > 1 && p == 15 {
        for (c, word) in words.iter_mut().enumerate() {
            *word |= (low >> c & 1) << 15 | (high >> c & 1) << 31;
        }
    } else if B == 6 && p >= 12 {
        let i = p - 12;
        words[i] |= (both & 0x000F_000F) << 12;
        words[4 + i / 2] |= (both >> 4 & 0x0003_0003) << (12 + 2 * (i % 2));
    } else {
        let fields = 16 / B;
        words[p / fields] |= both << (B * (p % fields));
    }
}

/// The codes of pair `p`, as [`put`] left them: even in the low half, odd in the high half.
#[inline(always)]
fn take<const B: usize>(words: &[u32; B], p: usize) -> u32 {
    let mask = (1_u32 << B) - 1;
    let mask = mask | mask << 16;
    if B % 2 == 1 && B > 1 && p == 15 {
        words.iter().enumerate().fold(0, |both, (c, word)| both | (word >> 15 & 0x0001_0001) << c)
    } else if B == 6 && p >= 12 {
        let i = p - 12;
        (words[i] >> 12 & 0x000F_000F) | (words[4 + i / 2] >> (12 + 2 * (i % 2)) & 0x0003_0003) << 4
    } else {
        let fields = 16 / B;
        words[p / fields] >> (B * (p % fields)) & mask
    }
}

/// The codes of pair `p` of a lane's words of one half: the even one below, the odd one 16 bits above.
#[inline(always)]
pub(crate) fn widen_pair<const B: usize>(words: &[u32; B], p: usize) -> u32 {
    take(words, p)
}

/// Place in the slab of word `s` of lane `lane`.
#[inline(always)]
const fn address<const B: usize>(lane: usize, s: usize) -> usize {
    let v = if B.is_multiple_of(2) { 4 } else { 2 };
    s / v * 32 * v + lane * v + s % v
}

/// Row and first input of pair `p` of a lane's half.
#[inline(always)]
const fn owner(lane: usize, half: usize, p: usize) -> (usize, usize) {
    let (g, t, j, r) = (lane >> 2, lane & 3, p >> 2, p & 3);
    (g + 8 * (r & 1), 64 * half + 16 * j + 8 * (r >> 1) + 2 * t)
}

fn pack_slab<const B: usize>(codes: &Slab, words: &mut [u32]) {
    for lane in 0..32 {
        for half in 0..2 {
            let mut own = [0; B];
            for p in 0..16 {
                let (row, k) = owner(lane, half, p);
                put(&mut own, p, u32::from(codes[row][k]), u32::from(codes[row][k + 1]));
            }
            own.iter().enumerate().for_each(|(x, word)| words[address::<B>(lane, half * B + x)] = *word);
        }
    }
}

fn unpack_slab<const B: usize>(words: &[u32], codes: &mut Slab) {
    for lane in 0..32 {
        for half in 0..2 {
            let own: [u32; B] = std::array::from_fn(|x| words[address::<B>(lane, half * B + x)]);
            for p in 0..16 {
                let (row, k) = owner(lane, half, p);
                let both = take(&own, p);
                (codes[row][k], codes[row][k + 1]) = (both as u8, (both >> 16) as u8);
            }
        }
    }
}

/// One slab by width.
fn unpack_one(bits: u8, words: &[u32], codes: &mut Slab) {
    match bits {
        1 => unpack_slab::<1>(words, codes),
        2 => unpack_slab::<2>(words, codes),
        3 => unpack_slab::<3>(words, codes),
        4 => unpack_slab::<4>(words, codes),
        5 => unpack_slab::<5>(words, codes),
        6 => unpack_slab::<6>(words, codes),
        _ => unpack_slab::<8>(words, codes),
    }
}

fn pack_one(bits: u8, codes: &Slab, words: &mut [u32]) {
    match bits {
        1 => pack_slab::<1>(codes, words),
        2 => pack_slab::<2>(codes, words),
        3 => pack_slab::<3>(codes, words),
        4 => pack_slab::<4>(codes, words),
        5 => pack_slab::<5>(codes, words),
        6 => pack_slab::<6>(codes, words),
        _ => pack_slab::<8>(codes, words),
    }
}

/// The tiles of one matrix, or of gate and up; `codes` are `[out, in]` each, and fit.
pub(super) fn pack(form: &Form, [outputs, inputs]: [usize; 2], codes: &[&[u8]]) -> Vec<u32> {
    let [rows, padded] = form.padded([outputs, inputs]);
    let mut words = vec![0; rows * padded * usize::from(form.bits) / 32];
    if words.is_empty() {
        return words;
    }
    let filler = if form.bits == 1 { 0 } else { 1 << (form.bits - 1) };
    let slab_words = 64 * usize::from(form.bits);
    let tile_row = padded / TILE_INPUTS * 4 * slab_words;
    words.par_chunks_mut(tile_row).enumerate().for_each(|(tile, words)| {
        for (index, words) in words.chunks_mut(slab_words).enumerate() {
            let (first_k, first_row) = (index / 4 * TILE_INPUTS, tile * TILE_ROWS + index % 4 * 16);
            let mut slab = [[filler; TILE_INPUTS]; 16];
            for (r, line) in slab.iter_mut().enumerate() {
                let (which, row) = source_row(form.rows, first_row + r);
                if row < outputs && first_k < inputs {
                    let run = TILE_INPUTS.min(inputs - first_k);
                    line[..run].copy_from_slice(&codes[which][row * inputs + first_k..][..run]);
                }
            }
            pack_one(form.bits, &slab, words);
        }
    });
    words
}

/// The codes `[out, in]` of each matrix.
pub(super) fn unpack(form: &Form, [outputs, inputs]: [usize; 2], words: &[u32]) -> Vec<Vec<u8>> {
    let padded = form.padded([outputs, inputs])[1];
    let slab_words = 64 * usize::from(form.bits);
    let count = if form.rows == Rows::GateUp { 2 } else { 1 };
    let mut found = vec![vec![0_u8; outputs * inputs]; count];
    if outputs * inputs == 0 {
        return found;
    }
    for (which, codes) in found.iter_mut().enumerate() {
        // Eight rows of a matrix lie in one slab in either order of rows.
        codes.par_chunks_mut(8 * inputs).enumerate().for_each(|(eight, codes)| {
            let row = packed_row(form.rows, which, 8 * eight);
            let mut slab = [[0; TILE_INPUTS]; 16];
            for k in 0..padded / TILE_INPUTS {
                let at = ((row / TILE_ROWS * (padded / TILE_INPUTS) + k) * 4 + row % TILE_ROWS / 16) * slab_words;
                unpack_one(form.bits, &words[at..at + slab_words], &mut slab);
                let run = TILE_INPUTS.min(inputs - k * TILE_INPUTS);
                for (r, line) in codes.chunks_mut(inputs).enumerate() {
                    line[k * TILE_INPUTS..][..run].copy_from_slice(&slab[row % 16 + r][..run]);
                }
            }
        });
    }
    found
}

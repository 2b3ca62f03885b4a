//! A slab of any width as a slab of 8 bits.

use crate::layout::widen_pair;

/// Words of a slab of 8 bits.
pub(super) const WORDS: usize = 512;

/// Decodes a slab of `bits` into the order that 8 bits have; the lanes go side by side.
#[inline(always)]
pub(super) fn widen(bits: u8, slab: &[u32], out: &mut [u32; WORDS]) {
    match bits {
        1 => lanes::<1, 2>(slab, out),
        3 => lanes::<3, 2>(slab, out),
        5 => lanes::<5, 2>(slab, out),
        _ => lanes::<6, 4>(slab, out),
    }
}

#[inline(always)]
fn lanes<const B: usize, const V: usize>(slab: &[u32], out: &mut [u32; WORDS]) {
    for half in 0..2 {
        // [word][lane], so that each step below works on all lanes at once.
        let mut words = [[0_u32; 32]; B];
        for (x, words) in words.iter_mut().enumerate() {
            let s = half * B + x;
            let from = &slab[s / V * 32 * V..][..32 * V];
            words.iter_mut().zip(from.chunks_exact(V)).for_each(|(word, lane)| *word = lane[s % V]);
        }
        // Word x of 8 bits holds the pairs 2x and 2x + 1; four words of a lane lie side by side.
        let quads = [
            [pairs::<B, 0>(&words), pairs::<B, 1>(&words), pairs::<B, 2>(&words), pairs::<B, 3>(&words)],
            [pairs::<B, 4>(&words), pairs::<B, 5>(&words), pairs::<B, 6>(&words), pairs::<B, 7>(&words)],
        ];
        for ([a, b, c, d], out) in quads.iter().zip(out[half * 256..].as_chunks_mut::<128>().0) {
            for (lane, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *out = [a[lane], b[lane], c[lane], d[lane]];
            }
        }
    }
}

/// The pairs `2X` and `2X + 1` of every lane in one word.
#[inline(always)]
fn pairs<const B: usize, const X: usize>(words: &[[u32; 32]; B]) -> [u32; 32] {
    std::array::from_fn(|lane| {
        let own: [u32; B] = std::array::from_fn(|word| words[word][lane]);
        widen_pair(&own, 2 * X) | widen_pair(&own, 2 * X + 1) << 8
    })
}

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
            words.iter_mut().enumerate().for_each(|(lane, word)| *word = slab[s / V * 32 * V + lane * V + s % V]);
        }
        for x in 0..8 {
            // Word x of 8 bits holds the pairs 2x and 2x + 1.
            let s = half * 8 + x;
            for lane in 0..32 {
                let own: [u32; B] = std::array::from_fn(|word| words[word][lane]);
                out[s / 4 * 128 + lane * 4 + s % 4] = widen_pair(&own, 2 * x) | widen_pair(&own, 2 * x + 1) << 8;
            }
        }
    }
}

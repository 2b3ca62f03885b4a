//! Codes <-> packed words: the dense little-endian bitstream of compressed-tensors, GPTQ and MLX.
//!
//! Element `i` of a row occupies bits `i·b .. i·b + b` of an endless bit string, lowest bit first; bit `p` of the string is
//! bit `p mod 32` of 32-bit word `p div 32`. 32 codes take exactly `b` words; a row that ends inside a word is padded with
//! zeros.
//!
//! Eight codes of a byte each become `b` bytes by three shifts within a 64-bit word (pairs, pairs of pairs, halves), and eight
//! of these fill `b` such words: no code is touched alone.

use rayon::prelude::*;

use crate::simd::widest;
use crate::{Error, Result};

/// Bytes of codes below which a split over threads costs more than it brings.
const PARALLEL_BYTES: usize = 1 << 16;

/// Words of a row of `columns` codes of `bits` bits.
pub fn words(columns: usize, bits: u8) -> usize {
    (columns * usize::from(bits)).div_ceil(32)
}

/// Packs each row of `codes`, `[rows, columns]`, into words: `[rows, words(columns, bits)]`.
///
/// # Errors
///
/// [`Error::Bits`] unless `bits` is 1 to 8; [`Error::Length`] if the codes are not of this shape; [`Error::Code`] for the first
/// code that does not fit.
pub fn pack_rows(codes: &[u8], [rows, columns]: [usize; 2], bits: u8) -> Result<Vec<u32>> {
    check_bits(bits)?;
    check_length("codes", codes.len(), rows, columns, rows * columns)?;
    let width = words(columns, bits);
    let mut packed = vec![0_u32; rows * width];
    if packed.is_empty() {
        return Ok(packed);
    }
    let lanes = match bits {
        1 => pack_all::<1>(codes, columns, &mut packed, width),
        2 => pack_all::<2>(codes, columns, &mut packed, width),
        3 => pack_all::<3>(codes, columns, &mut packed, width),
        4 => pack_all::<4>(codes, columns, &mut packed, width),
        5 => pack_all::<5>(codes, columns, &mut packed, width),
        6 => pack_all::<6>(codes, columns, &mut packed, width),
        7 => pack_all::<7>(codes, columns, &mut packed, width),
        _ => pack_all::<8>(codes, columns, &mut packed, width),
    };
    if lanes & !repeat(bits) != 0 {
        return Err(first_misfit(codes, columns, bits));
    }
    if cfg!(target_endian = "big") {
        packed.iter_mut().for_each(|word| *word = u32::from_le(*word));
    }
    Ok(packed)
}

/// The codes, `[rows, columns]`, of words that [`pack_rows`] made.
///
/// # Errors
///
/// [`Error::Bits`] unless `bits` is 1 to 8; [`Error::Length`] if there are not `rows · words(columns, bits)` words.
pub fn unpack_rows(packed: &[u32], [rows, columns]: [usize; 2], bits: u8) -> Result<Vec<u8>> {
    check_bits(bits)?;
    let width = words(columns, bits);
    check_length("packed words", packed.len(), rows, columns, rows * width)?;
    let mut codes = vec![0_u8; rows * columns];
    if codes.is_empty() {
        return Ok(codes);
    }
    let swapped: Vec<u32>;
    let packed = if cfg!(target_endian = "big") {
        swapped = packed.iter().map(|word| word.to_le()).collect();
        &swapped
    } else {
        packed
    };
    match bits {
        1 => unpack_all::<1>(packed, width, &mut codes, columns),
        2 => unpack_all::<2>(packed, width, &mut codes, columns),
        3 => unpack_all::<3>(packed, width, &mut codes, columns),
        4 => unpack_all::<4>(packed, width, &mut codes, columns),
        5 => unpack_all::<5>(packed, width, &mut codes, columns),
        6 => unpack_all::<6>(packed, width, &mut codes, columns),
        7 => unpack_all::<7>(packed, width, &mut codes, columns),
        _ => unpack_all::<8>(packed, width, &mut codes, columns),
    }
    Ok(codes)
}

/// Packs each *column* of `codes`, `[rows, columns]`, as a stream of its own: `[words(rows, bits), columns]`.
///
/// So compressed-tensors stores the zero points: column `j` is a bitstream that runs down the rows.
///
/// # Errors
///
/// As [`pack_rows`]; the row and column of a misfit are those of `codes`.
pub fn pack_columns(codes: &[u8], [rows, columns]: [usize; 2], bits: u8) -> Result<Vec<u32>> {
    check_bits(bits)?;
    check_length("codes", codes.len(), rows, columns, rows * columns)?;
    let packed = pack_rows(&transpose(codes, rows, columns), [columns, rows], bits).map_err(|error| match error {
        Error::Code { code, row, column, bits } => Error::Code { code, row: column, column: row, bits },
        other => other,
    })?;
    Ok(transpose(&packed, columns, words(rows, bits)))
}

/// The codes, `[rows, columns]`, of words that [`pack_columns`] made.
///
/// # Errors
///
/// As [`unpack_rows`].
pub fn unpack_columns(packed: &[u32], [rows, columns]: [usize; 2], bits: u8) -> Result<Vec<u8>> {
    check_bits(bits)?;
    let height = words(rows, bits);
    check_length("packed words", packed.len(), rows, columns, height * columns)?;
    let codes = unpack_rows(&transpose(packed, height, columns), [columns, rows], bits)?;
    Ok(transpose(&codes, columns, rows))
}

fn check_bits(bits: u8) -> Result<()> {
    if (1..=8).contains(&bits) { Ok(()) } else { Err(Error::Bits { bits }) }
}

fn check_length(what: &'static str, found: usize, rows: usize, columns: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { what, rows, columns, expected, found }) }
}

/// Eight bytes, each with its lowest `bits` bits set.
fn repeat(bits: u8) -> u64 {
    u64::from(u8::MAX >> (8 - bits)) * 0x0101_0101_0101_0101
}

/// Codes and words of one run: a row, or, where rows end with a word, all of a job's rows, which are then one stream.
fn run(columns: usize, width: usize, bits: usize, rows: usize) -> (usize, usize) {
    if columns * bits == width * 32 { (columns * rows, width * rows) } else { (columns, width) }
}

/// Packs all rows; gives the bitwise or of all codes, so that the caller sees whether one did not fit.
fn pack_all<const B: usize>(codes: &[u8], columns: usize, packed: &mut [u32], width: usize) -> u64 {
    let rows = PARALLEL_BYTES.div_ceil(columns);
    let (run_codes, run_words) = run(columns, width, B, rows);
    codes
        .par_chunks(columns * rows)
        .zip(packed.par_chunks_mut(width * rows))
        .map(|(codes, packed)| {
            let runs = codes.chunks(run_codes).zip(packed.chunks_mut(run_words));
            widest(
                #[inline(always)]
                || runs.fold(0, |lanes, (codes, packed)| lanes | pack_run::<B>(codes, bytemuck::cast_slice_mut(packed))),
            )
        })
        .reduce(|| 0, |a, b| a | b)
}

/// One run; `packed` has at least `⌈len·B / 8⌉` bytes.
#[inline(always)]
fn pack_run<const B: usize>(codes: &[u8], packed: &mut [u8]) -> u64 {
    let (blocks, tail) = codes.as_chunks::<64>();
    let (body, rest) = packed.split_at_mut(blocks.len() * 8 * B);
    let mut lanes = 0;
    for (block, out) in blocks.iter().zip(body.as_chunks_mut::<8>().0.chunks_exact_mut(B)) {
        // The words that 64 codes fill: eight times 8·B bits, one after the other.
        let (mut word, mut filled, mut at) = (0, 0, 0);
        for eight in block.as_chunks::<8>().0 {
            let codes = u64::from_le_bytes(*eight);
            lanes |= codes;
            let bits = squeeze::<B>(codes);
            word |= bits << filled;
            filled += 8 * B;
            if filled >= 64 {
                out[at] = word.to_le_bytes();
                (filled, at) = (filled - 64, at + 1);
                word = if filled == 0 { 0 } else { bits >> (8 * B - filled) };
            }
        }
    }
    for (codes, out) in tail.chunks(8).zip(rest.chunks_mut(B)) {
        let mut eight = [0; 8];
        eight[..codes.len()].copy_from_slice(codes);
        let codes = u64::from_le_bytes(eight);
        lanes |= codes;
        out.copy_from_slice(&squeeze::<B>(codes).to_le_bytes()[..out.len()]);
    }
    lanes
}

/// Eight codes, one a byte, to `8·B` adjacent bits.
#[inline(always)]
fn squeeze<const B: usize>(x: u64) -> u64 {
    let x = (x & lows(B, 16)) | ((x >> 8 & lows(B, 16)) << B);
    let x = (x & lows(2 * B, 32)) | ((x >> 16 & lows(2 * B, 32)) << (2 * B));
    (x & lows(4 * B, 64)) | ((x >> 32 & lows(4 * B, 64)) << (4 * B))
}

/// The lowest `bits` bits of every `lane` bits.
#[inline(always)]
const fn lows(bits: usize, lane: usize) -> u64 {
    let every = match lane {
        16 => 0x0001_0001_0001_0001,
        32 => 0x0000_0001_0000_0001,
        _ => 1,
    };
    ((1 << bits) - 1) * every
}

fn unpack_all<const B: usize>(packed: &[u32], width: usize, codes: &mut [u8], columns: usize) {
    let rows = PARALLEL_BYTES.div_ceil(columns);
    let (run_codes, run_words) = run(columns, width, B, rows);
    codes.par_chunks_mut(columns * rows).zip(packed.par_chunks(width * rows)).for_each(|(codes, packed)| {
        let runs = codes.chunks_mut(run_codes).zip(packed.chunks(run_words));
        widest(
            #[inline(always)]
            || runs.for_each(|(codes, packed)| unpack_run::<B>(bytemuck::cast_slice(packed), codes)),
        );
    });
}

/// One run, from at least `⌈len·B / 8⌉` bytes.
#[inline(always)]
fn unpack_run<const B: usize>(packed: &[u8], codes: &mut [u8]) {
    let (blocks, tail) = codes.as_chunks_mut::<64>();
    let (body, rest) = packed.split_at(blocks.len() * 8 * B);
    for (block, words) in blocks.iter_mut().zip(body.as_chunks::<8>().0.chunks_exact(B)) {
        let (mut word, mut left, mut at) = (0, 0, 0);
        for eight in block.as_chunks_mut::<8>().0 {
            let mut bits = word;
            if left < 8 * B {
                word = u64::from_le_bytes(words[at]);
                at += 1;
                bits |= word << left;
                let taken = 8 * B - left;
                word = if taken == 64 { 0 } else { word >> taken };
                left = 64 - taken;
            } else {
                word = if B == 8 { 0 } else { word >> (8 * B) };
                left -= 8 * B;
            }
            *eight = spread::<B>(bits).to_le_bytes();
        }
    }
    for (codes, bytes) in tail.chunks_mut(8).zip(rest.chunks(B)) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        codes.copy_from_slice(&spread::<B>(u64::from_le_bytes(word)).to_le_bytes()[..codes.len()]);
    }
}

/// `8·B` adjacent bits to eight codes, one a byte: the inverse of [`squeeze`].
#[inline(always)]
fn spread<const B: usize>(x: u64) -> u64 {
    let x = (x & lows(4 * B, 64)) | ((x >> (4 * B) & lows(4 * B, 64)) << 32);
    let x = (x & lows(2 * B, 32)) | ((x >> (2 * B) & lows(2 * B, 32)) << 16);
    (x & lows(B, 16)) | ((x >> B & lows(B, 16)) << 8)
}

/// The first code that does not fit, once it is known that there is one.
fn first_misfit(codes: &[u8], columns: usize, bits: u8) -> Error {
    let index = codes.iter().position(|&code| u16::from(code) >> bits != 0).unwrap_or(0);
    Error::Code { code: codes[index], row: index / columns, column: index % columns, bits }
}

fn transpose<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Codes `i mod 2^b` for `i = 0 … 31`, as compressed-tensors 0.18 packs them.
    const GOLDEN: [&[u32]; 8] = [
        &[0xAAAA_AAAA],
        &[0xE4E4_E4E4, 0xE4E4_E4E4],
        &[0x88FA_C688, 0xC688_FAC6, 0xFAC6_88FA],
        &[0x7654_3210, 0xFEDC_BA98, 0x7654_3210, 0xFEDC_BA98],
        &[0x8A41_8820, 0xC5A9_2839, 0xCA30_7B9A, 0x38BD_AB49, 0xFFBB_CDEB],
        &[0x440C_2040, 0xA248_1C61, 0x3CE3_4C2C, 0x544D_2450, 0xA658_5D65, 0x7DE7_5C6D],
        &[0x4060_8080, 0x880E_1828, 0x68C1_6284, 0x8890_1E38, 0x58A9_4264, 0x668C_982E, 0x3E78_E9C3],
        &[0x0302_0100, 0x0706_0504, 0x0B0A_0908, 0x0F0E_0D0C, 0x1312_1110, 0x1716_1514, 0x1B1A_1918, 0x1F1E_1D1C],
    ];

    #[test]
    fn golden_words_of_every_width() {
        for bits in 1..=8_u8 {
            let codes: Vec<u8> = (0..32_u16).map(|i| (i % (1 << bits)) as u8).collect();
            let packed = pack_rows(&codes, [1, 32], bits).unwrap();
            assert_eq!(packed, GOLDEN[usize::from(bits) - 1], "{bits} bits");
            assert_eq!(unpack_rows(&packed, [1, 32], bits).unwrap(), codes);
            // Down one column it is the same stream.
            assert_eq!(pack_columns(&codes, [32, 1], bits).unwrap(), packed);
        }
    }

    #[test]
    fn three_codes_of_five_bits_by_hand() {
        // 1 | 2·2^5 | 31·2^10 = 1 + 64 + 31744
        assert_eq!(pack_rows(&[1, 2, 31], [1, 3], 5).unwrap(), [31809]);
    }

    #[test]
    fn columns_are_streams_of_their_own() {
        // Column 0 is 1, 0, 1 and column 1 is 0, 3, 3: 1 + 1·16 = 17, 3·4 + 3·16 = 60.
        let packed = pack_columns(&[1, 0, 0, 3, 1, 3], [3, 2], 2).unwrap();
        assert_eq!(packed, [17, 60]);
        assert_eq!(unpack_columns(&packed, [3, 2], 2).unwrap(), [1, 0, 0, 3, 1, 3]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        assert_eq!(pack_rows(&[0, 1, 2, 4], [2, 2], 2), Err(Error::Code { code: 4, row: 1, column: 1, bits: 2 }));
        assert_eq!(pack_columns(&[0, 9, 2, 1], [2, 2], 3), Err(Error::Code { code: 9, row: 0, column: 1, bits: 3 }));
        assert_eq!(pack_rows(&[0; 4], [2, 2], 0), Err(Error::Bits { bits: 0 }));
        assert_eq!(unpack_rows(&[0; 4], [2, 2], 9), Err(Error::Bits { bits: 9 }));
        let short = pack_rows(&[0; 3], [2, 2], 4).unwrap_err().to_string();
        assert!(short.contains("3 values for 2 x 2, which takes 4"), "{short}");
        assert!(unpack_columns(&[0; 3], [2, 2], 4).is_err());
    }

    #[test]
    fn empty_shapes_have_no_words() {
        for shape in [[0, 7], [7, 0]] {
            assert!(pack_rows(&[], shape, 3).unwrap().is_empty());
            assert!(unpack_rows(&[], shape, 3).unwrap().is_empty());
        }
    }

    fn matrix() -> impl Strategy<Value = (u8, usize, usize, Vec<u8>)> {
        (1..=8_u8, 1..9_usize, 1..80_usize).prop_flat_map(|(bits, rows, columns)| {
            proptest::collection::vec(0..=(u8::MAX >> (8 - bits)), rows * columns).prop_map(move |codes| (bits, rows, columns, codes))
        })
    }

    proptest! {
        #[test]
        fn unpacking_undoes_packing((bits, rows, columns, codes) in matrix()) {
            let packed = pack_rows(&codes, [rows, columns], bits).unwrap();
            prop_assert_eq!(packed.len(), rows * words(columns, bits));
            prop_assert_eq!(&unpack_rows(&packed, [rows, columns], bits).unwrap(), &codes);
            let packed = pack_columns(&codes, [rows, columns], bits).unwrap();
            prop_assert_eq!(packed.len(), columns * words(rows, bits));
            prop_assert_eq!(&unpack_columns(&packed, [rows, columns], bits).unwrap(), &codes);
        }

        #[test]
        fn every_bit_is_where_the_definition_says((bits, rows, columns, codes) in matrix()) {
            let packed = pack_rows(&codes, [rows, columns], bits).unwrap();
            let width = words(columns, bits);
            for (index, &code) in codes.iter().enumerate() {
                let (row, column) = (index / columns, index % columns);
                for bit in 0..usize::from(bits) {
                    let p = column * usize::from(bits) + bit;
                    let stored = packed[row * width + p / 32] >> (p % 32) & 1;
                    prop_assert_eq!(stored, u32::from(code >> bit & 1));
                }
            }
        }
    }

    #[test]
    fn many_rows_over_threads_are_the_same_rows() {
        let (rows, columns) = (3000, 67);
        let codes: Vec<u8> = (0..rows * columns).map(|i| (i * 7 % 31) as u8).collect();
        let packed = pack_rows(&codes, [rows, columns], 5).unwrap();
        let last = pack_rows(&codes[(rows - 1) * columns..], [1, columns], 5).unwrap();
        assert_eq!(packed[(rows - 1) * words(columns, 5)..], last);
        assert!(unpack_rows(&packed, [rows, columns], 5).unwrap() == codes);
    }
}

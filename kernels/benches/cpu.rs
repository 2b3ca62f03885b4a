//! Decode of one token through a layer of Qwen3-30B-A3B's shape (hidden 2048, inner 768, 8 of 128 experts) from packed codes, beside a plain
//! read of memory and a bf16 matrix-vector product. GB/s count the packed bytes of the experts that were used; every step uses others, so
//! that nothing is found in a cache.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a bench reports on the terminal")]

use std::hint::black_box;
use std::time::Instant;

use kernels::cpu::{Linear, Mode, expert};
use kernels::layout::Packed;
use kernels::{Group, QuantizedMatrix, ScaleType, Zeros};
use rayon::prelude::*;

const HIDDEN: usize = 2048;
const INNER: usize = 768;
const ACTIVE: usize = 8;
const EXPERTS: usize = 64;

fn matrix([outputs, inputs]: [usize; 2], bits: u8, seed: usize) -> QuantizedMatrix {
    let zeros = if bits < 3 { Zeros::Half } else { Zeros::Sym };
    let codes = (0..outputs * inputs).map(|i| ((i.wrapping_mul(2_654_435_761) >> 7) ^ seed) as u8 & (u8::MAX >> (8 - bits))).collect();
    let scales = vec![1.0 / 64.0; outputs * inputs / 128];
    QuantizedMatrix { outputs, inputs, bits, group: Group::Size(128), scale_type: ScaleType::Bf16, codes, scales, zeros }
}

/// Best GB/s of some rounds over `bytes` a round: others on the machine only lengthen them.
fn best(bytes: usize, rounds: usize, mut round: impl FnMut(usize)) -> f64 {
    let once = |index: usize, round: &mut dyn FnMut(usize)| {
        let start = Instant::now();
        round(index);
        bytes as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..rounds).map(|index| once(index, &mut round)).fold(0.0, f64::max)
}

fn main() {
    let memory: Vec<u64> = (0..1_u64 << 25).collect();
    let sum = |part: &[u64]| part.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x));
    let read = best(memory.len() * 8, 12, |_| _ = black_box(memory.par_chunks(1 << 16).map(sum).reduce(|| 0, u64::wrapping_add)));
    println!("plain read: {read:.1} GB/s");
    let weights: Vec<u16> = (0..1_usize << 26).map(|i| 0x3c00 + (i % 512) as u16).collect();
    let x: Vec<f32> = (0..HIDDEN).map(|i| (i % 17) as f32 / 17.0 - 0.4).collect();
    let row = |row: &[u16]| {
        kernels::simd::widest(
            #[inline(always)]
            || {
                let mut sums = [0.0_f32; 64];
                for (w, x) in row.as_chunks::<64>().0.iter().zip(x.as_chunks::<64>().0) {
                    (0..64).for_each(|i| sums[i] = f32::from_bits(u32::from(w[i]) << 16).mul_add(x[i], sums[i]));
                }
                sums.iter().sum::<f32>()
            },
        )
    };
    let bf16 = best(weights.len() * 2, 12, |_| _ = black_box(weights.par_chunks(HIDDEN).map(row).collect::<Vec<f32>>()));
    println!("bf16 matrix-vector: {bf16:.1} GB/s ({:.0}% of a plain read)", 100.0 * bf16 / read);
    drop((memory, weights));
    for bits in [4, 2, 3, 8] {
        let packed: Vec<[Packed; 2]> = (0..EXPERTS)
            .map(|e| {
                let gate_up = Packed::gate_up(&matrix([INNER, HIDDEN], bits, e), &matrix([INNER, HIDDEN], bits, e + 1)).unwrap();
                [gate_up, Packed::new(&matrix([HIDDEN, INNER], bits, e + 2)).unwrap()]
            })
            .collect();
        let bytes: usize = packed[0].iter().map(|p| p.form.bytes(p.shape).into_iter().sum::<usize>()).sum::<usize>() * ACTIVE;
        for mode in [Mode::Fast, Mode::Exact] {
            let experts: Vec<[Linear; 2]> = packed.iter().map(|parts| parts.clone().map(|p| Linear::new(p, mode))).collect();
            let rate = best(bytes, 4 * EXPERTS / ACTIVE, |round| {
                let chosen = &experts[round * ACTIVE % EXPERTS..][..ACTIVE];
                black_box(chosen.par_iter().map(|[gates, down]| expert(&[gates], down, &x)).collect::<Vec<_>>());
            });
            println!(
                "{bits} bits, {mode:?}: {rate:.1} GB/s ({:.0}% of a plain read), {:.2} times the bf16 product's weights",
                100.0 * rate / read,
                rate / bf16 * 16.0 / (f64::from(bits) + 0.125)
            );
        }
    }
}

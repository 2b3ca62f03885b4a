//! Allocation at the size of DeepSeek-R1: 58 layers of 256 experts, three matrices each, five options.
#![allow(missing_docs, clippy::print_stdout, reason = "a bench reports on the terminal")]

use std::hint::black_box;
use std::time::Instant;

use compress::allocate::program::{Choice, solve};
use criterion::{Criterion, criterion_group, criterion_main};

const LAYERS: usize = 58;
const EXPERTS: usize = 256;
const MATRICES: usize = 3;
/// 2048 × 7168 weights at 1, 2, 3, 4 and 8 bits, with two bytes of scale for 128 of them.
const BITS: [u64; 5] = [1, 2, 3, 4, 8];
const WEIGHTS: u64 = 2048 * 7168;

/// Losses as they are found: use falls off like a power over the experts, and two bits more cost a sixteenth.
fn program() -> Vec<Vec<Choice>> {
    let mut state = 7_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let mut classes = Vec::with_capacity(LAYERS * EXPERTS * MATRICES);
    for layer in 0..LAYERS {
        for _ in 0..EXPERTS {
            let used = (0.02 + uniform()).powi(3) * (1.0 + layer as f64 / 10.0);
            for _ in 0..MATRICES {
                let size = used * (0.5 + uniform());
                let option = |&bits: &u64| Choice { bytes: WEIGHTS / 8 * bits + WEIGHTS / 64, loss: size * 0.25_f64.powi(bits as i32) };
                classes.push(BITS.iter().map(option).collect());
            }
        }
    }
    classes
}

fn allocation(c: &mut Criterion) {
    let classes = program();
    for bits in [2.0, 2.5, 3.0] {
        let budget = (classes.len() as f64 * WEIGHTS as f64 * bits / 8.0) as u64;
        let start = Instant::now();
        if let Ok(found) = solve(&classes, budget) {
            let (seconds, gap) = (start.elapsed().as_secs_f64(), found.gap());
            println!("{} classes at {bits} bits: {seconds:.3} s, gap {gap:.1e}, proven {}", classes.len(), found.proven);
        }
        c.bench_function(&format!("r1/{bits}"), |b| b.iter(|| black_box(solve(black_box(&classes), budget))));
    }
}

criterion_group!(benches, allocation);
criterion_main!(benches);

//! Packing and unpacking codes of every width, beside a copy of the same bytes. GB/s count the codes that go in or come out.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a bench reports on the terminal")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::pack::{pack_rows, unpack_rows};

/// Codes of one expert's three matrices in Qwen3-30B-A3B.
const SHAPE: [usize; 2] = [3 * 768, 2048];

/// Shortest of ten runs: others on the machine only lengthen them.
fn shortest<R>(mut work: impl FnMut() -> R) -> Duration {
    let once = |work: &mut dyn FnMut() -> R| {
        let start = Instant::now();
        black_box(work());
        start.elapsed()
    };
    (0..10).map(|_| once(&mut work)).min().unwrap_or_default()
}

fn widths(criterion: &mut Criterion) {
    let count = SHAPE[0] * SHAPE[1];
    let rate = |time: Duration| count as f64 / time.as_secs_f64() / 1e9;
    let mut summary = Vec::new();
    let mut group = criterion.benchmark_group("pack");
    group.throughput(Throughput::Bytes(count as u64)).sample_size(10).measurement_time(Duration::from_secs(1));
    group.warm_up_time(Duration::from_millis(200));
    for bits in 1..=8_u8 {
        let codes: Vec<u8> = (0..count).map(|i| (i * 31 % (1 << bits)) as u8).collect();
        let packed = pack_rows(&codes, SHAPE, bits).unwrap();
        group.bench_function(format!("pack {bits}"), |b| b.iter(|| pack_rows(&codes, SHAPE, bits)));
        group.bench_function(format!("unpack {bits}"), |b| b.iter(|| unpack_rows(&packed, SHAPE, bits)));
        let copy = rate(shortest(|| codes.clone()));
        let (pack, unpack) = (rate(shortest(|| pack_rows(&codes, SHAPE, bits))), rate(shortest(|| unpack_rows(&packed, SHAPE, bits))));
        summary.push(format!(
            "{bits} bits: pack {pack:5.2} GB/s ({:3.0}% of a copy), unpack {unpack:5.2} GB/s ({:3.0}%), copy {copy:5.2} GB/s",
            100.0 * pack / copy,
            100.0 * unpack / copy,
        ));
    }
    group.finish();
    println!("{}", summary.join("\n"));
}

criterion_group!(benches, widths);
criterion_main!(benches);

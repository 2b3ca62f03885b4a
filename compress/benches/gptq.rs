//! GPTQ of experts shaped like Qwen3-30B-A3B's (gate and up 768 x 2048, down 2048 x 768), beside a matrix product of the same
//! run, on all cores.
//!
//! Counted are `R·K² + ⅔K³` flops a factorized input, with `R` the rows of all matrices that share it; of a descent `2·R·K²` at
//! its start and `3·R·K²` a round (the systems of its scales are symmetric), and nothing for its sweeps.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a bench reports on the terminal")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use compress::quantize::descent::{self, descent};
use compress::quantize::gptq::{Params, factorize, gptq};
use compress::quantize::{Grid, Width};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::{Group, ScaleType};
use ndarray::Array2;
use rayon::prelude::*;

const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 768;

const WIDTH: Width = Width { bits: 2, group: Group::Size(128), scale_type: ScaleType::Bf16, grid: Grid::Half };

/// Shortest of some runs: others on the machine only lengthen them.
fn shortest(mut work: impl FnMut()) -> Duration {
    let once = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed()
    };
    (0..7).map(|_| once(&mut work)).min().unwrap_or_default()
}

/// Reproducible values in −½ .. ½.
fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    Array2::from_shape_simple_fn((rows, columns), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    })
}

/// `Σ x xᵀ` of inputs with a common part, as activations have.
fn moment(inputs: usize) -> Array2<f32> {
    let mut x = matrix(2 * inputs, inputs, 1);
    let common = matrix(2 * inputs, 1, 2);
    for (column, mut values) in x.columns_mut().into_iter().enumerate() {
        values.scaled_add(0.5, &common.column(0));
        values *= 1.0 + (column * 37 % inputs) as f32 / inputs as f32;
    }
    calib::linalg::product(x.t(), x.view())
}

/// One input and the matrices that share it.
struct Case {
    name: &'static str,
    moment: Array2<f32>,
    matrices: Vec<Array2<f32>>,
}

impl Case {
    fn flops(&self) -> f64 {
        let inputs = self.moment.nrows() as f64;
        let rows: usize = self.matrices.iter().map(Array2::nrows).sum();
        rows as f64 * inputs * inputs + 2.0 / 3.0 * inputs.powi(3)
    }

    fn solve(&self, params: &Params) {
        let factor = factorize(self.moment.view(), &[WIDTH.group], params).unwrap();
        for w in &self.matrices {
            black_box(gptq(w.view(), &factor, &WIDTH, params).unwrap());
        }
    }

    /// A descent of the first matrix, to be repeated, and its flops.
    fn descent(&self) -> (impl Fn() + Sync, f64) {
        let params = Params::default();
        let factor = factorize(self.moment.view(), &[WIDTH.group], &params).unwrap();
        let (w, lambda) = (&self.matrices[0], factor.lambda());
        let solved = gptq(w.view(), &factor, &WIDTH, &params).unwrap().matrix;
        let work = move || descent(w.view(), &solved, self.moment.view(), lambda, &descent::Params::default()).unwrap();
        let products = 2 + 3 * work().rounds;
        (move || drop(black_box(work())), products as f64 * w.nrows() as f64 * (w.ncols() as f64).powi(2))
    }
}

fn experts(criterion: &mut Criterion) {
    let threads = rayon::current_num_threads();
    let gate_up = vec![matrix(INTERMEDIATE, HIDDEN, 3), matrix(INTERMEDIATE, HIDDEN, 4)];
    let cases = [
        Case { name: "gate and up", moment: moment(HIDDEN), matrices: gate_up },
        Case { name: "down", moment: moment(INTERMEDIATE), matrices: vec![matrix(HIDDEN, INTERMEDIATE, 5)] },
    ];
    let (a, b) = (matrix(HIDDEN, HIDDEN, 6), matrix(HIDDEN, HIDDEN, 7));
    let everywhere = |work: &(dyn Fn() + Sync)| (0..threads).into_par_iter().for_each(|_| work());
    let product = || everywhere(&|| drop(black_box(calib::linalg::product(a.view(), b.view()))));
    let rate = |flops: f64, time: Duration| threads as f64 * flops / time.as_secs_f64() / 1e9;
    let mut summary = Vec::new();
    let mut group = criterion.benchmark_group("gptq");
    group.sample_size(10).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(200));
    let mut measure = |name: String, flops: f64, work: &(dyn Fn() + Sync)| {
        group.throughput(Throughput::Elements((threads as f64 * flops) as u64));
        group.bench_function(&name, |b| b.iter(|| everywhere(work)));
        let gemm = rate(2.0 * (HIDDEN as f64).powi(3), shortest(product));
        let rate = rate(flops, shortest(|| everywhere(work)));
        let share = 100.0 * rate / gemm;
        summary.push(format!("{name}: {rate:.1} GFLOP/s, {share:.0}% of a matrix product's {gemm:.1}, {threads} threads"));
    };
    for case in &cases {
        for (name, clips) in [("plain scales", 1), ("32 scales", 32)] {
            let params = Params { clips, ..Params::default() };
            measure(format!("{}, {name}", case.name), case.flops(), &|| case.solve(&params));
        }
        let (descent, flops) = case.descent();
        measure(format!("{}, descent", case.name), flops, &descent);
    }
    group.finish();
    println!("{}", summary.join("\n"));
}

criterion_group!(benches, experts);
criterion_main!(benches);

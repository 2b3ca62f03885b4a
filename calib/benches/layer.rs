//! One decoder layer shaped like Qwen3-30B-A3B's (2048 wide, 128 experts of 768, top-8) with random weights: the forward pass and
//! second moments beside a matrix product of the same run, on all cores.
//!
//! `cargo bench --bench layer` prints rates; `cargo bench --bench layer -- pass 128` runs a whole measuring pass over 128 samples of
//! 2048 tokens and prints its peak of anonymous memory beside the formula.
//!
//! Counted are the flops that the mathematics needs, 2 a multiply-add: projections, half of the scores (they are causal), router and
//! chosen experts; `n·d²` for one triangle of a second moment of `n` rows. Rates a CPU-second hold on a busy machine too, as far as caches
//! are not shared.
//!
//! 2026-11-25, two busy x86-64 cores (load 40), 4 samples, a CPU-second: product 116 GFLOP/s; second moments 72% of it (512 rows of 2048),
//! 104% (512 of 768), 73% (2048 of 4096), weighted 67% at worst; forward 49% (68% by the clock).
//! Then flex got its AVX-512 products (`x86-v4`): forward 59.7 (two idle cores, 47% of 126.0) to 77.6 GFLOP/s a CPU-second (load 14, 58%
//! of 134.8, where second moments fell from 72% to 57%).
//! Then moments went through gemm, attention held fewer scores and heads changed over row by row (two idle cores, two runs): product 153 and
//! 161; forward 96 and 102, 63% (61% by the clock); second moments 79% to 80%, 75% to 79% and 80% to 85%, weighted 74% at worst.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used, reason = "a bench reports on the terminal")]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use calib::arch::{
    Attention, Grouped, LayerSpec, Mlp, Moe, Norm, NormKind, Pairing, Part, Projection, QkNorm, Role, Rope, RopeScaling, Router, Score,
    Spec,
};
use calib::device::{Cpu, Device};
use calib::forward::{NoTap, Options, decoder_layer};
use calib::pass::{self, Pass};
use calib::progress::Quiet;
use calib::sample::{Calibrate, Samples};
use calib::stats::{Moment, Store};
use calib::{Result, Weights, forward};
use ndarray::{Array1, Array2, ArrayView2};
use rayon::prelude::*;

const HIDDEN: usize = 2048;
const INNER: usize = 768;
const EXPERTS: usize = 128;
const TOP_K: usize = 8;
const HEADS: usize = 32;
const KV_HEADS: usize = 4;
const HEAD: usize = 128;
const VOCAB: usize = 64;
/// Tokens of a sample.
const TOKENS: usize = 2048;

/// Random weights, cut out of one table: making a matrix costs what reading one costs.
struct Random {
    spec: Spec,
    table: Vec<f32>,
}

impl Random {
    fn new() -> Self {
        let attention = Grouped {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD,
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::PerHead,
            clip: None,
            scale: (HEAD as f32).powf(-0.5),
        };
        let router = Router { score: Score::Softmax, correction: false, groups: None, renormalize: Some(0.0), scale: 1.0 };
        let moe = Moe { experts: EXPERTS, top_k: TOP_K, inner: INNER, router, shared: None };
        let spec = Spec {
            model_type: "qwen3_moe".to_owned(),
            hidden: HIDDEN,
            vocab: VOCAB,
            layers: vec![LayerSpec { window: None, mlp: Mlp::Moe(moe) }],
            norm: Norm { kind: NormKind::Rms, eps: 1e-6 },
            attention: Attention::Grouped(attention),
            rope: Rope { dim: HEAD, theta: 1e6, pairing: Pairing::HalfSplit, scaling: RopeScaling::None },
            tied: true,
            head_bias: false,
        };
        Self { spec, table: noise((HIDDEN * HEADS * HEAD) + (1 << 20), 1) }
    }

    /// A matrix, `[out, in]`, with outputs of the size of its inputs.
    fn cut(&self, role: Role, [outputs, inputs]: [usize; 2]) -> Array2<f32> {
        let number = match role {
            Role::Layer(_, Part::Expert(e, Projection::Gate)) => 3 * e,
            Role::Layer(_, Part::Expert(e, Projection::Up)) => 3 * e + 1,
            Role::Layer(_, Part::Expert(e, Projection::Down)) => 3 * e + 2,
            _ => 0,
        };
        let start = number * 2731 % (1 << 20);
        let scale = 3.0_f32.sqrt() / (inputs as f32).sqrt();
        let values = self.table[start..start + outputs * inputs].iter().map(|x| x * scale).collect();
        Array2::from_shape_vec((outputs, inputs), values).unwrap()
    }
}

impl Weights for Random {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn matrix(&self, role: Role) -> Result<Array2<f32>> {
        let shape = match role {
            Role::Layer(_, Part::Query) => [HEADS * HEAD, HIDDEN],
            Role::Layer(_, Part::Key | Part::Value) => [KV_HEADS * HEAD, HIDDEN],
            Role::Layer(_, Part::Output) => [HIDDEN, HEADS * HEAD],
            Role::Layer(_, Part::Router) => [EXPERTS, HIDDEN],
            Role::Layer(_, Part::Expert(_, Projection::Down)) => [HIDDEN, INNER],
            Role::Layer(_, Part::Expert(..)) => [INNER, HIDDEN],
            _ => [VOCAB, HIDDEN],
        };
        Ok(self.cut(role, shape))
    }

    fn vector(&self, role: Role) -> Result<Array1<f32>> {
        let width = if matches!(role, Role::Layer(_, Part::QueryNorm | Part::KeyNorm)) { HEAD } else { HIDDEN };
        Ok(Array1::ones(width))
    }
}

/// Reproducible values in −1 .. 1.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// What some work took.
#[derive(Clone, Copy)]
struct Spent {
    wall: f64,
    /// CPU seconds of all threads: what others do on the machine meanwhile does not count.
    cpu: f64,
}

/// CPU seconds of this process so far; 0 where the system does not say.
fn cpu() -> f64 {
    let stat = fs_err::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// The least of some rounds, each of `times` runs, for one run.
fn shortest(rounds: usize, times: usize, mut work: impl FnMut()) -> Spent {
    let mut round = || {
        let (start, before) = (Instant::now(), cpu());
        (0..times).for_each(|_| work());
        Spent { wall: start.elapsed().as_secs_f64() / times as f64, cpu: (cpu() - before) / times as f64 }
    };
    let all: Vec<Spent> = (0..rounds).map(|_| round()).collect();
    let least = |of: fn(&Spent) -> f64| all.iter().map(of).fold(f64::INFINITY, f64::min);
    Spent { wall: least(|s| s.wall), cpu: least(|s| s.cpu) }
}

/// Flops a second in units of 10⁹: by the clock, and by the CPU time of one thread.
#[derive(Clone, Copy)]
struct Rate {
    wall: f64,
    cpu: f64,
}

fn rate(flops: f64, spent: Spent) -> Rate {
    Rate { wall: flops / spent.wall / 1e9, cpu: flops / spent.cpu / 1e9 }
}

/// The machine's product of square matrices, all threads at work: the better of the two libraries that the program uses.
fn gemm() -> Rate {
    const SIDE: usize = 1536;
    let threads = rayon::current_num_threads();
    let a = Array2::from_shape_vec((SIDE, SIDE), noise(SIDE * SIDE, 2)).unwrap();
    let flops = 2.0 * (SIDE as f64).powi(3) * threads as f64;
    let one = || (0..threads).into_par_iter().for_each(|_| drop(black_box(calib::linalg::product(a.view(), a.t()))));
    let tensor = Tensor::<Cpu, 2>::from_data(TensorData::new(noise(SIDE * SIDE, 3), [SIDE, SIDE]), &Default::default());
    let other =
        || (0..threads).into_par_iter().for_each(|_| drop(black_box(tensor.clone().matmul(tensor.clone().transpose()).into_data())));
    let (a, b) = (rate(flops, shortest(4, 4, one)), rate(flops, shortest(4, 4, other)));
    Rate { wall: a.wall.max(b.wall), cpu: a.cpu.max(b.cpu) }
}

/// Flops of one layer over samples of `TOKENS` tokens.
fn layer_flops(samples: usize) -> f64 {
    let (d, q, kv, f) = (HIDDEN as f64, (HEADS * HEAD) as f64, (KV_HEADS * HEAD) as f64, INNER as f64);
    let (tokens, rows) = (TOKENS as f64, (samples * TOKENS) as f64);
    let projections = 2.0 * rows * d * (2.0 * q + 2.0 * kv);
    let scores = 2.0 * rows * tokens / 2.0 * q * 2.0;
    projections + scores + 2.0 * rows * d * EXPERTS as f64 + 6.0 * rows * TOP_K as f64 * d * f
}

fn rates(samples: usize) {
    let (model, gemm) = (Random::new(), gemm());
    println!("{} threads, f32 product {:.1} GFLOP/s, {:.1} a CPU-second", rayon::current_num_threads(), gemm.wall, gemm.cpu);
    let against = |name: &str, rate: Rate| {
        let [wall, cpu] = [rate.wall / gemm.wall, rate.cpu / gemm.cpu].map(|share| 100.0 * share);
        println!("{name}: {:.1} GFLOP/s, {wall:.0}% of the product; {:.1} a CPU-second, {cpu:.0}%", rate.wall, rate.cpu);
    };
    let noise_of = |i: usize| TensorData::new(noise(TOKENS * HIDDEN, 10 + i as u64), [1, TOKENS, HIDDEN]);
    let hidden: Vec<Tensor<Cpu, 3>> = (0..samples).map(|i| Tensor::from_data(noise_of(i), &Default::default())).collect();
    let forward = shortest(2, 1, || {
        let mut hidden = hidden.clone();
        decoder_layer(&model, 0, &mut hidden, &NoTap, Options::of::<Cpu>()).unwrap();
        black_box(hidden);
    });
    against(&format!("forward, {samples} samples of {TOKENS} tokens"), rate(layer_flops(samples), forward));
    let rows = samples * TOKENS * TOP_K / EXPERTS;
    for width in [HIDDEN, INNER, HEADS * HEAD] {
        let rows = if width == HEADS * HEAD { TOKENS } else { rows };
        let x = noise(rows * width, 7);
        let x = ArrayView2::from_shape((rows, width), &x).unwrap();
        let threads = rayon::current_num_threads();
        let v = vec![0.5; rows];
        for (name, weights) in [("", None), (", weighted", Some(v.as_slice()))] {
            let mut moments: Vec<Moment> = (0..threads).map(|_| Moment::new(width)).collect();
            let time = shortest(4, 8, || moments.par_iter_mut().for_each(|moment| moment.add(x, weights)));
            let flops = rows as f64 * (width as f64).powi(2) * threads as f64;
            against(&format!("second moment{name}, {rows} rows of {width}"), rate(flops, time));
        }
    }
}

/// Anonymous memory of this process, in bytes; 0 where the system does not say.
fn anonymous() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or("0 kB");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) << 10
}

/// A whole measuring pass over one layer.
fn measured(samples: usize) {
    let model = Random::new();
    let dir = tempfile::tempdir().unwrap();
    let ids = (0..samples).map(|s| (0..TOKENS).map(|t| ((s * 31 + t * t * 7 + t) % VOCAB) as u32).collect()).collect();
    let samples = Samples { domains: vec!["noise".to_owned()], tokens: TOKENS, ids, domain: vec![0; samples], ..Default::default() };
    let calibrate = Calibrate::over(vec![]);
    let store = Store::new(dir.path());
    let pass = Pass {
        weights: &model,
        fingerprint: "random",
        samples: &samples,
        calibrate: &calibrate,
        store: &store,
        watch: None,
        progress: &Quiet,
    };
    let shape = forward::Samples { count: samples.ids.len(), tokens: TOKENS };
    let formula = pass::peak_bytes(&model.spec, 0, shape, rayon::current_num_threads(), 0);
    let (peak, over, start) = (AtomicU64::new(0), AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                peak.fetch_max(anonymous(), Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        pass::run(&pass, Device::Cpu).unwrap();
        over.store(true, Ordering::SeqCst);
    });
    let gib = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
    println!(
        "a measuring pass over {} samples of {TOKENS} tokens: peak {:.2} GiB of anonymous memory, formula {:.2} GiB, {:.0} s",
        samples.ids.len(),
        gib(peak.into_inner()),
        gib(formula),
        start.elapsed().as_secs_f64()
    );
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    match args.as_slice() {
        [what, samples] if what == "pass" => measured(samples.parse().unwrap()),
        [samples] => rates(samples.parse().unwrap()),
        _ => rates(4),
    }
}

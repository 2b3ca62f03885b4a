//! What `end_loss` predicts against what is measured, on the bundled model: one matrix is changed at a time.
//!
//! Run with `cargo test --release --test end_loss -- --ignored --nocapture`. Other models and texts: `MOEPRESS_MODEL`,
//! `MOEPRESS_CALIB` and `MOEPRESS_TEST` name a checkpoint and two folders of texts, `MOEPRESS_MATRICES` how many matrices.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and this one prints a table")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use calib::arch::{Part, Role, Spec};
use calib::backward::{self, Backward, Params, Receive, Scratch, Targets};
use calib::corpus::{Corpus, Text, Tokenizer};
use calib::device::Device;
use calib::evaluate::{Models, Windows, evaluate};
use calib::progress::Quiet;
use calib::sample::{Calibrate, draw};
use calib::stats::end_loss::{LayerWeights, SiteLoss};
use calib::stats::sites;
use calib::{Model, Weights};
use compress::quantize::{Grid, Width, rtn};
use kernels::{Group, ScaleType};
use ndarray::{Array1, Array2};

fn place(variable: &str, bundled: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models").join(bundled), PathBuf::from)
}

/// All texts of a folder.
fn corpus(folder: &Path, model: &Path, vocab: usize) -> Corpus {
    let tokenizer = Tokenizer::open(model, vocab).unwrap();
    let mut files: Vec<PathBuf> = fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    Corpus::new(files.iter().map(|file| Text::read(file, &tokenizer).unwrap()).collect()).unwrap()
}

/// A model with one matrix changed.
struct Changed<'a> {
    model: &'a Model,
    role: Role,
    matrix: Array2<f32>,
}

impl Weights for Changed<'_> {
    fn spec(&self) -> &Spec {
        self.model.spec()
    }
    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        if role == self.role { Ok(self.matrix.clone()) } else { self.model.matrix(role) }
    }
    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.model.vector(role)
    }
}

/// The predicted cost of one change of every matrix.
struct Predict<'a> {
    model: &'a Model,
    change: &'a (dyn Fn(Role, &Array2<f32>) -> Array2<f32> + Sync),
    costs: Mutex<BTreeMap<Role, f64>>,
}

impl Receive for Predict<'_> {
    fn site(&self, layer: usize, loss: SiteLoss) -> calib::Result<()> {
        for (part, _) in &loss.outputs {
            let role = Role::Layer(layer, *part);
            let w = self.model.matrix(role)?;
            let delta = (self.change)(role, &w) - &w;
            self.costs.lock().unwrap().insert(role, loss.cost(*part, delta.view()).unwrap());
        }
        Ok(())
    }
    fn layer(&self, _layer: usize, weights: LayerWeights) -> calib::Result<()> {
        assert!(weights.gradient.iter().all(|g| g.is_finite()));
        Ok(())
    }
}

/// The bundled model or another, with its texts.
struct Bench {
    model: Model,
    ids: Vec<Vec<u32>>,
    test: Vec<Windows>,
}

impl Bench {
    fn open(samples: usize, max_tokens: usize) -> Self {
        let folder = place("MOEPRESS_MODEL", "moe-4m");
        let model = Model::open(&folder).unwrap();
        let vocab = model.spec().vocab;
        let calibrate = Calibrate { samples, tokens: 512, ..Calibrate::over(vec![]) };
        let ids = draw(&calibrate, &corpus(&place("MOEPRESS_CALIB", "text/calib"), &folder, vocab)).unwrap().ids;
        let test = Windows::of(&corpus(&place("MOEPRESS_TEST", "text/test"), &folder, vocab), 512, Some(max_tokens)).unwrap();
        Self { model, ids, test }
    }

    fn predict(&self, seed: u64, change: &(dyn Fn(Role, &Array2<f32>) -> Array2<f32> + Sync)) -> BTreeMap<Role, f64> {
        let predict = Predict { model: &self.model, change, costs: Mutex::default() };
        let params = Params { seed, targets: Targets::Own };
        let pass = Backward { weights: &self.model, ids: &self.ids, params: &params, scratch: &Scratch::Memory, progress: &Quiet };
        backward::run(&pass, &predict, Device::Cpu).unwrap();
        predict.costs.into_inner().unwrap()
    }

    fn measure(&self, role: Role, matrix: Array2<f32>) -> f64 {
        let candidate = Changed { model: &self.model, role, matrix };
        let models = Models { candidate: &candidate, reference: Some(&self.model) };
        evaluate(models, &self.test, Device::Cpu, &Quiet).unwrap().all.divergence.unwrap().kl
    }

    /// Matrices of every layer and role, the experts thinned out so that there are at most `count`.
    fn matrices(&self, count: usize) -> Vec<Role> {
        let all = |wanted: fn(Part) -> bool| {
            let roles = self.model.layout().roles().map(|(role, _)| role);
            roles.filter(|role| matches!(role, Role::Layer(_, part) if part.site().is_some() && wanted(*part))).collect::<Vec<_>>()
        };
        let mut chosen = all(|part| !matches!(part, Part::Expert(..)));
        let experts = all(|part| matches!(part, Part::Expert(..)));
        let left = count.saturating_sub(chosen.len()).min(experts.len());
        chosen.extend((0..left).map(|i| experts[i * experts.len() / left]));
        chosen
    }
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    order.iter().enumerate().for_each(|(rank, &i)| ranks[i] = rank as f64);
    ranks
}

/// Spearman's correlation; the values differ from one another.
fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let n = a.len() as f64;
    1.0 - 6.0 * a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>() / (n * (n * n - 1.0))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The word for a matrix's kind in the printed table.
fn kind(role: Role) -> String {
    match role {
        Role::Layer(_, Part::Expert(_, projection)) => format!("expert {projection}"),
        Role::Layer(_, part) => part.to_string(),
        other => other.to_string(),
    }
}

/// Prints the median ratio of predicted to measured by kind, and gives it over all.
fn report(roles: &[Role], predicted: &[f64], measured: &[f64]) -> f64 {
    let mut kinds: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for ((role, predicted), measured) in roles.iter().zip(predicted).zip(measured) {
        kinds.entry(kind(*role)).or_default().push(predicted / measured);
    }
    for (kind, ratios) in &kinds {
        println!("{kind:40} {:4} matrices, predicted / measured {:.3}", ratios.len(), median(ratios.clone()));
    }
    median(predicted.iter().zip(measured).map(|(p, m)| p / m).collect())
}

#[test]
#[ignore = "two minutes"]
fn three_bit_rounding_of_single_matrices_is_ranked_by_its_divergence() {
    let count = std::env::var("MOEPRESS_MATRICES").map_or(112, |count| count.parse().unwrap());
    let bench = Bench::open(80, 2048);
    let width = Width { bits: 3, group: Group::Size(128), scale_type: ScaleType::Bf16, grid: Grid::Asym };
    let round = |_: Role, w: &Array2<f32>| rtn::rtn(w.view(), &width, &rtn::Params::default()).unwrap().dequantize();
    let costs = bench.predict(0, &round);
    let roles = bench.matrices(count);
    let predicted: Vec<f64> = roles.iter().map(|role| costs[role]).collect();
    let measured: Vec<f64> = roles.iter().map(|&role| bench.measure(role, round(role, &bench.model.matrix(role).unwrap()))).collect();
    let ratio = report(&roles, &predicted, &measured);
    let correlation = spearman(&predicted, &measured);
    println!("{} matrices: Spearman {correlation:.3}, median predicted / measured {ratio:.3}", roles.len());
    assert!(roles.len() >= 60 && correlation >= 0.85, "{} matrices: {correlation}", roles.len());
    let quantizable: usize = (0..bench.model.spec().layers.len()).map(|layer| sites(bench.model.spec(), layer).len()).sum();
    assert!(costs.len() >= quantizable, "every site has a matrix");
}

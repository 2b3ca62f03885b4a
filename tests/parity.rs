//! The forward pass against transformers: every checkpoint of `tests/parity` and the reference vectors beside it.
//!
//! `tests/parity/make.py` says what the vectors are and how they were made. Choices there are clear by construction (the least
//! distance between a chosen expert and one that was not is in the references' metadata), so the same experts are wanted for every token.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use burn::tensor::Tensor;
use calib::device::Cpu;
use calib::forward::{Experts, Generator, Head, NoTap, Options, Routing, Tap, decoder_layer, embed, rows};
use calib::{Model, Result, Weights};
use safetensors::SafeTensors;

/// Two float32 implementations that sum in different orders, over three layers: 1e-6 is usual.
const REFERENCE: f64 = 1e-4;
/// The same implementation with and without a cache: other shapes of product.
const CACHED: f64 = 1e-5;

/// Floats by the names of `make.py`.
type Vectors = BTreeMap<String, Vec<f32>>;

/// One checkpoint with its references.
struct Case {
    name: String,
    folder: PathBuf,
    floats: Vectors,
    ints: BTreeMap<String, Vec<u32>>,
    /// Shapes of all of them.
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Case {
    fn read(folder: PathBuf) -> Self {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let file = folder.with_extension("safetensors");
        Self::vectors(name, folder, &file)
    }

    /// The vectors of a file, references or a dump.
    fn vectors(name: String, folder: PathBuf, file: &Path) -> Self {
        let bytes = fs_err::read(file).unwrap();
        let (mut floats, mut ints, mut shapes) = (Vectors::new(), BTreeMap::new(), BTreeMap::new());
        for (tensor, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            shapes.insert(tensor.clone(), view.shape().to_vec());
            match view.dtype() {
                safetensors::Dtype::F32 => {
                    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                    floats.insert(tensor, values.collect());
                }
                _ => {
                    let values = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
                    ints.insert(tensor, values.map(|id| u32::try_from(id).unwrap()).collect());
                }
            }
        }
        Self { name, folder, floats, ints, shapes }
    }

    /// A tensor of ids as rows.
    fn ids(&self, name: &str) -> Option<Vec<Vec<u32>>> {
        let width = *self.shapes.get(name)?.last()?;
        Some(self.ints[name].chunks_exact(width).map(<[u32]>::to_vec).collect())
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity")
}

/// All checkpoints, by name.
fn cases() -> Vec<Case> {
    let entries = fs_err::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.join("config.json").exists()).collect();
    folders.sort();
    folders.into_iter().map(Case::read).collect()
}

/// Keeps what passes through, by the names of `make.py`.
#[derive(Default)]
struct Recorder {
    floats: Mutex<Vectors>,
    routings: Mutex<BTreeMap<usize, Vec<Routing>>>,
}

impl Recorder {
    fn keep(&self, name: String, x: Vec<f32>) {
        self.floats.lock().unwrap().entry(name).or_default().extend(x);
    }
}

impl Tap<Cpu> for Recorder {
    fn wants_blocks(&self) -> bool {
        true
    }

    fn block(&self, layer: usize, name: &'static str, _batch: usize, x: &Tensor<Cpu, 2>) -> Result<()> {
        let name = match name.split_once('.') {
            Some((block, part)) => format!("{block}.{layer}.{part}"),
            None => format!("{name}.{layer}"),
        };
        self.keep(name, values(x.clone()));
        Ok(())
    }

    fn routing(&self, layer: usize, routing: &Routing) -> Result<()> {
        self.keep(format!("moe.{layer}.router_logits"), routing.logits.clone());
        self.routings.lock().unwrap().entry(layer).or_default().push(routing.clone());
        Ok(())
    }
}

fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f32> {
    x.into_data().to_vec().unwrap()
}

/// Runs all layers over `ids`; gives the last hidden states as rows.
fn run(model: &Model, ids: &[Vec<u32>], recorder: &Recorder) -> Tensor<Cpu, 2> {
    let mut hidden = embed::<Cpu>(model, ids, &Default::default()).unwrap();
    for batch in &hidden {
        recorder.keep("hidden.embed".into(), values(batch.clone()));
    }
    for layer in 0..model.spec().layers.len() {
        decoder_layer(model, layer, &mut hidden, recorder, Options::of::<Cpu>()).unwrap();
    }
    Tensor::cat(hidden.into_iter().map(rows).collect(), 0)
}

/// `‖a − b‖ / ‖b‖`, or the largest difference over the largest value if that is more; NaN counts as far.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "number of values");
    let differences = || a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let largest = |x: &mut dyn Iterator<Item = f64>| x.map(f64::abs).fold(0.0, f64::max);
    let reference = || b.iter().map(|b| f64::from(*b));
    let far = norm(&mut differences()) / norm(&mut reference());
    let farthest = largest(&mut differences()) / largest(&mut reference());
    if far.is_nan() { f64::INFINITY } else { far.max(farthest) }
}

/// What of `case` is further than `REFERENCE` from what was computed, with the largest distance of all.
fn compare(case: &Case, ours: &Vectors, problems: &mut Vec<String>) -> f64 {
    let mut largest = 0.0_f64;
    for (name, theirs) in case.floats.iter().filter(|(name, _)| !name.ends_with("topk_weight")) {
        let Some(ours) = ours.get(name) else {
            problems.push(format!("{}: {name} was not computed", case.name));
            continue;
        };
        let far = distance(ours, theirs);
        largest = largest.max(far);
        if far > REFERENCE {
            problems.push(format!("{}: {name} is {far:.1e} off", case.name));
        }
    }
    largest
}

/// Compares chosen experts and their weights, whose order means nothing.
fn compare_choices(case: &Case, layer: usize, ours: &[Routing], problems: &mut Vec<String>) {
    let choices = |experts: &[u32], weights: &[f32], k: usize| -> Vec<BTreeMap<u32, f32>> {
        experts.chunks_exact(k).zip(weights.chunks_exact(k)).map(|(e, w)| e.iter().copied().zip(w.iter().copied()).collect()).collect()
    };
    let index = format!("moe.{layer}.topk_index");
    let k = *case.shapes[&index].last().unwrap();
    let theirs = choices(&case.ints[&index], &case.floats[&format!("moe.{layer}.topk_weight")], k);
    let ours: Vec<_> = ours.iter().flat_map(|routing| choices(&routing.chosen, &routing.weights, routing.top_k)).collect();
    assert_eq!(ours.len(), theirs.len(), "{}: tokens of layer {layer}", case.name);
    let differs = ours.iter().zip(&theirs).filter(|(a, b)| !a.keys().eq(b.keys())).count();
    if differs > 0 {
        problems.push(format!("{}: {differs} of {} tokens choose other experts in layer {layer}", case.name, theirs.len()));
        return;
    }
    let flat = |choices: &[BTreeMap<u32, f32>]| choices.iter().flat_map(|token| token.values().copied()).collect::<Vec<_>>();
    let far = distance(&flat(&ours), &flat(&theirs));
    if far > REFERENCE {
        problems.push(format!("{}: routing weights of layer {layer} are {far:.1e} off", case.name));
    }
}

#[test]
fn every_family_computes_what_transformers_computes() {
    let mut problems = Vec::new();
    let cases = cases();
    for case in &cases {
        let model = Model::open(&case.folder).unwrap();
        let recorder = Recorder::default();
        let hidden = run(&model, &case.ids("input_ids").unwrap(), &recorder);
        let head = Head::load(&model, &Default::default()).unwrap();
        recorder.keep("hidden.norm".into(), values(head.norm(hidden.clone())));
        recorder.keep("logits".into(), values(head.logits(hidden)));
        let far = compare(case, &recorder.floats.into_inner().unwrap(), &mut problems);
        for (layer, routings) in recorder.routings.into_inner().unwrap() {
            compare_choices(case, layer, &routings, &mut problems);
        }
        println!("{}: at most {far:.1e} off", case.name);
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let families: BTreeSet<_> = cases.iter().map(|case| Model::open(&case.folder).unwrap().spec().model_type.clone()).collect();
    assert_eq!(families.len(), calib::arch::FAMILIES.len(), "a family has no reference: {families:?}");
}

#[test]
fn generation_with_the_cache_gives_the_tokens_of_full_passes() {
    let mut compared = 0;
    for case in cases() {
        let Some(continuation) = case.ids("generated") else { continue };
        let model = Model::open(&case.folder).unwrap();
        let prompts: Vec<_> = case.ids("input_ids").unwrap().into_iter().map(|row| row[..8].to_vec()).collect();
        for experts in [Experts::Resident, Experts::Streamed] {
            let generator = Generator::<Cpu>::load(&model, &Default::default(), experts).unwrap();
            assert_eq!(generator.greedy(&prompts, continuation[0].len()).unwrap(), continuation, "{} with {experts:?} experts", case.name);
        }
        compared += 1;
    }
    assert!(compared > 10, "only {compared} references hold a continuation");
}

#[test]
fn logits_with_the_cache_are_those_of_a_full_pass() {
    for case in cases() {
        let model = Model::open(&case.folder).unwrap();
        let ids = case.ids("input_ids").unwrap();
        let (samples, tokens, vocab) = (ids.len(), ids[0].len(), model.spec().vocab);
        let head = Head::load(&model, &Default::default()).unwrap();
        let full = values(head.logits(run(&model, &ids, &Recorder::default())));
        let generator = Generator::<Cpu>::load(&model, &Default::default(), Experts::Resident).unwrap();
        let mut cache = generator.cache();
        // Where the frequencies depend on the length, the cache holds for one length only: it has to begin past the change.
        let spec = model.spec();
        let first = (1..=tokens).find(|&n| spec.rope.frequencies(n) == spec.rope.frequencies(tokens)).unwrap().max(8);
        let mut done = 0;
        for end in first..=tokens {
            let new: Vec<_> = ids.iter().map(|row| row[done..end].to_vec()).collect();
            let stepped = values(generator.step(&new, &mut cache, &NoTap).unwrap());
            let at = |sample: usize| (sample * tokens + end - 1) * vocab;
            let whole: Vec<_> = (0..samples).flat_map(|sample| full[at(sample)..at(sample) + vocab].to_vec()).collect();
            let far = distance(&stepped, &whole);
            assert!(far <= CACHED, "{}: logits of token {end} are {far:.1e} off", case.name);
            done = end;
        }
    }
}

#[test]
fn the_distance_sees_one_wrong_value_and_nan() {
    let b = vec![1.0_f32; 100];
    let mut a = b.clone();
    assert_eq!(distance(&a, &b), 0.0);
    a[7] = 1.01; // by the norm 0.01 / 10, by the largest value 0.01
    assert!((distance(&a, &b) - 0.01).abs() < 1e-6);
    a[7] = f32::NAN;
    assert_eq!(distance(&a, &b), f64::INFINITY);
}

#[test]
fn the_program_writes_these_tensors() {
    let work = tempfile::tempdir().unwrap();
    for case in cases() {
        let (ids, dump) = (work.path().join("ids.json"), work.path().join("dump.safetensors"));
        fs_err::write(&ids, serde_json::to_string(&case.ids("input_ids").unwrap()).unwrap()).unwrap();
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_moepress"));
        let done = program.arg("eval").arg(&case.folder).arg("--tokens").arg(&ids).arg("--dump").arg(&dump).output().unwrap();
        assert!(done.status.success(), "{}: {}", case.name, String::from_utf8_lossy(&done.stderr));
        let ours = Case::vectors(case.name.clone(), case.folder.clone(), &dump);
        let mut problems = Vec::new();
        compare(&case, &ours.floats, &mut problems);
        for (name, shape) in case.shapes.iter().filter(|(name, _)| *name != "generated") {
            if ours.shapes.get(name) != Some(shape) {
                problems.push(format!("{}: {name} is {:?}, not {shape:?}", case.name, ours.shapes.get(name)));
            }
        }
        assert_eq!(ours.ints["input_ids"], case.ints["input_ids"]);
        for index in case.ints.keys().filter(|name| name.ends_with("topk_index")) {
            let sorted = |ints: &[u32]| -> Vec<Vec<u32>> {
                let rows = ints.chunks_exact(*case.shapes[index].last().unwrap());
                rows.map(|row| row.iter().copied().collect::<BTreeSet<_>>().into_iter().collect()).collect()
            };
            assert_eq!(sorted(&ours.ints[index]), sorted(&case.ints[index]), "{}: {index}", case.name);
        }
        assert!(problems.is_empty(), "{}", problems.join("\n"));
    }
}

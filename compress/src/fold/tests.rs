//! Whole ways from a model to a scaled or a rotated one, on the tiny checkpoints of every family.

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;
use calib::arch::{NormKind, Part, Projection, Role};
use calib::device::{Device, Job};
use calib::forward::{Head, NoTap, Options, decoder_layer, embed, values};
use calib::pass;
use calib::progress::Quiet;
use calib::sample::{Calibrate, Samples};
use calib::tensor::{Dtype, encode};

use super::*;
use crate::mtp::Mtp;
use crate::repair::rotate::Params as Rotate;
use crate::tensorfile::{Create, Declared, Element};
use crate::testing::fixture;

const FAMILIES: [&str; 9] =
    ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_tied", "olmoe", "phimoe", "deepseek", "deepseek_v2_group", "deepseek_v3_fp8"];

/// A tiny checkpoint with every tensor in f32 and, in two channels of each norm, gains ten times as large.
fn in_f32(name: &str, dir: &Path) -> Model {
    let model = fixture(name);
    let tensors = model.layout().tensors();
    let declared = tensors.iter().map(|t| Declared { name: t.name.clone(), dtype: Element::F32, shape: t.shape.clone() }).collect();
    let path = dir.join("f32.safetensors");
    let file = Create::new(&path, declared, &BTreeMap::new()).unwrap();
    for tensor in tensors {
        let mut values = model.checkpoint().floats(&tensor.name).unwrap();
        if matches!(tensor.role, Role::Layer(_, Part::InputNorm | Part::PostNorm)) {
            [3, 17].iter().for_each(|&channel: &usize| values[channel] *= 10.0);
        }
        file.put(&tensor.name, &encode(Dtype::F32, &values).unwrap()).unwrap();
    }
    file.finish().unwrap();
    let renamed = tensors.iter().map(|t| (t.name.clone(), t.name.clone())).collect();
    let config = model.checkpoint().config_text().to_owned();
    let derived = Derived { config, renamed, changed: &[path], key: "f32" };
    Model::from_checkpoint(model.checkpoint().derive(&derived).unwrap()).unwrap()
}

fn samples(model: &Model) -> Samples {
    let vocab = model.spec().vocab as u32;
    let ids = (0..4_u32).map(|sample| (0..48).map(|at| (sample * 31 + at * at * 7 + at) % vocab).collect()).collect();
    Samples { domains: vec!["a".into()], tokens: 48, ids, domain: vec![0; 4], drawn: calib::sample::Drawn::default() }
}

/// Measures and scales, in a folder.
fn scaled(model: &Model, dir: &Path, allocate: &str, params: &Params) -> (Account, Model) {
    let (store, samples) = (Store::new(dir.join("stats")), samples(model));
    let calibrate = Calibrate { samples: 4, tokens: 48, ..Calibrate::over(Vec::new()) };
    let fingerprint = model.checkpoint().fingerprint();
    let pass =
        pass::Pass { weights: model, fingerprint, samples: &samples, calibrate: &calibrate, store: &store, watch: None, progress: &Quiet };
    pass::run(&pass, Device::Cpu).unwrap();
    let (allocate, shape) = (toml::from_str(allocate).unwrap(), Shape::of(model));
    let quantizer = &Quantizer::Rtn(crate::quantize::rtn::Params::default());
    let request = Request { model, shape: &shape, allocate: &allocate, quantizer, params, store: &store, dir, progress: &Quiet };
    let account = run(&request).unwrap();
    (account, open(model, dir).unwrap())
}

/// The logits of all samples' tokens.
struct Logits<'a>(&'a Model, &'a [Vec<u32>]);

impl Job for Logits<'_> {
    type Output = Vec<f32>;

    fn run<B: Backend>(self, device: &B::Device) -> Vec<f32> {
        let mut hidden = embed::<B>(self.0, self.1, device).unwrap();
        for layer in 0..self.0.spec().layers.len() {
            decoder_layer(self.0, layer, &mut hidden, &NoTap, Options::of::<B>()).unwrap();
        }
        let head = Head::load(self.0, device).unwrap();
        hidden.into_iter().flat_map(|x| values(head.logits(x.flatten(0, 1)), "logits").unwrap()).collect()
    }
}

/// `‖a − b‖ / ‖b‖`
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    assert_eq!(a.len(), b.len());
    norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b))) / norm(&mut b.iter().map(|&b| f64::from(b)))
}

const CHANNELS: &str = "bits = 3\ngroup = \"channel\"";

#[test]
fn scales_alone_leave_every_familys_logits() {
    for name in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let model = in_f32(name, dir.path());
        let (account, other) = scaled(&model, dir.path(), CHANNELS, &Params::default());
        let (folds, share) = account.gain();
        assert!(folds > 4 && share < 0.9, "{name}: {folds} folds leave {share} of the error");
        for (tensor, fold) in account.folds.iter().filter(|(tensor, _)| tensor.contains("layernorm")) {
            assert!(fold.alpha > 0.0 && fold.after < fold.before, "{name}: {tensor} {fold:?}");
        }
        let ids = samples(&model).ids;
        let [before, after] = [&model, &other].map(|model| Device::Cpu.run(Logits(model, &ids)));
        let apart = apart(&after, &before);
        assert!(apart > 0.0 && apart < 1e-5, "{name}: {apart:.2e} apart");
    }
}

#[test]
fn what_reads_a_scaled_norm_is_scaled_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let model = in_f32("qwen2_moe", dir.path());
    let params = Params { folds: Some(vec![Fold::MlpIn]), ..Params::default() };
    let (account, other) = scaled(&model, dir.path(), CHANNELS, &params);
    let layer = (0..model.spec().layers.len()).find(|&layer| model.spec().moe(layer).is_some()).unwrap();
    let vector = |model: &Model, part| model.vector(Role::Layer(layer, part)).unwrap();
    let s = vector(&model, Part::PostNorm) / vector(&other, Part::PostNorm);
    assert!(s[3] > 1.5 * s[4], "{s}");
    use Projection::{Down, Gate, Up};
    let columns = [Part::Router, Part::SharedGate, Part::Shared(Gate), Part::Shared(Up), Part::Expert(0, Gate), Part::Expert(1, Up)];
    for part in columns {
        let [before, after] = [&model, &other].map(|model| model.matrix(Role::Layer(layer, part)).unwrap());
        assert!((&(before * &s) - &after).iter().all(|x| x.abs() < 1e-4), "{part:?}");
    }
    for part in [Part::Expert(0, Down), Part::Shared(Down), Part::Query, Part::Output] {
        assert_eq!(model.matrix(Role::Layer(layer, part)).unwrap(), other.matrix(Role::Layer(layer, part)).unwrap(), "{part:?}");
    }
    assert_eq!(vector(&model, Part::InputNorm), vector(&other, Part::InputNorm));
    assert!(account.folds.keys().all(|name| name.ends_with("post_attention_layernorm.weight")));
}

#[test]
fn what_cannot_be_scaled_or_is_not_quantized_is_left_out_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let model = in_f32("deepseek_v2_group", dir.path());
    let (account, other) = scaled(&model, dir.path(), &format!("{CHANNELS}\nexclude = [\"*.mlp.*\"]"), &Params::default());
    let why = |name: &str| account.left_out[&format!("model.layers.0.{name}.weight")].as_str();
    assert!(why("self_attn.o_proj").contains("no value projection"));
    assert_eq!(why("post_attention_layernorm"), "none of its matrices is quantized");
    let (first, second) = (Role::Layer(0, Part::KvA), Role::Layer(0, Part::KvB));
    assert_ne!(model.matrix(first).unwrap(), other.matrix(first).unwrap());
    assert_eq!(model.matrix(second).unwrap(), other.matrix(second).unwrap());
    assert!(open(&fixture("mixtral"), dir.path()).err().unwrap().to_string().contains("was made for the checkpoint"));
}

#[test]
fn a_rotation_alone_leaves_every_rms_familys_logits() {
    let mut untied = 0;
    for name in FAMILIES.into_iter().chain(["deepseek_v3_mtp", "olmoe_clip", "mixtral_window"]) {
        let dir = tempfile::tempdir().unwrap();
        let model = in_f32(name, dir.path());
        if let Some(why) = rotate::objection(model.spec()) {
            assert!(model.spec().norm.kind == NormKind::Layer && name == "phimoe" && why.contains("mean"), "{name}: {why}");
            continue;
        }
        let has_mtp = model.layout().tensors().iter().any(|tensor| tensor.role == Role::Mtp);
        let params = Rotate { seed: 5, mtp: has_mtp.then_some(Mtp::Drop) };
        let rotated = rotate::run(&model, &params, dir.path(), &Quiet).unwrap();
        let other = rotate::open(&model, dir.path()).unwrap();
        assert_eq!(rotated.sides.0 * rotated.sides.1, model.spec().hidden);
        // What could be known before is what came.
        let (known, came) = (rotate::shape(&model, &params, &Shape::of(&model)), Shape::of(&other));
        assert_eq!(known.tensors, came.tensors, "{name}");
        assert!(came.tensors.iter().all(|tensor| tensor.role != Role::Mtp));
        assert_eq!(rotated.untied.is_some(), model.spec().tied);
        assert!(!other.spec().tied && came.tensors.iter().any(|tensor| tensor.role == Role::Head), "{name}");
        untied += rotated.untied.map_or(0, |bytes| u64::from(bytes == 4 * (model.spec().vocab * model.spec().hidden) as u64));
        let ids = samples(&model).ids;
        let [before, after] = [&model, &other].map(|model| Device::Cpu.run(Logits(model, &ids)));
        let apart = apart(&after, &before);
        assert!(apart > 0.0 && apart < 1e-5, "{name}: {apart:.2e} apart");
    }
    assert_eq!(untied, 1);
}

#[test]
fn gains_are_gone_and_their_channels_no_longer_stand_out() {
    let dir = tempfile::tempdir().unwrap();
    let model = in_f32("qwen3_moe", dir.path());
    rotate::run(&model, &Rotate::default(), dir.path(), &Quiet).unwrap();
    let other = rotate::open(&model, dir.path()).unwrap();
    let ones = |role| other.vector(role).unwrap().iter().all(|&gain| gain == 1.0);
    assert!(ones(Role::FinalNorm) && ones(Role::Layer(0, Part::InputNorm)) && ones(Role::Layer(1, Part::PostNorm)));
    assert_eq!(model.vector(Role::Layer(0, Part::QueryNorm)).unwrap(), other.vector(Role::Layer(0, Part::QueryNorm)).unwrap());
    // Channel 3 had a gain ten times as large as others.
    let share = |model: &Model, gain: bool| {
        let mut w = model.matrix(Role::Layer(0, Part::Query)).unwrap();
        if gain {
            w *= &model.vector(Role::Layer(0, Part::InputNorm)).unwrap();
        }
        w.column(3).iter().map(|x| x * x).sum::<f32>() / w.iter().map(|x| x * x).sum::<f32>() * w.ncols() as f32
    };
    assert!(share(&model, true) > 8.0 && share(&other, false) < 3.0, "{} {}", share(&model, true), share(&other, false));
    assert!(rotate::open(&fixture("mixtral"), dir.path()).err().unwrap().to_string().contains("was made for the checkpoint"));
}

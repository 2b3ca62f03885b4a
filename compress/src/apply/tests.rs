//! Whole ways through `solve` and `write` on the tiny checkpoints of every family.

mod dropped;
mod learned;
mod moments;
mod objective;
mod sequential;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use calib::arch::{Part, Role};
use calib::device::Device;
use calib::progress::{Progress, Quiet};
use calib::tensor::Dtype;
use calib::{Model, Weights};
use kernels::{Group, ScaleType};

use super::*;
use crate::export::{CompressedTensors, Dense, Exports, Native};
use crate::packed::{self, ExpertRounding, Packed};
use crate::plan::{Action, Quantize, Solver as Who};
use crate::quantize::{Grid, Quantizer, gptq, rtn};
use crate::testing::fixture;

const FAMILIES: [&str; 10] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_tied",
    "olmoe",
    "phimoe",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3_mtp",
    "deepseek_v3_fp8",
];

/// Every Linear matrix of the decoder layers by `how`, everything else kept, buffers dropped.
fn plan(model: &Model, quantizer: Quantizer, how: impl Fn(&str, Role) -> Option<Quantize>) -> Plan {
    let action = |name: &str, role: Role| match role {
        Role::Buffer => Action::Drop { reason: "a buffer".into() },
        _ if role.is_quantizable() => how(name, role).map_or(Action::Keep, Action::Quantize),
        _ => Action::Keep,
    };
    let tensors = model.layout().roles().map(|(role, name)| (name.to_owned(), action(name, role))).collect();
    Plan {
        schema: 1,
        model: model.checkpoint().fingerprint().to_owned(),
        corpus: None,
        quantizer: Some(quantizer),
        objective: Default::default(),
        end_loss: Default::default(),
        refine: None,
        repair: Default::default(),
        allocation: None,
        through: calib::sample::Through::Routed,
        keep_moments: false,
        experts: None,
        tensors,
    }
}

fn four_bits() -> Quantize {
    Quantize { bits: 4, group: Group::PerChannel, grid: Grid::Sym, scale: ScaleType::Bf16, solver: Who::Planned, dead_channels: 0 }
}

fn rtn_plan(model: &Model) -> Plan {
    plan(model, Quantizer::Rtn(rtn::Params::default()), |_, _| Some(four_bits()))
}

fn gptq_plan(model: &Model) -> Plan {
    plan(model, Quantizer::Gptq(gptq::Params::default()), |_, _| Some(four_bits()))
}

fn both() -> Exports {
    Exports { compressed_tensors: Some(CompressedTensors {}), dense: Some(Dense {}), ..Exports::default() }
}

fn samples(model: &Model) -> Vec<Vec<u32>> {
    let vocab = model.spec().vocab as u32;
    (0..6_u32).map(|sample| (0..40).map(|at| (sample * 31 + at * at * 7 + at) % vocab).collect()).collect()
}

fn solved_bytes(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = fs_err::read_dir(dir.join("solved")).unwrap().map(|e| e.unwrap().path());
    files.map(|path| (path.file_name().unwrap().into(), fs_err::read(path).unwrap())).collect()
}

#[test]
fn every_family_comes_back_as_it_was_solved() {
    for name in FAMILIES {
        let (model, out) = (fixture(name), tempfile::tempdir().unwrap());
        let (plan, dir) = (rtn_plan(&model), out.path().join("moepress"));
        let outcome = solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
        assert_eq!(outcome.matrices.keys().copied().collect::<Vec<_>>(), [By::Rtn], "{name}");
        let written = write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap();
        // Whatever else a runtime may find: every routed expert is packed, also where an MTP layer's are not.
        assert!(!written[0].notes.iter().any(|note| note.contains("transformers")), "{name}: {:?}", written[0].notes);
        assert_eq!(written[0].dir, out.path());
        assert_eq!(written[1].dir, out.path().join("dense"));
        let packed = packed::open(out.path(), ExpertRounding::None).unwrap();
        let rounded = packed::open(out.path(), ExpertRounding::Bf16).unwrap();
        let dense = Model::open(&out.path().join("dense")).unwrap();
        let bf16 = |x: f32| half::bf16::from_f32(x).to_f32();
        for (role, tensor) in model.layout().roles().filter(|(role, _)| role.is_quantizable()) {
            let source = model.matrix(role).unwrap();
            let exact = rtn::rtn(source.view(), &four_bits().width(), &rtn::Params::default()).unwrap().dequantize();
            assert_eq!(packed.matrix(role).unwrap(), exact, "{name}: {tensor}");
            assert_eq!(dense.matrix(role).unwrap(), exact.mapv(bf16), "{name}: {tensor}");
            let expert = matches!(role, Role::Layer(_, Part::Expert(..)));
            assert_eq!(rounded.matrix(role).unwrap(), if expert { exact.mapv(bf16) } else { exact }, "{name}: {tensor}");
        }
        for (role, tensor) in model.layout().roles().filter(|(role, _)| !role.is_quantizable() && *role != Role::Buffer) {
            let mut was = model.checkpoint().floats(tensor).unwrap();
            if model.checkpoint().info(tensor).unwrap().dtype == Dtype::F8E4m3 {
                was.iter_mut().for_each(|x| *x = bf16(*x));
            }
            assert_eq!(dense.checkpoint().floats(tensor).unwrap(), was, "{name}: {role:?}");
        }
    }
}

#[test]
fn fp8_and_mtp_and_tied_heads_and_buffers() {
    let of = |name: &str| {
        let (model, out) = (fixture(name), tempfile::tempdir().unwrap());
        let (plan, dir) = (rtn_plan(&model), out.path().join("moepress"));
        solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
        write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap();
        (calib::checkpoint::Checkpoint::open(out.path()).unwrap(), out)
    };
    let (fp8, out) = of("deepseek_v3_fp8");
    assert!(fp8.tensors().all(|info| info.dtype != Dtype::F8E4m3 && !info.name.ends_with("weight_scale_inv")));
    let dense: serde_json::Value = serde_json::from_slice(&fs_err::read(out.path().join("dense/config.json")).unwrap()).unwrap();
    assert!(dense.get("quantization_config").is_none());
    assert_eq!(fp8.config()["quantization_config"]["quant_method"], "compressed-tensors");
    let (mtp, _out) = of("deepseek_v3_mtp");
    let source = fixture("deepseek_v3_mtp");
    let carried: Vec<&str> = source.layout().mtp().collect();
    assert!(carried.len() > 10);
    for name in carried {
        assert_eq!(mtp.bytes(name).unwrap(), source.checkpoint().bytes(name).unwrap(), "{name}");
    }
    let (tied, _out) = of("qwen3_moe_tied");
    assert!(tied.info("lm_head.weight").is_none() && tied.info("model.embed_tokens.weight").is_some());
}

#[test]
fn an_expert_that_no_token_reached_is_solved_where_the_plan_blends_it() {
    let (model, few) = (fixture("qwen3_moe"), vec![vec![3, 9, 4, 1]]);
    let expert = |role: Role| matches!(role, Role::Layer(_, Part::Expert(..)));
    let solved = |solver: Who| {
        let how = |_: &str, role: Role| Some(if expert(role) { Quantize { solver: solver.clone(), ..four_bits() } } else { four_bits() });
        let plan = plan(&model, Quantizer::Gptq(gptq::Params::default()), how);
        let out = tempfile::tempdir().unwrap();
        let outcome = solve(&model, &plan, Some(&few), out.path(), Device::Cpu, &Quiet);
        outcome.map(|outcome| (outcome, solved_bytes(out.path())))
    };
    // Four tokens do not reach all experts.
    assert!(matches!(solved(Who::Planned), Err(Error::Calib(calib::Error::Tap(_)) | Error::Unreached { .. })));
    let (outcome, bytes) = solved(Who::Blended { tokens: 0, wanted: 8 }).unwrap();
    let experts = model.layout().roles().filter(|(role, _)| expert(*role)).count();
    assert_eq!((outcome.blended, outcome.rounded), (experts, 0));
    assert!(!outcome.matrices.contains_key(&By::Rtn) && outcome.loss > 0.0, "{outcome:?}");
    assert_eq!(solved(Who::Blended { tokens: 0, wanted: 8 }).unwrap().1, bytes);
}

#[test]
fn an_asymmetric_grid_and_mixed_widths_read_back() {
    let (model, out) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let plan = plan(&model, Quantizer::Rtn(rtn::Params::default()), |_, role| match role {
        Role::Layer(0, Part::Expert(0, _)) => None,
        Role::Layer(0, Part::Expert(e, _)) => Some(Quantize { bits: 2 + (e % 7) as u8, group: Group::Size(8), ..four_bits() }),
        Role::Layer(_, Part::Expert(..)) => Some(Quantize { bits: 3, grid: Grid::Asym, ..four_bits() }),
        _ => Some(Quantize { grid: Grid::Asym, group: Group::Size(8), scale: ScaleType::F16, ..four_bits() }),
    });
    let dir = out.path().join("moepress");
    solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
    let written = write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap();
    assert!(written[0].notes.iter().any(|note| note.contains("transformers 5 does not load it")), "{:?}", written[0].notes);
    let packed = Packed::new(calib::checkpoint::Checkpoint::open(out.path()).unwrap(), ExpertRounding::None).unwrap();
    for (name, action) in &plan.tensors {
        let (Action::Quantize(how), Some(role)) = (action, model.layout().role(name)) else { continue };
        let solved = rtn::rtn(model.matrix(role).unwrap().view(), &how.width(), &rtn::Params::default()).unwrap();
        assert_eq!(packed.quantized(name).unwrap().unwrap(), solved, "{name}");
    }
    let widths = &packed.widths()[&calib::arch::Kind::Expert];
    assert_eq!(widths.bits.iter().copied().collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn a_native_output_holds_any_mixture_and_multiplies_it_packed() {
    for name in ["qwen3_moe", "deepseek_v2", "mixtral"] {
        let (model, out) = (fixture(name), tempfile::tempdir().unwrap());
        let grids = [Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset];
        let plan = plan(&model, Quantizer::Rtn(rtn::Params::default()), |_, role| match role {
            Role::Layer(layer, Part::Expert(e, projection)) => {
                // Gate and up of the even layers agree, those of the odd ones do not.
                let down =
                    usize::from(projection == calib::arch::Projection::Down || layer % 2 == 1 && projection == calib::arch::Projection::Up);
                Some(Quantize { bits: [2, 3, 4, 5, 6, 8][(e + down) % 6], grid: grids[(e + layer + down) % 4], ..four_bits() })
            }
            Role::Layer(_, Part::Output) => Some(Quantize { bits: 1, grid: Grid::Half, ..four_bits() }),
            _ => Some(four_bits()),
        });
        let dir = out.path().join("moepress");
        solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
        let native = Exports { native: Some(Native {}), ..Exports::default() };
        let written = write(&model, &plan, &dir, &native, out.path(), &Quiet).unwrap();
        assert!(written[0].notes[0].contains("moepress emit"));
        let packed = packed::open(out.path(), ExpertRounding::None).unwrap();
        for (role, _) in model.layout().roles().filter(|(role, _)| role.is_quantizable()) {
            let Action::Quantize(how) = &plan.tensors[model.layout().name(role).unwrap()] else { panic!() };
            let exact = rtn::rtn(model.matrix(role).unwrap().view(), &how.width(), &rtn::Params::default()).unwrap().dequantize();
            let read = packed.matrix(role).unwrap();
            let apart = (&read - &exact).mapv(|x| f64::from(x).powi(2)).sum().sqrt() / exact.mapv(|x| f64::from(x).powi(2)).sum().sqrt();
            assert!(apart <= if how.grid == Grid::Offset { kernels::bounds::OFFSET } else { 0.0 }, "{name}: {role:?}: {apart}");
        }
        let layer = (0..model.spec().layers.len()).find(|&layer| model.spec().moe(layer).is_some()).unwrap();
        for layer in [layer, layer + 1].into_iter().filter(|&layer| layer < model.spec().layers.len()) {
            let matrix = |projection| packed.matrix(Role::Layer(layer, Part::Expert(1, projection))).unwrap();
            let applied = packed.applied(layer, 1).unwrap().unwrap();
            let hidden = model.spec().hidden;
            let x = ndarray::Array2::from_shape_fn((3, hidden), |(r, c)| ((r * 7 + c * 3) % 11) as f32 / 11.0 - 0.4);
            let near = |found: Vec<f32>, meant: ndarray::Array2<f32>| {
                let square = |x: f64| x * x;
                let apart: f64 = found.iter().zip(&meant).map(|(f, m)| square(f64::from(f - m))).sum();
                assert!(
                    (apart / meant.iter().map(|m| square(f64::from(*m))).sum::<f64>()).sqrt() <= kernels::bounds::EXACT,
                    "{name}: {layer}"
                );
            };
            let [gate, up] = applied.gates(x.as_slice().unwrap());
            near(gate, x.dot(&matrix(calib::arch::Projection::Gate).t()));
            near(up.clone(), x.dot(&matrix(calib::arch::Projection::Up).t()));
            let mid = ndarray::Array2::from_shape_vec((3, up.len() / 3), up).unwrap();
            near(applied.down(mid.as_slice().unwrap()), mid.dot(&matrix(calib::arch::Projection::Down).t()));
        }
    }
}

#[test]
fn a_grid_that_the_format_has_not_is_refused_by_name() {
    let (model, out) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let plan = plan(&model, Quantizer::Rtn(rtn::Params::default()), |_, _| Some(Quantize { grid: Grid::Half, ..four_bits() }));
    let dir = out.path().join("moepress");
    solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
    let said = write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap_err().to_string();
    assert!(said.contains("half-integer zero points") && said.contains("model.layers.0") && said.contains("and 76 more"), "{said}");
    assert!(!out.path().join("config.json").exists());
}

/// Panics at its n-th tick, as a kill would.
struct Kill(AtomicU64);

impl Progress for Kill {
    fn tick(&self, steps: u64) {
        if steps > 0 && self.0.fetch_sub(1, Ordering::SeqCst) == 1 {
            panic!("killed");
        }
    }
}

#[test]
fn a_killed_run_ends_with_the_same_bytes() {
    for name in ["qwen3_moe", "deepseek_v2"] {
        let model = fixture(name);
        let (plan, ids) = (gptq_plan(&model), samples(&model));
        let whole = tempfile::tempdir().unwrap();
        let outcome = solve(&model, &plan, Some(&ids), whole.path(), Device::Cpu, &Quiet).unwrap();
        assert!(outcome.matrices.contains_key(&By::Gptq) && outcome.loss > 0.0, "{outcome:?}");
        for layers in 1..=2_u64 {
            let killed = tempfile::tempdir().unwrap();
            let kill = Kill(AtomicU64::new(layers));
            let run = || solve(&model, &plan, Some(&ids), killed.path(), Device::Cpu, &kill);
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            // A file half written is left over as well.
            fs_err::write(killed.path().join("solved/layer-00002.safetensors.part"), "half").unwrap();
            let again = solve(&model, &plan, Some(&ids), killed.path(), Device::Cpu, &Quiet).unwrap();
            assert_eq!(again.resumed as u64, layers);
            assert_eq!(solved_bytes(whole.path()), solved_bytes(killed.path()), "{name} after {layers}");
        }
        // Killed after a layer's file had its name and before its hidden states were written.
        let killed = tempfile::tempdir().unwrap();
        let kill = Kill(AtomicU64::new(1));
        let run = || solve(&model, &plan, Some(&ids), killed.path(), Device::Cpu, &kill);
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        fs_err::remove_file(killed.path().join("solved/hidden.safetensors")).unwrap();
        solve(&model, &plan, Some(&ids), killed.path(), Device::Cpu, &Quiet).unwrap();
        assert_eq!(solved_bytes(whole.path()), solved_bytes(killed.path()), "{name} without hidden states");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let model = fixture("qwen2_moe");
    let (plan, ids) = (gptq_plan(&model), samples(&model));
    let with = |threads: usize| {
        let dir = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| solve(&model, &plan, Some(&ids), dir.path(), Device::Cpu, &Quiet)).unwrap();
        solved_bytes(dir.path())
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn work_of_another_plan_is_not_touched() {
    let (model, dir) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let first = rtn_plan(&model);
    solve(&model, &first, None, dir.path(), Device::Cpu, &Quiet).unwrap();
    let before = solved_bytes(dir.path());
    let second = plan(&model, Quantizer::Rtn(rtn::Params::default()), |_, _| Some(Quantize { bits: 3, ..four_bits() }));
    let said = solve(&model, &second, None, dir.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
    assert!(said.contains("manifest.json was made for the plan") && said.contains("--force"), "{said}");
    // A single file of another plan among ours.
    let other = tempfile::tempdir().unwrap();
    solve(&model, &second, None, other.path(), Device::Cpu, &Quiet).unwrap();
    let layer = "solved/layer-00001.safetensors";
    fs_err::copy(dir.path().join(layer), other.path().join(layer)).unwrap();
    let said = write(&model, &second, other.path(), &both(), &other.path().join("out"), &Quiet).unwrap_err().to_string();
    assert!(said.contains("layer-00001.safetensors was made for the plan"), "{said}");
    assert_eq!(solved_bytes(dir.path()), before);
}

#[test]
fn what_does_not_fit_is_said_before_any_work() {
    let (model, dir) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let refused =
        |plan: &Plan, samples: Option<&[Vec<u32>]>| solve(&model, plan, samples, dir.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
    assert!(refused(&gptq_plan(&model), None).contains("give the samples"));
    fs_err::remove_dir_all(dir.path().join("solved")).unwrap();
    let other = rtn_plan(&fixture("mixtral"));
    assert!(refused(&other, None).contains("the plan was made for the checkpoint"));
    let mut short = rtn_plan(&model);
    short.tensors.remove("model.norm.weight").unwrap();
    assert!(refused(&short, None).contains("model.norm.weight: the model has it, the plan does not"));
    let mut long = rtn_plan(&model);
    long.tensors.insert("model.extra".into(), Action::Keep);
    assert!(refused(&long, None).contains("model.extra: the plan has it, the model does not"));
    let mut norm = rtn_plan(&model);
    norm.tensors.insert("model.norm.weight".into(), Action::Quantize(four_bits()));
    assert!(refused(&norm, None).contains("model.norm.weight has shape"));
    assert!(!dir.path().join("solved").exists());
}

#[test]
fn an_export_needs_every_layer_and_a_free_place() {
    let (model, out) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let (plan, dir) = (rtn_plan(&model), out.path().join("moepress"));
    solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    fs_err::write(elsewhere.path().join("thesis.tex"), "x").unwrap();
    let said = write(&model, &plan, &dir, &both(), elsewhere.path(), &Quiet).unwrap_err().to_string();
    assert!(said.contains("thesis.tex"), "{said}");
    assert!(write(&model, &plan, &dir, &Exports::default(), out.path(), &Quiet).unwrap_err().to_string().contains("names no export"));
    fs_err::remove_file(dir.join("solved/layer-00001.safetensors")).unwrap();
    let said = write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap_err().to_string();
    assert!(said.contains("layer 1 of 3 is not solved yet"), "{said}");
}

#[test]
fn the_checks_find_what_was_tampered_with() {
    let (model, out) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let (plan, dir) = (rtn_plan(&model), out.path().join("moepress"));
    solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
    write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap();
    let source = output::FromSolved::open(&model, &plan, &dir).unwrap();
    let contents = source.contents().unwrap();
    let check = || crate::export::validate::check(&contents, &CompressedTensors {}, out.path());
    check().unwrap();
    let (config, weights) = (out.path().join("config.json"), out.path().join("model.safetensors"));
    let (text, bytes) = (fs_err::read_to_string(&config).unwrap(), fs_err::read(&weights).unwrap());
    let says = |words: &str| {
        let said = check().unwrap_err().to_string();
        assert!(said.contains(words), "{said}");
        fs_err::write(&config, &text).unwrap();
        fs_err::write(&weights, &bytes).unwrap();
        check().unwrap();
    };
    fs_err::write(&config, text.replace(r"experts\\.\\d+", r"experts\\.1")).unwrap();
    says("model.layers.0.mlp.experts.0.down_proj matches 0 targets");
    fs_err::write(&config, text.replace("\"targets\": [", "\"targets\": [\"re:.*up_proj$\", \"lm_head\", ")).unwrap();
    says("model.layers.0.mlp.experts.0.up_proj matches 2 targets");
    fs_err::write(&config, text.replace("\"targets\": [", "\"targets\": [\"re:.*norm_proj$\", ")).unwrap();
    says("the target re:.*norm_proj$ matches nothing");
    fs_err::write(&config, text.replace("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-05")).unwrap();
    says("config.json differs");
    let flip = |tensor: &str| {
        let checkpoint = calib::checkpoint::Checkpoint::open(out.path()).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let mut flipped = bytes.clone();
        // The upper byte of the first bf16, the lowest byte but one of the first word.
        flipped[(8 + header + checkpoint.info(tensor).unwrap().bytes.start) as usize + 1] ^= 0x80;
        drop(checkpoint);
        fs_err::write(&weights, flipped).unwrap();
    };
    flip("model.norm.weight");
    says("model.norm.weight was to be carried over");
    flip("model.layers.0.self_attn.q_proj.weight_scale");
    says("model.layers.0.self_attn.q_proj.weight_scale holds a scale that is not a positive number");
    // The first matrix by name is always among those compared.
    flip("model.layers.0.mlp.experts.0.down_proj.weight_packed");
    says("model.layers.0.mlp.experts.0.down_proj.weight does not read back");
    fs_err::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    says("model.safetensors");
}

#[test]
fn the_embedding_and_the_head_are_rounded_where_the_plan_says_so() {
    let reason = || Who::Rounded { reason: "asked for".into() };
    for (name, tied) in [("qwen3_moe", false), ("qwen3_moe_tied", true)] {
        let (model, out) = (fixture(name), tempfile::tempdir().unwrap());
        let mut plan = rtn_plan(&model);
        let ends: Vec<Role> = [Role::Embedding, Role::Head].into_iter().filter(|&role| model.layout().name(role).is_some()).collect();
        assert_eq!(ends.len(), if tied { 1 } else { 2 });
        for &role in &ends {
            let how = Quantize { bits: 6, solver: reason(), ..four_bits() };
            plan.tensors.insert(model.layout().name(role).unwrap().to_owned(), Action::Quantize(how));
        }
        let dir = out.path().join("moepress");
        solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
        let said = write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap_err().to_string();
        assert!(said.contains("no loader of compressed-tensors is known to take a packed embedding or head"), "{said}");
        let exports = Exports { dense: Some(Dense {}), ..Exports::default() };
        write(&model, &plan, &dir, &exports, out.path(), &Quiet).unwrap();
        let dense = Model::open(out.path()).unwrap();
        for &role in &ends {
            let width = Quantize { bits: 6, ..four_bits() }.width();
            let exact = rtn::rtn(model.matrix(role).unwrap().view(), &width, &rtn::Params::default()).unwrap().dequantize();
            assert_eq!(dense.matrix(role).unwrap(), exact.mapv(|x| half::bf16::from_f32(x).to_f32()), "{name}: {role:?}");
        }
        // Solved they cannot be: there are no second moments.
        plan.tensors.insert(model.layout().name(Role::Embedding).unwrap().to_owned(), Action::Quantize(four_bits()));
        let elsewhere = tempfile::tempdir().unwrap();
        let said = solve(&model, &plan, None, elsewhere.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
        assert!(said.contains("it has no second moments"), "{said}");
    }
}

#[test]
fn a_native_file_has_the_bytes_that_were_allocated() {
    use calib::arch::Projection::{Down, Gate, Up};

    use crate::allocate::{Choice, Constraints, Matrix, Runtime};
    use crate::export::{Constant, Form, Format, Scheme, Tensor};

    let of = |bits, grid| Choice { bits, group: Group::Size(32), grid };
    let (two, three, real) = (of(2, Grid::Half), of(3, Grid::Asym), of(5, Grid::Offset));
    let experts = [[two, two, three], [real, real, two]];
    let routed = (0..2).flat_map(|e| [Gate, Up, Down].into_iter().zip(experts[e]).map(move |(p, choice)| (Part::Expert(e, p), choice)));
    let (shape, scale) = ([64, 96], ScaleType::Bf16);
    let rules = Constraints { runtime: Some(Runtime::Native), ..Constraints::default() };
    let (mut tensors, mut allocated) = (Vec::new(), 0);
    for (part, choice) in routed.chain([(Part::Query, two), (Part::Key, three)]) {
        let block = if matches!(part, Part::Expert(..)) { "mlp.experts" } else { "self_attn" };
        let name = format!("model.layers.0.{block}.{part:?}.weight");
        let scheme = Scheme { bits: choice.bits, group: choice.group, zero: crate::plan::zero_of(choice.grid), scale };
        allocated += rules.bytes(&Matrix { name: name.clone(), layer: 0, part, shape, scale }, &choice);
        tensors.push(Tensor { name, shape: shape.into(), role: Role::Layer(0, part), form: Form::Quantized(scheme) });
    }
    // A third expert is dropped: three tensors that become one row.
    for projection in [Gate, Up, Down] {
        let role = Role::Layer(0, Part::Expert(2, projection));
        let name = format!("model.layers.0.mlp.experts.2.{projection:?}.weight");
        tensors.push(Tensor { name, shape: shape.into(), role, form: Form::Constant(Constant::Mean(Dtype::Bf16)) });
    }
    allocated += crate::allocate::Substitute::Mean.bytes(shape[0]);
    let declared = Native {}.groups(&tensors).iter().flat_map(|group| Native {}.declare(group).unwrap()).collect::<Vec<_>>();
    // compressed-tensors' shapes of originals are not counted as weights.
    let stored = declared.iter().filter(|d| !d.name.ends_with("_shape"));
    assert_eq!(stored.map(|d| (d.shape.iter().product::<usize>() * d.dtype.size()) as u64).sum::<u64>(), allocated);
}

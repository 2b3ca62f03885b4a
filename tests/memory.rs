//! The peak that `apply` states: rounding and exporting stream, whatever the model's size.
//!
//! Alone in its process, because it looks at the whole process: anonymous memory (what is mapped from a file does not count).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use calib::Model;
use calib::checkpoint::{Declared, Writer};
use calib::device::Device;
use calib::progress::Quiet;
use calib::tensor::Dtype;
use compress::apply;
use compress::export::{CompressedTensors, Dense, Exports};
use compress::plan::{Action, Plan, Quantize, Solver};
use compress::quantize::{Grid, Quantizer, rtn};
use kernels::{Group, ScaleType};

const HIDDEN: usize = 1024;
const INNER: usize = 4096;
const LAYERS: usize = 3;
const EXPERTS: usize = 4;
const VOCAB: usize = 64;

/// What may be held beside four times the largest tensor in f32.
const BESIDE: u64 = 100 << 20;

/// Tensors of a Mixtral-shaped model of 330 MB: three times what `apply` may hold.
fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut found = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut put = |name: &str, shape: &[usize]| found.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        put("input_layernorm", &[HIDDEN]);
        put("post_attention_layernorm", &[HIDDEN]);
        ["q", "k", "v", "o"].iter().for_each(|p| put(&format!("self_attn.{p}_proj"), &[HIDDEN, HIDDEN]));
        put("block_sparse_moe.gate", &[EXPERTS, HIDDEN]);
        for expert in 0..EXPERTS {
            put(&format!("block_sparse_moe.experts.{expert}.w1"), &[INNER, HIDDEN]);
            put(&format!("block_sparse_moe.experts.{expert}.w3"), &[INNER, HIDDEN]);
            put(&format!("block_sparse_moe.experts.{expert}.w2"), &[HIDDEN, INNER]);
        }
    }
    found
}

fn write_model(dir: &Path) {
    let declared = tensors().into_iter().map(|(name, shape)| Declared { name, dtype: Dtype::Bf16, shape }).collect();
    let mut writer = Writer::create(dir, declared, u64::MAX, BTreeMap::from([("format".into(), "pt".into())])).unwrap();
    let mut state = 1_u32;
    for (name, shape) in tensors() {
        let mut bytes = Vec::with_capacity(2 * shape.iter().product::<usize>());
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // A sign and a fraction beside the exponent of 1/64.
            bytes.extend(((state >> 16) as u16 & 0x807f | 0x3c80).to_le_bytes());
        }
        writer.put(&name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let config = format!(
        r#"{{"model_type": "mixtral", "hidden_size": {HIDDEN}, "intermediate_size": {INNER}, "num_hidden_layers": {LAYERS},
            "num_local_experts": {EXPERTS}, "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": {VOCAB},
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu", "max_position_embeddings": 512, "tie_word_embeddings": false,
            "torch_dtype": "bfloat16"}}"#
    );
    fs_err::write(dir.join("config.json"), config).unwrap();
}

/// Anonymous memory of this process, in bytes.
fn anonymous() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

/// The most that `work` held at once.
fn peak(work: impl FnOnce()) -> u64 {
    let (peak, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                peak.fetch_max(anonymous(), Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        work();
        over.store(true, Ordering::SeqCst);
    });
    peak.into_inner()
}

#[test]
fn rounding_and_exporting_hold_a_few_matrices() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("model"), dir.path().join("out"));
    fs_err::create_dir(&source).unwrap();
    write_model(&source);
    let model = Model::open(&source).unwrap();
    let how =
        Quantize { bits: 4, group: Group::Size(128), grid: Grid::Sym, scale: ScaleType::Bf16, solver: Solver::Planned, dead_channels: 0 };
    let action = |role: calib::arch::Role| if role.is_quantizable() { Action::Quantize(how.clone()) } else { Action::Keep };
    let plan = Plan {
        schema: 1,
        model: model.checkpoint().fingerprint().to_owned(),
        corpus: None,
        quantizer: Some(Quantizer::Rtn(rtn::Params::default())),
        objective: Default::default(),
        end_loss: Default::default(),
        refine: None,
        repair: Default::default(),
        allocation: None,
        through: calib::sample::Through::Routed,
        keep_moments: false,
        experts: None,
        tensors: model.layout().roles().map(|(role, name)| (name.to_owned(), action(role))).collect(),
    };
    let exports = Exports { compressed_tensors: Some(CompressedTensors {}), dense: Some(Dense {}), ..Exports::default() };
    let largest = (HIDDEN * INNER * 4) as u64;
    let held = peak(|| {
        let work = out.join("moepress");
        apply::solve(&model, &plan, None, &work, Device::Cpu, &Quiet).unwrap();
        apply::write(&model, &plan, &work, &exports, &out, &Quiet).unwrap();
    });
    println!("{} MiB at most, of {} allowed", held >> 20, (4 * largest + BESIDE) >> 20);
    assert!(held > largest, "nothing was measured: {held} bytes");
    assert!(held <= 4 * largest + BESIDE, "{held} bytes of anonymous memory for matrices of {largest} bytes in f32");
}

//! A checkpoint that lost a tensor, has one under another name or in another shape does not open, and the error says which one.
//!
//! One tensor of every kind of every family, from the checkpoints of `tests/parity`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::Model;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// One checkpoint a family, whose tensors lie in one file.
const FAMILIES: [&str; 8] = ["mixtral_window", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek", "deepseek_v2_group", "deepseek_v3"];

/// What is done to a tensor.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Removed,
    Renamed,
    Reshaped,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity").join(name)
}

/// The name without its numbers: one of each is tried.
fn kind(name: &str) -> String {
    name.split('.').filter(|part| part.parse::<usize>().is_err()).collect::<Vec<_>>().join(".")
}

/// Writes the checkpoint into `to` with one tensor damaged.
fn write(bytes: &[u8], tensor: &str, damage: Damage, to: &Path) {
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let mut views: BTreeMap<String, TensorView<'_>> = tensors.tensors().into_iter().collect();
    let view = views.remove(tensor).unwrap();
    match damage {
        Damage::Removed => {}
        Damage::Renamed => drop(views.insert(format!("{tensor}_old"), view)),
        Damage::Reshaped => {
            let mut shape = view.shape().to_vec();
            shape.push(1);
            views.insert(tensor.to_owned(), TensorView::new(view.dtype(), shape, view.data()).unwrap());
        }
    }
    fs_err::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn every_kind_of_tensor_is_missed_by_name() {
    let work = tempfile::tempdir().unwrap();
    let (mut silent, mut tried) = (Vec::new(), 0);
    for family in FAMILIES {
        let bytes = fs_err::read(folder(family).join("model.safetensors")).unwrap();
        let to = work.path().join(family);
        fs_err::create_dir(&to).unwrap();
        fs_err::copy(folder(family).join("config.json"), to.join("config.json")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut names = tensors.names();
        names.sort_unstable();
        // The last of a kind: of layers the last, of experts the last.
        let kinds: BTreeMap<_, _> = names.into_iter().map(|name| (kind(name), name.to_owned())).collect();
        for tensor in kinds.values().filter(|name| !name.ends_with("rotary_emb.inv_freq")) {
            for damage in [Damage::Removed, Damage::Renamed, Damage::Reshaped] {
                write(&bytes, tensor, damage, &to);
                tried += 1;
                match Model::open(&to) {
                    Ok(_) => silent.push(format!("{family}: {tensor} was {damage:?}, and it opens")),
                    Err(error) if !error.to_string().contains(tensor.as_str()) => {
                        silent.push(format!("{family}: {tensor} was {damage:?}, and the error does not name it: {error}"));
                    }
                    Err(_) => {}
                }
            }
        }
    }
    assert!(silent.is_empty(), "{} of {tried}:\n{}", silent.len(), silent.join("\n"));
    assert!(tried > 300, "only {tried} checkpoints were tried");
}

#[test]
fn an_expert_that_is_missing_in_one_layer_is_named() {
    let work = tempfile::tempdir().unwrap();
    fs_err::copy(folder("qwen3_moe").join("config.json"), work.path().join("config.json")).unwrap();
    let bytes = fs_err::read(folder("qwen3_moe").join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let kept = tensors.tensors().into_iter().filter(|(name, _)| !name.starts_with("model.layers.1.mlp.experts.5."));
    fs_err::write(work.path().join("model.safetensors"), safetensors::serialize(kept, None).unwrap()).unwrap();
    let error = Model::open(work.path()).err().unwrap().to_string();
    assert!(error.contains("expert 5") && error.contains("layer 1"), "{error}");
}

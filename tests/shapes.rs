//! Checkpoints of real models' geometry without their data: the config as it stands on the hub and a header of every tensor.

use std::path::{Path, PathBuf};

use calib::arch::{Part, Role, expected, resolve};
use serde_json::{Map, Value, json};

/// Writes a shape-only checkpoint of `tests/models/hub/NAME.json` to `dir`. With `quantization_config` Linear matrices of the decoder
/// layers are FP8 with a scale for every 128 by 128 of them, as DeepSeek's are; MTP layers are left out.
pub fn write(name: &str, dir: &Path) -> PathBuf {
    let config = fs_err::read_to_string(super::place::root().join(format!("tests/models/hub/{name}.json"))).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let resolved = resolve(&config).unwrap();
    assert!(resolved.unknown.is_empty(), "{:?}", resolved.unknown);
    let fp8 = config.get("quantization_config").is_some();
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "moepress": "shape-only" }));
    let mut end = 0_u64;
    let mut put = |name: String, dtype: &str, width: u64, shape: &[usize]| {
        let bytes = width * shape.iter().map(|&side| side as u64).product::<u64>();
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes] }));
        end += bytes;
    };
    for (role, name, axes) in expected(resolved.family, &resolved.spec) {
        let shape: Vec<usize> = axes.iter().map(|axis| axis.size).collect();
        match (role, fp8 && role.is_quantizable()) {
            (Role::Layer(_, Part::RouterCorrection), _) => put(name, "F32", 4, &shape),
            (_, false) => put(name, "BF16", 2, &shape),
            (_, true) => {
                put(format!("{name}_scale_inv"), "F32", 4, &[shape[0].div_ceil(128), shape[1].div_ceil(128)]);
                put(name, "F8_E4M3", 1, &shape);
            }
        }
    }
    let header = serde_json::to_vec(&header).unwrap();
    let out = dir.join(name);
    fs_err::create_dir_all(&out).unwrap();
    fs_err::write(out.join("config.json"), config.to_string()).unwrap();
    fs_err::write(out.join("model.safetensors"), [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    out
}

//! Kernels written for one checkpoint: its shapes and widths in, a folder of files out. Pure: the same checkpoint gives the same bytes.
//!
//! The CUDA C++ stands in real files (`kernels/cuda`); what is emitted is a block of constants and those files in one translation unit
//! without includes, which NVRTC compiles for every architecture from sm_80 on, g++ for the tests; beside it a C interface with a loader
//! that needs `cc` alone, a Python package, the same as a project of Hugging Face's `kernels`, and a manifest. Machine code comes from [`crate::nvrtc`] and is put beside it; where it could
//! not be made the manifest says `"compiled": []` and why, and the loader compiles `mq_moe.cu` at first use, or takes the cubins that
//! `python/compile.py` makes.

mod hub;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::layout::table::Arena;
use crate::layout::{self, Packed, Rows, TILE_INPUTS};
use crate::{Error, QuantizedMatrix, Result};

const DEVICE: &str = include_str!("../../cuda/mq_device.cuh");
const DEQUANT: &str = include_str!("../../cuda/mq_dequant.cuh");
const MOE: &str = include_str!("../../cuda/mq_moe.cu");
const HEADER: &str = include_str!("../../cuda/mq_moe.h");
const LOADER: &str = include_str!("../../cuda/mq_loader.c");
const PYTHON: &str = include_str!("../../python/__init__.py");
const INTEGRATION: &str = include_str!("../../python/integration.py");
const CUDA: &str = include_str!("../../python/cuda.py");
const COMPILE: &str = include_str!("../../python/compile.py");
const PYPROJECT: &str = include_str!("../../python/pyproject.toml");

/// Version of the C interface.
pub const ABI: u32 = 1;

/// Files by path below the emitted folder.
pub type FileSet = BTreeMap<String, Vec<u8>>;

/// Two arenas of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Which decoder layer.
    pub index: usize,
    /// Name of the arena of gate and up in the checkpoint, without `.arena`, and its table; of down.
    pub projections: [(String, Arena); 2],
    /// Experts that the router chooses and no arena holds: they put out constants, which the kernels do not add.
    pub constants: Vec<usize>,
}

/// What the kernels are written for.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// The family, for people.
    pub family: String,
    /// Hidden size and the width between an expert's matrices.
    pub sizes: [usize; 2],
    /// Routed experts a layer, as the router counts them.
    pub experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Layers whose experts lie in arenas.
    pub layers: Vec<Layer>,
}

/// What machine code is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// For one architecture.
    Cubin,
    /// Text that a driver compiles for whatever it drives.
    Ptx,
}

/// The kernels compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// For what, as NVRTC names it: `sm_90a`, `compute_80`.
    pub arch: String,
    /// In what.
    pub kind: Kind,
    /// The file.
    pub bytes: Vec<u8>,
    /// Release of the compiler, such as `12.8`.
    pub nvrtc: String,
}

impl Image {
    /// Where it lies below the emitted folder: where the loader looks for it.
    pub fn file(&self) -> String {
        match self.kind {
            Kind::Cubin => format!("cubin/mq_moe.{}.cubin", self.arch),
            Kind::Ptx => format!("ptx/mq_moe.{}.ptx", self.arch),
        }
    }
}

/// Everything that was compiled, and why the rest was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    /// In the order of the manifest.
    pub compiled: Vec<Image>,
    /// What is not there that could be, and why.
    pub left_out: Option<String>,
}

impl Images {
    /// No machine code, for this reason.
    pub fn none(reason: impl Into<String>) -> Self {
        Self { compiled: Vec::new(), left_out: Some(reason.into()) }
    }
}

impl Model {
    /// Every width that occurs, widest first.
    pub fn widths(&self) -> Vec<u8> {
        let entries = self.layers.iter().flat_map(|layer| layer.projections.iter().flat_map(|(_, arena)| &arena.entries));
        let widths: BTreeSet<u8> = entries.map(|entry| entry.form.bits).collect();
        widths.into_iter().rev().collect()
    }

    /// What the kernels of one projection (0: gate and up, 1: down) are compiled for: width, log2 of the group (255: whole rows) and flags
    /// of every form that occurs, widest first.
    fn forms(&self, projection: usize) -> Vec<[u16; 3]> {
        let entries = self.layers.iter().flat_map(|layer| &layer.projections[projection].1.entries);
        let forms: BTreeSet<[u16; 3]> =
            entries.map(|entry| [entry.form.bits.into(), entry.form.log2_group().into(), entry.form.flags()]).collect();
        forms.into_iter().rev().collect()
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Holds { target: "the emitted kernels", what });
        let [hidden, inner] = self.sizes;
        if self.layers.is_empty() {
            return refuse("a checkpoint without arenas; export it with [export.native]".to_owned());
        }
        if let Some(what) = objection(self.sizes, self.experts) {
            return refuse(what);
        }
        for layer in &self.layers {
            for ((name, arena), (rows, shape)) in
                layer.projections.iter().zip([(Rows::GateUp, [inner, hidden]), (Rows::Plain, [hidden, inner])])
            {
                if arena.shape != shape || arena.entries.iter().any(|entry| entry.form.rows != rows) {
                    return refuse(format!("{name}: {:?} with {rows:?} rows, where {shape:?} is needed", arena.shape));
                }
            }
        }
        Ok(())
    }
}

/// Why the kernels have no form for experts with these sides, or for so many of them a layer; `None` if they have.
pub fn objection(sides: [usize; 2], experts: usize) -> Option<String> {
    if let Some(side) = sides.into_iter().find(|side| side % 2 != 0 || *side == 0) {
        return Some(format!("a side of {side}: activations are read two at a time"));
    }
    (experts > 1024).then(|| format!("{experts} experts a layer; there is room for 1024"))
}

/// The constants, as C and CUDA read them.
fn constants(model: &Model) -> String {
    let [hidden, inner] = model.sizes;
    let [mut first, second] = [0, 1].map(|projection| model.forms(projection));
    let each =
        |forms: &[[u16; 3]]| forms.iter().map(|[bits, log2, flags]| format!("X({bits}, {log2}, {flags:#x})")).collect::<Vec<_>>().join(" ");
    let [gate_up, down] = [&first, &second].map(|forms| each(forms));
    first.extend(second);
    let all: BTreeSet<[u16; 3]> = first.into_iter().collect();
    let all = each(&all.into_iter().rev().collect::<Vec<_>>());
    format!(
        "// Written for one checkpoint by `moepress emit`; write it anew instead of editing it.\n\
         #define MQ_HIDDEN {hidden}\n#define MQ_INNER {inner}\n#define MQ_HIDDEN_LD {}\n#define MQ_INNER_LD {}\n#define MQ_EXPERTS {}\n\
         #define MQ_MAX_EXPERTS {}\n#define MQ_TOP_K {}\n#define MQ_FORMS_13(X) {gate_up}\n#define MQ_FORMS_2(X) {down}\n\
         #define MQ_FORMS(X) {all}\n#define MQ_BLOCKS(X) X(1) X(2) X(4)\n\
         #define MQ_RESIDENT(NB) (NB == 1 ? 6 : NB == 2 ? 4 : 3)\n",
        hidden.next_multiple_of(TILE_INPUTS),
        inner.next_multiple_of(TILE_INPUTS),
        model.experts,
        model.experts,
        model.top_k,
    )
}

/// The translation unit.
pub fn source(model: &Model) -> String {
    [constants(model).as_str(), DEVICE, DEQUANT, MOE].join("\n")
}

/// Everything that is written for a checkpoint. `images` are [`source`] of the same model compiled.
///
/// # Errors
///
/// [`Error::Holds`] for what the kernels have no form for: no arenas, gate and up apart, an odd side.
pub fn emit(model: &Model, images: &Images) -> Result<FileSet> {
    model.check()?;
    let constants = constants(model).replace("// Written", "/* Written").replace("editing it.\n", "editing it. */\n");
    let mut files = FileSet::new();
    let mut add = |path: &str, text: String| files.insert(path.to_owned(), text.into_bytes());
    add("mq_moe.cu", source(model));
    add("mq_constants.h", format!("#ifndef MQ_CONSTANTS_H\n#define MQ_CONSTANTS_H\n{constants}#endif\n"));
    add("mq_moe.h", HEADER.to_owned());
    add("mq_loader.c", LOADER.to_owned());
    add("python/moepress_kernels/__init__.py", PYTHON.to_owned());
    add("python/moepress_kernels/integration.py", INTEGRATION.to_owned());
    add("python/moepress_kernels/cuda.py", CUDA.to_owned());
    add("python/moepress_kernels/compile.py", COMPILE.to_owned());
    add("python/pyproject.toml", PYPROJECT.to_owned());
    let golden = golden(&model.widths())?;
    let hashes: BTreeMap<&str, String> = files.iter().map(|(path, bytes)| (path.as_str(), fnv(bytes))).collect();
    let manifest = manifest(model, images, &hashes, &fnv(&golden));
    files.insert("tests/golden.json".to_owned(), golden);
    files.insert("manifest.json".to_owned(), format!("{manifest:#}\n").into_bytes());
    files.extend(images.compiled.iter().map(|image| (image.file(), image.bytes.clone())));
    files.extend(hub::project(&files, model, images));
    Ok(files)
}

fn manifest(model: &Model, images: &Images, files: &BTreeMap<&str, String>, golden: &str) -> serde_json::Value {
    let histogram = |arena: &Arena| {
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        arena.entries.iter().for_each(|entry| *found.entry(entry.form.bits.to_string()).or_default() += 1);
        found
    };
    let projection = |(name, arena): &(String, Arena)| json!({ "tensor": name, "bytes": arena.bytes, "widths": histogram(arena) });
    let layer = |layer: &Layer| {
        let [gate_up, down] = layer.projections.each_ref().map(projection);
        let mut said = json!({ "layer": layer.index, "gate_up": gate_up, "down": down });
        if !layer.constants.is_empty() {
            said["constants"] = json!(layer.constants);
        }
        said
    };
    let layers: Vec<_> = model.layers.iter().map(layer).collect();
    let entry_points: Vec<String> = ["bf16", "f16"]
        .into_iter()
        .flat_map(|t| {
            let blocks = [1, 2, 4].into_iter().flat_map(move |n| [format!("mq_w13_{t}_{n}"), format!("mq_w2_{t}_{n}")]);
            blocks.chain([format!("mq_dequant_{t}"), format!("mq_combine_{t}")])
        })
        .chain(["mq_route".to_owned()])
        .collect();
    let compiled = |image: &Image| {
        let sha256 = Sha256::digest(&image.bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        json!({ "arch": image.arch, "file": image.file(), "sha256": sha256, "nvrtc": image.nvrtc })
    };
    json!({
        "abi": ABI,
        "layout": layout::NAME,
        "family": model.family,
        "hidden": model.sizes[0],
        "inner": model.sizes[1],
        "experts": model.experts,
        "top_k": model.top_k,
        "widths": model.widths(),
        "forms": { "gate_up": model.forms(0), "down": model.forms(1) },
        "threads": 128,
        "tokens_per_item": { "1": 8, "2": 16, "4": 32 },
        "entry_points": entry_points,
        "compiled": images.compiled.iter().map(compiled).collect::<Vec<_>>(),
        "not_compiled": images.left_out,
        "layers": layers,
        "fnv64": files,
        "golden_fnv64": golden,
        "tolerance": { "dequantized": "bit for bit", "layer_bf16": 5e-3 },
    })
}

/// FNV-1a of a file: names what was emitted, and is no proof against malice.
fn fnv(bytes: &[u8]) -> String {
    format!("{:016x}", bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// A tile of each width with the sums of its weights over fixed activations: what the self-test of the Python package decodes anew. One
/// code bit that changes moves a sum by at least one scale.
fn golden(widths: &[u8]) -> Result<Vec<u8>> {
    let mut cases = Vec::new();
    for &bits in widths {
        let codes = (0..16 * 128_usize).map(|i| ((i * 37 + i / 128 * 11 + i / 7) as u8) & (u8::MAX >> (8 - bits))).collect();
        let zeros = crate::Zeros::Half;
        let (group, scale_type) = (crate::Group::Size(32), crate::ScaleType::F32);
        let scales = (0..64).map(|i| (i % 7 + 1) as f32 / 8.0).collect();
        let matrix = QuantizedMatrix { outputs: 16, inputs: 128, bits, group, scale_type, codes, scales, zeros };
        let packed = Packed::new(&matrix)?;
        let weights = matrix.dequantize();
        // Powers of two and sums of small integers: exact in any order.
        let sums: Vec<f64> =
            weights.rows().into_iter().map(|row| row.iter().enumerate().map(|(k, w)| f64::from(*w) * golden_input(k)).sum()).collect();
        let arena = Arena::plan(&[(0, packed.form)], packed.shape)?;
        let mut bytes = vec![0; arena.bytes];
        arena.fill(&mut bytes, 0, &packed)?;
        cases.push(json!({ "bits": bits, "shape": [16, 128], "table": hex(&arena.table()), "arena": hex(&bytes), "sums": sums }));
    }
    Ok(format!("{}\n", json!({ "layout": layout::NAME, "input": "(k % 13) - 6 + k / 128", "cases": cases })).into_bytes())
}

fn golden_input(k: usize) -> f64 {
    (k % 13) as f64 - 6.0 + k as f64 / 128.0
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod refusals;
#[cfg(test)]
mod tests;

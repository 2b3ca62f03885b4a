//! The emitted files, and the emitted kernels run on the CPU against the reference.

use std::path::Path;
use std::process::Command;

use half::{bf16, f16};

use super::*;
use crate::layout::Grid;
use crate::{Group, ScaleType, Zeros, bounds};

fn draw(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    }
}

fn matrix([outputs, inputs]: [usize; 2], bits: u8, group: Group, grid: Grid, seed: u64) -> QuantizedMatrix {
    let mut draw = draw(seed);
    let (top, groups) = (u8::MAX >> (8 - bits), outputs * (inputs / group.len(inputs)));
    let scale_type = if grid == Grid::Offset { ScaleType::F32 } else { [ScaleType::Bf16, ScaleType::F16][seed as usize % 2] };
    QuantizedMatrix {
        outputs,
        inputs,
        bits,
        group,
        scale_type,
        codes: (0..outputs * inputs).map(|_| draw() as u8 & top).collect(),
        scales: (0..groups).map(|_| scale_type.round((draw() % 255 + 1) as f32 / 1024.0 / f32::from(top))).collect(),
        zeros: match grid {
            Grid::Sym => Zeros::Sym,
            Grid::Half => Zeros::Half,
            Grid::Asym => Zeros::Asym((0..groups).map(|_| draw() as u8 & top).collect()),
            Grid::Offset => Zeros::Offset((0..groups).map(|_| (draw() % 100) as f32 / 100.0 * f32::from(top)).collect()),
        },
    }
}

/// Seven experts, one a width, over all grids and groups.
pub(super) struct Case {
    pub(super) model: Model,
    arenas: [Vec<u8>; 2],
    experts: Vec<[Packed; 2]>,
}

const SIZES: [usize; 2] = [160, 96];

pub(super) fn uncompiled() -> Images {
    Images::none("nobody asked")
}

pub(super) fn case() -> Case {
    let [hidden, inner] = SIZES;
    let grids = [Grid::Half, Grid::Sym, Grid::Asym, Grid::Half, Grid::Offset, Grid::Sym, Grid::Half];
    let experts: Vec<[Packed; 2]> = layout::WIDTHS
        .into_iter()
        .enumerate()
        .map(|(e, bits)| {
            let of = |shape, group, seed| matrix(shape, bits, group, grids[e], seed + 3 * e as u64);
            let group = [Group::Size(32), Group::PerChannel][e % 2];
            let gate_up = Packed::gate_up(&of([inner, hidden], group, 2), &of([inner, hidden], group, 4)).unwrap();
            [gate_up, Packed::new(&of([hidden, inner], Group::Size(32), 6)).unwrap()]
        })
        .collect();
    let mut arenas = [Vec::new(), Vec::new()];
    let projections = [0, 1].map(|p| {
        let forms: Vec<_> = experts.iter().enumerate().map(|(e, packed)| (e as u32, packed[p].form)).collect();
        let arena = Arena::plan(&forms, experts[0][p].shape).unwrap();
        arenas[p] = vec![0; arena.bytes];
        experts.iter().enumerate().for_each(|(e, packed)| arena.fill(&mut arenas[p], e as u32, &packed[p]).unwrap());
        (format!("l.{p}"), arena)
    });
    let layers = vec![Layer { index: 0, projections, constants: Vec::new() }];
    Case { model: Model { family: "test".into(), sizes: SIZES, experts: 7, top_k: 3, layers }, arenas, experts }
}

#[test]
fn the_same_checkpoint_gives_the_same_files() {
    let case = case();
    let files = emit(&case.model, &uncompiled()).unwrap();
    assert_eq!(files, emit(&case.model, &uncompiled()).unwrap());
    let text = |name: &str| String::from_utf8(files[name].clone()).unwrap();
    assert!(text("mq_moe.cu").contains("#define MQ_FORMS_13(X) X(8, 5, 0x"));
    let includes: Vec<_> = text("mq_moe.cu").lines().filter(|line| line.starts_with("#include")).map(str::to_owned).collect();
    assert_eq!(includes, ["#include \"mq_host.h\""], "only g++ sees an include");
    let manifest: serde_json::Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
    assert_eq!((&manifest["compiled"], &manifest["widths"][0]), (&json!([]), &json!(8)));
    assert_eq!(manifest["not_compiled"], "nobody asked");
    assert_eq!(manifest["layers"][0]["down"]["widths"]["5"], 1);
    for (path, hash) in manifest["fnv64"].as_object().unwrap() {
        assert_eq!(hash, &fnv(&files[path]));
    }
}

#[test]
fn what_the_kernels_have_no_form_for_is_refused() {
    let said = |change: fn(&mut Model)| {
        let mut model = case().model;
        change(&mut model);
        emit(&model, &uncompiled()).unwrap_err().to_string()
    };
    assert!(said(|m| m.layers.clear()).contains("[export.native]"));
    assert!(said(|m| m.sizes[0] = 161).contains("two at a time"));
    assert!(said(|m| m.layers[0].projections.swap(0, 1)).contains("l.1: [160, 96] with GateUp rows"));
    assert!(said(|m| m.experts = 2000).contains("room for 1024"));
}

/// Runs a compiler; `None`, aloud, where there is none.
pub(super) fn run(command: &mut Command) -> Option<bool> {
    match command.output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let said = String::from_utf8_lossy(&output.stderr);
            // AddressSanitizer says of itself that it may see errors where contexts are switched; there were none.
            let warnings: Vec<&str> = said.lines().filter(|line| !line.is_empty() && !line.contains("makecontext/swapcontext")).collect();
            assert!(warnings.is_empty(), "a warning: {}", warnings.join("\n"));
            Some(true)
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "{command:?}: {error}");
            None
        }
    }
}

pub(super) fn write(dir: &Path, files: &FileSet) {
    for (path, bytes) in files {
        let path = dir.join(path);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, bytes).unwrap();
    }
}

#[test]
fn the_loader_compiles_as_c_without_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &emit(&case().model, &uncompiled()).unwrap());
    let mut cc = Command::new("cc");
    cc.current_dir(dir.path()).args([
        "-std=c11",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Wno-strict-prototypes",
        "-Wno-deprecated-non-prototype",
        "-fPIC",
        "-shared",
        "mq_loader.c",
        "-ldl",
        "-o",
        "l.so",
    ]);
    run(&mut cc);
}

pub(super) fn case_model() -> Model {
    case().model
}

pub(super) fn image(arch: &str, kind: Kind) -> Image {
    Image { arch: arch.into(), kind, bytes: arch.into(), nvrtc: "12.8".into() }
}

#[test]
fn images_are_named_in_the_manifest() {
    let images = Images { compiled: vec![image("sm_80", Kind::Cubin), image("compute_80", Kind::Ptx)], left_out: None };
    let files = emit(&case().model, &images).unwrap();
    assert_eq!(files["cubin/mq_moe.sm_80.cubin"], b"sm_80");
    let manifest: serde_json::Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
    assert_eq!(manifest["not_compiled"], json!(null));
    // printf sm_80 | sha256sum
    let sha256 = "8ab783db555ada18012b870f026ff67d83460b2b21b6ed61a7a89dfbba64d582";
    let first = json!({ "arch": "sm_80", "file": "cubin/mq_moe.sm_80.cubin", "sha256": sha256, "nvrtc": "12.8" });
    assert_eq!((&manifest["compiled"][0], &manifest["compiled"][1]["file"]), (&first, &json!("ptx/mq_moe.compute_80.ptx")));
}

/// The emitted text of the case, and the library that the environment names; says aloud that there is none.
fn compiler() -> Option<(String, crate::nvrtc::Nvrtc)> {
    if std::env::var_os(crate::nvrtc::VARIABLE).is_none() {
        eprintln!("skipped: {} does not name a libnvrtc", crate::nvrtc::VARIABLE);
        return None;
    }
    // One block of tokens stands for all: three would take minutes for each architecture.
    let text = source(&case().model).replace("X(1) X(2) X(4)", "X(1)");
    Some((text, crate::nvrtc::Nvrtc::find(None).unwrap().unwrap()))
}

#[test]
fn emitted_text_compiles_for_every_architecture_without_a_word() {
    let Some((text, nvrtc)) = compiler() else { return };
    let archs = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120"];
    let (images, said) = nvrtc.images(&text, &archs).unwrap();
    assert_eq!((images.compiled.len(), images.left_out, said), (7, None, Vec::new()));
}

#[test]
fn the_python_package_compiles_the_same_images() {
    let Some((text, nvrtc)) = compiler() else { return };
    let (images, _) = nvrtc.images(&text, &["sm_90a"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut files = emit(&case().model, &uncompiled()).unwrap();
    files.insert("mq_moe.cu".to_owned(), text.into_bytes());
    write(dir.path(), &files);
    let compile = dir.path().join("python/moepress_kernels/compile.py");
    let mut python = Command::new("python3");
    python.arg(compile).arg(dir.path().join("mq_moe.cu")).arg("--lib").arg(nvrtc.path()).args(["--archs", "sm_90a", "--keep"]);
    if run(&mut python).is_none() {
        eprintln!("skipped: no python3");
        return;
    }
    for image in &images.compiled {
        assert!(fs_err::read(dir.path().join(image.file())).unwrap() == image.bytes, "{}", image.file());
    }
    let parsed = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    let manifest = parsed(&fs_err::read(dir.path().join("manifest.json")).unwrap());
    let ours = parsed(&emit(&case().model, &images).unwrap()["manifest.json"]);
    assert_eq!((&manifest["compiled"], &manifest["not_compiled"]), (&ours["compiled"], &ours["not_compiled"]));
}

/// A driver that has a device of capability 8.6, 9.0 and so on, and says what it is given to load.
const DRIVER: &str = r#"
#include <stdio.h>
#include <stdlib.h>
int cuInit(unsigned flags) { return (int)flags; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    int arch = atoi(getenv("MQ_TEST_ARCH"));
    *value = which == 75 ? arch / 10 : which == 76 ? arch % 10 : 132;
    return device;
}
int cuModuleLoadData(void **module, const char *image) { *module = (void *)image; puts(image); return 0; }
int cuModuleUnload(void *module) { return !module; }
int cuModuleGetFunction(void) { return 1; }
int cuLaunchKernel(void) { return 1; }
"#;
const OPEN: &str = r#"
#include <stdio.h>
#include "mq_moe.h"
int main(void) {
    mq_model *model;
    int code = mq_open(".", &model);
    if (code) printf("%d: %s\n", code, mq_last_error());
    mq_close(model);
    return 0;
}
"#;

#[test]
fn the_loader_takes_the_image_of_its_device() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &emit(&case().model, &uncompiled()).unwrap());
    let text = [("libcuda.c", DRIVER), ("open.c", OPEN)].map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()));
    write(dir.path(), &FileSet::from(text));
    let cc = |arguments: &[&str]| run(Command::new("cc").current_dir(dir.path()).args(["-D_GNU_SOURCE", "-w"]).args(arguments));
    if cc(&["-shared", "-fPIC", "libcuda.c", "-o", "libcuda.so.1"]).is_none() {
        eprintln!("skipped: no C compiler");
        return;
    }
    cc(&["open.c", "mq_loader.c", "-ldl", "-o", "open"]);
    let opened = |arch: &str| {
        let output = Command::new("./open").current_dir(dir.path()).env("MQ_TEST_ARCH", arch).env("LD_LIBRARY_PATH", ".").output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    fs_err::remove_file(dir.path().join("mq_moe.cu")).unwrap();
    assert!(opened("90").starts_with("2: no cubin for sm_90 and no PTX below ."), "{}", opened("90"));
    assert!(opened("75").contains("older than sm_80"));
    let images = ["cubin/mq_moe.sm_80.cubin", "cubin/mq_moe.sm_86.cubin", "cubin/mq_moe.sm_90a.cubin"];
    write(dir.path(), &images.map(|name| (name.to_owned(), name.as_bytes().to_vec())).into());
    assert_eq!(["80", "86", "87", "90"].map(&opened), [images[0], images[1], images[1], images[2]]);
    assert!(opened("100").starts_with("2: no cubin for sm_100"), "a cubin of another generation is not taken");
    write(dir.path(), &[("ptx/mq_moe.compute_80.ptx".to_owned(), b"ptx".to_vec())].into());
    assert_eq!([opened("100"), opened("86")], ["ptx", images[1]]);
}

/// Activations as 16-bit numbers of one type, and what they are worth.
fn sixteen(value: f32, kind: usize) -> (u16, f64) {
    if kind == 0 {
        (bf16::from_f32(value).to_bits(), bf16::from_f32(value).to_f64())
    } else {
        (f16::from_f32(value).to_bits(), f16::from_f32(value).to_f64())
    }
}

fn worth(bits: u16, kind: usize) -> f64 {
    if kind == 0 { bf16::from_bits(bits).to_f64() } else { f16::from_bits(bits).to_f64() }
}

/// One way to run a layer.
struct Way {
    kind: usize,
    ids_bits: usize,
    blocks: usize,
    map: Option<Vec<i32>>,
    ids: Vec<i64>,
}

impl Case {
    fn inputs(&self, way: &Way) -> (Vec<u8>, Vec<f64>, Vec<f32>) {
        let top_k = self.model.top_k;
        let tokens = way.ids.len() / top_k;
        let mut draw = draw(5);
        let x: Vec<(u16, f64)> = (0..tokens * SIZES[0]).map(|_| sixteen((draw() % 2001) as f32 / 1000.0 - 1.0, way.kind)).collect();
        let weights: Vec<f32> = (0..way.ids.len()).map(|i| (i % 5 + 1) as f32 / 8.0).collect();
        let mut bytes = Vec::new();
        let numbers = [tokens, top_k, self.experts.len(), way.ids_bits, usize::from(way.map.is_some()), way.blocks, way.kind];
        numbers.iter().for_each(|n| bytes.extend((*n as i32).to_le_bytes()));
        self.arenas.iter().for_each(|arena| bytes.extend((arena.len() as u64).to_le_bytes()));
        self.arenas.iter().for_each(|arena| bytes.extend(arena));
        self.model.layers[0].projections.iter().for_each(|(_, arena)| bytes.extend(arena.table()));
        x.iter().for_each(|(bits, _)| bytes.extend(bits.to_le_bytes()));
        for id in &way.ids {
            if way.ids_bits == 64 { bytes.extend(id.to_le_bytes()) } else { bytes.extend((*id as i32).to_le_bytes()) }
        }
        weights.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
        way.map.iter().flatten().for_each(|e| bytes.extend(e.to_le_bytes()));
        (bytes, x.into_iter().map(|(_, x)| x).collect(), weights)
    }

    /// In f64, the activations between the two products rounded as the kernels round them.
    fn reference(&self, way: &Way, x: &[f64], weights: &[f32]) -> Vec<f64> {
        let ([hidden, inner], top_k) = (SIZES, self.model.top_k);
        let mut out = vec![0.0; way.ids.len() / top_k * hidden];
        for (pair, &id) in way.ids.iter().enumerate() {
            let expert = way.map.as_ref().map_or(id, |map| i64::from(map[id as usize]));
            let Ok(expert) = usize::try_from(expert) else { continue };
            let [gates, down] = &self.experts[expert];
            let (gates, down) = (gates.dequantize().unwrap(), &down.dequantize().unwrap()[0]);
            let row = &x[pair / top_k * hidden..][..hidden];
            let dot = |weights: &[f32], x: &[f64]| weights.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
            let mid: Vec<f64> = (0..inner)
                .map(|i| {
                    let [gate, up] = [0, 1].map(|m: usize| dot(gates[m].row(i).as_slice().unwrap(), row));
                    sixteen((gate / (1.0 + (-gate).exp()) * up) as f32, way.kind).1
                })
                .collect();
            for h in 0..hidden {
                out[pair / top_k * hidden + h] += f64::from(weights[pair]) * dot(down.row(h).as_slice().unwrap(), &mid);
            }
        }
        out
    }
}

#[test]
fn the_emitted_kernels_run_on_the_host_as_the_reference_says() {
    let Ok(flags) = std::env::var("MOEPRESS_HOST") else {
        eprintln!(
            "skipped: MOEPRESS_HOST does not hold the compiler's flags (such as -fsanitize=address,undefined): the build takes half a minute"
        );
        return;
    };
    let case = case();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs_err::write(path("mq_moe.cu"), source(&case.model).replace("X(1) X(2) X(4)", "X(1) X(4)")).unwrap();
    fs_err::write(path("mq_host.h"), include_str!("../../cuda/mq_host.h")).unwrap();
    fs_err::write(path("main.cpp"), include_str!("../../cuda/mq_host_main.cpp")).unwrap();
    let mut gpp = Command::new("g++");
    gpp.current_dir(dir.path()).args(["-std=c++17", "-w", "-DMQ_STAGE=8"]).args(flags.split_whitespace()).args(["main.cpp", "-o", "host"]);
    if run(&mut gpp).is_none() {
        eprintln!("skipped: no g++");
        return;
    }
    // Every expert, one alone, one twice by the same token, one that is not here.
    let ids = |tokens: usize| (0..tokens * 3).map(|i| (i * i + i / 3) as i64 % 7).collect::<Vec<_>>();
    let ways = [
        Way { kind: 0, ids_bits: 32, blocks: 1, map: None, ids: ids(5) },
        Way { kind: 1, ids_bits: 64, blocks: 4, map: None, ids: [vec![3; 33], ids(3)].concat() },
        Way { kind: 0, ids_bits: 64, blocks: 1, map: Some(vec![1, 0, -1, 3, 4, 6, 5]), ids: ids(4) },
    ];
    for (index, way) in ways.iter().enumerate() {
        let (bytes, x, weights) = case.inputs(way);
        fs_err::write(path("in"), bytes).unwrap();
        let mut host = Command::new(path("host"));
        // Fibers on the heap are no stack that the sanitizer knows.
        host.current_dir(dir.path()).env("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0").args(["in", "out"]);
        run(&mut host);
        let found = fs_err::read(path("out")).unwrap();
        let (parts, rest) = found.split_at(way.ids.len() * SIZES[0] * 4);
        let (out, weights16) = rest.split_at(way.ids.len() / 3 * SIZES[0] * 2);
        assert_eq!(parts.len(), way.ids.len() * SIZES[0] * 4);
        let out: Vec<f64> = out.as_chunks().0.iter().map(|&b| worth(u16::from_le_bytes(b), way.kind)).collect();
        let meant = case.reference(way, &x, &weights);
        let (apart, whole) = out.iter().zip(&meant).fold((0.0, 0.0), |(a, w), (o, m)| (a + (o - m).powi(2), w + m * m));
        assert!((apart / whole).sqrt() <= bounds::LAYER, "way {index}: {}", (apart / whole).sqrt());
        // Dequantized weights, bit for bit: of each entry in the table's order, gate before up, then down.
        let mut at = weights16.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b));
        for p in 0..2 {
            for entry in &case.model.layers[0].projections[p].1.entries {
                let matrices = case.experts[entry.expert as usize][p].dequantize().unwrap();
                let wrong = matrices.iter().flatten().filter(|w| at.next() != Some(sixteen(**w, way.kind).0)).count();
                assert_eq!(wrong, 0, "way {index}: {} bits, projection {p}", entry.form.bits);
            }
        }
    }
}

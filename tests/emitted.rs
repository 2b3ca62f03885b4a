//! Kernels beside a native output, from the command line: written, compiled, taken away with their weights.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod place;

use place::{Place, small_recipe};

#[test]
fn kernels_come_with_a_native_output_and_go_with_its_weights() {
    let place = Place::new();
    let recipe =
        small_recipe("rtn").replace("[export.compressed_tensors]\n[export.dense]\n", "[export.native]\n[export.kernels]\narchs = []\n");
    place.write("r.toml", &recipe);
    place.done(&["run", "r.toml", "-q"]);
    let manifest = || -> Option<serde_json::Value> {
        Some(serde_json::from_slice(&fs_err::read(place.path().join("out/kernels/manifest.json")).ok()?).unwrap())
    };
    assert_eq!(manifest().unwrap()["widths"], serde_json::json!([4]));
    let emitted = fs_err::read(place.path().join("out/kernels/mq_moe.cu")).unwrap();
    fs_err::remove_dir_all(place.path().join("out/kernels")).unwrap();
    place.done(&["emit", "out", "--archs"]);
    assert_eq!(manifest().unwrap()["not_compiled"], "no architecture was asked for");
    assert!(emitted == fs_err::read(place.path().join("out/kernels/mq_moe.cu")).unwrap());
    place.done(&["apply", "r.toml", "-q", "--force", "--set", "allocate.bits=3"]);
    assert_eq!(manifest().unwrap()["widths"], serde_json::json!([3]));
    place.write("r.toml", &recipe.replace("[export.kernels]\narchs = []\n", ""));
    place.done(&["apply", "r.toml", "-q", "--force"]);
    assert!(manifest().is_none());
}

#[test]
fn kernels_are_compiled_by_the_library_that_is_named() {
    let place = Place::new();
    let recipe = small_recipe("rtn")
        .replace("[export.compressed_tensors]\n[export.dense]\n", "[export.native]\n[export.kernels]\nnvrtc = \"no.so\"\n");
    place.write("r.toml", &recipe);
    let said = place.said(&["check", "r.toml"]);
    assert!(said.contains("no.so is no library") && said.contains("archs = []"), "{said}");
    let Some(library) = std::env::var_os("MOEPRESS_NVRTC") else {
        eprintln!("skipped: MOEPRESS_NVRTC does not name a libnvrtc");
        return;
    };
    let library = library.into_string().unwrap();
    place.write("r.toml", &recipe.replace("no.so", &library).replace("[export.kernels]", "[export.kernels]\narchs = [\"sm_90a\"]"));
    place.done(&["run", "r.toml", "-q"]);
    let read = |name: &str| fs_err::read(place.path().join("out/kernels").join(name)).unwrap();
    let (manifest, cubin) = (read("manifest.json"), read("cubin/mq_moe.sm_90a.cubin"));
    fs_err::remove_dir_all(place.path().join("out/kernels")).unwrap();
    assert!(place.said(&["emit", "out", "--nvrtc", "no.so"]).contains("no.so"));
    assert!(!place.path().join("out/kernels").exists(), "nothing is half written");
    let said = place.done(&["emit", "out", "--nvrtc", &library, "--archs=sm_90a"]);
    assert!(said.contains("compiled for sm_90a, compute_80"), "{said}");
    assert!(manifest == read("manifest.json") && cubin == read("cubin/mq_moe.sm_90a.cubin"));
}

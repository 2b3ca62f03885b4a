//! The emitted kernels as a project of Hugging Face's `kernels`: `build.toml` of edition 5 with `[torch-noarch]`, the Python package in
//! `torch-ext/moepress_kernels`, and everything that a loader needs inside that package, below `kernels/`.
//!
//! Nothing has to be built: kernel-builder copies `torch-ext/moepress_kernels` for each backend and adds `metadata.json` and `_ops.py`, then
//! `kernels.get_kernel` imports it. The package imports itself relatively and nothing but torch unless transformers is there, as the Hub
//! asks of kernels.

use super::{FileSet, Images, Model};

const BUILD: &str = include_str!("../../python/hub/build.toml");
const FLAKE: &str = include_str!("../../python/hub/flake.nix");
const CARD: &str = include_str!("../../python/hub/CARD.md");
const TESTS: &str = include_str!("../../python/hub/tests/test_moepress_kernels.py");

/// The project below `hf/`, from the files that were emitted already, the manifest among them.
pub(super) fn project(files: &FileSet, model: &Model, images: &Images) -> FileSet {
    const PACKAGE: &str = "python/moepress_kernels/";
    let mut project = FileSet::new();
    for (path, bytes) in files {
        let to = match path.strip_prefix(PACKAGE) {
            Some(module) => module.to_owned(),
            None if path.starts_with("python/") => continue,
            None => format!("kernels/{path}"),
        };
        project.insert(format!("hf/torch-ext/moepress_kernels/{to}"), bytes.clone());
    }
    for (path, text) in [("build.toml", BUILD), ("flake.nix", FLAKE), ("tests/__init__.py", ""), ("tests/test_moepress_kernels.py", TESTS)]
    {
        project.insert(format!("hf/{path}"), text.as_bytes().to_vec());
    }
    project.insert("hf/CARD.md".to_owned(), card(model, images).into_bytes());
    project
}

fn card(model: &Model, images: &Images) -> String {
    let widths = model.widths().iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
    let archs = images.compiled.iter().map(|image| image.arch.as_str()).collect::<Vec<_>>().join(", ");
    let compiled = if archs.is_empty() { "not compiled yet, the loader does that".to_owned() } else { format!("compiled for {archs}") };
    let numbers = [
        ("{family}", model.family.clone()),
        ("{experts}", model.experts.to_string()),
        ("{hidden}", model.sizes[0].to_string()),
        ("{inner}", model.sizes[1].to_string()),
        ("{top_k}", model.top_k.to_string()),
        ("{widths}", widths),
        ("{compiled}", compiled),
    ];
    numbers.into_iter().fold(CARD.to_owned(), |text, (name, value)| text.replace(name, &value))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{case_model, image};
    use super::super::{Images, Kind, emit};

    #[test]
    fn the_package_holds_all_that_a_loader_needs() {
        let images = Images { compiled: vec![image("sm_80", Kind::Cubin)], left_out: None };
        let files = emit(&case_model(), &images).unwrap();
        let package = "hf/torch-ext/moepress_kernels";
        for (there, here) in [
            ("__init__.py", "python/moepress_kernels/__init__.py"),
            ("cuda.py", "python/moepress_kernels/cuda.py"),
            ("integration.py", "python/moepress_kernels/integration.py"),
            ("kernels/manifest.json", "manifest.json"),
            ("kernels/mq_moe.cu", "mq_moe.cu"),
            ("kernels/mq_loader.c", "mq_loader.c"),
            ("kernels/cubin/mq_moe.sm_80.cubin", "cubin/mq_moe.sm_80.cubin"),
            ("kernels/tests/golden.json", "tests/golden.json"),
        ] {
            assert!(files[&format!("{package}/{there}")] == files[here], "{there}");
        }
        let text = |name: &str| String::from_utf8(files[name].clone()).unwrap();
        let endings = text("hf/build.toml").lines().find(|line| line.starts_with("pyext")).unwrap().to_owned();
        for path in files.keys().filter(|path| path.starts_with(package)) {
            let ending = path.rsplit('.').next().unwrap();
            assert!(endings.contains(&format!("\"{ending}\"")), "{path}: kernel-builder copies {endings} alone");
        }
        let card = text("hf/CARD.md");
        assert!(
            card.contains("test, 7 experts of [96, 160], 3 a token, codes of 8, 6, 5, 4, 3, 2, 1 bits")
                && card.contains("compiled for sm_80")
        );
        assert!(!card.contains(['{', '}']), "{card}");
    }
}

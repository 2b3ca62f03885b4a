//! The rules that keep the project a house, as tests over its source text.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Longest file of code.
const LINES: usize = 600;

/// The top level beside dotfiles and what git ignores.
const TOP: [&str; 9] = ["Cargo.lock", "Cargo.toml", "LICENSE", "README.md", "calib", "compress", "configs", "kernels", "tests"];

/// Folders of `compress/src` and the modules of `compress` that they must not know. `allocate` may use `quantize`.
const STRANGERS: [(&str, &[&str]); 5] = [
    ("allocate", &["recipe", "plan", "apply", "cli", "prune", "merge", "export"]),
    ("export", &["recipe", "plan", "apply", "cli", "prune", "merge", "quantize", "allocate"]),
    ("merge", &["recipe", "plan", "apply", "cli", "prune", "quantize", "allocate", "export"]),
    ("prune", &["recipe", "plan", "apply", "cli", "merge", "quantize", "allocate", "export"]),
    ("quantize", &["recipe", "plan", "apply", "cli", "prune", "merge", "allocate", "export"]),
];

/// Folders whose methods do no IO, no logging and look at no clock, and what they would need for it.
const PURE: [&str; 4] = ["allocate", "merge", "prune", "quantize"];
const IMPURE: [&str; 7] = ["fs_err", "std::fs", "std::io", "std::net", "std::time", "tracing", "std::env"];

/// Crates that one file alone names.
const WALLS: [(&str, &str); 3] =
    [("faer", "calib/src/linalg.rs"), ("libloading", "kernels/src/nvrtc.rs"), ("memmap2", "calib/src/checkpoint/shard.rs")];

/// Where `unsafe` may stand: a file is mapped, a GPU or its compiler is called, gemm multiplies (it takes pointers alone), SIMD is dispatched.
const UNSAFE: [&str; 5] =
    ["calib/src/checkpoint/shard.rs", "calib/src/device.rs", "calib/src/linalg.rs", "kernels/src/nvrtc.rs", "kernels/src/simd.rs"];

/// Where something may be printed.
const PRINT: [&str; 3] = ["compress/src/main.rs", "compress/src/cli", "compress/src/report"];

/// One source file, its path from the root with `/` between its parts.
struct Source {
    path: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every file below the root with one of these endings, without what git ignores.
fn sources(endings: &[&str]) -> Vec<Source> {
    let (root, mut found) = (root(), Vec::new());
    let mut folders: Vec<PathBuf> = ["kernels", "calib", "compress", "tests"].iter().map(|name| root.join(name)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = entry.file_name().unwrap().to_string_lossy().into_owned();
            if entry.is_dir() && !["target", "out", ".venv", "__pycache__"].contains(&name.as_str()) {
                folders.push(entry);
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                let path = entry.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
                found.push(Source { path, text: fs_err::read_to_string(&entry).unwrap() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// The lines without comments, doc comments among them.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The modules at the crate's root that this text names: `crate::a`, `crate::{a, b::c}`, and `super::` as often as
/// reaches the root from a file `depth` modules deep.
fn modules(text: &str, depth: usize) -> BTreeSet<String> {
    let code = code(text);
    let prefixes = ["crate::".to_string(), "super::".repeat(depth)];
    let mut found = BTreeSet::new();
    for prefix in prefixes.iter().filter(|prefix| !prefix.is_empty()) {
        for (at, _) in code.match_indices(prefix.as_str()) {
            let continues = code[..at].ends_with("::") || code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if !continues {
                found.extend(heads(&code[at + prefix.len()..]));
            }
        }
    }
    found
}

/// First names of a path or of a braced list of paths.
fn heads(path: &str) -> Vec<String> {
    let name = |part: &str| part.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(list) = path.strip_prefix('{') else { return vec![name(path)] };
    let (mut depth, mut heads, mut start) = (0, Vec::new(), 0);
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                heads.push(name(&list[start..at]));
                start = at + 1;
                if letter == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

/// How many modules deep the file of `path` (from the crate's `src`) lies: `quantize/mod.rs` 1, `quantize/rtn.rs` 2.
fn depth(path: &str) -> usize {
    path.split('/').count() - usize::from(path.ends_with("/mod.rs"))
}

/// Whether the crate or module is named in the code, as a path or in a `use`.
fn names(text: &str, what: &str) -> bool {
    let code = code(text);
    code.match_indices(what).any(|(at, _)| {
        let before = code[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let after = code[at + what.len()..].trim_start();
        !before && (after.starts_with("::") || after.starts_with(';') || after.starts_with(','))
    })
}

fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

#[test]
fn no_file_of_code_is_too_long() {
    let files = sources(&[".rs", ".py", ".sh", ".cu", ".cuh"]);
    let long: Vec<_> = files.iter().map(|file| (file.text.lines().count(), &file.path)).filter(|(lines, _)| *lines > LINES).collect();
    assert_none(&long.iter().map(|(lines, path)| format!("{path}: {lines} lines")).collect::<Vec<_>>(), "a file has at most 600 lines");
    assert!(files.len() > 20, "only {} files of code were found", files.len());
}

#[test]
fn every_file_has_a_heading() {
    let bare = |file: &Source| {
        let mut lines = file.text.lines().skip_while(|line| line.starts_with("#!"));
        let start = if file.path.ends_with(".rs") { "//! " } else { "\"\"\"" };
        !lines.next().is_some_and(|line| line.starts_with(start) && line.len() > start.len())
    };
    let found: Vec<_> = sources(&[".rs", ".py"]).into_iter().filter(bare).map(|file| file.path).collect();
    assert_none(&found, "a file begins with a heading that says what it is");
}

#[test]
fn the_top_level_is_the_house() {
    let built = ["target", "out"];
    let entries = fs_err::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let found: BTreeSet<_> = entries.filter(|name| !name.starts_with('.') && !built.contains(&name.as_str())).collect();
    assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), TOP);
}

#[test]
fn methods_do_not_know_those_who_call_them() {
    let mut found = Vec::new();
    for file in sources(&[".rs"]) {
        let Some(path) = file.path.strip_prefix("compress/src/") else { continue };
        for (room, strangers) in STRANGERS {
            if path.split('/').next() == Some(room) || path == format!("{room}.rs") {
                let met = modules(&file.text, depth(path));
                found.extend(strangers.iter().filter(|name| met.contains(**name)).map(|name| format!("{} names {name}", file.path)));
            }
        }
    }
    assert_none(&found, "an import points up");
}

#[test]
fn methods_are_pure() {
    let mut found = Vec::new();
    for file in sources(&[".rs"]) {
        let Some(path) = file.path.strip_prefix("compress/src/") else { continue };
        if PURE.iter().any(|room| path.split('/').next() == Some(*room)) {
            found.extend(IMPURE.iter().filter(|what| names(&file.text, what)).map(|what| format!("{} names {what}", file.path)));
        }
    }
    assert_none(&found, "a method does no IO, no logging and looks at no clock");
}

#[test]
fn a_library_behind_a_wall_is_named_in_one_file() {
    let mut found = Vec::new();
    for file in sources(&[".rs"]) {
        if file.path.starts_with("tests/") {
            continue;
        }
        let walls = WALLS.iter().filter(|(library, only)| file.path != *only && names(&file.text, library));
        found.extend(walls.map(|(library, only)| format!("{} names {library}, which is {only}'s", file.path)));
    }
    assert_none(&found, "a library stands behind one file");
}

#[test]
fn lints_are_lifted_only_where_the_house_says() {
    let mut found = Vec::new();
    for file in sources(&[".rs"]) {
        let code = code(&file.text);
        for (lint, rooms) in [("unsafe_code", &UNSAFE[..]), ("print_stdout", &PRINT[..]), ("print_stderr", &PRINT[..])] {
            let lifted = code.contains(&format!("allow({lint}")) || code.contains(&format!("allow(clippy::{lint}"));
            if lifted && !file.path.starts_with("tests/") && !rooms.iter().any(|room| file.path.starts_with(room)) {
                found.push(format!("{} lifts {lint}", file.path));
            }
        }
    }
    assert_none(&found, "a lint is lifted outside its rooms");
}

#[test]
fn the_reader_of_imports_sees_every_form() {
    let text =
        "use crate::plan::Plan;\nuse crate::{Error, recipe::{Recipe, X}, apply};\nlet a = super::super::cli::run(); // crate::export\n";
    let found = modules(text, 2);
    assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), ["Error", "apply", "cli", "plan", "recipe"]);
    assert!(!modules("use super::gptq;", 2).contains("gptq"), "a sibling is not a module of the root");
    assert!(modules("use super::gptq;", depth("quantize/mod.rs")).contains("gptq"));
    assert!(names("use faer::Mat;", "faer") && names("let x = std::fs::read(p);", "std::fs") && !names("// faer::Mat", "faer"));
}

//! A directory to run the program in, for the tests that see it from outside.
#![allow(dead_code, reason = "each test target uses a part of it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The project's top folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The bundled model.
pub fn model() -> PathBuf {
    root().join("tests/models/moe-4m")
}

/// A bundled text: `calib/en.txt`.
pub fn text(name: &str) -> PathBuf {
    root().join("tests/models/text").join(name)
}

/// A recipe over the bundled model that takes about a second: `quantizer` is `gptq` or `rtn`.
pub fn small_recipe(quantizer: &str) -> String {
    let (model, code, en) = (model(), text("calib/code.txt"), text("calib/en.txt"));
    let test = text("test/en.txt");
    let [model, code, en, test] = [&model, &code, &en, &test].map(|path| path.display());
    format!(
        "schema = 1\nmodel = \"{model}\"\nout = \"out\"\n\n[calibrate]\ncorpus = [\"{code}\", \"{en}\"]\nsamples = 8\ntokens = 64\n\n\
         [quantize.{quantizer}]\n\n[allocate]\nbits = 4\n\n[export.compressed_tensors]\n[export.dense]\n\n\
         [evaluate]\ntext = [\"{test}\"]\ncontext = 64\nmax_tokens = 256\n"
    )
}

/// A fresh directory to run in, with what was said about it made the same on every machine.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn write(&self, name: &str, text: &str) -> &Self {
        let path = self.path().join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, text).unwrap();
        self
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moepress"));
        command.args(args).current_dir(self.path()).env_remove("RUST_LOG").env("NO_COLOR", "1");
        command
    }

    /// Runs it and wants it to succeed; gives standard output.
    pub fn done(&self, args: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        assert!(status.success(), "moepress {}: {status}\n{}", args.join(" "), String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).unwrap()
    }

    /// Exit code, standard output and standard error, as one text.
    pub fn said(&self, args: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let code = status.code().map_or_else(|| status.to_string(), |code| code.to_string());
        let mut text = format!("$ moepress {}\n", args.join(" "));
        text += &String::from_utf8(stdout).unwrap();
        let errors = String::from_utf8(stderr).unwrap();
        if !errors.is_empty() {
            text += &format!("--- standard error\n{errors}");
        }
        text += &format!("--- exit {code}\n");
        let here = fs_err::canonicalize(self.path()).unwrap();
        let mut text = text.replace(&format!("{}/", here.display()), "").replace(&format!("{}/", self.path().display()), "");
        text = text.replace(&format!("{}", fs_err::canonicalize(root()).unwrap().display()), "ROOT");
        text.replace(&format!("{}", root().display()), "ROOT").lines().map(|line| format!("{}\n", without_time(line.trim_end()))).collect()
    }

    /// Every file below `name` by its path, but markers, which hold what a stage cost, and the lock.
    pub fn files(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let top = self.path().join(name);
        let (mut found, mut folders) = (BTreeMap::new(), vec![top.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() {
                    folders.push(entry);
                } else if entry.extension().is_none_or(|e| e != "done") && !entry.ends_with("moepress/lock") {
                    let name = entry.strip_prefix(&top).unwrap().to_string_lossy().into_owned();
                    found.insert(name, fs_err::read(&entry).unwrap());
                }
            }
        }
        found
    }
}

/// A JSON log line without the time it was written at.
fn without_time(line: &str) -> String {
    match line.split_once("{\"timestamp\":\"").and_then(|(_, rest)| rest.split_once("\",")) {
        Some((_, rest)) => format!("{{{rest}"),
        None => line.to_owned(),
    }
}

/// Fails with the names of the files in which two outputs differ.
pub fn assert_same(ours: &BTreeMap<String, Vec<u8>>, theirs: &BTreeMap<String, Vec<u8>>, what: &str) {
    let names: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let differ: Vec<_> = names.into_iter().filter(|name| ours.get(*name) != theirs.get(*name)).collect();
    assert!(differ.is_empty(), "{what}: these files differ: {differ:?}");
    assert!(ours.len() > 10, "{what}: only {} files", ours.len());
}

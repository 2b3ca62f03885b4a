//! The command line from outside: help pages, errors and results as a person sees them, as snapshots.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// A fresh directory to run in, with what was said about it made the same on every machine.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        fs_err::write(self.path().join(name), text).unwrap();
        self
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moepress"));
        command.args(args).current_dir(self.path()).env_remove("RUST_LOG").env("NO_COLOR", "1");
        command
    }

    /// Exit code, standard output and standard error, as one text.
    fn said(&self, args: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let code = status.code().map_or_else(|| status.to_string(), |code| code.to_string());
        let mut text = format!("$ moepress {}\n", args.join(" "));
        text += &String::from_utf8(stdout).unwrap();
        let errors = String::from_utf8(stderr).unwrap();
        if !errors.is_empty() {
            text += &format!("--- standard error\n{errors}");
        }
        text += &format!("--- exit {code}\n");
        let text = text.replace(&format!("{}/", self.path().display()), "").replace(&format!("{}", root().display()), "ROOT");
        text.lines().map(|line| format!("{}\n", without_time(line.trim_end()))).collect()
    }
}

/// A JSON log line without the time it was written at.
fn without_time(line: &str) -> String {
    match line.split_once("{\"timestamp\":\"").and_then(|(_, rest)| rest.split_once("\",")) {
        Some((_, rest)) => format!("{{{rest}"),
        None => line.to_owned(),
    }
}

macro_rules! snapshot {
    ($name:expr, $said:expr) => {
        insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!($name, $said);
        });
    };
}

/// A recipe with nothing wrong but that its model is not there.
const RECIPE: &str = r#"schema = 1
model = "model"
out = "out"

[quantize.rtn]

[allocate]
bits = 4

[export.dense]
"#;

#[test]
fn help_pages() {
    let place = Place::new();
    for command in ["inspect", "check", "run", "calibrate", "plan", "apply", "eval", "schema", "completions"] {
        snapshot!(format!("help-{command}"), place.said(&[command, "--help"]));
    }
    snapshot!("help", place.said(&["--help"]));
}

#[test]
fn wrong_usage_exits_with_2() {
    let place = Place::new();
    let said: String = [
        &[][..],
        &["compress"],
        &["run"],
        &["run", "r.toml", "--quiet", "-v"],
        &["check", "r.toml", "--threads", "0"],
        &["eval", "model"],
        &["eval", "model", "--tokens", "ids.json"],
        &["eval", "model", "--text", "a.txt", "--device", "tpu"],
    ]
    .iter()
    .map(|args| place.said(args) + "\n")
    .collect();
    assert_eq!(said.matches("--- exit 2").count(), 8, "{said}");
    snapshot!("wrong-usage", said);
}

#[test]
fn the_first_thing_that_is_not_the_forms_stops_the_reader() {
    let place = Place::new();
    place.write("syntax.toml", "schema = 1\nmodel = \"m\n");
    place.write("type.toml", &RECIPE.replace("bits = 4", "bits = \"four\""));
    place.write("key.toml", &RECIPE.replace("bits", "bit"));
    place.write("section.toml", &RECIPE.replace("[quantize.rtn]", "[quantize.gtpq]"));
    place.write("good.toml", RECIPE);
    let said: String = [
        &["check", "absent.toml"][..],
        &["check", "syntax.toml"],
        &["check", "type.toml"],
        &["check", "key.toml"],
        &["check", "section.toml"],
        &["check", "good.toml", "--set", "allocate.bit=3"],
        &["check", "good.toml", "--set", "allocate.bits"],
        &["check", "good.toml", "--set", "out=elsewhere"],
    ]
    .iter()
    .map(|args| place.said(args) + "\n")
    .collect();
    assert_eq!(said.matches("--- exit 2").count(), 8, "{said}");
    snapshot!("recipe-form", said);
}

#[test]
fn every_problem_of_value_is_told_at_once() {
    let place = Place::new();
    place.write(
        "r.toml",
        "schema = 2\nout = \"o\"\n\n[calibrate]\ncorpus = [\"absent.txt\"]\n\n[quantize.gptq]\n\n[allocate]\nbits = 1\nbytes = \"1GB\"\n",
    );
    let said = place.said(&["check", "r.toml"])
        + "\n"
        + &place.said(&["check", "r.toml", "--set", "allocate.bits_per_weight=2.5", "--log-format", "json"]);
    assert_eq!(said.matches("--- exit 2").count(), 2, "{said}");
    snapshot!("recipe-values", said);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    let mut child = place.command(&["schema"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The pipe is closed before anything is read from it.
    drop(child.stdout.take());
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert_eq!((status.code(), String::from_utf8(stderr).unwrap().as_str()), (Some(0), ""));
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let said = Place::new().said(&["completions", shell]);
        assert!(["inspect", "check", "calibrate", "eval"].iter().all(|command| said.contains(command)), "{shell}");
    }
}

//! The command line from outside: help pages, errors and results as a person sees them, as snapshots.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod methods;
mod place;
mod shapes;

use std::process::{Output, Stdio};

use place::{Place, model, small_recipe, text};

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
    for command in ["inspect", "check", "run", "calibrate", "plan", "apply", "eval", "imatrix", "emit", "schema", "completions"] {
        snapshot!(format!("help-{command}"), place.said(&[command, "--help"]));
    }
    snapshot!("help-stats-merge", place.said(&["stats", "merge", "--help"]));
    snapshot!("help-stats-show", place.said(&["stats", "show", "--help"]));
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

/// What differs between machines as `#`, in columns of one space: scores and costs.
fn masked(text: &str) -> String {
    // `for` begins the last line: whether an expert saw few tokens hangs on single choices of a router.
    let varies = ["en", "all", "calibrate", "plan", "apply", "export", "evaluate", "for"];
    let cell = |cell: &str| if cell.contains(|c: char| c.is_ascii_digit()) { "#".to_owned() } else { cell.to_owned() };
    let line = |line: &str| {
        let cells: Vec<&str> = line.split_whitespace().collect();
        let name = cells.iter().find(|cell| **cell != "|");
        let cells: Vec<String> = match name {
            Some(name) if varies.contains(name) => cells.into_iter().map(cell).collect(),
            _ => cells.into_iter().map(str::to_owned).collect(),
        };
        cells.join(" ") + "\n"
    };
    text.lines().map(line).collect()
}

#[test]
fn inspect_says_what_a_checkpoint_is() {
    let place = Place::new();
    let model = model();
    let said = place.said(&["inspect", model.to_str().unwrap()]);
    snapshot!("inspect", said);
    let json: serde_json::Value = serde_json::from_str(&place.done(&["inspect", model.to_str().unwrap(), "--json"])).unwrap();
    assert_eq!((json["family"].as_str(), json["parameters"].as_u64()), (Some("qwen3_moe"), Some(3_872_128)));
    assert_eq!((json["experts"].as_u64(), json["top_k"].as_u64()), (Some(8), Some(2)));
    let fp8 = place::root().join("tests/parity/deepseek_v3_fp8");
    snapshot!("inspect-fp8", place.said(&["inspect", fp8.to_str().unwrap()]));
    let listed = place.done(&["inspect", model.to_str().unwrap(), "-v"]);
    assert!(listed.contains("model.layers.3.mlp.experts.7.down_proj.weight"), "{listed}");
}

#[test]
fn a_shape_only_checkpoint_is_inspected_checked_and_planned() {
    let place = Place::new();
    place.done(&["inspect", model().to_str().unwrap(), "--shape-only", "shape"]);
    place.write("r.toml", &small_recipe("gptq"));
    let said: String = [
        &["inspect", "shape"][..],
        &["check", "r.toml", "--model", "shape"],
        &["plan", "r.toml", "--model", "shape"],
        &["run", "r.toml", "--model", "shape"],
        &["calibrate", "r.toml", "--model", "shape"],
        &["eval", "shape", "--text", text("test/en.txt").to_str().unwrap()],
    ]
    .iter()
    .map(|args| place.said(args) + "\n")
    .collect();
    assert_eq!((said.matches("--- exit 0").count(), said.matches("--- exit 1").count()), (3, 3), "{said}");
    snapshot!("shape-only", said);
    let plan: serde_json::Value = serde_json::from_slice(&fs_err::read(place.path().join("out/moepress/plan.json")).unwrap()).unwrap();
    assert_eq!(plan["tensors"].as_object().unwrap().len(), 134);
    // What was planned without data is not what a run goes on from.
    place.done(&["run", "r.toml", "-q"]);
    let plan: serde_json::Value = serde_json::from_slice(&fs_err::read(place.path().join("out/moepress/plan.json")).unwrap()).unwrap();
    assert!(plan["corpus"].is_string());
}

#[test]
fn a_run_reports_and_is_done_once() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("gptq"));
    let first = place.said(&["run", "r.toml", "--quiet"]);
    snapshot!("run", masked(&first));
    assert!(first.contains("quantized to 4.125 stored bits a weight") && first.contains("the result lies in out"), "{first}");
    let again = place.said(&["run", "r.toml", "--quiet"]);
    assert!(
        again.contains("out is complete for this recipe, model and texts: nothing to do") && again.ends_with("--- exit 0\n"),
        "{again}"
    );
    let json: serde_json::Value = serde_json::from_str(&place.done(&["run", "r.toml", "--json"])).unwrap();
    let all = &json["report"]["evaluation"]["all"];
    // 4 windows of 64 tokens score 63 each. 4 bits cost a little on real weights, and not nothing.
    assert_eq!(all["tokens"], 252);
    assert!((0.001..0.2).contains(&all["kl"].as_f64().unwrap()), "{all}");
    assert!((0.7..1.0).contains(&all["top1"].as_f64().unwrap()), "{all}");
    assert_eq!(json["stages"].as_object().unwrap().len(), 5);
    let report = fs_err::read_to_string(place.path().join("out/moepress/report.md")).unwrap();
    snapshot!("report", masked(&report));
}

#[test]
fn kernels_come_with_a_native_output_and_go_with_its_weights() {
    let place = Place::new();
    let recipe = small_recipe("rtn").replace("[export.compressed_tensors]\n[export.dense]\n", "[export.native]\n[export.kernels]\n");
    place.write("r.toml", &recipe);
    place.done(&["run", "r.toml", "-q"]);
    let manifest = || -> Option<serde_json::Value> {
        Some(serde_json::from_slice(&fs_err::read(place.path().join("out/kernels/manifest.json")).ok()?).unwrap())
    };
    assert_eq!(manifest().unwrap()["widths"], serde_json::json!([4]));
    let emitted = fs_err::read(place.path().join("out/kernels/mq_moe.cu")).unwrap();
    fs_err::remove_dir_all(place.path().join("out/kernels")).unwrap();
    place.done(&["emit", "out"]);
    assert!(emitted == fs_err::read(place.path().join("out/kernels/mq_moe.cu")).unwrap());
    place.done(&["apply", "r.toml", "-q", "--force", "--set", "allocate.bits=3"]);
    assert_eq!(manifest().unwrap()["widths"], serde_json::json!([3]));
    place.write("r.toml", &recipe.replace("[export.kernels]\n", ""));
    place.done(&["apply", "r.toml", "-q", "--force"]);
    assert!(manifest().is_none());
}

/// Statistics of two passes over the bundled model, in `a` and `b`.
fn two_passes(place: &Place) {
    place.write("r.toml", &small_recipe("gptq"));
    for (out, name) in [("a", "calib/code.txt"), ("b", "calib/en.txt")] {
        let corpus = format!("calibrate.corpus=[\"{}\"]", text(name).display());
        place.done(&["calibrate", "r.toml", "--quiet", "--out", out, "--set", &corpus]);
    }
}

#[test]
fn statistics_are_added_up_and_shown() {
    let place = Place::new();
    two_passes(&place);
    let merged = place.said(&["stats", "merge", "a", "b/moepress/stats", "--out", "sum"]);
    snapshot!("stats-merge", merged);
    // Counts depend on the machine in their last choices; the form does not.
    let digits = regex::Regex::new("[0-9]+([.][0-9]+)?").unwrap();
    let shades = regex::Regex::new("(?m)^( +#)  [!.:=+*#-]{8}$").unwrap();
    let shown = place.said(&["stats", "show", "sum", "--svg", "heat.svg"]);
    let hashes = regex::Regex::new("[0-9a-f]{12}\n").unwrap();
    let shown = hashes.replace_all(&shown, "HASH\n").into_owned();
    let shown = shades.replace_all(&digits.replace_all(&shown, "#"), "$1  (a shade an expert)").into_owned();
    let spaces = regex::Regex::new(" +").unwrap();
    snapshot!("stats-show", spaces.replace_all(&shown, " "));
    let svg = fs_err::read_to_string(place.path().join("heat.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.matches("<title>layer").count() == 4 * 8, "{svg}");
    let json: serde_json::Value = serde_json::from_str(&place.done(&["stats", "show", "sum", "--json"])).unwrap();
    assert_eq!((json["tokens"].as_u64(), json["layers"].as_array().unwrap().len()), (Some(1024), 4));
    let all = |layer: &serde_json::Value| -> u64 { layer["tokens"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum() };
    for layer in json["layers"].as_array().unwrap() {
        // Two of eight experts a token; each text is half of the tokens, and its own row.
        let domains = layer["domains"].as_array().unwrap();
        assert_eq!((all(layer), layer["top_k"].as_u64(), domains.len()), (2048, Some(2), 2));
        assert!(domains.iter().all(|domain| all(domain) == 1024 && domain["routed"] == 512));
        assert!(domains.iter().all(|domain| domain["importance"].as_array().unwrap().iter().any(|x| x.as_f64().unwrap() > 0.0)));
    }
    let csv = place.done(&["stats", "show", "sum", "--csv"]);
    assert_eq!(csv.lines().count(), 1 + 4 * 8 * 2);
    assert!(csv.starts_with("layer,expert,domain,tokens,logits,mass,weights,importance\n0,0,code,"), "{csv}");
}

#[test]
fn statistics_that_do_not_add_up_say_why() {
    let place = Place::new();
    two_passes(&place);
    let manifest = place.path().join("b/moepress/stats/manifest.json");
    let was = fs_err::read_to_string(&manifest).unwrap();
    place.write("empty/x.txt", "x");
    let edited = |from: &str, to: &str, args: &[&str]| {
        fs_err::write(&manifest, regex::Regex::new(from).unwrap().replace(&was, to).as_bytes()).unwrap();
        place.said(args) + "\n"
    };
    let merge = ["stats", "merge", "a", "b", "--out", "sum"];
    let said = edited("\"model\": \"[0-9a-f]+\"", "\"model\": \"0123456789abcdef\"", &merge)
        + &edited("\"schema\": 1", "\"schema\": 9", &merge)
        + &edited("\"similarity_tokens\": 0", "\"similarity_tokens\": 64", &merge)
        + &edited("", "", &["stats", "merge", "a", "a", "--out", "sum"])
        + &edited("", "", &["stats", "merge", "a", "b", "--out", "empty"])
        + &edited("", "", &["stats", "merge", "a", "empty", "--out", "sum"])
        + &edited("", "", &["stats", "show", "empty"])
        + &edited("", "", &["stats", "merge", "a"]);
    let hash = regex::Regex::new("[0-9a-f]{12}…").unwrap();
    let said = hash.replace_all(&said, "HASH…");
    assert_eq!((said.matches("--- exit 1").count(), said.matches("--- exit 2").count()), (7, 1), "{said}");
    snapshot!("stats-refused", said);
}

#[test]
fn rounding_experts_that_are_not_packed_is_refused() {
    let place = Place::new();
    let said = place.said(&["eval", model().to_str().unwrap(), "--text", text("test/en.txt").to_str().unwrap(), "--round-experts", "bf16"]);
    assert!(said.ends_with("--- exit 1\n"), "{said}");
    snapshot!("round-experts", said);
}

#[test]
fn a_run_stops_where_experts_saw_too_few_tokens_if_it_is_told_to() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("gptq"));
    let rule = "calibrate.undercalibrated={ stop = { tokens_per_input = 100.0 } }";
    let said = place.said(&["run", "r.toml", "--quiet", "--set", rule]);
    assert!(said.contains("too few calibration tokens reached 32 experts") && said.contains("layer 0, expert 0: "), "{said}");
    assert!(said.ends_with("--- exit 1\n") && !place.path().join("out/moepress/solved").exists(), "{said}");
    // The same experts, blended: counted in the last line, and each recorded in the plan.
    let rule = "calibrate.undercalibrated={ blend = { tokens_per_input = 100.0 } }";
    let said = place.said(&["run", "r.toml", "--quiet", "--force", "--set", rule]);
    assert!(said.contains("for want of tokens 32 experts blended with the layer's and 0 experts rounded to nearest"), "{said}");
    let plan: serde_json::Value = serde_json::from_slice(&fs_err::read(place.path().join("out/moepress/plan.json")).unwrap()).unwrap();
    let solver = &plan["tensors"]["model.layers.2.mlp.experts.5.gate_proj.weight"]["quantize"]["solver"]["blended"];
    assert!(solver["tokens"].as_u64().unwrap() < 1024 && solver["wanted"].as_u64().unwrap() > 1000, "{solver}");
}

#[test]
fn another_recipe_model_or_text_is_another_run() {
    let place = Place::new();
    fs_err::copy(text("calib/en.txt"), place.path().join("en.txt")).unwrap();
    let corpus = r#"calibrate.corpus=["en.txt"]"#;
    place.write("r.toml", &small_recipe("gptq"));
    let base = ["calibrate", "r.toml", "--quiet", "--set", corpus];
    place.done(&base);
    let with = |extra: &[&str]| place.said(&[&base[..], extra].concat());
    let mut said = with(&["--set", "allocate.bits=3", "--set", "quantize.rtn={}"]);
    fs_err::write(place.path().join("en.txt"), fs_err::read_to_string(text("calib/en.txt")).unwrap() + "more\n").unwrap();
    said += &with(&[]);
    assert_eq!(said.matches("--- exit 1").count(), 2, "{said}");
    snapshot!("differs", said);
    assert!(with(&["--force"]).ends_with("--- exit 0\n"));
    assert!(with(&[]).contains("nothing to do"));
}

#[test]
fn a_model_writes_its_own_calibration_text() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("gptq"));
    let sampler = "calibrate.sampler.ebss={branches=2, at_once=3}";
    let args = ["calibrate", "r.toml", "--quiet", "--set", "calibrate.corpus=[]", "--set", sampler, "--set", "calibrate.tokens=24"];
    let first = place.done(&args);
    assert!(first.contains("sampler ebss, seed 0: 8 samples of 192 tokens") && first.contains("balance σ"), "{first}");
    let json: serde_json::Value = serde_json::from_str(&place.done(&[&args[..], &["--json"]].concat())).unwrap();
    let drawn = &json["manifest"]["parts"][0]["drawn"];
    // 4 tokens run for one branch and 19 for two, of each of 8 texts.
    assert_eq!((drawn["tokens_run"].as_u64(), drawn["writing"]["texts"].as_u64()), (Some(8 * (4 + 2 * 19)), Some(8)), "{json}");
    assert!(json["balance"]["sigma"].as_f64().is_some_and(|sigma| sigma > 0.0), "{json}");
    let refused = place.said(&["check", "r.toml", "--set", sampler]);
    assert!(refused.contains("lets the model write its texts and reads none"), "{refused}");
}

#[test]
fn demonstrations_are_completed_by_the_model_itself() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("gptq"));
    let prompts = ["def add(a, b):", "The river", "x = 3 + 4", "for i in", "One day", "Let n be"];
    place.write("x.jsonl", &prompts.map(|prompt| serde_json::json!({ "prompt": prompt }).to_string() + "\n").concat());
    let set = ["--set", "calibrate.corpus=['x.jsonl']", "--set", "calibrate.samples=4", "--set", "calibrate.pack=false"];
    let check = |more: &[&str]| place.said(&[&["check", "r.toml"][..], &set, more].concat());
    let refused = check(&[]);
    assert!(refused.contains("x.jsonl, line 1: a prompt without a completion (6 of 6 lines)"), "{refused}");
    let generate = ["--generate", "--set", "calibrate.generate.tokens=12"];
    assert!(check(&generate).contains("no problem found"), "{}", check(&generate));
    let seen = place.done(&[&["calibrate", "r.toml", "--quiet"][..], &set, &generate].concat());
    assert!(seen.contains("4 samples"), "{seen}");
    let written = place.path().join("out/moepress/stats/demonstrations");
    let written: Vec<_> = fs_err::read_dir(written).unwrap().map(|entry| entry.unwrap().path()).collect();
    let text = fs_err::read_to_string(&written[0]).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().zip(prompts).all(|(line, prompt)| line["prompt"] == prompt && line["completion"].is_string()), "{text}");
    let corpus = format!("calibrate.corpus=['{}']", written[0].display());
    let complete = check(&["--generate", "--set", &corpus]);
    assert!(written.len() == 1 && complete.contains("there is nothing to write"), "{complete}");
}

#[test]
fn an_importance_matrix_is_written_and_read_back() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("gptq"));
    place.done(&["calibrate", "r.toml", "--quiet"]);
    let written = place.done(&["imatrix", "out", "--out", "i.gguf", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&written).unwrap();
    assert_eq!((json["chunks"].as_u64(), json["chunk_tokens"].as_u64()), (Some(8), Some(64)), "{json}");
    let entries = json["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 4 * 7);
    let down = entries.iter().find(|entry| entry["tensor"] == "blk.3.ffn_down_exps.weight").unwrap();
    let counts: Vec<f64> = down["counts"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect();
    assert_eq!((down["inputs"].as_u64(), counts.len(), counts.iter().sum::<f64>()), (Some(256), 8, 2.0 * 512.0));
    assert_eq!(place.done(&["imatrix", "i.gguf", "--json"]), written);
    let shown = place.done(&["imatrix", "i.gguf"]);
    assert!(shown.contains("8 chunks of 64 tokens of code, en") && shown.contains("blk.0.attn_q.weight"), "{shown}");
    let refused = place.said(&["imatrix", "r.toml"]);
    assert!(refused.contains("neither GGUF nor a legacy importance matrix") && refused.ends_with("--- exit 1\n"), "{refused}");
}

#[test]
fn a_directory_of_something_else_is_left_alone() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("rtn")).write("out/thesis.tex", "x");
    snapshot!("not-ours", place.said(&["run", "r.toml", "--force"]));
}

#[test]
fn every_packed_and_dense_output_is_a_model_again() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("rtn"));
    place.done(&["apply", "r.toml", "--quiet"]);
    snapshot!("inspect-packed", place.said(&["inspect", "out"]));
    let (model, test) = (model(), text("test/code.txt"));
    let scores = |candidate: &str, reference: &str| -> serde_json::Value {
        let args = [
            "eval",
            candidate,
            "--reference",
            reference,
            "--text",
            test.to_str().unwrap(),
            "--context",
            "64",
            "--max-tokens",
            "256",
            "--json",
            "-q",
        ];
        serde_json::from_str(&place.done(&args)).unwrap()
    };
    let kl = |scores: &serde_json::Value| scores["all"]["kl"].as_f64().unwrap();
    let (packed, dense) = (scores("out", model.to_str().unwrap()), scores("out/dense", model.to_str().unwrap()));
    // Dense rounds each weight once more, to bf16.
    assert!((kl(&packed) / kl(&dense) - 1.0).abs() < 0.1 && kl(&packed) > 1e-3, "{packed} {dense}");
    assert!(kl(&scores("out", "out/dense")) < 1e-3);
    assert!(kl(&scores(model.to_str().unwrap(), model.to_str().unwrap())).abs() < 1e-9);
}

#[test]
fn a_dump_has_what_the_reference_has() {
    let place = Place::new();
    let folder = place::root().join("tests/parity/deepseek_v3");
    let reference = fs_err::read(folder.with_extension("safetensors")).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&reference).unwrap();
    let ids = reference.tensor("input_ids").unwrap();
    let rows: Vec<i64> = ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    let rows: Vec<_> = rows.chunks_exact(ids.shape()[1]).collect();
    place.write("ids.json", &serde_json::to_string(&rows).unwrap());
    place.done(&["eval", folder.to_str().unwrap(), "--tokens", "ids.json", "--dump", "dump.safetensors"]);
    let dump = fs_err::read(place.path().join("dump.safetensors")).unwrap();
    let dump = safetensors::SafeTensors::deserialize(&dump).unwrap();
    let mut compared = 0;
    for (name, theirs) in reference.tensors() {
        // References of generation are of another run.
        let Ok(ours) = dump.tensor(&name) else { continue };
        assert_eq!((ours.shape(), ours.dtype()), (theirs.shape(), theirs.dtype()), "{name}");
        compared += 1;
    }
    assert!(compared >= 10, "only {compared} tensors are in both");
    let floats = |file: &safetensors::SafeTensors<'_>| -> Vec<f32> {
        file.tensor("logits").unwrap().data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let far = floats(&dump).iter().zip(floats(&reference)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far < 1e-4, "logits differ by {far}");
}

#[test]
fn models_that_cannot_be_opened_say_why() {
    let place = Place::new();
    place.write("pickled/config.json", "{}").write("pickled/pytorch_model.bin", "x");
    place.done(&["inspect", model().to_str().unwrap(), "--shape-only", "llama"]);
    let config = fs_err::read_to_string(model().join("config.json")).unwrap().replace("qwen3_moe", "llama");
    place.write("llama/config.json", &config);
    place.done(&["inspect", model().to_str().unwrap(), "--shape-only", "gelu"]);
    let config = fs_err::read_to_string(model().join("config.json")).unwrap().replace("silu", "gelu");
    place.write("gelu/config.json", &config);
    place.write("r.toml", RECIPE);
    let said: String = [
        &["inspect", "absent"][..],
        &["inspect", "pickled"],
        &["inspect", "llama"],
        &["inspect", "gelu"],
        &["run", "r.toml"],
        &["eval", "absent", "--text", "a.txt"],
    ]
    .iter()
    .map(|args| place.said(args) + "\n")
    .collect();
    assert_eq!(said.matches("--- exit 1").count(), 6, "{said}");
    snapshot!("models", said);
}

#[test]
fn what_does_not_fit_the_model_is_told_with_its_line() {
    let place = Place::new();
    let recipe = small_recipe("rtn").replace("bits = 4", "bits = 4\ngroup = 96\nexclude = [\"*.experts.9.*\"]");
    place.write("r.toml", &recipe);
    let said = place.said(&["check", "r.toml"]);
    assert!(said.ends_with("--- exit 2\n"), "{said}");
    snapshot!("recipe-shape", said);
}

#[test]
fn a_text_that_is_too_short_stops_a_run_before_any_work() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("rtn")).write("short.txt", "It was a dark night.");
    let said = place.said(&["run", "r.toml", "--set", "evaluate.text=[\"short.txt\"]"]);
    assert!(!place.path().join("out/moepress/stats").exists());
    snapshot!("short-text", said);
    // Nothing was done, so the directory holds nobody to that recipe.
    place.done(&["run", "r.toml", "--quiet"]);
}

#[test]
fn the_log_is_quiet_or_json_as_asked() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("rtn"));
    let output = place.command(&["run", "r.toml", "--log-format", "json"]).output().unwrap();
    let lines = String::from_utf8(output.stderr).unwrap();
    let stages = lines.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["level"] == "INFO").count();
    assert!(stages >= 4, "{lines}");
    let output = place.command(&["run", "r.toml", "--quiet", "--force"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

/// Recipes of models that are not bundled begin with the name of one of `tests/models/hub`.
#[test]
fn every_recipe_of_the_project_has_no_problem() {
    let place = Place::new();
    let models = ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-r1"].map(|name| (name, shapes::write(name, place.path())));
    let mut checked = 0;
    for entry in fs_err::read_dir(place::root().join("configs")).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_some_and(|e| e == "toml") {
            let recipe = entry.file_name().unwrap().to_str().unwrap();
            let model = models.iter().find(|(name, _)| recipe.starts_with(name)).map(|(_, dir)| dir.to_str().unwrap());
            let shape: Vec<&str> = model.into_iter().flat_map(|dir| ["--model", dir]).collect();
            place.done(&[&["check", entry.to_str().unwrap(), "--out", "out"], shape.as_slice()].concat());
            checked += 1;
        }
    }
    assert!(checked > 8);
}

#[test]
fn a_plan_gives_its_curve_and_the_words_of_other_tools() {
    let place = Place::new();
    let mixed =
        "bits_per_weight = 3.0\nruntime = \"transformers4\"\nchoices = [2, 3, 4, 8]\ncost = \"hessian\"\nexclude = [\"*self_attn*\"]\n";
    place.write("r.toml", &small_recipe("gptq").replace("bits = 4\n", mixed));
    let hours = place.done(&["plan", "r.toml", "--estimate"]);
    assert!(
        hours.contains("calibrate: table of losses") && hours.contains("apply: codes") && !place.path().join("out").exists(),
        "{hours}"
    );
    let said = place.done(&["plan", "r.toml", "-q", "--pareto", "1.5..4:0.5"]);
    assert!(said.contains("not possible: 1.500, 2.000;"), "{said}");
    let csv = fs_err::read_to_string(place.path().join("out/moepress/pareto.csv")).unwrap();
    let losses: Vec<f64> = csv.lines().skip(1).map(|line| line.split(',').nth(4).unwrap().parse().unwrap()).collect();
    assert!(losses.len() == 4 && losses.is_sorted_by(|a, b| a > b), "{csv}");
    assert!(fs_err::read_to_string(place.path().join("out/moepress/pareto.svg")).unwrap().starts_with("<svg"));
    for (tool, file, part) in [
        ("gptqmodel", "gptqmodel.json", "-:^model\\\\.layers\\\\.0\\\\.self_attn\\\\.q_proj$"),
        ("llm-compressor", "llm-compressor.yaml", "re:^model[.]layers[.]0[.]mlp[.]experts[.]0[.]down_proj$"),
    ] {
        place.done(&["plan", "r.toml", "-q", "--for", tool]);
        let text = fs_err::read_to_string(place.path().join("out/moepress").join(file)).unwrap();
        assert!(text.contains(part), "{text}");
    }
    let compared: serde_json::Value =
        serde_json::from_str(&place.done(&["plan", "r.toml", "-q", "--json", "--calibrate-curve", "3,4"])).unwrap();
    let kl: Vec<f64> = compared.as_array().unwrap().iter().map(|point| point["kl"].as_f64().unwrap()).collect();
    assert!(kl.len() == 2 && kl[0] > kl[1] && kl[1] > 0.0, "{compared}");
    assert!(place.path().join("out/moepress/curve.csv").is_file() && !place.path().join("out/moepress/curve").exists());
    // Rows of 192 inputs are no whole blocks of a k-quant.
    let refused = place.said(&["plan", "r.toml", "-q", "--for", "llama-quantize"]);
    snapshot!("plan-llama", refused);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_says_so() {
    let place = Place::new();
    snapshot!("no-cuda", place.said(&["eval", model().to_str().unwrap(), "--text", "a.txt", "--device", "cuda:1"]));
}

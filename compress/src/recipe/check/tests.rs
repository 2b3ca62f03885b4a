//! What a recipe is told, by value.

use super::*;
use crate::recipe::{Overrides, load};
use calib::arch::{Part, Projection, Role};
use kernels::ScaleType;

fn loaded(text: &str) -> (Loaded, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let prompts = "{\"prompt\": \"x\", \"completion\": \"y\"}\n{\"prompt\": \"x\"}\n";
    for (name, text) in [("a.txt", "x"), ("b.jsonl", "{\"text\": \"x\"}"), ("c.md", "x"), ("p.jsonl", prompts)] {
        fs_err::write(dir.path().join(name), text).unwrap();
    }
    let path = dir.path().join("r.toml");
    fs_err::write(&path, text).unwrap();
    (load(&path, &Overrides::default()).unwrap(), dir)
}

/// What is said of a recipe, with the directory taken out of it.
fn said(text: &str, shape: Option<&Shape>) -> Vec<String> {
    let (loaded, dir) = loaded(text);
    let mut problems = check_values(&loaded);
    problems.extend(shape.iter().flat_map(|shape| check(&loaded, shape)));
    let all = loaded.source.invalid(problems).to_string();
    let all = all.replace(&format!("{}/", dir.path().display()), "");
    all.lines().map(str::to_owned).collect()
}

const GOOD: &str =
    "schema = 1\nmodel = \"m\"\nout = \"o\"\n[calibrate]\ncorpus = [\"a.txt\"]\n[quantize.gptq]\n[allocate]\nbits = 4\n[export.dense]\n";

#[test]
fn a_good_recipe_has_no_problem() {
    assert_eq!(said(GOOD, Some(&shape())), [""; 0]);
}

#[test]
fn every_problem_of_value_is_found_at_once() {
    let text = "schema = 2\nout = \"o\"\n[calibrate]\ncorpus = [\"a.txt\", \"no.txt\", \"c.md\"]\nsamples = 1\nundercalibrated = { rtn = { tokens_per_input = -1 } }\n[quantize.gptq]\n[allocate]\nbits = 9\nbytes = \"1GB\"\n[evaluate]\ntext = []\nmax_tokens = 3\n";
    let said = said(text, None);
    let expected = [
        "r.toml:1:10: schema 2 is not known; this program reads schema 1",
        "r.toml:4:20: there is no text no.txt",
        "r.toml:4:30: c.md is neither a .txt, a .jsonl nor a .parquet file",
        "r.toml:5:11: calibrate.samples = 1 cannot be shared out over 3 texts; ask for at least one each",
        "r.toml:6:1: -1 tokens an input are no threshold; ask for 0 or more, such as 0.5",
        "r.toml:8:2: one of bits, bits_per_weight, bytes, file is needed, and there are 2: bits, bytes; for one width for all matrices, write bits = 4",
        "r.toml:9:8: 9 bits cannot be exported; choose 2 to 8",
        "r.toml:12:8: evaluate.text names no text",
        "r.toml:13:14: 3 tokens are less than one window of 512",
        "r.toml: there is no `model`; name it in the recipe or with --model DIR",
        "r.toml: no format is asked for; add [export.compressed_tensors], [export.native] or [export.dense]",
    ];
    assert_eq!(said, expected);
}

#[test]
fn what_is_missing_is_asked_for() {
    let said = |text: &str| said(text, None).join("\n");
    assert!(said(&GOOD.replace("[calibrate]\ncorpus = [\"a.txt\"]\n", "")).contains("needs calibration, and there is no [calibrate]"));
    assert!(said(&GOOD.replace("[allocate]\nbits = 4\n", "")).contains("a quantizer but no [allocate]"));
    assert!(said(&GOOD.replace("[quantize.gptq]\n", "")).contains("widths but no quantizer"));
    assert!(said(&format!("{GOOD}[export.kernels]\n")).contains("kernels are emitted for what [export.native] writes"));
    assert!(said(&GOOD.replace("bits = 4\n", "")).contains("is needed, and there is none"));
}

#[test]
fn texts_have_weights_and_samplers_knobs() {
    let said =
        |corpus: &str, more: &str| said(&GOOD.replace("corpus = [\"a.txt\"]", &format!("corpus = {corpus}\n{more}")), None).join("\n");
    assert_eq!(said("[{ path = \"a.txt\", name = \"x\", weight = 2.0 }, \"b.jsonl\"]", ""), "");
    let bad = said("[{ path = \"a.txt\", weight = 0.0 }]", "sampler.ebss.branches = 0\npack = false");
    let expected = "r.toml:5:10: the sampler ebss lets the model write its texts and reads none; leave calibrate.corpus out\n\
        r.toml:5:38: 0 is no weight; ask for more than 0, or leave the text out\n\
        r.toml:6:25: branches = 0; ask for at least 1\n\
        r.toml:7:8: the sampler ebss writes samples of calibrate.tokens each; there are no documents to keep apart";
    assert_eq!(bad, expected);
    assert!(said("[\"a.txt\", { path = \"a.txt\" }]", "").contains("texts are told apart by name"));
    assert_eq!(said("[\"a.txt\", { path = \"a.txt\", name = \"b\" }]", ""), "");
    assert_eq!(said("[]", "sampler.temperature.temperature = 0.8"), "");
    let all = said("[\"a.txt\"]", "experts = \"all\"\n[objective]\ntoken_weight = \"affinity\"");
    assert!(all.contains("r.toml:6:11: objective.token_weight works on the tokens that an expert is given"), "{all}");
    let loss = said("[\"a.txt\"]", "end_loss = { targets = \"text\", seed = 3 }");
    assert!(loss.contains("nothing needs a backward pass") && loss.contains("targets of the text are not drawn"), "{loss}");
    assert_eq!(said("[\"a.txt\"]", "end_loss.targets = \"text\"\n[objective]\ntoken_weight = \"end_loss\""), "");
}

#[test]
fn demonstrations_are_read_before_anything_runs() {
    let said = |corpus: &str, more: &str| {
        said(&GOOD.replace("corpus = [\"a.txt\"]", &format!("corpus = [\"{corpus}\"]\n{more}")), None).join("\n")
    };
    let lacks = said("p.jsonl", "");
    assert!(lacks.contains("r.toml:5:11: p.jsonl, line 2: a prompt without a completion (1 of 2 lines)"), "{lacks}");
    assert_eq!(said("p.jsonl", "generate = { tokens = 9, temperature = 0.7 }"), "");
    assert!(said("b.jsonl", "generate = {}").contains("r.toml:6:1: no text has a prompt without a completion"));
    assert!(said("p.jsonl", "generate.at_once = 0").contains("at_once = 0; ask for at least 1"));
    assert!(said("p.jsonl", "generate = {}\nsampler.ebss = {}").contains("the sampler ebss reads no texts"));
}

#[test]
fn moments_are_kept_where_another_plan_can_use_them() {
    let said = |quantizer: &str, more: &str| {
        let text = GOOD.replace("corpus = [", "keep_moments = true\ncorpus = [").replace("[quantize.gptq]", quantizer);
        said(&format!("{text}{more}"), None).join("\n")
    };
    assert_eq!(said("[quantize.gptq]", "[refine.descent]\n"), "");
    assert!(said("[quantize.rtn]", "").contains("the quantizer uses no second moments"));
    assert!(said("[quantize.gptq]", "[repair]\norder = \"sequential\"\n").contains("they serve this one plan alone"));
    assert!(said("[quantize.gptq]", "[refine.learned]\n").contains("needs the tokens themselves"));
    assert!(said("[quantize.gptq]", "[refine.descent]\n[objective]\noutput_weight = \"end_loss\"\n").contains("takes a backward pass"));
}

#[test]
fn a_repair_of_nothing_is_refused() {
    let said = |removal: &str| said(&format!("{GOOD}[prune.easy_ep]\nkeep = 0.5\n[repair.removal]\n{removal}\n"), None).join("\n");
    assert_eq!((said(""), said("steps = 9\ndown.rounds = 0")), (String::new(), String::new()));
    assert!(said("down.rounds = 0").contains("nothing is fitted; leave `down` as it is"), "{}", said("down.rounds = 0"));
    assert!(said("down.damping = 0.0").contains("0 holds nothing; choose a share"));
}

#[test]
fn a_budget_is_held_to_what_loads_it() {
    let said = |budget: &str, export: &str| {
        let text = GOOD.replace("bits = 4", budget).replace("[export.dense]", export);
        said(&text, Some(&shape())).join("\n")
    };
    assert_eq!(said("bits_per_weight = 3", "[export.dense]"), "");
    assert_eq!(said("bits_per_weight = 3\nruntime = \"native\"", "[export.dense]"), "");
    assert_eq!(said("bytes = \"1MB\"\nruntime = \"transformers4\"", "[export.compressed_tensors]"), "");
    assert!(said("bits_per_weight = 3", "[export.compressed_tensors]").contains("say allocate.runtime = one of transformers4"));
    assert!(said("bits_per_weight = 3\nruntime = \"native\"", "[export.compressed_tensors]").contains("add [export.native]"));
    assert_eq!(said("bits_per_weight = 3\nruntime = \"native\"", "[export.native]"), "");
    assert!(said("bits_per_weight = 3\nruntime = \"vllm\"", "[export.native]").contains("add [export.compressed_tensors]"));
    assert!(said("bits_per_weight = 3\nruntime = \"gguf\"", "[export.dense]").contains("no exporter yet"));
    assert!(said("file = \"1MB\"", "[export.dense]").contains("of one size whatever the widths"));
    assert!(
        said("bits_per_weight = 3\nruntime = \"vllm\"\nchoices = [1, 2, 2]", "[export.compressed_tensors]")
            .contains("1 bits half, group 128: compressed-tensors does not hold it")
    );
    assert!(said("bits_per_weight = 3\nchoices = [{ bits = 1, grid = \"sym\" }]", "[export.dense]").contains("there is no such grid"));
}

#[test]
fn the_best_grid_is_chosen_from_what_the_formats_hold() {
    let grids = |export: &str, bits: u8| {
        let text = GOOD.replace("bits = 4", &format!("bits = {bits}\ngrid = \"best\"")).replace("[export.dense]", export);
        let allocate = loaded(&text).0.recipe.allocate.unwrap();
        (allocate.is_mixed(), allocate.options().iter().map(|choice| choice.grid).collect::<Vec<_>>())
    };
    use crate::quantize::Grid::{Asym, Half, Offset, Sym};
    assert_eq!(grids("[export.dense]", 2), (true, vec![Sym, Half, Asym, Offset]));
    assert_eq!(grids("[export.compressed_tensors]\n[export.dense]", 3), (true, vec![Sym, Asym]));
    assert_eq!(grids("[export.dense]", 4), (false, vec![Sym]));
    assert_eq!(grids("[export.dense]", 1), (false, vec![Half]));
}

#[test]
fn ends_have_the_bits_that_are_offered_and_must_be_there() {
    let with = |ends: &str, shape: &Shape| said(&GOOD.replace("bits = 4\n", &format!("bits = 4\n{ends}\n")), Some(shape)).join("\n");
    assert!(with("head = 8\ngroup = 32", &shape()).is_empty());
    assert!(with("head = 8", &shape()).contains("group 128 does not divide the 96 columns of lm_head.weight"));
    assert!(with("embedding = 5", &shape()).contains("5 bits for the embedding are not offered; choose 8, 6 or 4"));
    let mut tied = shape();
    tied.tensors.retain(|tensor| tensor.role != Role::Head);
    assert!(with("head = 4", &tied).contains("tied to the embedding"));
}

#[test]
fn what_weighs_and_mends_needs_tokens_and_an_order() {
    let said = |extra: &str| said(&format!("{GOOD}{extra}"), Some(&shape())).join("\n");
    assert_eq!(said("[objective]\ntoken_weight = \"affinity\"\npower = 1\n[repair]\norder = \"sequential\"\npropagate = 0.5\n"), "");
    assert!(said("[objective]\ntoken_weight = \"affinity\"\npower = 3\n").contains("3 is no power of the routing weight; use 1 or 2"));
    assert!(said("[objective]\npower = 1\n").contains("only the routing weight has a power"));
    assert!(said("[repair]\npropagate = 0.5\n").contains("add order = \"sequential\""));
    assert!(said("[repair.router_repair]\n").contains("add order = \"sequential\""));
    assert!(said("[repair]\norder = \"sequential\"\npropagate = 1.5\n").contains("between 0 and 1"));
    let rtn = GOOD.replace("gptq", "rtn") + "[objective]\n[repair]\norder = \"sequential\"\n";
    let said = self::said(&rtn, None).join("\n");
    assert!(said.contains("no tokens to weigh") && said.contains("the quantizer sees no tokens"), "{said}");
}

#[test]
fn channels_are_scaled_for_a_quantizer_of_one_width_by_what_was_measured() {
    let said = |extra: &str| said(&format!("{GOOD}{extra}"), Some(&shape())).join("\n");
    assert_eq!(said("[repair.awq]\n"), "");
    assert!(said("[repair.awq]\nbits = 4\n").contains("there is one width"));
    assert!(said("[repair.awq]\nexponents = 1\nfolds = []\n").contains("1 exponents leave no choice"));
    assert!(said("[prune.reap]\nkeep = 0.5\n[repair.awq]\n").contains("experts go; reduce with [export.dense] first"));
}

fn shape() -> Shape {
    let tensor =
        |name: &str, role, shape: &[usize]| Tensor { name: name.into(), shape: shape.into(), role, scale: ScaleType::Bf16, bytes: 0 };
    let tensors = vec![
        tensor("lm_head.weight", Role::Head, &[8, 96]),
        tensor("x.0.down.weight", Role::Layer(0, Part::Expert(0, Projection::Down)), &[128, 256]),
        tensor("x.0.up.weight", Role::Layer(0, Part::Expert(0, Projection::Up)), &[128, 128]),
    ];
    Shape { fingerprint: String::new(), tensors }
}

#[test]
fn a_group_that_does_not_fit_names_one_that_does() {
    let text = GOOD.replace("bits = 4", "bits = 4\ngroup = 192");
    let expected = [
        "r.toml:9:9: group 192 does not divide the 128 inputs of x.0.up.weight; choose a divisor, such as 128, or name them in allocate.exclude",
        "r.toml:9:9: group 192 does not divide the 256 inputs of x.0.down.weight; choose a divisor, such as 128, or name them in allocate.exclude",
    ];
    assert_eq!(said(&text, Some(&shape())), expected);
    let text = GOOD.replace("bits = 4", "bits = 4\ngroup = 256\nexclude = [\"*.up\"]");
    assert_eq!(said(&text, Some(&shape())), [""; 0]);
}

#[test]
fn a_glob_that_matches_nothing_is_an_error() {
    let text = GOOD.replace("bits = 4", "bits = 4\nexclude = [\"*.up\", \"x.1.*\", \"lm_head\"]");
    let expected = [
        "r.toml:9:20: `x.1.*` matches no tensor of this model; `moepress inspect MODEL -v` lists the names",
        "r.toml:9:29: `lm_head` excludes lm_head.weight, which is never quantized; take it out: only attention, experts and dense MLPs of the decoder layers are quantized",
    ];
    assert_eq!(said(&text, Some(&shape())), expected);
}

#[test]
fn budgets_beside_the_bytes_are_looked_at() {
    let text = GOOD.replace(
        "bits = 4\n",
        "bits_per_weight = 3.0\nchoices = [2, 4]\ndevices = [{ layers = [0, 3], bytes = \"1GB\" }, { layers = [3, 1], bytes = \"1GB\" }, { layers = [2, 5], bytes = \"1GB\" }]\n\
         speed = { seconds_per_token = 0.0, kernels = [{ bits = 2, nanoseconds_per_million = -1.0 }, { bits = 2, nanoseconds_per_million = 1.0 }] }\n",
    );
    let said = said(&text, None).join("\n");
    for part in [
        "layers 3 to 1 are none",
        "layers 2 to 5 overlap 0 to 3",
        "0 seconds are no time",
        "-1 nanoseconds are no time",
        "2 bits stand there twice",
        "no kernel of 4 bits is in the table",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn what_a_runtime_ties_is_excluded_whole_or_not_at_all() {
    let expert = |e, p: Projection| Tensor {
        name: format!("x.{e}.{p:?}.weight"),
        shape: vec![64, 128],
        role: Role::Layer(0, Part::Expert(e, p)),
        scale: ScaleType::Bf16,
        bytes: 1,
    };
    let tensors = (0..2).flat_map(|e| Projection::ALL.map(|p| expert(e, p))).collect();
    let shape = Shape { fingerprint: String::new(), tensors };
    let with = |exclude: &str, runtime: &str| {
        let text = GOOD.replace("bits = 4\n", &format!("bits = 4\nruntime = \"{runtime}\"\nexclude = [\"{exclude}\"]\n"));
        said(&text, Some(&shape)).join("\n")
    };
    let said = with("x.1.*", "vllm");
    assert!(said.contains("x.1.Gate.weight is excluded and x.0.Gate.weight is not, and vllm loads the 6 matrices"), "{said}");
    assert!(with("x.1.Gate*", "native").contains("the 2 matrices"));
    assert_eq!([with("x.*", "vllm"), with("x.1.*", "native"), with("x.1.Gate*", "transformers4")], [""; 3]);
}

#[test]
fn dropping_goes_with_few_things() {
    let with = |allocate: &str, more: &str| {
        let text = GOOD.replace("bits = 4\n", allocate).replace("[export.dense]\n", more);
        said(&text, None).join("\n")
    };
    let good = "bits_per_weight = 3.0\nruntime = \"native\"\ndrop = \"mean\"\n";
    assert_eq!(with(good, "[export.native]\n"), "");
    let zero = good.replace("mean", "zero");
    assert_eq!(with(&zero, "[export.native]\n[export.dense]\n"), "");
    assert_eq!(with(&zero.replace("runtime = \"native\"\n", ""), "[export.dense]\n"), "");
    for (allocate, more, part) in [
        (good, "[export.native]\n[export.dense]\n", "a dense expert has no bias that could hold its mean output; use [export.native]"),
        (good, "[export.native]\n[export.compressed_tensors]\n", "it has no form for a dropped expert"),
        (good, "[export.native]\n[refine.learned]\n", "steps run every expert as it was"),
        (&good.replace("native", "vllm"), "[export.dense]\n", "runtime vllm runs every expert that its router chooses"),
        (&format!("{good}cost = \"pmq\"\n"), "[export.native]\n", "the cost pmq has no unit for what an expert puts out"),
        ("bits = 4\ndrop = \"zero\"\n", "[export.native]\n", "one width for all leaves no bytes to gain"),
    ] {
        let said = with(allocate, more);
        assert!(said.contains(part), "{part}: {said}");
    }
    // The shape of this module's tests has routed experts; without them there is nothing to drop.
    let text = GOOD.replace("bits = 4\n", good).replace("[export.dense]", "[export.native]");
    let mut dense = shape();
    let of = |dense: &Shape| said(&text, Some(dense)).join("\n").contains("this model has no routed experts");
    assert!(!of(&dense));
    dense.tensors.retain(|tensor| !matches!(tensor.role, Role::Layer(_, Part::Expert(..))));
    assert!(of(&dense));
}

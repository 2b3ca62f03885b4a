//! Methods from the recipe to the output's own score: a budget that may drop experts, MC-MoE's codes, rotation, outputs that count.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod place;

use place::{Place, small_recipe};

#[test]
fn experts_are_dropped_where_a_budget_says_so_and_put_out_their_means() {
    let place = Place::new();
    let budget = "bits_per_weight = 1.6\nchoices = [1, 2, 4]\ngrid = \"half\"\nruntime = \"native\"\ncost = \"hessian\"\nfill = \"estimate\"\nmin_bits = { attention = 4 }\n";
    let recipe = small_recipe("gptq").replace("bits = 4\n", budget);
    place.write("r.toml", &recipe.replace("[export.compressed_tensors]\n[export.dense]\n", "[export.native]\n"));
    let report = |place: &Place| -> serde_json::Value {
        serde_json::from_slice(&fs_err::read(place.path().join("out/moepress/report.json")).unwrap()).unwrap()
    };
    let said = place.done(&["run", "r.toml", "--quiet", "--set", "allocate.drop=\"mean\""]);
    let mean = report(&place);
    let account = &mean["plan"]["allocation"];
    let (dropped, loss) = (account["dropped"].as_u64().unwrap(), account["loss"].as_f64().unwrap());
    assert!(dropped > 0 && loss < account["loss_whole"].as_f64().unwrap(), "{account}");
    assert!(said.contains(&format!("{dropped} experts dropped")) && said.contains("dropped experts put out their mean"), "{said}");
    let by_layer = mean["plan"]["substituted"]["experts"].as_object().unwrap();
    assert_eq!(by_layer.values().map(|n| n.as_u64().unwrap()).sum::<u64>(), dropped);
    let spent = account["bytes"].as_u64().unwrap();
    assert!(spent <= account["budget"].as_u64().unwrap());
    let config: serde_json::Value = serde_json::from_slice(&fs_err::read(place.path().join("out/config.json")).unwrap()).unwrap();
    let constants = config["quantization_config"]["constants"].as_object().unwrap();
    assert_eq!(constants.values().map(|said| said["experts"].as_array().unwrap().len() as u64).sum::<u64>(), dropped);
    assert!(mean["evaluation"]["all"]["kl"].as_f64().unwrap().is_finite());
    // What was measured is good for nothing instead, and for no dropping.
    let again = |set: &[&str]| {
        place.done(&[&["run", "r.toml", "--quiet", "--force"], set].concat());
        report(&place)
    };
    let zero = again(&["--set", "allocate.drop=\"zero\""]);
    assert!(zero["plan"]["allocation"]["loss"].as_f64().unwrap() >= loss * (1.0 - 1e-9));
    let none = again(&[]);
    assert_eq!(none["plan"]["allocation"]["loss"], account["loss_whole"]);
    assert!(none["plan"].get("substituted").is_none() && !place.path().join("out/moepress/dropped.safetensors").exists());
    // The kernels are told; the plan in another tool's words is refused.
    again(&["--set", "allocate.drop=\"mean\""]);
    place.done(&["emit", "out"]);
    let manifest = fs_err::read_to_string(place.path().join("out/kernels/manifest.json")).unwrap();
    assert!(manifest.contains("\"constants\""), "{manifest}");
    let refused = place.said(&["plan", "r.toml", "--quiet", "--set", "allocate.drop=\"mean\"", "--for", "gptqmodel"]);
    assert!(refused.contains("GPTQModel") && refused.contains("allocate.drop"), "{refused}");
}

#[test]
fn the_same_bytes_are_spent_on_bits_alone_and_on_fewer_experts() {
    let place = Place::new();
    let budget =
        "bits_per_weight = 2.2\nchoices = [1, 2, 4]\ngrid = \"half\"\nruntime = \"native\"\nfill = \"estimate\"\ndrop = \"zero\"\n";
    let recipe = small_recipe("gptq").replace("bits = 4\n", budget);
    let recipe = recipe.replace("[export.compressed_tensors]\n[export.dense]\n", "[export.native]\n\n[prune.easy_ep]\nkeep = 0.75\n");
    place.write("r.toml", &recipe);
    let rows: Vec<serde_json::Value> =
        serde_json::from_str(&place.done(&["plan", "r.toml", "--quiet", "--json", "--levers", "6,8"])).unwrap();
    let of = |row: &serde_json::Value, key: &str| row[key].as_f64().unwrap();
    let loss = |row: &serde_json::Value| of(row, "removal") + of(row, "widths");
    // 3.15 million weights are quantized.
    let most = rows.iter().map(|row| of(row, "bytes")).fold(0.0, f64::max);
    let named = |by: Option<&str>, experts: u64, drops: bool| {
        let is = |row: &&serde_json::Value| row["by"].as_str() == by && row["experts"] == experts && row["dropped"].is_u64() == drops;
        rows.iter().find(is).unwrap_or_else(|| panic!("{by:?} {experts} {drops}: {rows:?}"))
    };
    for (by, experts) in [(None, 8), (Some("prune.easy_ep"), 6), (Some("prune.easy_ep"), 8)] {
        let (without, with) = (named(by, experts, false), named(by, experts, true));
        assert!(loss(with) <= loss(without) + 1e-12 && of(with, "bytes") <= most, "{with} {without}");
    }
    // All experts stay: nothing is removed, and the widths are those of the model as it is.
    let (bits, all) = (named(None, 8, false), named(Some("prune.easy_ep"), 8, false));
    assert!(of(all, "removal").abs() < 1e-6 && (of(all, "widths") / of(bits, "widths") - 1.0).abs() < 1e-3, "{all} {bits}");
    let six = named(Some("prune.easy_ep"), 6, false);
    assert!(of(six, "removal") > 0.0 && of(six, "widths") < of(bits, "widths"), "{six} {bits}");
    let csv = fs_err::read_to_string(place.path().join("out/moepress/levers.csv")).unwrap();
    assert!(csv.starts_with("by,experts,dropped,bytes,removal,widths,predicted\n,8,,") && csv.lines().count() == rows.len() + 1, "{csv}");
    assert!(!place.path().join("out/moepress/levers").exists());
    let said = place.said(&[
        "plan",
        "r.toml",
        "--quiet",
        "--levers",
        "6",
        "--out",
        "b",
        "--set",
        "allocate.cost=\"hessian\"",
        "--set",
        "allocate.min_bits={ attention = 4 }",
    ]);
    assert!(said.contains("only the cost end_loss is in that unit"), "{said}");
}

#[test]
fn mc_moes_codes_are_solved_where_its_grid_is() {
    let place = Place::new();
    let recipe = small_recipe("pmq").replace("[export.compressed_tensors]\n", "");
    place.write("r.toml", &recipe.replace("bits = 4\n", "bits = 2\ngrid = \"offset\"\n"));
    let none = place.said(&["check", "r.toml", "--set", "allocate.grid=\"sym\"", "--set", "refine.descent={}"]);
    assert!(none.contains("pmq has real zeros, and 2 bits sym, group 128 has none"), "{none}");
    assert!(none.contains("refined codes would no longer be those of MC-MoE") && none.contains("--- exit 2"), "{none}");
    place.done(&["run", "r.toml", "--quiet", "--set", "allocate.exclude=[\"*.up_proj\", \"*.gate_proj\"]"]);
    let report: serde_json::Value =
        serde_json::from_str(&fs_err::read_to_string(place.path().join("out/moepress/report.json")).unwrap()).unwrap();
    let matrices = report["solved"]["matrices"].as_object().unwrap();
    assert!(matrices.keys().eq(["pmq"]) && matrices["pmq"].as_u64().unwrap() > 10, "{matrices:?}");
    // Two bits, a scale and a real zero of 16 bits a group of 128.
    assert!((report["bits_per_weight"].as_f64().unwrap() - 2.25).abs() < 0.1, "{}", report["bits_per_weight"]);
    assert!(report["solved"]["loss"].as_f64().unwrap() > 0.0 && report["evaluation"]["all"]["kl"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_rotated_model_is_compressed_and_what_cannot_be_is_refused() {
    let place = Place::new();
    place.write("r.toml", &small_recipe("gptq").replace("[export.compressed_tensors]\n", ""));
    let rotate = ["--set", "repair.rotate.seed=3"];
    let said = place.said(&[&["check", "r.toml", "--set", "repair.awq={}"][..], &rotate].concat());
    assert!(said.contains("rotated channels are all alike") && said.contains("--- exit 2"), "{said}");
    place.done(&[&["run", "r.toml", "--quiet", "--set", "allocate.bits=8"][..], &rotate].concat());
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_str(&fs_err::read_to_string(place.path().join("out/moepress").join(name)).unwrap()).unwrap()
    };
    let sides = read("rotated.json")["sides"].as_array().unwrap().iter().map(|side| side.as_u64().unwrap()).collect::<Vec<_>>();
    assert!(sides[1].is_power_of_two() && sides[0] % 2 == 1, "{sides:?}");
    assert!(read("report.json")["evaluation"]["all"]["kl"].as_f64().unwrap() < 0.01);
    assert!(place.path().join("out/moepress/fold.done").is_file());
    // A run of another rotation is another run.
    let said = place.said(&["run", "r.toml", "--quiet", "--set", "allocate.bits=8", "--set", "repair.rotate.seed=4"]);
    assert!(said.contains("repair.rotate.seed was 3, now it is 4"), "{said}");
}

#[test]
fn outputs_that_make_up_for_one_another_bring_the_predictions_closer() {
    let place = Place::new();
    let recipe = small_recipe("gptq")
        .replace("[export.compressed_tensors]\n", "")
        .replace("bits = 4\n", "bits = 3\ngrid = \"half\"\nexclude = [\"*.up_proj\", \"*.gate_proj\"]\n");
    let recipe = recipe.replace("samples = 8\ntokens = 64", "samples = 40\ntokens = 256").replace("max_tokens = 256", "max_tokens = 2048");
    place.write("r.toml", &recipe);
    let said = place.said(&["check", "r.toml", "--set", "objective.output_weight=\"end_loss\""]);
    assert!(said.contains("outputs make up for one another in a descent, and there is none"), "{said}");
    let kl = |weight: &str| {
        let weight = format!("objective.output_weight=\"{weight}\"");
        place.done(&["run", "r.toml", "--quiet", "--force", "--set", "refine.descent={}", "--set", &weight]);
        let report = fs_err::read_to_string(place.path().join("out/moepress/report.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&report).unwrap()["evaluation"]["all"]["kl"].as_f64().unwrap()
    };
    let (alone, both) = (kl("none"), kl("end_loss"));
    assert!(both < 0.95 * alone && both > 0.0, "{alone} {both}");
}

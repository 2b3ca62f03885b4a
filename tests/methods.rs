//! Methods that a recipe names, on the bundled model from outside.

use crate::place::{Place, small_recipe};

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

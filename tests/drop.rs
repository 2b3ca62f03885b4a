//! A budget that may drop experts, from the recipe to the output's own score.
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

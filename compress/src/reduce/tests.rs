//! Whole ways from a measured model to a reduced one, on the tiny checkpoints of every family.

use std::collections::BTreeMap;
use std::path::Path;

use calib::arch::{Part, Projection, Role};
use calib::device::Device;
use calib::evaluate::{Models, Windows, evaluate};
use calib::pass;
use calib::progress::Quiet;
use calib::sample::{Calibrate, Samples};
use calib::tensor::{self, Dtype};
use calib::{Model, Weights};

use super::*;
use crate::merge::weighted_mean;
use crate::mtp::Mtp;
use crate::prune::{Params, exhaustive, random};
use crate::repair::down;
use crate::tensorfile::{Create, Declared, Element};
use crate::testing::fixture;

const FAMILIES: [&str; 10] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_tied",
    "olmoe",
    "phimoe",
    "deepseek",
    "deepseek_v2_group",
    "deepseek_v3_mtp",
    "deepseek_v3_fp8",
];

/// A tiny checkpoint whose groups are still large enough for the router with half of its experts: a token takes 2 from the better half.
fn halvable(name: &str) -> Model {
    let model = fixture(name);
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(model.checkpoint().config_text()).unwrap();
    let Some(groups) = config.get("n_group").and_then(serde_json::Value::as_u64) else { return model };
    let count = config["n_routed_experts"].as_u64().unwrap() / 4;
    assert!(groups >= count);
    config
        .extend([("n_group", count), ("topk_group", count.div_ceil(2)), ("num_experts_per_tok", 2)].map(|(k, v)| (k.to_owned(), v.into())));
    let renamed = model.layout().roles().map(|(_, name)| (name.to_owned(), name.to_owned())).collect();
    let config = serde_json::to_string(&config).unwrap();
    Model::from_checkpoint(model.checkpoint().derive(&Derived { config, renamed, changed: &[], key: "halvable" }).unwrap()).unwrap()
}

fn samples(model: &Model) -> Samples {
    let vocab = model.spec().vocab as u32;
    let ids = (0..4_u32).map(|sample| (0..48).map(|at| (sample * 31 + at * at * 7 + at) % vocab).collect()).collect();
    Samples { domains: vec!["a".into(), "b".into()], tokens: 48, ids, domain: vec![0, 1, 0, 1], drawn: calib::sample::Drawn::default() }
}

/// What is asked of a reduction.
#[derive(Default)]
struct Wish<'a> {
    pruner: Option<&'a Pruner>,
    merger: Option<&'a Merger>,
    repair: Option<&'a removal::Params>,
}

/// Measures and reduces, in a folder.
fn reduce(model: &Model, wish: &Wish<'_>) -> (tempfile::TempDir, Experts, Model) {
    let out = tempfile::tempdir().unwrap();
    let (store, samples) = (Store::new(out.path().join("stats")), samples(model));
    let calibrate = Calibrate { samples: 4, tokens: 48, ..Calibrate::over(Vec::new()) };
    let fingerprint = model.checkpoint().fingerprint();
    let pass =
        pass::Pass { weights: model, fingerprint, samples: &samples, calibrate: &calibrate, store: &store, watch: None, progress: &Quiet };
    pass::run(&pass, Device::Cpu).unwrap();
    let Wish { pruner, merger, repair } = *wish;
    let request =
        Request { model, pruner, merger, repair, samples: &samples, device: Device::Cpu, progress: &Quiet, store: &store, dir: out.path() };
    let experts = run(&request).unwrap();
    let reduced = open(model, out.path()).unwrap();
    assert_eq!(Experts::read(&out.path().join("experts.json")).unwrap(), experts);
    (out, experts, reduced)
}

fn keep(share: f64) -> Params {
    Params { keep: Some(share), mtp: Some(Mtp::Drop), ..Params::default() }
}

fn bytes(model: &Model) -> BTreeMap<String, Vec<u8>> {
    model.checkpoint().tensors().map(|info| (info.name.clone(), model.checkpoint().bytes(&info.name).unwrap().to_vec())).collect()
}

#[test]
fn pruning_nothing_leaves_every_byte() {
    for name in FAMILIES {
        let model = fixture(name);
        let (_out, experts, reduced) =
            reduce(&model, &Wish { pruner: Some(&Pruner::EasyEp(Params { mtp: None, ..keep(1.0) })), ..Wish::default() });
        assert_eq!(bytes(&reduced), bytes(&model), "{name}");
        assert_eq!(reduced.checkpoint().config_text(), model.checkpoint().config_text(), "{name}");
        assert!(experts.layers.values().all(crate::plan::Fate::is_nothing));
    }
}

#[test]
fn every_family_loses_half_of_its_experts() {
    for name in FAMILIES {
        let model = halvable(name);
        let (_out, experts, reduced) = reduce(&model, &Wish { pruner: Some(&Pruner::Reap(keep(0.5))), ..Wish::default() });
        let (before, after) = (experts.before, experts.after);
        assert_eq!(2 * after, before, "{name}");
        assert_eq!(reduced.layout().tensors().iter().filter(|t| t.role == Role::Mtp).count(), 0, "{name}");
        for (&layer, fate) in &experts.layers {
            let moe = reduced.spec().moe(layer).unwrap();
            assert_eq!((moe.experts, fate.experts.len(), fate.dropped.len()), (after, after, before - after), "{name}");
            let (old, new) =
                (model.matrix(Role::Layer(layer, Part::Router)).unwrap(), reduced.matrix(Role::Layer(layer, Part::Router)).unwrap());
            for (place, members) in fate.experts.iter().enumerate() {
                assert_eq!(old.row(members[0]), new.row(place), "{name}");
                assert_eq!(model.expert(layer, members[0]).unwrap(), reduced.expert(layer, place).unwrap(), "{name}");
            }
            if let Some(groups) = moe.router.groups {
                let size = before / groups.count;
                let of = |group: usize| fate.experts.iter().filter(|old| old[0] / size == group).count();
                assert!((0..groups.count).all(|group| of(group) * groups.count == after), "{name}: {:?}", fate.experts);
            }
        }
        let ids = samples(&model).ids;
        let windows = [Windows { domain: "a".into(), ids }];
        let scores = evaluate(Models { candidate: &reduced, reference: Some(&model) }, &windows, Device::Cpu, &Quiet).unwrap();
        assert!(scores.all.perplexity.is_finite() && scores.all.divergence.unwrap().kl > 0.0, "{name}");
    }
}

#[test]
fn every_pruner_and_merger_works_on_a_model_and_keeps_its_count() {
    let model = fixture("qwen3_moe");
    let (half, lot) = (keep(0.5), random::Params { experts: Some(3), seed: 5, ..random::Params::default() });
    let pruners = [
        Pruner::Frequency(half.clone()),
        Pruner::RoutingMass(half.clone()),
        Pruner::Ean(Params { domains: vec!["b".into()], ..half }),
        Pruner::Random(lot),
        Pruner::Exhaustive(exhaustive::Params { experts: Some(5), tokens: 40, ..exhaustive::Params::default() }),
    ];
    for pruner in &pruners {
        let (_out, experts, _) = reduce(&model, &Wish { pruner: Some(pruner), ..Wish::default() });
        let count = pruner.asked().count(8);
        assert!(experts.layers.values().all(|fate| fate.experts.len() == count && fate.scores.len() == 8), "{}", pruner.name());
    }
    let ream = Merger::Ream(crate::merge::ream::Params { experts: Some(4), ..Default::default() });
    let subspace = Merger::Subspace(crate::merge::subspace::Params { experts: Some(4), rank: 0.5, ..Default::default() });
    for merger in [&ream, &subspace] {
        let (_out, experts, reduced) = reduce(&model, &Wish { merger: Some(merger), ..Wish::default() });
        for (&layer, fate) in &experts.layers {
            assert_eq!((fate.experts.len(), fate.experts.concat().len()), (4, 8), "{}", merger.name());
            let alone = fate.experts.iter().position(|members| members.len() == 1);
            if let Some(place) = alone {
                assert_eq!(reduced.expert(layer, place).unwrap(), model.expert(layer, fate.experts[place][0]).unwrap());
            }
        }
    }
}

#[test]
fn merging_into_as_many_experts_leaves_every_byte() {
    let model = fixture("olmoe");
    let merger = Merger::WeightedMean(weighted_mean::Params { keep: Some(1.0), ..Default::default() });
    let (_out, _, reduced) = reduce(&model, &Wish { merger: Some(&merger), ..Wish::default() });
    assert_eq!(bytes(&reduced), bytes(&model));
}

/// A model whose last expert stands there twice.
fn doubled(model: &Model, dir: &Path) -> Model {
    let count = crate::plan::experts::count(model);
    let mut renamed: BTreeMap<String, String> = model.layout().roles().map(|(_, name)| (name.to_owned(), name.to_owned())).collect();
    let mut changed = Vec::new();
    for layer in (0..model.spec().layers.len()).filter(|&layer| model.spec().moe(layer).is_some()) {
        for projection in Projection::ALL {
            let name = |expert| model.family().names.of(Role::Layer(layer, Part::Expert(expert, projection))).unwrap();
            renamed.insert(name(count), name(count - 1));
        }
        let name = model.layout().name(Role::Layer(layer, Part::Router)).unwrap();
        let rows = model.checkpoint().matrix(name).unwrap();
        let values: Vec<f32> = rows.iter().chain(rows.row(count - 1)).copied().collect();
        let path = dir.join(format!("router-{layer}.safetensors"));
        let declared = Declared { name: name.to_owned(), dtype: Element::Bf16, shape: vec![count + 1, rows.ncols()] };
        let file = Create::new(&path, vec![declared], &BTreeMap::new()).unwrap();
        file.put(name, &tensor::encode(Dtype::Bf16, &values).unwrap()).unwrap();
        file.finish().unwrap();
        changed.push(path);
    }
    let config = config::set_counts(model.checkpoint().config_text(), &COUNTS, count as u64 + 1, "num_experts").unwrap();
    Model::from_checkpoint(model.checkpoint().derive(&Derived { config, renamed, changed: &changed, key: "doubled" }).unwrap()).unwrap()
}

#[test]
fn an_expert_that_stands_there_twice_becomes_one_again() {
    let (model, dir) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let doubled = doubled(&model, dir.path());
    assert_eq!(doubled.spec().moe(0).unwrap().experts, 9);
    let merger = Merger::WeightedMean(weighted_mean::Params { experts: Some(8), ..Default::default() });
    let (_out, experts, reduced) = reduce(&doubled, &Wish { merger: Some(&merger), ..Wish::default() });
    for (&layer, fate) in &experts.layers {
        let pair = fate.experts.iter().find(|members| members.len() == 2).unwrap();
        assert!(pair.contains(&7) && pair.contains(&8), "{:?}", fate.experts);
        // The pair stands where its heavier member stood, last in any case.
        assert_eq!(reduced.matrix(Role::Layer(layer, Part::Router)).unwrap(), model.matrix(Role::Layer(layer, Part::Router)).unwrap());
        assert!((0..8).all(|e| reduced.expert(layer, e).unwrap() == model.expert(layer, e).unwrap()), "layer {layer}");
    }
}

#[test]
fn a_repaired_router_says_more_of_what_the_whole_block_said() {
    for name in ["qwen3_moe", "deepseek_v3_mtp"] {
        let model = halvable(name);
        // The down projections alone are the default, and have a test below.
        let down = down::Params { rounds: 0, ..down::Params::default() };
        let params = removal::Params { tokens: 192, steps: 60, down, ..removal::Params::default() };
        let pruner = Pruner::EasyEp(keep(0.5));
        let (_out, experts, reduced) = reduce(&model, &Wish { pruner: Some(&pruner), repair: Some(&params), ..Wish::default() });
        let repaired: Vec<_> = experts.layers.values().filter_map(|fate| fate.repaired).collect();
        assert!(!repaired.is_empty() && repaired.iter().all(|r| r.after <= r.before), "{name}: {repaired:?}");
        assert!(repaired.iter().any(|r| r.after < 0.98 * r.before), "{name}: {repaired:?}");
        let (&layer, fate) = experts.layers.iter().find(|(_, fate)| fate.repaired.is_some_and(|r| r.after < r.before)).unwrap();
        let (old, new) = (model.expert(layer, fate.experts[0][0]).unwrap(), reduced.expert(layer, 0).unwrap());
        assert_eq!(old.gate, new.gate, "{name}");
        assert_ne!(old.down, new.down, "{name}");
    }
}

#[test]
fn fitted_down_projections_say_more_of_it_too() {
    for name in ["qwen3_moe", "deepseek_v3_mtp"] {
        let model = halvable(name);
        let down = down::Params { damping: 1.0, ..down::Params::default() };
        let params = removal::Params { tokens: 192, down, ..removal::Params::default() };
        let pruner = Pruner::EasyEp(keep(0.5));
        let (_out, experts, reduced) = reduce(&model, &Wish { pruner: Some(&pruner), repair: Some(&params), ..Wish::default() });
        let repaired: Vec<_> = experts.layers.values().filter_map(|fate| fate.repaired).collect();
        assert!(!repaired.is_empty() && repaired.iter().all(|r| r.after <= r.before), "{name}: {repaired:?}");
        let (&layer, fate) = experts.layers.iter().find(|(_, fate)| fate.repaired.is_some_and(|r| r.after < r.before)).unwrap();
        let (old, new) = (model.expert(layer, fate.experts[0][0]).unwrap(), reduced.expert(layer, 0).unwrap());
        assert_eq!((old.gate, old.up), (new.gate, new.up), "{name}");
        assert_ne!(old.down, new.down, "{name}");
        let (rows, whole) = [&reduced, &model].map(|m| m.matrix(Role::Layer(layer, Part::Router)).unwrap()).into();
        assert!(fate.experts.iter().enumerate().all(|(new, old)| rows.row(new) == whole.row(old[0])), "{name}");
    }
}

#[test]
fn the_same_twice_gives_the_same_bytes_whatever_the_threads() {
    let model = fixture("qwen2_moe");
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let params = removal::Params { tokens: 100, steps: 20, ..removal::Params::default() };
        pool.install(|| bytes(&reduce(&model, &Wish { pruner: Some(&Pruner::Ean(keep(0.5))), repair: Some(&params), ..Wish::default() }).2))
    };
    assert_eq!(run(1), run(3));
}

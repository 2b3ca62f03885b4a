//! The table over a few tokens of a tiny checkpoint, most of whose experts see none.

use calib::backward::{self, Backward, Scratch};
use calib::device::Device;
use calib::pass::{self, Pass};
use calib::progress::Quiet;
use calib::sample::{Calibrate, Samples};
use calib::stats::{Store, Threshold};

use super::*;
use crate::allocate::Allocate;
use crate::plan::{Shape, matrices};
use crate::quantize::{Quantizer, gptq};

/// The losses of every matrix, and how many tokens entered each expert.
fn surveyed(cost: &str, rule: Undercalibrated) -> (Table, BTreeMap<(usize, usize), u64>) {
    let model = crate::testing::fixture("qwen3_moe");
    let ids = vec![vec![3, 9, 4, 1]];
    let samples = Samples { domains: vec!["en".into()], tokens: 4, ids, domain: vec![0], ..Default::default() };
    let allocate: Allocate =
        toml::from_str(&format!("bits_per_weight = 3\ngroup = 8\nchoices = [2, 4]\ncost = \"{cost}\"\nfill = \"solve\"")).unwrap();
    let shape = Shape::of(&model);
    let matrices = matrices(&allocate, &shape);
    let dir = tempfile::tempdir().unwrap();
    let quantizer = Quantizer::Gptq(gptq::Params::default());
    let what = (allocate.cost, allocate.fill, allocate.options());
    let survey = Survey::new(&model, Solver { quantizer: &quantizer, refine: None }, &matrices, what, (4, rule), dir.path());
    let store = Store::new(dir.path().join("stats"));
    let calibrate = Calibrate::over(vec![]);
    let watch = survey.watch();
    let pass = Pass {
        weights: &model,
        fingerprint: &shape.fingerprint,
        samples: &samples,
        calibrate: &calibrate,
        store: &store,
        watch,
        progress: &Quiet,
    };
    let layers = pass::run(&pass, Device::Cpu).unwrap().layers;
    if allocate.cost == Cost::EndLoss {
        let params = backward::Params::default();
        let back = Backward { weights: &model, ids: &samples.ids, params: &params, scratch: &Scratch::Memory, progress: &Quiet };
        backward::run(&back, &survey, Device::Cpu).unwrap();
    }
    survey.finish(layers, samples.hash()).unwrap();
    let table = serde_json::from_slice(&fs_err::read(dir.path().join("sensitivity.json")).unwrap()).unwrap();
    let loads = (0..layers).flat_map(|layer| {
        let experts = store.get(layer).unwrap().experts;
        let load = experts.map(|experts| experts.router.load().to_vec()).unwrap_or_default();
        load.into_iter().enumerate().map(move |(e, n)| ((layer, e), n))
    });
    (table, loads.collect())
}

fn of(table: &Table, (layer, expert): (usize, usize), projection: &str) -> [f64; 2] {
    let name = format!("model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight");
    [0, 1].map(|choice| table.losses[&name][choice].unwrap())
}

#[test]
fn an_expert_that_no_token_reached_costs_something_and_less_than_one_that_many_did() {
    for cost in ["hessian", "end_loss"] {
        let (table, loads) = surveyed(cost, Undercalibrated::default());
        assert_eq!(table.cost.name(), cost);
        let unseen: Vec<_> = loads.iter().filter(|(_, n)| **n == 0).map(|(at, _)| *at).collect();
        assert!(!unseen.is_empty() && loads.values().any(|n| *n > 1), "{loads:?}");
        let dropped = |at: &(usize, usize)| table.dropped[&format!("model.layers.{}.mlp.experts.{}.down_proj.weight", at.0, at.1)];
        assert_eq!(table.dropped.len(), loads.len());
        for at in loads.keys() {
            let [two, _] = of(&table, *at, "down");
            assert!(
                0.0 <= dropped(at).mean && dropped(at).mean <= dropped(at).zero && two < dropped(at).zero,
                "{cost}: {at:?} {:?}",
                dropped(at)
            );
        }
        let mean_of = |which: &dyn Fn(u64) -> bool| {
            let found: Vec<f64> = loads.iter().filter(|(_, n)| which(**n)).map(|(at, _)| dropped(at).zero).collect();
            found.iter().sum::<f64>() / found.len() as f64
        };
        assert!(0.0 < mean_of(&|n| n == 0) && mean_of(&|n| n == 0) < mean_of(&|n| n > 1), "{cost}");
        for projection in ["gate", "up", "down"] {
            for at in &unseen {
                let [two, four] = of(&table, *at, projection);
                assert!(two > 0.0 && four > 0.0 && four < two, "{cost}: {at:?} {projection}: {two} {four}");
            }
            let mean = |which: &dyn Fn(u64) -> bool| {
                let found: Vec<f64> = loads.iter().filter(|(_, n)| which(**n)).map(|(at, _)| of(&table, *at, projection)[0]).collect();
                found.iter().sum::<f64>() / found.len() as f64
            };
            let (none, many) = (mean(&|n| n == 0), mean(&|n| n > 1));
            assert!(none < many, "{cost}, {projection}: {none} where no token came, {many} where some did");
        }
    }
}

#[test]
fn with_the_rule_rtn_few_tokens_cost_what_rounding_costs() {
    let all = Undercalibrated::Rtn(Threshold { tokens_per_input: 100.0 });
    let (rounded, loads) = surveyed("hessian", all);
    let (solved, _) = surveyed("hessian", Undercalibrated::Blend(Threshold { tokens_per_input: 100.0 }));
    assert!(rounded.ratios.is_empty(), "what is rounded takes no ratio");
    let worse = loads.keys().filter(|at| of(&rounded, **at, "up")[0] > of(&solved, **at, "up")[0]).count();
    assert!(
        worse * 10 > loads.len() * 9,
        "solving against the moment that losses are measured by must be better: {worse} of {}",
        loads.len()
    );
}

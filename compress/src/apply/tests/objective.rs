//! Token weights on their way from a backward pass, or the router, to the codes.

use calib::backward::{Params, Targets};
use calib::sample::Samples;
use ndarray::Array2;

use super::*;
use crate::objective::{Backwards, Objective, OutputWeight, TokenWeight, TokenWeights};
use crate::quantize::Refine;
use crate::quantize::learned::{self, End};

fn weighted(model: &Model, token_weight: TokenWeight, power: Option<u8>) -> Plan {
    Plan { objective: Objective { token_weight, power, ..Objective::default() }, ..gptq_plan(model) }
}

fn drawn(model: &Model) -> Samples {
    let ids = samples(model);
    Samples { domains: vec!["a".into()], tokens: ids[0].len(), domain: vec![0; ids.len()], ids, ..Default::default() }
}

fn codes(model: &Model, plan: &Plan, dir: &Path, role: Role) -> Array2<f32> {
    solve(model, plan, Some(&samples(model)), dir, Device::Cpu, &Quiet).unwrap();
    let source = output::FromSolved::open(model, plan, dir).unwrap();
    crate::export::Source::quantized(&source, model.layout().name(role).unwrap()).unwrap().dequantize()
}

#[test]
fn weights_of_tokens_change_the_codes_that_they_reach_and_no_others() {
    use calib::arch::Projection::{Down, Up};
    let model = fixture("qwen2_moe");
    let solved = |token_weight, power, role| {
        let dir = tempfile::tempdir().unwrap();
        codes(&model, &weighted(&model, token_weight, power), dir.path(), role)
    };
    for part in [Part::Expert(0, Up), Part::Expert(1, Down), Part::Shared(Up), Part::Shared(Down), Part::Query] {
        let role = Role::Layer(0, part);
        let none = solved(TokenWeight::None, None, role);
        let (first, second) = (solved(TokenWeight::Affinity, Some(1), role), solved(TokenWeight::Affinity, None, role));
        // Attention has no routing weight: every token counts 1.
        assert_eq!((none == first, none == second), (part == Part::Query, part == Part::Query), "{part:?}");
    }
}

#[test]
fn a_backward_pass_leaves_its_weights_where_apply_finds_them() {
    let (model, dir) = (fixture("qwen2_moe"), tempfile::tempdir().unwrap());
    let samples = drawn(&model);
    let plan = Plan { corpus: Some(samples.hash()), ..weighted(&model, TokenWeight::EndLoss, None) };
    let run = |dir: &Path| solve(&model, &plan, Some(&samples.ids), dir, Device::Cpu, &Quiet);
    let said = run(dir.path()).unwrap_err().to_string();
    assert!(said.contains("token_weights") && said.contains("stage calibrate"), "{said}");
    let end_loss = Params::default();
    let store = TokenWeights::new(dir.path(), &plan.model, &samples.hash(), &end_loss);
    let pass = Backwards { survey: None, weights: Some(&store), end_loss: &end_loss };
    pass.run(&model, &samples, dir.path(), Device::Cpu, &Quiet).unwrap();
    assert!(store.is_finished().unwrap() && !dir.path().join("backward").exists());
    assert_eq!(store.layer(0).unwrap().gradient.len(), samples.total_tokens());
    run(dir.path()).unwrap();
    let whole = solved_bytes(dir.path());
    // Killed in the pass and resumed: the same weights, and so the same codes.
    let killed = tempfile::tempdir().unwrap();
    let store = TokenWeights::new(killed.path(), &plan.model, &samples.hash(), &end_loss);
    let pass = Backwards { survey: None, weights: Some(&store), end_loss: &end_loss };
    let kill = Kill(AtomicU64::new(2));
    let once = || pass.run(&model, &samples, killed.path(), Device::Cpu, &kill);
    assert!(catch_unwind(AssertUnwindSafe(once)).is_err());
    assert!(!store.is_finished().unwrap());
    pass.run(&model, &samples, killed.path(), Device::Cpu, &Quiet).unwrap();
    run(killed.path()).unwrap();
    assert_eq!(solved_bytes(killed.path()), whole);
    let text = Params { targets: Targets::Text, ..end_loss.clone() };
    for (samples, end_loss) in [("other samples", &end_loss), (samples.hash().as_str(), &text)] {
        let other = TokenWeights::new(killed.path(), &plan.model, samples, end_loss);
        assert!(other.is_finished().unwrap_err().to_string().contains("other calibration samples or another end_loss"));
    }
}

#[test]
fn targets_of_the_text_are_weighed_as_a_plan_asks_for_them() {
    let (model, samples) = (fixture("qwen2_moe"), drawn(&fixture("qwen2_moe")));
    let weights = |targets| {
        let (dir, end_loss) = (tempfile::tempdir().unwrap(), Params { seed: 3, targets });
        let store = TokenWeights::new(dir.path(), model.checkpoint().fingerprint(), &samples.hash(), &end_loss);
        let pass = Backwards { survey: None, weights: Some(&store), end_loss: &end_loss };
        pass.run(&model, &samples, dir.path(), Device::Cpu, &Quiet).unwrap();
        let plan = Plan { corpus: Some(samples.hash()), end_loss, ..weighted(&model, TokenWeight::EndLoss, None) };
        solve(&model, &plan, Some(&samples.ids), dir.path(), Device::Cpu, &Quiet).unwrap();
        let other = Plan { end_loss: Params::default(), ..plan };
        let again = tempfile::tempdir().unwrap();
        fs_err::rename(dir.path().join("token_weights"), again.path().join("token_weights")).unwrap();
        let said = solve(&model, &other, Some(&samples.ids), again.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
        assert!(said.contains("another end_loss"), "{said}");
        TokenWeights::new(again.path(), &other.model, &samples.hash(), &Params { seed: 3, targets }).layer(1).unwrap()
    };
    let (own, text) = (weights(Targets::Own), weights(Targets::Text));
    assert_ne!(own, text);
    // Nothing comes behind the last token of a sample, and the text has no target for it.
    let last = samples.ids[0].len() - 1;
    assert!(text.gradient[last] == 0.0 && own.gradient[last] > 0.0, "{} {}", text.gradient[last], own.gradient[last]);
}

/// No step is taken: the held-out samples judge what the descent left.
fn judged(model: &Model, output_weight: OutputWeight, threads: usize, dir: &Path) -> f64 {
    let how = |_: &str, _: Role| Some(Quantize { bits: 3, grid: Grid::Half, ..four_bits() });
    let end = End { steps: 0, ..End::default() };
    let params = learned::Params { steps: 0, held_out: 5, end: Some(end), ..learned::Params::default() };
    let objective = Objective { output_weight, ..Objective::default() };
    let quantizer = Quantizer::Gptq(gptq::Params::default());
    let plan = Plan { objective, refine: Some(Refine::Learned(params)), ..plan(model, quantizer, how) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| solve(model, &plan, Some(&samples(model)), dir, Device::Cpu, &Quiet)).unwrap().end.unwrap().before
}

#[test]
fn outputs_that_make_up_for_one_another_do_so_on_any_number_of_threads() {
    for name in ["qwen3_moe", "deepseek_v2", "qwen2_moe"] {
        let (model, dirs) = (fixture(name), [(); 3].map(|()| tempfile::tempdir().unwrap()));
        let alone = judged(&model, OutputWeight::None, 2, dirs[0].path());
        let both = judged(&model, OutputWeight::EndLoss, 2, dirs[1].path());
        assert_eq!(judged(&model, OutputWeight::EndLoss, 1, dirs[2].path()), both, "{name}");
        let ended = |dir: &Path| fs_err::read(dir.join("solved/ended/layer-00001.safetensors")).unwrap();
        assert!(ended(dirs[1].path()) == ended(dirs[2].path()) && both != alone, "{name}");
    }
}

//! Layers whose codes and scales are learned.

use super::*;
use crate::quantize::Refine;
use crate::quantize::learned::{End, Params};
use crate::repair::{Order, Repair};
use crate::solved::Judged;

/// Two bits, so that there is something to learn.
fn learning(model: &Model, order: Order, steps: u32) -> Plan {
    let how = |_: &str, _: Role| Some(Quantize { bits: 2, grid: Grid::Half, ..four_bits() });
    let mut plan = plan(model, Quantizer::Gptq(gptq::Params::default()), how);
    plan.refine =
        Some(Refine::Learned(Params { steps, samples: 2, held_out: 2, judged: 4, rate: 0.02, scale_rate: 0.01, ..Params::default() }));
    plan.repair = Repair { order, ..Repair::default() };
    plan
}

fn solved(model: &Model, plan: &Plan, dir: &Path) -> Outcome {
    solve(model, plan, Some(&samples(model)), dir, Device::Cpu, &Quiet).unwrap()
}

/// What was said of each layer.
fn judged(model: &Model, plan: &Plan, dir: &Path) -> Vec<Judged> {
    let layers = work::by_layer(model, plan).unwrap();
    let solved = Solved::finished(dir, plan, layers.len()).unwrap();
    let of = |(layer, jobs): (usize, &Vec<Job<'_>>)| solved.open(layer).unwrap().report(jobs[0].name).unwrap().learned.unwrap();
    layers.iter().enumerate().map(of).collect()
}

#[test]
fn no_layer_is_left_worse_by_samples_that_no_step_saw_and_some_are_better() {
    let mut better = 0;
    for name in ["qwen3_moe", "deepseek_v2", "qwen2_moe"] {
        for order in [Order::Independent, Order::Sequential] {
            let (model, dir) = (fixture(name), tempfile::tempdir().unwrap());
            let plan = learning(&model, order, 12);
            let outcome = solved(&model, &plan, dir.path());
            assert!(outcome.matrices.contains_key(&By::GptqLearned), "{name}: {outcome:?}");
            for Judged { before, after, step } in judged(&model, &plan, dir.path()) {
                assert!(after <= before && before > 0.0 && (step > 0) == (after < before), "{name}: {after} {before} {step}");
                better += usize::from(after < before);
            }
        }
    }
    assert!(better > 0);
}

#[test]
fn no_steps_are_what_they_start_from() {
    let model = fixture("qwen3_moe");
    let with = |refine| {
        let dir = tempfile::tempdir().unwrap();
        let plan = Plan { refine: Some(refine), ..learning(&model, Order::Independent, 0) };
        solved(&model, &plan, dir.path());
        let source = output::FromSolved::open(&model, &plan, dir.path()).unwrap();
        let of = |part| crate::export::Source::quantized(&source, model.layout().name(Role::Layer(1, part)).unwrap()).unwrap();
        [of(Part::Query), of(Part::Expert(0, calib::arch::Projection::Down))]
    };
    let Some(start) = learning(&model, Order::Independent, 0).refine else { panic!("it learns") };
    assert_eq!(with(start), with(Refine::Descent(crate::quantize::descent::Params::default())));
}

#[test]
fn bits_depend_neither_on_threads_nor_on_interruptions() {
    let model = fixture("qwen3_moe");
    for order in [Order::Independent, Order::Sequential] {
        let plan = learning(&model, order, 4);
        let with = |threads: usize| {
            let dir = tempfile::tempdir().unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| solved(&model, &plan, dir.path()));
            solved_bytes(dir.path())
        };
        assert_eq!(with(1), with(3));
        let killed = tempfile::tempdir().unwrap();
        let kill = Kill(AtomicU64::new(1));
        let run = || solve(&model, &plan, Some(&samples(&model)), killed.path(), Device::Cpu, &kill);
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        assert_eq!(solved(&model, &plan, killed.path()).resumed, 1);
        assert_eq!(solved_bytes(killed.path()), with(2));
    }
}

#[test]
fn too_few_samples_are_refused() {
    let (model, dir) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let mut plan = learning(&model, Order::Independent, 4);
    plan.refine = Some(Refine::Learned(Params { held_out: 6, ..Params::default() }));
    let said = solve(&model, &plan, Some(&samples(&model)), dir.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
    assert!(said.contains("holds out 6 of 6 calibration samples"), "{said}");
}

/// The same, with steps against the end of the model.
fn ending(model: &Model, order: Order) -> Plan {
    let mut plan = learning(model, order, 0);
    if let Some(Refine::Learned(params)) = &mut plan.refine {
        params.end = Some(End { steps: 12, samples: 2, rate: 0.02, scale_rate: 0.01, judged: 4 });
    }
    plan
}

#[test]
fn steps_against_the_end_leave_no_model_worse_by_samples_that_no_step_saw_and_some_are_better() {
    let mut better = 0;
    for name in ["qwen3_moe", "deepseek_v2", "qwen2_moe"] {
        let (model, dir) = (fixture(name), tempfile::tempdir().unwrap());
        let plan = ending(&model, Order::Sequential);
        let Judged { before, after, step } = solved(&model, &plan, dir.path()).end.unwrap();
        assert!(after <= before && before > 0.0 && (step > 0) == (after < before), "{name}: {after} {before} {step}");
        better += usize::from(after < before);
    }
    assert!(better > 0);
}

fn ended_bytes(dir: &Path) -> Vec<Vec<u8>> {
    (0..2).map(|layer| fs_err::read(dir.join(format!("solved/ended/layer-{layer:05}.safetensors"))).unwrap()).collect()
}

#[test]
fn bits_of_an_end_depend_neither_on_threads_nor_on_interruptions() {
    let model = fixture("qwen3_moe");
    let plan = ending(&model, Order::Independent);
    let with = |threads: usize| {
        let dir = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| solved(&model, &plan, dir.path()));
        ended_bytes(dir.path())
    };
    assert!(with(1) == with(3));
    // Killed between two steps, and once more after its account was written: then nothing is left to do.
    let killed = tempfile::tempdir().unwrap();
    let kill = Kill(AtomicU64::new(5));
    let run = || solve(&model, &plan, Some(&samples(&model)), killed.path(), Device::Cpu, &kill);
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    let first = solved(&model, &plan, killed.path());
    assert!(ended_bytes(killed.path()) == with(2));
    assert_eq!(solved(&model, &plan, killed.path()).end, first.end);
}

//! Layers solved behind compressed ones, and what is mended there.

use super::*;
use crate::repair::{Order, Repair, refit};

/// Two bits, so that there is something to mend.
fn sequential(model: &Model, propagate: Option<f64>, fit: bool) -> Plan {
    let how = |_: &str, _: Role| Some(Quantize { bits: 2, grid: Grid::Asym, ..four_bits() });
    let mut plan = plan(model, Quantizer::Gptq(gptq::Params::default()), how);
    plan.repair = Repair { order: Order::Sequential, propagate, router_repair: fit.then(refit::Params::default), ..Repair::default() };
    if fit {
        let routers = model.layout().roles().filter(|(role, _)| matches!(role, Role::Layer(_, Part::Router)));
        routers.for_each(|(_, name)| _ = plan.tensors.insert(name.to_owned(), Action::Refit));
    }
    plan
}

fn solved(model: &Model, plan: &Plan, dir: &Path) -> Outcome {
    solve(model, plan, Some(&samples(model)), dir, Device::Cpu, &Quiet).unwrap()
}

#[test]
fn a_killed_run_ends_with_the_same_bytes_behind_compressed_layers() {
    for (name, propagate, fit) in [("qwen3_moe", Some(0.5), true), ("deepseek_v2", None, true), ("qwen2_moe", Some(1.0), false)] {
        let model = fixture(name);
        let (plan, ids, whole) = (sequential(&model, propagate, fit), samples(&model), tempfile::tempdir().unwrap());
        solved(&model, &plan, whole.path());
        for layers in 1..model.spec().layers.len() as u64 {
            let killed = tempfile::tempdir().unwrap();
            let kill = Kill(AtomicU64::new(layers));
            let run = || solve(&model, &plan, Some(&ids), killed.path(), Device::Cpu, &kill);
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            if layers == 1 {
                // The original's hidden states are a layer ahead, those of the compressed layers are lost.
                let _ = fs_err::remove_file(killed.path().join("solved/hidden.safetensors"));
            }
            let again = solve(&model, &plan, Some(&ids), killed.path(), Device::Cpu, &Quiet).unwrap();
            assert_eq!(again.resumed as u64, layers);
            assert_eq!(solved_bytes(whole.path()), solved_bytes(killed.path()), "{name} after {layers}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_behind_compressed_layers() {
    let model = fixture("qwen3_moe");
    let plan = sequential(&model, Some(0.5), true);
    let with = |threads: usize| {
        let dir = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| solved(&model, &plan, dir.path()));
        solved_bytes(dir.path())
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn only_what_stands_behind_something_compressed_changes() {
    use calib::arch::Projection::Up;
    let model = fixture("qwen3_moe");
    let with = |order, propagate| {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = sequential(&model, propagate, false);
        plan.repair.order = order;
        solved(&model, &plan, dir.path());
        let source = output::FromSolved::open(&model, &plan, dir.path()).unwrap();
        let of = |part| crate::export::Source::quantized(&source, model.layout().name(Role::Layer(0, part)).unwrap()).unwrap();
        [of(Part::Query), of(Part::Expert(0, Up))]
    };
    let (independent, sequential, aimed) =
        (with(Order::Independent, None), with(Order::Sequential, None), with(Order::Sequential, Some(0.5)));
    // Nothing stands before the first layer's queries; its attention stands before its experts.
    assert!(independent[0] == sequential[0] && sequential[0] == aimed[0]);
    assert!(independent[1] != sequential[1] && sequential[1] != aimed[1]);
}

#[test]
fn fitted_routers_are_exported_in_their_own_type_and_told() {
    let (model, out) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let (plan, dir) = (sequential(&model, None, true), out.path().join("moepress"));
    let outcome = solved(&model, &plan, &dir);
    assert_eq!(outcome.routers.len(), model.spec().layers.len());
    for refit in outcome.routers.values() {
        assert_eq!(refit.tokens, 240);
        assert!(refit.overlap_after > 0.0 && refit.overlap_before > 0.0 && refit.overlap_after <= 1.0, "{refit:?}");
    }
    write(&model, &plan, &dir, &both(), out.path(), &Quiet).unwrap();
    let dense = Model::open(&out.path().join("dense")).unwrap();
    let packed = packed::open(out.path(), ExpertRounding::None).unwrap();
    for layer in 0..model.spec().layers.len() {
        let role = Role::Layer(layer, Part::Router);
        let (was, is) = (model.matrix(role).unwrap(), dense.matrix(role).unwrap());
        assert!(was != is && (&was - &is).mapv(f32::abs).sum() < was.mapv(f32::abs).sum(), "layer {layer}");
        assert_eq!(packed.matrix(role).unwrap(), is);
        let name = model.layout().name(role).unwrap();
        assert_eq!(dense.checkpoint().info(name).unwrap().dtype, model.checkpoint().info(name).unwrap().dtype);
    }
}

#[test]
fn an_expert_that_no_token_reaches_any_more_is_rounded_and_counted() {
    let (model, dir) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let ids = vec![vec![1, 2]];
    let plan = sequential(&model, None, false);
    let independent = Plan { repair: Repair::default(), ..plan.clone() };
    let said = solve(&model, &independent, Some(&ids), dir.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
    assert!(said.contains("none reached it"), "{said}");
    let dir = tempfile::tempdir().unwrap();
    let outcome = solve(&model, &plan, Some(&ids), dir.path(), Device::Cpu, &Quiet).unwrap();
    assert!(outcome.matrices[&By::RtnUnreached] > 0, "{outcome:?}");
}

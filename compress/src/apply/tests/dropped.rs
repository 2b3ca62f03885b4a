//! Experts that put out a constant.

use calib::arch::{Projection, Spec};
use calib::evaluate::{Models, Windows, evaluate};
use ndarray::{Array1, Array2};

use super::*;
use crate::allocate::Substitute;
use crate::constants::{self, Constant, Outputs};
use crate::repair::{Order, Repair};

/// Two of a layer's eight.
const GONE: [usize; 2] = [1, 6];

fn drops(role: Role) -> bool {
    matches!(role, Role::Layer(_, Part::Expert(expert, _)) if GONE.contains(&expert))
}

fn dropping(model: &Model, mut plan: Plan, by: Substitute) -> Plan {
    for (_, name) in model.layout().roles().filter(|(role, _)| drops(*role)) {
        plan.tensors.insert(name.to_owned(), Action::Substitute(by));
    }
    plan
}

/// Means that have more digits than bf16.
fn means(model: &Model, dir: &Path) -> Outputs {
    let output =
        |layer: usize, expert: usize| (0..model.spec().hidden).map(|i| ((i * 7 + layer + expert) % 9) as f32 / 9.0 - 0.4).collect();
    let layers = (0..model.spec().layers.len()).filter(|&layer| model.spec().moe(layer).is_some());
    let outputs: Outputs = layers.flat_map(|layer| GONE.map(|expert| ((layer, expert), output(layer, expert)))).collect();
    constants::write(&constants::dropped_path(dir), &outputs).unwrap();
    outputs
}

/// The model as the plan leaves it, dense: rounded anew, and constants for the experts that go.
struct Meant<'a> {
    model: &'a Model,
    plan: &'a Plan,
    means: Outputs,
}

impl Weights for Meant<'_> {
    fn spec(&self) -> &Spec {
        self.model.spec()
    }

    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        let w = self.model.matrix(role)?;
        Ok(match &self.plan.tensors[self.model.layout().name(role).unwrap()] {
            Action::Quantize(how) => rtn::rtn(w.view(), &how.width(), &rtn::Params::default()).unwrap().dequantize(),
            Action::Substitute(_) => panic!("{role:?} is asked for"),
            _ => w,
        })
    }

    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.model.vector(role)
    }

    fn applied(&self, layer: usize, expert: usize) -> calib::Result<Option<Box<dyn calib::Applied>>> {
        let inner = self.spec().moe(layer).map_or(0, |moe| moe.inner);
        let output = self.means.get(&(layer, expert)).map(|mean| constants::rounded(mean, ScaleType::Bf16));
        Ok(output.map(|output| Box::new(Constant { output, inner }) as Box<dyn calib::Applied>))
    }
}

/// KL divergence of one model from another on a few tokens.
fn apart(candidate: &dyn Weights, reference: &dyn Weights, model: &Model) -> f64 {
    let windows = [Windows { domain: "x".into(), ids: samples(model) }];
    let models = Models { candidate, reference: Some(reference) };
    evaluate(models, &windows, Device::Cpu, &Quiet).unwrap().all.divergence.unwrap().kl
}

#[test]
fn a_packed_model_runs_as_its_plan_means_it() {
    for name in ["qwen3_moe", "deepseek_v2"] {
        let (model, out) = (fixture(name), tempfile::tempdir().unwrap());
        let dir = out.path().join("moepress");
        fs_err::create_dir_all(&dir).unwrap();
        let means = means(&model, &dir);
        let plan = dropping(&model, rtn_plan(&model), Substitute::Mean);
        solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
        let native = Exports { native: Some(Native {}), ..Exports::default() };
        write(&model, &plan, &dir, &native, out.path(), &Quiet).unwrap();
        let meant = Meant { model: &model, plan: &plan, means };
        let whole = Meant { means: Outputs::new(), plan: &rtn_plan(&model), model: &model };
        for rounding in [ExpertRounding::None, ExpertRounding::Bf16] {
            let packed = packed::open(out.path(), rounding).unwrap();
            let (near, far) = (apart(packed.as_ref(), &meant, &model), apart(packed.as_ref(), &whole, &model));
            assert!(near < 1e-5 && far > 100.0 * near, "{name}: {near} from what is meant, {far} from the model with all experts");
        }
        let packed = Packed::new(calib::checkpoint::Checkpoint::open(out.path()).unwrap(), ExpertRounding::None).unwrap();
        assert_eq!(packed.constants().len(), meant.means.len());
        let (&(layer, expert), mean) = meant.means.iter().next().unwrap();
        assert_eq!(packed.constants()[&(layer, expert)].output, constants::rounded(mean, ScaleType::Bf16));
        let said = packed.matrix(Role::Layer(layer, Part::Expert(expert, Projection::Up))).unwrap_err().to_string();
        assert!(said.contains("puts out a constant"), "{said}");
        // Two experts a layer less than the arenas of the whole model.
        let experts = packed.matrices().filter(|(name, _)| name.contains(".experts.")).count();
        let all = model.layout().roles().filter(|(role, _)| matches!(role, Role::Layer(_, Part::Expert(..)))).count();
        assert_eq!(experts + 3 * meant.means.len(), all);
    }
}

#[test]
fn nothing_instead_of_an_expert_is_an_expert_of_zeros() {
    let (model, out) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let plan = dropping(&model, rtn_plan(&model), Substitute::Zero);
    let dir = out.path().join("moepress");
    solve(&model, &plan, None, &dir, Device::Cpu, &Quiet).unwrap();
    let exports = Exports { native: Some(Native {}), dense: Some(Dense {}), ..Exports::default() };
    write(&model, &plan, &dir, &exports, out.path(), &Quiet).unwrap();
    let packed = packed::open(out.path(), ExpertRounding::None).unwrap();
    let dense = Model::open(&out.path().join("dense")).unwrap();
    let zeros = means(&model, &dir).into_iter().map(|(at, mean)| (at, vec![0.0; mean.len()])).collect();
    let near = apart(packed.as_ref(), &Meant { model: &model, plan: &plan, means: zeros }, &model);
    assert!(near < 1e-5, "{near}");
    for (role, name) in dense.layout().roles().filter(|(role, _)| drops(*role)) {
        assert!(dense.matrix(role).unwrap().iter().all(|&x| x == 0.0), "{name}");
    }
}

#[test]
fn layers_behind_dropped_experts_see_their_constants() {
    let model = fixture("qwen3_moe");
    let solved = |order, by: Option<Substitute>| {
        let dir = tempfile::tempdir().unwrap();
        means(&model, dir.path());
        let mut plan = by.map_or_else(|| gptq_plan(&model), |by| dropping(&model, gptq_plan(&model), by));
        plan.repair = Repair { order, propagate: None, router_repair: None, removal: None, awq: None, rotate: None };
        solve(&model, &plan, Some(&samples(&model)), dir.path(), Device::Cpu, &Quiet).unwrap();
        let name = model.layout().name(Role::Layer(1, Part::Query)).unwrap();
        let Action::Quantize(how) = &plan.tensors[name] else { panic!() };
        let layers = model.spec().layers.len();
        let shape = model.matrix(Role::Layer(1, Part::Query)).unwrap().dim().into();
        Solved::finished(dir.path(), &plan, layers).unwrap().open(1).unwrap().matrix(name, shape, how).unwrap()
    };
    let (mean, zero) = (Some(Substitute::Mean), Some(Substitute::Zero));
    assert_eq!(solved(Order::Independent, mean), solved(Order::Independent, None));
    let [whole, mean, zero] = [None, mean, zero].map(|by| solved(Order::Sequential, by));
    assert!(whole != mean && mean != zero && whole != zero);
}

#[test]
fn a_part_of_an_expert_cannot_be_dropped_and_a_mean_must_be_there() {
    let (model, dir) = (fixture("qwen3_moe"), tempfile::tempdir().unwrap());
    let run = |plan: &Plan| solve(&model, plan, None, dir.path(), Device::Cpu, &Quiet).unwrap_err().to_string();
    let mut plan = dropping(&model, rtn_plan(&model), Substitute::Zero);
    let up = model.layout().name(Role::Layer(0, Part::Expert(1, Projection::Up))).unwrap();
    let was = plan.tensors.insert(up.to_owned(), Action::Substitute(Substitute::Mean));
    assert!(run(&plan).contains("drops a part of its expert"));
    plan.tensors.insert(up.to_owned(), was.unwrap());
    let router = model.layout().name(Role::Layer(0, Part::Router)).unwrap();
    plan.tensors.insert(router.to_owned(), Action::Substitute(Substitute::Zero));
    assert!(run(&plan).contains("no matrix of a routed expert"));
    assert!(run(&dropping(&model, rtn_plan(&model), Substitute::Mean)).contains("dropped.safetensors"));
}

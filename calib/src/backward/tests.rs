//! Gradients against finite differences, and what must hold of a pass whatever the model.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use burn::tensor::Tensor;
use ndarray::Array2;

use super::gradients::MatrixSums;
use super::loss::to_gradient;
use super::*;
use crate::Error;
use crate::arch::{GroupScore, Groups, Mlp, Part, Role, Score, Shared, Spec};
use crate::device::Cpu;
use crate::forward::testing::{Noise, Table, distance, grouped_spec, latent_spec, random, samples, specs};
use crate::forward::{Routing, Tap};
use crate::progress::Quiet;

/// DeepSeek-V3's: sigmoid scores with a bias, in groups, renormalized and scaled; a shared expert without a gate; one query
/// matrix.
fn group_sigmoid_spec() -> Spec {
    let mut spec = latent_spec();
    if let crate::arch::Attention::Latent(a) = &mut spec.attention {
        a.q_rank = None;
    }
    for layer in &mut spec.layers {
        if let Mlp::Moe(moe) = &mut layer.mlp {
            moe.router.score = Score::Sigmoid;
            moe.router.correction = true;
            moe.router.groups = Some(Groups { count: 3, keep: 2, by: GroupScore::TopTwo, masked: 0.0 });
            (moe.router.renormalize, moe.router.scale) = (Some(1e-20), 2.5);
            moe.shared = Some(Shared { inner: 7, gated: false });
        }
    }
    spec
}

/// Every mechanism, without the thresholds at which differences are no derivatives: SparseMixer's jitter keeps all experts,
/// and nothing is clamped (the gradients there are tested where they stand).
fn smooth(mut spec: Spec) -> Spec {
    if let crate::arch::Attention::Grouped(a) = &mut spec.attention {
        a.clip = None;
    }
    for layer in &mut spec.layers {
        if let Mlp::Moe(moe) = &mut layer.mlp
            && let Score::SparseMixer { jitter } = &mut moe.router.score
        {
            *jitter = 1.0;
        }
    }
    spec
}

fn all_specs() -> Vec<(&'static str, Spec)> {
    let mut plain = grouped_spec();
    plain.tied = false;
    for layer in &mut plain.layers {
        if let Mlp::Moe(moe) = &mut layer.mlp {
            moe.router.renormalize = None;
        }
    }
    let specs = specs().map(|(name, spec)| (name, smooth(spec)));
    specs.into_iter().chain([("group sigmoid", group_sigmoid_spec()), ("not renormalized", plain)]).collect()
}

type Gradients = HashMap<Role, Array2<f32>>;

/// Which experts were chosen, in every layer.
#[derive(Default)]
struct Choices(Mutex<Vec<u32>>);

impl Tap<Cpu> for Choices {
    fn routing(&self, _layer: usize, routing: &Routing) -> Result<()> {
        self.0.lock().unwrap().extend(&routing.chosen);
        Ok(())
    }
}

/// The model's last hidden states, and its choices.
fn last(table: &Table, ids: &[Vec<u32>]) -> (Vec<Tensor<Cpu, 3>>, Vec<u32>) {
    let choices = Choices::default();
    let mut hidden = embed::<Cpu>(table, ids, &Default::default()).unwrap();
    for layer in 0..table.spec.layers.len() {
        decoder_layer(table, layer, &mut hidden, &choices, Options { in_flight: 2 }).unwrap();
    }
    (hidden, choices.0.into_inner().unwrap())
}

/// `Σ_t −log p(y_t)`, and the choices.
fn log_loss(table: &Table, ids: &[Vec<u32>], targets: &[Option<u32>]) -> (f64, Vec<u32>) {
    let (hidden, choices) = last(table, ids);
    let head = Head::<Cpu>::load(table, &Default::default()).unwrap();
    let logits: Vec<f32> = hidden.into_iter().flat_map(|x| values(head.logits(rows(x)), "test").unwrap()).collect();
    let row = |(row, target): (&[f32], &Option<u32>)| {
        let sum: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
        target.map_or(0.0, |y| sum.ln() - f64::from(row[y as usize]))
    };
    (logits.chunks_exact(table.spec.vocab).zip(targets).map(row).sum(), choices)
}

/// The gradients at all matrices and at what enters the first layer, and the targets.
fn gradients(table: &Table, ids: &[Vec<u32>], params: &Params) -> (Gradients, Vec<f32>, Vec<Option<u32>>) {
    let device = Default::default();
    let mut inputs = vec![embed::<Cpu>(table, ids, &device).unwrap()];
    for layer in 0..table.spec.layers.len() {
        let mut hidden = inputs[layer].clone();
        decoder_layer(table, layer, &mut hidden, &NoTap, Options { in_flight: 2 }).unwrap();
        inputs.push(hidden);
    }
    let mut gradient = inputs.pop().unwrap();
    let head = Head::load(table, &device).unwrap();
    let targets = to_gradient(&head, &mut gradient, ids, params).unwrap();
    let (all, mut found) = (|_: Part| true, Gradients::new());
    for (layer, inputs) in inputs.into_iter().enumerate().rev() {
        let sink = MatrixSums { wanted: &all, sums: Mutex::default() };
        let walk = Walk { weights: table, device: &device, options: Options { in_flight: 2 }, sink: &sink };
        walk.layer(layer, inputs, &mut gradient).unwrap();
        found.extend(sink.sums.into_inner().unwrap().into_iter().map(|(part, sum)| (Role::Layer(layer, part), sum)));
    }
    let first = gradient.into_iter().flat_map(|g| values(g, "test").unwrap()).collect();
    (found, first, targets)
}

/// The slope of the loss along `direction` of one matrix, by central differences of the sixth order, at the largest step at
/// which no choice of an expert changes and those of the fourth order agree; `None` where there is no such step, which is
/// where a threshold is too near.
fn slope(table: &Table, role: Role, direction: &Array2<f32>, (ids, targets): (&[Vec<u32>], &[Option<u32>])) -> Option<f64> {
    let norm = |a: &Array2<f32>| a.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let original = &table.tensors[&role];
    let at = |step: f64| {
        let mut moved = table.clone();
        moved.put(role, original + &direction.mapv(|d| (f64::from(d) * step) as f32));
        log_loss(&moved, ids, targets)
    };
    let (_, choices) = at(0.0);
    [0.03, 0.01, 0.003, 0.001].into_iter().find_map(|relative| {
        let h = relative * norm(original) / norm(direction);
        let mut pairs = [0.0; 3];
        for (by, pair) in (1..).zip(&mut pairs) {
            let (above, below) = (at(f64::from(by) * h), at(f64::from(-by) * h));
            if above.1 != choices || below.1 != choices {
                return None;
            }
            *pair = above.0 - below.0;
        }
        let fourth = (8.0 * pairs[0] - pairs[1]) / (12.0 * h);
        let sixth = (45.0 * pairs[0] - 9.0 * pairs[1] + pairs[2]) / (60.0 * h);
        ((fourth / sixth - 1.0).abs() < 3e-4).then_some(sixth)
    })
}

/// By differences and by derivatives, along two halves of the gradient's own entries, drawn at random.
fn slopes(table: &Table, role: Role, gradient: &Array2<f32>, at: (&[Vec<u32>], &[Option<u32>])) -> Option<[(Role, f64, f64); 2]> {
    let mut noise = Noise(3);
    let half = gradient.mapv(|g| if noise.next() > 0.0 { g } else { 0.0 });
    let one = |direction: &Array2<f32>| {
        let expected: f64 = direction.iter().zip(gradient).map(|(&d, &g)| f64::from(d) * f64::from(g)).sum();
        Some((role, slope(table, role, direction, at)?, expected))
    };
    Some([one(&half)?, one(&(gradient - &half))?])
}

/// Compares at the first seed whose model has no threshold too near to any of the matrices that `gradients` finds.
fn check(name: &str, mut compare: impl FnMut(u64) -> Option<Vec<[(Role, f64, f64); 2]>>) -> usize {
    let found = (0..300).find_map(&mut compare).unwrap_or_else(|| panic!("{name}: no seed without a threshold near"));
    for &(role, found, expected) in found.iter().flatten() {
        assert!((found / expected - 1.0).abs() < 1e-3, "{name}, {role}: {found} by differences, {expected} by derivatives");
    }
    found.len()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (name, spec) in all_specs() {
        let ids = samples(&[6, 5], 32);
        let checked = check(name, |seed| {
            let table = random(spec.clone(), seed);
            let (gradients, _, targets) = gradients(&table, &ids, &Params { seed: 5, targets: Targets::Own });
            // Of the experts the first two: the others run the same code.
            let wanted = |role: &Role| !matches!(role, Role::Layer(_, Part::Expert(2.., _)));
            gradients.iter().filter(|(role, _)| wanted(role)).map(|(&role, g)| slopes(&table, role, g, (&ids, &targets))).collect()
        });
        assert!(checked >= 14, "{name}: only {checked} matrices had a gradient");
    }
}

#[test]
fn the_gradient_at_the_first_layer_is_that_of_the_embedding() {
    for (name, spec) in all_specs() {
        // Every token once, so that the rows are those of the embedding.
        let spec = Spec { tied: false, vocab: 8, ..spec };
        let ids = vec![(0..8).collect::<Vec<u32>>()];
        check(name, |seed| {
            let table = random(spec.clone(), seed);
            let (_, first, targets) = gradients(&table, &ids, &Params::default());
            let gradient = Array2::from_shape_vec((8, 24), first).unwrap();
            Some(vec![slopes(&table, Role::Embedding, &gradient, (&ids, &targets))?])
        });
    }
}

/// Everything that a pass hands out, by layer.
#[derive(Default)]
struct All(Mutex<Everything>);

impl Receive for All {
    fn site(&self, layer: usize, loss: SiteLoss) -> Result<()> {
        assert!(self.0.lock().unwrap().0.insert((layer, loss.site), loss).is_none());
        Ok(())
    }
    fn layer(&self, layer: usize, weights: LayerWeights) -> Result<()> {
        self.0.lock().unwrap().1.insert(layer, weights);
        Ok(())
    }
}

type Everything = (BTreeMap<(usize, Site), SiteLoss>, BTreeMap<usize, LayerWeights>);

fn everything(table: &dyn Weights, ids: &[Vec<u32>], scratch: &Scratch<'_>, all: &All) -> Result<()> {
    let params = Params { seed: 9, targets: Targets::Own };
    run(&Backward { weights: table, ids, params: &params, scratch, progress: &Quiet }, all, Device::Cpu)
}

fn in_memory(table: &Table, ids: &[Vec<u32>]) -> Everything {
    let all = All::default();
    everything(table, ids, &Scratch::Memory, &all).unwrap();
    all.0.into_inner().unwrap()
}

#[test]
fn threads_and_batches_change_no_bit() {
    for (name, spec) in all_specs() {
        let table = random(spec, 23);
        let ids = samples(if name == "grouped" { &[40, 30, 700, 700, 700] } else { &[40, 30, 30] }, 32);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| in_memory(&table, &ids))
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5), "{name}");
    }
}

#[test]
fn a_pass_hands_out_every_site_once_with_one_weight_a_row() {
    for (name, spec) in all_specs() {
        let table = random(spec, 24);
        let ids = samples(&[20, 20, 13], 32);
        let (losses, weights) = in_memory(&table, &ids);
        for layer in 0..2 {
            let expected: Vec<Site> = crate::stats::sites(&table.spec, layer).into_iter().map(|(site, _)| site).collect();
            assert_eq!(weights[&layer].gradient.len(), 53);
            assert_eq!(weights[&layer].sites.len(), expected.len(), "{name}");
            for site in expected {
                let (loss, weights) = (&losses[&(layer, site)], &weights[&layer].sites[&site]);
                assert_eq!((loss.rows, loss.tokens), (weights.v.len() as u64, 53), "{name}, {site}");
                assert_eq!(loss.outputs, weights.outputs);
                match &weights.tokens {
                    Some(tokens) => assert!(tokens.len() == weights.v.len() && tokens.is_sorted()),
                    None => assert_eq!(weights.v.len(), 53),
                }
                let r: Vec<f64> = loss.outputs.iter().flat_map(|(_, r)| r.iter().copied()).collect();
                assert!((r.iter().sum::<f64>() / r.len() as f64 - 1.0).abs() < 1e-9, "{name}, {site}: mean r is not 1");
                assert!(loss.moment.diag().iter().all(|&x| x >= 0.0));
            }
            let routed = |site: &&Site| matches!(site, Site::ExpertIn(_));
            let slots: u64 = losses.keys().filter(|(l, site)| *l == layer && routed(&site)).map(|key| losses[key].rows).sum();
            assert!(slots == 106 || table.spec.moe(layer).is_none(), "{name}: {slots} slots");
        }
    }
}

/// Fails for one tensor.
struct Broken<'a>(&'a Table, Role);

impl Weights for Broken<'_> {
    fn spec(&self) -> &Spec {
        self.0.spec()
    }
    fn matrix(&self, role: Role) -> Result<Array2<f32>> {
        if role == self.1 { Err(Error::EmptyCorpus) } else { self.0.matrix(role) }
    }
    fn vector(&self, role: Role) -> Result<ndarray::Array1<f32>> {
        self.0.vector(role)
    }
}

#[test]
fn a_killed_pass_goes_on_at_the_last_finished_layer() {
    let mut spec = grouped_spec();
    spec.layers.push(spec.layers[0].clone());
    let table = random(spec, 25);
    let ids = samples(&[20, 20], 32);
    let (losses, weights) = in_memory(&table, &ids);
    let dir = tempfile::tempdir().unwrap();
    let key = |model: &str| Scratch::Disk(dir.path(), [("model files".to_owned(), model.to_owned())].into());
    let all = All::default();
    // Killed on the way forward, in layer 1.
    let role = Role::Layer(1, Part::Query);
    assert!(everything(&Broken(&table, role), &ids, &key("a"), &all).is_err());
    let files = || fs_err::read_dir(dir.path()).unwrap().count();
    assert_eq!((files(), all.0.lock().unwrap().1.len()), (2, 0));
    // Killed on the way back, at layer 0: a receiver that fails there stands for it.
    struct Fails<'a>(&'a All);
    impl Receive for Fails<'_> {
        fn site(&self, layer: usize, loss: SiteLoss) -> Result<()> {
            if layer == 0 { Err(Error::EmptyCorpus) } else { self.0.site(layer, loss) }
        }
        fn layer(&self, layer: usize, weights: LayerWeights) -> Result<()> {
            self.0.layer(layer, weights)
        }
    }
    let params = Params { seed: 9, targets: Targets::Own };
    let scratch = key("a");
    let pass = Backward { weights: &table, ids: &ids, params: &params, scratch: &scratch, progress: &Quiet };
    assert!(run(&pass, &Fails(&all), Device::Cpu).is_err());
    assert_eq!((files(), all.0.lock().unwrap().1.len()), (2, 2));
    // Another seed or model cannot go on from there.
    let other = Params { seed: 10, ..params.clone() };
    let error = run(&Backward { params: &other, ..pass }, &all, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("end_loss targets"), "{error}");
    assert!(everything(&table, &ids, &key("b"), &all).unwrap_err().to_string().contains("model files"));
    everything(&table, &ids, &scratch, &all).unwrap();
    assert_eq!(files(), 0);
    assert!(all.0.into_inner().unwrap() == (losses, weights));
}

#[test]
fn the_layers_gradient_is_what_a_routing_weight_of_one_would_give_its_experts() {
    // One expert, always chosen with weight 1: down's token weight is the mean square of the gradient at the layer's output.
    let mut spec = grouped_spec();
    for layer in &mut spec.layers {
        if let Mlp::Moe(moe) = &mut layer.mlp {
            (moe.experts, moe.top_k) = (1, 1);
        }
    }
    let table = random(spec, 26);
    let (_, weights) = in_memory(&table, &samples(&[20, 20], 32));
    let layer = &weights[&0];
    assert!(distance(&layer.sites[&Site::ExpertDown(0)].v, &layer.gradient) < 1e-6);
}

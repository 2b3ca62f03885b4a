//! What must hold of a forward pass whatever the model.

use std::collections::HashMap;
use std::sync::Mutex;

use burn::tensor::Tensor;
use ndarray::Axis;

use super::testing::{Table, distance, grouped_spec, hidden, hidden_with, layer_norm_spec, logits, random, samples, specs};
use super::{Experts, Generator, NoTap, Routed, Routing, Tap, moe::values};
use crate::Result;
use crate::arch::{Mlp, Part, Role, RopeScaling, Site};
use crate::device::Cpu;

#[test]
fn threads_and_tasks_in_flight_change_no_bit() {
    for (name, spec) in specs() {
        let table = random(spec, 1);
        let ids = samples(&[40, 40, 30, 700, 700], 32);
        let run = |threads, in_flight| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| hidden_with(&table, &[&ids], &NoTap, in_flight))
        };
        let one = run(1, 1);
        for (threads, in_flight) in [(2, 2), (3, 1), (1, 4), (4, 16)] {
            assert!(run(threads, in_flight) == one, "{name}: {threads} threads, {in_flight} in flight");
        }
    }
}

#[test]
fn samples_do_not_see_one_another() {
    for (name, spec) in specs() {
        let table = random(spec, 2);
        let ids = samples(&[17, 17, 9, 17], 32);
        let alone: Vec<&[Vec<u32>]> = ids.chunks(1).collect();
        let error = distance(&hidden_with(&table, &alone, &NoTap, 2), &hidden(&table, &ids));
        assert!(error < 1e-6, "{name}: {error:e}");
    }
}

#[test]
fn later_tokens_change_nothing_before_them() {
    for (name, spec) in specs() {
        let table = random(spec, 3);
        let mut ids = samples(&[20], 32);
        let before = hidden(&table, &ids);
        ids[0][15] = (ids[0][15] + 1) % 32;
        let after = hidden(&table, &ids);
        // Not to the bit: an expert with another number of rows may multiply them by another kernel.
        assert!(distance(&before[..15 * 24], &after[..15 * 24]) < 1e-6, "{name}");
        assert!(distance(&before[15 * 24..], &after[15 * 24..]) > 1e-3, "{name}");
    }
}

#[test]
fn a_window_hides_what_lies_before_it() {
    let mut spec = layer_norm_spec();
    spec.layers.truncate(1);
    let table = random(spec, 4);
    let mut ids = samples(&[12], 32);
    let before = hidden(&table, &ids);
    ids[0][2] = (ids[0][2] + 1) % 32;
    let after = hidden(&table, &ids);
    // Window 4: token 2 is seen by 2, 3, 4 and 5.
    assert!(distance(&before[6 * 24..], &after[6 * 24..]) < 1e-6);
    assert!(distance(&before[5 * 24..6 * 24], &after[5 * 24..6 * 24]) > 1e-3);
}

/// The same model with expert `e` stored as expert `(e + 1) % experts`.
fn rotated(table: &Table) -> Table {
    let mut rotated = table.clone();
    for (&role, values) in &table.tensors {
        match role {
            Role::Layer(layer, Part::Expert(e, projection)) => {
                rotated.put(Role::Layer(layer, Part::Expert((e + 1) % 6, projection)), values.clone());
            }
            Role::Layer(_, Part::Router) => {
                let rows: Vec<usize> = (0..6).map(|e| (e + 5) % 6).collect();
                rotated.put(role, values.select(Axis(0), &rows));
            }
            _ => {}
        }
    }
    rotated
}

#[test]
fn permuted_experts_give_the_same_output() {
    for (name, spec) in specs() {
        let table = random(spec, 5);
        let ids = samples(&[30, 30], 32);
        let error = distance(&hidden(&rotated(&table), &ids), &hidden(&table, &ids));
        assert!(error < 1e-6, "{name}: {error:e}");
    }
}

/// Token by token with the cache, against one full pass.
fn assert_cache_equals_full_pass(name: &str, table: &Table, ids: &[u32], prompt: usize) {
    let generator = Generator::<Cpu>::load(table, &Default::default(), Experts::Streamed).unwrap();
    let full = logits(table, ids);
    let mut cache = generator.cache();
    let mut next = 0;
    for end in prompt..=ids.len() {
        let step = generator.step(&[ids[next..end].to_vec()], &mut cache, &NoTap).unwrap();
        let error = distance(&values(step, "test").unwrap(), &full[end - 1]);
        assert!(error < 1e-5, "{name}: after {end} tokens {error:e}");
        next = end;
        assert_eq!(cache.tokens(), end);
    }
}

#[test]
fn the_cache_gives_the_logits_of_the_full_pass() {
    for (name, spec) in specs() {
        let table = random(spec, 6);
        assert_cache_equals_full_pass(name, &table, &samples(&[25], 32)[0], 7);
    }
}

/// Greedy generation by full passes.
fn greedy_by_full_passes(table: &Table, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut text = prompt.to_vec();
    for _ in 0..count {
        let last = logits(table, &text).pop().unwrap();
        let best = (0..last.len()).rev().max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        text.push(best as u32);
    }
    text.split_off(prompt.len())
}

#[test]
fn greedy_generation_is_that_of_full_passes() {
    for (name, spec) in specs() {
        let table = random(spec, 7);
        let prompts = samples(&[5, 5, 5], 32);
        let generator = Generator::<Cpu>::load(&table, &Default::default(), Experts::Resident).unwrap();
        let texts = generator.greedy(&prompts, 12).unwrap();
        for (prompt, text) in prompts.iter().zip(&texts) {
            assert_eq!(*text, greedy_by_full_passes(&table, prompt, 12), "{name}");
        }
    }
}

#[test]
fn greedy_generation_crosses_from_short_to_long_factors() {
    let mut spec = layer_norm_spec();
    let (short, long) = (vec![1.0; 4], vec![1.0, 3.0, 9.0, 20.0]);
    spec.rope.scaling = RopeScaling::LongRope { original: 10, short, long, short_mscale: 1.1, long_mscale: 1.3 };
    let table = random(spec, 8);
    let prompt = samples(&[6], 32);
    let generator = Generator::<Cpu>::load(&table, &Default::default(), Experts::Resident).unwrap();
    assert_eq!(generator.greedy(&prompt, 12).unwrap()[0], greedy_by_full_passes(&table, &prompt[0], 12));
}

#[test]
fn unequal_prompts_are_refused() {
    let table = random(grouped_spec(), 9);
    let generator = Generator::<Cpu>::load(&table, &Default::default(), Experts::Streamed).unwrap();
    let error = generator.greedy(&samples(&[4, 5], 32), 1).unwrap_err().to_string();
    assert!(error.contains("sample 1 has 5 tokens and sample 0 has 4"), "{error}");
}

/// Rows that entered a site, their numbers where it is an expert's, and how often it was done.
type Seen = (Vec<Vec<f32>>, Vec<u32>, usize);
/// Rows of an expert's output with their numbers and weights.
type Outputs = Vec<(u32, f32, Vec<f32>)>;

/// Keeps everything that is shown of layer 1.
#[derive(Default)]
struct Everything {
    sites: Mutex<HashMap<Site, Seen>>,
    routing: Mutex<Vec<Routing>>,
    blocks: Mutex<HashMap<&'static str, Vec<f32>>>,
    outputs: Mutex<HashMap<usize, Outputs>>,
}

fn rows_of(x: &Tensor<Cpu, 2>) -> Vec<Vec<f32>> {
    let width = x.dims()[1];
    values(x.clone(), "test").unwrap().chunks_exact(width).map(<[f32]>::to_vec).collect()
}

impl Tap<Cpu> for Everything {
    fn wants(&self, layer: usize, _site: Site) -> bool {
        layer == 1
    }

    fn rows(&self, _layer: usize, site: Site, rows: &Tensor<Cpu, 2>, routed: Option<&Routed>) -> Result<()> {
        let mut sites = self.sites.lock().unwrap();
        let entry = sites.entry(site).or_default();
        assert_eq!(entry.2, 0, "{site}: rows after done");
        entry.0.extend(rows_of(rows));
        entry.1.extend(routed.iter().flat_map(|routed| &routed.tokens));
        Ok(())
    }

    fn done(&self, layer: usize, site: Site) -> Result<()> {
        assert_eq!(layer, 1);
        self.sites.lock().unwrap().entry(site).or_default().2 += 1;
        Ok(())
    }

    fn routing(&self, layer: usize, routing: &Routing) -> Result<()> {
        if layer == 1 {
            self.routing.lock().unwrap().push(routing.clone());
        }
        Ok(())
    }

    fn expert_output(&self, layer: usize, expert: usize, out: &Tensor<Cpu, 2>, routed: &Routed) -> Result<()> {
        if layer == 1 {
            let rows = routed.tokens.iter().zip(&routed.weights).zip(rows_of(out)).map(|((&t, &w), row)| (t, w, row));
            self.outputs.lock().unwrap().entry(expert).or_default().extend(rows);
        }
        Ok(())
    }

    fn block(&self, layer: usize, name: &'static str, _batch: usize, x: &Tensor<Cpu, 2>) -> Result<()> {
        if layer == 1 {
            self.blocks.lock().unwrap().entry(name).or_default().extend(values(x.clone(), "test")?);
        }
        Ok(())
    }

    fn wants_blocks(&self) -> bool {
        true
    }
}

#[test]
fn what_a_tap_sees_fits_together_and_changes_nothing() {
    for (name, spec) in specs() {
        let table = random(spec, 10);
        let ids = samples(&[30, 30, 21], 32);
        let tap = Everything::default();
        let seen = hidden_with(&table, &[&ids], &tap, 3);
        assert!(seen == hidden(&table, &ids), "{name}: a tap changed the result");
        let blocks = tap.blocks.into_inner().unwrap();
        assert!(blocks["hidden"] == seen, "{name}");

        // The routed output is the sum over the experts of weight · output.
        let mut sum = vec![0.0_f32; 81 * 24];
        for (token, weight, row) in tap.outputs.into_inner().unwrap().into_values().flatten() {
            sum[token as usize * 24..][..24].iter_mut().zip(row).for_each(|(s, v)| *s += weight * v);
        }
        assert!(distance(&sum, &blocks["moe.routed_out"]) < 1e-6, "{name}");

        let sites = tap.sites.into_inner().unwrap();
        assert!(sites.values().all(|(.., done)| *done == 1), "{name}: a site was not done once");
        assert_experts_saw_their_rows(name, &sites, &tap.routing.into_inner().unwrap(), &blocks["moe.in"]);
        let shared = sites.get(&Site::SharedIn);
        assert_eq!(shared.is_some(), name == "latent");
        assert!(shared.is_none_or(|(rows, ..)| rows.concat() == blocks["moe.in"]), "{name}");
        assert_eq!(sites[&Site::AttentionIn].0.len(), 81);
        assert_eq!(sites[&Site::AttentionOut].0.len(), 81);
        assert_eq!(sites.contains_key(&Site::QueryB) && sites.contains_key(&Site::KvB), name == "latent");
    }
}

fn assert_experts_saw_their_rows(name: &str, sites: &HashMap<Site, Seen>, routing: &[Routing], block_in: &[f32]) {
    let chosen: Vec<u32> = routing.iter().flat_map(|r| r.chosen.clone()).collect();
    assert_eq!(chosen.len(), 81 * 2);
    for expert in 0..6 {
        let expected: Vec<u32> = (0..81).filter(|&row| chosen[row * 2..][..2].contains(&(expert as u32))).map(|row| row as u32).collect();
        let (rows, tokens, _) = &sites[&Site::ExpertIn(expert)];
        assert_eq!(*tokens, expected, "{name}, expert {expert}");
        assert_eq!(sites[&Site::ExpertDown(expert)].1, expected);
        let own = expected.iter().map(|&row| &block_in[row as usize * 24..][..24]);
        assert!(rows.iter().zip(own).all(|(a, b)| a == b), "{name}, expert {expert}");
    }
}

#[test]
fn an_expert_without_rows_is_done_and_not_read() {
    let mut table = random(grouped_spec(), 11);
    for layer in 0..2 {
        // Expert 5 ties with expert 2 for every token, and of equals the lower index is chosen.
        let role = Role::Layer(layer, Part::Router);
        let mut router = table.tensors[&role].clone();
        let row = router.row(2).to_owned();
        router.row_mut(5).assign(&row);
        table.put(role, router);
        if let Mlp::Moe(moe) = &mut table.spec.layers[layer].mlp {
            moe.top_k = 1;
        }
        table.tensors.retain(|role, _| !matches!(role, Role::Layer(_, Part::Expert(5, _))));
    }
    let tap = Everything::default();
    hidden_with(&table, &[&samples(&[50], 32)], &tap, 2);
    let sites = tap.sites.into_inner().unwrap();
    assert_eq!(sites[&Site::ExpertIn(5)], (vec![], vec![], 1));
    assert_eq!(sites[&Site::ExpertDown(5)].2, 1);
}

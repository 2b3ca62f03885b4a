//! The calibration pass: layers stream past samples whose hidden states stay in memory.
//!
//! [`stream_layers`] is the loop: it embeds the samples, hands each decoder layer to whoever works on it, and after each
//! finished layer writes the hidden states beside, by rename, so that a killed run goes on at the last finished layer, with
//! the same bytes at its end. [`run`] is the measuring pass on it: it fills a [`Store`] with one file of statistics a layer.
//!
//! **Memory.** What [`forward`](crate::forward) states for one layer, one more copy of the hidden states in a layer of experts
//! (two where it has a shared expert), `16·R·k` bytes for `R` rows that choose `k` experts, the chunks of `n` experts in
//! flight once more as numbers to be added up, and the layer's statistics. [`peak_bytes`] computes it, and a test holds the
//! pass to it. While hidden states are written there is one batch of them more.

mod alike;
mod complete;
mod draw;
mod measure;
mod peak;
mod snapshot;
mod watch;
mod write;

use std::collections::BTreeMap;

use burn::tensor::{Tensor, backend::Backend};

use crate::device::{Device, Job};
use crate::forward::{Options, decoder_layer, embed};
use crate::progress::Progress;
use crate::sample::{Calibrate, Samples};
use crate::stats::store::SCHEMA;
use crate::stats::{LayerStats, Manifest, Part, Store};
use crate::{Error, Result, Weights};

pub use complete::{Complete, complete};
pub use draw::{Draw, draw, routing_counts};
pub use measure::{Measure, Measured};
pub use peak::peak_bytes;
pub use snapshot::Snapshots;
use watch::Watched;
pub use watch::{Spread, Watch};

/// What streams past what.
#[derive(Clone, Copy)]
pub struct Stream<'a> {
    /// The model.
    pub weights: &'a dyn Weights,
    /// Token ids of the samples.
    pub ids: &'a [Vec<u32>],
    /// Where hidden states are kept between layers; `None`: nowhere, a run that is killed starts over.
    pub snapshots: Option<&'a Snapshots>,
    /// Hears of every finished layer.
    pub progress: &'a dyn Progress,
}

/// What is done with one layer and the hidden states that enter it.
pub type Each<'a, B> = dyn FnMut(usize, &mut [Tensor<B, 3>]) -> Result<()> + 'a;

/// Runs `each(layer, hidden)` for every layer in order, from the last finished one of an earlier run on.
///
/// `each` carries the hidden states, batches `[samples, tokens, hidden]` as [`embed`] gives them, through the layer, with
/// whatever tap it likes, and returns when everything that it makes of the layer is on disk under its final name. The
/// hidden states after the last layer are returned.
///
/// # Errors
///
/// [`Error::Changed`] where the snapshot is of another model or other samples, an IO error, or what `each` says.
pub fn stream_layers<B: Backend>(stream: &Stream<'_>, device: &B::Device, each: &mut Each<'_, B>) -> Result<Vec<Tensor<B, 3>>> {
    let layers = stream.weights.spec().layers.len();
    let resumed = stream.snapshots.map(|s| s.load::<B>(device)).transpose()?.flatten();
    let (first, mut hidden) = match resumed {
        Some(found) => found,
        None => (0, embed(stream.weights, stream.ids, device)?),
    };
    stream.progress.start("layers", layers as u64);
    stream.progress.tick(first as u64);
    for layer in first..layers {
        each(layer, &mut hidden)?;
        // After the last layer nothing is left to resume but what the caller does next, which repeats that layer.
        if let Some(snapshots) = stream.snapshots.filter(|_| layer + 1 < layers) {
            snapshots.save(layer + 1, &hidden)?;
        }
        stream.progress.tick(1);
    }
    stream.progress.finish();
    Ok(hidden)
}

/// A measuring pass.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The model.
    pub weights: &'a dyn Weights,
    /// Its fingerprint.
    pub fingerprint: &'a str,
    /// The samples.
    pub samples: &'a Samples,
    /// How they were asked for.
    pub calibrate: &'a Calibrate,
    /// Where the statistics go.
    pub store: &'a Store,
    /// Sees every site's rows beside the statistics.
    pub watch: Option<&'a dyn Watch>,
    /// Hears of every finished layer.
    pub progress: &'a dyn Progress,
}

/// Measures a model: one file of statistics a layer, then the manifest. What is finished already is not done again.
///
/// # Errors
///
/// [`Error::Changed`] where the folder holds statistics of another model or other samples, an IO error, and whatever running
/// the model says.
pub fn run(pass: &Pass<'_>, device: Device) -> Result<Manifest> {
    let manifest = pass.manifest();
    match pass.store.manifest()? {
        Some(found) if found == manifest => {}
        Some(found) => {
            let path = pass.store.dir().join("manifest.json");
            return Err(Error::Changed { path, what: difference(&found, &manifest).to_owned() });
        }
        None => {
            device.run(*pass)?;
            pass.store.finish(&manifest)?;
        }
    }
    // Also what a pass left that was killed right here.
    pass.snapshots().remove()?;
    pass.forget(pass.weights.spec().layers.len())?;
    Ok(manifest)
}

impl Pass<'_> {
    fn manifest(&self) -> Manifest {
        let Calibrate { seed, traces, similarity_tokens, experts, .. } = *self.calibrate;
        let sampler = self.calibrate.sampler.name().to_owned();
        let (samples, tokens) = (self.samples.ids.len(), self.samples.tokens);
        let (tokens_run, drawn) = (self.samples.total_tokens(), self.samples.drawn.clone());
        let part =
            Part { corpus: self.samples.hash(), sampler, seed, samples, tokens, tokens_run, drawn, experts, similarity_tokens, traces };
        Manifest {
            schema: SCHEMA,
            model: self.fingerprint.to_owned(),
            layers: self.weights.spec().layers.len(),
            domains: self.samples.domains.clone(),
            parts: vec![part],
        }
    }

    fn snapshots(&self) -> Snapshots {
        let Calibrate { traces, similarity_tokens, experts, .. } = *self.calibrate;
        let settings = format!("traces {traces}, similarity_tokens {similarity_tokens}, experts {experts:?}");
        let key = [(MODEL, self.fingerprint.to_owned()), (SAMPLES, self.samples.hash()), (SETTINGS, settings)];
        let key: BTreeMap<_, _> = key.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        Snapshots::new(self.store.dir().join("hidden.safetensors"), key)
    }
}

impl Job for Pass<'_> {
    type Output = Result<()>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<()> {
        let spec = self.weights.spec();
        (0..spec.layers.len()).filter_map(|layer| spec.moe(layer)).try_for_each(|moe| measure::nameable(moe.experts))?;
        let snapshots = self.snapshots();
        // A snapshot is only as good as what was written of the layers before it.
        if let Some(next) = snapshots.next_layer()?
            && !(0..next).all(|layer| self.finished(layer, next))
        {
            snapshots.remove()?;
        }
        let stream = Stream { weights: self.weights, ids: &self.samples.ids, snapshots: Some(&snapshots), progress: self.progress };
        stream_layers::<B>(&stream, device, &mut |layer, hidden| self.layer(layer, hidden)).map(drop)
    }
}

impl Pass<'_> {
    /// Measures one layer; on return its files have their names.
    fn layer<B: Backend>(&self, layer: usize, hidden: &mut [Tensor<B, 3>]) -> Result<()> {
        let spec = self.weights.spec();
        let before = layer.checked_sub(1).map(|before| self.store.traces(before)).transpose()?.flatten();
        let subset = alike::subset(self.samples.total_tokens(), self.calibrate.similarity_tokens);
        let stats = LayerStats::new(spec, layer, self.samples.domains.len());
        let measure = Measure::new(stats, self.samples, before.as_ref(), subset);
        let watched = Watched { tap: &measure, watch: self.watch, through: self.calibrate.experts };
        decoder_layer(self.weights, layer, hidden, &watched, Options::of::<B>())?;
        self.watch.map_or(Ok(()), |watch| watch.layer_done(layer))?;
        let mut measured = measure.finish();
        if let (Some(experts), Some(moe), true) = (&mut measured.stats.experts, spec.moe(layer), self.calibrate.similarity_tokens > 0) {
            experts.similarity = Some(alike::similarity(self.weights, layer, moe, measured.subset)?);
        }
        if let Some(chosen) = &measured.chosen {
            self.store.put_traces(layer, chosen)?;
        }
        self.store.put(layer, &measured.stats)?;
        self.forget(layer)
    }

    /// Whether a layer's files are there; those of the last one before `next` with its traces, which `next` counts from.
    fn finished(&self, layer: usize, next: usize) -> bool {
        let traced = self.weights.spec().moe(layer).is_some() && (self.calibrate.traces || layer + 1 == next);
        let watched = self.watch.is_none_or(|watch| watch.has(layer));
        watched && self.store.layer_path(layer).is_file() && (!traced || self.store.traces_path(layer).is_file())
    }

    /// Drops the traces of the layer before `layer`, unless they are asked for. A layer later than they are needed, so that
    /// a snapshot that is one layer old still finds them.
    fn forget(&self, layer: usize) -> Result<()> {
        let layers = self.weights.spec().layers.len();
        let dropped = if layer == layers { layer.saturating_sub(2)..layer } else { layer.saturating_sub(2)..layer.saturating_sub(1) };
        for path in dropped.filter(|_| !self.calibrate.traces).map(|layer| self.store.traces_path(layer)) {
            if path.is_file() {
                fs_err::remove_file(path)?;
            }
        }
        Ok(())
    }
}

const MODEL: &str = "model files";
const SAMPLES: &str = "calibration samples";
const SETTINGS: &str = "calibration settings";

/// In what two manifests differ.
fn difference(found: &Manifest, asked: &Manifest) -> &'static str {
    let corpora = |m: &Manifest| m.parts.iter().map(|part| part.corpus.clone()).collect::<Vec<_>>();
    if found.model != asked.model {
        MODEL
    } else if corpora(found) != corpora(asked) {
        SAMPLES
    } else {
        SETTINGS
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::arch::Site;
    use crate::device::Cpu;
    use crate::forward::testing::{grouped_spec, hidden, latent_spec, random, samples};
    use crate::forward::{NoTap, Routed, Tap, values};
    use crate::progress::Quiet;
    use crate::sample::{Drawn, Through};
    use crate::stats::cosine;

    /// Five samples of 700 tokens in three batches, two domains.
    fn corpus() -> Samples {
        let ids = samples(&[700; 5], 32);
        Samples { domains: vec!["en".into(), "code".into()], tokens: 700, ids, domain: vec![0, 1, 0, 1, 0], drawn: Drawn::default() }
    }

    fn calibrate() -> Calibrate {
        Calibrate { samples: 5, tokens: 700, seed: 3, ..Calibrate::over(vec![]) }
    }

    fn measure(weights: &dyn Weights, samples: &Samples, store: &Store) -> Result<Manifest> {
        let pass = Pass { weights, fingerprint: "model", samples, calibrate: &calibrate(), store, watch: None, progress: &Quiet };
        run(&pass, Device::Cpu)
    }

    fn files(store: &Store) -> BTreeMap<String, Vec<u8>> {
        let entry = |e: std::io::Result<fs_err::DirEntry>| {
            let e = e.unwrap();
            (e.file_name().into_string().unwrap(), fs_err::read(e.path()).unwrap())
        };
        fs_err::read_dir(store.dir()).unwrap().map(entry).collect()
    }

    #[test]
    fn every_token_is_counted_where_it_went() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let table = random(latent_spec(), 5);
        let manifest = measure(&table, &corpus(), &store).unwrap();
        assert_eq!((manifest.layers, manifest.parts[0].samples, manifest.parts[0].tokens), (2, 5, 700));
        let dense = store.get(0).unwrap();
        assert!(dense.experts.is_none());
        assert!(dense.channels.values().all(|c| c.tokens == 3500 && c.squares.iter().all(|&x| x > 0.0)));
        assert_eq!(dense.channels[&Site::QueryB].squares.len(), 10);
        let stats = store.get(1).unwrap();
        let experts = stats.experts.unwrap();
        let (router, outputs) = (experts.router, experts.outputs);
        assert_eq!(router.tokens.to_vec(), [2100, 1400]);
        assert_eq!(router.counts.sum(), 7000);
        assert_eq!(router.counts, outputs.counts);
        assert!((router.weights.sum() - 3500.0).abs() < 1e-2, "two renormalized weights a token: {}", router.weights.sum());
        for (expert, &load) in router.load().iter().enumerate() {
            assert_eq!(stats.channels[&Site::ExpertIn(expert)].tokens, load);
            assert_eq!(stats.channels[&Site::ExpertDown(expert)].squares.len(), 12);
        }
        assert_eq!(stats.channels[&Site::SharedDown].tokens, 3500);
        assert_eq!(experts.block.tokens, router.tokens);
        assert_eq!(router.pairs.diag(), router.load());
        assert_eq!(router.pairs.sum(), 4 * 3500, "two by two a token");
        assert!(router.transitions.is_none(), "the layer before has no experts");
        assert!((stats.gates[&Site::SharedDown].weight - 3500.0).abs() < 1e-9);
    }

    #[test]
    fn all_experts_see_all_tokens_and_routing_stays_the_real_one() {
        let table = random(latent_spec(), 5);
        let (corpus, routed, all) = (corpus(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        measure(&table, &corpus, &Store::new(routed.path())).unwrap();
        let every = Calibrate { experts: Through::All, ..calibrate() };
        let store = Store::new(all.path());
        let (samples, progress) = (&corpus, &Quiet);
        let pass = Pass { weights: &table, fingerprint: "model", samples, calibrate: &every, store: &store, watch: None, progress };
        run(&pass, Device::Cpu).unwrap();
        let (real, all) = (Store::new(routed.path()).get(1).unwrap(), store.get(1).unwrap());
        assert_eq!(real.experts, all.experts, "what the router does and the experts give");
        let block_in = real.channels[&Site::SharedIn].squares.clone();
        for expert in 0..6 {
            let [enter, down] = [Site::ExpertIn(expert), Site::ExpertDown(expert)];
            assert_eq!((all.channels[&enter].tokens, all.channels[&down].tokens), (3500, 3500));
            let error = all.channels[&enter].squares.iter().zip(&block_in).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
            assert!(error < 1e-5, "the whole block's input: {error}");
            assert!(all.channels[&down].squares.iter().zip(&real.channels[&down].squares).all(|(a, b)| a > b));
            // Weighted sums have a routing weight of 0 for the others.
            let pairs = all.channels[&down].weighted.iter().zip(&real.channels[&down].weighted);
            assert!(pairs.chain(all.gates[&down].gate.iter().zip(&real.gates[&down].gate)).all(|(a, b)| (a / b - 1.0).abs() < 1e-5));
        }
        let again = Pass { calibrate: &calibrate(), ..pass };
        assert!(run(&again, Device::Cpu).unwrap_err().to_string().contains("other calibration settings"));
    }

    type Weighted = (f32, Vec<f32>);

    /// What passes, kept whole: the slow way to the same numbers.
    #[derive(Default)]
    struct Kept {
        blocks: std::sync::Mutex<BTreeMap<&'static str, Vec<f32>>>,
        /// By token and expert: its weight and its row.
        outputs: std::sync::Mutex<BTreeMap<(u32, usize), Weighted>>,
    }

    impl Tap<Cpu> for Kept {
        fn expert_output(&self, _: usize, expert: usize, out: &Tensor<Cpu, 2>, routed: &Routed) -> Result<()> {
            let rows = values(out.clone(), "test")?;
            let rows = rows.chunks_exact(24).zip(routed.tokens.iter().zip(&routed.weights));
            self.outputs.lock().unwrap().extend(rows.map(|(row, (&t, &w))| ((t, expert), (w, row.to_vec()))));
            Ok(())
        }
        fn block(&self, _: usize, name: &'static str, _: usize, x: &Tensor<Cpu, 2>) -> Result<()> {
            self.blocks.lock().unwrap().entry(name).or_default().extend(values(x.clone(), "test")?);
            Ok(())
        }
        fn wants_blocks(&self) -> bool {
            true
        }
    }

    #[test]
    fn blocks_and_importance_are_what_the_formulas_say() {
        let table = random(latent_spec(), 5);
        let corpus = corpus();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        measure(&table, &corpus, &store).unwrap();
        let experts = store.get(1).unwrap().experts.unwrap();
        let mut hidden = embed::<Cpu>(&table, &corpus.ids, &Default::default()).unwrap();
        decoder_layer(&table, 0, &mut hidden, &NoTap, Options { in_flight: 1 }).unwrap();
        let kept = Kept::default();
        decoder_layer(&table, 1, &mut hidden, &kept, Options { in_flight: 1 }).unwrap();
        let (blocks, outputs) = (kept.blocks.into_inner().unwrap(), kept.outputs.into_inner().unwrap());
        let row = |name: &str, t: usize| &blocks[name][t * 24..][..24];
        let mut residual = [0.0; 2];
        let mut importance = ndarray::Array2::<f64>::zeros((2, 6));
        for t in 0..3500 {
            let domain = [0, 1, 0, 1, 0][t / 700];
            let before: Vec<f32> = row("hidden", t).iter().zip(row("moe.out", t)).map(|(a, b)| a - b).collect();
            let mut after = before.clone();
            let mine: Vec<_> = (0..6).filter_map(|e| outputs.get(&(t as u32, e)).map(|o| (e, o))).collect();
            for (_, (w, out)) in &mine {
                after.iter_mut().zip(out).for_each(|(a, o)| *a += w * o);
            }
            residual[domain] += cosine(&before, row("hidden", t));
            for (e, (w, out)) in mine {
                let norm = out.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                importance[(domain, e)] += f64::from(*w) * norm * (1.0 - cosine(&before, &after));
            }
        }
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-5;
        assert!(residual.iter().zip(&experts.block.residual).all(|(&a, &b)| close(a, b)), "{residual:?}, {}", experts.block.residual);
        let sums = &experts.outputs.importance;
        assert!(importance.iter().zip(sums).all(|(&a, &b)| close(a, b)), "{importance}, {sums}");
    }

    #[test]
    fn traces_and_similarity_are_kept_where_asked_for() {
        let table = random(grouped_spec(), 5);
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let calibrate = Calibrate { traces: true, similarity_tokens: 40, ..calibrate() };
        let samples = corpus();
        let pass = Pass {
            weights: &table,
            fingerprint: "model",
            samples: &samples,
            calibrate: &calibrate,
            store: &store,
            watch: None,
            progress: &Quiet,
        };
        run(&pass, Device::Cpu).unwrap();
        let (first, second) = (store.traces(0).unwrap().unwrap(), store.traces(1).unwrap().unwrap());
        assert_eq!((first.dim(), second.dim()), ((3500, 2), (3500, 2)));
        let experts = store.get(1).unwrap().experts.unwrap();
        let transitions = experts.router.transitions.unwrap();
        let counted = (0..3500).filter(|&t| first.row(t).iter().any(|&e| e == 2) && second.row(t).iter().any(|&e| e == 5)).count();
        assert_eq!(transitions[(2, 5)], counted as u64);
        assert_eq!(experts.similarity.unwrap().tokens, 40);
        let error = measure(&table, &samples, &store).unwrap_err().to_string();
        assert!(error.contains("other calibration settings"), "{error}");
    }

    #[test]
    fn a_killed_pass_goes_on_and_ends_with_the_same_bytes() {
        struct Killed<'a>(&'a dyn Weights);
        impl Weights for Killed<'_> {
            fn spec(&self) -> &crate::arch::Spec {
                self.0.spec()
            }
            fn matrix(&self, role: crate::arch::Role) -> Result<ndarray::Array2<f32>> {
                let there = !matches!(role, crate::arch::Role::Layer(1, crate::arch::Part::Expert(4, _)));
                if there { self.0.matrix(role) } else { Err(Error::EmptyCorpus) }
            }
            fn vector(&self, role: crate::arch::Role) -> Result<ndarray::Array1<f32>> {
                self.0.vector(role)
            }
        }
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (whole, parts) = (Store::new(whole.path()), Store::new(parts.path()));
        let table = random(grouped_spec(), 5);
        measure(&table, &corpus(), &whole).unwrap();
        assert!(measure(&Killed(&table), &corpus(), &parts).is_err());
        let written = files(&parts);
        assert_eq!(written.keys().collect::<Vec<_>>(), ["hidden.safetensors", "layer-00000.safetensors", "traces-00000.safetensors"]);
        measure(&table, &corpus(), &parts).unwrap();
        assert_eq!(files(&parts), files(&whole));
        assert_eq!(files(&whole).len(), 3);
        // Without the layer that the snapshot stands on, it starts over.
        assert!(
            measure(&Killed(&table), &corpus(), &{
                fs_err::remove_dir_all(parts.dir()).unwrap();
                parts.clone()
            })
            .is_err()
        );
        fs_err::remove_file(parts.layer_path(0)).unwrap();
        measure(&table, &corpus(), &parts).unwrap();
        assert_eq!(files(&parts), files(&whole));
    }

    #[test]
    fn one_thread_and_two_give_the_same_bytes() {
        let table = random(grouped_spec(), 5);
        let run = |threads| {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::new(dir.path());
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| measure(&table, &corpus(), &store)).unwrap();
            files(&store)
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(5));
    }

    #[test]
    fn another_model_or_corpus_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let table = random(grouped_spec(), 5);
        let manifest = measure(&table, &corpus(), &store).unwrap();
        assert_eq!(measure(&table, &corpus(), &store).unwrap(), manifest);
        let mut other = corpus();
        other.ids[0][0] ^= 1;
        let error = measure(&table, &other, &store).unwrap_err().to_string();
        assert!(error.contains("made with other calibration samples"), "{error}");
        let key = |samples: &str| [("samples".to_owned(), samples.to_owned())].into();
        let path = dir.path().join("hidden.safetensors");
        Snapshots::new(path.clone(), key("a")).save::<Cpu>(1, &[]).unwrap();
        let error = Snapshots::new(path, key("b")).next_layer().unwrap_err().to_string();
        assert!(error.contains("made with other samples"), "{error}");
    }

    #[test]
    fn hidden_states_come_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(dir.path().join("h.safetensors"), BTreeMap::new());
        let device = Default::default();
        assert!(snapshots.load::<Cpu>(&device).unwrap().is_none());
        let values: Vec<f32> = (0..70_000).map(|i| (i as f32).sin() / 3.0).collect();
        let batch = Tensor::from_data(TensorData::new(values.clone(), [7, 100, 100]), &device);
        let other = Tensor::<Cpu, 3>::from_data([[[f32::MIN_POSITIVE / 2.0, -0.0]]], &device);
        snapshots.save(3, &[batch, other]).unwrap();
        let (next, hidden) = snapshots.load::<Cpu>(&device).unwrap().unwrap();
        assert_eq!((next, hidden.len(), hidden[0].dims()), (3, 2, [7, 100, 100]));
        let read: Vec<Vec<f32>> = hidden.into_iter().map(|x| x.into_data().into_vec().unwrap()).collect();
        assert_eq!(read[0], values);
        assert_eq!(read[1].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), [0x0040_0000, 0x8000_0000]);
        snapshots.remove().unwrap();
        assert!(snapshots.next_layer().unwrap().is_none());
    }

    #[test]
    fn the_stream_ends_where_the_forward_pass_does() {
        let table = random(grouped_spec(), 9);
        let ids = corpus().ids;
        let stream = Stream { weights: &table, ids: &ids, snapshots: None, progress: &Quiet };
        let mut layers = Vec::new();
        let last = stream_layers::<Cpu>(&stream, &Default::default(), &mut |layer, hidden| {
            layers.push(layer);
            decoder_layer(&table, layer, hidden, &NoTap, Options { in_flight: 3 })
        });
        let last: Vec<f32> = last.unwrap().into_iter().flat_map(|x| x.into_data().into_vec::<f32>().unwrap()).collect();
        assert_eq!(layers, [0, 1]);
        assert_eq!(last, hidden(&table, &ids));
    }
}

//! The calibration pass: layers stream past samples whose hidden states stay in memory.
//!
//! [`stream_layers`] is the loop: it embeds the samples, hands each decoder layer to whoever works on it, and after each
//! finished layer writes the hidden states beside, by rename, so that a killed run goes on at the last finished layer, with
//! the same bytes at its end. [`run`] is the measuring pass on it: it fills a [`Store`] with one file of statistics a layer.
//!
//! **Memory.** What [`forward`](crate::forward) states for one layer, and the layer's statistics; one batch more in f32
//! while hidden states are written.

mod measure;
mod snapshot;
mod watch;

use std::collections::BTreeMap;

use burn::tensor::{Tensor, backend::Backend};

use crate::device::{Device, Job};
use crate::forward::{Options, decoder_layer, embed};
use crate::progress::Progress;
use crate::sample::{Calibrate, Samples};
use crate::stats::{LayerStats, Manifest, Part, Store};
use crate::{Error, Result, Weights};

pub use measure::Measure;
pub use snapshot::Snapshots;
pub use watch::Watch;
use watch::Watched;

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
    if let Some(found) = pass.store.manifest()? {
        let path = pass.store.dir().join("manifest.json");
        return if found == manifest { Ok(found) } else { Err(Error::Changed { path, what: difference(&found, &manifest) }) };
    }
    device.run(*pass)?;
    pass.store.finish(&manifest)?;
    pass.snapshots().remove()?;
    Ok(manifest)
}

impl Pass<'_> {
    fn manifest(&self) -> Manifest {
        let Calibrate { seed, sampler, .. } = self.calibrate;
        let (samples, tokens) = (self.samples.ids.len(), self.samples.tokens);
        let part = Part { corpus: self.samples.hash(), sampler: sampler.name().to_owned(), seed: *seed, samples, tokens };
        Manifest {
            schema: 1,
            model: self.fingerprint.to_owned(),
            layers: self.weights.spec().layers.len(),
            domains: self.samples.domains.clone(),
            parts: vec![part],
        }
    }

    fn snapshots(&self) -> Snapshots {
        let key = [("model files", self.fingerprint.to_owned()), ("calibration samples", self.samples.hash())];
        let key: BTreeMap<_, _> = key.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        Snapshots::new(self.store.dir().join("hidden.safetensors"), key)
    }
}

impl Job for Pass<'_> {
    type Output = Result<()>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<()> {
        let snapshots = self.snapshots();
        // A snapshot is only as good as the layers before it.
        if let Some(next) = snapshots.next_layer()?
            && !(0..next).all(|layer| self.store.layer_path(layer).is_file() && self.watch.is_none_or(|watch| watch.has(layer)))
        {
            snapshots.remove()?;
        }
        let stream = Stream { weights: self.weights, ids: &self.samples.ids, snapshots: Some(&snapshots), progress: self.progress };
        stream_layers::<B>(&stream, device, &mut |layer, hidden| {
            let measure = Measure::new(LayerStats::new(self.weights.spec(), layer, self.samples.domains.len()), self.samples);
            decoder_layer(self.weights, layer, hidden, &Watched { tap: &measure, watch: self.watch }, Options::of::<B>())?;
            self.watch.map_or(Ok(()), |watch| watch.layer_done(layer))?;
            self.store.put(layer, &measure.finish())
        })?;
        Ok(())
    }
}

/// In which word two manifests differ.
fn difference(found: &Manifest, asked: &Manifest) -> String {
    let what = if found.model != asked.model {
        "model files"
    } else if found.parts != asked.parts || found.domains != asked.domains {
        "calibration samples"
    } else {
        "settings"
    };
    what.to_owned()
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::arch::Site;
    use crate::device::Cpu;
    use crate::forward::testing::{grouped_spec, hidden, latent_spec, random, samples};
    use crate::progress::Quiet;
    use crate::sample::Sampler;

    /// Five samples of 700 tokens in three batches, two domains.
    fn corpus() -> Samples {
        let ids = samples(&[700; 5], 32);
        Samples { domains: vec!["en".into(), "code".into()], tokens: 700, ids, domain: vec![0, 1, 0, 1, 0] }
    }

    fn calibrate() -> Calibrate {
        Calibrate { corpus: vec![], samples: 5, tokens: 700, seed: 3, sampler: Sampler::default() }
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
        assert!(dense.router.is_none() && dense.outputs.is_none());
        assert!(dense.channels.values().all(|c| c.tokens == 3500 && c.squares.iter().all(|&x| x > 0.0)));
        assert_eq!(dense.channels[&Site::QueryB].squares.len(), 10);
        let stats = store.get(1).unwrap();
        let (router, outputs) = (stats.router.unwrap(), stats.outputs.unwrap());
        assert_eq!(router.tokens.to_vec(), [2100, 1400]);
        assert_eq!(router.counts.sum(), 7000);
        assert_eq!(router.counts, outputs.counts);
        assert!((router.weights.sum() - 3500.0).abs() < 1e-2, "two renormalized weights a token: {}", router.weights.sum());
        for (expert, &load) in router.load().iter().enumerate() {
            assert_eq!(stats.channels[&Site::ExpertIn(expert)].tokens, load);
            assert_eq!(stats.channels[&Site::ExpertDown(expert)].squares.len(), 12);
        }
        assert_eq!(stats.channels[&Site::SharedDown].tokens, 3500);
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
        assert_eq!(written.keys().collect::<Vec<_>>(), ["hidden.safetensors", "layer-00000.safetensors"]);
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
            decoder_layer(&table, layer, hidden, &crate::forward::NoTap, Options { in_flight: 3 })
        });
        let last: Vec<f32> = last.unwrap().into_iter().flat_map(|x| x.into_data().into_vec::<f32>().unwrap()).collect();
        assert_eq!(layers, [0, 1]);
        assert_eq!(last, hidden(&table, &ids));
    }
}

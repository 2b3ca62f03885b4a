//! Samples as a recipe asks for them, also where the model has a say.
//!
//! A sampler that balances experts runs the model over a pool first, as many samples at a time as are asked for, so that it
//! takes no more memory than the pass that follows; its forward cost is the pool's tokens, once. What it chose is kept in
//! `samples.json`, so that a run that is started again does not choose again.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::write::write;
use super::{Stream, stream_layers};
use crate::checkpoint::Fingerprint;
use crate::corpus::{Corpus, Tokenizer};
use crate::device::{Device, Job};
use crate::forward::{Options, Routing, Tap, decoder_layer};
use crate::progress::Progress;
use crate::sample::{self, Calibrate, Cover, Drawn, Sampler, Samples, balanced};
use crate::stats::store::write_whole;
use crate::{Error, Result, Weights};

/// What samples are drawn from.
#[derive(Clone, Copy)]
pub struct Draw<'a> {
    /// The model.
    pub weights: &'a dyn Weights,
    /// Its fingerprint.
    pub fingerprint: &'a str,
    /// What the recipe asks for.
    pub calibrate: &'a Calibrate,
    /// The texts; `None` where the sampler takes none.
    pub corpus: Option<&'a Corpus>,
    /// The model's tokenizer: what a model that writes may write.
    pub tokenizer: &'a Tokenizer,
    /// The folder of the statistics, where `samples.json` is kept.
    pub dir: &'a Path,
    /// Hears of every finished layer of a pool's pass.
    pub progress: &'a dyn Progress,
}

/// `samples.json`: what a sampler chose from its pool.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// Over model, pool and knobs.
    key: String,
    /// Tokens that the model was run on to choose.
    tokens_run: usize,
    selection: balanced::Selection,
}

/// Draws the samples.
///
/// # Errors
///
/// As [`sample::draw`], [`Error::EmptyCorpus`] where a sampler wants texts and has none, an IO error, and whatever running the
/// model says.
pub fn draw(draw: &Draw<'_>, device: Device) -> Result<Samples> {
    match &draw.calibrate.sampler {
        Sampler::Balanced(params) => balance(draw, params, device),
        Sampler::Ebss(_) | Sampler::Temperature(_) => write(draw, device),
        Sampler::Sequential(_) | Sampler::Random(_) => sample::draw(draw.calibrate, draw.corpus.ok_or(Error::EmptyCorpus)?),
    }
}

fn balance(draw: &Draw<'_>, params: &balanced::Params, device: Device) -> Result<Samples> {
    let pool = sample::pool(draw.calibrate, draw.corpus.ok_or(Error::EmptyCorpus)?, params.pool)?;
    let key = Fingerprint::of("balanced")
        .field(draw.fingerprint.as_bytes())
        .field(pool.hash().as_bytes())
        .number(draw.calibrate.samples as u64)
        .field(format!("{:?}", params.coverage).as_bytes())
        .finish();
    let path = draw.dir.join("samples.json");
    let json = |source| Error::own_json(path.clone(), source);
    if path.is_file() {
        let kept: Kept = serde_json::from_slice(&fs_err::read(&path)?).map_err(json)?;
        if kept.key == key {
            return Ok(chosen(&pool, kept.tokens_run, &kept.selection));
        }
    }
    let counts = device.run(Count { draw, pool: &pool })?;
    let selection = balanced::select(&counts, draw.calibrate.samples, params.coverage);
    tracing::info!(
        "balanced: {} of {} windows, the least-served expert has {} tokens of at most {:.0}; {} experts are never reached",
        selection.windows.len(),
        pool.ids.len(),
        selection.least,
        selection.bound,
        selection.unreached,
    );
    let samples = chosen(&pool, pool.total_tokens(), &selection);
    let text = serde_json::to_vec_pretty(&Kept { key, tokens_run: pool.total_tokens(), selection }).map_err(json)?;
    write_whole(&path, |file| file.write_all(&text).and_then(|()| file.write_all(b"\n")))?;
    Ok(samples)
}

fn chosen(pool: &Samples, tokens_run: usize, selection: &balanced::Selection) -> Samples {
    let balanced::Selection { least, bound, unreached, .. } = *selection;
    let cover = Some(Cover { pool: pool.ids.len(), least, bound, unreached });
    Samples { drawn: Drawn { tokens_run, cover, writing: None }, ..pool.only(&selection.windows) }
}

struct Count<'a> {
    draw: &'a Draw<'a>,
    pool: &'a Samples,
}

impl Job for Count<'_> {
    type Output = Result<Vec<Vec<u32>>>;

    fn run<B: Backend>(self, device: &B::Device) -> Self::Output {
        let mut counts = Vec::with_capacity(self.pool.ids.len());
        for ids in self.pool.ids.chunks(self.draw.calibrate.samples) {
            counts.extend(routing_counts::<B>(self.draw.weights, ids, device, self.draw.progress)?);
        }
        Ok(counts)
    }
}

/// Tokens that each sample sends to each expert, `[samples, slots]`: the experts of the first layer that has any, then of
/// the next.
///
/// # Errors
///
/// What running the model says.
pub fn routing_counts<B: Backend>(
    weights: &dyn Weights,
    ids: &[Vec<u32>],
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    let spec = weights.spec();
    let mut starts = Vec::with_capacity(spec.layers.len());
    let mut slots = 0;
    for layer in 0..spec.layers.len() {
        starts.push(slots);
        slots += spec.moe(layer).map_or(0, |moe| moe.experts);
    }
    let of_row = ids.iter().enumerate().flat_map(|(sample, ids)| ids.iter().map(move |_| sample)).collect();
    let choices = Choices { counts: Mutex::new(vec![vec![0; slots]; ids.len()]), starts, of_row };
    let stream = Stream { weights, ids, snapshots: None, progress };
    stream_layers::<B>(&stream, device, &mut |layer, hidden| decoder_layer(weights, layer, hidden, &choices, Options::of::<B>()))?;
    Ok(choices.counts.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Counts what the routers choose.
struct Choices {
    counts: Mutex<Vec<Vec<u32>>>,
    /// First slot of each layer.
    starts: Vec<usize>,
    /// Sample of each row.
    of_row: Vec<usize>,
}

impl<B: Backend> Tap<B> for Choices {
    fn routing(&self, layer: usize, routing: &Routing) -> Result<()> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for (row, chosen) in routing.chosen.chunks_exact(routing.top_k).enumerate() {
            let sample = &mut counts[self.of_row[routing.first + row]];
            chosen.iter().for_each(|&expert| sample[self.starts[layer] + expert as usize] += 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Text;
    use crate::device::Cpu;
    use crate::forward::testing::{grouped_spec, latent_spec, random, samples};
    use crate::pass::{Pass, run};
    use crate::progress::Quiet;
    use crate::stats::Store;

    fn corpus() -> Corpus {
        let ids = samples(&[2000, 2000], 32);
        let text = |(name, ids): (&str, &Vec<u32>)| Text::new(name, name, ids.clone());
        Corpus::new(["en", "code"].into_iter().zip(&ids).map(text).collect()).unwrap()
    }

    fn calibrate(sampler: Sampler) -> Calibrate {
        Calibrate { samples: 10, tokens: 20, sampler, ..Calibrate::over(vec![]) }
    }

    #[test]
    fn counts_are_those_of_the_pass() {
        let table = random(latent_spec(), 5);
        let corpus = corpus();
        let samples = sample::draw(&calibrate(Sampler::default()), &corpus).unwrap();
        let counts = routing_counts::<Cpu>(&table, &samples.ids, &Default::default(), &Quiet).unwrap();
        assert_eq!((counts.len(), counts[0].len()), (10, 6), "the dense layer has no slots");
        assert!(counts.iter().all(|sample| sample.iter().sum::<u32>() == 40));
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let calibrate = calibrate(Sampler::default());
        let pass = Pass {
            weights: &table,
            fingerprint: "m",
            samples: &samples,
            calibrate: &calibrate,
            store: &store,
            watch: None,
            progress: &Quiet,
        };
        run(&pass, Device::Cpu).unwrap();
        let load = store.get(1).unwrap().experts.unwrap().router.load();
        let summed: Vec<u64> = (0..6).map(|e| counts.iter().map(|c| u64::from(c[e])).sum()).collect();
        assert_eq!(load.to_vec(), summed);
    }

    #[test]
    fn balanced_samples_serve_the_least_served_better_and_are_kept() {
        let table = random(grouped_spec(), 5);
        let corpus = corpus();
        let dir = tempfile::tempdir().unwrap();
        let least = |samples: &Samples| {
            let counts = routing_counts::<Cpu>(&table, &samples.ids, &Default::default(), &Quiet).unwrap();
            (0..12).map(|slot| counts.iter().map(|c| c[slot]).sum::<u32>()).min().unwrap()
        };
        let balanced = calibrate(Sampler::Balanced(balanced::Params::default()));
        let tokenizer = crate::corpus::tests::tiny(dir.path());
        let draw_with = |weights: &dyn Weights, fingerprint: &str| {
            let progress = &Quiet;
            let (calibrate, corpus, dir) = (&balanced, Some(&corpus), dir.path());
            draw(&Draw { weights, fingerprint, calibrate, corpus, tokenizer: &tokenizer, dir, progress }, Device::Cpu)
        };
        let chosen = draw_with(&table, "m").unwrap();
        assert_eq!(chosen.ids.len(), 10);
        let cover = chosen.drawn.cover.clone().unwrap();
        assert_eq!((cover.pool, cover.least, chosen.drawn.tokens_run), (40, u64::from(least(&chosen)), 800));
        let even = sample::draw(&calibrate(Sampler::default()), &corpus).unwrap();
        assert!(least(&chosen) > least(&even), "{} and evenly {}", least(&chosen), least(&even));
        // Kept: it is not run again, so weights that cannot be read do no harm; for another model it is.
        let mut broken = table.clone();
        broken.tensors.clear();
        assert_eq!(draw_with(&broken, "m").unwrap(), chosen);
        assert!(draw_with(&broken, "other").is_err());
        let error = sample::draw(&balanced, &corpus).unwrap_err().to_string();
        assert!(error.contains("`balanced` has to run the model"), "{error}");
    }
}

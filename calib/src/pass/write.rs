//! Calibration text that the model writes itself.
//!
//! The model is held whole, in f32 (its routed experts on request on disk), with the keys and values of `at_once` texts of as many
//! branches as the sampler keeps: `4 · 2 · layers · heads · width` bytes a token of each. Texts are written `at_once` at a time, each from
//! a random stream of its own; `written.json` is replaced after every such group, and a run that is started again goes on behind it.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::Draw;
use crate::checkpoint::Fingerprint;
use crate::device::{Device, Job};
use crate::forward::{Generator, Routing, Tap, values};
use crate::sample::ebss::{self, Branch};
use crate::sample::write::{At, Stream};
use crate::sample::{Drawn, Sampler, Samples, Writing};
use crate::stats::imbalance;
use crate::stats::store::write_whole;
use crate::{Error, Result};

/// `written.json`: texts that are finished.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    /// Over model, sampler and seed.
    key: String,
    /// Tokens that the model was run on.
    tokens_run: usize,
    ids: Vec<Vec<u32>>,
}

/// Lets the model write the samples.
///
/// # Errors
///
/// An IO error, [`Error::Json`], [`Error::Tokenizer`], and what running the model says.
pub(super) fn write(draw: &Draw<'_>, device: Device) -> Result<Samples> {
    let (calibrate, name) = (draw.calibrate, draw.calibrate.sampler.name());
    let key = Fingerprint::of(name)
        .field(draw.fingerprint.as_bytes())
        .field(format!("{:?}", calibrate.sampler).as_bytes())
        .number(calibrate.samples as u64)
        .number(calibrate.tokens as u64)
        .number(calibrate.seed)
        .number(draw.tokenizer.known() as u64)
        .finish();
    let path = draw.dir.join("written.json");
    let found = if path.is_file() {
        let json = |source| Error::own_json(path.clone(), source);
        Some(serde_json::from_slice::<Written>(&fs_err::read(&path)?).map_err(json)?).filter(|found| found.key == key)
    } else {
        None
    };
    let mut written = found.unwrap_or(Written { key, tokens_run: 0, ids: Vec::new() });
    if written.ids.len() < calibrate.samples {
        device.run(Write { draw, path: &path, written: &mut written })?;
    }
    let bytes = written.ids.iter().map(|ids| Ok(draw.tokenizer.decode(ids)?.into_bytes())).collect::<Result<Vec<_>>>()?;
    let writing = Writing::of(&written.ids, &bytes);
    if 2 * writing.below_fifth > writing.texts {
        tracing::warn!(
            "{name}: {} of {} texts shrink below a fifth under zlib: the model repeats itself, and statistics of such text say little",
            writing.below_fifth,
            writing.texts
        );
    }
    let drawn = Drawn { tokens_run: written.tokens_run, writing: Some(writing), ..Drawn::default() };
    Ok(Samples { domains: vec![name.into()], tokens: calibrate.tokens, domain: vec![0; written.ids.len()], ids: written.ids, drawn })
}

struct Write<'a> {
    draw: &'a Draw<'a>,
    path: &'a Path,
    written: &'a mut Written,
}

impl Job for Write<'_> {
    type Output = Result<()>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<()> {
        let calibrate = self.draw.calibrate;
        let (at_once, hold) = match &calibrate.sampler {
            Sampler::Ebss(params) => (params.at_once, params.experts),
            Sampler::Temperature(params) => (params.at_once, params.experts),
            other => return Err(Error::SamplerNeedsModel { sampler: other.name() }),
        };
        let generator = Generator::<B>::load(self.draw.weights, device, hold.experts())?;
        let progress = self.draw.progress;
        progress.start("written tokens", (calibrate.samples * calibrate.tokens) as u64);
        progress.tick((self.written.ids.len() * calibrate.tokens) as u64);
        while self.written.ids.len() < calibrate.samples {
            let first = self.written.ids.len();
            let group = first..calibrate.samples.min(first + at_once.max(1));
            let (ids, tokens_run) = self.group(&generator, group)?;
            self.written.ids.extend(ids);
            self.written.tokens_run += tokens_run;
            let text = serde_json::to_vec(&self.written).map_err(|source| Error::Json { path: self.path.into(), source })?;
            write_whole(self.path, |file| file.write_all(&text))?;
        }
        progress.finish();
        Ok(())
    }
}

/// One sample that is being written.
struct Text {
    random: Stream,
    branches: Vec<Branch>,
}

impl Write<'_> {
    /// Writes the samples of a range side by side; they, and the tokens that the model was run on.
    fn group<B: Backend>(&self, generator: &Generator<'_, B>, samples: std::ops::Range<usize>) -> Result<(Vec<Vec<u32>>, usize)> {
        let (calibrate, known) = (self.draw.calibrate, self.draw.tokenizer.known());
        let text = |sample: usize| {
            let mut random = Stream::new(calibrate.seed, sample as u64);
            let branches = vec![Branch::of(random.below(known))];
            Text { random, branches }
        };
        let mut texts: Vec<Text> = samples.map(text).collect();
        let (mut cache, mut tokens_run) = (generator.cache(), 0);
        let mut loads = Loads::new(self.draw.weights.spec(), texts.len());
        for length in 1..calibrate.tokens {
            if generator.outgrown(&cache, length) {
                cache = generator.cache();
                loads = Loads::new(self.draw.weights.spec(), loads.rows());
            }
            let branches = texts.iter().flat_map(|text| &text.branches);
            let new: Vec<Vec<u32>> = branches.map(|branch| branch.ids[cache.tokens()..].to_vec()).collect();
            tokens_run += new.iter().map(Vec::len).sum::<usize>();
            loads.step = length - cache.tokens();
            let logits = generator.step(&new, &mut cache, &loads)?;
            let vocab = logits.dims()[1];
            let logits = values(logits, "logits")?;
            let sigmas = loads.sigmas();
            let mut parents = Vec::new();
            let mut first = 0;
            for text in &mut texts {
                let rows = first..first + text.branches.len();
                let at: Vec<At> = rows.clone().map(|row| At { logits: &logits[row * vocab..][..vocab], sigma: sigmas[row] }).collect();
                let chosen = self.choose(text, &at, known);
                parents.extend(chosen.iter().map(|(from, _)| first + from));
                text.branches = chosen.into_iter().map(|(_, branch)| branch).collect();
                first = rows.end;
            }
            if !parents.iter().copied().eq(0..first) {
                cache.select(&parents);
                loads.select(&parents);
            }
            self.draw.progress.tick(texts.len() as u64);
        }
        self.draw.progress.tick(texts.len() as u64);
        Ok((texts.into_iter().map(|mut text| text.branches.swap_remove(0).ids).collect(), tokens_run))
    }

    /// What survives of one sample, cheapest first.
    fn choose(&self, text: &mut Text, at: &[At<'_>], known: usize) -> Vec<(usize, Branch)> {
        match &self.draw.calibrate.sampler {
            Sampler::Ebss(params) => ebss::step(params, &text.branches, at, known, &mut text.random),
            Sampler::Temperature(params) => {
                let token = text.random.sample(at[0].logits, params.temperature, known);
                vec![(0, text.branches[0].with(token, 0.0, 0.0))]
            }
            _ => Vec::new(),
        }
    }
}

/// Tokens that every branch has sent to every expert.
struct Loads {
    /// First slot of each layer, and the end of the last.
    starts: Vec<usize>,
    /// `[branches, slots]`.
    counts: Mutex<Vec<Vec<u64>>>,
    /// Tokens of a branch in the step that runs.
    step: usize,
}

impl Loads {
    fn new(spec: &crate::arch::Spec, rows: usize) -> Self {
        let mut starts = vec![0];
        for layer in 0..spec.layers.len() {
            starts.push(starts[layer] + spec.moe(layer).map_or(0, |moe| moe.experts));
        }
        let slots = starts[spec.layers.len()];
        Self { starts, counts: Mutex::new(vec![vec![0; slots]; rows]), step: 1 }
    }

    fn rows(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// `σ` of every branch: the mean over layers with experts.
    fn sigmas(&self) -> Vec<f64> {
        let layers: Vec<_> = self.starts.windows(2).filter(|span| span[1] > span[0]).collect();
        let sigma = |counts: &Vec<u64>| layers.iter().map(|span| imbalance(&counts[span[0]..span[1]])).sum::<f64>();
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|counts| sigma(counts) / layers.len().max(1) as f64).collect()
    }

    /// Branch `i` becomes what branch `rows[i]` was.
    fn select(&mut self, rows: &[usize]) {
        let counts = self.counts.get_mut().unwrap_or_else(PoisonError::into_inner);
        *counts = rows.iter().map(|&row| counts[row].clone()).collect();
    }
}

impl<B: Backend> Tap<B> for Loads {
    fn routing(&self, layer: usize, routing: &Routing) -> Result<()> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for (row, chosen) in routing.chosen.chunks_exact(routing.top_k).enumerate() {
            let branch = &mut counts[(routing.first + row) / self.step];
            chosen.iter().for_each(|&expert| branch[self.starts[layer] + expert as usize] += 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::tests::tiny;
    use crate::forward::Experts;
    use crate::forward::testing::{Table, grouped_spec, latent_spec, random};
    use crate::progress::Quiet;
    use crate::sample::{Calibrate, ebss, temperature};

    fn calibrate(sampler: Sampler) -> Calibrate {
        Calibrate { samples: 5, tokens: 14, seed: 3, sampler, ..Calibrate::over(vec![]) }
    }

    fn ebss_of(at_once: usize, warmup: usize, tau: f64) -> Sampler {
        Sampler::Ebss(ebss::Params { at_once, warmup, tau, branches: 3, ..ebss::Params::default() })
    }

    fn written(table: &Table, sampler: Sampler, dir: &Path) -> Samples {
        let tokenizer = tiny(dir);
        let calibrate = calibrate(sampler);
        let draw =
            Draw { weights: table, fingerprint: "m", calibrate: &calibrate, corpus: None, tokenizer: &tokenizer, dir, progress: &Quiet };
        write(&draw, Device::Cpu).unwrap()
    }

    /// The same search, a full pass for every branch at every step.
    fn slow(table: &Table, params: &ebss::Params, sample: u64) -> Vec<u32> {
        let generator = Generator::<crate::device::Cpu>::load(table, &Default::default(), Experts::Streamed).unwrap();
        let mut random = Stream::new(3, sample);
        let mut branches = vec![Branch::of(random.below(11))];
        while branches[0].ids.len() < 14 {
            let seen: Vec<(Vec<f32>, f64)> = branches
                .iter()
                .map(|branch| {
                    let mut loads = Loads::new(&table.spec, 1);
                    loads.step = branch.ids.len();
                    let logits = generator.step(std::slice::from_ref(&branch.ids), &mut generator.cache(), &loads).unwrap();
                    (values(logits, "test").unwrap(), loads.sigmas()[0])
                })
                .collect();
            let at: Vec<At> = seen.iter().map(|(logits, sigma)| At { logits, sigma: *sigma }).collect();
            branches = ebss::step(params, &branches, &at, 11, &mut random).into_iter().map(|(_, branch)| branch).collect();
        }
        branches.swap_remove(0).ids
    }

    #[test]
    fn cached_batched_branches_write_what_full_passes_write() {
        for spec in [grouped_spec(), latent_spec()] {
            let table = random(spec, 5);
            let dir = tempfile::tempdir().unwrap();
            let samples = written(&table, ebss_of(4, 3, 0.2), dir.path());
            let Sampler::Ebss(params) = ebss_of(4, 3, 0.2) else { unreachable!() };
            for (i, ids) in samples.ids.iter().enumerate() {
                assert_eq!(*ids, slow(&table, &params, i as u64), "sample {i}");
                assert!(ids.len() == 14 && ids.iter().all(|&id| id < 11), "{ids:?}");
            }
            // Per text: one row while it has 1, 2, 3 tokens, and one more at 4, then 3 rows up to 13.
            assert_eq!(samples.drawn.tokens_run, 5 * (4 + 3 * 9));
            assert_eq!((samples.domains.as_slice(), samples.domain.len()), (["ebss".to_owned()].as_slice(), 5));
        }
    }

    #[test]
    fn what_is_written_is_kept_and_gone_on_with() {
        let table = random(grouped_spec(), 5);
        let (whole, begun) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let all = written(&table, ebss_of(2, 3, 1.2), whole.path());
        // What a run leaves that is killed behind its first group.
        written(&table, ebss_of(2, 3, 1.2), begun.path());
        let path = begun.path().join("written.json");
        let mut half: serde_json::Value = serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
        half["ids"].as_array_mut().unwrap().truncate(2);
        half["tokens_run"] = (2 * (4 + 3 * 9)).into();
        fs_err::write(&path, half.to_string()).unwrap();
        assert_eq!(written(&table, ebss_of(2, 3, 1.2), begun.path()), all);
        // Finished: weights that cannot be read do no harm.
        let mut broken = table.clone();
        broken.tensors.clear();
        assert_eq!(written(&broken, ebss_of(2, 3, 1.2), begun.path()), all);
    }

    #[test]
    fn balance_weighs_more_with_a_small_tau() {
        let table = random(grouped_spec(), 5);
        let sigma = |tau: f64| {
            let dir = tempfile::tempdir().unwrap();
            let samples = written(&table, ebss_of(5, 0, tau), dir.path());
            let generator = Generator::<crate::device::Cpu>::load(&table, &Default::default(), Experts::Streamed).unwrap();
            let mut loads = Loads::new(&table.spec, 5);
            loads.step = 14;
            generator.step(&samples.ids, &mut generator.cache(), &loads).unwrap();
            loads.sigmas().iter().sum::<f64>()
        };
        let (balanced, free) = (sigma(0.005), sigma(1e9));
        assert!(balanced < free, "{balanced} and {free}");
    }

    #[test]
    fn sampled_text_is_another_with_another_seed_and_varied() {
        let table = random(grouped_spec(), 5);
        let dir = tempfile::tempdir().unwrap();
        let sampler = || Sampler::Temperature(temperature::Params { at_once: 2, ..Default::default() });
        let samples = written(&table, sampler(), dir.path());
        assert_eq!(samples.drawn.tokens_run, 5 * 13);
        let writing = samples.drawn.writing.clone().unwrap();
        assert_eq!((writing.texts, writing.different), (5, 5));
        let other = tempfile::tempdir().unwrap();
        let cold = Sampler::Temperature(temperature::Params { temperature: 0.01, ..Default::default() });
        let cold = written(&table, cold, other.path()).drawn.writing.unwrap();
        assert!(cold.distinct[1] < writing.distinct[1], "{cold:?} {writing:?}");
    }
}

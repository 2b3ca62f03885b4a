//! How calibration samples are chosen from a corpus.
//!
//! A sample is a window of `tokens` tokens from the calibration part of one text; windows start at multiples of `tokens`.
//! `samples` are shared out evenly over the texts, the first ones taking one more where that does not come out even; the
//! sampler chooses among a text's windows, and the texts' samples are interleaved. Everything is seeded and the order is fixed.

pub mod balanced;
mod random;
mod sequential;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Fingerprint;
use crate::corpus::{Corpus, Text};
use crate::stats::Undercalibrated;
use crate::{Error, Result};

/// `[calibrate]`: the text that a model is measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Calibrate {
    /// `.txt` and `.jsonl` files. Each is a domain, named by its file stem; its first four fifths are used.
    pub corpus: Vec<PathBuf>,
    /// Samples over all files; they are shared out evenly.
    #[serde(default = "samples")]
    pub samples: usize,
    /// Tokens a sample.
    #[serde(default = "tokens")]
    pub tokens: usize,
    /// Seed of whatever is drawn.
    #[serde(default)]
    pub seed: u64,
    /// Who chooses the samples.
    #[serde(default)]
    pub sampler: Sampler,
    /// Keep which experts every token chose, 2 bytes a choice, as `traces-*.safetensors` beside the statistics.
    #[serde(default)]
    pub traces: bool,
    /// Tokens, spread evenly over all samples, that every expert is run on to see how alike experts are (for merging); none
    /// without it. It reads every expert a second time and holds the layer's experts' outputs for so many tokens.
    #[serde(default)]
    pub similarity_tokens: usize,
    /// What becomes of an expert that too few tokens reached.
    #[serde(default)]
    pub undercalibrated: Undercalibrated,
}

impl Calibrate {
    /// The defaults over some files.
    pub fn over(corpus: Vec<PathBuf>) -> Self {
        let sampler = Sampler::default();
        Self {
            corpus,
            samples: samples(),
            tokens: tokens(),
            seed: 0,
            sampler,
            traces: false,
            similarity_tokens: 0,
            undercalibrated: Undercalibrated::default(),
        }
    }
}

fn samples() -> usize {
    128
}

fn tokens() -> usize {
    2048
}

/// Who chooses the samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Sampler {
    /// Windows spread evenly over each text.
    Sequential(sequential::Params),
    /// Windows drawn at random, none twice.
    Random(random::Params),
    /// Windows that bring every expert of every layer the most tokens of its own, chosen from a larger pool that the model
    /// is run on first.
    Balanced(balanced::Params),
}

impl Default for Sampler {
    fn default() -> Self {
        Self::Sequential(sequential::Params {})
    }
}

impl Sampler {
    /// Its name in a recipe.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sequential(_) => "sequential",
            Self::Random(_) => "random",
            Self::Balanced(_) => "balanced",
        }
    }
}

/// Calibration samples: token windows of one length, each of one domain.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// Names of the domains.
    pub domains: Vec<String>,
    /// Tokens a sample.
    pub tokens: usize,
    /// Token ids, `[samples, tokens]`.
    pub ids: Vec<Vec<u32>>,
    /// Index into `domains`, `[samples]`.
    pub domain: Vec<usize>,
}

impl Samples {
    /// A hash of the domains, the window length and every token id, in order; hex.
    pub fn hash(&self) -> String {
        let mut hash = Fingerprint::of("samples").number(self.tokens as u64).number(self.domains.len() as u64);
        for name in &self.domains {
            hash = hash.field(name.as_bytes());
        }
        for (ids, &domain) in self.ids.iter().zip(&self.domain) {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            hash = hash.number(domain as u64).field(&bytes);
        }
        hash.finish()
    }

    /// Some of the samples, in the order given.
    pub fn only(&self, which: &[usize]) -> Self {
        let ids = which.iter().map(|&i| self.ids[i].clone()).collect();
        let domain = which.iter().map(|&i| self.domain[i]).collect();
        Self { domains: self.domains.clone(), tokens: self.tokens, ids, domain }
    }

    /// Tokens over all samples.
    pub fn total_tokens(&self) -> usize {
        self.ids.len() * self.tokens
    }
}

/// Draws the samples that `params` ask for, from the texts alone; [`pass::draw`](crate::pass::draw) knows all samplers.
///
/// # Errors
///
/// [`Error::SamplerNeedsModel`] for a sampler that runs the model, [`Error::TooSmall`] where there are fewer samples than texts or samples of less than two tokens,
/// [`Error::TooFewTokens`] for a text with fewer windows than its share.
pub fn draw(params: &Calibrate, corpus: &Corpus) -> Result<Samples> {
    let Calibrate { samples, tokens, seed, .. } = *params;
    let texts = corpus.texts();
    at_least("calibrate.tokens", tokens, 2)?;
    at_least("calibrate.samples", samples, texts.len())?;
    let chosen: Vec<Vec<&[u32]>> = texts
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let take = share(samples, texts.len(), i);
            let windows = windows_of(text, tokens, take)?;
            let picks = match &params.sampler {
                Sampler::Sequential(_) => sequential::pick(windows.len(), take),
                Sampler::Random(_) => random::pick(windows.len(), take, seed, i as u64),
                Sampler::Balanced(_) => return Err(Error::SamplerNeedsModel { sampler: "balanced" }),
            };
            Ok(picks.into_iter().map(|w| windows[w]).collect())
        })
        .collect::<Result<_>>()?;
    let domains = texts.iter().map(|t| t.domain.clone()).collect();
    Ok(interleave(domains, tokens, &chosen))
}

/// The pool that a sampler chooses from: `times` as many windows of each text as its share of the samples, or all of them,
/// spread evenly.
///
/// # Errors
///
/// As [`draw`].
pub(crate) fn pool(params: &Calibrate, corpus: &Corpus, times: usize) -> Result<Samples> {
    let Calibrate { samples, tokens, .. } = *params;
    let texts = corpus.texts();
    at_least("calibrate.tokens", tokens, 2)?;
    at_least("calibrate.samples", samples, texts.len())?;
    at_least("calibrate.sampler.balanced.pool", times, 1)?;
    let mut chosen: Vec<Vec<&[u32]>> = Vec::with_capacity(texts.len());
    for (i, text) in texts.iter().enumerate() {
        let share = share(samples, texts.len(), i);
        let windows = windows_of(text, tokens, share)?;
        let take = windows.len().min(share.saturating_mul(times));
        chosen.push(sequential::pick(windows.len(), take).into_iter().map(|w| windows[w]).collect());
    }
    Ok(interleave(texts.iter().map(|t| t.domain.clone()).collect(), tokens, &chosen))
}

fn at_least(what: &'static str, value: usize, least: usize) -> Result<()> {
    if value < least { Err(Error::TooSmall { what, value, least }) } else { Ok(()) }
}

/// How many of `samples` the text `index` of `texts` gives.
fn share(samples: usize, texts: usize, index: usize) -> usize {
    samples / texts + usize::from(index < samples % texts)
}

/// All windows of a text's calibration part.
fn windows_of(text: &Text, window: usize, asked: usize) -> Result<Vec<&[u32]>> {
    let ids = text.calibration();
    if ids.len() / window < asked {
        let path = text.path.clone();
        return Err(Error::TooFewTokens { path, what: "its first four fifths", tokens: ids.len(), asked, window });
    }
    Ok(ids.chunks_exact(window).collect())
}

/// The first of each text, then the second of each, and so on.
fn interleave(domains: Vec<String>, tokens: usize, chosen: &[Vec<&[u32]>]) -> Samples {
    let longest = chosen.iter().map(Vec::len).max().unwrap_or(0);
    let order = (0..longest).flat_map(|i| (0..chosen.len()).filter(move |&d| i < chosen[d].len()).map(move |d| (d, i)));
    let (domain, ids) = order.map(|(d, i)| (d, chosen[d][i].to_vec())).unzip();
    Samples { domains, tokens, ids, domain }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(lengths: &[u32]) -> Corpus {
        let text = |(i, &n): (usize, &u32)| Text {
            domain: format!("d{i}"),
            path: format!("d{i}.txt").into(),
            ids: (0..n).map(|t| t + 1000 * i as u32).collect(),
        };
        Corpus::new(lengths.iter().enumerate().map(text).collect()).unwrap()
    }

    fn params(samples: usize, tokens: usize, sampler: Sampler) -> Calibrate {
        Calibrate { samples, tokens, seed: 7, sampler, ..Calibrate::over(vec![]) }
    }

    #[test]
    fn samples_are_spread_over_each_text_and_interleaved() {
        // 50 and 30 tokens: calibration has 40 and 24, so 10 and 6 windows of 4. 5 samples: 3 of the first, 2 of the second.
        // Spread: windows 0, 4.5 (to even: 4), 9 and 0, 5.
        let samples = draw(&params(5, 4, Sampler::default()), &corpus(&[50, 30])).unwrap();
        let first: Vec<u32> = samples.ids.iter().map(|ids| ids[0]).collect();
        assert_eq!(first, [0, 1000, 16, 1020, 36]);
        assert_eq!(samples.domain, [0, 1, 0, 1, 0]);
        assert_eq!(samples.ids[3], [1020, 1021, 1022, 1023]);
    }

    #[test]
    fn random_samples_are_windows_of_their_own_and_follow_the_seed() {
        let random = || Sampler::Random(random::Params {});
        let corpus = corpus(&[500, 500]);
        let one = draw(&params(40, 5, random()), &corpus).unwrap();
        assert_eq!(one, draw(&params(40, 5, random()), &corpus).unwrap());
        let other = draw(&Calibrate { seed: 8, ..params(40, 5, random()) }, &corpus).unwrap();
        assert_ne!(one.hash(), other.hash());
        let mut starts: Vec<u32> = one.ids.iter().map(|ids| ids[0]).collect();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), 40);
        assert!(starts.iter().all(|s| s % 5 == 0 && s % 1000 < 400), "from the calibration part: {starts:?}");
    }

    #[test]
    fn too_short_a_text_says_what_there_is() {
        let error = draw(&params(4, 10, Sampler::default()), &corpus(&[100, 20])).unwrap_err().to_string();
        assert!(
            error.contains("d1.txt: 2 windows of 10 tokens asked for, but its first four fifths has 16 tokens, which is 1 window;"),
            "{error}"
        );
        let error = draw(&params(1, 10, Sampler::default()), &corpus(&[100, 20])).unwrap_err().to_string();
        assert!(error.contains("calibrate.samples is 1, but must be at least 2"), "{error}");
    }

    #[test]
    fn a_recipe_names_its_sampler_and_unknown_keys_are_refused() {
        let read = |json: &str| serde_json::from_str::<Calibrate>(json);
        let it = read(r#"{"corpus": ["a.txt"], "samples": 3, "sampler": {"random": {}}}"#).unwrap();
        assert_eq!((it.samples, it.tokens, it.sampler.name()), (3, 2048, "random"));
        assert!(read(r#"{"corpus": [], "sample": 3}"#).unwrap_err().to_string().contains("unknown field `sample`"));
        assert!(read(r#"{"corpus": [], "sampler": {"random": {"x": 1}}}"#).unwrap_err().to_string().contains("unknown field `x`"));
    }

    #[test]
    fn the_hash_sees_tokens_domains_and_order() {
        let one = draw(&params(4, 10, Sampler::default()), &corpus(&[100, 100])).unwrap();
        let changed = |edit: &dyn Fn(&mut Samples)| {
            let mut other = one.clone();
            edit(&mut other);
            other.hash()
        };
        assert_eq!(one.hash(), changed(&|_| ()));
        assert_eq!(one.hash().len(), 64);
        assert_ne!(one.hash(), changed(&|s| s.ids.swap(0, 2)));
        assert_ne!(one.hash(), changed(&|s| s.ids[3][9] += 1));
        assert_ne!(one.hash(), changed(&|s| s.domains[0] = "x".into()));
    }
}

//! How calibration samples are chosen from a corpus.
//!
//! A sample is a window of `tokens` tokens from the calibration part of one text; windows start at multiples of `tokens`. Where
//! documents are not packed, it is a document, cut at `tokens`: samples are then of several lengths, and nothing pads them.
//! `samples` are shared out over the texts by their weights, by largest remainder, of equal remainders to the first; the sampler
//! chooses among a text's windows, and the texts' samples are interleaved. Everything is seeded and the order is fixed.
//! Two samplers have no text: the model writes the samples itself.

pub mod balanced;
pub mod ebss;
mod generate;
pub mod random;
pub mod sequential;
pub mod temperature;
pub mod write;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backward;
use crate::checkpoint::Fingerprint;
use crate::corpus::{Corpus, Source, Text};
use crate::stats::Undercalibrated;
use crate::{Error, Result};

pub use generate::Generate;
pub use write::Writing;

/// `[calibrate]`: the text that a model is measured on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Calibrate {
    /// `.txt`, `.jsonl` and `.parquet` files, each a path or `{ path = "a.jsonl", name = "code", weight = 2.0 }`. Each is a
    /// domain, named by its file stem where it has no name; its first four fifths are used. None for a sampler that lets the
    /// model write.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub corpus: Vec<Source>,
    /// Samples over all files; they are shared out by the files' weights.
    #[serde(default = "samples")]
    pub samples: usize,
    /// Tokens a sample; at most so many where documents are not packed.
    #[serde(default = "tokens")]
    pub tokens: usize,
    /// Whether documents are packed one after the other and cut into windows; `false`: a document is a sample, cut at `tokens`.
    #[serde(default = "pack")]
    pub pack: bool,
    /// Seed of whatever is drawn.
    #[serde(default)]
    pub seed: u64,
    /// Who chooses the samples.
    #[serde(default)]
    pub sampler: Sampler,
    /// Lets the model write what follows the prompts of `.jsonl` texts that nothing follows (`prompt` without `completion`, `messages` that
    /// end before the assistant's turn), before it is measured on them. `--generate` asks for it with the defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generate: Option<Generate>,
    /// Which tokens the second moments and channel sums of the routed experts are over, and so what solvers see. What the router
    /// chose and the experts gave is measured of the routed tokens either way.
    #[serde(default)]
    pub experts: Through,
    /// Keep which experts every token chose, 2 bytes a choice, as `traces-*.safetensors` beside the statistics.
    #[serde(default)]
    pub traces: bool,
    /// Tokens, spread evenly over all samples, that every expert is run on to see how alike experts are (for merging); none
    /// without it. It reads every expert a second time and holds the layer's experts' outputs for so many tokens.
    #[serde(default)]
    pub similarity_tokens: usize,
    /// Keep the second moments that solvers use, as `moments/layer-*.safetensors` beside the statistics: another width, budget or grid
    /// over the same samples (`--force`) is then solved without a forward pass. About `2·K²` bytes for each expert's and each other
    /// matrix's `K` inputs, so for small models. For the independent order alone, and without `refine.learned`.
    #[serde(default)]
    pub keep_moments: bool,
    /// What becomes of an expert that too few tokens reached.
    #[serde(default)]
    pub undercalibrated: Undercalibrated,
    /// The loss of the backward pass, where `objective.token_weight` or `allocate.cost` is `end_loss`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_loss: Option<backward::Params>,
}

impl Calibrate {
    /// What the model is run on where it writes: texts side by side, tokens of each at most, and whether its experts are in memory meanwhile.
    /// `None` where it writes nothing. Prompts are taken to be no longer than samples.
    pub fn writing(&self) -> Option<([usize; 2], bool)> {
        let by_sampler = match &self.sampler {
            Sampler::Ebss(params) => Some(([params.at_once * params.branches, self.tokens], params.experts)),
            Sampler::Temperature(params) => Some(([params.at_once, self.tokens], params.experts)),
            Sampler::Sequential(_) | Sampler::Random(_) | Sampler::Balanced(_) => None,
        };
        let completing = self.generate.as_ref().map(|params| ([params.at_once, self.tokens + params.tokens], params.experts));
        by_sampler.or(completing).map(|(texts, experts)| (texts, experts == write::Hold::Memory))
    }

    /// The defaults over some files.
    pub fn over(corpus: Vec<PathBuf>) -> Self {
        let (corpus, sampler) = (corpus.into_iter().map(Source::from).collect(), Sampler::default());
        let (samples, tokens, pack, experts) = (samples(), tokens(), pack(), Through::default());
        let undercalibrated = Undercalibrated::default();
        let (traces, keep_moments, similarity_tokens, generate, end_loss) = (false, false, 0, None, None);
        let seed = 0;
        Self {
            corpus,
            samples,
            tokens,
            pack,
            seed,
            sampler,
            generate,
            experts,
            traces,
            similarity_tokens,
            keep_moments,
            undercalibrated,
            end_loss,
        }
    }
}

fn samples() -> usize {
    128
}

fn tokens() -> usize {
    2048
}

fn pack() -> bool {
    true
}

/// Which tokens a routed expert is measured on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Through {
    /// Those that the router sends to it.
    #[default]
    Routed,
    /// All, as other tools do it: experts / top-k times the experts' work, and second moments of tokens that an expert never sees in
    /// use.
    All,
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
    /// Text that the model writes itself, by a search for what is likely and uses all experts alike.
    Ebss(ebss::Params),
    /// Text that the model writes itself, each token sampled: the control of `ebss`.
    Temperature(temperature::Params),
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
            Self::Ebss(_) => "ebss",
            Self::Temperature(_) => "temperature",
        }
    }

    /// Whether it takes its samples from no text, because the model writes them.
    pub fn writes(&self) -> bool {
        matches!(self, Self::Ebss(_) | Self::Temperature(_))
    }

    /// Knobs that have no meaning: the knob and what is wrong with it.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let mut least = |knob: &'static str, value: usize| {
            if value == 0 {
                found.push((knob, format!("{knob} = 0; ask for at least 1")));
            }
        };
        match self {
            Self::Sequential(_) | Self::Random(_) => {}
            Self::Balanced(params) => least("pool", params.pool),
            Self::Ebss(params) => {
                least("branches", params.branches);
                least("at_once", params.at_once);
            }
            Self::Temperature(params) => least("at_once", params.at_once),
        }
        let positive = match self {
            Self::Ebss(params) => Some(("tau", params.tau)),
            Self::Temperature(params) => Some(("temperature", params.temperature)),
            _ => None,
        };
        if let Some((knob, value)) = positive.filter(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            found.push((knob, format!("{knob} = {value}; ask for more than 0")));
        }
        found
    }
}

/// How samples came about: what a sampler did beyond reading texts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drawn {
    /// Tokens that the model was run on to choose or to write the samples, those of branches that were dropped among them.
    pub tokens_run: usize,
    /// What `balanced` reached on its pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cover: Option<Cover>,
    /// How far what the model wrote repeats itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writing: Option<Writing>,
}

/// How well a choice from a pool serves the least-served expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cover {
    /// Windows in the pool.
    pub pool: usize,
    /// Tokens of the least-served expert among those that the pool reaches.
    pub least: u64,
    /// What no choice of as many windows can exceed.
    pub bound: f64,
    /// Experts that no window of the pool reaches.
    pub unreached: usize,
}

/// Calibration samples, each of one domain.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    /// Names of the domains.
    pub domains: Vec<String>,
    /// Tokens of the longest sample.
    pub tokens: usize,
    /// Token ids, `[samples, tokens]`; every sample has a length of its own where documents are not packed.
    pub ids: Vec<Vec<u32>>,
    /// Index into `domains`, `[samples]`.
    pub domain: Vec<usize>,
    /// How they came about.
    pub drawn: Drawn,
}

impl Samples {
    /// A hash of the domains, the longest length and every token id, in order; hex.
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
        Self { domains: self.domains.clone(), tokens: self.tokens, ids, domain, drawn: self.drawn.clone() }
    }

    /// Tokens over all samples.
    pub fn total_tokens(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }

    /// The first row of each sample over all samples, rising.
    pub fn starts(&self) -> Vec<usize> {
        let start = |next: &mut usize, ids: &Vec<u32>| Some(std::mem::replace(next, *next + ids.len()));
        self.ids.iter().scan(0, start).collect()
    }
}

/// Draws the samples that `params` ask for, from the texts alone; [`pass::draw`](crate::pass::draw) knows all samplers.
///
/// # Errors
///
/// [`Error::SamplerNeedsModel`] for a sampler that runs the model, [`Error::TooSmall`] where there are fewer samples than texts or samples of less than two tokens,
/// [`Error::TooFewTokens`] for a text with fewer windows than its share.
pub fn draw(params: &Calibrate, corpus: &Corpus) -> Result<Samples> {
    let chosen: Vec<Vec<&[u32]>> = shared_out(params, corpus)?
        .into_iter()
        .enumerate()
        .map(|(i, Part { take, units })| {
            let picks = match &params.sampler {
                Sampler::Sequential(_) => sequential::pick(units.len(), take),
                Sampler::Random(_) => random::pick(units.len(), take, params.seed, i as u64),
                Sampler::Balanced(_) | Sampler::Ebss(_) | Sampler::Temperature(_) => {
                    return Err(Error::SamplerNeedsModel { sampler: params.sampler.name() });
                }
            };
            Ok(picks.into_iter().map(|w| units[w]).collect())
        })
        .collect::<Result<_>>()?;
    Ok(interleave(corpus, &chosen))
}

/// The pool that a sampler chooses from: `times` as many windows of each text as its share of the samples, or all of them,
/// spread evenly.
///
/// # Errors
///
/// As [`draw`].
pub(crate) fn pool(params: &Calibrate, corpus: &Corpus, times: usize) -> Result<Samples> {
    at_least("calibrate.sampler.balanced.pool", times, 1)?;
    let mut chosen: Vec<Vec<&[u32]>> = Vec::with_capacity(corpus.texts().len());
    for Part { take, units } in shared_out(params, corpus)? {
        let take = units.len().min(take.saturating_mul(times));
        chosen.push(sequential::pick(units.len(), take).into_iter().map(|w| units[w]).collect());
    }
    Ok(interleave(corpus, &chosen))
}

/// What one text has to give.
struct Part<'a> {
    /// How many of its windows or documents.
    take: usize,
    units: Vec<&'a [u32]>,
}

/// The windows or documents of every text and how many of them are to be taken.
fn shared_out<'a>(params: &Calibrate, corpus: &'a Corpus) -> Result<Vec<Part<'a>>> {
    let texts = corpus.texts();
    at_least("calibrate.tokens", params.tokens, 2)?;
    at_least("calibrate.samples", params.samples, texts.len())?;
    let weights: Vec<f64> = texts.iter().map(|text| text.weight).collect();
    let part = |(text, take): (&'a Text, usize)| {
        if take == 0 {
            return Err(Error::NoShare { domain: text.domain.clone(), weight: text.weight, samples: params.samples });
        }
        Ok(Part { take, units: units(text, params, take)? })
    };
    texts.iter().zip(shares(params.samples, &weights)).map(part).collect()
}

fn at_least(what: &'static str, value: usize, least: usize) -> Result<()> {
    if value < least { Err(Error::TooSmall { what, value, least }) } else { Ok(()) }
}

/// `samples` shared out by weights: the whole part of each quota, and what is left to the largest remainders, of equal ones to the
/// first (Hamilton's method). Weights that are not positive and finite get nothing.
fn shares(samples: usize, weights: &[f64]) -> Vec<usize> {
    let usable = |w: f64| if w.is_finite() && w > 0.0 { w } else { 0.0 };
    let all: f64 = weights.iter().copied().map(usable).sum();
    let quotas: Vec<f64> = weights.iter().map(|&w| if all > 0.0 { samples as f64 * usable(w) / all } else { 0.0 }).collect();
    let mut shares: Vec<usize> = quotas.iter().map(|quota| quota.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).filter(|&i| quotas[i] > 0.0).collect();
    // A stable sort: of equal remainders the first stays first.
    order.sort_by(|&a, &b| quotas[b].fract().total_cmp(&quotas[a].fract()));
    let left = samples.saturating_sub(shares.iter().sum());
    order.into_iter().take(left).for_each(|i| shares[i] += 1);
    shares
}

/// All windows of a text's calibration part, or all its documents.
fn units<'a>(text: &'a Text, params: &Calibrate, asked: usize) -> Result<Vec<&'a [u32]>> {
    let (path, window) = (text.path.clone(), params.tokens);
    if !params.pack {
        let documents = text.documents(window);
        let found = documents.len();
        return if found < asked { Err(Error::TooFewDocuments { path, documents: found, asked }) } else { Ok(documents) };
    }
    let ids = text.calibration();
    if ids.len() / window < asked {
        return Err(Error::TooFewTokens { path, what: "its first four fifths", tokens: ids.len(), asked, window });
    }
    Ok(ids.chunks_exact(window).collect())
}

/// The first of each text, then the second of each, and so on.
fn interleave(corpus: &Corpus, chosen: &[Vec<&[u32]>]) -> Samples {
    let domains = corpus.texts().iter().map(|text| text.domain.clone()).collect();
    let longest = chosen.iter().map(Vec::len).max().unwrap_or(0);
    let order = (0..longest).flat_map(|i| (0..chosen.len()).filter(move |&d| i < chosen[d].len()).map(move |d| (d, i)));
    let (domain, ids): (Vec<usize>, Vec<Vec<u32>>) = order.map(|(d, i)| (d, chosen[d][i].to_vec())).unzip();
    Samples { domains, tokens: ids.iter().map(Vec::len).max().unwrap_or(0), ids, domain, drawn: Drawn::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(lengths: &[u32]) -> Corpus {
        let text = |(i, &n): (usize, &u32)| Text::new(format!("d{i}"), format!("d{i}.txt"), (0..n).map(|t| t + 1000 * i as u32).collect());
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
    fn knobs_without_meaning_are_told_all_at_once() {
        let ebss = |branches, tau| Sampler::Ebss(ebss::Params { branches, tau, ..Default::default() });
        let knobs = |sampler: &Sampler| sampler.problems().into_iter().map(|(knob, _)| knob).collect::<Vec<_>>();
        assert_eq!(knobs(&ebss(0, -1.0)), ["branches", "tau"]);
        assert_eq!(knobs(&ebss(4, 1.2)), [""; 0]);
        assert_eq!(knobs(&Sampler::Balanced(balanced::Params { pool: 0, coverage: None })), ["pool"]);
        assert_eq!(knobs(&Sampler::Temperature(temperature::Params { temperature: f64::NAN, ..Default::default() })), ["temperature"]);
    }

    #[test]
    fn weights_share_out_by_largest_remainder() {
        // Quotas of 10 by 1:1:1: 3.33 each, the one left goes to the first. By 5:3:1 of 9 parts: 5.56, 3.33, 1.11.
        assert_eq!(shares(10, &[1.0, 1.0, 1.0]), [4, 3, 3]);
        assert_eq!(shares(10, &[5.0, 3.0, 1.0]), [6, 3, 1]);
        assert_eq!(shares(3, &[1.0, 100.0]), [0, 3]);
        assert_eq!(shares(3, &[f64::NAN, 1.0]), [0, 3]);
        let mut corpus = corpus(&[100, 100]).texts().to_vec();
        corpus[1].weight = 3.0;
        let samples = draw(&params(4, 10, Sampler::default()), &Corpus::new(corpus.clone()).unwrap()).unwrap();
        assert_eq!(samples.domain, [0, 1, 1, 1]);
        corpus[1].weight = 100.0;
        let error = draw(&params(4, 10, Sampler::default()), &Corpus::new(corpus).unwrap()).unwrap_err().to_string();
        assert!(error.contains("d0: with weight 1 none of the 4 samples falls to it"), "{error}");
    }

    #[test]
    fn a_document_is_a_sample_where_they_are_not_packed() {
        // 50 tokens, 40 of them calibration, documents of 10, 3, 12 and 25 tokens: the last is cut by the validation part to 15.
        let text = Text { ends: vec![10, 13, 25, 50], ..Text::new("a", "a.jsonl", (0..50).collect()) };
        let corpus = Corpus::new(vec![text]).unwrap();
        let asked = |samples, tokens| Calibrate { pack: false, ..params(samples, tokens, Sampler::default()) };
        let samples = draw(&asked(4, 12), &corpus).unwrap();
        assert_eq!(samples.ids.iter().map(Vec::len).collect::<Vec<_>>(), [10, 3, 12, 12]);
        assert_eq!((samples.tokens, samples.total_tokens(), samples.starts()), (12, 37, vec![0, 10, 13, 25]));
        assert_eq!(samples.ids[3], (25..37).collect::<Vec<_>>());
        let error = draw(&asked(5, 12), &corpus).unwrap_err().to_string();
        assert!(error.contains("5 samples of a document each asked for, but its first four fifths has 4 documents"), "{error}");
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

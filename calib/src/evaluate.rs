//! Perplexity, KL divergence and top-1 agreement on held-out text.
//!
//! Windows of `context` tokens from the start of each text that do not overlap; nothing before them, the last partial window
//! dropped. Position `t` predicts token `t + 1`, so a window scores `context − 1` tokens. The divergence is
//! `KL(original ‖ candidate)` in nats a token over the whole vocabulary, the agreement the share of tokens for which both
//! models' most likely token is the same (the first one where several are). Everything is summed in f64, token by token, in
//! the order of the text.
//!
//! **Memory.** Both models stream layer by layer over a batch of windows: hidden states of at most [`BATCH`] tokens of each
//! model, what one layer needs, and two heads with logits of at most [`LOGITS`] values each. No logits are stored.

use std::path::PathBuf;

use burn::tensor::{Tensor, backend::Backend};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::corpus::Corpus;
use crate::device::{Device, Job};
use crate::forward::{Head, NoTap, Options, decoder_layer, embed, rows, values};
use crate::progress::Progress;
use crate::{Error, Result, Weights};

/// Most tokens whose hidden states are held at once: each batch reads both models once.
pub const BATCH: usize = 1 << 16;

/// Most logits of one model that are held at once.
pub const LOGITS: usize = 1 << 24;

/// `[evaluate]`: the texts that a model is judged on, before and after.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Evaluate {
    /// `.txt` and `.jsonl` files that calibration has not seen; one row each.
    pub text: Vec<PathBuf>,
    /// Tokens a window.
    #[serde(default = "context")]
    pub context: usize,
    /// Most tokens of each text; all without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
}

fn context() -> usize {
    512
}

/// One text, cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    /// Its name.
    pub domain: String,
    /// Token ids of each window, `[windows, context]`.
    pub ids: Vec<Vec<u32>>,
}

impl Windows {
    /// The windows of every text of a corpus, from its start.
    ///
    /// # Errors
    ///
    /// [`Error::TooFewTokens`] for a text shorter than one window.
    pub fn of(corpus: &Corpus, context: usize, max_tokens: Option<usize>) -> Result<Vec<Self>> {
        let cut = |text: &crate::corpus::Text| {
            let ids = text.windows(context, max_tokens)?.into_iter().map(<[u32]>::to_vec).collect();
            Ok(Self { domain: text.domain.clone(), ids })
        };
        corpus.texts().iter().map(cut).collect()
    }
}

/// What one text, or all of them, gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Tokens scored.
    pub tokens: usize,
    /// Mean negative log-likelihood, nats a token.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Against the original, where one was given.
    #[serde(flatten)]
    pub divergence: Option<Divergence>,
}

/// How far a candidate is from the original on the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// The original's mean negative log-likelihood.
    pub reference_nll: f64,
    /// The original's perplexity.
    pub reference_perplexity: f64,
    /// Mean `KL(original ‖ candidate)`, nats a token.
    pub kl: f64,
    /// Its standard error, tokens taken as independent.
    pub kl_se: f64,
    /// The 99th percentile of the tokens' KL.
    pub kl_p99: f64,
    /// Share of tokens with the same most likely token.
    pub top1: f64,
}

/// The scores of all texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// One row a text.
    pub texts: Vec<Row>,
    /// Over all tokens.
    pub all: Score,
}

/// One text's scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The text's name.
    pub domain: String,
    /// What it gave.
    #[serde(flatten)]
    pub score: Score,
}

/// The two models to compare.
#[derive(Clone, Copy)]
pub struct Models<'a> {
    /// The model that is judged.
    pub candidate: &'a dyn Weights,
    /// The original, if there is one to compare with.
    pub reference: Option<&'a dyn Weights>,
}

/// Scores a model on texts, against the original if there is one.
///
/// # Errors
///
/// [`Error::Vocabularies`] where the two models have different ones, [`Error::NotFinite`] where a score is not a number,
/// and whatever running the models says.
pub fn evaluate(models: Models<'_>, texts: &[Windows], device: Device, progress: &dyn Progress) -> Result<Report> {
    device.run(Evaluation { models, texts, progress })
}

struct Evaluation<'a> {
    models: Models<'a>,
    texts: &'a [Windows],
    progress: &'a dyn Progress,
}

impl Job for Evaluation<'_> {
    type Output = Result<Report>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<Report> {
        let Models { candidate, reference } = self.models;
        if let Some(reference) = reference {
            let (ours, theirs) = (candidate.spec().vocab, reference.spec().vocab);
            if ours != theirs {
                return Err(Error::Vocabularies { candidate: ours, reference: theirs });
            }
        }
        let windows: Vec<(usize, &Vec<u32>)> =
            self.texts.iter().enumerate().flat_map(|(i, text)| text.ids.iter().map(move |ids| (i, ids))).collect();
        let longest = windows.iter().map(|(_, ids)| ids.len()).max().unwrap_or(1);
        let batches: Vec<_> = windows.chunks((BATCH / longest).max(1)).collect();
        let layers = candidate.spec().layers.len() + reference.map_or(0, |r| r.spec().layers.len());
        self.progress.start("evaluate", (batches.len() * layers) as u64);
        let mut sums = vec![Sums::default(); self.texts.len()];
        for batch in batches {
            let ids: Vec<Vec<u32>> = batch.iter().map(|(_, ids)| (*ids).clone()).collect();
            let original = reference.map(|w| Run::<B>::of(w, &ids, device, self.progress)).transpose()?;
            let candidate = Run::<B>::of(candidate, &ids, device, self.progress)?;
            for (window, &(text, ids)) in batch.iter().enumerate() {
                score_window(&candidate, original.as_ref(), window, ids, &mut sums[text])?;
            }
        }
        self.progress.finish();
        report(self.texts, &sums)
    }
}

/// One model's last hidden states of a batch of windows.
struct Run<B: Backend> {
    /// One tensor a window, `[context, hidden]`.
    windows: Vec<Tensor<B, 2>>,
    head: Head<B>,
    vocab: usize,
}

impl<B: Backend> Run<B> {
    fn of(w: &dyn Weights, ids: &[Vec<u32>], device: &B::Device, progress: &dyn Progress) -> Result<Self> {
        let mut hidden = embed::<B>(w, ids, device)?;
        for layer in 0..w.spec().layers.len() {
            decoder_layer(w, layer, &mut hidden, &NoTap, Options::of::<B>())?;
            progress.tick(1);
        }
        let mut windows = Vec::with_capacity(ids.len());
        for batch in hidden {
            let [samples, tokens, _] = batch.dims();
            let all = rows(batch);
            windows.extend((0..samples).map(|i| all.clone().narrow(0, i * tokens, tokens)));
        }
        Ok(Self { windows, head: Head::load(w, device)?, vocab: w.spec().vocab })
    }

    /// Logits of `count` positions of a window from `first` on, `[count, vocab]`.
    fn logits(&self, window: usize, first: usize, count: usize) -> Result<Vec<f32>> {
        values(self.head.logits(self.windows[window].clone().narrow(0, first, count)), "logits")
    }
}

/// Adds a window's tokens to a text's sums, as many logits at a time as [`LOGITS`] allows.
fn score_window<B: Backend>(candidate: &Run<B>, original: Option<&Run<B>>, window: usize, ids: &[u32], sums: &mut Sums) -> Result<()> {
    let vocab = candidate.vocab;
    let scored = ids.len() - 1;
    let step = (LOGITS / vocab).clamp(1, scored.max(1));
    for first in (0..scored).step_by(step) {
        let count = step.min(scored - first);
        let targets = &ids[first + 1..][..count];
        let ours = candidate.logits(window, first, count)?;
        let theirs = original.map(|run| run.logits(window, first, count)).transpose()?;
        let rows = ours.par_chunks_exact(vocab).zip(targets).enumerate();
        let tokens: Vec<Token> =
            rows.map(|(i, (row, &target))| Token::of(row, theirs.as_ref().map(|t| &t[i * vocab..][..vocab]), target as usize)).collect();
        tokens.into_iter().for_each(|token| sums.add(token));
    }
    Ok(())
}

/// What one position gave.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Token {
    nll: f64,
    against: Option<Against>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Against {
    nll: f64,
    kl: f64,
    agree: bool,
}

impl Token {
    /// From logits `[vocab]` of the candidate and of the original, and the token that came.
    fn of(ours: &[f32], theirs: Option<&[f32]>, target: usize) -> Self {
        let (top, log_sum) = log_sum_exp(ours);
        let nll = log_sum - f64::from(ours[target]);
        let against = theirs.map(|theirs| {
            let (their_top, their_sum) = log_sum_exp(theirs);
            // Σ p (log p − log q) with log p = a − A, log q = b − B, so Σ p (a − b) − (A − B).
            let mean: f64 = theirs.iter().zip(ours).map(|(&a, &b)| (f64::from(a) - their_sum).exp() * (f64::from(a) - f64::from(b))).sum();
            let kl = mean - (their_sum - log_sum);
            Against { nll: their_sum - f64::from(theirs[target]), kl, agree: top == their_top }
        });
        Self { nll, against }
    }
}

/// Index of the first largest value, and `log Σ exp`.
fn log_sum_exp(logits: &[f32]) -> (usize, f64) {
    let mut top = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[top] {
            top = i;
        }
    }
    let most = f64::from(logits[top]);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - most).exp()).sum();
    (top, most + sum.ln())
}

/// Sums over tokens.
#[derive(Clone, Debug, Default)]
struct Sums {
    tokens: usize,
    nll: f64,
    reference_nll: f64,
    agree: usize,
    /// One a token, in order, where there is an original.
    kl: Vec<f32>,
    kl_sum: f64,
    kl_squares: f64,
}

impl Sums {
    fn add(&mut self, token: Token) {
        self.tokens += 1;
        self.nll += token.nll;
        if let Some(Against { nll, kl, agree }) = token.against {
            self.reference_nll += nll;
            self.kl_sum += kl;
            self.kl_squares += kl * kl;
            self.kl.push(kl as f32);
            self.agree += usize::from(agree);
        }
    }

    fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.nll += other.nll;
        self.reference_nll += other.reference_nll;
        self.agree += other.agree;
        self.kl.extend(&other.kl);
        self.kl_sum += other.kl_sum;
        self.kl_squares += other.kl_squares;
    }

    fn score(&self, domain: &str) -> Result<Score> {
        let n = self.tokens as f64;
        let nll = self.nll / n;
        let divergence = (!self.kl.is_empty()).then(|| {
            let (kl, reference_nll) = (self.kl_sum / n, self.reference_nll / n);
            let variance = (self.kl_squares / n - kl * kl).max(0.0);
            Divergence {
                reference_nll,
                reference_perplexity: reference_nll.exp(),
                kl,
                kl_se: (variance / n).sqrt(),
                kl_p99: quantile(&self.kl, 0.99),
                top1: self.agree as f64 / n,
            }
        });
        let numbers = [nll].into_iter().chain(divergence.iter().flat_map(|d| [d.kl, d.reference_nll]));
        if numbers.into_iter().all(f64::is_finite) {
            Ok(Score { tokens: self.tokens, nll, perplexity: nll.exp(), divergence })
        } else {
            Err(Error::NotFinite { domain: domain.to_owned(), tokens: self.tokens })
        }
    }
}

/// The value below which a share of the values lies, between two neighbors in proportion.
fn quantile(values: &[f32], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    f64::from(low) + (f64::from(high) - f64::from(low)) * at.fract()
}

fn report(texts: &[Windows], sums: &[Sums]) -> Result<Report> {
    let row = |(text, sums): (&Windows, &Sums)| Ok(Row { domain: text.domain.clone(), score: sums.score(&text.domain)? });
    let rows = texts.iter().zip(sums).map(row).collect::<Result<_>>()?;
    let mut all = Sums::default();
    sums.iter().for_each(|s| all.merge(s));
    Ok(Report { texts: rows, all: all.score("all texts")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits whose softmax has these probabilities.
    fn logits(p: [f32; 3]) -> Vec<f32> {
        p.map(|p| p.ln() + 5.0).to_vec()
    }

    #[test]
    fn one_token_by_hand() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), token 0: nll = ln 4; KL(p ‖ q) = ½ ln 2 − ¼ ln 2 = ¼ ln 2.
        let token = Token::of(&logits([0.25, 0.25, 0.5]), Some(&logits([0.5, 0.25, 0.25])), 0);
        let against = token.against.unwrap();
        assert!((token.nll - 4f64.ln()).abs() < 1e-6, "{token:?}");
        assert!((against.kl - 0.25 * 2f64.ln()).abs() < 1e-6, "{token:?}");
        assert!((against.nll - 2f64.ln()).abs() < 1e-6 && !against.agree);
        // Uniform over three: ln 3.
        assert!((Token::of(&[7.0; 3], None, 1).nll - 3f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn a_model_does_not_differ_from_itself() {
        let row = logits([0.2, 0.5, 0.3]);
        let against = Token::of(&row, Some(&row), 2).against.unwrap();
        assert!(against.kl.abs() < 1e-15 && against.agree);
    }

    #[test]
    fn means_errors_and_quantiles() {
        let mut sums = Sums::default();
        for (kl, agree) in [(1.0, true), (3.0, false)] {
            sums.add(Token { nll: 2.0, against: Some(Against { nll: 1.0, kl, agree }) });
        }
        let score = sums.score("x").unwrap();
        let d = score.divergence.unwrap();
        // Mean 2, variance 1, standard error sqrt(1 / 2); the 99th percentile lies 0.99 of the way from 1 to 3.
        assert_eq!((score.tokens, score.nll, d.kl, d.top1, d.reference_nll), (2, 2.0, 2.0, 0.5, 1.0));
        assert!((d.kl_se - 0.5f64.sqrt()).abs() < 1e-12 && (d.kl_p99 - 2.98).abs() < 1e-6, "{d:?}");
        assert_eq!(quantile(&[4.0], 0.99), 4.0);
    }

    #[test]
    fn a_score_that_is_not_a_number_is_an_error() {
        let mut sums = Sums::default();
        sums.add(Token::of(&[1.0, f32::NAN, 0.0], None, 0));
        let error = sums.score("en").unwrap_err().to_string();
        assert!(error.contains("en"), "{error}");
    }

    #[test]
    fn windows_score_what_the_forward_pass_says() {
        use crate::forward::testing::{grouped_spec, logits, random, samples};
        let (candidate, reference) = (random(grouped_spec(), 1), random(grouped_spec(), 2));
        let ids = samples(&[9, 9, 9], 32);
        let texts = [Windows { domain: "a".into(), ids: ids[..2].to_vec() }, Windows { domain: "b".into(), ids: ids[2..].to_vec() }];
        let models = Models { candidate: &candidate, reference: Some(&reference) };
        let report = evaluate(models, &texts, Device::Cpu, &crate::progress::Quiet).unwrap();
        let probability = |row: &[f32], i: usize| f64::from(row[i]).exp() / row.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
        let (mut nll, mut kl) = (0.0, 0.0);
        for sample in &ids[..2] {
            let (ours, theirs) = (logits(&candidate, sample), logits(&reference, sample));
            for t in 0..8 {
                nll -= probability(&ours[t], sample[t + 1] as usize).ln() / 16.0;
                let term = |i| probability(&theirs[t], i) * (probability(&theirs[t], i) / probability(&ours[t], i)).ln();
                kl += (0..32).map(term).sum::<f64>() / 16.0;
            }
        }
        let row = &report.texts[0];
        let divergence = row.score.divergence.clone().unwrap();
        assert_eq!((row.domain.as_str(), row.score.tokens, report.all.tokens), ("a", 16, 24));
        assert!((row.score.nll / nll - 1.0).abs() < 1e-6, "{} and {nll}", row.score.nll);
        assert!((divergence.kl / kl - 1.0).abs() < 1e-6, "{} and {kl}", divergence.kl);
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["texts"][1]["kl"].is_f64() && json["all"]["perplexity"].is_f64());
    }

    #[test]
    fn only_models_of_one_vocabulary_are_compared() {
        use crate::forward::testing::{grouped_spec, random};
        let (candidate, mut reference) = (random(grouped_spec(), 1), random(grouped_spec(), 2));
        reference.spec.vocab = 33;
        let models = Models { candidate: &candidate, reference: Some(&reference) };
        let error = evaluate(models, &[], Device::Cpu, &crate::progress::Quiet).unwrap_err().to_string();
        assert!(error.contains("32 and 33"), "{error}");
    }
}

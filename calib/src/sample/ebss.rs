//! EBSS: text that the model writes itself, kept likely and balanced over its experts (MoEQuant, arXiv 2505.03804, section 3.2).
//!
//! A beam search for texts of low `PPL(S) · exp(σ(S)/τ)`. `σ(S)` is the mean over layers of the standard deviation (with `E − 1`) of
//! the experts' shares of the routed slots. A branch `S` of `ℓ` tokens and log-probability `R` continued by the token `v` costs
//!
//! `score(S ∥ v) = −(R + log P(v|S)) / (ℓ + 1) + σ(S)/τ`,
//!
//! with `σ` deferred: that of `S` without `v`, so that one forward pass a branch serves all continuations. The `w` cheapest of all
//! `branches · V` continuations survive, and the cheapest branch is the text. The first token is drawn evenly from the vocabulary and
//! counts nothing; the next `warmup` tokens are sampled from the model, as the authors do, because the search, which samples
//! nothing, otherwise falls into repetition at once. It still tends to: what was written is measured ([`Writing`](super::Writing)).
//!
//! No token is special: a text goes on behind the end token.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::write::{At, Hold, Stream, likeliest, log_sum_exp};

/// The search's knobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// What a nat a token is worth against balance: `σ/tau` is added to the cost.
    #[serde(default = "tau")]
    pub tau: f64,
    /// Branches that survive each step.
    #[serde(default = "branches")]
    pub branches: usize,
    /// Tokens that are sampled from the model before the search begins.
    #[serde(default = "warmup")]
    pub warmup: usize,
    /// Texts that are written side by side; it takes memory for the keys and values of `branches` times as many.
    #[serde(default = "super::write::at_once")]
    pub at_once: usize,
    /// Where the routed experts are meanwhile.
    #[serde(default)]
    pub experts: Hold,
}

fn tau() -> f64 {
    1.2
}

fn branches() -> usize {
    4
}

fn warmup() -> usize {
    3
}

impl Default for Params {
    fn default() -> Self {
        Self { tau: tau(), branches: branches(), warmup: warmup(), at_once: super::write::at_once(), experts: Hold::default() }
    }
}

/// A text so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Sum of their log-probabilities but the first's, in nats.
    pub log_prob: f64,
    /// What it cost when it was chosen.
    pub score: f64,
}

impl Branch {
    /// A text of one token that counts nothing.
    pub fn of(first: u32) -> Self {
        Self { ids: vec![first], log_prob: 0.0, score: 0.0 }
    }

    /// The text with one token more.
    pub fn with(&self, token: u32, log_p: f64, score: f64) -> Self {
        let mut ids = self.ids.clone();
        ids.push(token);
        Self { ids, log_prob: self.log_prob + log_p, score }
    }
}

/// The survivors of one step, cheapest first, each with the number of the branch that it continues.
///
/// `at` holds the logits behind each branch and its `σ`; of `known` token ids one is taken. While the text is shorter than the
/// warm-up there is one branch, and its token is sampled.
pub fn step(params: &Params, branches: &[Branch], at: &[At<'_>], known: usize, random: &mut Stream) -> Vec<(usize, Branch)> {
    if let ([only], [here]) = (branches, at)
        && only.ids.len() <= params.warmup
    {
        let token = random.sample(here.logits, 1.0, known);
        let log_p = f64::from(here.logits[token as usize]) - log_sum_exp(here.logits);
        return vec![(0, only.with(token, log_p, 0.0))];
    }
    let mut candidates = Vec::with_capacity(branches.len() * params.branches);
    for (number, (branch, here)) in branches.iter().zip(at).enumerate() {
        let all = log_sum_exp(here.logits);
        // Within a branch the cost falls with the logit, so no more than `w` tokens of it can be among the `w` cheapest.
        for token in likeliest(&here.logits[..known.min(here.logits.len())], params.branches) {
            let log_p = f64::from(here.logits[token as usize]) - all;
            let score = -(branch.log_prob + log_p) / (branch.ids.len() + 1) as f64 + here.sigma / params.tau;
            candidates.push((score, number, token, log_p));
        }
    }
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    candidates.truncate(params.branches);
    candidates.into_iter().map(|(score, number, token, log_p)| (number, branches[number].with(token, log_p, score))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn searched() -> Params {
        Params { warmup: 0, branches: 2, ..Params::default() }
    }

    #[test]
    fn one_step_by_hand() {
        // P after the first branch: 1/2, 1/4, 1/4; after the second: 1/10, 8/10, 1/10. R = −1 and −2 over 2 tokens, σ/τ = 0.1/0.5
        // and 0. Costs of the first: (1 + ln 2)/3 + 0.2 = 0.764, (1 + ln 4)/3 + 0.2 = 0.995, and so the third token. Of the second:
        // (2 + ln 1.25)/3 = 0.741, (2 + ln 10)/3 = 1.434. The cheapest are the second's token 1 and the first's token 0.
        let params = Params { tau: 0.5, ..searched() };
        let branch = |log_prob| Branch { ids: vec![7, 7], log_prob, score: 0.0 };
        let logits = [[0.5_f32, 0.25, 0.25], [0.1, 0.8, 0.1]].map(|p| p.map(|p| p.ln() + 3.0));
        let at = [At { logits: &logits[0], sigma: 0.1 }, At { logits: &logits[1], sigma: 0.0 }];
        let chosen = step(&params, &[branch(-1.0), branch(-2.0)], &at, 3, &mut Stream::new(0, 0));
        assert_eq!(chosen.iter().map(|(from, b)| (*from, *b.ids.last().unwrap())).collect::<Vec<_>>(), [(1, 1), (0, 0)]);
        assert!((chosen[0].1.score - 0.741).abs() < 1e-3 && (chosen[1].1.score - 0.764).abs() < 1e-3, "{chosen:?}");
        assert!((chosen[0].1.log_prob - (-2.0 - 1.25_f64.ln())).abs() < 1e-6);
        assert_eq!(chosen[0].1.ids, [7, 7, 1]);
    }

    #[test]
    fn all_pairs_agree_with_the_short_cut() {
        let mut random = Stream::new(3, 0);
        let mut logits = || (0..40).map(|_| random.unit() as f32 * 6.0).collect::<Vec<f32>>();
        let logits = [logits(), logits(), logits()];
        let params = Params { branches: 3, ..searched() };
        let branches: Vec<Branch> =
            [-3.0, -2.5, -2.0].into_iter().map(|log_prob| Branch { ids: vec![1; 4], log_prob, score: 0.0 }).collect();
        let sigmas = [0.0, 0.3, 0.6];
        let at: Vec<At> = logits.iter().zip(sigmas).map(|(logits, sigma)| At { logits, sigma }).collect();
        let mut every: Vec<(f64, usize, u32)> = Vec::new();
        for (i, (branch, here)) in branches.iter().zip(&at).enumerate() {
            let all = log_sum_exp(here.logits);
            every.extend((0..30).map(|v| (-(branch.log_prob + f64::from(here.logits[v]) - all) / 5.0 + here.sigma / 1.2, i, v as u32)));
        }
        every.sort_by(|a, b| a.0.total_cmp(&b.0));
        let chosen = step(&params, &branches, &at, 30, &mut random);
        let chosen: Vec<_> = chosen.iter().map(|(from, b)| (*from, b.ids[4])).collect();
        assert_eq!(chosen, every[..3].iter().map(|e| (e.1, e.2)).collect::<Vec<_>>());
        assert!(chosen.iter().all(|(_, token)| *token < 30), "ids that no token has are not written");
    }

    #[test]
    fn the_warm_up_samples_and_keeps_one_branch() {
        let params = Params { warmup: 2, ..searched() };
        let logits = [0.0_f32, 0.0, f32::NEG_INFINITY];
        let at = [At { logits: &logits, sigma: 9.0 }];
        let drawn = |seed| step(&params, &[Branch::of(1)], &at, 3, &mut Stream::new(seed, 0)).remove(0).1;
        let tokens: Vec<u32> = (0..40).map(|seed| drawn(seed).ids[1]).collect();
        assert!(tokens.contains(&0) && tokens.contains(&1) && !tokens.contains(&2), "{tokens:?}");
        assert!((drawn(0).log_prob + 2.0_f64.ln()).abs() < 1e-9);
        // The text is as long as the warm-up asks for: the search takes over, and one branch becomes two.
        let begun = Branch { ids: vec![1, 0, 0], log_prob: -1.0, score: 0.0 };
        assert_eq!(step(&params, &[begun], &at, 3, &mut Stream::new(0, 0)).len(), 2);
    }
}

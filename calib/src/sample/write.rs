//! What the samplers share that let the model write: random draws, the likeliest tokens, and how good the text is.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::forward::Experts;

/// Where the routed experts are while a model writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// In memory, in f32: the whole model has to fit.
    #[default]
    Memory,
    /// On disk: each step reads the chosen ones, which is slow.
    Disk,
}

impl Hold {
    /// How a generator loads them.
    pub(crate) fn experts(self) -> Experts {
        if self == Self::Memory { Experts::Resident } else { Experts::Streamed }
    }
}

pub(super) fn at_once() -> usize {
    16
}

/// What is known behind one branch.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// Logits of what comes next, `[vocab]`.
    pub logits: &'a [f32],
    /// Mean over layers of the deviation of the experts' shares of the branch's routed slots.
    pub sigma: f64,
}

/// Random numbers of one sample: a stream of its own, whichever samples are written beside it.
pub struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of sample `sample`.
    pub fn new(seed: u64, sample: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(sample);
        Self(rng)
    }

    /// One of `0..count`, evenly.
    pub fn below(&mut self, count: usize) -> u32 {
        // The bias of a remainder of 64 bits by a vocabulary is below 1e-13.
        (self.0.next_u64() % count.max(1) as u64) as u32
    }

    /// A number in `[0, 1)`, evenly.
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// One of the first `known` ids by the softmax of `logits / temperature`.
    pub fn sample(&mut self, logits: &[f32], temperature: f64, known: usize) -> u32 {
        let logits = &logits[..known.min(logits.len())];
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mass = |logit: f32| (f64::from(logit - top) / temperature).exp();
        let mut left = self.unit() * logits.iter().map(|&logit| mass(logit)).sum::<f64>();
        let mut last = 0;
        for (id, &logit) in logits.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY) {
            last = id;
            left -= mass(logit);
            if left < 0.0 {
                break;
            }
        }
        last as u32
    }
}

/// `ln Σ exp`.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + logits.iter().map(|&logit| (f64::from(logit) - top).exp()).sum::<f64>().ln()
}

/// Ids of the `count` largest, largest first, of equals the lowest.
pub(super) fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let mut best: Vec<u32> = Vec::with_capacity(count + 1);
    for id in 0..logits.len() as u32 {
        let place = best.partition_point(|&other| logits[other as usize] >= logits[id as usize]);
        if place < count {
            best.insert(place, id);
            best.truncate(count);
        }
    }
    best
}

/// How far texts that a model wrote repeat themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Writing {
    /// Texts.
    pub texts: usize,
    /// Of them different ones.
    pub different: usize,
    /// Bytes behind zlib over bytes before, the median of the texts; ordinary prose of this length has 0.4 to 0.6.
    pub compressed: f64,
    /// Texts that zlib takes below a tenth of their bytes.
    pub below_tenth: usize,
    /// Texts that it takes below a fifth.
    pub below_fifth: usize,
    /// Different runs of 1, 2 and 3 tokens over all such runs of a text, the mean of the texts (distinct-n).
    pub distinct: [f64; 3],
}

impl Writing {
    /// Of texts as tokens and as bytes.
    pub fn of(ids: &[Vec<u32>], bytes: &[Vec<u8>]) -> Self {
        let mut ratios: Vec<f64> = bytes.iter().map(|text| compressed(text)).collect();
        ratios.sort_by(f64::total_cmp);
        let below = |limit: f64| ratios.iter().filter(|ratio| **ratio < limit).count();
        let mean = |n: usize| ids.iter().map(|text| distinct(text, n)).sum::<f64>() / ids.len().max(1) as f64;
        Self {
            texts: ids.len(),
            different: ids.iter().collect::<std::collections::BTreeSet<_>>().len(),
            compressed: ratios.get(ratios.len().saturating_sub(1) / 2).copied().unwrap_or(1.0),
            below_tenth: below(0.1),
            below_fifth: below(0.2),
            distinct: [1, 2, 3].map(mean),
        }
    }
}

fn compressed(text: &[u8]) -> f64 {
    let mut to = ZlibEncoder::new(Vec::new(), Compression::default());
    // Writing to memory does not fail.
    let small = to.write_all(text).and_then(|()| to.finish()).map_or(text.len(), |small| small.len());
    small as f64 / text.len().max(1) as f64
}

fn distinct(text: &[u32], n: usize) -> f64 {
    let runs = text.windows(n);
    let all = runs.len().max(1);
    runs.collect::<std::collections::BTreeSet<_>>().len() as f64 / all as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_of_equals_the_lowest() {
        assert_eq!(likeliest(&[1.0, 3.0, 3.0, 2.0], 3), [1, 2, 3]);
        assert_eq!(likeliest(&[1.0, 3.0], 5), [1, 0]);
        assert!((log_sum_exp(&[0.0, 3.0_f32.ln()]) - 4.0_f64.ln()).abs() < 1e-7);
    }

    #[test]
    fn samples_follow_the_distribution() {
        // Weights 1, 2, 5 of 8, and an id that no token has.
        let logits = [1.0_f32.ln(), 2.0_f32.ln(), 5.0_f32.ln(), 9.0];
        let mut random = Stream::new(1, 0);
        let mut counts = [0_i32; 4];
        (0..8000).for_each(|_| counts[random.sample(&logits, 1.0, 3) as usize] += 1);
        // Three standard deviations of 8000 draws: 3 · √(8000 · p(1 − p)) ≤ 134.
        assert!(counts.iter().zip([1000, 2000, 5000, 0]).all(|(&n, want)| (n - want).abs() < 134), "{counts:?}");
        // Temperature 1/2 squares them: 1, 4, 25 of 30.
        let mut cold = [0_i32; 3];
        (0..3000).for_each(|_| cold[random.sample(&logits, 0.5, 3) as usize] += 1);
        assert!((cold[2] - 2500).abs() < 70, "{cold:?}");
        assert_eq!(random.sample(&[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], 1.0, 3), 1);
    }

    #[test]
    fn repetition_shows() {
        // a b a b a: 2 of 5 tokens, ab and ba of 4 pairs, aba and bab of 3 triples.
        let writing = Writing::of(&[vec![1, 2, 1, 2, 1]], &[b"abababababababababababababababababababab".to_vec()]);
        assert_eq!(writing.distinct, [0.4, 0.5, 2.0 / 3.0]);
        assert!(writing.compressed < 0.4, "{}", writing.compressed);
        let twice = Writing::of(&[vec![1, 2], vec![1, 2]], &[vec![b'a'; 1000], (0..=255).collect()]);
        assert_eq!((twice.texts, twice.different, twice.below_tenth, twice.below_fifth), (2, 1, 1, 1));
        assert_eq!(Writing::of(&[], &[]).texts, 0);
    }
}

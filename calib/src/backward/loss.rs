//! The loss at the end of the model and its gradient at the last hidden state.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::{Params, Targets};
use crate::evaluate::LOGITS;
use crate::forward::{Head, rows, values};
use crate::{Error, Result};

/// What a position's target comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    /// The model's own distribution, at this quantile of it.
    Drawn(f64),
    /// The text.
    Token(u32),
}

/// The targets of one sample, one a position; the text has none for the last.
///
/// Every sample has a random stream of its own, so that its targets depend on no other.
fn targets(params: &Params, sample: usize, ids: &[u32]) -> Vec<Option<Target>> {
    match params.targets {
        Targets::Own => {
            let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
            rng.set_stream(sample as u64);
            // The upper 53 bits, which an f64 holds: [0, 1).
            ids.iter().map(|_| Some(Target::Drawn((rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64))).collect()
        }
        Targets::Text => ids[1..].iter().map(|&id| Some(Target::Token(id))).chain([None]).collect(),
    }
}

/// Replaces the last hidden states, batches `[samples, tokens, hidden]`, by the gradient of `ℓ = Σ_t −log p(y_t)` at them.
///
/// Gives the targets `y_t`, row by row.
///
/// # Errors
///
/// [`Error::NotFinite`] where logits are not numbers, or what the device says.
pub(super) fn to_gradient<B: Backend>(
    head: &Head<B>,
    hidden: &mut [Tensor<B, 3>],
    ids: &[Vec<u32>],
    params: &Params,
) -> Result<Vec<Option<u32>>> {
    let mut chosen = Vec::with_capacity(ids.iter().map(Vec::len).sum());
    let mut sample = 0;
    for batch in hidden {
        let shape = batch.dims();
        let targets: Vec<_> = (sample..sample + shape[0]).flat_map(|s| targets(params, s, &ids[s])).collect();
        sample += shape[0];
        let x = rows(batch.clone());
        let mut parts = Vec::new();
        let (mut first, total) = (0, targets.len());
        while first < total {
            let count = (LOGITS / head.vocab()).clamp(1, total - first);
            parts.push(chunk(head, x.clone().narrow(0, first, count), &targets[first..first + count], &mut chosen)?);
            first += count;
        }
        *batch = Tensor::cat(parts, 0).reshape(shape);
    }
    Ok(chosen)
}

/// The gradient at rows `[rows, hidden]`; adds their targets to `chosen`.
fn chunk<B: Backend>(head: &Head<B>, x: Tensor<B, 2>, targets: &[Option<Target>], chosen: &mut Vec<Option<u32>>) -> Result<Tensor<B, 2>> {
    let logits = head.logits(x.clone());
    let [rows, vocab] = logits.dims();
    let mut logits = values(logits, "logits")?;
    let found: Vec<_> = logits.par_chunks_exact_mut(vocab).zip(targets).map(|(row, &target)| differentiate(row, target)).collect();
    for target in found {
        chosen.push(target.ok_or_else(|| Error::NotFinite { domain: "the calibration samples".to_owned(), tokens: rows })?);
    }
    let gradient = Tensor::from_data(TensorData::new(logits, [rows, vocab]), &x.device());
    Ok(head.backward(x, gradient))
}

/// Turns one position's logits into `p − onehot(y)`, or into 0 without a target; gives `y`, `None` where `p` is not finite.
fn differentiate(row: &mut [f32], target: Option<Target>) -> Option<Option<u32>> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mass = |z: f32| f64::from(z - largest).exp();
    let sum: f64 = row.iter().map(|&z| mass(z)).sum();
    if !sum.is_finite() {
        return None;
    }
    let y = match target {
        None => {
            row.fill(0.0);
            return Some(None);
        }
        Some(Target::Token(id)) => id as usize,
        Some(Target::Drawn(quantile)) => {
            let mut left = quantile * sum;
            let passed = |z: &f32| {
                left -= mass(*z);
                left < 0.0
            };
            // Rounding may leave a rest behind the last one: then it is the likeliest.
            row.iter().position(passed).or_else(|| row.iter().position(|&z| z == largest))?
        }
    };
    row.iter_mut().for_each(|z| *z = (mass(*z) / sum) as f32);
    row[y] -= 1.0;
    Some(Some(y as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_position_by_hand() {
        // p = (½, ¼, ¼): quantiles ½ and ¾ are where the second and the third begin.
        let logits = [0.5f32, 0.25, 0.25].map(|p| p.ln() + 3.0);
        for (quantile, y, gradient) in
            [(0.0, 0, [-0.5, 0.25, 0.25]), (0.499, 0, [-0.5, 0.25, 0.25]), (0.501, 1, [0.5, -0.75, 0.25]), (0.999, 2, [0.5, 0.25, -0.75])]
        {
            let mut row = logits;
            assert_eq!(differentiate(&mut row, Some(Target::Drawn(quantile))), Some(Some(y)));
            assert!(row.iter().zip(gradient).all(|(a, b)| (a - b).abs() < 1e-6), "{row:?}");
        }
        let mut row = logits;
        assert_eq!(differentiate(&mut row, Some(Target::Token(2))), Some(Some(2)));
        assert!((row[2] + 0.75).abs() < 1e-6);
        assert_eq!(differentiate(&mut row, None), Some(None));
        assert_eq!(row, [0.0; 3]);
        assert_eq!(differentiate(&mut [1.0, f32::NAN, f32::INFINITY], None), None);
        assert_eq!(differentiate(&mut [1.0, f32::NAN], None), None);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let ids = vec![0; 20_000];
        let draws = |seed, sample| targets(&Params { seed, targets: Targets::Own }, sample, &ids);
        let share = |y: u32| {
            let count = draws(1, 0).into_iter().filter(|&target| {
                let mut row = [0.5f32.ln(), 0.2f32.ln(), 0.3f32.ln()];
                differentiate(&mut row, target) == Some(Some(y))
            });
            count.count() as f64 / ids.len() as f64
        };
        // Three standard errors of a share of one half: 3 · 0.5 / √20000 = 0.011.
        assert!((share(0) - 0.5).abs() < 0.011 && (share(1) - 0.2).abs() < 0.011 && (share(2) - 0.3).abs() < 0.011);
        assert_eq!(draws(1, 0), draws(1, 0));
        assert!(draws(1, 0) != draws(2, 0) && draws(1, 0) != draws(1, 1));
    }

    #[test]
    fn the_texts_targets_are_the_tokens_that_follow() {
        let found = targets(&Params { seed: 0, targets: Targets::Text }, 0, &[7, 8, 9]);
        assert_eq!(found, [Some(Target::Token(8)), Some(Target::Token(9)), None]);
    }
}

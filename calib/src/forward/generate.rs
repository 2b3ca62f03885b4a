//! Greedy generation with a key-value cache, all layers resident.

use burn::tensor::{Tensor, backend::Backend};
use ndarray::Array2;

use super::batch::lookup;
use super::cache::Cache;
use super::layer::{DecoderLayer, Experts};
use super::moe::values;
use super::parallel::Options;
use super::{Head, NoTap, Tap};
use crate::arch::Role;
use crate::{Error, Result, Weights};

/// A whole model on a device, ready to generate.
pub struct Generator<'a, B: Backend> {
    weights: &'a dyn Weights,
    device: B::Device,
    embedding: Array2<f32>,
    layers: Vec<DecoderLayer<B>>,
    head: Head<B>,
    options: Options,
}

impl<'a, B: Backend> Generator<'a, B> {
    /// Reads the whole model.
    ///
    /// With [`Experts::Streamed`] the routed experts stay where they are and each step reads the chosen ones.
    ///
    /// # Errors
    ///
    /// What reading a weight says.
    pub fn load(weights: &'a dyn Weights, device: &B::Device, experts: Experts) -> Result<Self> {
        let layers = 0..weights.spec().layers.len();
        Ok(Self {
            weights,
            device: device.clone(),
            embedding: weights.matrix(Role::Embedding)?,
            layers: layers.map(|layer| DecoderLayer::load(weights, layer, device, experts)).collect::<Result<_>>()?,
            head: Head::load(weights, device)?,
            options: Options::of::<B>(),
        })
    }

    /// An empty cache for this model.
    pub fn cache(&self) -> Cache<B> {
        Cache::new(self.layers.len())
    }

    /// Whether a cache has to be begun anew before a text of `length` tokens goes on: where the rotary frequencies change with the
    /// length of the input (LongRoPE past its original context), kept keys are turned by the old ones.
    pub fn outgrown(&self, cache: &Cache<B>, length: usize) -> bool {
        let rope = &self.weights.spec().rope;
        cache.tokens() > 0 && rope.frequencies(cache.tokens()) != rope.frequencies(length)
    }

    /// Logits `[samples, vocab]` that follow the last of `ids`, which stand after the tokens of the cache. All samples are
    /// equally long. `tap` sees the new tokens alone, as rows `sample · new tokens + token`.
    ///
    /// # Errors
    ///
    /// [`Error::UnequalSamples`], and as [`decoder_layer`](super::decoder_layer).
    pub fn step(&self, ids: &[Vec<u32>], cache: &mut Cache<B>, tap: &dyn Tap<B>) -> Result<Tensor<B, 2>> {
        let tokens = ids.first().map_or(0, Vec::len);
        if let Some(sample) = ids.iter().position(|sample| sample.len() != tokens) {
            return Err(Error::UnequalSamples { sample, tokens: ids[sample].len(), first: tokens });
        }
        let mut hidden = [lookup::<B>(&self.embedding, 0, ids, &self.device)?];
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            layer.forward(self.weights, &mut hidden, std::slice::from_mut(cache), tap, self.options)?;
        }
        let [hidden] = hidden;
        let [samples, _, width] = hidden.dims();
        Ok(self.head.logits(hidden.narrow(1, tokens - 1, 1).reshape([samples, width])))
    }

    /// Continues each prompt by `count` tokens, each the likeliest (of equals the lowest id). Prompts are equally long.
    ///
    /// An outgrown cache is begun anew, so that the result is that of full passes.
    ///
    /// # Errors
    ///
    /// As [`Generator::step`].
    pub fn greedy(&self, prompts: &[Vec<u32>], count: usize) -> Result<Vec<Vec<u32>>> {
        let mut texts = prompts.to_vec();
        let mut cache = self.cache();
        for _ in 0..count {
            let length = texts.first().map_or(0, Vec::len);
            if self.outgrown(&cache, length) {
                cache = self.cache();
            }
            let new: Vec<Vec<u32>> = texts.iter().map(|text| text[cache.tokens()..].to_vec()).collect();
            let logits = self.step(&new, &mut cache, &NoTap)?;
            let vocab = logits.dims()[1];
            let logits = values(logits, "logits")?;
            for (text, logits) in texts.iter_mut().zip(logits.chunks_exact(vocab)) {
                text.push(likeliest(logits));
            }
        }
        Ok(texts.into_iter().map(|text| text[text.len() - count..].to_vec()).collect())
    }
}

/// Index of the largest; of equals the lowest.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

//! Attention: what all kinds share, and grouped-query attention.
//!
//! Queries are taken in blocks so that a block's scores stay under [`SCORES`] elements, and keys that no query of a block
//! may see are not multiplied: half of the work of a causal product, and all but a window's of a sliding one.

use burn::tensor::{Tensor, TensorData, activation::softmax, backend::Backend};

use super::cache::LayerCache;
use super::linear::{Linear, Source};
use super::norm::NormLayer;
use super::rope::Rotary;
use crate::Result;
use crate::arch::{Grouped, Part, QkNorm, Site, Spec};

/// Most scores held at once by the attention of one batch: 64 MiB of f32.
pub(super) const SCORES: usize = 16 << 20;
/// Fewest queries in a block, however long the input.
pub(super) const QUERIES: usize = 32;

/// What passes through one batch's attention beside the result: where in the sequence it stands, and what is shown.
pub(super) struct Pass<'a, B: Backend> {
    pub rotary: &'a Rotary<B>,
    pub window: Option<usize>,
    pub cache: Option<&'a mut LayerCache<B>>,
    /// Whether the rows of a site are wanted.
    pub wants: &'a (dyn Fn(Site) -> bool + Sync),
    /// The rows of wanted sites, in the order in which they came.
    pub seen: Vec<(Site, Tensor<B, 2>)>,
}

impl<B: Backend> Pass<'_, B> {
    /// Keeps the rows that enter a wanted site.
    pub fn show(&mut self, site: Site, rows: &Tensor<B, 2>) {
        if (self.wants)(site) {
            self.seen.push((site, rows.clone()));
        }
    }

    /// Keys and values of this pass after those of the cache, if there is one.
    pub fn with_cached(&mut self, keys: Tensor<B, 4>, values: Tensor<B, 4>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        match &mut self.cache {
            Some(cache) => cache.extend(keys, values),
            None => (keys, values),
        }
    }
}

/// Grouped-query attention of one layer.
#[derive(Clone, Debug)]
pub(super) struct GroupedAttention<B: Backend> {
    shape: Grouped,
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    output: Linear<B>,
    /// On queries and on keys.
    norms: Option<[NormLayer<B>; 2]>,
}

impl<B: Backend> GroupedAttention<B> {
    pub fn load(source: &Source<'_, B>, spec: &Spec, shape: &Grouped) -> Result<Self> {
        let (hidden, wide, narrow) = (spec.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let bias = |part| shape.qkv_bias.then_some(part);
        let norms = |[query, key]: [usize; 2]| -> Result<_> {
            Ok([source.rms(Part::QueryNorm, query, spec.norm.eps)?, source.rms(Part::KeyNorm, key, spec.norm.eps)?])
        };
        Ok(Self {
            shape: shape.clone(),
            query: source.linear(Part::Query, bias(Part::QueryBias), [wide, hidden])?,
            key: source.linear(Part::Key, bias(Part::KeyBias), [narrow, hidden])?,
            value: source.linear(Part::Value, bias(Part::ValueBias), [narrow, hidden])?,
            output: source.linear(Part::Output, shape.output_bias.then_some(Part::OutputBias), [hidden, wide])?,
            norms: match shape.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some(norms([shape.head_dim, shape.head_dim])?),
                QkNorm::FullWidth => Some(norms([wide, narrow])?),
            },
        })
    }

    /// `[samples, tokens, hidden]` to the same, before the residual sum.
    pub fn forward(&self, x: Tensor<B, 3>, pass: &mut Pass<'_, B>) -> Tensor<B, 3> {
        let [samples, tokens, hidden] = x.dims();
        let x = x.reshape([samples * tokens, hidden]);
        pass.show(Site::AttentionIn, &x);
        let norms = self.norms.as_ref();
        let query = self.heads(&self.query, norms.map(|n| &n[0]), x.clone(), [samples, tokens, self.shape.heads]);
        let key = self.heads(&self.key, norms.map(|n| &n[1]), x.clone(), [samples, tokens, self.shape.kv_heads]);
        let value = self.heads(&self.value, None, x, [samples, tokens, self.shape.kv_heads]);
        let (query, key) = (pass.rotary.apply(query), pass.rotary.apply(key));
        let (key, value) = pass.with_cached(key, value);
        let y = attend(query * self.shape.scale, key, value, pass.window);
        pass.show(Site::AttentionOut, &y);
        self.output.apply(y).reshape([samples, tokens, hidden])
    }

    /// Projects rows, norms and clamps them, and gives `[samples, heads, tokens, head_dim]`.
    fn heads(
        &self,
        linear: &Linear<B>,
        norm: Option<&NormLayer<B>>,
        x: Tensor<B, 2>,
        [samples, tokens, heads]: [usize; 3],
    ) -> Tensor<B, 4> {
        let mut y = linear.apply(x);
        if let (Some(norm), QkNorm::FullWidth) = (norm, self.shape.qk_norm) {
            y = norm.apply(y);
        }
        if let Some(clip) = self.shape.clip {
            y = y.clamp(-clip, clip);
        }
        let mut y = y.reshape([samples, tokens, heads, self.shape.head_dim]);
        if let (Some(norm), QkNorm::PerHead) = (norm, self.shape.qk_norm) {
            y = norm.apply(y);
        }
        y.swap_dims(1, 2)
    }
}

/// Causal attention of the last `tokens` positions over all `keys`.
///
/// `query` is `[samples, heads, tokens, width]`, already scaled; `key` and `value` are `[samples, kv_heads, keys, …]`, each
/// of their heads shared by `heads / kv_heads` consecutive query heads. Gives rows `[samples · tokens, heads · value width]`.
pub(super) fn attend<B: Backend>(query: Tensor<B, 4>, key: Tensor<B, 4>, value: Tensor<B, 4>, window: Option<usize>) -> Tensor<B, 2> {
    let [samples, heads, ..] = query.dims();
    let step = (SCORES / (samples * heads * key.dims()[2]).max(1)).max(QUERIES);
    attend_by(step, query, key, value, window)
}

/// [`attend`] with queries in blocks of `step`.
fn attend_by<B: Backend>(step: usize, query: Tensor<B, 4>, key: Tensor<B, 4>, value: Tensor<B, 4>, window: Option<usize>) -> Tensor<B, 2> {
    let [samples, heads, tokens, _] = query.dims();
    let ([_, kv_heads, keys, _], [_, _, _, width]) = (key.dims(), value.dims());
    let start = keys - tokens;
    let mut blocks = Vec::with_capacity(tokens.div_ceil(step));
    for first in (0..tokens).step_by(step) {
        let count = step.min(tokens - first);
        let span = Span::of(start + first, count, window);
        let part = |x: &Tensor<B, 4>| x.clone().narrow(2, span.first_key, span.keys);
        let query = query.clone().narrow(2, first, count);
        blocks.push(block(query, part(&key), part(&value), kv_heads, &span));
    }
    let y = if blocks.len() == 1 { blocks.remove(0) } else { Tensor::cat(blocks, 2) };
    y.swap_dims(1, 2).reshape([samples * tokens, heads * width])
}

/// The keys that a block of consecutive queries may see.
struct Span {
    /// Position of the block's first query.
    query: usize,
    queries: usize,
    first_key: usize,
    keys: usize,
    window: Option<usize>,
}

impl Span {
    fn of(query: usize, queries: usize, window: Option<usize>) -> Self {
        let first_key = window.map_or(0, |window| (query + 1).saturating_sub(window));
        Self { query, queries, first_key, keys: query + queries - first_key, window }
    }

    /// 0 where a query may look and −∞ where not, `[queries, keys]`; `None` where every query sees every key.
    fn mask(&self) -> Option<Vec<f32>> {
        if self.queries == 1 {
            return None;
        }
        let visible = |q: usize, k: usize| k <= q && self.window.is_none_or(|window| k + window > q);
        let row = |i: usize| (0..self.keys).map(move |j| (self.query + i, self.first_key + j));
        let cell = |(q, k)| if visible(q, k) { 0.0 } else { f32::NEG_INFINITY };
        Some((0..self.queries).flat_map(row).map(cell).collect())
    }
}

/// One block of queries over the keys of its span: `[samples, heads, queries, value width]`.
fn block<B: Backend>(query: Tensor<B, 4>, key: Tensor<B, 4>, value: Tensor<B, 4>, kv_heads: usize, span: &Span) -> Tensor<B, 4> {
    let [samples, heads, queries, width] = query.dims();
    let value_width = value.dims()[3];
    let shared = heads / kv_heads;
    // Query heads that share a key head are rows of one product: larger products, and no repeated keys.
    let query = query.reshape([samples, kv_heads, shared * queries, width]);
    let mut scores = query.matmul(key.swap_dims(2, 3));
    if let Some(mask) = span.mask() {
        // A mask is one row to all heads: flex adds a shared row ten times faster than a shared matrix.
        let cells = queries * span.keys;
        let mask = Tensor::<B, 2>::from_data(TensorData::new(mask, [1, cells]), &scores.device());
        scores = (scores.reshape([samples * heads, cells]) + mask).reshape([samples, kv_heads, shared * queries, span.keys]);
    }
    softmax(scores, 3).matmul(value).reshape([samples, heads, queries, value_width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;
    use crate::forward::moe::values;
    use crate::forward::testing::{Noise, distance};

    type Heads = Tensor<Cpu, 4>;

    fn random(noise: &mut Noise, shape: [usize; 4]) -> Heads {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| noise.next()).collect();
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    /// The definition, one query at a time, in f64.
    fn by_definition(query: &Heads, key: &Heads, value: &Heads, window: Option<usize>) -> Vec<f32> {
        let ([samples, heads, tokens, width], [_, kv_heads, keys, _]) = (query.dims(), key.dims());
        let value_width = value.dims()[3];
        let [q, k, v] = [query, key, value].map(|x| values(x.clone(), "test").unwrap());
        let mut out = Vec::new();
        for (sample, position, head) in (0..samples).flat_map(|s| (0..tokens).flat_map(move |t| (0..heads).map(move |h| (s, t, h)))) {
            let q = &q[((sample * heads + head) * tokens + position) * width..][..width];
            let kv = (sample * kv_heads + head * kv_heads / heads) * keys;
            let last = keys - tokens + position;
            let first = window.map_or(0, |window| (last + 1).saturating_sub(window));
            let score = |j: usize| q.iter().zip(&k[(kv + j) * width..]).map(|(a, b)| f64::from(a * b)).sum::<f64>().exp();
            let sum: f64 = (first..=last).map(score).sum();
            let value = |c: usize| (first..=last).map(|j| score(j) / sum * f64::from(v[(kv + j) * value_width + c])).sum::<f64>();
            out.extend((0..value_width).map(|c| value(c) as f32));
        }
        out
    }

    #[test]
    fn every_cut_and_window_agrees_with_the_definition() {
        let mut noise = Noise(5);
        // 4 query heads on 2 key heads, 11 keys of which the last 7 (or all, or 1) have queries.
        let (key, value) = (random(&mut noise, [2, 2, 11, 3]), random(&mut noise, [2, 2, 11, 5]));
        for tokens in [1, 7, 11] {
            let query = random(&mut noise, [2, 4, tokens, 3]);
            for window in [None, Some(1), Some(4), Some(50)] {
                let expected = by_definition(&query, &key, &value, window);
                for step in [1, 2, 3, 100] {
                    let y = attend_by(step, query.clone(), key.clone(), value.clone(), window);
                    assert_eq!(y.dims(), [2 * tokens, 20]);
                    let error = distance(&values(y, "test").unwrap(), &expected);
                    assert!(error < 1e-6, "{tokens} tokens, window {window:?}, step {step}: {error:e}");
                }
            }
        }
    }

    #[test]
    fn a_single_query_behind_a_window_needs_no_mask() {
        let span = Span::of(9, 1, Some(4));
        assert_eq!((span.first_key, span.keys, span.mask()), (6, 4, None));
        // Two queries at 1 and 2, window 2: keys 0..3; the first sees 0 and 1, the second 1 and 2.
        let span = Span::of(1, 2, Some(2));
        let no = f32::NEG_INFINITY;
        assert_eq!(span.mask().unwrap(), [0.0, 0.0, no, no, 0.0, 0.0]);
    }
}

//! Attention: what all kinds share, and grouped-query attention.
//!
//! Queries are taken in blocks so that a block's scores stay under [`SCORES`] elements, and keys that no query of a block
//! may see are not multiplied: half of the work of a causal product, and all but a window's of a sliding one.

use burn::tensor::{Int, Tensor, TensorData, activation::softmax, backend::Backend};

use super::adjoint::{Adjoint, Frame, SiteRows};
use super::cache::LayerCache;
use super::linear::{Linear, Source};
use super::norm::NormLayer;
use super::rope::Rotary;
use crate::Result;
use crate::arch::{Grouped, Part, QkNorm, Site, Spec};

/// Most scores held at once by the attention of one batch: 16 MiB of f32, which the allocator keeps from block to block (64 MiB it gives
/// back, and the page faults cost a twelfth of a forward).
pub(super) const SCORES: usize = 4 << 20;
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
        let [query, key, value] = self.project(x, [samples, tokens], pass.rotary);
        let (key, value) = pass.with_cached(key, value);
        let y = attend(query, key, value, pass.window);
        pass.show(Site::AttentionOut, &y);
        self.output.apply(y).reshape([samples, tokens, hidden])
    }

    /// Queries (scaled), keys and values, `[samples, heads, tokens, head_dim]`.
    fn project(&self, x: Tensor<B, 2>, [samples, tokens]: [usize; 2], rotary: &Rotary<B>) -> [Tensor<B, 4>; 3] {
        let norms = self.norms.as_ref();
        let query = self.heads(&self.query, norms.map(|n| &n[0]), x.clone(), [samples, tokens, self.shape.heads]);
        let key = self.heads(&self.key, norms.map(|n| &n[1]), x.clone(), [samples, tokens, self.shape.kv_heads]);
        let value = self.heads(&self.value, None, x, [samples, tokens, self.shape.kv_heads]);
        [rotary.apply(query) * self.shape.scale, rotary.apply(key), value]
    }

    /// From the rows `x` that entered and `dy`, the gradient at the output, both `[rows, hidden]`.
    pub fn backward(&self, x: Tensor<B, 2>, dy: Tensor<B, 2>, frame: &Frame<'_, B>) -> Adjoint<B> {
        let projected = self.project(x.clone(), frame.shape, frame.rotary);
        let [query, key, value] = projected.clone();
        let mixed = attend(query, key, value, frame.window);
        let [query, key, value] = attend_backward(projected, self.output.backward(dy.clone()), frame.window);
        let (query, key) = (frame.rotary.backward(query * self.shape.scale), frame.rotary.backward(key));
        let norms = self.norms.as_ref();
        let query = self.heads_backward(&self.query, norms.map(|n| &n[0]), &x, query);
        let key = self.heads_backward(&self.key, norms.map(|n| &n[1]), &x, key);
        let value = self.heads_backward(&self.value, None, &x, value);
        let input = self.query.backward(query.clone()) + self.key.backward(key.clone()) + self.value.backward(value.clone());
        let outputs = vec![(Part::Query, query), (Part::Key, key), (Part::Value, value)];
        let sites = vec![
            SiteRows { site: Site::AttentionIn, rows: x, outputs },
            SiteRows { site: Site::AttentionOut, rows: mixed, outputs: vec![(Part::Output, dy)] },
        ];
        Adjoint { input, sites }
    }

    /// The gradient at a projection's rows, `[rows, heads · head_dim]`, from `dy`, that at what [`Self::heads`] gives.
    fn heads_backward(&self, linear: &Linear<B>, norm: Option<&NormLayer<B>>, x: &Tensor<B, 2>, dy: Tensor<B, 4>) -> Tensor<B, 2> {
        let [samples, heads, tokens, width] = dy.dims();
        let mut dy = swapped(dy);
        if norm.is_none() && self.shape.clip.is_none() {
            return dy.reshape([samples * tokens, heads * width]);
        }
        let z = linear.apply(x.clone());
        let full = norm.filter(|_| self.shape.qk_norm == QkNorm::FullWidth);
        let y = full.map_or_else(|| z.clone(), |norm| norm.apply(z.clone()));
        if let (Some(norm), QkNorm::PerHead) = (norm, self.shape.qk_norm) {
            let y = self.shape.clip.map_or_else(|| y.clone(), |clip| y.clone().clamp(-clip, clip));
            dy = norm.backward(y.reshape([samples, tokens, heads, width]), dy);
        }
        let mut dy = dy.reshape([samples * tokens, heads * width]);
        if let Some(clip) = self.shape.clip {
            dy = dy.mask_fill(y.abs().greater_elem(clip), 0.0);
        }
        full.map_or_else(|| dy.clone(), |norm| norm.backward(z, dy.clone()))
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
        swapped(y)
    }
}

/// `[samples, a, b, width]` with the two axes in the middle changed over, row by row in memory: flex copies the rows of a selection whole,
/// and a permuted view of four axes element by element, which took a twentieth of a forward.
pub(super) fn swapped<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [samples, a, b, width] = x.dims();
    if a == 1 || b == 1 {
        return x.reshape([samples, b, a, width]);
    }
    let of = move |sample: usize| (0..b).flat_map(move |j| (0..a).map(move |i| ((sample * a + i) * b + j) as i32));
    let order: Vec<i32> = (0..samples).flat_map(of).collect();
    let order = Tensor::<B, 1, Int>::from_data(TensorData::new(order, [samples * a * b]), &x.device());
    x.reshape([samples * a * b, width]).select(0, order).reshape([samples, b, a, width])
}

/// Causal attention of the last `tokens` positions over all `keys`.
///
/// `query` is `[samples, heads, tokens, width]`, already scaled; `key` and `value` are `[samples, kv_heads, keys, …]`, each
/// of their heads shared by `heads / kv_heads` consecutive query heads. Gives rows `[samples · tokens, heads · value width]`.
pub(super) fn attend<B: Backend>(query: Tensor<B, 4>, key: Tensor<B, 4>, value: Tensor<B, 4>, window: Option<usize>) -> Tensor<B, 2> {
    attend_by(step(&query, &key), query, key, value, window)
}

/// Queries a block.
fn step<B: Backend>(query: &Tensor<B, 4>, key: &Tensor<B, 4>) -> usize {
    let [samples, heads, ..] = query.dims();
    (SCORES / (samples * heads * key.dims()[2]).max(1)).max(QUERIES)
}

/// Gradients at queries, keys and values from `dy`, that at the rows which [`attend`] gives for them.
pub(super) fn attend_backward<B: Backend>(qkv: [Tensor<B, 4>; 3], dy: Tensor<B, 2>, window: Option<usize>) -> [Tensor<B, 4>; 3] {
    attend_backward_by(step(&qkv[0], &qkv[1]), qkv, dy, window)
}

/// [`attend_backward`] with queries in blocks of `step`. With weights `P` and `dP = dY · Vᵀ`: `dV = Pᵀ · dY`, the scores'
/// gradient is `dS = P ⊙ (dP − rowsum(P ⊙ dP))`, `dQ = dS · K`, `dK = dSᵀ · Q`.
fn attend_backward_by<B: Backend>(
    step: usize,
    [query, key, value]: [Tensor<B, 4>; 3],
    dy: Tensor<B, 2>,
    window: Option<usize>,
) -> [Tensor<B, 4>; 3] {
    let [samples, heads, tokens, width] = query.dims();
    let ([_, kv_heads, keys, _], [_, _, _, value_width]) = (key.dims(), value.dims());
    let dy = swapped(dy.reshape([samples, tokens, heads, value_width]));
    let (mut d_key, mut d_value) = (key.zeros_like(), value.zeros_like());
    let mut d_queries = Vec::with_capacity(tokens.div_ceil(step));
    for first in (0..tokens).step_by(step) {
        let count = step.min(tokens - first);
        let span = Span::of(keys - tokens + first, count, window);
        let part = |x: &Tensor<B, 4>| x.clone().narrow(2, span.first_key, span.keys);
        let (key, value) = (part(&key), part(&value));
        let stacked =
            |x: &Tensor<B, 4>, width| x.clone().narrow(2, first, count).reshape([samples, kv_heads, heads / kv_heads * count, width]);
        let (query, dy) = (stacked(&query, width), stacked(&dy, value_width));
        let weights = weights(query.clone(), key.clone(), &span);
        let d_weights = dy.clone().matmul(value.swap_dims(2, 3));
        let mean = (weights.clone() * d_weights.clone()).sum_dim(3);
        let d_scores = weights.clone() * (d_weights - mean);
        add_at(&mut d_value, span.first_key, weights.swap_dims(2, 3).matmul(dy));
        add_at(&mut d_key, span.first_key, d_scores.clone().swap_dims(2, 3).matmul(query));
        d_queries.push(d_scores.matmul(key).reshape([samples, heads, count, width]));
    }
    let d_query = if d_queries.len() == 1 { d_queries.remove(0) } else { Tensor::cat(d_queries, 2) };
    [d_query, d_key, d_value]
}

/// `into[:, :, first ..] += added`.
fn add_at<B: Backend>(into: &mut Tensor<B, 4>, first: usize, added: Tensor<B, 4>) {
    let [samples, heads, tokens, width] = added.dims();
    let sum = into.clone().narrow(2, first, tokens) + added;
    *into = into.clone().slice_assign([0..samples, 0..heads, first..first + tokens, 0..width], sum);
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
    swapped(y).reshape([samples * tokens, heads * width])
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
    // Query heads that share a key head are rows of one product: larger products, and no repeated keys.
    let query = query.reshape([samples, kv_heads, heads / kv_heads * queries, width]);
    weights(query, key, span).matmul(value).reshape([samples, heads, queries, value_width])
}

/// What each query of a block gives to each key of its span, `[samples, kv_heads, shared · queries, keys]`; `query` is
/// `[samples, kv_heads, shared · queries, width]`.
fn weights<B: Backend>(query: Tensor<B, 4>, key: Tensor<B, 4>, span: &Span) -> Tensor<B, 4> {
    let [samples, kv_heads, rows, _] = query.dims();
    let mut scores = query.matmul(key.swap_dims(2, 3));
    if let Some(mask) = span.mask() {
        // A mask is one row to all heads: flex adds a shared row ten times faster than a shared matrix.
        let cells = span.queries * span.keys;
        let mask = Tensor::<B, 2>::from_data(TensorData::new(mask, [1, cells]), &scores.device());
        let heads = samples * kv_heads * rows / span.queries;
        scores = (scores.reshape([heads, cells]) + mask).reshape([samples, kv_heads, rows, span.keys]);
    }
    softmax(scores, 3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;
    use crate::forward::moe::values;
    use crate::forward::testing::{Noise, distance, grouped_spec, random as random_table};

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
    fn axes_change_over() {
        let x = random(&mut Noise(3), [2, 3, 4, 5]);
        assert_eq!(swapped(x.clone()).into_data(), x.clone().swap_dims(1, 2).into_data());
        let one = x.narrow(1, 0, 1);
        assert_eq!(swapped(one.clone()).into_data(), one.swap_dims(1, 2).into_data());
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
    fn gradients_are_those_of_finite_differences_whatever_the_cut() {
        let mut noise = Noise(6);
        let qkv = [[2, 4, 7, 3], [2, 2, 11, 3], [2, 2, 11, 5]].map(|shape| random(&mut noise, shape));
        let dy = random(&mut noise, [1, 1, 14, 20]).reshape([14, 20]);
        let loss = |[q, k, v]: [Heads; 3], window| -> f64 {
            let y = values(attend(q, k, v, window), "test").unwrap();
            y.iter().zip(values(dy.clone(), "test").unwrap()).map(|(y, d)| f64::from(*y) * f64::from(d)).sum()
        };
        for window in [None, Some(4)] {
            let whole = attend_backward_by(100, qkv.clone(), dy.clone(), window);
            for which in 0..3 {
                // Along the gradient itself the slope is its norm.
                let norm = f64::from(whole[which].clone().powi_scalar(2).sum().sqrt().into_scalar());
                let step = |by: f64| {
                    let mut moved = qkv.clone();
                    moved[which] = moved[which].clone() + whole[which].clone() * (by / norm);
                    loss(moved, window)
                };
                let slope = (8.0 * (step(0.05) - step(-0.05)) - (step(0.1) - step(-0.1))) / 0.6;
                assert!((slope / norm - 1.0).abs() < 1e-3, "{which}, window {window:?}: {slope} for {norm}");
                for cut in [1, 2, 3] {
                    let parts = attend_backward_by(cut, qkv.clone(), dy.clone(), window);
                    let error = distance(&values(parts[which].clone(), "test").unwrap(), &values(whole[which].clone(), "test").unwrap());
                    assert!(error < 1e-6, "{which}, window {window:?}, step {cut}: {error:e}");
                }
            }
        }
    }

    #[test]
    fn gradients_through_norms_and_clamps_are_those_of_finite_differences() {
        let device = Default::default();
        for norm in [QkNorm::None, QkNorm::PerHead, QkNorm::FullWidth] {
            let mut spec = grouped_spec();
            let mut shape =
                Grouped { heads: 4, kv_heads: 2, head_dim: 8, qkv_bias: true, output_bias: true, qk_norm: norm, clip: None, scale: 0.4 };
            spec.attention = crate::arch::Attention::Grouped(shape.clone());
            let table = random_table(spec.clone(), 7);
            let source = Source { weights: &table, layer: 0, device: &device };
            let mut noise = Noise(8);
            let [x, dy] = [(); 2].map(|()| random(&mut noise, [1, 1, 12, 24]).reshape([12, 24]));
            // The clamp stands in the widest gap between the largest tenth of what it will see, so that no step crosses it.
            let free = GroupedAttention::<Cpu>::load(&source, &spec, &shape).unwrap();
            let full = free.norms.as_ref().filter(|_| norm == QkNorm::FullWidth);
            let seen = [(&free.query, full.map(|n| &n[0])), (&free.key, full.map(|n| &n[1])), (&free.value, None)].map(|(linear, norm)| {
                let z = linear.apply(x.clone());
                values(norm.map_or_else(|| z.clone(), |norm| norm.apply(z.clone())), "test").unwrap()
            });
            let mut sizes: Vec<f32> = seen.concat().into_iter().map(f32::abs).collect();
            sizes.sort_by(f32::total_cmp);
            let tail = &sizes[sizes.len() * 9 / 10..sizes.len() - 5];
            let widest = tail.windows(2).max_by(|a, b| (a[1] - a[0]).total_cmp(&(b[1] - b[0]))).unwrap();
            shape.clip = Some((widest[0] + widest[1]) / 2.0);
            let attention = GroupedAttention::<Cpu>::load(&source, &spec, &shape).unwrap();

            let rotary = Rotary::new(&spec.rope, 0, 6, &device);
            let frame = Frame { shape: [2, 6], rotary: &rotary, window: None };
            let gradient = attention.backward(x.clone(), dy.clone(), &frame).input;
            let length = f64::from(gradient.clone().powi_scalar(2).sum().sqrt().into_scalar());
            let loss = |by: f64| {
                let moved = x.clone() + gradient.clone() * (by / length);
                let mut pass = Pass { rotary: &rotary, window: None, cache: None, wants: &|_| false, seen: Vec::new() };
                let y = values(attention.forward(moved.reshape([2, 6, 24]), &mut pass), "test").unwrap();
                y.iter().zip(values(dy.clone(), "test").unwrap()).map(|(y, d)| f64::from(*y) * f64::from(d)).sum::<f64>()
            };
            let slope = (8.0 * (loss(0.01) - loss(-0.01)) - (loss(0.02) - loss(-0.02))) / 0.12;
            assert!((slope / length - 1.0).abs() < 1e-3, "{norm:?}: {slope} for {length}");
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

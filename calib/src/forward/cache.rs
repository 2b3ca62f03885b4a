//! Keys and values of the tokens already seen.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};

/// Keys and values of one layer for one batch of samples.
#[derive(Clone, Debug)]
pub struct LayerCache<B: Backend> {
    /// Keys, turned to their positions, `[samples, kv_heads, tokens, key width]`, and values `[samples, kv_heads, tokens, value width]`.
    seen: Option<(Tensor<B, 4>, Tensor<B, 4>)>,
}

impl<B: Backend> Default for LayerCache<B> {
    fn default() -> Self {
        Self { seen: None }
    }
}

impl<B: Backend> LayerCache<B> {
    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.seen.as_ref().map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Adds new keys and values and gives all of them.
    pub(super) fn extend(&mut self, keys: Tensor<B, 4>, values: Tensor<B, 4>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let all = match self.seen.take() {
            Some((old_keys, old_values)) => (Tensor::cat(vec![old_keys, keys], 2), Tensor::cat(vec![old_values, values], 2)),
            None => (keys, values),
        };
        self.seen = Some(all.clone());
        all
    }
}

/// Keys and values of all layers for one batch of samples.
#[derive(Clone, Debug)]
pub struct Cache<B: Backend> {
    /// One a layer.
    pub(super) layers: Vec<LayerCache<B>>,
}

impl<B: Backend> Cache<B> {
    /// An empty cache of `layers` layers.
    pub fn new(layers: usize) -> Self {
        Self { layers: vec![LayerCache::default(); layers] }
    }

    /// Tokens seen.
    pub fn tokens(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::tokens)
    }

    /// Sample `i` becomes what sample `rows[i]` was; there may be more or fewer than before.
    pub fn select(&mut self, rows: &[usize]) {
        let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        for layer in &mut self.layers {
            layer.seen = layer.seen.take().map(|(keys, values)| {
                let rows = || Tensor::<B, 1, Int>::from_data(TensorData::new(rows.clone(), [rows.len()]), &keys.device());
                (keys.clone().select(0, rows()), values.select(0, rows()))
            });
        }
    }
}

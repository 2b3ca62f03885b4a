//! What one layer needs at its peak: the formula of this module's heading, as a function.

use super::attention::{QUERIES, SCORES};
use super::batch::BATCH_TOKENS;
use super::moe::CHUNK;
use crate::arch::{Attention, Mlp, Spec};

/// The samples that pass a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Samples {
    /// Number of samples.
    pub count: usize,
    /// Tokens of the longest.
    pub tokens: usize,
}

/// Bytes that [`decoder_layer`](super::decoder_layer) needs at most, the hidden states that it is given included and what a
/// tap keeps not (a tap that wants blocks costs two more copies of the hidden states).
pub fn peak_bytes(spec: &Spec, layer: usize, samples: Samples, in_flight: usize) -> u64 {
    let (rows, d) = (samples.count * samples.tokens, spec.hidden);
    let batch = BATCH_TOKENS.max(samples.tokens).min(rows);
    let (weights, attention) = attention(spec, batch, samples.tokens);
    let (held, feed_forward, lists) = match &spec.layers[layer].mlp {
        Mlp::Dense { inner } => (3 * inner * d, in_flight * mlp(batch, *inner, d), 0),
        Mlp::Moe(moe) => {
            let shared = moe.shared.as_ref().map_or(0, |shared| shared.inner);
            // The experts in flight were given at most all rows together.
            let experts = in_flight * 3 * moe.inner * d + mlp((in_flight * CHUNK).min(rows), moe.inner, d);
            let others = in_flight * mlp(batch, shared, d).max(2 * batch * moe.experts);
            (3 * shared * d + moe.experts * d, experts.max(others), 2 * rows * moe.top_k)
        }
    };
    4 * (3 * rows * d + weights + held + lists + feed_forward.max(in_flight * attention)) as u64
}

/// Bytes that a [`Generator`](super::Generator) needs at most while it carries `sequences` texts of up to `tokens` tokens: all layers in f32
/// (the routed experts only where they are `resident`, else those in flight), the embedding and the head, keys and values of every layer, of
/// one layer twice while they grow, and four copies of the logits.
pub fn generator_bytes(spec: &Spec, resident: bool, [sequences, tokens]: [usize; 2], in_flight: usize) -> u64 {
    let d = spec.hidden;
    let cached = match &spec.attention {
        Attention::Grouped(a) => 2 * a.kv_heads * a.head_dim,
        Attention::Latent(a) => a.heads * (a.nope_dim + a.rope_dim + a.value_dim),
    };
    let moes = || (0..spec.layers.len()).filter_map(|layer| spec.moe(layer));
    let all: u64 = (0..spec.layers.len()).map(|layer| layer_weights(spec, layer)).sum();
    let routed: u64 = moes().map(|moe| (3 * moe.experts * moe.inner * d) as u64).sum();
    let routers: u64 = moes().map(|moe| (moe.experts * d) as u64).sum();
    let flying = moes().map(|moe| 3 * moe.inner * d * in_flight).max().unwrap_or(0) as u64;
    let held = if resident { all } else { all - routed + flying };
    let keys = ((spec.layers.len() + 1) * sequences * tokens * cached) as u64;
    4 * (held + routers + (2 * spec.vocab * d) as u64 + keys + (4 * sequences * spec.vocab) as u64)
}

/// Weights of a decoder layer's Linear matrices; its router, norms and biases are none.
pub fn layer_weights(spec: &Spec, layer: usize) -> u64 {
    let mlp = match &spec.layers[layer].mlp {
        Mlp::Dense { inner } => *inner,
        Mlp::Moe(moe) => moe.experts * moe.inner + moe.shared.as_ref().map_or(0, |shared| shared.inner),
    };
    (attention_weights(spec) + 3 * mlp * spec.hidden) as u64
}

/// Elements of a gated MLP over some rows: its input twice while it is gathered, its output, and four intermediate widths.
fn mlp(rows: usize, inner: usize, d: usize) -> usize {
    rows * (3 * d + 4 * inner)
}

/// Elements of attention's weights.
pub(crate) fn attention_weights(spec: &Spec) -> usize {
    attention(spec, 0, 0).0
}

/// Scores of a batch that are held at once.
pub(crate) fn scores(batch: usize, heads: usize, tokens: usize) -> usize {
    (batch * heads * tokens).min(SCORES.max(batch * heads * QUERIES))
}

/// Elements of attention's weights, and of what one batch holds: queries, keys, values and their product, beside them either
/// the copies that rotation takes or scores before and after the softmax with their mask, which is one to all heads.
fn attention(spec: &Spec, batch: usize, tokens: usize) -> (usize, usize) {
    let d = spec.hidden;
    let (heads, q, weights) = match &spec.attention {
        Attention::Grouped(a) => {
            let q = a.heads * a.head_dim;
            (a.heads, q, 2 * d * (q + a.kv_heads * a.head_dim))
        }
        Attention::Latent(a) => {
            let (query, both) = (a.heads * (a.nope_dim + a.rope_dim), a.heads * (a.nope_dim + a.value_dim));
            let queries = a.q_rank.map_or(query * d, |rank| rank * (d + query));
            let kv = a.kv_rank * (d + both) + a.rope_dim * d;
            (a.heads, query.max(both), queries + kv + a.heads * a.value_dim * d)
        }
    };
    let scores = scores(batch, heads, tokens);
    (weights, batch * (4 * q + 4 * d) + (4 * batch * q).max(2 * scores + scores / heads))
}

#[cfg(test)]
#[cfg(target_os = "linux")]
pub(crate) mod tests {
    use burn::tensor::{Tensor, TensorData};
    use ndarray::{Array1, Array2};

    use super::*;
    use crate::arch::{Grouped, LayerSpec, Part, Projection, Role};
    use crate::device::Cpu;
    use crate::forward::testing::{Noise, grouped_spec, latent_spec, moe_of};
    use crate::forward::{NoTap, Options, decoder_layer};
    use crate::{Result, Weights};

    pub(crate) const SAMPLES: Samples = Samples { count: 32, tokens: 256 };
    pub(crate) const IN_FLIGHT: usize = 2;

    /// A layer whose experts together are 192 MiB, made when they are asked for. Its router sees no difference between them, so
    /// that the first two get every row: the most that an expert can be given.
    pub(crate) struct Made(pub Spec);

    pub(crate) fn wide(mut spec: Spec) -> Made {
        spec.hidden = 256;
        if let Attention::Grouped(a) = &mut spec.attention {
            *a = Grouped { heads: 8, kv_heads: 2, head_dim: 32, ..a.clone() };
            spec.rope.dim = 32;
        }
        let mut moe = moe_of(128, 2);
        moe.inner = 512;
        spec.layers = vec![LayerSpec { window: None, mlp: Mlp::Moe(moe) }];
        Made(spec)
    }

    impl Weights for Made {
        fn spec(&self) -> &Spec {
            &self.0
        }

        fn matrix(&self, role: Role) -> Result<Array2<f32>> {
            let shape = match role {
                Role::Layer(_, Part::Expert(_, Projection::Down)) => (256, 512),
                Role::Layer(_, Part::Expert(..)) => (512, 256),
                Role::Layer(_, Part::Router) => (128, 256),
                Role::Layer(_, Part::Key | Part::Value) => (64, 256),
                Role::Layer(_, part) => match (&self.0.attention, part) {
                    (Attention::Latent(_), Part::QueryA) => (10, 256),
                    (Attention::Latent(_), Part::QueryB) => (40, 10),
                    (Attention::Latent(_), Part::KvA) => (12, 256),
                    (Attention::Latent(_), Part::KvB) => (44, 8),
                    (Attention::Latent(_), _) => (256, 20),
                    (Attention::Grouped(_), _) => (256, 256),
                },
                _ => (1, 1),
            };
            if let Role::Layer(_, Part::Router) = role {
                return Ok(Array2::zeros(shape));
            }
            let mut noise = Noise(shape.0 as u64 + 1);
            Ok(noise.matrix(shape.0, shape.1, 1.5 / (shape.1 as f32).sqrt()))
        }

        fn vector(&self, role: Role) -> Result<Array1<f32>> {
            let width = match role {
                Role::Layer(_, Part::QueryNorm | Part::KeyNorm) => 32,
                Role::Layer(_, Part::QueryANorm | Part::QueryABias) => 10,
                Role::Layer(_, Part::KvANorm) => 8,
                Role::Layer(_, Part::KvABias) => 12,
                _ => 256,
            };
            Ok(Array1::ones(width))
        }
    }

    /// A line of `/proc/self/status`, in bytes.
    pub(crate) fn status(key: &str) -> u64 {
        let text = fs_err::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Runs an ignored test that prints `peak: bytes` in a process of its own, whose peak nothing else disturbs.
    pub(crate) fn measured(child: &str) -> u64 {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", child, "--ignored", "--nocapture"])
            .env("RAYON_NUM_THREADS", IN_FLIGHT.to_string())
            // Freed blocks go back at once, so that the peak is of what was held.
            .env("MALLOC_TRIM_THRESHOLD_", "65536")
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.split("peak: ").nth(1)).unwrap_or_else(|| panic!("{text}"));
        line.trim().parse().unwrap()
    }

    fn run(made: &Made) {
        let before = status("VmRSS");
        let mut hidden = noise_batches(made);
        decoder_layer(made, 0, &mut hidden, &NoTap, Options { in_flight: IN_FLIGHT }).unwrap();
        println!("peak: {}", status("VmHWM") - before);
    }

    /// Hidden states of [`SAMPLES`].
    pub(crate) fn noise_batches(made: &Made) -> Vec<Tensor<Cpu, 3>> {
        let (count, d) = (BATCH_TOKENS / SAMPLES.tokens, made.0.hidden);
        let mut noise = Noise(3);
        let mut batch = || {
            let values: Vec<f32> = (0..count * SAMPLES.tokens * d).map(|_| noise.next()).collect();
            Tensor::<Cpu, 3>::from_data(TensorData::new(values, [count, SAMPLES.tokens, d]), &Default::default())
        };
        (0..SAMPLES.count / count).map(|_| batch()).collect()
    }

    #[test]
    #[ignore = "run in a process of its own by the test below"]
    fn grouped() {
        run(&wide(grouped_spec()));
    }

    #[test]
    #[ignore = "run in a process of its own by the test below"]
    fn latent() {
        run(&wide(latent_spec()));
    }

    #[test]
    fn a_layer_stays_under_its_formula() {
        for (child, spec) in [("grouped", grouped_spec()), ("latent", latent_spec())] {
            let Made(spec) = wide(spec);
            let bound = peak_bytes(&spec, 0, SAMPLES, IN_FLIGHT);
            let peak = measured(&format!("forward::memory::tests::{child}"));
            println!("{child}: {} of {} MiB", peak >> 20, bound >> 20);
            // Threads, gemm's packing buffers and the allocator's slack.
            assert!(peak < bound + (24 << 20), "{child}: peak {peak}, formula {bound}");
            assert!(peak > bound / 2, "{child}: the formula is far too large: peak {peak}, formula {bound}");
        }
    }

    #[test]
    fn weights_of_a_layer_by_hand() {
        let Made(spec) = wide(grouped_spec());
        // Attention 256 · (256 + 64 + 64) + 256 · 256, 128 experts of three times 512 · 256, and whoever is shared.
        let Mlp::Moe(moe) = &spec.layers[0].mlp else { panic!("a layer of experts") };
        let shared = moe.shared.as_ref().map_or(0, |shared| shared.inner as u64);
        assert_eq!(layer_weights(&spec, 0), 163_840 + 3 * 256 * (128 * 512 + shared));
        let mut dense = spec.clone();
        dense.layers[0].mlp = Mlp::Dense { inner: 100 };
        assert_eq!(layer_weights(&dense, 0), 163_840 + 3 * 256 * 100);
    }

    #[test]
    fn experts_count_by_the_one_and_not_by_the_layer() {
        let Made(mut spec) = wide(grouped_spec());
        let bound = peak_bytes(&spec, 0, SAMPLES, IN_FLIGHT);
        if let Mlp::Moe(moe) = &mut spec.layers[0].mlp {
            moe.experts = 12800;
        }
        // A hundred times the experts cost their router and its scores alone.
        assert!(peak_bytes(&spec, 0, SAMPLES, IN_FLIGHT) - bound < 4 * (12800 * 256 + 2 * IN_FLIGHT as u64 * 2048 * 12800));
    }
}

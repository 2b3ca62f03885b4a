//! How much memory a backward pass takes, from the shape of a layer alone.

use crate::arch::{Attention, Mlp, Site, Spec};
use crate::forward::memory::{attention_weights, scores};
use crate::forward::{BATCH_TOKENS, CHUNK, Samples};
use crate::stats::sites;

/// Bytes that the pass needs at most in one layer, with second moments of every site and what entered the layers on disk.
pub fn peak_bytes(spec: &Spec, layer: usize, samples: Samples, in_flight: usize) -> u64 {
    let (rows, d) = (samples.count * samples.tokens, spec.hidden);
    let batch = BATCH_TOKENS.max(samples.tokens).min(rows);
    let (heads, width) = match &spec.attention {
        Attention::Grouped(a) => (a.heads, a.head_dim),
        Attention::Latent(a) => (a.heads, a.nope_dim + a.rope_dim.max(a.value_dim)),
    };
    // A gated MLP: its matrices, its rows with their gradients, and its two second moments.
    let mlp = |rows: usize, inner: usize| 3 * inner * d + rows * (6 * d + 9 * inner) + d * d + inner * inner;
    let (held, feed_forward, lists) = match &spec.layers[layer].mlp {
        Mlp::Dense { inner } => (0, mlp(batch, *inner), rows * 6),
        Mlp::Moe(moe) => {
            let shared = moe.shared.as_ref().map_or(0, |shared| mlp(batch, shared.inner));
            let lists = 2 * moe.top_k * rows + rows * (6 + 2 * moe.top_k);
            (moe.experts * d, mlp(CHUNK.min(rows), moe.inner).max(shared).max(3 * batch * moe.experts), lists)
        }
    };
    let attention = batch * (8 * heads * width + 8 * d) + 4 * scores(batch, heads, samples.tokens);
    let moments: usize = sites(spec, layer)
        .iter()
        .filter(|(site, _)| !matches!(site, Site::ExpertIn(_) | Site::ExpertDown(_)))
        .map(|(_, width)| width * width)
        .sum();
    let tasks = (in_flight * attention).max(in_flight * feed_forward);
    4 * (6 * rows * d + tasks + attention_weights(spec) + held + moments + lists) as u64
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use crate::backward::Receive;
    use crate::backward::layer::Walk;
    use crate::backward::sums::Sums;
    use crate::device::Cpu;
    use crate::forward::Options;
    use crate::forward::memory::tests::{IN_FLIGHT, SAMPLES, measured, noise_batches, status, wide};
    use crate::forward::testing::{grouped_spec, latent_spec};
    use crate::stats::end_loss::{LayerWeights, SiteLoss};

    struct Dropped;

    impl Receive for Dropped {
        fn site(&self, _: usize, _: SiteLoss) -> crate::Result<()> {
            Ok(())
        }
        fn layer(&self, _: usize, _: LayerWeights) -> crate::Result<()> {
            Ok(())
        }
    }

    fn run(spec: Spec) {
        let made = wide(spec);
        let before = status("VmRSS");
        let (hidden, mut gradient) = (noise_batches(&made), noise_batches(&made));
        let sums = Sums::new(&made.0, &Dropped, 1);
        let walk = Walk::<Cpu> { weights: &made, device: &Default::default(), options: Options { in_flight: IN_FLIGHT }, sink: &sums };
        walk.layer(0, hidden, &mut gradient).unwrap();
        println!("peak: {}", status("VmHWM") - before);
    }

    #[test]
    #[ignore = "run in a process of its own by the test below"]
    fn grouped() {
        run(grouped_spec());
    }

    #[test]
    #[ignore = "run in a process of its own by the test below"]
    fn latent() {
        run(latent_spec());
    }

    #[test]
    fn a_layer_taken_back_stays_under_its_formula() {
        for (child, spec) in [("grouped", grouped_spec()), ("latent", latent_spec())] {
            let bound = peak_bytes(&wide(spec).0, 0, SAMPLES, IN_FLIGHT);
            let peak = measured(&format!("backward::peak::tests::{child}"));
            println!("{child}: {} of {} MiB", peak >> 20, bound >> 20);
            // Threads, gemm's packing buffers and the allocator's slack.
            assert!(peak < bound + (24 << 20), "{child}: peak {peak}, formula {bound}");
            assert!(peak > bound / 3, "{child}: the formula is far too large: peak {peak}, formula {bound}");
        }
    }
}

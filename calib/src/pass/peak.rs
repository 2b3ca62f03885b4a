//! How much memory a measuring pass takes, from the shape of a layer alone.

use crate::arch::{Mlp, Spec};
use crate::forward::{self, BATCH_TOKENS, CHUNK, Samples};
use crate::stats::sites;

/// Bytes that measuring one layer needs at most: the forward pass, what [`Measure`](super::Measure) keeps, and the statistics.
/// `similarity_tokens` as the recipe has it.
pub fn peak_bytes(spec: &Spec, layer: usize, samples: Samples, in_flight: usize, similarity_tokens: usize) -> u64 {
    let (rows, d) = (samples.count * samples.tokens, spec.hidden);
    let batch = BATCH_TOKENS.max(samples.tokens).min(rows);
    // Rows of one site, or gate and up, as numbers.
    let shown = |rows: usize, inner: usize| 4 * rows * d.max(2 * inner);
    let tap = match &spec.layers[layer].mlp {
        Mlp::Dense { inner } => shown(batch, *inner),
        Mlp::Moe(moe) => {
            let copies = 4 * rows * d * if moe.shared.is_some() { 2 } else { 1 };
            let alike = 4 * moe.experts * similarity_tokens.min(rows) * d;
            // Contributions, and choices here and in the layer before, with room for one that is being written.
            let lists = 16 * rows * moe.top_k;
            copies + lists + alike + shown((in_flight * CHUNK).min(rows), moe.inner).max(4 * 4 * batch * d)
        }
    };
    // Squares, weighted squares and the gates of every input channel, and the experts' outputs.
    let statistics: usize = sites(spec, layer).iter().map(|(_, width)| 8 * 4 * width).sum();
    forward::peak_bytes(spec, layer, samples, in_flight) + (tap + statistics) as u64
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use crate::forward::memory::tests::{IN_FLIGHT, SAMPLES, measured, noise_batches, status, wide};
    use crate::forward::testing::{grouped_spec, latent_spec};
    use crate::forward::{Options, decoder_layer};
    use crate::pass::Measure;
    use crate::stats::LayerStats;

    fn run(spec: Spec) {
        let made = wide(spec);
        let ids = vec![vec![0; SAMPLES.tokens]; SAMPLES.count];
        let domain = vec![0; SAMPLES.count];
        let samples = crate::sample::Samples { domains: vec!["en".into()], tokens: SAMPLES.tokens, ids, domain, ..Default::default() };
        let before = status("VmRSS");
        let mut hidden = noise_batches(&made);
        let measure = Measure::new(LayerStats::new(&made.0, 0, 1), &samples, None, vec![]);
        decoder_layer(&made, 0, &mut hidden, &measure, Options { in_flight: IN_FLIGHT }).unwrap();
        measure.finish();
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
    fn a_measured_layer_stays_under_its_formula() {
        for (child, spec) in [("grouped", grouped_spec()), ("latent", latent_spec())] {
            let bound = peak_bytes(&wide(spec).0, 0, SAMPLES, IN_FLIGHT, 0);
            let peak = measured(&format!("pass::peak::tests::{child}"));
            println!("{child}: {} of {} MiB", peak >> 20, bound >> 20);
            // Threads, gemm's packing buffers and the allocator's slack.
            assert!(peak < bound + (24 << 20), "{child}: peak {peak}, formula {bound}");
            assert!(peak > bound / 2, "{child}: the formula is far too large: peak {peak}, formula {bound}");
        }
    }
}

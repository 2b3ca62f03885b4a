//! What a sampler reached and what it cost.

use calib::sample::{Cover, Through, Writing};
use calib::stats::{LayerStats, Manifest, Part, imbalance};
use serde::{Deserialize, Serialize};

/// How evenly calibration tokens fell on the experts of all layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    /// Tokens of the least-served expert.
    pub fewest: u64,
    /// Half of the experts have no more.
    pub median: u64,
    /// Tokens of the most-served expert.
    pub most: u64,
    /// Mean over layers of the standard deviation of the experts' shares of the routed slots (MoEQuant's σ).
    pub sigma: f64,
}

impl Balance {
    /// Over the layers that have experts.
    pub fn of(layers: &[LayerStats]) -> Self {
        let routers = layers.iter().filter_map(|layer| layer.experts.as_ref());
        let loads: Vec<Vec<u64>> = routers.map(|experts| experts.router.load().to_vec()).collect();
        let mut all: Vec<u64> = loads.concat();
        all.sort_unstable();
        let at = |i: usize| all.get(i).copied().unwrap_or(0);
        let last = all.len().saturating_sub(1);
        let sigma = loads.iter().map(|load| imbalance(load)).sum::<f64>() / loads.len().max(1) as f64;
        Self { fewest: at(0), median: at(last / 2), most: at(last), sigma }
    }
}

/// Each pass's sampler in a line or two, with its cost, and how evenly the tokens of all of them fell.
pub fn sampler(manifest: &Manifest, layers: &[LayerStats]) -> String {
    let Balance { fewest, median, most, sigma } = Balance::of(layers);
    let parts: String = manifest.parts.iter().map(part).collect();
    format!(
        "{parts}tokens of an expert, over all layers: fewest {fewest}, median {median}, most {most}; balance σ {sigma:.4} (0 is even)\n"
    )
}

fn part(part: &Part) -> String {
    let Part { sampler, seed, samples, tokens_run, drawn, experts, .. } = part;
    let mut text =
        format!("sampler {sampler}, seed {seed}: {samples} samples of {tokens_run} tokens; {} tokens run before", drawn.tokens_run);
    if let Some(Cover { pool, least, bound, .. }) = &drawn.cover {
        text += &format!(" to choose from {pool} windows; the least-served expert has {least} tokens of at most {bound:.0}");
    }
    if *experts == Through::All {
        text += "; every token went through every expert";
    }
    text.push('\n');
    if let Some(Writing { texts, different, compressed, below_tenth, below_fifth, distinct: [one, two, three] }) = &drawn.writing {
        text += &format!(
            "the model wrote {texts} texts, {different} of them different; zlib leaves {compressed:.2} of the bytes (median), of {below_tenth} below 0.1, \
             of {below_fifth} below 0.2; distinct-1, -2, -3: {one:.2}, {two:.2}, {three:.2}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use calib::sample::Drawn;
    use calib::stats::{BlockSums, ExpertStats, OutputSums, RouterSums};

    fn layer(counts: &[u64]) -> LayerStats {
        let experts = counts.len();
        let mut router = RouterSums::new(1, experts, None);
        counts.iter().enumerate().for_each(|(e, &n)| router.counts[(0, e)] = n);
        let (outputs, block) = (OutputSums::new(1, experts, 2), BlockSums::new(1));
        LayerStats { experts: Some(ExpertStats { router, outputs, block, similarity: None }), ..LayerStats::default() }
    }

    #[test]
    fn balance_by_hand() {
        // Shares 1/4 and 3/4: σ = √(2 · (1/4)²) = 0.354; even shares: 0. The mean is 0.177.
        let balance = Balance::of(&[layer(&[10, 30]), LayerStats::default(), layer(&[20, 20])]);
        assert_eq!((balance.fewest, balance.median, balance.most), (10, 20, 30));
        assert!((balance.sigma - 0.125_f64.sqrt() / 2.0).abs() < 1e-12);
        assert_eq!(Balance::of(&[]), Balance::default());
    }

    #[test]
    fn a_sampler_says_what_it_cost() {
        let cover = Some(Cover { pool: 40, least: 9, bound: 10.2, unreached: 0 });
        let writing = Writing { texts: 4, different: 3, compressed: 0.5, below_tenth: 1, below_fifth: 2, distinct: [0.25, 0.5, 0.75] };
        let drawn = Drawn { tokens_run: 800, cover, writing: Some(writing) };
        let part = Part {
            corpus: "c".into(),
            sampler: "balanced".into(),
            seed: 3,
            samples: 4,
            tokens: 50,
            tokens_run: 200,
            drawn,
            experts: Through::All,
            similarity_tokens: 0,
            traces: false,
        };
        let manifest = Manifest { schema: 1, model: "m".into(), layers: 1, domains: vec![], parts: vec![part] };
        let said = sampler(&manifest, &[layer(&[10, 30])]);
        let expected = "sampler balanced, seed 3: 4 samples of 200 tokens; 800 tokens run before to choose from 40 windows; the least-served expert has \
            9 tokens of at most 10; every token went through every expert\nthe model wrote 4 texts, 3 of them different; zlib leaves 0.50 of the bytes \
            (median), of 1 below 0.1, of 2 below 0.2; distinct-1, -2, -3: 0.25, 0.50, 0.75\ntokens of an expert, over all layers: fewest 10, median 10, \
            most 30; balance σ 0.3536 (0 is even)\n";
        assert_eq!(said, expected);
    }
}

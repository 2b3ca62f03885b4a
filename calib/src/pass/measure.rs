//! The tap of the measuring pass: it turns what passes through a layer into [`LayerStats`].

use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, backend::Backend};

use crate::Result;
use crate::arch::Site;
use crate::forward::{Routed, Routing, Tap, values};
use crate::sample::Samples;
use crate::stats::{ChannelSums, LayerStats};

/// Adds up one layer's statistics. Each sum belongs to one site, which is served in order from one thread at a time, so no
/// bit depends on the number of threads.
pub struct Measure<'a> {
    stats: Mutex<LayerStats>,
    samples: &'a Samples,
}

impl<'a> Measure<'a> {
    /// Goes on from `stats`, [`LayerStats::new`] at the start.
    pub fn new(stats: LayerStats, samples: &'a Samples) -> Self {
        Self { stats: Mutex::new(stats), samples }
    }

    /// The layer's statistics.
    pub fn finish(self) -> LayerStats {
        self.stats.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Domain of a row by its number over all samples.
    fn domain(&self, row: usize) -> usize {
        self.samples.domain[row / self.samples.tokens]
    }

    fn with<T>(&self, edit: impl FnOnce(&mut LayerStats) -> T) -> T {
        edit(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<B: Backend> Tap<B> for Measure<'_> {
    fn wants(&self, _layer: usize, _site: Site) -> bool {
        true
    }

    fn rows(&self, _layer: usize, site: Site, rows: &Tensor<B, 2>, routed: Option<&Routed>) -> Result<()> {
        let [_, width] = rows.dims();
        let values = values(rows.clone(), "inputs of a site")?;
        let sums = ChannelSums::of(&values, width, routed.map(|r| r.weights.as_slice()));
        self.with(|stats| stats.channels.entry(site).or_insert_with(|| ChannelSums::new(width)).merge(&sums))
    }

    fn routing(&self, _layer: usize, routing: &Routing) -> Result<()> {
        self.with(|stats| stats.router.iter_mut().for_each(|router| router.add(routing, |row| self.domain(row))));
        Ok(())
    }

    fn expert_output(&self, _layer: usize, expert: usize, out: &Tensor<B, 2>, routed: &Routed) -> Result<()> {
        let values = values(out.clone(), "an expert's output")?;
        let domain = |i: usize| self.domain(routed.tokens[i] as usize);
        let chunk = crate::stats::OutputChunk::of(&values, &routed.weights, self.samples.domains.len(), domain);
        self.with(|stats| stats.outputs.iter_mut().for_each(|outputs| outputs.add(expert, &chunk)));
        Ok(())
    }
}

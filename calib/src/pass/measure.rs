//! The tap of the measuring pass: it turns what passes through a layer into [`LayerStats`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use ndarray::Array2;

use crate::arch::Site;
use crate::forward::{Routed, Routing, Tap, values};
use crate::sample::Samples;
use crate::stats::{ChannelSums, ExpertStats, GateSums, LayerStats, OutputChunk, cosine};
use crate::{Error, Result};

/// Adds up one layer's statistics. Each sum belongs to one site, which is served in order from one thread at a time, so no
/// bit depends on the number of threads.
///
/// **Memory**, beside the statistics: the block's routed output of all samples (one copy of the hidden states; two where a
/// shared expert is added to it), and 8 bytes a row of each expert.
pub struct Measure<'a, B: Backend> {
    samples: &'a Samples,
    /// First row of each sample.
    starts: Vec<usize>,
    before: Option<&'a Array2<u16>>,
    stats: Mutex<LayerStats>,
    block: Mutex<Block<B>>,
}

/// What has to wait until the block is through.
struct Block<B: Backend> {
    /// Chosen experts of every row so far, `[rows · top_k]`.
    chosen: Vec<u16>,
    top_k: usize,
    /// Row and `g · ‖F‖` of every expert's rows.
    contributions: Vec<Vec<(u32, f32)>>,
    entered: Vec<Tensor<B, 2>>,
    routed: Vec<Tensor<B, 2>>,
    out: Vec<Tensor<B, 2>>,
    /// First row of the batch that comes next.
    next: usize,
    /// Rows to be kept of what enters the block, rising, and what has been kept of them.
    subset: Vec<usize>,
    kept: Vec<f32>,
}

/// What a layer gave.
pub struct Measured {
    /// Its statistics.
    pub stats: LayerStats,
    /// The experts that each row chose, best first, `[rows, top_k]`; `None` in a layer without experts.
    pub chosen: Option<Array2<u16>>,
    /// Rows of the subset as they entered the block, `[subset, hidden]` row by row.
    pub subset: Vec<f32>,
}

impl<'a, B: Backend> Measure<'a, B> {
    /// Goes on from `stats`, [`LayerStats::new`] at the start. `before`: what the rows chose in the layer before,
    /// `[rows, top_k]`. `subset`: rows whose block input is kept, rising.
    pub fn new(stats: LayerStats, samples: &'a Samples, before: Option<&'a Array2<u16>>, subset: Vec<usize>) -> Self {
        let experts = stats.experts.as_ref().map_or(0, |e| e.router.counts.ncols());
        let block = Block {
            chosen: vec![],
            top_k: 0,
            contributions: vec![vec![]; experts],
            entered: vec![],
            routed: vec![],
            out: vec![],
            next: 0,
            subset,
            kept: vec![],
        };
        Self { samples, starts: samples.starts(), before, stats: Mutex::new(stats), block: Mutex::new(block) }
    }

    /// The layer's statistics.
    pub fn finish(self) -> Measured {
        let stats = self.stats.into_inner().unwrap_or_else(PoisonError::into_inner);
        let block = self.block.into_inner().unwrap_or_else(PoisonError::into_inner);
        let rows = block.chosen.len() / block.top_k.max(1);
        let chosen = Array2::from_shape_vec((rows, block.top_k), block.chosen).ok().filter(|_| stats.experts.is_some());
        Measured { stats, chosen, subset: block.kept }
    }

    /// Domain of a row by its number over all samples.
    fn domain(&self, row: usize) -> usize {
        self.samples.domain[self.starts.partition_point(|&start| start <= row) - 1]
    }

    fn stats(&self) -> MutexGuard<'_, LayerStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Block<B>> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch is through the layer: what the block did to each row, and EASY-EP's token weight, which replaces the batch's
    /// norms by the product.
    fn close(&self, batch: usize, hidden: &Tensor<B, 2>, block: &mut Block<B>, experts: &mut ExpertStats) -> Result<()> {
        let [rows, width] = hidden.dims();
        let of = |x: &Tensor<B, 2>, what| values(x.clone(), what);
        let (after, out) = (of(hidden, "hidden states")?, of(&block.out[batch], "a block's output")?);
        let (entered, routed) = (of(&block.entered[batch], "a block's input")?, of(&block.routed[batch], "a block's output")?);
        let first = block.next;
        let mut token = Vec::with_capacity(rows);
        let mut before = vec![0.0; width];
        let mut with_routed = vec![0.0; width];
        for row in 0..rows {
            let at = row * width..(row + 1) * width;
            for (i, j) in at.clone().enumerate() {
                before[i] = after[j] - out[j];
                with_routed[i] = before[i] + routed[j];
            }
            let domain = self.domain(first + row);
            experts.block.add(domain, cosine(&before, &after[at.clone()]), cosine(&entered[at.clone()], &out[at]));
            token.push((1.0 - cosine(&before, &with_routed)).max(0.0));
        }
        for (expert, rows_of) in block.contributions.iter_mut().enumerate() {
            // Rows rise, so this batch's stand at the front.
            let end = rows_of.partition_point(|&(row, _)| (row as usize) < first + rows);
            for (row, contribution) in rows_of.drain(..end) {
                let at = (self.domain(row as usize), expert);
                experts.outputs.importance[at] += f64::from(contribution) * token[row as usize - first];
            }
        }
        block.next += rows;
        Ok(())
    }
}

impl<B: Backend> Tap<B> for Measure<'_, B> {
    fn wants(&self, _layer: usize, _site: Site) -> bool {
        true
    }

    fn rows(&self, _layer: usize, site: Site, rows: &Tensor<B, 2>, routed: Option<&Routed>) -> Result<()> {
        let [_, width] = rows.dims();
        let sums = ChannelSums::of(&values(rows.clone(), "inputs of a site")?, width, routed.map(|r| r.weights.as_slice()));
        self.stats().channels.entry(site).or_insert_with(|| ChannelSums::new(width)).merge(&sums)
    }

    fn wants_gates(&self) -> bool {
        true
    }

    fn gates(&self, _layer: usize, down: Site, gate: &Tensor<B, 2>, up: &Tensor<B, 2>, routed: Option<&Routed>) -> Result<()> {
        let [_, inner] = gate.dims();
        let (gate, up) = (values(gate.clone(), "an MLP's gate")?, values(up.clone(), "an MLP's up projection")?);
        let sums = GateSums::of(&gate, &up, inner, routed.map(|r| r.weights.as_slice()));
        self.stats().gates.entry(down).or_insert_with(|| GateSums::new(inner)).merge(&sums)
    }

    fn routing(&self, _layer: usize, routing: &Routing) -> Result<()> {
        // One lock at a time: `block` takes them in the other order.
        if let Some(experts) = &mut self.stats().experts {
            experts.router.add(routing, |row| self.domain(row), self.before);
        }
        let mut block = self.waiting();
        block.top_k = routing.top_k;
        block.chosen.extend(routing.chosen.iter().map(|&expert| expert as u16));
        Ok(())
    }

    fn expert_output(&self, _layer: usize, expert: usize, out: &Tensor<B, 2>, routed: &Routed) -> Result<()> {
        let values = values(out.clone(), "an expert's output")?;
        let domain = |i: usize| self.domain(routed.tokens[i] as usize);
        let chunk = OutputChunk::of(&values, &routed.weights, self.samples.domains.len(), domain);
        if let Some(experts) = &mut self.stats().experts {
            experts.outputs.add(expert, &chunk);
        }
        let rows = routed.tokens.iter().zip(chunk.contributions()).map(|(&row, &c)| (row, c as f32));
        self.waiting().contributions[expert].extend(rows);
        Ok(())
    }

    fn wants_blocks(&self) -> bool {
        true
    }

    fn block(&self, _layer: usize, name: &'static str, batch: usize, x: &Tensor<B, 2>) -> Result<()> {
        let mut waiting = self.waiting();
        let block = &mut *waiting;
        match name {
            "moe.in" => {
                let first = block.entered.iter().map(|x| x.dims()[0]).sum::<usize>();
                let [rows, width] = x.dims();
                let inside = block.subset.iter().filter(|&&row| (first..first + rows).contains(&row));
                if inside.clone().next().is_some() {
                    let values = values(x.clone(), "a block's input")?;
                    block.kept.extend(inside.flat_map(|row| &values[(row - first) * width..][..width]));
                }
                block.entered.push(x.clone());
            }
            "moe.routed_out" => block.routed.push(x.clone()),
            "moe.out" => block.out.push(x.clone()),
            "hidden" if !block.out.is_empty() => {
                if let Some(experts) = &mut self.stats().experts {
                    self.close(batch, x, block, experts)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Refuses experts that a trace cannot name.
pub(super) fn nameable(experts: usize) -> Result<()> {
    if experts > usize::from(u16::MAX) + 1 { Err(Error::TooManyExperts { experts }) } else { Ok(()) }
}

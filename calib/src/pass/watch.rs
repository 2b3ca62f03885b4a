//! A second pair of eyes on the measuring pass: rows as host values, for whoever fills a table while they are in memory.

use burn::tensor::{Tensor, backend::Backend};
use ndarray::Array2;

use crate::Result;
use crate::arch::Site;
use crate::forward::{Routed, Routing, Tap, spread, values};
use crate::sample::Through;

/// At most so many of the rows that enter a layer's experts, spread evenly over all of them, `[rows, hidden]`.
pub type Spread<'a> = dyn Fn(usize) -> Result<Array2<f32>> + 'a;

/// Sees the inputs of every site that it wants, beside the statistics of the pass.
///
/// Rows of one site arrive in order and from one thread at a time; different sites may come from different threads.
pub trait Watch: Sync {
    /// Whether the rows of this site are wanted.
    fn wants(&self, layer: usize, site: Site) -> bool;

    /// A chunk of rows, `[rows, width]`, enters a site; `routed` as in [`Tap::rows`].
    ///
    /// # Errors
    ///
    /// Whatever the receiver finds wrong; the pass stops with it.
    fn rows(&self, layer: usize, site: Site, rows: &[f32], width: usize, routed: Option<&Routed>) -> Result<()>;

    /// What a gated MLP's gate and up projections gave for the rows that enter the site `down`, `[rows, inner]` each; as in
    /// [`Tap::gates`], before those rows.
    ///
    /// # Errors
    ///
    /// As [`Watch::rows`].
    fn gates(&self, layer: usize, down: Site, gate: &[f32], up: &[f32], inner: usize, routed: Option<&Routed>) -> Result<()>;

    /// What enters a layer's experts, and how many rows each of them was given, `[experts]`; before any of them runs.
    ///
    /// # Errors
    ///
    /// As [`Watch::rows`].
    fn entered(&self, _layer: usize, _rows: &Spread<'_>, _loads: &[u64]) -> Result<()> {
        Ok(())
    }

    /// All rows of a wanted site have been seen.
    ///
    /// # Errors
    ///
    /// As [`Watch::rows`].
    fn done(&self, layer: usize, site: Site) -> Result<()>;

    /// The layer is finished, its statistics are not on disk yet: what is written here is there whenever they are.
    ///
    /// # Errors
    ///
    /// As [`Watch::rows`].
    fn layer_done(&self, layer: usize) -> Result<()>;

    /// Whether what [`Watch::layer_done`] writes is there.
    fn has(&self, layer: usize) -> bool;
}

/// A tap and its watcher.
pub(super) struct Watched<'a, T> {
    pub tap: &'a T,
    pub watch: Option<&'a dyn Watch>,
    /// Which tokens the experts' sites are shown.
    pub through: Through,
}

impl<T> Watched<'_, T> {
    fn watcher(&self, layer: usize, site: Site) -> Option<&dyn Watch> {
        self.watch.filter(|watch| watch.wants(layer, site))
    }
}

impl<B: Backend, T: Tap<B>> Tap<B> for Watched<'_, T> {
    fn wants(&self, layer: usize, site: Site) -> bool {
        self.tap.wants(layer, site) || self.watcher(layer, site).is_some()
    }

    fn rows(&self, layer: usize, site: Site, rows: &Tensor<B, 2>, routed: Option<&Routed>) -> Result<()> {
        if let Some(watch) = self.watcher(layer, site) {
            watch.rows(layer, site, &values(rows.clone(), "inputs of a site")?, rows.dims()[1], routed)?;
        }
        if self.tap.wants(layer, site) { self.tap.rows(layer, site, rows, routed) } else { Ok(()) }
    }

    fn wants_every_row(&self) -> bool {
        self.through == Through::All
    }

    fn wants_gates(&self) -> bool {
        self.tap.wants_gates() || self.watch.is_some()
    }

    fn gates(&self, layer: usize, down: Site, gate: &Tensor<B, 2>, up: &Tensor<B, 2>, routed: Option<&Routed>) -> Result<()> {
        if let Some(watch) = self.watcher(layer, down) {
            let host = |x: &Tensor<B, 2>| values(x.clone(), "what gate and up gave");
            watch.gates(layer, down, &host(gate)?, &host(up)?, gate.dims()[1], routed)?;
        }
        if self.tap.wants_gates() { self.tap.gates(layer, down, gate, up, routed) } else { Ok(()) }
    }

    fn done(&self, layer: usize, site: Site) -> Result<()> {
        if self.tap.wants(layer, site) {
            self.tap.done(layer, site)?;
        }
        self.watcher(layer, site).map_or(Ok(()), |watch| watch.done(layer, site))
    }

    fn routing(&self, layer: usize, routing: &Routing) -> Result<()> {
        self.tap.routing(layer, routing)
    }

    fn entered(&self, layer: usize, x: &[Tensor<B, 2>], loads: &[u64]) -> Result<()> {
        self.watch.map_or(Ok(()), |watch| watch.entered(layer, &|most| spread(x, most), loads))?;
        self.tap.entered(layer, x, loads)
    }

    fn expert_output(&self, layer: usize, expert: usize, out: &Tensor<B, 2>, routed: &Routed) -> Result<()> {
        self.tap.expert_output(layer, expert, out, routed)
    }

    fn block(&self, layer: usize, name: &'static str, batch: usize, x: &Tensor<B, 2>) -> Result<()> {
        self.tap.block(layer, name, batch, x)
    }

    fn wants_blocks(&self) -> bool {
        self.tap.wants_blocks()
    }
}

//! How much is done at once: blocks of equal tasks, in parallel, their results in order.

use std::any::TypeId;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::backend::Backend;
use rayon::prelude::*;

use crate::Result;
use crate::device::Cpu;

/// How a layer is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Batches whose attention is computed, or experts that are loaded and run, at the same time; at least 1. It bounds
    /// memory and changes no bit of the result.
    pub in_flight: usize,
}

impl Options {
    /// One task a thread on the CPU, but no more than [`limit_in_flight`] allows; one at a time on a device that is parallel inside.
    pub fn of<B: Backend>() -> Self {
        if !on_cpu::<B>() {
            return Self { in_flight: 1 };
        }
        let limit = LIMIT.load(Ordering::Relaxed);
        Self { in_flight: rayon::current_num_threads().min(if limit == 0 { usize::MAX } else { limit }) }
    }
}

/// Most tasks in flight; 0: one a thread.
static LIMIT: AtomicUsize = AtomicUsize::new(0);

/// From now on no more than `tasks` batches or experts are in flight anywhere in this process, to save memory. Changes no bit of any
/// result.
pub fn limit_in_flight(tasks: std::num::NonZeroUsize) {
    LIMIT.store(tasks.get(), Ordering::Relaxed);
}

/// Whether tensors of this backend lie in the host's memory, so that reading them copies nothing.
pub(crate) fn on_cpu<B: Backend>() -> bool {
    TypeId::of::<B>() == TypeId::of::<Cpu>()
}

/// Runs `task` over a block of items, at the same time where there is more than one; results in the items' order.
pub(crate) fn together<T: Send, R: Send>(block: Vec<T>, task: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    if block.len() == 1 { block.into_iter().map(&task).collect() } else { block.into_par_iter().map(&task).collect() }
}

/// Runs `task` over all items, `in_flight` at a time, and hands each result to `then` in the items' order.
pub(crate) fn in_blocks<T: Send, R: Send>(
    in_flight: usize,
    items: impl IntoIterator<Item = T>,
    task: impl Fn(T) -> Result<R> + Sync,
    mut then: impl FnMut(R) -> Result<()>,
) -> Result<()> {
    let mut items = items.into_iter();
    loop {
        let block: Vec<T> = items.by_ref().take(in_flight.max(1)).collect();
        if block.is_empty() {
            return Ok(());
        }
        for result in together(block, &task)? {
            then(result)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_whatever_the_block() {
        for in_flight in [0, 1, 3, 7, 100] {
            let mut seen = Vec::new();
            let then = |square| {
                seen.push(square);
                Ok(())
            };
            in_blocks(in_flight, 0..10, |i| Ok(i * i), then).unwrap();
            assert_eq!(seen, (0..10).map(|i| i * i).collect::<Vec<_>>());
        }
    }
}

//! How far a stage is: a bar on a terminal, a line now and then elsewhere.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use calib::progress::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// A bar with rate and ETA.
pub(super) struct Bars {
    bars: MultiProgress,
    current: Mutex<Option<ProgressBar>>,
}

impl Bars {
    pub fn new(bars: MultiProgress) -> Self {
        Self { bars, current: Mutex::new(None) }
    }

    fn current(&self, f: impl FnOnce(&mut Option<ProgressBar>)) {
        // A thread that panicked while it held the lock left a bar that is still a bar.
        f(&mut self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

impl Progress for Bars {
    fn start(&self, stage: &str, total: u64) {
        let style = ProgressStyle::with_template("{msg:24} {wide_bar} {pos}/{len}  {per_sec}  {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(ProgressBar::new(total).with_style(style).with_message(stage.to_owned()));
        bar.enable_steady_tick(Duration::from_millis(500));
        self.current(|current| *current = Some(bar));
    }

    fn tick(&self, steps: u64) {
        self.current(|current| {
            if let Some(bar) = current {
                bar.inc(steps);
            }
        });
    }

    fn finish(&self) {
        self.current(|current| {
            if let Some(bar) = current.take() {
                bar.finish_and_clear();
                self.bars.remove(&bar);
            }
        });
    }
}

/// Time between two lines about the same stage.
const BETWEEN: Duration = Duration::from_secs(10);

/// Log lines: one when a stage begins that lasts, then one every ten seconds, with rate and ETA.
#[derive(Default)]
pub(super) struct Lines(Mutex<Option<Stage>>);

struct Stage {
    name: String,
    total: u64,
    done: u64,
    begun: Instant,
    said: Instant,
}

impl Lines {
    fn stage(&self, f: impl FnOnce(&mut Option<Stage>)) {
        f(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

impl Progress for Lines {
    fn start(&self, name: &str, total: u64) {
        let now = Instant::now();
        self.stage(|stage| *stage = Some(Stage { name: name.to_owned(), total, done: 0, begun: now, said: now }));
    }

    fn tick(&self, steps: u64) {
        self.stage(|stage| {
            let Some(stage) = stage else { return };
            stage.done += steps;
            if stage.said.elapsed() < BETWEEN || stage.done >= stage.total {
                return;
            }
            stage.said = Instant::now();
            let rate = stage.done as f64 / stage.begun.elapsed().as_secs_f64();
            let left = stage.total.saturating_sub(stage.done) as f64 / rate;
            let Stage { name, total, done, .. } = stage;
            tracing::info!("{name}: {done} of {total}, {rate:.1} a second, {left:.0} s left");
        });
    }

    fn finish(&self) {
        self.stage(|stage| {
            if let Some(Stage { name, done, begun, .. }) = stage.take() {
                tracing::info!("{name}: {done} in {:.1} s", begun.elapsed().as_secs_f64());
            }
        });
    }
}

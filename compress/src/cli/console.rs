//! Standard error: log lines and progress, on a terminal or anywhere else.

use std::io::IsTerminal as _;

use indicatif::MultiProgress;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::args::{Global, LogFormat};
use super::progress::{Bars, Lines};
use calib::progress::{Progress, Quiet};

/// Where progress goes.
pub(super) enum Console {
    /// Bars with rate and ETA.
    Terminal(MultiProgress),
    /// Log lines now and then.
    Lines,
    /// Nowhere.
    Quiet,
}

impl Console {
    /// Sets up logging, and says how progress will be shown.
    pub fn new(global: &Global) -> Self {
        let console = if global.quiet {
            Self::Quiet
        } else if global.log_format == LogFormat::Text && std::io::stderr().is_terminal() {
            Self::Terminal(MultiProgress::new())
        } else {
            Self::Lines
        };
        let level = match (global.quiet, global.verbose) {
            (true, _) => LevelFilter::WARN,
            (_, 0) => LevelFilter::INFO,
            (_, 1) => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        };
        let bars = if let Self::Terminal(bars) = &console { Some(bars.clone()) } else { None };
        // Of other crates only what is wrong.
        let ours = ["compress", "calib", "kernels"].map(|name| (name, level));
        let filter = Targets::new().with_default(LevelFilter::WARN).with_targets(ours);
        let colors = matches!(console, Self::Terminal(_)) && std::env::var_os("NO_COLOR").is_none();
        let log = tracing_subscriber::fmt::layer().with_target(false).with_ansi(colors).with_writer(Stderr(bars));
        let log = match global.log_format {
            LogFormat::Text => log.without_time().boxed(),
            LogFormat::Json => log.json().flatten_event(true).boxed(),
        };
        // Refused where there is one already, which then serves.
        let _ = tracing_subscriber::registry().with(log.with_filter(filter)).try_init();
        console
    }

    /// A listener for one command.
    pub fn progress(&self) -> Box<dyn Progress> {
        match self {
            Self::Terminal(bars) => Box::new(Bars::new(bars.clone())),
            Self::Lines => Box::new(Lines::default()),
            Self::Quiet => Box::new(Quiet),
        }
    }
}

/// Standard error, with bars out of the way while a line is written.
struct Stderr(Option<MultiProgress>);

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self.0.as_ref())
    }
}

struct Line<'a>(Option<&'a MultiProgress>);

impl std::io::Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.0 {
            Some(bars) => bars.suspend(|| std::io::stderr().write(bytes)),
            None => std::io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

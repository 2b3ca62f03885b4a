//! Standard error: log lines and progress, on a terminal or anywhere else.

use std::io::IsTerminal as _;

use indicatif::MultiProgress;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

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
        let log = tracing_subscriber::fmt().with_max_level(level).with_target(false).with_writer(Stderr(bars));
        let set = match global.log_format {
            LogFormat::Text => tracing::subscriber::set_global_default(log.without_time().finish()),
            LogFormat::Json => tracing::subscriber::set_global_default(log.json().flatten_event(true).finish()),
        };
        // A second subscriber can only come from a test that calls this twice; the first one serves.
        let _ = set;
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

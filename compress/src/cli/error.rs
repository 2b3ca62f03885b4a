//! Errors for people: a recipe's with the lines they stand in.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource, Report};

use super::args::{Global, LogFormat};
use crate::Error;
use crate::recipe::{Invalid, Problem};

/// Says on standard error what went wrong.
pub(super) fn show(error: &Error, global: &Global) {
    if global.log_format == LogFormat::Json {
        tracing::error!("{error}");
        return;
    }
    let text = match error {
        Error::Recipe(invalid) => render(invalid),
        other => format!("error: {other}\n"),
    };
    // Nobody is left to tell where standard error is gone.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

fn render(invalid: &Invalid) -> String {
    let theme = if std::io::stderr().is_terminal() { GraphicalTheme::unicode() } else { GraphicalTheme::none() };
    let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(120);
    let mut text = String::new();
    for problem in &invalid.problems {
        if handler.render_report(&mut text, report(invalid, problem).as_ref()).is_err() {
            return format!("error: {invalid}\n");
        }
    }
    let _ = match invalid.problems.len() {
        1 => writeln!(text, "error: {} cannot be followed", invalid.path.display()),
        n => writeln!(text, "error: {} cannot be followed: {n} problems", invalid.path.display()),
    };
    text
}

fn report(invalid: &Invalid, problem: &Problem) -> Report {
    let mut diagnostic = MietteDiagnostic::new(problem.message.clone());
    diagnostic.help.clone_from(&problem.help);
    match &problem.span {
        Some(span) => {
            let label = LabeledSpan::new_with_span(None, span.clone());
            Report::new(diagnostic.with_label(label))
                .with_source_code(NamedSource::new(invalid.path.to_string_lossy(), invalid.text.clone()))
        }
        None => Report::new(diagnostic),
    }
}

//! The command line: subcommands, one call each, and exit codes (0 done, 1 failed, 2 wrong usage or recipe).
//!
//! Results go to standard output, in one piece at the end; whatever is said on the way goes to standard error. A reader of
//! standard output that goes away is not an error.

mod args;
mod commands;
mod console;
mod error;
mod imatrix;
mod inspect;
mod progress;
mod stats;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::Cli;

/// Parses the command line, does what it says, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let console = console::Console::new(&cli.global);
    match commands::run(&cli, &console).and_then(|text| Ok(print(&text)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error::show(&error, &cli.global);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Writes a result to standard output. A pipe that nobody reads any more has read enough.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

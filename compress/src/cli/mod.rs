//! The command line: subcommands, one call each, and exit codes (0 done, 1 failed, 2 wrong usage or recipe).
//!
//! Results go to standard output, in one piece at the end; whatever is said on the way goes to standard error. A reader of
//! standard output that goes away is not an error.

mod args;
mod console;
mod error;
mod progress;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::Result;
use crate::recipe::{self, Loaded};
use args::{Cli, Command, RecipeArgs};

/// Parses the command line, does what it says, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let console = console::Console::new(&cli.global);
    match run(&cli, &console).and_then(|text| Ok(print(&text)?)) {
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

/// Does what a command says and gives what is to be printed.
fn run(cli: &Cli, console: &console::Console) -> Result<String> {
    let _ = console;
    match &cli.command {
        Command::Check(args) => check(args),
        Command::Inspect(_) | Command::Run(_) | Command::Calibrate(_) | Command::Plan(_) | Command::Apply(_) | Command::Eval(_) => Ok(String::new()),
        Command::Schema => Ok(recipe::schema().map_err(std::io::Error::from)?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "moepress", &mut script);
            Ok(String::from_utf8_lossy(&script).into_owned())
        }
    }
}

fn load(args: &RecipeArgs) -> Result<Loaded> {
    let overrides = recipe::Overrides { model: args.model.clone(), out: args.out.clone(), set: args.set.clone() };
    Ok(recipe::load(&args.recipe, &overrides)?)
}

fn check(args: &RecipeArgs) -> Result<String> {
    let loaded = load(args)?;
    let problems = recipe::check_values(&loaded);
    if problems.is_empty() { Ok(String::new()) } else { Err(loaded.source.invalid(problems).into()) }
}

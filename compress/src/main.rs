//! The program `moepress`.

use std::process::ExitCode;

fn main() -> ExitCode {
    compress::cli::main()
}

//! `moepress stats`: statistics of calibration passes, added up or shown.

use std::path::Path;

use calib::stats::{Manifest, Store};

use super::args::{MergeArgs, ShowArgs, StatsCommand};
use crate::tensorfile::write_whole;
use crate::{Error, Result, report};

/// Does what is asked and gives what is to be printed.
pub(super) fn stats(command: &StatsCommand) -> Result<String> {
    match command {
        StatsCommand::Merge(args) => merge(args),
        StatsCommand::Show(args) => show(args),
    }
}

/// The statistics in a folder, or in an output directory.
fn store(dir: &Path) -> Store {
    let below = dir.join("moepress/stats");
    Store::new(if below.is_dir() { below } else { dir.to_owned() })
}

fn merge(args: &MergeArgs) -> Result<String> {
    let from: Vec<Store> = args.from.iter().map(|dir| store(dir)).collect();
    let merged = Store::new(&args.out).merge(&from)?;
    let tokens: usize = merged.parts.iter().map(|part| part.tokens_run).sum();
    let (passes, layers, domains) = (merged.parts.len(), merged.layers, merged.domains.join(", "));
    Ok(format!("{passes} passes over {tokens} tokens of {domains}, {layers} layers; the sum lies in {}\n", args.out.display()))
}

fn show(args: &ShowArgs) -> Result<String> {
    let store = store(&args.dir);
    let Some(manifest): Option<Manifest> = store.manifest()? else {
        let what = "there are no finished statistics here (no manifest.json)".to_owned();
        return Err(Error::NoStats { dir: store.dir().to_owned(), what });
    };
    let report = report::read_stats(&store, &manifest)?;
    if let Some(path) = &args.svg {
        write_whole(path, report::stats_svg(&report).as_bytes())?;
    }
    if args.csv {
        return Ok(report::stats_csv(&report));
    }
    if args.format.json {
        return Ok(serde_json::to_string_pretty(&report).map_err(std::io::Error::from)? + "\n");
    }
    Ok(report::stats_text(&report))
}

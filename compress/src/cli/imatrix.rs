//! `moepress imatrix`: llama.cpp's importance matrices, read, shown and written.

use std::path::Path;

use calib::stats::Store;
use serde_json::json;

use super::args::ImatrixArgs;
use crate::imatrix::{self, Imatrix, gguf};
use crate::report::table;
use crate::tensorfile::write_whole;
use crate::{Error, Result};

/// Reads statistics or an importance matrix; writes it where that is asked for, else shows it.
pub(super) fn run(args: &ImatrixArgs) -> Result<String> {
    let found = if args.from.is_dir() { of_statistics(&args.from)? } else { imatrix::read(&args.from)? };
    let found = found.split_stacks();
    if let Some(out) = &args.out {
        write_whole(out, &gguf::bytes(&found))?;
    }
    if args.format.json {
        let entry = |(name, entry): (&String, &imatrix::Entry)| json!({ "tensor": name, "inputs": entry.squares.ncols(), "counts": entry.counts.to_vec() });
        let entries: Vec<_> = found.entries.iter().map(entry).collect();
        let (datasets, chunks, tokens) = (&found.datasets, found.chunks, found.chunk_tokens);
        let whole = json!({ "datasets": datasets, "chunks": chunks, "chunk_tokens": tokens, "entries": entries });
        return Ok(serde_json::to_string_pretty(&whole).map_err(std::io::Error::from)? + "\n");
    }
    Ok(shown(&found) + &args.out.iter().map(|out| format!("\n{}\n", out.display())).collect::<String>())
}

/// Of a folder of statistics, or of the output directory that holds one.
fn of_statistics(dir: &Path) -> Result<Imatrix> {
    let folders = [dir.to_owned(), dir.join("moepress/stats")];
    for store in folders.map(Store::new) {
        if let Some(manifest) = store.manifest()? {
            let layers = (0..manifest.layers).map(|layer| store.get(layer)).collect::<calib::Result<Vec<_>>>()?;
            return Ok(Imatrix::of(&manifest, &layers));
        }
    }
    let what = "it holds no finished statistics (neither manifest.json nor moepress/stats/manifest.json); run `moepress calibrate` first";
    Err(Error::Imatrix { path: dir.to_owned(), what: what.into() })
}

fn shown(imatrix: &Imatrix) -> String {
    let heading = ["tensor", "experts", "inputs", "fewest tokens", "median", "most", "unseen"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for (name, entry) in &imatrix.entries {
        let mut counts = entry.counts.to_vec();
        counts.sort_by(f64::total_cmp);
        let at = |i: usize| counts.get(i).map_or_else(String::new, |n| format!("{n:.0}"));
        let last = counts.len().saturating_sub(1);
        let unseen = counts.iter().filter(|n| **n == 0.0).count();
        let sizes = [entry.squares.nrows(), entry.squares.ncols()].map(|n| n.to_string());
        rows.push([vec![name.clone()], sizes.to_vec(), vec![at(0), at(last / 2), at(last), unseen.to_string()]].concat());
    }
    let of = if imatrix.datasets.is_empty() { String::new() } else { format!(" of {}", imatrix.datasets.join(", ")) };
    format!("{} chunks of {} tokens{of}\n\n{}", imatrix.chunks, imatrix.chunk_tokens, table(&rows))
}

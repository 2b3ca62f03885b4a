//! Which files of a directory are the checkpoint: one file, or the shards that an index names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Problem;
use super::header::Members;
use super::shard::Shard;
use crate::{Error, Result};

/// A model in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// The list of shards.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The index: the shard of every tensor, by name.
pub(super) struct Index(BTreeMap<String, String>);

#[derive(serde::Deserialize)]
struct File {
    weight_map: Members<String>,
}

impl Index {
    /// Reads an index whose shards are plain file names.
    fn read(path: &Path) -> Result<Self> {
        let text = fs_err::read(path)?;
        let File { weight_map } = serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.to_owned(), source })?;
        if let Some(tensor) = weight_map.twice() {
            return Err(Problem::IndexTwice { tensor: tensor.to_owned() }.at(path));
        }
        if let Some((tensor, shard)) = weight_map.0.iter().find(|(_, shard)| !plain(shard)) {
            return Err(Problem::IndexPath { tensor: tensor.clone(), shard: shard.clone() }.at(path));
        }
        Ok(Self(weight_map.0.into_iter().collect()))
    }

    /// The shards' paths, sorted; each must be there.
    fn shards(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let mut tensors: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &self.0 {
            tensors.entry(shard).or_default().push(tensor);
        }
        let path = |(shard, tensors): (&str, Vec<&str>)| {
            let path = dir.join(shard);
            let missing = || Problem::ShardMissing { shard: shard.to_owned(), tensors: tensors.len(), first: tensors[0].to_owned() };
            if path.is_file() { Ok(path) } else { Err(missing().at(dir)) }
        };
        tensors.into_iter().map(path).collect()
    }

    /// Checks that index and shards list the same tensors, each in the same shard.
    pub fn check(&self, shards: &[Shard]) -> Result<(), Problem> {
        let mut found: BTreeMap<&str, String> = BTreeMap::new();
        for shard in shards {
            for entry in &shard.header.entries {
                if let Some(first) = found.insert(&entry.name, shard.name()) {
                    return Err(Problem::TwoShards { tensor: entry.name.clone(), first, second: shard.name() });
                }
            }
        }
        if let Some((tensor, shard)) = self.0.iter().find(|(tensor, shard)| found.get(tensor.as_str()) != Some(shard)) {
            return Err(Problem::IndexAbsent { tensor: tensor.clone(), shard: shard.clone() });
        }
        match found.into_iter().find(|(tensor, _)| !self.0.contains_key(*tensor)) {
            Some((tensor, shard)) => Err(Problem::NotInIndex { tensor: tensor.to_owned(), shard }),
            None => Ok(()),
        }
    }
}

/// Whether a name is that of a file in the same directory, on any system.
fn plain(name: &str) -> bool {
    let odd = |c: char| matches!(c, '/' | '\\' | ':') || c.is_control();
    !name.is_empty() && name != "." && name != ".." && !name.contains(odd)
}

/// The files that hold a directory's weights, and the index if there is one.
pub(super) fn find(dir: &Path) -> Result<(Vec<PathBuf>, Option<Index>)> {
    let names = file_names(dir)?;
    let has = |name: &str| names.iter().any(|other| other == name);
    if has(INDEX) {
        let index = Index::read(&dir.join(INDEX))?;
        let shards = index.shards(dir)?;
        if has(SINGLE) && !shards.contains(&dir.join(SINGLE)) {
            return Err(Problem::TwoModels.at(dir));
        }
        return Ok((shards, Some(index)));
    }
    if let Some(single) = [SINGLE, "model-00001-of-00001.safetensors"].into_iter().find(|name| has(name)) {
        return Ok((vec![dir.join(single)], None));
    }
    let safetensors: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    if let Some(&first) = safetensors.first() {
        return Err(Problem::NoIndex { count: safetensors.len(), first: first.clone() }.at(dir));
    }
    let pickle = |name: &&String| name.starts_with("pytorch_model") || name.ends_with(".pth") || name.ends_with(".pt");
    match names.iter().find(pickle) {
        Some(file) => Err(Problem::PickleOnly { file: file.clone() }.at(dir)),
        None => Err(Problem::NoWeights.at(dir)),
    }
}

/// The names of a directory's files, sorted; one that is not Unicode is no file of a checkpoint.
pub(super) fn file_names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for file in fs_err::read_dir(dir)? {
        let file = file?;
        // Followed, because the hub's cache is made of symbolic links.
        if file.path().is_file() {
            names.extend(file.file_name().into_string());
        }
    }
    names.sort_unstable();
    Ok(names)
}

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

#[cfg(test)]
mod tests {
    use super::super::testing::{dir, index, open, problem, vectors};
    use super::*;
    use crate::checkpoint::Checkpoint;

    const FIRST: &str = "model-00001-of-00002.safetensors";
    const SECOND: &str = "model-00002-of-00002.safetensors";

    /// Two shards with a tensor each, and this index.
    fn two_shards(map: &[(&str, &str)]) -> Result<(tempfile::TempDir, Checkpoint)> {
        open(&[(FIRST, &vectors(&[("a", &[1.0])])), (SECOND, &vectors(&[("b", &[2.0, 3.0])])), (INDEX, &index(map))])
    }

    #[test]
    fn shards_are_read_by_their_index() {
        let (_dir, checkpoint) = two_shards(&[("b", SECOND), ("a", FIRST)]).unwrap();
        let places: Vec<(&str, usize)> = checkpoint.tensors().map(|info| (info.name.as_str(), info.shard)).collect();
        assert_eq!(places, [("a", 0), ("b", 1)]);
        assert_eq!(checkpoint.floats("a").unwrap(), [1.0]);
        assert_eq!(checkpoint.floats("b").unwrap(), [2.0, 3.0]);
    }

    #[test]
    fn one_file_needs_no_index() {
        let weights = vectors(&[("a", &[1.0])]);
        for name in [SINGLE, "model-00001-of-00001.safetensors"] {
            let (_dir, checkpoint) = open(&[(name, &weights), ("consolidated.safetensors", b"not read")]).unwrap();
            assert_eq!(checkpoint.floats("a").unwrap(), [1.0]);
        }
    }

    #[test]
    fn shards_without_an_index() {
        let weights = vectors(&[("a", &[1.0])]);
        let found = problem(open(&[(SECOND, &weights), (FIRST, &weights)]));
        assert!(matches!(found, Problem::NoIndex { count: 2, first } if first == FIRST));
        // A shard of two is not a model.
        assert!(matches!(problem(open(&[(FIRST, &weights)])), Problem::NoIndex { count: 1, .. }));
    }

    #[test]
    fn no_weights_and_pickled_weights() {
        assert!(matches!(problem(open(&[])), Problem::NoWeights));
        for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"] {
            assert!(matches!(problem(open(&[(name, b"pickle")])), Problem::PickleOnly { file } if file == name));
        }
        // Beside safetensors they do not matter.
        assert!(open(&[("pytorch_model.bin", b"pickle"), (SINGLE, &vectors(&[("a", &[1.0])]))]).is_ok());
    }

    #[test]
    fn two_models_in_one_directory() {
        let weights = vectors(&[("a", &[1.0])]);
        let found = problem(open(&[(SINGLE, &weights), (FIRST, &weights), (INDEX, &index(&[("a", FIRST)]))]));
        assert!(matches!(found, Problem::TwoModels));
        assert!(open(&[(SINGLE, &weights), (INDEX, &index(&[("a", SINGLE)]))]).is_ok());
    }

    #[test]
    fn names_that_leave_the_directory() {
        let outside =
            ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "C:x.safetensors", "a\0b", "x\n"];
        for name in outside {
            let found = problem(two_shards(&[("b", SECOND), ("a", name)]));
            assert!(matches!(found, Problem::IndexPath { tensor, shard } if tensor == "a" && shard == name), "{name:?}");
        }
    }

    #[test]
    fn a_shard_that_is_missing() {
        let found = problem(open(&[(FIRST, &vectors(&[("a", &[1.0])])), (INDEX, &index(&[("a", FIRST), ("c", SECOND), ("b", SECOND)]))]));
        assert!(matches!(found, Problem::ShardMissing { shard, tensors: 2, first } if shard == SECOND && first == "b"));
        // A directory of that name is no shard.
        let dir = dir(&[(INDEX, &index(&[("a", FIRST)]))]);
        fs_err::create_dir(dir.path().join(FIRST)).unwrap();
        assert!(matches!(problem(Checkpoint::open(dir.path())), Problem::ShardMissing { .. }));
    }

    #[test]
    fn an_index_that_disagrees_with_its_shards() {
        let absent = problem(two_shards(&[("a", FIRST), ("b", SECOND), ("c", SECOND)]));
        assert!(matches!(absent, Problem::IndexAbsent { tensor, shard } if tensor == "c" && shard == SECOND));
        let exchanged = problem(two_shards(&[("a", SECOND), ("b", SECOND), ("x", FIRST)]));
        assert!(matches!(exchanged, Problem::IndexAbsent { tensor, shard } if tensor == "a" && shard == SECOND));
        let more = problem(open(&[(FIRST, &vectors(&[("a", &[1.0]), ("b", &[2.0])])), (INDEX, &index(&[("a", FIRST)]))]));
        assert!(matches!(more, Problem::NotInIndex { tensor, shard } if tensor == "b" && shard == FIRST));
    }

    #[test]
    fn a_tensor_in_two_shards() {
        let (a, ab) = (vectors(&[("a", &[1.0])]), vectors(&[("a", &[1.0]), ("b", &[2.0])]));
        let found = problem(open(&[(FIRST, &a), (SECOND, &ab), (INDEX, &index(&[("a", FIRST), ("b", SECOND)]))]));
        assert!(matches!(found, Problem::TwoShards { tensor, first, second } if tensor == "a" && first == FIRST && second == SECOND));
    }

    #[test]
    fn an_index_that_is_none() {
        assert!(
            matches!(problem(two_shards(&[("a", FIRST), ("a", FIRST), ("b", SECOND)])), Problem::IndexTwice { tensor } if tensor == "a")
        );
        for text in ["{", "{}", r#"{"weight_map":{"a":1}}"#, "[]"] {
            assert!(matches!(open(&[(INDEX, text.as_bytes())]), Err(Error::Json { path, .. }) if path.ends_with(INDEX)), "{text}");
        }
    }
}

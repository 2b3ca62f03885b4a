//! Tiny checkpoints, whole and damaged, for the tests of this folder.

use std::path::Path;

use tempfile::TempDir;

use super::{Checkpoint, Problem};
use crate::tensor::{Dtype, encode};
use crate::{Error, Result};

/// A safetensors file of a header as given and data.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A safetensors file of f32 vectors.
pub fn vectors(tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let (mut members, mut data) = (Vec::new(), Vec::new());
    for (name, values) in tensors {
        let begin = data.len();
        data.extend(encode(Dtype::F32, values).unwrap());
        members.push(format!(r#""{name}":{{"dtype":"F32","shape":[{}],"data_offsets":[{begin},{}]}}"#, values.len(), data.len()));
    }
    file(&format!("{{{}}}", members.join(",")), &data)
}

/// An index.
pub fn index(map: &[(&str, &str)]) -> Vec<u8> {
    let members: Vec<String> = map.iter().map(|(tensor, shard)| format!("{}:{}", quoted(tensor), quoted(shard))).collect();
    format!(r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#, members.join(",")).into_bytes()
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A directory of an empty config and these files.
pub fn dir(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        fs_err::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// Opens a directory of these files.
pub fn open(files: &[(&str, &[u8])]) -> Result<(TempDir, Checkpoint)> {
    let dir = dir(files);
    Checkpoint::open(dir.path()).map(|checkpoint| (dir, checkpoint))
}

/// The problem that something failed with.
#[track_caller]
pub fn problem<T>(result: Result<T>) -> Problem {
    match result {
        Err(Error::Checkpoint { problem, .. }) => problem,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("no error"),
    }
}

/// The names of a directory's files, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    super::index::file_names(dir).unwrap()
}

//! From a finished folder to its place in the output directory.
//!
//! A format is written into `OUT/moepress/stage-NAME`, on the same file system, and moved by renames. At the top of `OUT` that takes one
//! rename a file: the old `config.json` goes first and the new one comes last, so that a directory with a `config.json` is whole.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use calib::checkpoint::TEMPLATES;

use crate::tensorfile::sync_folder;
use crate::{Error, Result};

/// The folder inside an output directory that marks it as ours.
pub const OURS: &str = "moepress";

/// Makes sure that an output directory is free to be written: absent, empty, or ours by its `moepress` folder.
///
/// # Errors
///
/// [`Error::NotOurs`] naming something else that lies there; an IO error.
pub fn claim(out: &Path) -> Result<()> {
    if !out.exists() || out.join(OURS).is_dir() {
        return Ok(());
    }
    match fs_err::read_dir(out)?.next() {
        None => Ok(()),
        Some(entry) => Err(Error::NotOurs { dir: out.to_owned(), entry: entry?.file_name().into() }),
    }
}

/// An empty folder to write one format into.
pub fn stage(out: &Path, format: &str) -> Result<PathBuf> {
    let stage = out.join(OURS).join(format!("stage-{format}"));
    if stage.exists() {
        fs_err::remove_dir_all(&stage)?;
    }
    fs_err::create_dir_all(&stage)?;
    Ok(stage)
}

/// Moves a finished folder to `target`, replacing what an earlier run left there.
pub fn beside(stage: &Path, target: &Path) -> Result<PathBuf> {
    if target.exists() {
        fs_err::remove_dir_all(target)?;
    }
    fs_err::rename(stage, target)?;
    sync_folder(target)?;
    Ok(target.to_owned())
}

/// Moves the files of a finished folder, and its folder of chat templates, to the top of `out`; weights and templates of an earlier
/// run that the new one does not replace go.
pub fn at_top(stage: &Path, out: &Path) -> Result<PathBuf> {
    let config = out.join("config.json");
    if config.exists() {
        fs_err::remove_file(&config)?;
    }
    let new = names(stage)?;
    for old in names(out)?.difference(&new) {
        let name = old.to_string_lossy();
        if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
            fs_err::remove_file(out.join(old))?;
        }
    }
    for name in new.iter().filter(|name| *name != "config.json") {
        fs_err::rename(stage.join(name), out.join(name))?;
    }
    let (templates, ours) = (stage.join(TEMPLATES), out.join(TEMPLATES));
    if ours.is_dir() {
        fs_err::remove_dir_all(&ours)?;
    }
    if templates.is_dir() {
        fs_err::rename(&templates, &ours)?;
    }
    sync_folder(&config)?;
    fs_err::rename(stage.join("config.json"), &config)?;
    sync_folder(&config)?;
    fs_err::remove_dir_all(stage)?;
    Ok(out.to_owned())
}

/// The plain files of a folder.
fn names(dir: &Path) -> Result<BTreeSet<OsString>> {
    let mut found = BTreeSet::new();
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            found.insert(entry.file_name());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_empty_directory_or_ours_is_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        claim(&out).unwrap();
        fs_err::create_dir(&out).unwrap();
        claim(&out).unwrap();
        fs_err::write(out.join("thesis.tex"), "x").unwrap();
        let said = claim(&out).unwrap_err().to_string();
        assert!(said.contains("thesis.tex") && said.contains("empty"), "{said}");
        fs_err::create_dir(out.join(OURS)).unwrap();
        claim(&out).unwrap();
    }

    #[test]
    fn a_new_model_takes_the_place_of_an_old_one_and_leaves_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        for (name, text) in
            [("config.json", "old"), ("model-00001-of-00002.safetensors", "old"), ("notes.md", "mine"), ("tokenizer.json", "old")]
        {
            fs_err::write(out.join(name), text).unwrap();
        }
        let stage = stage(out, "dense").unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs_err::write(stage.join(name), "new").unwrap();
        }
        for (dir, name) in [(&stage, "tool.jinja"), (&out.to_owned(), "old.jinja")] {
            fs_err::create_dir(dir.join(TEMPLATES)).unwrap();
            fs_err::write(dir.join(TEMPLATES).join(name), "x").unwrap();
        }
        at_top(&stage, out).unwrap();
        assert_eq!(names(&out.join(TEMPLATES)).unwrap().into_iter().collect::<Vec<_>>(), ["tool.jinja"]);
        let found: Vec<String> = names(out).unwrap().into_iter().map(|n| n.into_string().unwrap()).collect();
        assert_eq!(found, ["config.json", "model.safetensors", "notes.md", "tokenizer.json"]);
        assert_eq!(fs_err::read_to_string(out.join("tokenizer.json")).unwrap(), "new");
        assert!(!stage.exists());
    }
}

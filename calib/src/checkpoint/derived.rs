//! A checkpoint that stands on another: tensors under new names, a few of them replaced, no copy of the rest.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::shard::Shard;
use super::{Checkpoint, Fingerprint, TensorInfo, fp8, infos};
use crate::{Error, Result};

/// What makes a derived checkpoint of its base.
#[derive(Clone, Debug, PartialEq)]
pub struct Derived<'a> {
    /// Its `config.json`.
    pub config: String,
    /// Tensors that it takes over: the new name, the base's name. FP8 scales go with their tensor.
    pub renamed: BTreeMap<String, String>,
    /// Safetensors files of the tensors that are its own; they take the place of those taken over.
    pub changed: &'a [PathBuf],
    /// Names what was done: with the base it makes up the fingerprint.
    pub key: &'a str,
}

impl Checkpoint {
    /// Opens a checkpoint that stands on this one. The base's files are mapped again, nothing is copied.
    ///
    /// # Errors
    ///
    /// An IO error, [`Error::Json`], [`Problem`](super::Problem) of the file of changed tensors, or
    /// [`Problem::NoSuchTensor`](super::Problem::NoSuchTensor) for a base's name that it does not have.
    pub fn derive(&self, derived: &Derived<'_>) -> Result<Self> {
        let config = serde_json::from_str(&derived.config).map_err(|source| Error::Json { path: self.dir.join("config.json"), source })?;
        let mut shards = self.shards.iter().map(|shard| Shard::open(&shard.path)).collect::<Result<Vec<_>>>()?;
        let changed = derived.changed.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>>>()?;
        let own = infos(&changed);
        let mut print = Fingerprint::of("moepress derived checkpoint 1").field(self.fingerprint.as_bytes()).field(derived.key.as_bytes());
        print = print.field(derived.config.as_bytes()).number(derived.renamed.len() as u64);
        let mut tensors = Vec::new();
        for (new, old) in &derived.renamed {
            print = print.field(new.as_bytes()).field(old.as_bytes());
            if own.binary_search_by(|info| info.name.cmp(new)).is_ok() {
                continue;
            }
            tensors.push(TensorInfo { name: new.clone(), ..self.wanted(old)?.clone() });
            if let Some(scales) = self.info(&format!("{old}{}", fp8::SUFFIX)).filter(|info| fp8::weight_of(self, &info.name).is_some()) {
                tensors.push(TensorInfo { name: format!("{new}{}", fp8::SUFFIX), ..scales.clone() });
            }
        }
        tensors.extend(own.into_iter().map(|info| TensorInfo { shard: shards.len() + info.shard, ..info }));
        shards.extend(changed);
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let text = derived.config.clone();
        let fingerprint = print.finish();
        Ok(Self { dir: self.dir.clone(), config, text, fingerprint, shards, tensors, files: self.files.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Problem;
    use super::super::testing::{open, problem, vectors};
    use super::*;

    #[test]
    fn tensors_under_new_names_and_a_replaced_one() {
        let (dir, base) = open(&[("model.safetensors", &vectors(&[("e.0", &[1.0]), ("e.1", &[2.0, 3.0]), ("r", &[4.0, 5.0])]))]).unwrap();
        let changed = dir.path().join("changed");
        fs_err::write(&changed, vectors(&[("r", &[5.0])])).unwrap();
        let renamed = BTreeMap::from([("e.0", "e.1"), ("r", "r")].map(|(new, old)| (new.to_owned(), old.to_owned())));
        let with = |renamed, key| Derived { config: r#"{"n": 1}"#.into(), renamed, changed: std::slice::from_ref(&changed), key };
        let derived = base.derive(&with(renamed.clone(), "k")).unwrap();
        assert_eq!(derived.tensors().map(|info| info.name.as_str()).collect::<Vec<_>>(), ["e.0", "r"]);
        assert_eq!((derived.floats("e.0").unwrap(), derived.floats("r").unwrap()), (vec![2.0, 3.0], vec![5.0]));
        assert_eq!((derived.config()["n"].as_u64(), derived.config_text()), (Some(1), r#"{"n": 1}"#));
        let other = base.derive(&with(renamed, "l")).unwrap();
        assert!(derived.fingerprint() != other.fingerprint() && derived.fingerprint() != base.fingerprint());
        let absent = BTreeMap::from([("e.0".to_owned(), "e.9".to_owned())]);
        assert!(matches!(problem(base.derive(&with(absent, "k"))), Problem::NoSuchTensor { tensor } if tensor == "e.9"));
    }
}

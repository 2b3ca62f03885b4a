//! What an output directory was made from: the recipe as resolved, the model's fingerprint, the texts' hashes.
//!
//! Where the texts and the model lie takes no part in it: what they hold does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::corpus::Source;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::recipe::Recipe;
use crate::{Error, Result};

/// Version of the file's form.
const SCHEMA: u32 = 1;

/// What a directory was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Version of this file's form.
    schema: u32,
    /// The model's fingerprint.
    model: String,
    /// The recipe with every default written out, without `model` and `out`, its texts by name alone.
    recipe: Value,
    /// SHA-256 of every text, by its key and name: `calibrate.corpus: en.txt`.
    texts: BTreeMap<String, String>,
}

impl Identity {
    /// Of a recipe, whose paths can be opened from here, and a model.
    ///
    /// # Errors
    ///
    /// An IO error where a text cannot be read.
    pub fn of(recipe: &Recipe, model: &str) -> Result<Self> {
        let mut texts = BTreeMap::new();
        for (label, path) in texts_of(recipe) {
            texts.insert(label, calib::checkpoint::hash_bytes(&fs_err::read(path)?));
        }
        let mut plain = recipe.clone();
        (plain.model, plain.out) = (None, None);
        plain.each_path(|path| *path = name(path));
        let recipe = serde_json::to_value(plain).map_err(std::io::Error::from)?;
        Ok(Self { schema: SCHEMA, model: model.to_owned(), recipe, texts })
    }

    /// What an earlier run wrote; `None` where there is none.
    ///
    /// # Errors
    ///
    /// An IO error; [`Error::Json`] if the file is not one of these.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs_err::read(path)?;
        serde_json::from_slice(&text).map(Some).map_err(|source| Error::Json { path: path.to_owned(), source })
    }

    /// The file's text.
    ///
    /// # Errors
    ///
    /// None in practice: the type has nothing that JSON cannot hold.
    pub fn text(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self).map_err(std::io::Error::from)? + "\n")
    }

    /// Whether `now` measures the same: its calibration and table of costs are those that this one made, and something after them
    /// differs. Pruners, budgets, dropping, limits, runtime, exports and texts of evaluation are what may differ; without a table of costs, so is
    /// everything about the one width.
    pub fn measures_like(&self, now: &Self) -> bool {
        let measured = |identity: &Self| {
            let mut recipe = identity.recipe.clone();
            if let Some(recipe) = recipe.as_object_mut() {
                recipe.remove("export");
                recipe.remove("evaluate");
                // What is kept is kept by hash of what it is of.
                recipe.get_mut("calibrate").and_then(Value::as_object_mut).and_then(|calibrate| calibrate.remove("keep_moments"));
                // A reduced model is measured again in a stage of its own, so which one it is does not count.
                let reduced = ["prune", "merge"].iter().filter(|key| recipe.remove(**key).is_some()).count() > 0;
                // So is one whose input channels are scaled.
                let folded = recipe.remove("repair").is_some_and(|repair| repair.get("awq").is_some());
                recipe.insert("reduced".to_owned(), (reduced || folded).into());
                if let Some(allocate) = recipe.get_mut("allocate").and_then(Value::as_object_mut) {
                    // A budget needs the table of costs and one width does not, so which of the two it is counts.
                    let budgets = ["bits_per_weight", "bytes", "file"];
                    let mixed = budgets.iter().any(|key| allocate.contains_key(*key));
                    budgets
                        .iter()
                        .chain(&["runtime", "untied", "drop", "min_bits", "max_bits", "devices", "speed"])
                        .for_each(|key| _ = allocate.remove(*key));
                    if !mixed && allocate.get("grid").and_then(Value::as_str) != Some("best") {
                        allocate.clear();
                    }
                    allocate.insert("mixed".to_owned(), mixed.into());
                }
            }
            let texts: BTreeMap<&String, &String> = identity.texts.iter().filter(|(key, _)| key.starts_with("calibrate.")).collect();
            (recipe, texts.into_iter().map(|(k, v)| (k.clone(), v.clone())).collect::<Vec<_>>())
        };
        self != now && self.model == now.model && measured(self) == measured(now)
    }

    /// How `now` differs from this, in words; empty if it does not.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if self.model != now.model {
            found.push(format!("the model was {:.12}…, now it is {:.12}… (fingerprints)", self.model, now.model));
        }
        compare("", Some(&self.recipe), Some(&now.recipe), &mut found);
        for (text, hash) in &now.texts {
            if self.texts.get(text).is_some_and(|old| old != hash) {
                found.push(format!("the text has changed ({text})"));
            }
        }
        found
    }
}

/// Every text by the name that tells it apart: `calibrate.corpus: en.txt`, with its domain where the recipe names it.
fn texts_of(recipe: &Recipe) -> Vec<(String, &Path)> {
    let label = |source: &Source| match &source.name {
        Some(domain) => format!("calibrate.corpus: {domain} ({})", name(&source.path).display()),
        None => format!("calibrate.corpus: {}", name(&source.path).display()),
    };
    let corpus = recipe.calibrate.iter().flat_map(|c| &c.corpus).map(|source| (label(source), source.path.as_path()));
    let text = recipe.evaluate.iter().flat_map(|e| &e.text);
    corpus.chain(text.map(|path| (format!("evaluate.text: {}", name(path).display()), path.as_path()))).collect()
}

fn name(path: &Path) -> PathBuf {
    path.file_name().map(PathBuf::from).unwrap_or_default()
}

/// Notes every leaf in which two documents differ.
fn compare(key: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<String>) {
    if old == new {
        return;
    }
    if let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) {
        let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        for part in keys {
            let key = if key.is_empty() { part.clone() } else { format!("{key}.{part}") };
            compare(&key, a.get(part), b.get(part), found);
        }
        return;
    }
    let word = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), Value::to_string);
    found.push(format!("{key} was {}, now it is {}", word(old), word(new)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(dir: &Path, bits: u8, extra: &str) -> Identity {
        let text = format!(
            "schema = 1\nmodel = \"m\"\nout = \"o\"\n[calibrate]\ncorpus = [\"{}/en.txt\"]\n[quantize.rtn]\n[allocate]\nbits = {bits}\n{extra}",
            dir.display()
        );
        Identity::of(&toml::from_str(&text).unwrap(), "0123456789abcdef").unwrap()
    }

    #[test]
    fn it_is_the_same_wherever_the_texts_lie() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&a, &b] {
            fs_err::write(dir.path().join("en.txt"), "x").unwrap();
        }
        let (one, two) = (identity(a.path(), 4, ""), identity(b.path(), 4, ""));
        assert_eq!(one, two);
        assert_eq!(one.differences(&two), [""; 0]);
        let path = a.path().join("identity.json");
        fs_err::write(&path, one.text().unwrap()).unwrap();
        assert_eq!(Identity::read(&path).unwrap(), Some(one));
        assert_eq!(Identity::read(&a.path().join("absent")).unwrap(), None);
    }

    #[test]
    fn every_difference_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("en.txt"), "x").unwrap();
        let old = identity(dir.path(), 4, "");
        fs_err::write(dir.path().join("en.txt"), "y").unwrap();
        let mut new = identity(dir.path(), 3, "exclude = [\"*.0.*\"]\n[export.dense]\n");
        new.model = "fedcba9876543210".into();
        let expected = [
            "the model was 0123456789ab…, now it is fedcba987654… (fingerprints)",
            "allocate.bits was 4, now it is 3",
            "allocate.exclude was absent, now it is [\"*.0.*\"]",
            "export.dense was absent, now it is {}",
            "the text has changed (calibrate.corpus: en.txt)",
        ];
        assert_eq!(old.differences(&new), expected);
    }

    #[test]
    fn another_loss_is_refused_and_measures_something_else() {
        let of = |calibrate: &str| {
            let text = format!("schema = 1\n[calibrate]\ncorpus = []\n{calibrate}\n[quantize.gptq]\n[allocate]\nbits_per_weight = 3.0\n");
            Identity::of(&toml::from_str(&text).unwrap(), "m").unwrap()
        };
        let (own, text) = (of("end_loss.targets = \"own\""), of("end_loss.targets = \"text\""));
        assert_eq!(own.differences(&text), ["calibrate.end_loss.targets was \"own\", now it is \"text\""]);
        assert!(!own.measures_like(&text));
    }

    #[test]
    fn another_budget_measures_the_same_and_another_choice_does_not() {
        let of = |allocate: &str| {
            let text = format!("schema = 1\n[quantize.rtn]\n[allocate]\n{allocate}\n[export.dense]\n");
            Identity::of(&toml::from_str(&text).unwrap(), "m").unwrap()
        };
        let one = of("bits_per_weight = 3.0");
        assert!(one.measures_like(&of("bits_per_weight = 2.5")));
        assert!(one.measures_like(&of("bytes = \"1GB\"\nruntime = \"native\"\nmin_bits.attention = 4")));
        assert!(!one.measures_like(&one));
        for other in [
            "bits = 3",
            "bits_per_weight = 3.0\nchoices = [2, 3]",
            "bits_per_weight = 3.0\ngroup = 64",
            "bits_per_weight = 3.0\ncost = \"hessian\"",
        ] {
            assert!(!one.measures_like(&of(other)), "{other}");
        }
        let uniform = of("bits = 3\ngrid = \"asym\"");
        assert!(uniform.measures_like(&of("bits = 2\ngroup = 64\nexclude = [\"*.up\"]")));
        // The best grid is found in a table of costs.
        assert!(!uniform.measures_like(&of("bits = 3\ngrid = \"best\"")));
    }

    #[test]
    fn another_pruner_measures_the_same_and_none_does_not() {
        let of = |prune: &str| Identity::of(&toml::from_str(&format!("schema = 1\n{prune}\n[export.dense]\n")).unwrap(), "m").unwrap();
        assert!(of("[prune.reap]\nkeep = 0.5").measures_like(&of("[prune.easy_ep]\nexperts = 3")));
        assert!(!of("[prune.reap]\nkeep = 0.5").measures_like(&of("")));
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.json");
        fs_err::write(&path, "{}").unwrap();
        let said = Identity::read(&path).unwrap_err().to_string();
        assert!(said.contains("identity.json") && said.contains("--force"), "{said}");
    }
}

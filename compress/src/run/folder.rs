//! The folder `OUT/moepress`: what the output was made from, and one marker a finished stage.
//!
//! A stage is done when its marker has its name. To resume is to look; there is no other state.

use std::path::{Path, PathBuf};

use calib::stats::Store;
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use crate::allocate::sensitivity::Table;
use crate::export;
use crate::report::Cost;
use crate::tensorfile::write_whole;
use crate::{Error, Result};

/// The stages, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Measures the model on the calibration texts.
    Calibrate,
    /// Chooses the experts that stay, and measures the model of them.
    Reduce,
    /// Scales input channels or rotates the residual stream, and measures the model that this makes.
    Fold,
    /// Decides what becomes of every tensor.
    Plan,
    /// Chooses the codes of every matrix.
    Apply,
    /// Writes the formats asked for.
    Export,
    /// Judges the result.
    Evaluate,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [Self::Calibrate, Self::Reduce, Self::Fold, Self::Plan, Self::Apply, Self::Export, Self::Evaluate];

    /// Its name: of its marker, and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calibrate => "calibrate",
            Self::Reduce => "reduce",
            Self::Fold => "fold",
            Self::Plan => "plan",
            Self::Apply => "apply",
            Self::Export => "export",
            Self::Evaluate => "evaluate",
        }
    }
}

/// What happens to work that an earlier run left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Earlier {
    /// It goes on, if it is of the same recipe, model and texts.
    Resume,
    /// It is discarded.
    Discard,
}

/// The folder, held by this process alone.
#[derive(Debug)]
pub struct Folder {
    out: PathBuf,
    dir: PathBuf,
    /// Locked until it is dropped, or the process ends however it ends.
    _lock: fs_err::File,
}

impl Folder {
    /// Takes hold of an output directory for one recipe, model and texts.
    ///
    /// # Errors
    ///
    /// [`Error::NotOurs`] for a directory that holds something else; [`Error::Busy`] while another process works on it;
    /// [`Error::Differs`] where `earlier` is to be resumed and is not of the same recipe, model and texts.
    pub fn open(out: &Path, identity: &Identity, earlier: Earlier) -> Result<Self> {
        export::claim(out)?;
        let dir = out.join("moepress");
        fs_err::create_dir_all(&dir)?;
        let lock = fs_err::File::create(dir.join("lock"))?;
        if lock.file().try_lock().is_err() {
            return Err(Error::Busy { out: out.to_owned() });
        }
        let folder = Self { out: out.to_owned(), dir, _lock: lock };
        let path = folder.path("identity.json");
        if earlier == Earlier::Discard {
            let kept = folder.measures_like(identity) && folder.measured()?;
            folder.discard(if kept { Stage::Reduce } else { Stage::Calibrate })?;
        }
        match Identity::read(&path)? {
            // A run that was refused before it did anything (a text that is too short) holds nobody to its recipe.
            Some(old) if !folder.is_untouched()? => {
                let differences = old.differences(identity);
                if !differences.is_empty() {
                    return Err(Error::Differs { out: out.to_owned(), differences });
                }
            }
            _ => write_whole(&path, identity.text()?.as_bytes())?,
        }
        Ok(folder)
    }

    /// Whether no stage has left anything.
    fn is_untouched(&self) -> Result<bool> {
        for entry in fs_err::read_dir(&self.dir)? {
            if !["lock", "identity.json", "recipe.toml"].iter().any(|ours| entry.as_ref().is_ok_and(|entry| entry.file_name() == *ours)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `OUT/moepress`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn marker(&self, stage: Stage) -> PathBuf {
        self.path(&format!("{}.done", stage.name()))
    }

    /// What a stage cost; `None` while it is not done.
    ///
    /// # Errors
    ///
    /// An IO error; [`Error::Json`].
    pub fn done(&self, stage: Stage) -> Result<Option<Cost>> {
        let path = self.marker(stage);
        if !path.is_file() {
            return Ok(None);
        }
        serde_json::from_slice(&fs_err::read(&path)?).map(Some).map_err(|source| Error::Json { path, source })
    }

    /// Marks a stage as done.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn mark(&self, stage: Stage, cost: &Cost) -> Result<()> {
        let text = serde_json::to_string_pretty(cost).map_err(std::io::Error::from)? + "\n";
        write_whole(&self.marker(stage), text.as_bytes())
    }

    /// Takes back the markers of a stage and all after it.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn undo_from(&self, stage: Stage) -> Result<()> {
        for later in Stage::ALL.into_iter().rev().filter(|later| *later >= stage) {
            remove(&self.marker(later))?;
        }
        Ok(())
    }

    /// Whether the earlier run, if its identity can be read, measured what this one would.
    fn measures_like(&self, identity: &Identity) -> bool {
        matches!(Identity::read(&self.path("identity.json")), Ok(Some(old)) if old.measures_like(identity))
    }

    /// Whether calibration is done and left what this version of the program reads: the advice for what another one wrote is to
    /// measure again with --force.
    fn measured(&self) -> Result<bool> {
        let read = || -> Result<bool> {
            let store = Store::new(self.path("stats"));
            if let Some(manifest) = store.manifest()? {
                (0..manifest.layers).try_for_each(|layer| store.get(layer).map(drop))?;
            }
            let table = self.path("sensitivity.json");
            if table.is_file() {
                serde_json::from_slice::<Table>(&fs_err::read(&table)?).map_err(|source| calib::Error::own_json(table, source))?;
            }
            Ok(self.done(Stage::Calibrate)?.is_some())
        };
        match read() {
            Err(
                Error::Json { .. }
                | Error::Calib(calib::Error::OtherVersion { .. } | calib::Error::Json { .. } | calib::Error::Statistics { .. }),
            ) => Ok(false),
            other => other,
        }
    }

    /// Removes everything that a run writes from this stage on, but what else lies there. Markers go first and the identity last: whatever
    /// interrupts this leaves a directory that is still ours and counts as unfinished.
    fn discard(&self, from: Stage) -> Result<()> {
        self.undo_from(from)?;
        let calibrated = ["stats", "sensitivity.json", "means", "token_weights", "moments", "calibrate.done"];
        let kept = |path: &Path| from > Stage::Calibrate && calibrated.iter().any(|name| path.ends_with(name));
        remove(&self.out.join("config.json"))?;
        for entry in fs_err::read_dir(&self.out)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") || export::NAMES.contains(&name.as_str()) {
                remove(&path)?;
            }
        }
        for entry in fs_err::read_dir(&self.dir)? {
            let path = entry?.path();
            if !path.ends_with("lock") && !path.ends_with("identity.json") && !kept(&path) {
                remove(&path)?;
            }
        }
        remove(&self.path("identity.json"))
    }
}

/// Removes a file or a folder, if it is there.
pub(super) fn remove(path: &Path) -> Result<()> {
    if path.is_dir() {
        fs_err::remove_dir_all(path)?;
    } else if path.exists() {
        fs_err::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(bits: u8) -> Identity {
        let text = format!("schema = 1\n[quantize.rtn]\n[allocate]\nbits = {bits}\n");
        Identity::of(&toml::from_str(&text).unwrap(), "model").unwrap()
    }

    #[test]
    fn a_directory_goes_on_with_what_it_was_made_from() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let folder = Folder::open(&out, &identity(4), Earlier::Resume).unwrap();
        assert_eq!(folder.done(Stage::Plan).unwrap(), None);
        let cost = Cost { wall_seconds: 1.5, cpu_seconds: None, peak_bytes: Some(3) };
        folder.mark(Stage::Plan, &cost).unwrap();
        folder.mark(Stage::Apply, &cost).unwrap();
        let busy = Folder::open(&out, &identity(4), Earlier::Resume).unwrap_err().to_string();
        assert!(busy.contains("another moepress"), "{busy}");
        drop(folder);
        let folder = Folder::open(&out, &identity(4), Earlier::Resume).unwrap();
        assert_eq!(folder.done(Stage::Plan).unwrap(), Some(cost));
        folder.undo_from(Stage::Apply).unwrap();
        assert_eq!((folder.done(Stage::Plan).unwrap(), folder.done(Stage::Apply).unwrap()), (Some(cost), None));
        drop(folder);
        let said = Folder::open(&out, &identity(3), Earlier::Resume).unwrap_err().to_string();
        assert!(said.contains("allocate.bits was 4, now it is 3") && said.contains("--force"), "{said}");
    }

    #[test]
    fn a_directory_without_any_work_takes_another_recipe() {
        let dir = tempfile::tempdir().unwrap();
        drop(Folder::open(dir.path(), &identity(4), Earlier::Resume).unwrap());
        let folder = Folder::open(dir.path(), &identity(3), Earlier::Resume).unwrap();
        fs_err::create_dir(folder.path("stats")).unwrap();
        drop(folder);
        assert!(matches!(Folder::open(dir.path(), &identity(4), Earlier::Resume), Err(Error::Differs { .. })));
        Folder::open(dir.path(), &identity(3), Earlier::Resume).unwrap();
    }

    #[test]
    fn force_discards_what_a_run_wrote_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        drop(Folder::open(out, &identity(4), Earlier::Resume).unwrap());
        for name in ["config.json", "model.safetensors", "notes.md", "dense/config.json", "moepress/stats/a", "moepress/plan.done"] {
            let path = out.join(name);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, "x").unwrap();
        }
        drop(Folder::open(out, &identity(3), Earlier::Discard).unwrap());
        let mut left: Vec<String> = Vec::new();
        for dir in [out.to_owned(), out.join("moepress")] {
            left.extend(fs_err::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()));
        }
        left.sort();
        assert_eq!(left, ["identity.json", "lock", "moepress", "notes.md"]);
    }

    #[test]
    fn force_keeps_what_was_measured_for_another_budget() {
        let identity = |bits: f64| {
            let text = format!("schema = 1\n[quantize.rtn]\n[allocate]\nbits_per_weight = {bits:?}\n");
            Identity::of(&toml::from_str(&text).unwrap(), "model").unwrap()
        };
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path(), &identity(4.0), Earlier::Resume).unwrap();
        fs_err::write(folder.path("sensitivity.json"), serde_json::to_vec(&Table::default()).unwrap()).unwrap();
        fs_err::write(folder.path("plan.json"), "x").unwrap();
        let cost = Cost { wall_seconds: 1.5, cpu_seconds: None, peak_bytes: Some(3) };
        folder.mark(Stage::Calibrate, &cost).unwrap();
        folder.mark(Stage::Plan, &cost).unwrap();
        drop(folder);
        let folder = Folder::open(dir.path(), &identity(3.0), Earlier::Discard).unwrap();
        assert_eq!((folder.done(Stage::Calibrate).unwrap(), folder.done(Stage::Plan).unwrap()), (Some(cost), None));
        assert!(folder.path("sensitivity.json").exists() && !folder.path("plan.json").exists());
        drop(folder);
        // What another version of the program measured is of no use.
        let folder = Folder::open(dir.path(), &identity(3.0), Earlier::Resume).unwrap();
        let manifest = folder.path("stats/manifest.json");
        fs_err::create_dir(folder.path("stats")).unwrap();
        fs_err::write(&manifest, r#"{ "schema": 1, "model": "m", "layers": 0, "parts": [] }"#).unwrap();
        drop(folder);
        let folder = Folder::open(dir.path(), &identity(2.5), Earlier::Discard).unwrap();
        assert!(folder.done(Stage::Calibrate).unwrap().is_none() && !manifest.exists());
        folder.mark(Stage::Calibrate, &cost).unwrap();
        drop(folder);
        let folder = Folder::open(dir.path(), &identity(3.0), Earlier::Discard).unwrap();
        assert_eq!(folder.done(Stage::Calibrate).unwrap(), Some(cost));
        drop(folder);
        // The same again: then everything is to start over.
        let folder = Folder::open(dir.path(), &identity(3.0), Earlier::Discard).unwrap();
        assert_eq!(folder.done(Stage::Calibrate).unwrap(), None);
    }

    #[test]
    fn a_directory_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("thesis.tex"), "x").unwrap();
        assert!(matches!(Folder::open(dir.path(), &identity(4), Earlier::Discard), Err(Error::NotOurs { .. })));
    }
}

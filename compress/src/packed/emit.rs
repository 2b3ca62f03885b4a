//! Kernels for a native checkpoint: [`kernels::emit`] is asked, and its files are written whole.

use std::path::{Path, PathBuf};

use calib::Weights as _;
use calib::arch::{Part, Projection, Role};
use calib::checkpoint::Checkpoint;
use kernels::emit::{FileSet, Layer, Model};

use super::{ExpertRounding, Packed, is_packed};
use crate::export::Kernels;
use crate::{Error, Result};

/// The folder beside the weights.
const FOLDER: &str = "kernels";

/// What was emitted.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Emitted {
    /// Where.
    pub dir: PathBuf,
    /// How many files.
    pub files: usize,
    /// Widths that the kernels have, widest first.
    pub widths: Vec<u8>,
    /// Layers that they serve.
    pub layers: usize,
    /// What they are compiled for.
    pub compiled: Vec<String>,
    /// What is not compiled that could be, and why.
    pub not_compiled: Option<String>,
}

impl std::fmt::Display for Emitted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let widths = self.widths.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        write!(f, "{}: {} files for {} layers at {widths} bits, ", self.dir.display(), self.files, self.layers)?;
        match self.compiled.is_empty() {
            true => write!(f, "not compiled")?,
            false => write!(f, "compiled for {}", self.compiled.join(", "))?,
        }
        self.not_compiled.iter().try_for_each(|why| write!(f, " ({why})"))
    }
}

/// Writes the kernels of the native checkpoint in `out`, or in its folder `native`, into the folder `kernels` beside its weights.
///
/// # Errors
///
/// [`Error::Packed`] if there is no native checkpoint, or the folder is there already; [`Error::Codes`] for what the kernels have no form for,
/// or if they do not compile.
pub fn emit(out: &Path, knobs: &Kernels) -> Result<Emitted> {
    let beside = out.join("native");
    let dir = if beside.join("config.json").is_file() { beside } else { out.to_owned() };
    if dir.join(FOLDER).exists() {
        return Err(Error::Packed { dir, what: "it has a folder `kernels`, and nothing is overwritten; remove that first".to_owned() });
    }
    emit_beside(&dir, knobs)
}

/// Writes the kernels of the native checkpoint in `dir` beside its weights, in the place of those of earlier weights.
///
/// # Errors
///
/// As [`emit`], but for the folder that is there already.
pub fn emit_beside(dir: &Path, knobs: &Kernels) -> Result<Emitted> {
    let checkpoint = Checkpoint::open(dir)?;
    if !is_packed(checkpoint.config()) {
        let what = "there is nothing packed in it; kernels are emitted for what [export.native] writes".to_owned();
        return Err(Error::Packed { dir: dir.to_owned(), what });
    }
    let model = model(&Packed::new(checkpoint, ExpertRounding::None)?)?;
    let images = knobs.images(&kernels::emit::source(&model))?;
    let files = kernels::emit::emit(&model, &images)?;
    write(dir, &files)?;
    let compiled = images.compiled.into_iter().map(|image| image.arch).collect();
    let (dir, layers) = (dir.join(FOLDER), model.layers.len());
    Ok(Emitted { dir, files: files.len(), widths: model.widths(), layers, compiled, not_compiled: images.left_out })
}

/// Takes away kernels that were written for other weights; says whether there were any.
///
/// # Errors
///
/// An IO error.
pub fn remove(dir: &Path) -> Result<bool> {
    let stale = dir.join(FOLDER).join("manifest.json").is_file();
    if stale {
        fs_err::remove_dir_all(dir.join(FOLDER))?;
    }
    Ok(stale)
}

/// What the kernels depend on.
fn model(packed: &Packed) -> Result<Model> {
    let (spec, mut layers, mut router) = (packed.spec(), Vec::new(), None);
    for index in 0..spec.layers.len() {
        let Some(moe) = spec.moe(index) else { continue };
        let found = [Projection::Gate, Projection::Down].map(|projection| {
            // Any expert that is not dropped.
            let place = |expert| {
                let name = packed.layout().name(Role::Layer(index, Part::Expert(expert, projection)))?;
                packed.matrices.get(name)?.place.as_ref()
            };
            let arena = &(0..moe.experts).find_map(place)?.arena;
            Some((arena.clone(), packed.arenas.get(arena)?.clone()))
        });
        let [Some(gates), Some(down)] = found else { continue };
        let most = router.get_or_insert((moe.experts, moe.top_k, moe.inner));
        (most.0, most.1) = (most.0.max(moe.experts), most.1.max(moe.top_k));
        let constants = packed.constants.keys().filter(|(layer, _)| *layer == index).map(|(_, expert)| *expert).collect();
        layers.push(Layer { index, projections: [gates, down], constants });
    }
    let (experts, top_k, inner) = router.unwrap_or_default();
    Ok(Model { family: spec.model_type.clone(), sizes: [spec.hidden, inner], experts, top_k, layers })
}

/// Writes the files under a temporary name, then gives the folder its own.
fn write(dir: &Path, files: &FileSet) -> Result<()> {
    let temporary = dir.join(format!("{FOLDER}.part"));
    if temporary.exists() {
        fs_err::remove_dir_all(&temporary)?;
    }
    for (path, bytes) in files {
        let path = temporary.join(path);
        if let Some(parent) = path.parent() {
            fs_err::create_dir_all(parent)?;
        }
        fs_err::write(path, bytes)?;
    }
    remove(dir)?;
    Ok(fs_err::rename(temporary, dir.join(FOLDER))?)
}

//! What the solver chose, before any format: one file a decoder layer, each matrix as packed codes, scales and zeros.
//!
//! `DIR/solved/manifest.json` ties the folder to one plan; `DIR/solved/layer-00003.safetensors` holds the matrices of a layer. A
//! layer is done when its file has its final name. For a matrix `NAME` of `[out, in]` the file holds `NAME:codes` (the dense
//! bitstream of `kernels::pack`, a row at a time, `[out, words]`), `NAME:scales` in the type the plan says, `NAME:zeros` where the grid
//! has any (an integer a group as U8, a real one as F32), both `[out, groups]`, and `NAME:report`, the solver's account as JSON,
//! padded with spaces to a fixed length so that the header can be written before anything is solved.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::checkpoint::hash_bytes;
use calib::pass::Snapshots;
use kernels::{Group, QuantizedMatrix, ScaleType, Zeros, pack};
use serde::{Deserialize, Serialize};

use crate::plan::{Action, Plan, Quantize};
use crate::quantize::{Grid, Loss};
use crate::tensorfile::{Create, Declared, Element, Open, little_endian, scale_bytes, temporary, write_whole};
use crate::{Error, Result};

/// Version of the files' form.
const SCHEMA: u32 = 1;

/// Bytes set aside for one matrix's report.
const REPORT_BYTES: usize = 512;

/// The solver's account of one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// How the codes were chosen.
    pub by: By,
    /// What GPTQ says of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solved: Option<Account>,
    /// What learned refinement says of its layer; `solved` is then what the codes cost that it started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<Judged>,
}

/// How learned refinement changed a layer, by calibration samples that no step saw.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judged {
    /// Mean squared error of the layer's output before; of steps against the end of the model, its divergence a token in nats.
    pub before: f64,
    /// With the codes that were kept; never above `before`.
    pub after: f64,
    /// The step that they are from; 0: those before.
    pub step: u32,
}

/// What a solver says of one matrix that it solved against tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// What the codes cost, `tr(ΔW · H · ΔWᵀ)`.
    pub loss: Loss,
    /// Damping that the factorization took, as a share of the mean diagonal.
    pub damping: f64,
    /// Input channels that no token excited: they keep their rounded weights.
    pub dead_channels: usize,
}

/// What became of a router that was fitted to its layer's disturbed inputs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refit {
    /// Calibration tokens.
    pub tokens: u64,
    /// Of the experts that the original model chooses, the share that is chosen behind compressed layers by the router as it was.
    pub overlap_before: f64,
    /// The same with the fitted router.
    pub overlap_after: f64,
}

/// How the codes of one matrix were chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Rounded to nearest, as the plan says.
    Rtn,
    /// HQQ's codes and zero points.
    Hqq,
    /// GPTQ's codes.
    Gptq,
    /// GPTQ ran, but plain rounding came out better on the same tokens.
    GptqKeptRtn,
    /// GPTQ's codes after a descent.
    GptqDescent,
    /// Learned from GPTQ's codes, with or without a descent between.
    GptqLearned,
    /// The codes of MC-MoE's variant of GPTQ.
    Pmq,
    /// Rounded, because behind compressed layers no token reached its expert any more.
    RtnUnreached,
}

/// Says which plan the folder belongs to.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    schema: u32,
    plan: String,
    model: String,
    layers: usize,
}

/// Hash of everything a plan says, in hex.
///
/// # Errors
///
/// None in practice: a plan is plain data.
pub fn plan_hash(plan: &Plan) -> Result<String> {
    let json = serde_json::to_vec(plan).map_err(|source| Error::Json { path: "plan.json".into(), source })?;
    Ok(hash_bytes(&json))
}

/// The folder of solved layers: one plan's, finished or not.
pub struct Solved {
    dir: PathBuf,
    plan: String,
    layers: usize,
}

impl Solved {
    /// Opens or begins the folder `dir/solved` for one plan.
    ///
    /// # Errors
    ///
    /// [`Error::OtherPlan`] if it holds another plan's work; an IO error.
    pub fn begin(dir: &Path, plan: &Plan, layers: usize) -> Result<Self> {
        let dir = dir.join("solved");
        let wanted = Manifest { schema: SCHEMA, plan: plan_hash(plan)?, model: plan.model.clone(), layers };
        let path = dir.join("manifest.json");
        if path.exists() {
            check_manifest(&path, &wanted)?;
        } else {
            fs_err::create_dir_all(&dir)?;
            for stray in fs_err::read_dir(&dir)? {
                let stray = stray?.path();
                // A run that was killed while it wrote the manifest leaves it under its temporary name.
                if stray != temporary(&path) {
                    return Err(Error::Stage { path: stray, what: "it stands in a folder without a manifest".into() });
                }
            }
            let text = serde_json::to_string_pretty(&wanted).map_err(|source| Error::Json { path: path.clone(), source })?;
            write_whole(&path, (text + "\n").as_bytes())?;
        }
        Ok(Self { dir, plan: wanted.plan, layers })
    }

    /// Opens a folder in which every layer is done.
    ///
    /// # Errors
    ///
    /// [`Error::OtherPlan`]; [`Error::Unsolved`] naming the first layer that is missing; an IO error.
    pub fn finished(dir: &Path, plan: &Plan, layers: usize) -> Result<Self> {
        let solved = Self { dir: dir.join("solved"), plan: plan_hash(plan)?, layers };
        let wanted = Manifest { schema: SCHEMA, plan: solved.plan.clone(), model: plan.model.clone(), layers };
        check_manifest(&solved.dir.join("manifest.json"), &wanted)?;
        match (0..layers).find(|&layer| !solved.path(layer).exists()) {
            Some(layer) => Err(Error::Unsolved { path: solved.path(layer), layer, layers }),
            None => Ok(solved),
        }
    }

    /// Layers that are done, counted from the first.
    pub fn done(&self) -> usize {
        (0..self.layers).take_while(|&layer| self.path(layer).exists()).count()
    }

    /// The file of one layer.
    pub fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:05}.safetensors"))
    }

    /// Where the hidden states between two layers are kept until all of them are done.
    pub fn snapshots(&self) -> Snapshots {
        self.snapshots_of("hidden.safetensors")
    }

    /// The same for other hidden states, in a file of this name.
    pub fn snapshots_of(&self, name: &str) -> Snapshots {
        Snapshots::new(self.dir.join(name), BTreeMap::from([("plan".to_owned(), self.plan.clone())]))
    }

    /// Begins the file of one layer. `matrices`: name, `[out, in]` and what the plan says; `router`: one that is to be fitted, `[experts,
    /// hidden]`.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn create(
        &self,
        layer: usize,
        matrices: &[(&str, [usize; 2], &Quantize)],
        router: Option<(&str, [usize; 2])>,
    ) -> Result<LayerFile> {
        let mut declared: Vec<Declared> = matrices.iter().flat_map(|&(name, shape, how)| declare(name, shape, how)).collect();
        if let Some((name, [experts, hidden])) = router {
            declared.push(Declared { name: format!("{name}:values"), dtype: Element::F32, shape: vec![experts, hidden] });
            declared.push(Declared { name: format!("{name}:report"), dtype: Element::U8, shape: vec![REPORT_BYTES] });
        }
        let entries = [("moepress", "solved".to_owned()), ("plan", self.plan.clone()), ("layer", layer.to_string())];
        let metadata = entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Ok(LayerFile(Create::new(&self.path(layer), declared, &metadata)?))
    }

    /// Where layers lie that were refined together after all were done.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn ended(&self) -> Result<Self> {
        let dir = self.dir.join("ended");
        fs_err::create_dir_all(&dir)?;
        Ok(Self { dir, plan: self.plan.clone(), layers: self.layers })
    }

    /// Says of [`Solved::ended`] that it is whole: its layers count from now on.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn finish_ended(&self, judged: &Judged) -> Result<()> {
        let path = self.dir.join("judged.json");
        let text = serde_json::to_string(judged).map_err(|source| Error::Json { path: path.clone(), source })?;
        write_whole(&path, (text + "\n").as_bytes())
    }

    /// What the steps came to that all layers took together, if they are done.
    ///
    /// # Errors
    ///
    /// [`Error::Json`], an IO error.
    pub fn judged(&self) -> Result<Option<Judged>> {
        let path = self.dir.join("ended/judged.json");
        if !path.is_file() {
            return Ok(None);
        }
        serde_json::from_slice(&fs_err::read(&path)?).map(Some).map_err(|source| Error::Json { path, source })
    }

    /// Opens the file of one layer that is done, as all layers' last refinement left it.
    ///
    /// # Errors
    ///
    /// As [`Solved::open_layer`].
    pub fn open(&self, layer: usize) -> Result<LayerRead> {
        if self.dir.join("ended/judged.json").is_file() { self.ended()?.open_layer(layer) } else { self.open_layer(layer) }
    }

    /// Opens the file of one layer that is done.
    ///
    /// # Errors
    ///
    /// [`Error::OtherPlan`] if it was made for another plan; [`Error::Stage`] if it is damaged; an IO error.
    pub fn open_layer(&self, layer: usize) -> Result<LayerRead> {
        let path = self.path(layer);
        let file = Open::new(&path)?;
        if file.metadata("plan") != Some(&self.plan) {
            let found = file.metadata("plan").unwrap_or("none").to_owned();
            return Err(Error::OtherPlan { path, found, wanted: self.plan.clone() });
        }
        if file.metadata("moepress") != Some("solved") || file.metadata("layer") != Some(&layer.to_string()) {
            return Err(Error::Stage { path, what: format!("it does not hold the solved matrices of layer {layer}") });
        }
        Ok(LayerRead { file, path })
    }
}

fn check_manifest(path: &Path, wanted: &Manifest) -> Result<()> {
    let found: Manifest = serde_json::from_slice(&fs_err::read(path)?).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    if found == *wanted {
        return Ok(());
    }
    Err(Error::OtherPlan { path: path.to_owned(), found: found.plan, wanted: wanted.plan.clone() })
}

fn groups(inputs: usize, group: Group) -> usize {
    inputs / group.len(inputs).max(1)
}

fn declare(name: &str, [outputs, inputs]: [usize; 2], how: &Quantize) -> Vec<Declared> {
    let part = |part: &str, dtype, shape| Declared { name: format!("{name}:{part}"), dtype, shape };
    let by_group = vec![outputs, groups(inputs, how.group)];
    let mut parts = vec![
        part("codes", Element::U32, vec![outputs, pack::words(inputs, how.bits)]),
        part("scales", scale_element(how.scale), by_group.clone()),
        part("report", Element::U8, vec![REPORT_BYTES]),
    ];
    match how.grid {
        Grid::Sym | Grid::Half => {}
        Grid::Asym => parts.push(part("zeros", Element::U8, by_group)),
        Grid::Offset => parts.push(part("zeros", Element::F32, by_group)),
    }
    parts
}

fn scale_element(scale: ScaleType) -> Element {
    match scale {
        ScaleType::Bf16 => Element::Bf16,
        ScaleType::F16 => Element::F16,
        ScaleType::F32 => Element::F32,
    }
}

fn scales_of(bytes: &[u8], stored: ScaleType) -> Vec<f32> {
    match stored {
        ScaleType::Bf16 => bytes.as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        ScaleType::F16 => bytes.as_chunks().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f32()).collect(),
        ScaleType::F32 => floats(bytes),
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// The file of a layer being solved; matrices may be put from several threads.
pub struct LayerFile(Create);

impl LayerFile {
    /// Writes one matrix and what its solver says.
    ///
    /// # Errors
    ///
    /// [`Error::Kernels`] if the matrix contradicts itself; [`Error::Stage`] if it is not of the form declared; an IO error.
    pub fn put(&self, name: &str, matrix: &QuantizedMatrix, report: &Report) -> Result<()> {
        matrix.check().map_err(|source| Error::Matrix { name: name.to_owned(), source })?;
        let words = pack::pack_rows(&matrix.codes, [matrix.outputs, matrix.inputs], matrix.bits)
            .map_err(|source| Error::Matrix { name: name.to_owned(), source })?;
        self.0.put(&format!("{name}:codes"), &little_endian(words))?;
        self.0.put(&format!("{name}:scales"), &scale_bytes(&matrix.scales, matrix.scale_type))?;
        match &matrix.zeros {
            Zeros::Sym | Zeros::Half => {}
            Zeros::Asym(zeros) => self.0.put(&format!("{name}:zeros"), zeros)?,
            Zeros::Offset(zeros) => self.0.put(&format!("{name}:zeros"), &scale_bytes(zeros, ScaleType::F32))?,
        }
        let mut text = serde_json::to_vec(report).map_err(|source| Error::Json { path: name.into(), source })?;
        text.resize(text.len().max(REPORT_BYTES), b' ');
        self.0.put(&format!("{name}:report"), &text)
    }

    /// Writes a router `[experts, hidden]`, row by row, and what became of it.
    ///
    /// # Errors
    ///
    /// As [`LayerFile::put`].
    pub fn put_router(&self, name: &str, values: &[f32], refit: &Refit) -> Result<()> {
        self.0.put(&format!("{name}:values"), &scale_bytes(values, ScaleType::F32))?;
        let mut text = serde_json::to_vec(refit).map_err(|source| Error::Json { path: name.into(), source })?;
        text.resize(text.len().max(REPORT_BYTES), b' ');
        self.0.put(&format!("{name}:report"), &text)
    }

    /// Gives the file its final name: the layer is done.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if a matrix is missing; an IO error.
    pub fn finish(self) -> Result<()> {
        self.0.finish()
    }
}

/// The file of a layer that is done.
pub struct LayerRead {
    file: Open,
    path: PathBuf,
}

impl LayerRead {
    /// One matrix.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if it is not in the file or not of the form that the plan says; an IO error.
    pub fn matrix(&self, name: &str, [outputs, inputs]: [usize; 2], how: &Quantize) -> Result<QuantizedMatrix> {
        for Declared { name, dtype, shape } in declare(name, [outputs, inputs], how) {
            let entry = self.file.entry(&name)?;
            if entry.dtype != dtype || entry.shape != shape {
                let what = format!("{name} is {:?} {:?}, but the plan makes it {dtype:?} {shape:?}", entry.dtype, entry.shape);
                return Err(Error::Stage { path: self.path.clone(), what });
            }
        }
        let words = self.words(name)?;
        let codes =
            pack::unpack_rows(&words, [outputs, inputs], how.bits).map_err(|source| Error::Matrix { name: name.to_owned(), source })?;
        drop(words);
        let zeros = |name: &str| self.file.bytes(&format!("{name}:zeros"));
        let matrix = QuantizedMatrix {
            outputs,
            inputs,
            bits: how.bits,
            group: how.group,
            scale_type: how.scale,
            codes,
            scales: scales_of(&self.file.bytes(&format!("{name}:scales"))?, how.scale),
            zeros: match how.grid {
                Grid::Sym => Zeros::Sym,
                Grid::Half => Zeros::Half,
                Grid::Asym => Zeros::Asym(zeros(name)?),
                Grid::Offset => Zeros::Offset(floats(&zeros(name)?)),
            },
        };
        matrix.check().map_err(|source| Error::Matrix { name: name.to_owned(), source })?;
        Ok(matrix)
    }

    /// A router that was fitted, row by row, and what became of it.
    ///
    /// # Errors
    ///
    /// As [`LayerRead::report`].
    pub fn router(&self, name: &str) -> Result<(Vec<f32>, Refit)> {
        let values = floats(&self.file.bytes(&format!("{name}:values"))?);
        let refit = serde_json::from_slice(&self.file.bytes(&format!("{name}:report"))?);
        Ok((values, refit.map_err(|source| Error::Json { path: self.path.clone(), source })?))
    }

    fn words(&self, name: &str) -> Result<Vec<u32>> {
        let bytes = self.file.bytes(&format!("{name}:codes"))?;
        Ok(bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect())
    }

    /// What the solver said of one matrix.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if it is not in the file; [`Error::Json`]; an IO error.
    pub fn report(&self, name: &str) -> Result<Report> {
        serde_json::from_slice(&self.file.bytes(&format!("{name}:report"))?)
            .map_err(|source| Error::Json { path: self.path.clone(), source })
    }
}

/// The matrices that a plan quantizes, by name.
pub fn quantized(plan: &Plan) -> impl Iterator<Item = (&str, &Quantize)> {
    plan.tensors.iter().filter_map(|(name, action)| match action {
        Action::Quantize(how) => Some((name.as_str(), how)),
        Action::Keep | Action::Refit | Action::Substitute(_) | Action::Drop { .. } => None,
    })
}

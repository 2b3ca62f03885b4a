//! The checks that every written output goes through before it gets its place: each stands for a failure seen in the field.
//!
//! The folder is opened anew and read as a loader would: config groups against tensor names, widths, scales, what must be there and
//! what must not, untouched tensors byte for byte, the index, the files beside the weights, and values of some matrices against what
//! the solver chose. All problems are reported at once, by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use calib::Model;
use calib::arch::{Part, Projection, Role};
use calib::checkpoint::Checkpoint;
use kernels::{QuantizedMatrix, Zeros, bounds};
use serde_json::Value;

use super::{Constant, Contents, Form, Format, Tensor};
use crate::packed::{ExpertRounding, Packed, is_packed, streams};
use crate::{Error, Result};

/// Matrices whose values are compared, spread evenly over the model; a small model is compared whole.
const COMPARED: usize = 64;

/// Holds a written folder to the list; it has not been moved to its place yet.
///
/// # Errors
///
/// [`Error::Invalid`] with every problem found; an IO error.
pub fn check(contents: &Contents<'_>, format: &dyn Format, dir: &Path) -> Result<()> {
    let mut problems = Vec::new();
    files(contents, dir, &mut problems)?;
    index(dir, &mut problems)?;
    // What cannot even be opened is one problem, said by the reader.
    let opened = Checkpoint::open(dir).map_err(Error::from).and_then(|checkpoint| {
        kept(contents, &checkpoint, &mut problems)?;
        stored(contents, format, &checkpoint, &mut problems)?;
        if is_packed(checkpoint.config()) {
            packed(contents, checkpoint, &mut problems)
        } else {
            plain(contents, checkpoint, &mut problems)
        }
    });
    if let Err(error) = opened {
        problems.push(error.to_string());
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Invalid { dir: dir.to_owned(), problems }) }
}

/// Everything beside the weights was copied, and the config is the source's but for its quantization section.
fn files(contents: &Contents<'_>, dir: &Path, problems: &mut Vec<String>) -> Result<()> {
    for file in &contents.files {
        let copied = file.file_name().map(|name| dir.join(name));
        if !copied.is_some_and(|copied| copied.is_file()) {
            problems.push(format!("{} was not copied", file.display()));
        }
    }
    let sections = ["quantization_config", "compression_config"];
    let without = |text: &str| {
        let mut value: BTreeMap<String, Value> = serde_json::from_str(text).ok()?;
        sections.iter().for_each(|key| _ = value.remove(*key));
        Some(value)
    };
    let written = fs_err::read_to_string(dir.join("config.json"))?;
    if without(&written).is_none_or(|config| Some(config) != without(&contents.config)) {
        problems.push("config.json differs from the source's in more than its quantization section".to_owned());
    }
    Ok(())
}

/// Every header says `pt`; an index lists every tensor, where it lies, and their bytes in total.
fn index(dir: &Path, problems: &mut Vec<String>) -> Result<()> {
    let mut found = BTreeMap::new();
    let mut total = 0_u64;
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let header = header(&path)?;
        if header.get("__metadata__").and_then(|m| m.get("format")).and_then(Value::as_str) != Some("pt") {
            problems.push(format!("{name}: its header does not say format = pt"));
        }
        for (tensor, entry) in header.into_iter().filter(|(key, _)| key != "__metadata__") {
            let offset = |at: usize| entry.get("data_offsets").and_then(|o| o.get(at)).and_then(Value::as_u64).unwrap_or_default();
            total += offset(1) - offset(0).min(offset(1));
            found.insert(tensor, name.clone());
        }
    }
    let path = dir.join("model.safetensors.index.json");
    if !path.is_file() {
        let shards: BTreeSet<&String> = found.values().collect();
        if shards.into_iter().any(|shard| shard != "model.safetensors") {
            problems.push("several shards, but no model.safetensors.index.json".to_owned());
        }
        return Ok(());
    }
    let index: Value = serde_json::from_slice(&fs_err::read(&path)?).map_err(|source| Error::Json { path, source })?;
    let listed: Option<BTreeMap<String, String>> = index.get("weight_map").and_then(|map| serde_json::from_value(map.clone()).ok());
    if listed.as_ref() != Some(&found) {
        problems.push("the index does not list the tensors where they lie".to_owned());
    }
    if index.get("metadata").and_then(|m| m.get("total_size")).and_then(Value::as_u64) != Some(total) {
        problems.push(format!("the index does not say total_size = {total}"));
    }
    Ok(())
}

fn header(path: &Path) -> Result<serde_json::Map<String, Value>> {
    use std::io::Read;
    let mut file = fs_err::File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut text = Vec::new();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut text)?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// What was carried over is there, byte for byte.
fn kept(contents: &Contents<'_>, checkpoint: &Checkpoint, problems: &mut Vec<String>) -> Result<()> {
    for tensor in &contents.tensors {
        let Form::Kept(dtype) = tensor.form else { continue };
        let fits = checkpoint.info(&tensor.name).is_some_and(|info| info.dtype == dtype && info.shape == tensor.shape);
        if !fits || checkpoint.bytes(&tensor.name)? != contents.source.kept(&tensor.name)?.as_ref() {
            problems.push(format!("{} was to be carried over as it is, and was not", tensor.name));
        }
    }
    Ok(())
}

/// The folder holds exactly the tensors declared: no `.weight` left over beside its packed form, none missing.
fn stored(contents: &Contents<'_>, format: &dyn Format, checkpoint: &Checkpoint, problems: &mut Vec<String>) -> Result<()> {
    let mut wanted = BTreeMap::new();
    for tensor in &contents.tensors {
        if let Form::Kept(dtype) = tensor.form {
            wanted.insert(tensor.name.clone(), (dtype, tensor.shape.clone()));
        }
    }
    for group in format.groups(&contents.tensors) {
        wanted.extend(format.declare(&group)?.into_iter().map(|d| (d.name, (d.dtype, d.shape))));
    }
    for info in checkpoint.tensors() {
        match wanted.remove(&info.name) {
            None => problems.push(format!("{} should not be there", info.name)),
            Some((dtype, shape)) if dtype != info.dtype || shape != info.shape => {
                let [found, meant] = [(info.dtype, &info.shape), (dtype, &shape)].map(|(d, s)| format!("{} {s:?}", d.name()));
                problems.push(format!("{} is {found}, but should be {meant}", info.name));
            }
            Some(_) => {}
        }
    }
    problems.extend(wanted.into_keys().map(|name| format!("{name} is missing")));
    Ok(())
}

/// Config groups against names, then the values of some matrices.
fn packed(contents: &Contents<'_>, checkpoint: Checkpoint, problems: &mut Vec<String>) -> Result<()> {
    groups(contents, &checkpoint, problems);
    // Opening holds widths, scale shapes and zeros of every matrix to the config, and every name to the family.
    let packed = Packed::new(checkpoint, ExpertRounding::None)?;
    for tensor in quantized(contents) {
        let name = format!("{}.weight_scale", tensor.module());
        // Scales in arenas are held to that when they are unpacked.
        if packed.checkpoint().info(&name).is_some()
            && packed.checkpoint().floats(&name)?.iter().any(|&scale| !(scale.is_finite() && scale > 0.0))
        {
            problems.push(format!("{name} holds a scale that is not a positive number"));
        }
    }
    for tensor in compared(contents) {
        let solved = contents.source.quantized(&tensor.name)?;
        // The same codes, scales and zeros are the same values to the last bit; real zeros are stored as offsets, so their values are compared.
        let read = packed.quantized(&tensor.name)?;
        let same = match (&read, &solved.zeros) {
            (Some(read), Zeros::Offset(_)) => read.codes == solved.codes && read.scales == solved.scales && near(read, &solved),
            (read, _) => read.as_ref() == Some(&solved),
        };
        if !same {
            problems.push(format!("{} does not read back as it was solved", tensor.name));
        }
    }
    for tensor in contents.tensors.iter().filter(|tensor| matches!(tensor.constant(), Some(Constant::Mean(_)))) {
        let Role::Layer(layer, Part::Expert(expert, Projection::Down)) = tensor.role else { continue };
        if packed.constants().get(&(layer, expert)).map(|constant| &constant.output) != Some(&contents.source.mean(&tensor.name)?) {
            problems.push(format!("{}: the mean output of its expert does not read back as it was measured", tensor.name));
        }
    }
    Ok(())
}

/// Whether two matrices have the same values but for a rounding of their zeros in f32.
fn near(a: &QuantizedMatrix, b: &QuantizedMatrix) -> bool {
    let [a, b] = [a, b].map(QuantizedMatrix::dequantize);
    let (apart, whole) =
        a.iter().zip(&b).fold((0.0, 0.0), |(apart, whole), (a, b)| (apart + f64::from(a - b).powi(2), whole + f64::from(*b).powi(2)));
    apart <= whole * bounds::OFFSET.powi(2)
}

/// The values of some matrices: the solver's, rounded to bf16.
fn plain(contents: &Contents<'_>, checkpoint: Checkpoint, problems: &mut Vec<String>) -> Result<()> {
    // Opening holds every name and shape to the family.
    let model = Model::from_checkpoint(checkpoint)?;
    for tensor in compared(contents) {
        let solved = contents.source.quantized(&tensor.name)?.dequantize();
        let read = model.checkpoint().floats(&tensor.name)?;
        let near = |(&w, &r): (&f32, &f32)| half::bf16::from_f32(w).to_f32() == r;
        if solved.len() != read.len() || !solved.iter().zip(&read).all(near) {
            problems.push(format!("{} does not read back as it was solved", tensor.name));
        }
    }
    Ok(())
}

/// Every quantized module matches one target, every other module none; every target matches something.
fn groups(contents: &Contents<'_>, checkpoint: &Checkpoint, problems: &mut Vec<String>) {
    let groups = streams(checkpoint.config()).and_then(|section| section.get("config_groups")).and_then(Value::as_object);
    let listed = |group: &Value| group.get("targets").and_then(Value::as_array).cloned().unwrap_or_default();
    let targets: Vec<Value> = groups.into_iter().flat_map(|groups| groups.values().flat_map(listed)).collect();
    let mut expressions = Vec::new();
    for target in targets.iter().filter_map(Value::as_str) {
        match target.strip_prefix("re:").map(regex::Regex::new) {
            Some(Ok(regex)) => expressions.push((target, Some(regex), 0)),
            Some(Err(error)) => problems.push(format!("the target {target} is no regular expression: {error}")),
            None => expressions.push((target, None, 0)),
        }
    }
    // A bias stands beside its packed weight, in the same module.
    let mut modules: BTreeMap<&str, bool> = BTreeMap::new();
    for tensor in &contents.tensors {
        let streamed = || checkpoint.info(&format!("{}.weight_packed", tensor.module())).is_some();
        *modules.entry(tensor.module()).or_default() |= tensor.scheme().is_some() && streamed();
    }
    for (module, quantized) in modules {
        let mut matched = 0;
        for (target, regex, hits) in &mut expressions {
            if regex.as_ref().map_or(*target == module, |regex| regex.find(module).is_some_and(|found| found.start() == 0)) {
                matched += 1;
                *hits += 1;
            }
        }
        let wanted = usize::from(quantized);
        if matched != wanted {
            problems.push(format!("{module} matches {matched} targets of config_groups, not {wanted}"));
        }
    }
    problems.extend(expressions.iter().filter(|(_, _, hits)| *hits == 0).map(|(t, ..)| format!("the target {t} matches nothing")));
}

fn quantized<'a>(contents: &'a Contents<'_>) -> impl Iterator<Item = &'a Tensor> {
    contents.tensors.iter().filter(|tensor| tensor.scheme().is_some())
}

fn compared<'a>(contents: &'a Contents<'_>) -> impl Iterator<Item = &'a Tensor> {
    let step = quantized(contents).count().div_ceil(COMPARED).max(1);
    quantized(contents).step_by(step)
}

//! Arenas of a native checkpoint, and experts that multiply rows from their packed codes or put out a constant.

use std::collections::{BTreeMap, BTreeSet};

use calib::Applied;
use calib::arch::{Part, Projection, Resolved, Role, expected};
use calib::checkpoint::Checkpoint;
use kernels::cpu::{Linear, Mode};
use kernels::layout::{self, Arena, Form, Grid, Rows};
use serde::Deserialize;

use super::{Packed, Stored, ZeroPoints, section, wrong};
use crate::Result;
use crate::constants::Constant;
use crate::export::native::{METHOD, Output, Said as Constants};

/// Where a matrix lies among the arenas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The arena, without `.arena`.
    pub(super) arena: String,
    /// The expert; 0 where the arena holds one matrix.
    pub(super) expert: u32,
    /// Which of the packed matrices: 1 is up beside gate.
    pub(super) which: usize,
}

/// One entry of `arenas` in `config.json`.
#[derive(Deserialize)]
struct Said {
    of: String,
    shape: [usize; 2],
    count: usize,
    gate_up: bool,
}

/// What a native checkpoint holds beside what compressed-tensors packs.
#[derive(Default)]
pub(super) struct Held {
    /// The arenas with their tables.
    pub arenas: BTreeMap<String, Arena>,
    /// The matrices in them, by logical name.
    pub matrices: BTreeMap<String, Stored>,
    /// What dropped experts put out, by layer and expert.
    pub constants: BTreeMap<(usize, usize), Constant>,
    /// Their matrices: logical names and shapes.
    pub gone: Vec<(String, Vec<usize>)>,
    /// The tensors that the constants were read from.
    pub means: BTreeSet<String>,
}

/// Reads what `config.json` names.
pub(super) fn read(checkpoint: &Checkpoint, resolved: &Resolved) -> Result<Held> {
    let refuse = |what: String| wrong(checkpoint, what);
    let mut held = Held::default();
    let Some(section) = section(checkpoint.config()).filter(|s| s.get("quant_method").and_then(|m| m.as_str()) == Some(METHOD)) else {
        return Ok(held);
    };
    let (name, version) = (section.get("layout").and_then(|l| l.as_str()), section.get("version").and_then(serde_json::Value::as_u64));
    if (name, version) != (Some(layout::NAME), Some(1)) {
        return Err(refuse(format!("its layout is {name:?}, version {version:?}; this build reads {} version 1", layout::NAME)));
    }
    let said: BTreeMap<String, Said> = serde_json::from_value(section.get("arenas").cloned().unwrap_or_default())
        .map_err(|error| refuse(format!("quantization_config.arenas: {error}")))?;
    for (name, said) in &said {
        let bytes = checkpoint.info(&format!("{name}.arena")).map_or(0, |info| (info.bytes.end - info.bytes.start) as usize);
        let arena =
            Arena::read(checkpoint.bytes(&format!("{name}.table"))?, bytes, said.shape).map_err(|e| refuse(format!("{name}: {e}")))?;
        let rows = if said.gate_up { Rows::GateUp } else { Rows::Plain };
        if arena.entries.len() != said.count || arena.entries.iter().any(|entry| entry.form.rows != rows) {
            return Err(refuse(format!("{name}: its table does not hold {} entries as quantization_config says", said.count)));
        }
        if said.of == "matrix" {
            add(&mut held.matrices, &arena, format!("{name}.weight"), Place { arena: name.clone(), expert: 0, which: 0 });
        }
        held.arenas.insert(name.clone(), arena);
    }
    let constants: BTreeMap<String, Constants> = serde_json::from_value(section.get("constants").cloned().unwrap_or(serde_json::json!({})))
        .map_err(|error| refuse(format!("quantization_config.constants: {error}")))?;
    let gone = |block: &str, expert: usize| constants.get(block).is_some_and(|said| said.experts.contains(&expert));
    let mut layers: BTreeMap<String, usize> = BTreeMap::new();
    for (role, name, axes) in expected(resolved.family, &resolved.spec) {
        let (Role::Layer(layer, Part::Expert(expert, projection)), Some((block, _))) = (role, name.split_once(".experts.")) else {
            continue;
        };
        layers.insert(format!("{block}.experts"), layer);
        if gone(&format!("{block}.experts"), expert) {
            held.gone.push((name, axes.into_iter().map(|axis| axis.size).collect()));
            continue;
        }
        let (alone, which) = match projection {
            Projection::Gate => ("gate", 0),
            Projection::Up => ("up", 1),
            Projection::Down => ("down", 0),
        };
        let (fused, alone) = (format!("{block}.experts.gate_up"), format!("{block}.experts.{alone}"));
        let place = if projection != Projection::Down && held.arenas.contains_key(&fused) {
            Place { arena: fused, expert: expert as u32, which }
        } else {
            Place { arena: alone, expert: expert as u32, which: 0 }
        };
        if let Some(arena) = held.arenas.get(&place.arena) {
            add(&mut held.matrices, arena, name, place);
        }
    }
    for (block, said) in &constants {
        let layer = *layers.get(block).ok_or_else(|| refuse(format!("quantization_config.constants: the model has no {block}")))?;
        read_constants(checkpoint, resolved, (block, layer, said), &mut held)?;
    }
    Ok(held)
}

/// What the dropped experts of one block put out.
fn read_constants(
    checkpoint: &Checkpoint,
    resolved: &Resolved,
    (block, layer, said): (&str, usize, &Constants),
    held: &mut Held,
) -> Result<()> {
    let (hidden, name) = (resolved.spec.hidden, format!("{block}.mean"));
    let Some(moe) = resolved.spec.moe(layer) else { return Ok(()) };
    let rising = said.experts.windows(2).all(|pair| pair[0] < pair[1]) && said.experts.last().is_none_or(|last| *last < moe.experts);
    if !rising {
        return Err(wrong(checkpoint, format!("{block}: the dropped experts {:?} are no rising ones of {}", said.experts, moe.experts)));
    }
    if let Some(twice) = held.arenas.iter().find_map(|(arena, table)| {
        let here = arena.rsplit_once('.').is_some_and(|(of, _)| of == block);
        said.experts.iter().find(|&&expert| here && table.entry(expert as u32).is_some())
    }) {
        return Err(wrong(checkpoint, format!("{block}: expert {twice} is dropped, and an arena holds it")));
    }
    let outputs = match said.output {
        Output::Zero => vec![0.0; said.experts.len() * hidden],
        Output::Mean => {
            let shape = checkpoint.info(&name).map(|info| info.shape.clone());
            if shape.as_deref() != Some(&[said.experts.len(), hidden]) {
                let what = format!("{name} is {shape:?}, and {} dropped experts put out {hidden} channels each", said.experts.len());
                return Err(wrong(checkpoint, what));
            }
            held.means.insert(name.clone());
            checkpoint.floats(&name)?
        }
    };
    let rows = outputs.chunks_exact(hidden.max(1)).map(<[f32]>::to_vec);
    let constants = said.experts.iter().zip(rows).map(|(&expert, output)| ((layer, expert), Constant { output, inner: moe.inner }));
    held.constants.extend(constants);
    Ok(())
}

/// Adds a matrix, if its arena holds it: what is missing is found when the family claims its tensors.
fn add(matrices: &mut BTreeMap<String, Stored>, arena: &Arena, name: String, place: Place) {
    let Some(entry) = arena.entry(place.expert) else { return };
    let Form { bits, group, scale_type, grid, rows } = entry.form;
    let zeros = match grid {
        Grid::Sym => ZeroPoints::Symmetric,
        Grid::Half => ZeroPoints::Half,
        Grid::Asym => ZeroPoints::Stored,
        Grid::Offset => ZeroPoints::Offset,
    };
    let share = if rows == Rows::GateUp { 2 } else { 1 };
    let bytes = entry.form.bytes(arena.shape).into_iter().sum::<usize>() as u64 / share;
    matrices.insert(name, Stored { shape: arena.shape, bits, group, scale: scale_type, zeros, bytes, place: Some(place) });
}

/// An expert whose matrices stay packed.
#[derive(Debug)]
pub(super) struct PackedExpert {
    /// Gate and up in one, or apart.
    gates: Vec<Linear>,
    down: Linear,
}

impl Packed {
    /// One routed expert as it lies in the arenas; `None` where it does not lie in any.
    pub(super) fn expert(&self, layer: usize, expert: usize) -> Result<Option<PackedExpert>> {
        let place = |projection| {
            let name = self.layout.name(Role::Layer(layer, Part::Expert(expert, projection)))?;
            self.matrices.get(name)?.place.as_ref()
        };
        let (Some(gate), Some(up), Some(down)) = (place(Projection::Gate), place(Projection::Up), place(Projection::Down)) else {
            return Ok(None);
        };
        let linear = |place: &Place| Ok::<_, crate::Error>(Linear::new(self.in_arena(place)?, Mode::Exact));
        let gates = if gate.arena == up.arena { vec![linear(gate)?] } else { vec![linear(gate)?, linear(up)?] };
        Ok(Some(PackedExpert { gates, down: linear(down)? }))
    }
}

impl Applied for PackedExpert {
    fn gates(&self, x: &[f32]) -> [Vec<f32>; 2] {
        let mut found: Vec<Vec<f32>> = self.gates.iter().flat_map(|linear| linear.apply(x)).collect();
        let up = found.pop().unwrap_or_default();
        [found.pop().unwrap_or_default(), up]
    }

    fn down(&self, x: &[f32]) -> Vec<f32> {
        self.down.apply(x).pop().unwrap_or_default()
    }
}

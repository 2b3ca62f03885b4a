//! Arenas of a native checkpoint, and experts that multiply rows from their packed codes.

use std::collections::BTreeMap;

use calib::Applied;
use calib::arch::{Part, Projection, Resolved, Role, expected};
use calib::checkpoint::Checkpoint;
use kernels::cpu::{Linear, Mode};
use kernels::layout::{self, Arena, Form, Grid, Rows};
use serde::Deserialize;

use super::{Packed, Stored, ZeroPoints, section, wrong};
use crate::Result;
use crate::export::native::METHOD;

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

/// The arenas of a checkpoint with their tables, and the matrices in them by logical name.
pub(super) fn read(checkpoint: &Checkpoint, resolved: &Resolved) -> Result<(BTreeMap<String, Arena>, BTreeMap<String, Stored>)> {
    let refuse = |what: String| wrong(checkpoint, what);
    let (mut arenas, mut matrices) = (BTreeMap::new(), BTreeMap::new());
    let Some(section) = section(checkpoint.config()).filter(|s| s.get("quant_method").and_then(|m| m.as_str()) == Some(METHOD)) else {
        return Ok((arenas, matrices));
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
            add(&mut matrices, &arena, format!("{name}.weight"), Place { arena: name.clone(), expert: 0, which: 0 });
        }
        arenas.insert(name.clone(), arena);
    }
    for (role, name, _) in expected(resolved.family, &resolved.spec) {
        let (Role::Layer(_, Part::Expert(expert, projection)), Some((block, _))) = (role, name.split_once(".experts.")) else { continue };
        let (alone, which) = match projection {
            Projection::Gate => ("gate", 0),
            Projection::Up => ("up", 1),
            Projection::Down => ("down", 0),
        };
        let (fused, alone) = (format!("{block}.experts.gate_up"), format!("{block}.experts.{alone}"));
        let place = if projection != Projection::Down && arenas.contains_key(&fused) {
            Place { arena: fused, expert: expert as u32, which }
        } else {
            Place { arena: alone, expert: expert as u32, which: 0 }
        };
        if let Some(arena) = arenas.get(&place.arena) {
            add(&mut matrices, arena, name, place);
        }
    }
    Ok((arenas, matrices))
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

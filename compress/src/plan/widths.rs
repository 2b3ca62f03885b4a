//! The width of every matrix: one for all, or shared out by a program.

use std::collections::{BTreeMap, BTreeSet};

use crate::allocate::decide::{Budget, Budgets, Case, decide};
use crate::allocate::drop::{Droppable, droppable};
use crate::allocate::sensitivity::{self, Table};
use crate::allocate::{Account, Allocate, Choice, Decision, Matrix, Undecided};
use crate::allocate::{Constraints, Cost, DeviceBytes, Speed, by_layer, pmq};
use crate::plan::{Measured, Shape, Tensor};
use crate::quantize::Grid;
use calib::arch::Part;

/// Largest header entry of a tensor beside its name and numbers, and of a shard beside its tensors.
const ENTRY_BYTES: u64 = 52;
const SHARD_BYTES: u64 = 192;

/// The width of every quantized matrix, by tensor name.
pub(super) struct Widths {
    /// Its choice.
    pub chosen: BTreeMap<String, Choice>,
    /// Matrices of experts that are dropped, by tensor name.
    pub dropped: BTreeSet<String>,
    /// How a program came to it.
    pub account: Option<Account>,
}

/// The matrices that a recipe quantizes: every Linear matrix of the decoder layers that `exclude` does not name.
pub fn matrices(allocate: &Allocate, shape: &Shape) -> Vec<Matrix> {
    let globs = allocate.globs();
    let matrix = |tensor: &Tensor| {
        let (layer, part, inputs) = tensor.quantizable()?;
        let excluded = globs.iter().any(|glob| glob.matches(&tensor.name));
        let outputs = tensor.shape.first().copied().unwrap_or(0);
        (!excluded).then(|| Matrix { name: tensor.name.clone(), layer, part, shape: [outputs, inputs], scale: tensor.scale })
    };
    shape.tensors.iter().filter_map(matrix).collect()
}

impl Widths {
    /// Decides; without a table every weight counts as sensitive as any other, which is good for sizes and nothing else.
    pub fn decide(allocate: &Allocate, shape: &Shape, measured: Option<&Measured>) -> Result<Self, Undecided> {
        if allocate.is_mixed() {
            let prepared = Prepared::new(allocate, shape, measured);
            let Decision { chosen, account } = prepared.decide(prepared.bytes)?;
            let mut found = Self { chosen: BTreeMap::new(), dropped: BTreeSet::new(), account: Some(account) };
            for (matrix, option) in prepared.matrices.into_iter().zip(chosen) {
                match option {
                    Some(option) => _ = found.chosen.insert(matrix.name, prepared.choices[option]),
                    None => _ = found.dropped.insert(matrix.name),
                }
            }
            return Ok(found);
        }
        let (matrices, choices, rules) = (matrices(allocate, shape), allocate.options(), allocate.constraints());
        // One width is one class of one choice: the constraints are asked, the program is not.
        for matrix in &matrices {
            if let Some(why) = rules.objection(matrix, &choices[0]) {
                let objections = vec![format!("{}: {why}", choices[0])];
                return Err(Undecided::NoChoice { name: matrix.name.clone(), tied: 0, objections });
            }
        }
        let chosen = matrices.into_iter().map(|m| (m.name, choices[0])).collect();
        Ok(Self { chosen, dropped: BTreeSet::new(), account: None })
    }
}

/// A budget and what it can be shared out over; another number of bytes needs no other preparation.
pub(super) struct Prepared {
    pub matrices: Vec<Matrix>,
    pub choices: Vec<Choice>,
    rules: Constraints,
    losses: Vec<Vec<f64>>,
    cost: &'static str,
    droppable: Vec<Droppable>,
    /// The recipe's bytes of codes, scales and zeros.
    pub bytes: u64,
    beside: Vec<Budget>,
    /// Where there is a program a layer.
    by_layer: Option<pmq::Params>,
}

impl Prepared {
    pub fn new(allocate: &Allocate, shape: &Shape, measured: Option<&Measured>) -> Self {
        let (matrices, choices, rules) = (matrices(allocate, shape), allocate.options(), allocate.constraints());
        let table = measured.and_then(|m| m.table.as_ref());
        let losses = matrices.iter().map(|m| losses(m, &choices, table)).collect();
        let cost = table.map_or("assumed", |table| table.cost.name());
        let bytes = budget(allocate, shape, &matrices, &choices);
        // What nothing was measured of, nothing is known of dropping.
        let droppable = match (allocate.drop, table) {
            (Some(substitute), Some(table)) => droppable(&matrices, &table.dropped, substitute),
            _ => Vec::new(),
        };
        let beside = beside_bytes(allocate, (&matrices, &choices, &droppable), &rules, measured);
        let params = allocate.pmq.unwrap_or_default();
        let by_layer = (allocate.cost == Cost::Pmq && params.scope == pmq::Scope::Layer).then_some(params);
        Self { matrices, choices, rules, losses, cost, droppable, bytes, beside, by_layer }
    }

    /// The widths within this many bytes.
    pub fn decide(&self, bytes: u64) -> Result<Decision, Undecided> {
        let (matrices, choices, losses) = (&self.matrices, &self.choices, &self.losses);
        let case = Case { matrices, choices, losses, cost: self.cost, droppable: &self.droppable };
        if let Some(params) = &self.by_layer {
            return by_layer::decide(&case, bytes, &self.rules, params);
        }
        decide(&case, &Budgets { bytes, beside: self.beside.clone() }, &self.rules)
    }

    /// Weights over which bytes are shared out.
    pub fn weights(&self) -> u64 {
        self.matrices.iter().map(Matrix::weights).sum()
    }
}

fn losses(matrix: &Matrix, choices: &[Choice], table: Option<&Table>) -> Vec<f64> {
    match table {
        Some(table) => match table.losses.get(&matrix.name) {
            Some(losses) => losses.iter().map(|loss| loss.unwrap_or(f64::NAN)).collect(),
            // A matrix that the cost does not cover has one choice, so its loss weighs nothing.
            None => vec![0.0; choices.len()],
        },
        None => sensitivity::assumed(matrix.weights(), choices),
    }
}

/// The budgets beside that of all bytes: one a device, and the time of a token.
///
/// Without calibration every expert counts as used by every token: a plan made from the shape alone is slower than the real one.
fn beside_bytes(
    allocate: &Allocate,
    (matrices, choices, droppable): (&[Matrix], &[Choice], &[Droppable]),
    rules: &Constraints,
    measured: Option<&Measured>,
) -> Vec<Budget> {
    let device = |device: &DeviceBytes| {
        let [first, last] = device.layers;
        let takes = |m: &Matrix| {
            let here = (first..=last).contains(&m.layer);
            choices.iter().map(|c| if here { rules.bytes(m, c) as f64 } else { 0.0 }).collect()
        };
        let what = format!("allocate.devices: bytes of layers {first} to {last}");
        let dropped = |expert: &Droppable| if (first..=last).contains(&expert.layer) { expert.bytes as f64 } else { 0.0 };
        let (takes, takes_dropped) = (matrices.iter().map(takes).collect(), droppable.iter().map(dropped).collect());
        Budget { what, most: device.bytes.0 as f64, takes, takes_dropped }
    };
    let used = |m: &Matrix| {
        let rows = |part: Part| {
            let site = part.site().zip(measured);
            site.and_then(|(site, measured)| measured.sites.get(&(m.layer, site))).map(|seen| seen.rows as f64)
        };
        rows(m.part).zip(rows(Part::Query).or_else(|| rows(Part::KvA))).map_or(1.0, |(rows, all)| rows / all.max(1.0))
    };
    let speed = |speed: &Speed| {
        let nanoseconds = |bits: u8| speed.kernels.iter().find(|k| k.bits == bits).map_or(f64::NAN, |k| k.nanoseconds_per_million);
        let takes = |m: &Matrix| choices.iter().map(|c| 1e-15 * nanoseconds(c.bits) * m.weights() as f64 * used(m)).collect();
        let what = "allocate.speed: seconds a token".to_owned();
        let (takes, takes_dropped) = (matrices.iter().map(takes).collect(), vec![0.0; droppable.len()]);
        Budget { what, most: speed.seconds_per_token, takes, takes_dropped }
    };
    allocate.devices.iter().map(device).chain(allocate.speed.iter().map(speed)).collect()
}

/// Bytes of codes, scales and zeros that may be spent.
fn budget(allocate: &Allocate, shape: &Shape, matrices: &[Matrix], choices: &[Choice]) -> u64 {
    let weights: u64 = matrices.iter().map(Matrix::weights).sum();
    match (allocate.bits_per_weight, allocate.bytes, allocate.file) {
        (Some(bits), ..) => (bits * weights as f64 / 8.0).floor() as u64,
        (_, Some(bytes), _) => bytes.0,
        (.., Some(file)) => file.0.saturating_sub(beside(shape, matrices, choices, file.0)),
        // One width for all: the grid is free, whatever it takes.
        _ => {
            matrices.iter().map(|m| choices.iter().map(|c| c.width(m.scale).stored_bytes(m.shape[0], m.shape[1])).max().unwrap_or(0)).sum()
        }
    }
}

/// Bytes of a compressed-tensors export beside codes, scales and zeros: what is kept, the stored shapes, and at most what the headers
/// take in a file of `total` bytes.
fn beside(shape: &Shape, matrices: &[Matrix], choices: &[Choice], total: u64) -> u64 {
    let digits = |n: u64| u64::from(n.max(1).ilog10()) + 1;
    let entry = |name: usize, sides: &[usize]| {
        let numbers: u64 = sides.iter().map(|&side| digits(side as u64) + 1).sum();
        ENTRY_BYTES + name as u64 + numbers + 2 * digits(total)
    };
    let quantized: BTreeMap<&str, &Matrix> = matrices.iter().map(|m| (m.name.as_str(), m)).collect();
    let parts: &[&str] = if choices.iter().any(|c| c.grid == Grid::Asym) {
        &["_packed", "_scale", "_shape", "_zero_point"]
    } else {
        &["_packed", "_scale", "_shape"]
    };
    let mut bytes = SHARD_BYTES * (1 + total.div_ceil(4_000_000_000));
    for tensor in shape.tensors.iter().filter(|t| t.role != calib::arch::Role::Buffer) {
        let name = tensor.name.len();
        bytes += match quantized.get(tensor.name.as_str()) {
            Some(matrix) => 16 + parts.iter().map(|part| entry(name + part.len(), &matrix.shape)).sum::<u64>(),
            // FP8 is kept as bf16.
            None => entry(name, &tensor.shape) + tensor.bytes.max(2 * tensor.shape.iter().product::<usize>() as u64),
        };
    }
    bytes
}

//! The width of every matrix: one for all, or shared out by a program.

use std::collections::BTreeMap;

use crate::allocate::sensitivity::{self, Table};
use crate::allocate::{Account, Allocate, Choice, Decision, Matrix, Undecided, decide::decide};
use crate::plan::{Shape, Tensor};
use crate::quantize::Grid;

/// Largest header entry of a tensor beside its name and numbers, and of a shard beside its tensors.
const ENTRY_BYTES: u64 = 52;
const SHARD_BYTES: u64 = 192;

/// The width of every quantized matrix, by tensor name.
pub(super) struct Widths {
    /// Its choice.
    pub chosen: BTreeMap<String, Choice>,
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
    pub fn decide(allocate: &Allocate, shape: &Shape, table: Option<&Table>) -> Result<Self, Undecided> {
        let (matrices, choices, rules) = (matrices(allocate, shape), allocate.options(), allocate.constraints());
        if !allocate.is_mixed() {
            // One width is one class of one choice: the constraints are asked, the program is not.
            for matrix in &matrices {
                if let Some(why) = rules.objection(matrix, &choices[0]) {
                    let objections = vec![format!("{}: {why}", choices[0])];
                    return Err(Undecided::NoChoice { name: matrix.name.clone(), tied: 0, objections });
                }
            }
            return Ok(Self { chosen: matrices.into_iter().map(|m| (m.name, choices[0])).collect(), account: None });
        }
        let measured = |m: &Matrix| match table {
            Some(table) => match table.losses.get(&m.name) {
                Some(losses) => losses.iter().map(|loss| loss.unwrap_or(f64::NAN)).collect(),
                // A matrix that the cost does not cover has one choice, so its loss weighs nothing.
                None => vec![0.0; choices.len()],
            },
            None => sensitivity::assumed(m.weights(), &choices),
        };
        let losses: Vec<Vec<f64>> = matrices.iter().map(measured).collect();
        let cost = table.map_or("assumed", |table| table.cost.name());
        let budget = budget(allocate, shape, &matrices, &choices);
        let Decision { chosen, account } = decide(&matrices, &choices, &losses, budget, &rules, cost)?;
        let chosen = matrices.into_iter().zip(chosen).map(|(m, o)| (m.name, choices[o])).collect();
        Ok(Self { chosen, account: Some(account) })
    }
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

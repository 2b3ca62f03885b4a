//! The tensors of one layer that scales change.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use calib::arch::{Part, Role};
use calib::tensor::{self, Dtype};
use calib::{Model, Weights};
use ndarray::Axis;

use crate::tensorfile::{Create, Declared, Element};
use crate::{Error, Result};

/// What each tensor of a layer is multiplied and divided with.
#[derive(Debug, Default)]
pub(super) struct Factors {
    /// Factors of a matrix's columns, `[in]`.
    pub columns: BTreeMap<Part, Vec<f32>>,
    /// Divisors of a matrix's rows, or of a vector, `[out]`.
    pub rows: BTreeMap<Part, Vec<f32>>,
}

fn misfit(name: &str, what: &'static str) -> Error {
    Error::PlanMisfit { name: name.to_owned(), what }
}

/// The type that a changed tensor is stored in: its own, FP8 becomes bf16.
pub(super) fn stored(model: &Model, name: &str) -> Result<Dtype> {
    let info = model.checkpoint().info(name).ok_or_else(|| misfit(name, "the model does not have it"))?;
    Ok(info.dtype.anew())
}

/// Writes what changes of a layer, one tensor at a time; nothing where nothing does.
///
/// # Errors
///
/// What reading the model brings up; an IO error.
pub(super) fn layer(model: &Model, layer: usize, factors: &Factors, path: &Path) -> Result<()> {
    let parts: BTreeSet<Part> = factors.columns.keys().chain(factors.rows.keys()).copied().collect();
    if parts.is_empty() {
        return Ok(());
    }
    let mut declared = Vec::new();
    for &part in &parts {
        let name = model.layout().name(Role::Layer(layer, part)).unwrap_or_default();
        let shape = model.checkpoint().info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let dtype = Element::of(stored(model, name)?).ok_or_else(|| misfit(name, "its type holds no scaled values"))?;
        declared.push(Declared { name: name.to_owned(), dtype, shape });
    }
    let file = Create::new(path, declared, &BTreeMap::new())?;
    for part in parts {
        let role = Role::Layer(layer, part);
        let name = model.layout().name(role).unwrap_or_default();
        let values = changed(model, role, (factors.columns.get(&part), factors.rows.get(&part)))?;
        let bytes = tensor::encode(stored(model, name)?, &values).ok_or_else(|| misfit(name, "its type holds no scaled values"))?;
        file.put(name, &bytes)?;
    }
    file.finish()
}

/// A tensor's new values, row by row.
fn changed(model: &Model, role: Role, (columns, rows): (Option<&Vec<f32>>, Option<&Vec<f32>>)) -> Result<Vec<f32>> {
    let name = model.layout().name(role).unwrap_or_default();
    let is_matrix = model.checkpoint().info(name).is_some_and(|info| info.shape.len() == 2);
    if !is_matrix {
        let mut values = model.vector(role)?;
        values.iter_mut().zip(rows.into_iter().flatten()).for_each(|(value, s)| *value /= s);
        return Ok(values.to_vec());
    }
    let mut w = model.matrix(role)?;
    let fits = columns.is_none_or(|s| s.len() == w.ncols()) && rows.is_none_or(|s| s.len() == w.nrows());
    if !fits {
        return Err(misfit(name, "the scales have another width"));
    }
    w.axis_iter_mut(Axis(1)).zip(columns.into_iter().flatten()).for_each(|(mut column, &s)| column *= s);
    w.axis_iter_mut(Axis(0)).zip(rows.into_iter().flatten()).for_each(|(mut row, &s)| row /= s);
    Ok(w.iter().copied().collect())
}

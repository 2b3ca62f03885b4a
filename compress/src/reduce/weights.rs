//! Tensors that a reduced model does not take over as they stand, and a layer that is made of them.

use std::collections::BTreeMap;

use calib::arch::{Part, Projection, Role, Spec};
use calib::tensor::{self, Dtype};
use calib::{Model, Weights};
use ndarray::{Array1, Array2};

use crate::merge::{Group, Matrices, Merger, RouterRow, align};
use crate::plan::Fate;
use crate::repair::removal::Fitted;
use crate::{Error, Result};

/// A tensor that is made anew.
#[derive(Clone, Debug, PartialEq)]
pub struct Own {
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, as stored.
    pub bytes: Vec<u8>,
}

impl Own {
    /// Values in a type that an output can hold: FP8 becomes bf16.
    fn of(dtype: Dtype, shape: Vec<usize>, values: &[f32]) -> Option<Self> {
        let dtype = dtype.anew();
        Some(Self { dtype, shape, bytes: tensor::encode(dtype, values)? })
    }

    fn values(&self) -> Vec<f32> {
        tensor::decode(self.dtype, &self.bytes).unwrap_or_default()
    }
}

/// The tensors that a layer has anew, by the role that they will have.
pub type Owned = BTreeMap<Role, Own>;

/// The router's tensors of a layer, those that it has.
fn routers(model: &Model, layer: usize) -> impl Iterator<Item = (Role, &str)> {
    [Part::Router, Part::RouterCorrection]
        .map(|part| Role::Layer(layer, part))
        .into_iter()
        .filter_map(|role| Some((role, model.layout().name(role)?)))
}

fn dtype(model: &Model, name: &str) -> Result<Dtype> {
    let missing = || Error::PlanMisfit { name: name.to_owned(), what: "the model does not have it" };
    Ok(model.checkpoint().info(name).ok_or_else(missing)?.dtype)
}

fn unstorable(name: &str) -> Error {
    Error::PlanMisfit { name: name.to_owned(), what: "its type is none that it can be made anew in" }
}

/// The rows of a layer's router and of its selection bias that stay, bit for bit; nothing where nothing goes.
///
/// # Errors
///
/// As [`Checkpoint::bytes`](calib::checkpoint::Checkpoint::bytes).
pub fn sliced(model: &Model, layer: usize, fate: &Fate) -> Result<Owned> {
    let mut own = BTreeMap::new();
    if fate.is_nothing() {
        return Ok(own);
    }
    for (role, name) in routers(model, layer) {
        let bytes = model.checkpoint().bytes(name)?;
        let mut shape = model.checkpoint().info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let row = bytes.len() / shape.first().copied().unwrap_or(1).max(1);
        let rows = fate.experts.iter().filter_map(|old| old.first()).flat_map(|&old| &bytes[old * row..][..row]).copied().collect();
        shape.iter_mut().take(1).for_each(|count| *count = fate.experts.len());
        own.insert(role, Own { dtype: dtype(model, name)?, shape, bytes: rows });
    }
    Ok(own)
}

/// Merged experts, and the router's row of each group.
///
/// # Errors
///
/// What reading or decomposing the experts brings up.
pub fn merged(model: &Model, layer: usize, merger: &Merger, groups: &[Group]) -> Result<Owned> {
    let fate = Fate { experts: groups.iter().map(|group| group.members.clone()).collect(), ..Fate::default() };
    let mut own = sliced(model, layer, &fate)?;
    if merger.asked().router == RouterRow::Mean {
        for (role, name) in routers(model, layer) {
            let rows = model.checkpoint().floats(name)?;
            let Some(sliced) = own.get_mut(&role) else { continue };
            let width = sliced.shape.iter().skip(1).product::<usize>().max(1);
            let mean = |group: &Group, d: usize| {
                let terms = group.members.iter().zip(&group.weights);
                (terms.map(|(&e, w)| w * f64::from(rows[e * width + d])).sum::<f64>() / group.weights.iter().sum::<f64>()) as f32
            };
            let values: Vec<f32> = groups.iter().flat_map(|group| (0..width).map(move |d| mean(group, d))).collect();
            *sliced = Own::of(sliced.dtype, sliced.shape.clone(), &values).ok_or_else(|| unstorable(name))?;
        }
    }
    for (new, group) in groups.iter().enumerate().filter(|(_, group)| group.members.len() > 1) {
        let mut members = group.members.iter().map(|&e| matrices(model, layer, e)).collect::<Result<Vec<_>>>()?;
        if merger.asked().align {
            for at in 1..members.len() {
                let order = align::order(&members[0], &members[at]);
                members[at] = align::permuted(&members[at], &order);
            }
        }
        let Matrices { gate, up, down } = merger.merged(&members, &group.weights)?;
        for (projection, matrix) in [(Projection::Gate, gate), (Projection::Up, up), (Projection::Down, down)] {
            let name = model.layout().name(Role::Layer(layer, Part::Expert(group.members[0], projection))).unwrap_or_default();
            let values: Vec<f32> = matrix.iter().map(|&x| x as f32).collect();
            let shape = vec![matrix.nrows(), matrix.ncols()];
            let tensor = Own::of(dtype(model, name)?, shape, &values).ok_or_else(|| unstorable(name))?;
            own.insert(Role::Layer(layer, Part::Expert(new, projection)), tensor);
        }
    }
    Ok(own)
}

fn matrices(model: &Model, layer: usize, expert: usize) -> Result<Matrices> {
    let calib::model::Expert { gate, up, down } = model.expert(layer, expert)?;
    Ok(Matrices { gate: gate.mapv(f64::from), up: up.mapv(f64::from), down: down.mapv(f64::from) })
}

/// Puts a fitted router and the factors into what a layer has anew: a factor goes into the expert's down projection.
///
/// # Errors
///
/// What reading the experts brings up.
pub fn repaired(model: &Model, layer: usize, fate: &Fate, own: &mut Owned, fitted: &Fitted) -> Result<()> {
    let role = Role::Layer(layer, Part::Router);
    let name = model.layout().name(role).unwrap_or_default();
    let (rows, width) = fitted.router.dim();
    let values: Vec<f32> = fitted.router.iter().copied().collect();
    own.insert(role, Own::of(dtype(model, name)?, vec![rows, width], &values).ok_or_else(|| unstorable(name))?);
    for (new, (old, &factor)) in fate.experts.iter().zip(&fitted.factors).enumerate().filter(|(_, (_, factor))| **factor != 1.0) {
        let role = Role::Layer(layer, Part::Expert(new, Projection::Down));
        let name = model.layout().name(Role::Layer(layer, Part::Expert(old[0], Projection::Down))).unwrap_or_default();
        let (shape, mut values) = down(model, layer, (new, old[0]), own)?;
        values.iter_mut().for_each(|x| *x *= factor);
        own.insert(role, Own::of(dtype(model, name)?, shape, &values).ok_or_else(|| unstorable(name))?);
    }
    Ok(())
}

/// Adds to the experts' down projections, `[hidden, inner]` each.
///
/// # Errors
///
/// What reading the experts brings up.
pub fn adjusted(model: &Model, layer: usize, fate: &Fate, own: &mut Owned, changes: &[Array2<f32>]) -> Result<()> {
    for (new, (old, change)) in fate.experts.iter().zip(changes).enumerate() {
        let (shape, mut values) = down(model, layer, (new, old[0]), own)?;
        values.iter_mut().zip(change).for_each(|(w, change)| *w += change);
        let name = model.layout().name(Role::Layer(layer, Part::Expert(old[0], Projection::Down))).unwrap_or_default();
        let role = Role::Layer(layer, Part::Expert(new, Projection::Down));
        own.insert(role, Own::of(dtype(model, name)?, shape, &values).ok_or_else(|| unstorable(name))?);
    }
    Ok(())
}

/// An expert's down projection as it is so far: its shape and its values, row by row.
fn down(model: &Model, layer: usize, (new, old): (usize, usize), own: &Owned) -> Result<(Vec<usize>, Vec<f32>)> {
    let name = model.layout().name(Role::Layer(layer, Part::Expert(old, Projection::Down))).unwrap_or_default();
    Ok(match own.get(&Role::Layer(layer, Part::Expert(new, Projection::Down))) {
        Some(own) => (own.shape.clone(), own.values()),
        None => {
            let down = model.checkpoint().matrix(name)?;
            (vec![down.nrows(), down.ncols()], down.into_raw_vec_and_offset().0)
        }
    })
}

/// A model with one reduced layer: what that layer has anew, and the rest by old numbers.
pub struct Reduced<'a> {
    /// The original.
    pub model: &'a Model,
    /// The result's arithmetic.
    pub spec: &'a Spec,
    /// What becomes of the layer's experts.
    pub fate: &'a Fate,
    /// What it has anew.
    pub own: &'a Owned,
}

impl Reduced<'_> {
    fn old(&self, role: Role) -> Role {
        match role {
            Role::Layer(layer, Part::Expert(new, projection)) => {
                let old = self.fate.experts.get(new).and_then(|old| old.first()).copied().unwrap_or(new);
                Role::Layer(layer, Part::Expert(old, projection))
            }
            other => other,
        }
    }

    /// The router of a layer, `[experts, hidden]`, and its selection bias.
    ///
    /// # Errors
    ///
    /// As [`Weights::matrix`].
    pub fn router(&self, layer: usize) -> Result<(Array2<f32>, Option<Vec<f32>>)> {
        let correction = self.spec.moe(layer).is_some_and(|moe| moe.router.correction);
        let correction = correction.then(|| self.vector(Role::Layer(layer, Part::RouterCorrection))).transpose()?;
        Ok((self.matrix(Role::Layer(layer, Part::Router))?, correction.map(|c| c.to_vec())))
    }
}

impl Weights for Reduced<'_> {
    fn spec(&self) -> &Spec {
        self.spec
    }

    fn matrix(&self, role: Role) -> calib::Result<Array2<f32>> {
        let own = self.own.get(&role).and_then(|own| {
            let &[rows, columns] = own.shape.as_slice() else { return None };
            Array2::from_shape_vec((rows, columns), own.values()).ok()
        });
        own.map_or_else(|| self.model.matrix(self.old(role)), Ok)
    }

    fn vector(&self, role: Role) -> calib::Result<Array1<f32>> {
        self.own.get(&role).map_or_else(|| self.model.vector(self.old(role)), |own| Ok(Array1::from(own.values())))
    }
}

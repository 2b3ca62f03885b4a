//! The layout of this project's own kernels (MQT-1, [`kernels::layout`]): every routed expert has a width of its own.
//!
//! The routed experts of a layer become `P.experts.gate_up.arena` with `P.experts.gate_up.table` (where gate and up of each expert agree;
//! else `gate` and `up` apart) and `P.experts.down.arena` with its table; `P` is the block's name in the source. A matrix elsewhere that
//! compressed-tensors has no form for becomes `M.arena` and `M.table` under its module's name, an arena of one. Everything else stands as
//! compressed-tensors packs it or as it was. `config.json` says so: `quantization_config` has `quant_method = "moepress"`, `arenas` with the
//! shape of each, and `linear`, the section of compressed-tensors for the rest.
//!
//! A routed expert that is dropped lies in no arena: the router still chooses it, and it puts out a constant, with its routing weight.
//! `constants` in `config.json` lists such experts by `P.experts`; where they put out their means, `P.experts.mean` holds those, one row
//! each in the order of the list.
//!
//! No stock runtime knows `moepress`: the serving side takes what `moepress emit` writes.

use std::collections::{BTreeMap, BTreeSet};

use calib::arch::{Kind, Part as In, Projection, Role};
use calib::checkpoint::Declared;
use calib::tensor::Dtype;
use kernels::layout::{self, Arena, Packed, table::ENTRY_BYTES};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Constant, Contents, Form, Format, Native, Part, Scheme, Source, Tensor, Zero, compressed_tensors, config};
use crate::{Error, Result};

/// What `quant_method` says.
pub const METHOD: &str = "moepress";

/// Where a quantized matrix goes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// Packed as compressed-tensors, alone.
    Streams(String),
    /// The arena of this name.
    Arena(String),
    /// Mean outputs of dropped experts, below this name.
    Means(String),
}

impl Format for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn refusals(&self, tensors: &[Tensor]) -> Vec<String> {
        let mut found = Vec::new();
        for tensor in tensors {
            if tensor.constant().is_some() && block(&tensor.name).is_none() {
                found.push(format!(
                    "{}: the native layout drops only experts whose names hold `.experts.`; leave allocate.drop out",
                    tensor.name
                ));
            }
            let Some(scheme) = tensor.scheme() else { continue };
            if !tensor.name.ends_with(".weight") {
                found.push(format!("{}: the native layout packs only tensors named `.weight`; exclude it", tensor.name));
            } else if in_arena(tensor, scheme)
                && let Err(error) = form(scheme)
            {
                found.push(format!("{}: {error}; choose another for it, or exclude it", tensor.name));
            }
        }
        found.extend(halves(tensors));
        found
    }

    fn notes(&self, tensors: &[Tensor]) -> Vec<String> {
        let arenas = tensors.iter().any(|t| t.scheme().is_some_and(|scheme| in_arena(t, scheme)));
        let means = tensors.iter().any(|t| matches!(t.constant(), Some(Constant::Mean(_))));
        let means = means.then(|| "the C loader adds nothing for dropped experts: whoever calls it adds their means".to_owned());
        let note = "no runtime loads it by itself: the serving side needs what `moepress emit` writes for it, the Python package or the C loader; \
                    moepress eval reads it as it is";
        arenas.then(|| note.to_owned()).into_iter().chain(means).collect()
    }

    fn groups<'t>(&self, tensors: &'t [Tensor]) -> Vec<Vec<&'t Tensor>> {
        places(tensors).into_values().collect()
    }

    fn declare(&self, group: &[&Tensor]) -> Result<Vec<Declared>> {
        if let Some((name, dtype)) = means_of(group) {
            let hidden = group[0].matrix_shape()?[0];
            return Ok(vec![Declared { name, dtype, shape: vec![group.len(), hidden] }]);
        }
        let Some(name) = arena_name(group) else {
            return Ok(group.iter().map(|t| compressed_tensors::declare(t)).collect::<Result<Vec<_>>>()?.concat());
        };
        let arena = plan(group)?;
        let part = |what: &str, shape| Declared { name: format!("{name}.{what}"), dtype: Dtype::U8, shape };
        Ok(vec![part("arena", vec![arena.bytes]), part("table", vec![arena.entries.len(), ENTRY_BYTES])])
    }

    fn parts(&self, group: &[&Tensor], source: &dyn Source) -> Result<Vec<Part>> {
        if let Some((name, dtype)) = means_of(group) {
            let rows = group.iter().map(|tensor| source.mean(&tensor.name)).collect::<Result<Vec<_>>>()?.concat();
            let wrong = || Error::PlanMisfit { name: name.clone(), what: "its type holds no fractions" };
            return Ok(vec![(name.clone(), calib::tensor::encode(dtype, &rows).ok_or_else(wrong)?)]);
        }
        let Some(name) = arena_name(group) else {
            return Ok(group
                .iter()
                .map(|t| compressed_tensors::parts(t, &source.quantized(&t.name)?))
                .collect::<Result<Vec<_>>>()?
                .concat());
        };
        let arena = plan(group)?;
        let mut bytes = vec![0; arena.bytes];
        for (expert, members) in experts(group) {
            let wrong = |source| Error::Matrix { name: members[0].name.clone(), source };
            let packed = match members.as_slice() {
                [gate, up] => Packed::gate_up(&source.quantized(&gate.name)?, &source.quantized(&up.name)?),
                _ => Packed::new(&source.quantized(&members[0].name)?),
            };
            arena.fill(&mut bytes, expert, &packed.map_err(wrong)?).map_err(wrong)?;
        }
        Ok(vec![(format!("{name}.arena"), bytes), (format!("{name}.table"), arena.table())])
    }

    fn config(&self, contents: &Contents<'_>) -> Result<String> {
        let section = section(&contents.tensors)?;
        config::edit(&contents.config, &["compression_config"], Some(("quantization_config", &section))).ok_or(Error::Config)
    }
}

/// The form of a scheme in the layout.
fn form(scheme: Scheme) -> kernels::Result<layout::Form> {
    let grid = match scheme.zero {
        Zero::Symmetric => layout::Grid::Sym,
        Zero::Half => layout::Grid::Half,
        Zero::Integer => layout::Grid::Asym,
        Zero::Real => layout::Grid::Offset,
    };
    layout::Form::new(scheme.bits, scheme.group, scheme.scale, grid)
}

/// Whether a matrix lies in an arena: routed experts, and what compressed-tensors does not hold.
fn in_arena(tensor: &Tensor, scheme: Scheme) -> bool {
    tensor.kind() == Kind::Expert || compressed_tensors::refusal(tensor, scheme).is_some()
}

/// `P.experts` of a routed expert's matrix.
fn block(name: &str) -> Option<String> {
    name.split_once(".experts.").map(|(block, _)| format!("{block}.experts"))
}

/// The tensor that a group of [`places`] becomes, if it is one of mean outputs, and its type.
fn means_of(group: &[&Tensor]) -> Option<(String, Dtype)> {
    let first = group.first()?;
    let Some(Constant::Mean(dtype)) = first.constant() else { return None };
    Some((format!("{}.mean", block(&first.name)?), dtype))
}

/// The down projections of dropped experts that put out their means, by block; rising.
fn means(tensors: &[Tensor]) -> impl Iterator<Item = (String, &Tensor)> {
    tensors.iter().filter_map(|tensor| match (tensor.role, tensor.constant()) {
        (Role::Layer(_, In::Expert(_, Projection::Down)), Some(Constant::Mean(_))) => Some((block(&tensor.name)?, tensor)),
        _ => None,
    })
}

/// Every quantized matrix by where it goes, in an arena by expert, gate before up; and the mean outputs of dropped experts.
fn places(tensors: &[Tensor]) -> BTreeMap<Place, Vec<&Tensor>> {
    let quantized = || tensors.iter().filter_map(|tensor| Some((tensor, tensor.scheme()?)));
    let mut schemes: BTreeMap<(usize, usize), BTreeSet<Scheme>> = BTreeMap::new();
    for (tensor, scheme) in quantized() {
        if let Role::Layer(layer, In::Expert(expert, Projection::Gate | Projection::Up)) = tensor.role {
            schemes.entry((layer, expert)).or_default().insert(scheme);
        }
    }
    let apart: BTreeSet<usize> = schemes.iter().filter(|(_, schemes)| schemes.len() > 1).map(|((layer, _), _)| *layer).collect();
    let mut found: BTreeMap<Place, Vec<&Tensor>> = BTreeMap::new();
    for (tensor, scheme) in quantized() {
        let place = match (tensor.role, tensor.name.split_once(".experts.")) {
            (Role::Layer(layer, In::Expert(_, projection)), Some((block, _))) => {
                let projection = match projection {
                    Projection::Down => "down",
                    _ if !apart.contains(&layer) => "gate_up",
                    Projection::Gate => "gate",
                    Projection::Up => "up",
                };
                Place::Arena(format!("{block}.experts.{projection}"))
            }
            _ if in_arena(tensor, scheme) => Place::Arena(tensor.module().to_owned()),
            _ => Place::Streams(tensor.name.clone()),
        };
        found.entry(place).or_default().push(tensor);
    }
    for (block, tensor) in means(tensors) {
        found.entry(Place::Means(block)).or_default().push(tensor);
    }
    let key = |tensor: &&Tensor| match tensor.role {
        Role::Layer(_, In::Expert(expert, projection)) => (expert, projection),
        _ => (0, Projection::Gate),
    };
    found.values_mut().for_each(|group| group.sort_by_key(key));
    found
}

/// The arena that a group of [`places`] becomes, if it is one.
fn arena_name(group: &[&Tensor]) -> Option<String> {
    let first = group.first()?;
    if !in_arena(first, first.scheme()?) {
        return None;
    }
    let Role::Layer(_, In::Expert(_, projection)) = first.role else { return Some(first.module().to_owned()) };
    let (block, _) = first.name.split_once(".experts.")?;
    let both = group.iter().any(|t| matches!(t.role, Role::Layer(_, In::Expert(_, Projection::Up)))) && projection == Projection::Gate;
    let projection = match projection {
        _ if both => "gate_up",
        Projection::Gate => "gate",
        Projection::Up => "up",
        Projection::Down => "down",
    };
    Some(format!("{block}.experts.{projection}"))
}

/// The matrices of each expert of a group: one, or gate and up.
fn experts<'t>(group: &[&'t Tensor]) -> BTreeMap<u32, Vec<&'t Tensor>> {
    let mut found: BTreeMap<u32, Vec<&Tensor>> = BTreeMap::new();
    for tensor in group {
        let expert = match tensor.role {
            Role::Layer(_, In::Expert(expert, _)) => expert as u32,
            _ => 0,
        };
        found.entry(expert).or_default().push(tensor);
    }
    found
}

fn plan(group: &[&Tensor]) -> Result<Arena> {
    let wrong = |source| Error::Matrix { name: group[0].name.clone(), source };
    let shape = group[0].matrix_shape()?;
    let mut forms = Vec::new();
    for (expert, members) in experts(group) {
        let Some(scheme) = members[0].scheme() else { continue };
        let form = form(scheme).map_err(wrong)?;
        forms.push((expert, if members.len() == 2 { form.gate_up() } else { form }));
    }
    Arena::plan(&forms, shape).map_err(wrong)
}

/// What the emitted kernels have no form for, by name.
pub(super) fn without_kernels(tensors: &[Tensor]) -> Vec<String> {
    let mut routed = places(tensors);
    routed.retain(|place, group| group[0].kind() == Kind::Expert && !matches!(place, Place::Means(_)));
    if routed.is_empty() {
        return vec!["kernels are for routed experts, and none is quantized; leave [export.kernels] out".to_owned()];
    }
    let mut found = Vec::new();
    for (place, group) in routed {
        let (Role::Layer(layer, _), name) = (group[0].role, &group[0].name) else { continue };
        if matches!(&place, Place::Arena(arena) if arena.ends_with(".gate")) {
            found.push(format!(
                "layer {layer}: gate and up of an expert differ in width or grid (such as {name}); kernels have them in one"
            ));
        }
        let objection = group[0].matrix_shape().ok().and_then(|shape| kernels::emit::objection(shape, experts(&group).len()));
        found.extend(objection.map(|what| format!("{name}: the emitted kernels do not hold {what}")));
    }
    found
}

/// Layers whose routed experts are quantized in part: a table has all of them or the layer none.
fn halves(tensors: &[Tensor]) -> Vec<String> {
    let mut kept: BTreeMap<usize, (&str, usize, usize)> = BTreeMap::new();
    for tensor in tensors.iter().filter(|t| t.kind() == Kind::Expert) {
        let Role::Layer(layer, _) = tensor.role else { continue };
        let found = kept.entry(layer).or_insert(("", 0, 0));
        found.2 += 1;
        if matches!(tensor.form, Form::Kept(_)) {
            (found.0, found.1) = (tensor.name.as_str(), found.1 + 1);
        }
    }
    let half = |(name, kept, all): &(&str, usize, usize)| (*kept > 0 && kept < all).then(|| (name.to_string(), *kept, *all));
    let say = |(name, kept, all)| {
        format!(
            "{name}: the native layout holds all routed experts of a layer or none, and here {kept} of {all} matrices are not quantized; exclude all of them or none"
        )
    };
    kept.values().filter_map(half).map(say).collect()
}

/// The section of `config.json`.
fn section(tensors: &[Tensor]) -> Result<Value> {
    let mut arenas = serde_json::Map::new();
    for group in places(tensors).values() {
        let Some(name) = arena_name(group) else { continue };
        let members = experts(group);
        let gate_up = members.values().any(|members| members.len() == 2);
        let routed = group[0].kind() == Kind::Expert;
        let what = if routed { "experts" } else { "matrix" };
        arenas.insert(name, json!({ "of": what, "shape": group[0].matrix_shape()?, "count": members.len(), "gate_up": gate_up }));
    }
    // To compressed-tensors what lies in arenas is a module that it must leave alone.
    let rest = |tensor: &Tensor| {
        let alone = tensor.constant().is_some() || tensor.scheme().is_some_and(|scheme| in_arena(tensor, scheme));
        Tensor { form: if alone { Form::Kept(Dtype::Bf16) } else { tensor.form }, ..tensor.clone() }
    };
    let rest: Vec<Tensor> = tensors.iter().map(rest).collect();
    let mut section = json!({
        "quant_method": METHOD,
        "format": "native",
        "layout": layout::NAME,
        "version": 1,
        "arenas": arenas,
        "linear": compressed_tensors::quantization_config(&rest),
    });
    let constants = constants(tensors);
    if let (false, Some(section)) = (constants.is_empty(), section.as_object_mut()) {
        section.insert("constants".to_owned(), json!(constants));
    }
    Ok(section)
}

/// Dropped experts by `P.experts`: which, rising, and what they put out.
fn constants(tensors: &[Tensor]) -> BTreeMap<String, Said> {
    let mut found: BTreeMap<String, Said> = BTreeMap::new();
    for tensor in tensors {
        let Role::Layer(_, In::Expert(expert, Projection::Down)) = tensor.role else { continue };
        let (Some(constant), Some(block)) = (tensor.constant(), block(&tensor.name)) else { continue };
        let output = if constant == Constant::Zero { Output::Zero } else { Output::Mean };
        found.entry(block).or_insert_with(|| Said { experts: Vec::new(), output }).experts.push(expert);
    }
    found.values_mut().for_each(|said| said.experts.sort_unstable());
    found
}

/// An entry of `constants` in `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Said {
    /// Dropped experts, rising.
    pub experts: Vec<usize>,
    /// What they put out.
    pub output: Output,
}

/// What dropped experts of a block put out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// Nothing.
    Zero,
    /// The rows of `P.experts.mean`.
    Mean,
}

#[cfg(test)]
mod tests {
    use kernels::{Group, ScaleType};

    use super::*;

    fn scheme(bits: u8, zero: Zero) -> Form {
        Form::Quantized(Scheme { bits, group: Group::Size(32), zero, scale: ScaleType::Bf16 })
    }

    fn expert(expert: usize, projection: Projection, form: Form) -> Tensor {
        let (part, shape) = match projection {
            Projection::Gate => ("gate", vec![64, 96]),
            Projection::Up => ("up", vec![64, 96]),
            Projection::Down => ("down", vec![96, 64]),
        };
        let name = format!("model.layers.0.mlp.experts.{expert}.{part}_proj.weight");
        Tensor { name, shape, role: Role::Layer(0, In::Expert(expert, projection)), form }
    }

    fn layer(forms: [[Form; 3]; 2]) -> Vec<Tensor> {
        let of = |(e, forms): (usize, [Form; 3])| Projection::ALL.into_iter().zip(forms).map(move |(p, form)| expert(e, p, form));
        forms.into_iter().enumerate().flat_map(of).collect()
    }

    fn names(tensors: &[Tensor]) -> Vec<String> {
        Native {}.groups(tensors).iter().flat_map(|group| Native {}.declare(group).unwrap()).map(|d| d.name).collect()
    }

    #[test]
    fn gate_and_up_share_an_arena_where_they_agree() {
        let (two, four) = (scheme(2, Zero::Half), scheme(4, Zero::Symmetric));
        let tied = layer([[two, two, four], [four, four, two]]);
        let block = "model.layers.0.mlp.experts";
        assert_eq!(names(&tied), ["down.arena", "down.table", "gate_up.arena", "gate_up.table"].map(|part| format!("{block}.{part}")));
        let section = section(&tied).unwrap();
        assert_eq!(
            section["arenas"][format!("{block}.gate_up")],
            json!({ "of": "experts", "shape": [64, 96], "count": 2, "gate_up": true })
        );
        assert_eq!(section["linear"]["config_groups"], json!({}));
        let untied = layer([[two, four, four], [four, four, two]]);
        let parts = ["down", "gate", "up"].map(|part| [format!("{block}.{part}.arena"), format!("{block}.{part}.table")]);
        assert_eq!(names(&untied), parts.concat());
        // Two tiles of rows, one of inputs, at 4 and 2 bits, with four groups of scales: 2 · 1024 · 6 + 2 · 2 · 128 · 4.
        let declared = Native {}.declare(&Native {}.groups(&tied)[1]).unwrap();
        assert_eq!(declared[0].shape, [2 * 1024 * 6 + 2 * 2 * 128 * 4]);
    }

    #[test]
    fn dropped_experts_leave_their_arenas_and_a_row_each() {
        let (four, mean) = (scheme(4, Zero::Symmetric), Form::Constant(Constant::Mean(Dtype::Bf16)));
        let tensors = layer([[four; 3], [mean; 3]]);
        let block = "model.layers.0.mlp.experts";
        let parts = ["down.arena", "down.table", "gate_up.arena", "gate_up.table", "mean"].map(|part| format!("{block}.{part}"));
        assert_eq!(names(&tensors), parts);
        let declared = Native {}.declare(Native {}.groups(&tensors).last().unwrap()).unwrap();
        assert_eq!((declared[0].dtype, declared[0].shape.as_slice()), (Dtype::Bf16, [1, 96].as_slice()));
        let said = section(&tensors).unwrap();
        assert_eq!(said["constants"], json!({ block: { "experts": [1], "output": "mean" } }));
        assert_eq!(said["arenas"][format!("{block}.down")]["count"], json!(1));
        assert!(Native {}.refusals(&tensors).is_empty() && without_kernels(&tensors).is_empty());
        assert!(Native {}.notes(&tensors)[1].contains("adds their means"));
        let zero = layer([[four; 3], [Form::Constant(Constant::Zero); 3]]);
        assert_eq!(names(&zero), parts[..4]);
        assert_eq!(section(&zero).unwrap()["constants"][block]["output"], json!("zero"));
        // What other formats say: one line a matrix, or that zeros will do.
        assert_eq!(crate::export::CompressedTensors {}.refusals(&zero).len(), 3);
        assert!(crate::export::Dense {}.refusals(&zero).is_empty());
        assert!(crate::export::Dense {}.refusals(&tensors)[0].contains("allocate.drop = \"zero\""));
    }

    #[test]
    fn kernels_want_gate_and_up_in_one_and_routed_experts() {
        let (two, four) = (scheme(2, Zero::Half), scheme(4, Zero::Symmetric));
        assert_eq!(without_kernels(&layer([[two, two, four], [four, four, two]])), [""; 0]);
        let apart = without_kernels(&layer([[two, four, four], [four, four, two]]));
        assert!(apart.len() == 1 && apart[0].starts_with("layer 0: gate and up of an expert differ"), "{apart:?}");
        assert!(without_kernels(&[])[0].contains("none is quantized"));
    }

    #[test]
    fn a_matrix_that_compressed_tensors_lacks_gets_an_arena_of_its_own() {
        let query = |form| Tensor {
            name: "model.layers.0.self_attn.q_proj.weight".into(),
            shape: vec![64, 96],
            role: Role::Layer(0, In::Query),
            form,
        };
        assert_eq!(names(&[query(scheme(3, Zero::Symmetric))])[0], "model.layers.0.self_attn.q_proj.weight_packed");
        let half = [query(scheme(3, Zero::Half))];
        assert_eq!(names(&half), ["model.layers.0.self_attn.q_proj.arena", "model.layers.0.self_attn.q_proj.table"]);
        assert_eq!(section(&half).unwrap()["arenas"]["model.layers.0.self_attn.q_proj"]["of"], "matrix");
        assert!(Native {}.notes(&half)[0].contains("moepress emit"));
    }

    #[test]
    fn what_the_layout_does_not_hold_is_refused_by_name() {
        let (four, seven) = (scheme(4, Zero::Symmetric), scheme(7, Zero::Symmetric));
        let said = |tensors: &[Tensor]| Native {}.refusals(tensors).join("\n");
        assert_eq!(said(&layer([[four; 3]; 2])), "");
        let odd = said(&layer([[four; 3], [four, four, seven]]));
        assert!(odd.contains("experts.1.down_proj.weight: the native layout does not hold 7 bits a code"), "{odd}");
        let part = said(&layer([[four; 3], [four, four, Form::Kept(Dtype::Bf16)]]));
        assert!(part.contains("1 of 6 matrices are not quantized"), "{part}");
        assert_eq!(said(&layer([[Form::Kept(Dtype::Bf16); 3]; 2])), "");
    }
}

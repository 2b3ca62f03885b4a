//! The layout of this project's own kernels (MQT-1, [`kernels::layout`]): every routed expert has a width of its own.
//!
//! The routed experts of a layer become `P.experts.gate_up.arena` with `P.experts.gate_up.table` (where gate and up of each expert agree;
//! else `gate` and `up` apart) and `P.experts.down.arena` with its table; `P` is the block's name in the source. A matrix elsewhere that
//! compressed-tensors has no form for becomes `M.arena` and `M.table` under its module's name, an arena of one. Everything else stands as
//! compressed-tensors packs it or as it was. `config.json` says so: `quantization_config` has `quant_method = "moepress"`, `arenas` with the
//! shape of each, and `linear`, the section of compressed-tensors for the rest.
//!
//! No stock runtime knows `moepress`: the serving side takes what `moepress emit` writes.

use std::collections::{BTreeMap, BTreeSet};

use calib::arch::{Kind, Part as In, Projection, Role};
use calib::checkpoint::Declared;
use calib::tensor::Dtype;
use kernels::layout::{self, Arena, Packed, table::ENTRY_BYTES};
use serde_json::{Value, json};

use super::{Contents, Form, Format, Native, Part, Scheme, Source, Tensor, Zero, compressed_tensors, config};
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
}

impl Format for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn refusals(&self, tensors: &[Tensor]) -> Vec<String> {
        let mut found = Vec::new();
        for tensor in tensors {
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
        let note = "no runtime loads it by itself: the serving side needs what `moepress emit` writes for it, the Python package or the C loader; \
                    moepress eval reads it as it is";
        arenas.then(|| note.to_owned()).into_iter().collect()
    }

    fn groups<'t>(&self, tensors: &'t [Tensor]) -> Vec<Vec<&'t Tensor>> {
        places(tensors).into_values().collect()
    }

    fn declare(&self, group: &[&Tensor]) -> Result<Vec<Declared>> {
        let Some(name) = arena_name(group) else {
            return Ok(group.iter().map(|t| compressed_tensors::declare(t)).collect::<Result<Vec<_>>>()?.concat());
        };
        let arena = plan(group)?;
        let part = |what: &str, shape| Declared { name: format!("{name}.{what}"), dtype: Dtype::U8, shape };
        Ok(vec![part("arena", vec![arena.bytes]), part("table", vec![arena.entries.len(), ENTRY_BYTES])])
    }

    fn parts(&self, group: &[&Tensor], source: &dyn Source) -> Result<Vec<Part>> {
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

/// Every quantized matrix by where it goes; in an arena by expert, gate before up.
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
    routed.retain(|_, group| group[0].kind() == Kind::Expert);
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
        if tensor.scheme().is_none() {
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
        let arena = tensor.scheme().is_some_and(|scheme| in_arena(tensor, scheme));
        Tensor { form: if arena { Form::Kept(Dtype::Bf16) } else { tensor.form }, ..tensor.clone() }
    };
    let rest: Vec<Tensor> = tensors.iter().map(rest).collect();
    Ok(json!({
        "quant_method": METHOD,
        "format": "native",
        "layout": layout::NAME,
        "version": 1,
        "arenas": arenas,
        "linear": compressed_tensors::quantization_config(&rest),
    }))
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

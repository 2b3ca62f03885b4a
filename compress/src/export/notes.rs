//! Which runtimes will not load a compressed-tensors output, though the format can hold it.
//!
//! transformers 5 stacks all routed experts of a model into one kind of parameter and decodes them by one scheme (seen in 5.17: an
//! expert left dense is then an unexpected key, its stack a missing one, and zero points of experts are not passed on). vLLM looks a
//! layer's scheme up at expert 0 alone, and cuts rows by whole words of 32 bits.

use std::collections::{BTreeMap, BTreeSet};

use calib::arch::Kind;

use super::{Scheme, Tensor, Zero};

/// One note a runtime and reason; empty if all of them load the output.
pub fn of(tensors: &[Tensor]) -> Vec<String> {
    if tensors.iter().all(|tensor| tensor.scheme().is_none()) {
        return Vec::new();
    }
    let routed: Vec<&Tensor> = tensors.iter().filter(|tensor| tensor.kind() == Kind::Expert).collect();
    let schemes: BTreeSet<Option<Scheme>> = routed.iter().map(|tensor| tensor.scheme()).collect();
    let mut found = Vec::new();
    if let Some(dense) = routed.iter().find(|tensor| tensor.scheme().is_none()) {
        found.push(format!("transformers 5 does not load it: it expects every routed expert to be packed, and {} is not", dense.name));
    } else if schemes.len() > 1 {
        found.push(format!(
            "transformers 5 decodes it wrongly: it knows one scheme for all routed experts, and there are {}",
            schemes.len()
        ));
    }
    if schemes.iter().flatten().any(|scheme| scheme.zero == Zero::Integer) {
        found.push("transformers 5 decodes it wrongly: it drops the zero points of routed experts".to_owned());
    }
    if let Some(block) = uneven_block(&routed) {
        found.push(format!("vLLM does not load it: it takes one scheme a layer, and the experts of {block} differ"));
    }
    if let Some((name, inputs)) = ragged(tensors) {
        found.push(format!(
            "vLLM does not load it: it cuts rows into words of 32 bits, and the {inputs} inputs of {name} do not fill theirs"
        ));
    }
    found
}

/// The first block of experts whose schemes are not all the same.
fn uneven_block<'a>(routed: &[&'a Tensor]) -> Option<&'a str> {
    let mut blocks: BTreeMap<&str, Option<Scheme>> = BTreeMap::new();
    for tensor in routed {
        let Some((block, _)) = tensor.name.split_once(".experts.") else { continue };
        if *blocks.entry(block).or_insert(tensor.scheme()) != tensor.scheme() {
            return Some(block);
        }
    }
    None
}

/// The first matrix whose rows end inside a word.
fn ragged(tensors: &[Tensor]) -> Option<(&str, usize)> {
    tensors.iter().find_map(|tensor| {
        let (scheme, inputs) = (tensor.scheme()?, *tensor.shape.last()?);
        (inputs * usize::from(scheme.bits) % 32 != 0).then_some((tensor.name.as_str(), inputs))
    })
}

#[cfg(test)]
mod tests {
    use calib::arch::{Part, Projection, Role};
    use calib::tensor::Dtype;
    use kernels::{Group, ScaleType};

    use super::*;
    use crate::export::Form;

    fn scheme(bits: u8, zero: Zero) -> Form {
        Form::Quantized(Scheme { bits, group: Group::Size(32), zero, scale: ScaleType::Bf16 })
    }

    fn experts(forms: [Form; 4]) -> Vec<Tensor> {
        let names = ["0.mlp.experts.0.up_proj", "0.mlp.experts.1.up_proj", "1.mlp.experts.0.up_proj", "1.mlp.experts.1.up_proj"];
        let of = |(name, form)| Tensor {
            name: format!("model.layers.{name}.weight"),
            shape: vec![32, 64],
            role: Role::Layer(0, Part::Expert(0, Projection::Up)),
            form,
        };
        names.into_iter().zip(forms).map(of).collect()
    }

    #[test]
    fn what_every_runtime_loads_has_no_note() {
        assert!(of(&experts([scheme(4, Zero::Symmetric); 4])).is_empty());
        assert!(of(&experts([Form::Kept(Dtype::Bf16); 4])).is_empty());
    }

    #[test]
    fn each_reason_is_said() {
        let four = scheme(4, Zero::Symmetric);
        let said = |forms| of(&experts(forms)).join("; ");
        let dense = said([four, four, Form::Kept(Dtype::Bf16), Form::Kept(Dtype::Bf16)]);
        assert!(dense.contains("transformers 5") && dense.contains("layers.1.mlp.experts.0.up_proj") && !dense.contains("vLLM"), "{dense}");
        let layers = said([four, four, scheme(8, Zero::Symmetric), scheme(8, Zero::Symmetric)]);
        assert!(layers.contains("there are 2") && !layers.contains("vLLM"), "{layers}");
        let uneven = said([four, scheme(8, Zero::Symmetric), four, four]);
        assert!(uneven.contains("experts of model.layers.0.mlp differ"), "{uneven}");
        assert!(said([scheme(4, Zero::Integer); 4]).contains("zero points"));
        let mut narrow = experts([scheme(4, Zero::Symmetric); 4]);
        narrow[3].shape = vec![32, 20];
        assert!(of(&narrow).join("").contains("the 20 inputs of model.layers.1.mlp.experts.1"));
    }
}

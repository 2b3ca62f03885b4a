//! Gives every tensor of a checkpoint its role, or says all that does not fit.
//!
//! What the config promises is written out, role by role, name by name, with its shape; what is stored is held against it.
//! Nothing is guessed from a name: a renamed tensor is at once a role without its tensor and a tensor without a role.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use super::family::{Beyond, Family};
use super::{Attention, Kind, Mlp, Moe, NormKind, Part, Projection, QkNorm, Role, Spec};
use crate::{Error, Result};

/// One axis of a tensor: what it counts and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// What it counts.
    pub name: &'static str,
    /// How many.
    pub size: usize,
}

/// A tensor with its role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Its role.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// Which tensor has which role, both ways.
#[derive(Clone, Debug)]
pub struct Layout {
    /// By role, then by name.
    tensors: Vec<Claimed>,
    by_name: HashMap<String, Role>,
    by_role: HashMap<Role, usize>,
}

/// Every tensor that a config promises, in the order of roles: its role, its name and its axes.
pub fn expected<'a>(family: &'a Family, spec: &'a Spec) -> impl Iterator<Item = (Role, String, Vec<Axis>)> + 'a {
    let layers = (0..spec.layers.len()).flat_map(|layer| {
        let parts = parts(spec, &spec.layers[layer].mlp).into_iter();
        parts.map(move |(part, axes)| (Role::Layer(layer, part), axes))
    });
    let embedding = [(Role::Embedding, vec![axis("vocab", spec.vocab), hidden(spec)])];
    let named = embedding.into_iter().chain(layers).chain(last(spec));
    named.filter_map(|(role, axes)| Some((role, family.names.of(role)?, axes)))
}

impl Layout {
    /// Claims every tensor, given by name and shape (FP8 scales folded away), for exactly one role.
    ///
    /// A stored head of a model whose config ties it is claimed as [`Role::Buffer`]; that the two are equal is for the caller
    /// to check, who has the bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Misfit`] with everything that does not fit: tensors that no role claims, roles without their tensor, experts
    /// missing in a layer, shapes that contradict the config.
    pub fn claim(family: &Family, spec: &Spec, tensors: &[(String, Vec<usize>)]) -> Result<Self> {
        let mut misfit = Misfit::new(family, spec);
        let mut stored: HashMap<&str, &[usize]> = tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
        let mut claimed = Vec::with_capacity(tensors.len());
        for (role, name, axes) in expected(family, spec) {
            match stored.remove(name.as_str()) {
                Some(shape) if fits(shape, &axes) => claimed.push(Claimed { role, name, shape: shape.to_vec() }),
                Some(shape) => misfit.shapes.push(ShapeMisfit { name, stored: shape.to_vec(), axes }),
                None => misfit.miss(role, name),
            }
        }
        let mut rest: Vec<(&str, &[usize])> = stored.into_iter().collect();
        rest.sort_unstable();
        claim_rest(family, spec, &rest, &mut claimed, &mut misfit);
        if misfit.is_empty() { Ok(Self::new(claimed)) } else { Err(Error::from(Box::new(misfit))) }
    }

    fn new(mut tensors: Vec<Claimed>) -> Self {
        tensors.sort_unstable_by(|a, b| (a.role, &a.name).cmp(&(b.role, &b.name)));
        let by_name = tensors.iter().map(|tensor| (tensor.name.clone(), tensor.role)).collect();
        let unique = tensors.iter().enumerate().filter(|(_, tensor)| !matches!(tensor.role, Role::Mtp | Role::Buffer));
        let by_role = unique.map(|(at, tensor)| (tensor.role, at)).collect();
        Self { tensors, by_name, by_role }
    }

    /// The tensor of a role; `None` where the model has none, and for [`Role::Mtp`] and [`Role::Buffer`], which many share.
    pub fn name(&self, role: Role) -> Option<&str> {
        self.get(role).map(|tensor| tensor.name.as_str())
    }

    /// As [`Layout::name`], with the shape.
    pub fn get(&self, role: Role) -> Option<&Claimed> {
        self.by_role.get(&role).map(|at| &self.tensors[*at])
    }

    /// The role of a tensor; `None` for a name that the checkpoint does not have.
    pub fn role(&self, name: &str) -> Option<Role> {
        self.by_name.get(name).copied()
    }

    /// Every tensor, by role and then by name.
    pub fn tensors(&self) -> &[Claimed] {
        &self.tensors
    }

    /// Every role with its tensor's name, sorted by role.
    pub fn roles(&self) -> impl Iterator<Item = (Role, &str)> {
        self.tensors.iter().map(|tensor| (tensor.role, tensor.name.as_str()))
    }

    /// Tensors that are dropped when the model is written, in order: buffers, and the stored copy of a tied head.
    pub fn buffers(&self) -> impl Iterator<Item = &str> {
        self.roles().filter(|(role, _)| *role == Role::Buffer).map(|(_, name)| name)
    }

    /// Tensors of multi-token-prediction layers, in order.
    pub fn mtp(&self) -> impl Iterator<Item = &str> {
        self.roles().filter(|(role, _)| *role == Role::Mtp).map(|(_, name)| name)
    }

    /// Something of every tensor, summed by kind: bytes, if `of` gives a tensor's bytes.
    pub fn sum_by_kind(&self, mut of: impl FnMut(&Claimed) -> u64) -> BTreeMap<Kind, u64> {
        let mut sums = BTreeMap::new();
        for tensor in &self.tensors {
            *sums.entry(tensor.role.kind()).or_default() += of(tensor);
        }
        sums
    }
}

/// Buffers, a tied head that is stored nevertheless, MTP layers; the others are strangers.
fn claim_rest(family: &Family, spec: &Spec, rest: &[(&str, &[usize])], claimed: &mut Vec<Claimed>, misfit: &mut Misfit) {
    let mut beyond: BTreeMap<usize, Vec<(&str, &[usize])>> = BTreeMap::new();
    for &(name, shape) in rest {
        let claim = |role| Claimed { role, name: name.to_owned(), shape: shape.to_vec() };
        if name.ends_with("rotary_emb.inv_freq") {
            claimed.push(claim(Role::Buffer));
        } else if spec.tied && family.names.of(Role::Head).as_deref() == Some(name) {
            let axes = vec![axis("vocab", spec.vocab), hidden(spec)];
            match fits(shape, &axes) {
                true => claimed.push(claim(Role::Buffer)),
                false => misfit.shapes.push(ShapeMisfit { name: name.to_owned(), stored: shape.to_vec(), axes }),
            }
        } else if let Some(layer) = layer_of(name).filter(|layer| family.beyond == Beyond::Mtp && *layer >= spec.layers.len()) {
            beyond.entry(layer).or_default().push((name, shape));
        } else {
            misfit.strangers.push(name.to_owned());
        }
    }
    for (layer, tensors) in beyond {
        claim_mtp(family, spec, layer, &tensors, claimed, misfit);
    }
}

/// One layer beyond the model's own: an MTP layer if it has what makes it one, else a layer too many.
fn claim_mtp(family: &Family, spec: &Spec, layer: usize, tensors: &[(&str, &[usize])], claimed: &mut Vec<Claimed>, misfit: &mut Misfit) {
    let own = mtp_own(spec, layer);
    let marks = own.iter().filter(|tensor| tensor.mark).all(|mark| tensors.iter().any(|(name, _)| *name == mark.name));
    if !marks {
        misfit.strangers.extend(tensors.iter().map(|(name, _)| (*name).to_owned()));
        return;
    }
    let mut known: HashMap<String, Vec<Axis>> = own.into_iter().map(|tensor| (tensor.name, tensor.axes)).collect();
    let sparse = spec.layers.iter().rev().find(|layer| matches!(layer.mlp, Mlp::Moe(_)));
    for (part, axes) in sparse.into_iter().flat_map(|layer| parts(spec, &layer.mlp)) {
        known.extend(family.names.of(Role::Layer(layer, part)).map(|name| (name, axes)));
    }
    for &(name, shape) in tensors {
        match known.get(name) {
            Some(axes) if fits(shape, axes) => claimed.push(Claimed { role: Role::Mtp, name: name.to_owned(), shape: shape.to_vec() }),
            Some(axes) => misfit.shapes.push(ShapeMisfit { name: name.to_owned(), stored: shape.to_vec(), axes: axes.clone() }),
            None => misfit.strangers.push(name.to_owned()),
        }
    }
}

/// A tensor that only MTP layers have.
struct MtpTensor {
    name: String,
    axes: Vec<Axis>,
    /// Every MTP layer has it.
    mark: bool,
}

/// What an MTP layer has beside an ordinary layer (DeepSeek-V3's report, arXiv 2412.19437, section 2.2).
fn mtp_own(spec: &Spec, layer: usize) -> Vec<MtpTensor> {
    let wide = axis("two hidden states", 2 * spec.hidden);
    let vocab = axis("vocab", spec.vocab);
    let named = |name: &str, axes: Vec<Axis>, mark| MtpTensor { name: format!("model.layers.{layer}.{name}.weight"), axes, mark };
    vec![
        named("enorm", vec![hidden(spec)], true),
        named("hnorm", vec![hidden(spec)], true),
        named("eh_proj", vec![hidden(spec), wide], true),
        named("shared_head.norm", vec![hidden(spec)], false),
        named("shared_head.head", vec![vocab, hidden(spec)], false),
        named("embed_tokens", vec![vocab, hidden(spec)], false),
    ]
}

fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
}

fn axis(name: &'static str, size: usize) -> Axis {
    Axis { name, size }
}

fn hidden(spec: &Spec) -> Axis {
    axis("hidden", spec.hidden)
}

fn fits(shape: &[usize], axes: &[Axis]) -> bool {
    shape.len() == axes.len() && shape.iter().zip(axes).all(|(size, axis)| *size == axis.size)
}

/// What follows the last layer.
fn last(spec: &Spec) -> Vec<(Role, Vec<Axis>)> {
    let mut last = vec![(Role::FinalNorm, vec![hidden(spec)])];
    if spec.norm.kind == NormKind::Layer {
        last.push((Role::FinalNormBias, vec![hidden(spec)]));
    }
    if !spec.tied {
        last.push((Role::Head, vec![axis("vocab", spec.vocab), hidden(spec)]));
    }
    if spec.head_bias {
        last.push((Role::HeadBias, vec![axis("vocab", spec.vocab)]));
    }
    last
}

/// The parts of one layer, with their axes.
fn parts(spec: &Spec, mlp: &Mlp) -> Vec<(Part, Vec<Axis>)> {
    let mut parts = vec![(Part::InputNorm, vec![hidden(spec)]), (Part::PostNorm, vec![hidden(spec)])];
    if spec.norm.kind == NormKind::Layer {
        parts.extend([(Part::InputNormBias, vec![hidden(spec)]), (Part::PostNormBias, vec![hidden(spec)])]);
    }
    attention_parts(spec, &mut parts);
    match mlp {
        Mlp::Dense { inner } => gated(spec, *inner, Part::Dense, &mut parts),
        Mlp::Moe(moe) => moe_parts(spec, moe, &mut parts),
    }
    parts.sort_unstable_by_key(|(part, _)| *part);
    parts
}

fn attention_parts(spec: &Spec, parts: &mut Vec<(Part, Vec<Axis>)>) {
    match &spec.attention {
        Attention::Grouped(grouped) => {
            let query = axis("heads · head_dim", grouped.heads * grouped.head_dim);
            let key = axis("kv_heads · head_dim", grouped.kv_heads * grouped.head_dim);
            parts.extend([(Part::Query, vec![query, hidden(spec)]), (Part::Key, vec![key, hidden(spec)])]);
            parts.extend([(Part::Value, vec![key, hidden(spec)]), (Part::Output, vec![hidden(spec), query])]);
            if grouped.qkv_bias {
                parts.extend([(Part::QueryBias, vec![query]), (Part::KeyBias, vec![key]), (Part::ValueBias, vec![key])]);
            }
            if grouped.output_bias {
                parts.push((Part::OutputBias, vec![hidden(spec)]));
            }
            let head = axis("head_dim", grouped.head_dim);
            match grouped.qk_norm {
                QkNorm::None => {}
                QkNorm::PerHead => parts.extend([(Part::QueryNorm, vec![head]), (Part::KeyNorm, vec![head])]),
                QkNorm::FullWidth => parts.extend([(Part::QueryNorm, vec![query]), (Part::KeyNorm, vec![key])]),
            }
        }
        Attention::Latent(latent) => {
            let query = axis("heads · (nope + rope)", latent.heads * (latent.nope_dim + latent.rope_dim));
            let expanded = axis("heads · (nope + value)", latent.heads * (latent.nope_dim + latent.value_dim));
            let value = axis("heads · value_dim", latent.heads * latent.value_dim);
            let kv_rank = axis("kv_rank", latent.kv_rank);
            let compressed = axis("kv_rank + rope", latent.kv_rank + latent.rope_dim);
            match latent.q_rank.map(|rank| axis("q_rank", rank)) {
                None => parts.push((Part::Query, vec![query, hidden(spec)])),
                Some(rank) => {
                    parts.extend([(Part::QueryA, vec![rank, hidden(spec)]), (Part::QueryANorm, vec![rank])]);
                    parts.push((Part::QueryB, vec![query, rank]));
                    parts.extend(latent.bias.then(|| (Part::QueryABias, vec![rank])));
                }
            }
            parts.extend([(Part::KvA, vec![compressed, hidden(spec)]), (Part::KvANorm, vec![kv_rank])]);
            parts.extend([(Part::KvB, vec![expanded, kv_rank]), (Part::Output, vec![hidden(spec), value])]);
            if latent.bias {
                parts.extend([(Part::KvABias, vec![compressed]), (Part::OutputBias, vec![hidden(spec)])]);
            }
        }
    }
}

fn moe_parts(spec: &Spec, moe: &Moe, parts: &mut Vec<(Part, Vec<Axis>)>) {
    let experts = axis("experts", moe.experts);
    parts.push((Part::Router, vec![experts, hidden(spec)]));
    if moe.router.correction {
        parts.push((Part::RouterCorrection, vec![experts]));
    }
    for expert in 0..moe.experts {
        gated(spec, moe.inner, |projection| Part::Expert(expert, projection), parts);
    }
    if let Some(shared) = &moe.shared {
        gated(spec, shared.inner, Part::Shared, parts);
        if shared.gated {
            parts.push((Part::SharedGate, vec![axis("gate", 1), hidden(spec)]));
        }
    }
}

/// The three matrices of a gated MLP.
fn gated(spec: &Spec, inner: usize, part: impl Fn(Projection) -> Part, parts: &mut Vec<(Part, Vec<Axis>)>) {
    let inner = axis("inner", inner);
    parts.push((part(Projection::Gate), vec![inner, hidden(spec)]));
    parts.push((part(Projection::Up), vec![inner, hidden(spec)]));
    parts.push((part(Projection::Down), vec![hidden(spec), inner]));
}

/// All that does not fit between a config and the tensors beside it.
#[derive(Debug)]
pub struct Misfit {
    /// The family.
    pub model_type: &'static str,
    /// What the config counts, in words.
    config: String,
    /// Tensors that no role claims.
    pub strangers: Vec<String>,
    /// Roles without their tensor, by the name that is missing; of missing experts all three projections stand here.
    pub missing: Vec<(Role, String)>,
    shapes: Vec<ShapeMisfit>,
    more_missing: usize,
}

#[derive(Debug)]
struct ShapeMisfit {
    name: String,
    stored: Vec<usize>,
    axes: Vec<Axis>,
}

/// As many missing tensors are remembered: a config of another model can promise millions.
const REMEMBERED: usize = 10_000;

/// As many lines of each kind are shown.
const SHOWN: usize = 8;

impl Misfit {
    fn new(family: &Family, spec: &Spec) -> Self {
        let moe = (0..spec.layers.len()).find_map(|layer| spec.moe(layer));
        let experts = moe.map_or(0, |moe| moe.experts);
        let config = format!("{} layers, {experts} experts a layer, hidden size {}", spec.layers.len(), spec.hidden);
        Self { model_type: family.model_type, config, strangers: Vec::new(), missing: Vec::new(), shapes: Vec::new(), more_missing: 0 }
    }

    fn miss(&mut self, role: Role, name: String) {
        if self.missing.len() < REMEMBERED {
            self.missing.push((role, name));
        } else {
            self.more_missing += 1;
        }
    }

    fn is_empty(&self) -> bool {
        self.strangers.is_empty() && self.missing.is_empty() && self.shapes.is_empty()
    }

    /// Experts of which nothing is stored, as (layer, expert).
    pub fn missing_experts(&self) -> Vec<(usize, usize)> {
        let mut counts: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for (role, _) in &self.missing {
            if let Role::Layer(layer, Part::Expert(expert, _)) = role {
                *counts.entry((*layer, *expert)).or_default() += 1;
            }
        }
        counts.into_iter().filter(|(_, count)| *count == Projection::ALL.len()).map(|(expert, _)| expert).collect()
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the tensors are not those of this {} config ({}):", self.model_type, self.config)?;
        let experts = self.missing_experts();
        let whole: BTreeSet<(usize, usize)> = experts.iter().copied().collect();
        lines(f, experts.iter().map(|(layer, expert)| format!("expert {expert} of layer {layer} is missing")), 0)?;
        let single = self.missing.iter().filter(|(role, _)| match role {
            Role::Layer(layer, Part::Expert(expert, _)) => !whole.contains(&(*layer, *expert)),
            _ => true,
        });
        lines(f, single.map(|(role, name)| format!("{name} is missing ({role})")), self.more_missing)?;
        lines(f, self.strangers.iter().map(|name| format!("{name} has no role in it")), 0)?;
        let shapes = self.shapes.iter().map(|misfit| {
            let axes = misfit.axes.iter().map(|axis| axis.name).collect::<Vec<_>>().join(", ");
            let sizes = misfit.axes.iter().map(|axis| axis.size).collect::<Vec<_>>();
            format!("{} is stored as {:?}, but the config makes it {sizes:?} [{axes}]", misfit.name, misfit.stored)
        });
        lines(f, shapes, 0)?;
        f.write_str("\nconfig.json and the tensors have to be of the same model: compare both with the original download")
    }
}

impl std::error::Error for Misfit {}

/// The first lines, and how many more there are.
fn lines(f: &mut fmt::Formatter<'_>, mut items: impl Iterator<Item = String>, unseen: usize) -> fmt::Result {
    for item in items.by_ref().take(SHOWN) {
        write!(f, "\n  {item}")?;
    }
    match items.count() + unseen {
        0 => Ok(()),
        more => write!(f, "\n  and {more} more of these"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::arch::{FAMILIES, Resolved, resolve};

    type Tensors = Vec<(String, Vec<usize>)>;

    /// A small config of any family, with every part that the family can have.
    fn tiny(family: &Family) -> Value {
        json!({
            "model_type": family.model_type, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
            family.experts: 8, "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
            "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "attention_bias": true,
            "lm_head_bias": true, "mlp_only_layers": [0],
        })
    }

    fn resolved(family: &Family, changes: Value) -> (Resolved, Tensors) {
        let mut config = tiny(family);
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let resolved = resolve(&config).unwrap();
        let sizes = |axes: Vec<Axis>| axes.iter().map(|axis| axis.size).collect();
        let tensors = expected(resolved.family, &resolved.spec).map(|(_, name, axes)| (name, sizes(axes))).collect();
        (resolved, tensors)
    }

    fn family(model_type: &str) -> &'static Family {
        FAMILIES.iter().find(|family| family.model_type == model_type).unwrap()
    }

    fn refusal(resolved: &Resolved, tensors: &Tensors) -> String {
        Layout::claim(resolved.family, &resolved.spec, tensors).unwrap_err().to_string()
    }

    #[test]
    fn every_family_claims_all_of_its_tensors_and_no_other() {
        for family in FAMILIES {
            let (resolved, tensors) = resolved(family, json!({}));
            let layout = Layout::claim(family, &resolved.spec, &tensors).unwrap();
            assert_eq!(layout.tensors().len(), tensors.len());
            assert!(layout.tensors().windows(2).all(|pair| pair[0].role < pair[1].role), "roles repeat");
            for (name, shape) in &tensors {
                let claimed = layout.get(layout.role(name).unwrap()).unwrap();
                assert_eq!((&claimed.name, &claimed.shape), (name, shape));
            }
            let stranger = "model.layers.0.self_attn.sinks".to_owned();
            let more: Tensors = tensors.iter().cloned().chain([(stranger.clone(), vec![4])]).collect();
            assert!(refusal(&resolved, &more).contains(&format!("\n  {stranger} has no role")));
        }
    }

    #[test]
    fn one_tensor_removed_renamed_or_reshaped_is_named() {
        for family in FAMILIES {
            let (resolved, tensors) = resolved(family, json!({}));
            for at in 0..tensors.len() {
                let (name, shape) = tensors[at].clone();
                let mut removed = tensors.clone();
                removed.remove(at);
                let said = refusal(&resolved, &removed);
                assert!(said.contains(&format!("\n  {name} is missing")) && !said.contains("has no role"), "{said}");

                let mut renamed = tensors.clone();
                renamed[at].0 = name.replace("model", "transformer").replace("lm_head", "output");
                let said = refusal(&resolved, &renamed);
                assert!(said.contains(&format!("\n  {name} is missing")), "{said}");
                assert!(said.contains(&format!("\n  {} has no role", renamed[at].0)), "{said}");

                let mut reshaped = tensors.clone();
                reshaped[at].1[0] += 1;
                let said = refusal(&resolved, &reshaped);
                assert!(
                    said.contains(&format!("\n  {name} is stored as {:?}, but the config makes it {shape:?} [", reshaped[at].1)),
                    "{said}"
                );
            }
        }
    }

    #[test]
    fn an_expert_missing_in_one_layer_is_named_once() {
        for family in FAMILIES {
            let (resolved, mut tensors) = resolved(family, json!({}));
            tensors.retain(|(name, _)| !(name.starts_with("model.layers.2.") && name.contains(".experts.5.")));
            let said = refusal(&resolved, &tensors);
            assert!(said.contains("\n  expert 5 of layer 2 is missing\n") && !said.contains("experts.5."), "{said}");
        }
    }

    #[test]
    fn another_count_of_experts_or_layers_is_cut_short() {
        let (_, tensors) = resolved(family("mixtral"), json!({}));
        let (more, _) = resolved(family("mixtral"), json!({"num_local_experts": 64, "num_hidden_layers": 4000}));
        let said = refusal(&more, &tensors);
        assert!(said.contains("expert 8 of layer 0 is missing") && said.contains("more of these"), "{said}");
        assert!(said.lines().count() < 30, "{said}");
        let (fewer, _) = resolved(family("mixtral"), json!({"num_hidden_layers": 2}));
        assert!(refusal(&fewer, &tensors).contains("model.layers.2.block_sparse_moe.experts.0.w1.weight has no role"));
    }

    #[test]
    fn old_buffers_are_claimed_and_counted() {
        for family in FAMILIES {
            let (resolved, mut tensors) = resolved(family, json!({}));
            tensors.extend((0..3).map(|layer| (format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"), vec![4])));
            let layout = Layout::claim(family, &resolved.spec, &tensors).unwrap();
            assert_eq!(layout.buffers().count(), 3);
            assert_eq!(layout.role("model.layers.1.self_attn.rotary_emb.inv_freq"), Some(Role::Buffer));
            assert_eq!(layout.sum_by_kind(|tensor| tensor.shape.iter().product::<usize>() as u64)[&Kind::Buffer], 12);
        }
    }

    #[test]
    fn a_tied_head_is_absent_or_a_copy_to_drop() {
        for family in FAMILIES {
            let (resolved, mut tensors) = resolved(family, json!({"tie_word_embeddings": true}));
            assert_eq!(Layout::claim(family, &resolved.spec, &tensors).unwrap().name(Role::Head), None);
            tensors.push(("lm_head.weight".into(), vec![64, 32]));
            let layout = Layout::claim(family, &resolved.spec, &tensors).unwrap();
            assert_eq!((layout.name(Role::Head), layout.buffers().collect::<Vec<_>>()), (None, vec!["lm_head.weight"]));
            tensors.last_mut().unwrap().1 = vec![65, 32];
            assert!(refusal(&resolved, &tensors).contains("lm_head.weight is stored as [65, 32]"));
        }
    }

    /// An MTP layer behind the three layers of `tensors`.
    fn mtp_layer(tensors: &Tensors) -> Tensors {
        let ordinary = tensors.iter().filter(|(name, _)| name.starts_with("model.layers.2."));
        let own = [("enorm", vec![32]), ("hnorm", vec![32]), ("eh_proj", vec![32, 64]), ("shared_head.norm", vec![32])];
        let shared = [("shared_head.head", vec![64, 32]), ("embed_tokens", vec![64, 32])];
        let own = own.into_iter().chain(shared).map(|(name, shape)| (format!("model.layers.3.{name}.weight"), shape));
        ordinary.map(|(name, shape)| (name.replace("layers.2.", "layers.3."), shape.clone())).chain(own).collect()
    }

    #[test]
    fn a_prediction_layer_is_claimed_whatever_the_config_announces() {
        for announced in [json!({}), json!({"num_nextn_predict_layers": 0}), json!({"num_nextn_predict_layers": 1})] {
            let (resolved, mut tensors) = resolved(family("deepseek_v3"), announced);
            let more = mtp_layer(&tensors);
            tensors.extend(more.clone());
            let layout = Layout::claim(resolved.family, &resolved.spec, &tensors).unwrap();
            assert_eq!(layout.mtp().count(), more.len());
            assert_eq!(layout.role("model.layers.3.mlp.experts.7.up_proj.weight"), Some(Role::Mtp));
        }
    }

    #[test]
    fn a_layer_too_many_is_no_prediction_layer() {
        let (v3, tensors) = resolved(family("deepseek_v3"), json!({}));
        let with = |more: Tensors| tensors.iter().cloned().chain(more).collect::<Tensors>();
        let mut ordinary = mtp_layer(&tensors);
        ordinary.retain(|(name, _)| !name.contains("eh_proj"));
        assert!(refusal(&v3, &with(ordinary)).contains("model.layers.3.enorm.weight has no role"));
        let mut wrong = mtp_layer(&tensors);
        wrong.iter_mut().find(|(name, _)| name.ends_with("eh_proj.weight")).unwrap().1 = vec![32, 32];
        assert!(refusal(&v3, &with(wrong)).contains("model.layers.3.eh_proj.weight is stored as [32, 32]"));
        let mut strange = mtp_layer(&tensors);
        strange.push(("model.layers.3.sinks".into(), vec![4]));
        assert!(refusal(&v3, &with(strange)).contains("model.layers.3.sinks has no role"));
        let (v2, tensors) = resolved(family("deepseek_v2"), json!({}));
        let more = mtp_layer(&tensors);
        assert!(refusal(&v2, &tensors.into_iter().chain(more).collect()).contains("model.layers.3.eh_proj.weight has no role"));
    }
}

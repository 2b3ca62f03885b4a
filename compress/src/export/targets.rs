//! Sets of module names as regular expressions: `config_groups` and `ignore` of compressed-tensors.
//!
//! Every expression is anchored at both ends and matches exactly the modules it was made from, among all modules of the
//! checkpoint: expressions of different groups are disjoint, whatever precedence a loader gives them. Numbers in names (layer,
//! expert) become `\d+` where all of them belong, otherwise a list; so a layer that is not quantized, an MTP layer for one,
//! is never caught by an expression meant for the others.

use std::collections::{BTreeMap, BTreeSet};

/// The layer and the expert in a module's name, where it has them.
type Place = (usize, Option<usize>);

/// A name with its numbers taken out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Template {
    /// Segments, `None` where a number stood, without the last one.
    stem: Vec<Option<String>>,
    /// The last segment.
    last: String,
}

/// Expressions (with the prefix `re:`, or a plain name) that match `wanted` and nothing else of `all`.
///
/// `all` are the names of every module that holds a weight in the checkpoint; it includes `wanted`. Sorted.
pub fn targets(wanted: &BTreeSet<&str>, all: &BTreeSet<&str>) -> Vec<String> {
    let everything = by_template(all);
    let mut exact = Vec::new();
    // Projections that stand at the same places share one expression: stem, layers, experts, and the last segments.
    type Key = (Vec<Option<String>>, String, String);
    let mut shared: BTreeMap<Key, BTreeSet<String>> = BTreeMap::new();
    for (template, places) in by_template(wanted) {
        let Some(places) = places else {
            exact.extend(wanted.iter().filter(|name| split(name).0 == template).map(|name| (*name).to_owned()));
            continue;
        };
        let whole = everything.get(&template).and_then(Option::as_ref).unwrap_or(&places);
        for (layers, experts) in expressions(&places, whole) {
            shared.entry((template.stem.clone(), layers, experts)).or_default().insert(template.last.clone());
        }
    }
    let mut found: Vec<String> = shared.into_iter().map(|((stem, layers, experts), last)| render(&stem, &layers, &experts, last)).collect();
    found.extend(exact);
    found.sort();
    found
}

/// Places by template; `None` for templates with no number or more than two, which are named one by one.
fn by_template(names: &BTreeSet<&str>) -> BTreeMap<Template, Option<BTreeSet<Place>>> {
    let mut found: BTreeMap<Template, Option<BTreeSet<Place>>> = BTreeMap::new();
    for name in names {
        let (template, numbers) = split(name);
        match numbers[..] {
            [layer] => found.entry(template).or_insert_with(|| Some(BTreeSet::new())).get_or_insert_default().insert((layer, None)),
            [layer, expert] => {
                found.entry(template).or_insert_with(|| Some(BTreeSet::new())).get_or_insert_default().insert((layer, Some(expert)))
            }
            _ => found.insert(template, None).is_some(),
        };
    }
    found
}

fn split(name: &str) -> (Template, Vec<usize>) {
    let (stem, last) = name.rsplit_once('.').unwrap_or(("", name));
    let mut numbers = Vec::new();
    let segments = stem.split('.').filter(|s| !s.is_empty()).map(|segment| match segment.parse() {
        Ok(number) if segment.bytes().all(|b| b.is_ascii_digit()) && (segment == "0" || !segment.starts_with('0')) => {
            numbers.push(number);
            None
        }
        _ => Some(segment.to_owned()),
    });
    let stem = segments.collect();
    (Template { stem, last: last.to_owned() }, numbers)
}

/// Pairs of a layer and an expert expression that cover `places` exactly; layers with the same experts share a pair.
fn expressions(places: &BTreeSet<Place>, whole: &BTreeSet<Place>) -> Vec<(String, String)> {
    let layers = experts_by_layer(places);
    let whole = experts_by_layer(whole);
    let mut same: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    for (layer, experts) in &layers {
        let experts = if experts.is_empty() { String::new() } else { numbers(experts, whole.get(layer) == Some(experts)) };
        same.entry(experts).or_default().insert(*layer);
    }
    let all: BTreeSet<usize> = whole.keys().copied().collect();
    same.into_iter().map(|(experts, layers)| (numbers(&layers, layers == all), experts)).collect()
}

fn experts_by_layer(places: &BTreeSet<Place>) -> BTreeMap<usize, BTreeSet<usize>> {
    let mut found: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for &(layer, expert) in places {
        found.entry(layer).or_default().extend(expert);
    }
    found
}

fn numbers(set: &BTreeSet<usize>, is_all: bool) -> String {
    if is_all && set.len() > 1 {
        return r"\d+".to_owned();
    }
    alternatives(set.iter().map(usize::to_string))
}

fn alternatives(words: impl ExactSizeIterator<Item = String>) -> String {
    let several = words.len() > 1;
    let joined = words.collect::<Vec<_>>().join("|");
    if several { format!("({joined})") } else { joined }
}

fn render(stem: &[Option<String>], layers: &str, experts: &str, last: BTreeSet<String>) -> String {
    let mut given = [layers, experts].into_iter();
    let mut segments: Vec<String> = Vec::new();
    for segment in stem {
        segments.push(match segment {
            Some(word) => regex::escape(word),
            None => given.next().unwrap_or_default().to_owned(),
        });
    }
    segments.push(alternatives(last.into_iter().map(|word| regex::escape(&word)).collect::<Vec<_>>().into_iter()));
    format!("re:^{}$", segments.join(r"\."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use regex::Regex;

    fn names(layers: std::ops::Range<usize>, experts: usize) -> Vec<String> {
        let of = |layer: usize| {
            let mut found = vec![format!("model.layers.{layer}.self_attn.q_proj"), format!("model.layers.{layer}.mlp.gate")];
            for e in 0..experts {
                for p in ["gate_proj", "up_proj", "down_proj"] {
                    found.push(format!("model.layers.{layer}.mlp.experts.{e}.{p}"));
                }
            }
            found
        };
        layers.flat_map(of).chain(["lm_head".into(), "model.embed_tokens".into()]).collect()
    }

    /// Matches as Python's `re.match` with our anchors does: exactly the wanted names, each once.
    fn holds(found: &[String], wanted: &BTreeSet<&str>, all: &BTreeSet<&str>) {
        let compiled: Vec<Option<Regex>> = found.iter().map(|t| t.strip_prefix("re:").map(|r| Regex::new(r).unwrap())).collect();
        for name in all {
            let hits = compiled.iter().zip(found).filter(|(r, t)| r.as_ref().map_or(t == name, |r| r.is_match(name))).count();
            assert_eq!(hits, usize::from(wanted.contains(name)), "{name} by {found:?}");
        }
    }

    #[test]
    fn all_experts_are_one_expression() {
        let names = names(0..3, 2);
        let all: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let wanted: BTreeSet<&str> = all.iter().copied().filter(|n| n.contains("experts")).collect();
        let found = targets(&wanted, &all);
        assert_eq!(found, [r"re:^model\.layers\.\d+\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$"]);
        holds(&found, &wanted, &all);
    }

    #[test]
    fn a_layer_left_out_is_not_caught() {
        let names = names(0..12, 2);
        let all: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let wanted: BTreeSet<&str> = all.iter().copied().filter(|n| n.contains("experts") && !n.contains("layers.1.")).collect();
        let found = targets(&wanted, &all);
        assert_eq!(found, [r"re:^model\.layers\.(0|2|3|4|5|6|7|8|9|10|11)\.mlp\.experts\.\d+\.(down_proj|gate_proj|up_proj)$"]);
        holds(&found, &wanted, &all);
    }

    #[test]
    fn uneven_experts_and_plain_names() {
        let names = names(0..3, 12);
        let all: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let some = ["lm_head", "model.layers.0.mlp.experts.1.up_proj", "model.layers.2.mlp.experts.11.up_proj", "model.layers.2.mlp.gate"];
        let wanted: BTreeSet<&str> = some.into_iter().collect();
        let found = targets(&wanted, &all);
        assert_eq!(
            found,
            [
                "lm_head",
                r"re:^model\.layers\.0\.mlp\.experts\.1\.up_proj$",
                r"re:^model\.layers\.2\.mlp\.experts\.11\.up_proj$",
                r"re:^model\.layers\.2\.mlp\.gate$"
            ]
        );
        holds(&found, &wanted, &all);
    }

    proptest::proptest! {
        #[test]
        fn any_split_in_three_is_matched_exactly(parts in proptest::collection::vec(0_u8..3, 37)) {
            let names = names(0..3, 3);
            let all: BTreeSet<&str> = names.iter().map(String::as_str).collect();
            for part in 0..3 {
                let wanted: BTreeSet<&str> = all.iter().zip(parts.iter().cycle()).filter(|(_, p)| **p == part).map(|(n, _)| *n).collect();
                holds(&targets(&wanted, &all), &wanted, &all);
            }
        }
    }
}

//! Which width every matrix gets: sensitivity × options → losses, a program over them, what a runtime can load.
//!
//! A plan still gives one width to all ([`Allocate::bits`]): a recipe may already name the other budgets, and is told that they
//! cannot be solved yet.

mod glob;
pub mod hull;
pub mod pmq;
pub mod program;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::borrow::Cow;
use std::fmt;

pub use glob::Glob;

/// Widths: a budget, of which there is exactly one, and what is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Allocate {
    /// One width for every quantized matrix, 2 to 8 bits a code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// Stored bits a quantized weight, scales counted, shared out over the matrices. Not built yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// Bytes of what is quantized, such as "55GB". Not built yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<String>,
    /// Bytes of the whole output, such as "60GB". Not built yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Inputs that share a scale: a number that divides every quantized matrix's inputs, or "channel" for whole rows.
    #[serde(default)]
    pub group: GroupKnob,
    /// Matrices that keep the source's dtype: globs over module or tensor names (`*` any run of characters, `?` one).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

/// The four budgets, of which a recipe names exactly one.
pub const BUDGETS: [&str; 4] = ["bits", "bits_per_weight", "bytes", "file"];

impl Allocate {
    /// The budgets that are set, by key.
    pub fn budgets(&self) -> Vec<&'static str> {
        let set = [self.bits.is_some(), self.bits_per_weight.is_some(), self.bytes.is_some(), self.file.is_some()];
        BUDGETS.into_iter().zip(set).filter_map(|(key, set)| set.then_some(key)).collect()
    }

    /// The patterns of `exclude`.
    pub fn globs(&self) -> Vec<Glob> {
        self.exclude.iter().map(|pattern| Glob::new(pattern)).collect()
    }
}

/// The group as a recipe writes it: `128` or `"channel"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupKnob(pub kernels::Group);

impl Default for GroupKnob {
    fn default() -> Self {
        Self(kernels::Group::Size(128))
    }
}

impl Serialize for GroupKnob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            kernels::Group::Size(size) => serializer.serialize_u64(size as u64),
            kernels::Group::PerChannel => serializer.serialize_str("channel"),
        }
    }
}

impl<'de> Deserialize<'de> for GroupKnob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(GroupVisitor)
    }
}

struct GroupVisitor;

impl de::Visitor<'_> for GroupVisitor {
    type Value = GroupKnob;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a group size of at least 1, or \"channel\"")
    }

    fn visit_i64<E: de::Error>(self, size: i64) -> Result<GroupKnob, E> {
        match usize::try_from(size) {
            Ok(size) if size > 0 => Ok(GroupKnob(kernels::Group::Size(size))),
            _ => Err(E::invalid_value(de::Unexpected::Signed(size), &self)),
        }
    }

    fn visit_u64<E: de::Error>(self, size: u64) -> Result<GroupKnob, E> {
        self.visit_i64(i64::try_from(size).unwrap_or(i64::MAX))
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<GroupKnob, E> {
        match word {
            "channel" => Ok(GroupKnob(kernels::Group::PerChannel)),
            _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
        }
    }
}

impl JsonSchema for GroupKnob {
    fn schema_name() -> Cow<'static, str> {
        "Group".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "oneOf": [{ "type": "integer", "minimum": 1 }, { "const": "channel" }] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::Group;

    fn read(text: &str) -> Result<Allocate, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn a_group_is_a_size_or_a_channel() {
        assert_eq!(read("bits = 4").unwrap().group.0, Group::Size(128));
        assert_eq!(read("bits = 4\ngroup = 32").unwrap().group.0, Group::Size(32));
        assert_eq!(read("bits = 4\ngroup = \"channel\"").unwrap().group.0, Group::PerChannel);
        for wrong in ["0", "-1", "\"row\"", "1.5"] {
            let said = read(&format!("bits = 4\ngroup = {wrong}")).unwrap_err().to_string();
            assert!(said.contains("a group size of at least 1, or \"channel\""), "{said}");
        }
    }

    #[test]
    fn budgets_are_named_by_key() {
        assert_eq!(read("bits = 4").unwrap().budgets(), ["bits"]);
        assert_eq!(read("bits_per_weight = 2.5\nfile = \"1GB\"").unwrap().budgets(), ["bits_per_weight", "file"]);
        assert!(read("").unwrap().budgets().is_empty());
    }
}

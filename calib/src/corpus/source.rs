//! One entry of a recipe's corpus: a file, which domain it is and how much of the samples it gives.

use std::borrow::Cow;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text of a recipe's corpus: `"a/code.jsonl"`, or `{ path = "a/code.jsonl", name = "code", weight = 2.0 }`.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// The domain; the file's stem where it is not named.
    pub name: Option<String>,
    /// Its part of the samples, as a multiple of a text with weight 1.
    pub weight: f64,
}

impl Source {
    /// The domain.
    pub fn domain(&self) -> Cow<'_, str> {
        match &self.name {
            Some(name) => Cow::Borrowed(name),
            None => self.path.file_stem().unwrap_or_default().to_string_lossy(),
        }
    }
}

impl From<PathBuf> for Source {
    fn from(path: PathBuf) -> Self {
        Self { path, name: None, weight: 1.0 }
    }
}

/// The entry with all that can be said of it.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Named {
    /// The file.
    path: PathBuf,
    /// The domain; the file's stem where it is not named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Its part of the samples, as a multiple of a text with weight 1.
    #[serde(default = "one")]
    weight: f64,
}

fn one() -> f64 {
    1.0
}

/// What a recipe may write; for the schema alone.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code, reason = "the schema's form; values are read by the visitor below, which names line and column")]
enum Form {
    Path(PathBuf),
    Named(Named),
}

impl JsonSchema for Source {
    fn schema_name() -> Cow<'static, str> {
        "Source".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Form::json_schema(generator)
    }
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if self.name.is_none() && self.weight == 1.0 {
            return self.path.serialize(to);
        }
        Named { path: self.path.clone(), name: self.name.clone(), weight: self.weight }.serialize(to)
    }
}

/// Not serde's `untagged`, whose only message is that no variant matched.
impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Source;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a path, or a table with path, name and weight")
            }

            fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Source, E> {
                Ok(PathBuf::from(path).into())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
                let Named { path, name, weight } = Named::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Source { path, name, weight })
            }
        }
        from.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_written_back() {
        let read = |json: &str| serde_json::from_str::<Source>(json);
        let plain = read(r#""a/en.txt""#).unwrap();
        assert_eq!((plain.domain().as_ref(), plain.weight), ("en", 1.0));
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#""a/en.txt""#);
        let named = read(r#"{"path": "a/x.jsonl", "name": "code", "weight": 2.5}"#).unwrap();
        assert_eq!((named.domain().as_ref(), named.weight), ("code", 2.5));
        assert_eq!(read(&serde_json::to_string(&named).unwrap()).unwrap(), named);
        assert_eq!(read(r#"{"path": "a/x.jsonl"}"#).unwrap().domain(), "x");
        assert!(read(r#"{"path": "a", "wait": 1}"#).unwrap_err().to_string().contains("unknown field `wait`"));
        assert!(read(r#"{"name": "a"}"#).unwrap_err().to_string().contains("missing field `path`"));
        assert!(read("3").unwrap_err().to_string().contains("a path, or a table"));
    }
}

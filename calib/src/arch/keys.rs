//! Reads config keys by type, takes the family's default for what is left out, and remembers what was read.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::family::Literal;
use crate::{Error, Result};

/// No model has a dimension beyond this; it keeps products of two dimensions inside 64 bits.
const LARGEST: u64 = 1 << 31;

/// One object of a config, as a family reads it.
pub(super) struct Keys<'a> {
    prefix: &'a str,
    map: &'a Map<String, Value>,
    defaults: &'static [(&'static str, Literal)],
    model_type: &'static str,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub fn new(map: &'a Map<String, Value>, model_type: &'static str, defaults: &'static [(&'static str, Literal)]) -> Self {
        Self { prefix: "", map, defaults, model_type, read: RefCell::default() }
    }

    /// An object inside, without defaults; its keys are named `prefix` and theirs.
    pub fn inside(&self, prefix: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { prefix, map, defaults: &[], model_type: self.model_type, read: RefCell::default() }
    }

    /// The keys that nobody read, in order, by their full names.
    pub fn unread(&self) -> Vec<String> {
        let read = self.read.borrow();
        self.map.keys().filter(|key| !read.contains(*key)).map(|key| self.full(key)).collect()
    }

    /// What the config itself says, `null` included.
    pub fn stated(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.map.get(key)
    }

    /// What the config says, else the family's default. `null` is a value: it can mean something else than a key left out.
    pub fn value(&self, key: &str) -> Option<Value> {
        self.stated(key).cloned().or_else(|| self.default(key))
    }

    pub fn default(&self, key: &str) -> Option<Value> {
        self.defaults.iter().find(|(name, _)| *name == key).map(|(_, literal)| literal.value())
    }

    /// A dimension or a count, at least 1.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A dimension or a count; `None` where it is null, or left out without a default.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let number = self.optional_count(key)?;
        if number == Some(0) {
            return Err(self.wrong(key, &Value::from(0), "a whole number of at least 1"));
        }
        Ok(number)
    }

    /// A count that may be 0; `None` where it is null, or left out without a default.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a whole number", |value| value.as_u64().filter(|n| *n <= LARGEST).and_then(|n| usize::try_from(n).ok()))
    }

    pub fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn float(&self, key: &str) -> Result<f64> {
        self.optional_float(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a number", Value::as_f64)
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        self.optional(key, "true or false", Value::as_bool)?.ok_or_else(|| self.missing(key))
    }

    pub fn optional_flag(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, "true or false", Value::as_bool)
    }

    pub fn optional_text(&self, key: &str) -> Result<Option<String>> {
        self.optional(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub fn floats(&self, key: &str) -> Result<Vec<f64>> {
        self.optional(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())?
            .ok_or_else(|| self.missing(key))
    }

    /// A list of whole numbers; empty where it is null or left out.
    pub fn counts(&self, key: &str) -> Result<Vec<u64>> {
        let list = self.optional(key, "a list of whole numbers", |value| value.as_array()?.iter().map(Value::as_u64).collect())?;
        Ok(list.unwrap_or_default())
    }

    /// An object; `None` where it is null, empty or left out.
    pub fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.stated(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map).filter(|map| !map.is_empty())),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }

    /// The value of this key is not implemented.
    pub fn unsupported(&self, key: &str, value: &Value, supported: impl Into<String>) -> Error {
        Error::UnsupportedValue { key: self.full(key), value: value.to_string(), model_type: self.model_type, supported: supported.into() }
    }

    /// The value of this key cannot be.
    pub fn wrong(&self, key: &str, value: &Value, expected: impl Into<String>) -> Error {
        Error::WrongValue { key: self.full(key), value: value.to_string(), expected: expected.into() }
    }

    fn missing(&self, key: &str) -> Error {
        Error::MissingKey { key: self.full(key), model_type: self.model_type }
    }

    fn full(&self, key: &str) -> String {
        if self.prefix.is_empty() { key.to_owned() } else { format!("{}.{key}", self.prefix) }
    }

    fn optional<T>(&self, key: &str, expected: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.value(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(&value).map(Some).ok_or_else(|| self.wrong(key, &value, expected)),
        }
    }
}

impl Literal {
    /// As a config would have it.
    pub(super) fn value(self) -> Value {
        match self {
            Self::Int(int) => Value::from(int),
            Self::Float(float) => Value::from(float),
            Self::Flag(flag) => Value::from(flag),
            Self::Text(text) => Value::from(text),
        }
    }
}

#[test]
fn null_is_not_the_same_as_left_out() {
    let config = serde_json::json!({"q_lora_rank": null, "hidden_size": 64.5, "extra": 1});
    let keys = Keys::new(config.as_object().unwrap(), "tiny", &[("q_lora_rank", Literal::Int(1536)), ("heads", Literal::Int(2))]);
    assert_eq!(keys.optional_size("q_lora_rank").unwrap(), None);
    assert_eq!(keys.size("heads").unwrap(), 2);
    assert_eq!(keys.size("hidden_size").unwrap_err().to_string(), "config.json: hidden_size is 64.5, but has to be a whole number");
    assert!(keys.size("layers").unwrap_err().to_string().contains("layers"));
    assert_eq!(keys.unread(), ["extra"]);
}

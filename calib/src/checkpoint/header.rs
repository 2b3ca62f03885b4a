//! The header of one safetensors file: names, types, shapes and offsets, checked against the file's length.
//!
//! A `u64` length (little-endian, at most 100,000,000), then JSON. Offsets count from the end of the header; they start at 0, leave no
//! hole and end at the file's end. The crate's own JSON reader swallows a name that stands twice and its validation names neither tensor
//! nor number, so both are done here first; the crate has the last word.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use safetensors::tensor::{Metadata, TensorInfo as CrateInfo};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::Problem;
use crate::tensor::Dtype;

/// The format's limit of a header's length, bytes.
pub(super) const HEADER_LIMIT: u64 = 100_000_000;
/// Bytes before the header: its length.
pub(super) const LENGTH_BYTES: usize = 8;
/// The key of a header that is no tensor.
pub(super) const METADATA: &str = "__metadata__";

/// One tensor of a header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes of the data.
    pub bytes: Range<u64>,
}

/// A checked header.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Header {
    /// `__metadata__`, in the file's order.
    pub metadata: Vec<(String, String)>,
    /// Every tensor, by offset.
    pub entries: Vec<Entry>,
    /// Bytes before the data.
    pub bytes: usize,
    /// Bytes of data that the header describes; a shape-only file has none of them.
    pub data: u64,
    /// Whether the file is a header without data.
    pub shape_only: bool,
}

/// A JSON object's members in their order, none dropped: a name may stand twice.
pub(super) struct Members<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Members<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Each<V> {
            type Value = Members<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Each(std::marker::PhantomData))
    }
}

impl<V> Members<V> {
    /// A name that stands twice.
    pub fn twice(&self) -> Option<&str> {
        let mut names: Vec<&str> = self.0.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
    }
}

/// What the header says of a tensor, unchecked.
#[derive(serde::Deserialize)]
struct Raw {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A member of the header: a tensor or the metadata.
struct Unread(Members<Raw>, Members<String>);

impl<'de> Deserialize<'de> for Unread {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Unread;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA {
                        tensors.push((name, map.next_value()?));
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(serde::de::Error::custom("__metadata__ stands twice"));
                    }
                }
                Ok(Unread(Members(tensors), metadata.unwrap_or(Members(Vec::new()))))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

impl Header {
    /// Reads and checks the header of a whole file.
    pub fn read(file: &[u8]) -> Result<Self, Problem> {
        let (text, bytes) = text(file)?;
        let malformed = |reason: &dyn fmt::Display| Problem::Header { reason: reason.to_string() };
        if !text.starts_with(b"{") {
            return Err(malformed(&"it does not start with {"));
        }
        let Unread(tensors, metadata) = serde_json::from_slice(text).map_err(|source| malformed(&source))?;
        if let Some(name) = tensors.twice().or(metadata.twice()) {
            return Err(Problem::TensorTwice { tensor: name.to_owned() });
        }
        let metadata = metadata.0;
        let shape_only = metadata.iter().any(|(key, value)| (key.as_str(), value.as_str()) == super::SHAPE_ONLY);
        let mut entries = tensors.0.into_iter().map(|(name, raw)| entry(name, raw)).collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(|entry| (entry.bytes.start, entry.bytes.end));
        let data = entries.last().map_or(0, |entry| entry.bytes.end);
        let has = (file.len() - bytes) as u64;
        contiguous(&entries, if shape_only { u64::MAX } else { has })?;
        let expected = if shape_only { 0 } else { data };
        if has < expected {
            return Err(Problem::Truncated { needs: expected, has });
        }
        if has > expected {
            return Err(Problem::Trailing { extra: has - expected, end: expected });
        }
        last_word(&entries).map_err(|source| malformed(&source))?;
        Ok(Self { metadata, entries, bytes, data, shape_only })
    }
}

/// The header's JSON text, and where the data begins.
fn text(file: &[u8]) -> Result<(&[u8], usize), Problem> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(Problem::TooSmall { bytes: file.len() as u64 });
    };
    let header = u64::from_le_bytes(*length);
    if header > HEADER_LIMIT {
        return Err(Problem::HeaderTooLong { header, limit: HEADER_LIMIT });
    }
    let text = usize::try_from(header).ok().and_then(|end| rest.get(..end));
    let text = text.ok_or(Problem::HeaderBeyondFile { header, has: rest.len() as u64 })?;
    Ok((text, LENGTH_BYTES + text.len()))
}

/// Checks a tensor on its own: its type, and that its shape takes as many bytes as its offsets span.
fn entry(tensor: String, raw: Raw) -> Result<Entry, Problem> {
    let Some(dtype) = Dtype::from_name(&raw.dtype) else {
        let known = Dtype::ALL.map(Dtype::name).join(", ");
        return Err(Problem::UnknownDtype { tensor, dtype: raw.dtype, known });
    };
    let shape: Result<Vec<usize>, _> = raw.shape.iter().map(|&side| usize::try_from(side)).collect();
    let Some((shape, needs)) = shape.ok().and_then(|shape| dtype.bytes_of(&shape).map(|bytes| (shape, bytes))) else {
        return Err(Problem::ShapeOverflow { tensor, shape: raw.shape });
    };
    let (begin, end) = raw.data_offsets;
    let Some(has) = end.checked_sub(begin) else {
        return Err(Problem::OffsetsReversed { tensor, begin, end });
    };
    if has != needs {
        return Err(Problem::OffsetsSize { tensor, shape, needs, has });
    }
    Ok(Entry { name: tensor, dtype, shape, bytes: begin..end })
}

/// Checks that tensors sorted by offset follow one another from 0 on. `data` is what the file has.
fn contiguous(entries: &[Entry], data: u64) -> Result<(), Problem> {
    let mut previous = (0, "");
    for entry in entries {
        let (end, other) = previous;
        let tensor = entry.name.clone();
        let begin = entry.bytes.start;
        // Offsets in one piece that go on past the file's end are a truncated file, which the caller tells.
        if begin > end && entry.bytes.end > data {
            return Err(Problem::OffsetsOutside { tensor, begin, end: entry.bytes.end, bytes: data });
        }
        if begin > end {
            return Err(Problem::Hole { tensor, begin: end, end: begin });
        }
        if begin < end {
            return Err(Problem::Overlap { tensor, begin, other: other.to_owned(), end });
        }
        previous = (entry.bytes.end, &entry.name);
    }
    Ok(())
}

/// The safetensors crate's own validation.
fn last_word(entries: &[Entry]) -> Result<(), Box<dyn std::error::Error>> {
    let of_crate = |entry: &Entry| -> Result<_, std::num::TryFromIntError> {
        let data_offsets = (usize::try_from(entry.bytes.start)?, usize::try_from(entry.bytes.end)?);
        Ok((entry.name.clone(), CrateInfo { dtype: entry.dtype.in_safetensors(), shape: entry.shape.clone(), data_offsets }))
    };
    Metadata::new(None, entries.iter().map(of_crate).collect::<Result<_, _>>()?)?;
    Ok(())
}

/// The bytes of a header, its length before it, padded with spaces so that the data begin at a multiple of 8.
pub(super) fn build(metadata: &BTreeMap<String, String>, entries: &[Entry]) -> Vec<u8> {
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let pairs: Vec<String> = metadata.iter().map(|(key, value)| format!("{}:{}", text(key), text(value))).collect();
    let mut members = vec![format!("{}:{{{}}}", text(METADATA), pairs.join(","))];
    members.extend(entries.iter().map(|Entry { name, dtype, shape, bytes }| {
        let (name, sides): (_, Vec<String>) = (text(name), shape.iter().map(usize::to_string).collect());
        format!(r#"{name}:{{"dtype":"{dtype}","shape":[{}],"data_offsets":[{},{}]}}"#, sides.join(","), bytes.start, bytes.end)
    }));
    let mut json = format!("{{{}}}", members.join(",")).into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}

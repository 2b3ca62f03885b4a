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
const HEADER_LIMIT: u64 = 100_000_000;
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
    check_length(header)?;
    let text = usize::try_from(header).ok().and_then(|end| rest.get(..end));
    let text = text.ok_or(Problem::HeaderBeyondFile { header, has: rest.len() as u64 })?;
    Ok((text, LENGTH_BYTES + text.len()))
}

/// Refuses a header, without its length, past the format's limit.
pub(super) fn check_length(header: u64) -> Result<(), Problem> {
    if header > HEADER_LIMIT { Err(Problem::HeaderTooLong { header, limit: HEADER_LIMIT }) } else { Ok(()) }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::super::testing::file;
    use super::*;

    /// What is wrong with a file of this header and so many bytes of data.
    #[track_caller]
    fn problem(header: &str, data: usize) -> Problem {
        Header::read(&file(header, &vec![1; data])).unwrap_err()
    }

    fn tensor(name: &str, shape: &str, begin: u64, end: u64) -> String {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    }

    fn header(tensors: &[String]) -> String {
        format!("{{{}}}", tensors.join(","))
    }

    #[test]
    fn a_header_by_hand() {
        let text = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}  "#;
        let read = Header::read(&file(text, &[1; 14])).unwrap();
        let a = Entry { name: "a".into(), dtype: Dtype::F32, shape: vec![1, 2], bytes: 0..8 };
        let b = Entry { name: "b".into(), dtype: Dtype::Bf16, shape: vec![3], bytes: 8..14 };
        let metadata = vec![("format".into(), "pt".into())];
        assert_eq!(read, Header { metadata, entries: vec![a, b], bytes: 8 + text.len(), data: 14, shape_only: false });
    }

    #[test]
    fn the_length_is_checked_before_it_is_used() {
        assert!(matches!(Header::read(&[1, 0, 0]), Err(Problem::TooSmall { bytes: 3 })));
        let of_length = |length: u64| Header::read(&[&length.to_le_bytes()[..], b"{}"].concat()).unwrap_err();
        assert!(matches!(of_length(3), Problem::HeaderBeyondFile { header: 3, has: 2 }));
        assert!(matches!(of_length(100_000_001), Problem::HeaderTooLong { header: 100_000_001, .. }));
        assert!(matches!(of_length(u64::MAX), Problem::HeaderTooLong { .. }));
    }

    #[test]
    fn text_that_is_no_header() {
        let missing = r#"{"a":{"dtype":"F32","shape":[1]}}"#;
        let past_u64 = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999999999]}}"#;
        let negative = r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#;
        let no_text = r#"{"__metadata__":{"format":1}}"#;
        let metadata_twice = r#"{"__metadata__":{},"__metadata__":{}}"#;
        for (text, reason) in [
            (" {}", "does not start with {"),
            ("{", "EOF"),
            ("{} {}", "trailing"),
            ("[]", "does not start with {"),
            (missing, "data_offsets"),
            (past_u64, "invalid"),
            (negative, "invalid value"),
            (no_text, "expected a string"),
            (metadata_twice, "twice"),
        ] {
            let found = problem(text, 4);
            assert!(matches!(found, Problem::Header { .. }) && found.to_string().contains(reason), "{text}: {found}");
        }
        let not_unicode = [&7u64.to_le_bytes()[..], b"{\"\xff\":0}"].concat();
        assert!(matches!(Header::read(&not_unicode), Err(Problem::Header { .. })));
    }

    #[test]
    fn a_name_that_stands_twice() {
        let twice = header(&[tensor("a", "[1]", 0, 4), tensor("b", "[1]", 4, 8), tensor("a", "[1]", 4, 8)]);
        assert!(matches!(problem(&twice, 8), Problem::TensorTwice { tensor } if tensor == "a"));
        // The crate's reader takes the last of the two and sees nothing wrong with what is left.
        let swallowed = header(&[tensor("a", "[2]", 0, 8), tensor("a", "[1]", 0, 4)]);
        assert!(SafeTensors::deserialize(&file(&swallowed, &[1; 4])).is_ok());
        assert!(matches!(problem(&swallowed, 4), Problem::TensorTwice { tensor } if tensor == "a"));
        assert!(
            matches!(problem(r#"{"__metadata__":{"format":"pt","format":"tf"}}"#, 0), Problem::TensorTwice { tensor } if tensor == "format")
        );
    }

    #[test]
    fn an_unknown_dtype() {
        let text = header(&[tensor("a", "[2]", 0, 8).replace("F32", "F4")]);
        assert!(matches!(problem(&text, 8), Problem::UnknownDtype { tensor, dtype, .. } if tensor == "a" && dtype == "F4"));
    }

    #[test]
    fn shapes_and_offsets_that_overflow() {
        let large = header(&[tensor("a", "[4294967296,4294967296]", 0, 8)]);
        assert!(matches!(problem(&large, 8), Problem::ShapeOverflow { tensor, .. } if tensor == "a"));
        // The elements can be counted, their bytes cannot.
        let bytes = header(&[tensor("a", "[4611686018427387904]", 0, 8)]);
        assert!(matches!(problem(&bytes, 8), Problem::ShapeOverflow { tensor, .. } if tensor == "a"));
        let far = header(&[tensor("a", "[1]", 0, 4), tensor("b", "[1]", u64::MAX - 4, u64::MAX)]);
        assert!(matches!(problem(&far, 8), Problem::OffsetsOutside { tensor, end: u64::MAX, bytes: 8, .. } if tensor == "b"));
    }

    #[test]
    fn offsets_that_contradict_the_shape() {
        let size = header(&[tensor("a", "[3]", 0, 8)]);
        assert!(matches!(problem(&size, 8), Problem::OffsetsSize { needs: 12, has: 8, .. }));
        let reversed = header(&[tensor("a", "[1]", 8, 4)]);
        assert!(matches!(problem(&reversed, 8), Problem::OffsetsReversed { begin: 8, end: 4, .. }));
    }

    #[test]
    fn offsets_that_overlap_or_leave_a_hole() {
        let overlap = header(&[tensor("b", "[2]", 4, 12), tensor("a", "[2]", 0, 8)]);
        assert!(matches!(problem(&overlap, 12), Problem::Overlap { tensor, begin: 4, other, end: 8 } if tensor == "b" && other == "a"));
        let hole = header(&[tensor("a", "[1]", 0, 4), tensor("b", "[1]", 8, 12)]);
        assert!(matches!(problem(&hole, 12), Problem::Hole { tensor, begin: 4, end: 8 } if tensor == "b"));
        let late = header(&[tensor("a", "[1]", 4, 8)]);
        assert!(matches!(problem(&late, 8), Problem::Hole { tensor, begin: 0, end: 4 } if tensor == "a"));
    }

    #[test]
    fn data_that_end_early_or_late() {
        let text = header(&[tensor("a", "[1]", 0, 4), tensor("b", "[1]", 4, 8)]);
        assert!(matches!(problem(&text, 7), Problem::Truncated { needs: 8, has: 7 }));
        assert!(matches!(problem(&text, 0), Problem::Truncated { needs: 8, has: 0 }));
        assert!(matches!(problem(&text, 9), Problem::Trailing { extra: 1, end: 8 }));
        assert!(matches!(problem("{}", 1), Problem::Trailing { extra: 1, end: 0 }));
        assert!(Header::read(&file("{}", &[])).is_ok());
    }

    #[test]
    fn a_shape_only_file_has_a_valid_header_and_no_data() {
        let shape_only = |tensor: String| header(&[r#""__metadata__":{"moepress":"shape-only"}"#.into(), tensor]);
        let whole = shape_only(tensor("a", "[2]", 0, 8));
        let read = Header::read(&file(&whole, &[])).unwrap();
        assert!(read.shape_only);
        assert_eq!(read.data, 8);
        assert!(matches!(problem(&whole, 8), Problem::Trailing { extra: 8, end: 0 }));
        assert!(matches!(problem(&shape_only(tensor("a", "[2]", 4, 12)), 0), Problem::Hole { .. }));
        assert!(matches!(problem(&shape_only(tensor("a", "[2]", 0, 4)), 0), Problem::OffsetsSize { .. }));
    }

    #[test]
    fn what_is_built_is_read_and_the_data_are_aligned() {
        let odd = Entry { name: "a \"b\"\\\n日".into(), dtype: Dtype::I64, shape: vec![], bytes: 0..8 };
        let none = Entry { name: "none".into(), dtype: Dtype::U8, shape: vec![0, 3], bytes: 8..8 };
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned()), ("\"".to_owned(), "\\".to_owned())]);
        let built = build(&metadata, &[odd.clone(), none.clone()]);
        assert_eq!(built.len() % 8, 0);
        let read = Header::read(&[built, vec![0; 8]].concat()).unwrap();
        assert_eq!(read.entries, [odd, none]);
        assert_eq!(read.metadata.into_iter().collect::<BTreeMap<_, _>>(), metadata);
    }

    /// Headers that are nearly right: a right one with one number replaced.
    fn nearly() -> impl Strategy<Value = (String, usize)> {
        let side = prop_oneof![0u64..5, Just(1 << 32), Just(u64::MAX)];
        let shapes = prop::collection::vec(prop::collection::vec(0u64..4, 0..4), 1..5);
        (shapes, 0usize..5, 0usize..5, side, -1isize..2).prop_map(|(shapes, at, what, number, off)| {
            let (mut end, mut tensors) = (0, Vec::new());
            for (i, mut shape) in shapes.into_iter().enumerate() {
                let (mut begin, bytes) = (end, 4 * shape.iter().product::<u64>());
                end += bytes;
                let mut stop = end;
                match what {
                    0 if i == at => begin = number,
                    1 if i == at => stop = number,
                    2 if i == at => shape.push(number),
                    3 if i == at => (begin, stop) = (number, number.wrapping_add(bytes)),
                    _ => {}
                }
                tensors.push(tensor(&format!("t{i}"), &format!("{shape:?}"), begin, stop));
            }
            (header(&tensors), usize::try_from(end).unwrap().saturating_add_signed(if what == 4 { off } else { 0 }))
        })
    }

    proptest! {
        #[test]
        fn agrees_with_the_crate((text, data) in nearly()) {
            let file = file(&text, &vec![1; data]);
            let (ours, crates) = (Header::read(&file), SafeTensors::read_metadata(&file));
            prop_assert_eq!(ours.is_ok(), crates.is_ok(), "{:?} but {:?}", ours, crates);
            if let (Ok(ours), Ok((_, crates))) = (ours, crates) {
                for entry in ours.entries {
                    let info = crates.info(&entry.name).unwrap();
                    prop_assert_eq!(&info.shape, &entry.shape);
                    prop_assert_eq!(info.data_offsets, (entry.bytes.start as usize, entry.bytes.end as usize));
                }
            }
        }

        #[test]
        fn damaged_bytes_never_panic((text, data) in nearly(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let mut file = file(&text, &vec![1; data]);
            for (at, byte) in damage {
                let at = at.index(file.len());
                file[at] = byte;
            }
            // A file that the crate refuses is refused here, whatever the damage.
            prop_assert!(Header::read(&file).is_err() || SafeTensors::read_metadata(&file).is_ok());
        }
    }
}

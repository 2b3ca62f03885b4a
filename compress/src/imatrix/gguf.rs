//! The GGUF form of an importance matrix (GGUF version 3, little-endian).
//!
//! `magic, version, tensors, keys; keys; tensors (name, axes, type, offset); data`, tensors aligned to 32 bytes.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2};

use super::{Entry, Imatrix};

/// First bytes of every GGUF file.
pub const MAGIC: &[u8] = b"GGUF";

const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;
/// Type F32 of a tensor.
const F32: u32 = 0;
/// Types of values that we write: u32, string, array.
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// An importance matrix as a file.
pub fn bytes(imatrix: &Imatrix) -> Vec<u8> {
    let mut head = Vec::new();
    head.extend(MAGIC);
    head.extend(VERSION.to_le_bytes());
    head.extend((2 * imatrix.entries.len() as u64).to_le_bytes());
    head.extend(4_u64.to_le_bytes());
    put_key(&mut head, "general.type", STRING);
    put_text(&mut head, "imatrix");
    put_key(&mut head, "imatrix.datasets", ARRAY);
    head.extend(STRING.to_le_bytes());
    head.extend((imatrix.datasets.len() as u64).to_le_bytes());
    imatrix.datasets.iter().for_each(|name| put_text(&mut head, name));
    for (key, value) in [("imatrix.chunk_count", imatrix.chunks), ("imatrix.chunk_size", imatrix.chunk_tokens)] {
        put_key(&mut head, key, U32);
        head.extend(value.to_le_bytes());
    }
    let mut data = Vec::new();
    let mut put = |name: String, axes: [usize; 2], values: &mut dyn Iterator<Item = f64>| {
        put_text(&mut head, &name);
        head.extend(2_u32.to_le_bytes());
        axes.iter().for_each(|&axis| head.extend((axis as u64).to_le_bytes()));
        head.extend(F32.to_le_bytes());
        head.extend((data.len() as u64).to_le_bytes());
        data.extend(values.flat_map(|value| (value as f32).to_le_bytes()));
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
    };
    for (name, Entry { squares, counts }) in &imatrix.entries {
        let (experts, inputs) = squares.dim();
        put(format!("{name}.in_sum2"), [inputs, experts], &mut squares.iter().copied());
        put(format!("{name}.counts"), [1, experts], &mut counts.iter().copied());
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    head.extend(data);
    head
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

fn put_key(to: &mut Vec<u8>, key: &str, kind: u32) {
    put_text(to, key);
    to.extend(kind.to_le_bytes());
}

/// Reads a file; an error says what is wrong with it.
///
/// # Errors
///
/// The end of a sentence.
pub fn parse(bytes: &[u8]) -> Result<Imatrix, String> {
    let mut from = Reader { bytes, at: MAGIC.len() };
    let version = from.u32()?;
    if !(2..=VERSION).contains(&version) {
        return Err(format!("GGUF version {version} is not known; 2 and 3 are"));
    }
    let (tensors, keys) = (from.u64()?, from.u64()?);
    let mut values = BTreeMap::new();
    for _ in 0..keys {
        let key = from.text()?;
        let kind = from.u32()?;
        values.insert(key, from.value(kind)?);
    }
    let mut found = Vec::new();
    for _ in 0..tensors {
        let name = from.text()?;
        let axes = (0..from.u32()?).map(|_| Ok(from.u64()? as usize)).collect::<Result<Vec<_>, String>>()?;
        let (kind, offset) = (from.u32()?, from.u64()? as usize);
        found.push((name, axes, kind, offset));
    }
    let alignment = match values.get("general.alignment") {
        Some(Value::Number(n)) if *n > 0 => *n as usize,
        _ => ALIGNMENT,
    };
    let start = from.at.next_multiple_of(alignment);
    let mut halves: BTreeMap<String, [Option<Array2<f64>>; 2]> = BTreeMap::new();
    for (name, axes, kind, offset) in found {
        // Sums of the values themselves, which newer builds write too, are not used.
        let Some((name, half)) = [".in_sum2", ".counts"].iter().enumerate().find_map(|(i, end)| Some((name.strip_suffix(end)?, i))) else {
            continue;
        };
        if kind != F32 {
            return Err(format!("{name}: sums and counts are F32, and these are of type {kind}"));
        }
        let (width, rows) = (axes.first().copied().unwrap_or(1), axes.iter().skip(1).product::<usize>());
        let mut data = Reader { bytes, at: start.saturating_add(offset) };
        let values = (0..width.saturating_mul(rows).min(bytes.len())).map(|_| data.f32()).collect::<Result<Vec<_>, _>>()?;
        let values =
            Array2::from_shape_vec((rows, width), values).map_err(|_| format!("{name}: a tensor reaches past the end of the file"))?;
        halves.entry(name.to_owned()).or_default()[half] = Some(values);
    }
    let mut entries = BTreeMap::new();
    for (name, halves) in halves {
        let [Some(squares), Some(counts)] = halves else { return Err(format!("{name} has sums without counts, or counts without sums")) };
        let counts: Array1<f64> = counts.into_iter().collect();
        if counts.len() != squares.nrows() {
            return Err(format!("{name} has {} rows and {} counts", squares.nrows(), counts.len()));
        }
        entries.insert(name, Entry { squares, counts });
    }
    if entries.is_empty() {
        return Err("it holds no NAME.in_sum2 and NAME.counts: this is a GGUF file, but no importance matrix".into());
    }
    let number = |key: &str| if let Some(Value::Number(n)) = values.get(key) { *n as u32 } else { 0 };
    let (chunks, chunk_tokens) = (number("imatrix.chunk_count"), number("imatrix.chunk_size"));
    let datasets = if let Some(Value::Texts(texts)) = values.remove("imatrix.datasets") { texts } else { Vec::new() };
    Ok(Imatrix { entries, datasets, chunks, chunk_tokens })
}

/// A key's value, as far as one is used.
enum Value {
    Number(u64),
    Texts(Vec<String>),
    Other,
}

/// Reads on in a file of known length.
pub(super) struct Reader<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Reader<'a> {
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("it ends at byte {} in the middle of something", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn i32(&mut self) -> Result<i32, String> {
        self.array().map(i32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn f32(&mut self) -> Result<f64, String> {
        self.array().map(|bytes| f64::from(f32::from_le_bytes(bytes)))
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.u64()? as usize;
        let at = self.at;
        String::from_utf8(self.take(length)?.to_vec()).map_err(|_| format!("the name at byte {at} is not UTF-8"))
    }

    fn value(&mut self, kind: u32) -> Result<Value, String> {
        Ok(match kind {
            0 | 1 | 7 => Value::Number(u64::from(self.array::<1>()?[0])),
            2 | 3 => Value::Number(u64::from(u16::from_le_bytes(self.array()?))),
            4 | 5 => Value::Number(u64::from(self.u32()?)),
            6 => self.take(4).map(|_| Value::Other)?,
            STRING => Value::Texts(vec![self.text()?]),
            ARRAY => {
                let (kind, count) = (self.u32()?, self.u64()?);
                let mut texts = Vec::new();
                for _ in 0..count {
                    if let Value::Texts(text) = self.value(kind)? {
                        texts.extend(text);
                    }
                }
                Value::Texts(texts)
            }
            10 | 11 => Value::Number(self.u64()?),
            12 => self.take(8).map(|_| Value::Other)?,
            _ => return Err(format!("a key's value is of type {kind}, which is none")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::small;
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let it = small();
        let file = bytes(&it);
        assert_eq!(&file[..8], b"GGUF\x03\0\0\0");
        assert_eq!(parse(&file).unwrap(), it);
        // The bytes that llama.cpp's reader wants: 14 tensors, 4 keys, inputs first.
        assert_eq!((file[8], file[16]), (14, 4));
        let name = b"blk.0.ffn_gate_exps.weight.counts";
        let at = file.windows(name.len()).position(|window| window == name).unwrap() + name.len();
        assert_eq!(file[at..at + 20], [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_file_that_is_cut_or_another_says_so() {
        let file = bytes(&small());
        assert!(parse(&file[..file.len() - 40]).is_err() && parse(&file[..60]).unwrap_err().contains("it ends at byte 60"));
        let empty = bytes(&Imatrix::default());
        assert!(parse(&empty).unwrap_err().contains("no importance matrix"));
        let mut version = file.clone();
        version[4] = 9;
        assert!(parse(&version).unwrap_err().contains("version 9"));
        let mut kind = file;
        let at = kind.windows(8).position(|window| window == b".in_sum2").unwrap() + 8 + 4 + 16;
        kind[at] = 1;
        assert!(parse(&kind).unwrap_err().contains("of type 1"));
    }
}

//! The legacy form (`.dat`): `entries; (name, calls, values)…; last chunk, dataset`, little-endian.
//!
//! A value is a mean square times the calls, so that value over calls is the mean; a stack of experts is one row, expert by expert, and
//! the tokens of each expert are not in it.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2};

use super::gguf::Reader;
use super::{Entry, Imatrix};

/// Reads a file; an error says what is wrong with it.
///
/// # Errors
///
/// The end of a sentence.
pub fn parse(bytes: &[u8]) -> Result<Imatrix, String> {
    let mut from = Reader { bytes, at: 0 };
    let count = from.i32()?;
    if count < 1 || count as usize > bytes.len() / 12 {
        return Err("it is neither GGUF nor a legacy importance matrix".into());
    }
    let mut entries = BTreeMap::new();
    for _ in 0..count {
        let name = text(&mut from)?;
        let (calls, values) = (from.i32()?, from.i32()?);
        if calls < 0 || values < 1 || values as usize > bytes.len() / 4 {
            return Err(format!("{name} has {values} values of {calls} calls"));
        }
        let squares = (0..values).map(|_| from.f32()).collect::<Result<Vec<_>, _>>()?;
        let squares = Array2::from_shape_vec((1, squares.len()), squares).map_err(|e| e.to_string())?;
        entries.insert(name, Entry { squares, counts: Array1::from_elem(1, f64::from(calls)) });
    }
    // What follows came later and may be missing.
    let (mut chunks, mut datasets) = (0, Vec::new());
    if from.at < bytes.len() {
        chunks = u32::try_from(from.i32()?).unwrap_or(0);
        datasets.extend(Some(text(&mut from)?).filter(|name| !name.is_empty()));
    }
    Ok(Imatrix { entries, datasets, chunks, chunk_tokens: 0 })
}

fn text(from: &mut Reader<'_>) -> Result<String, String> {
    let length = from.i32()?;
    let length = usize::try_from(length).map_err(|_| format!("a name of {length} bytes"))?;
    Ok(String::from_utf8_lossy(from.take(length)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(end: bool) -> Vec<u8> {
        let mut bytes = 1_i32.to_le_bytes().to_vec();
        let put = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as i32).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        put(&mut bytes, "blk.0.attn_q.weight");
        bytes.extend([3_i32, 2].iter().flat_map(|n| n.to_le_bytes()));
        bytes.extend([1.5_f32, 6.0].iter().flat_map(|n| n.to_le_bytes()));
        if end {
            bytes.extend(3_i32.to_le_bytes());
            put(&mut bytes, "wiki.txt");
        }
        bytes
    }

    #[test]
    fn means_are_values_over_calls() {
        let it = parse(&file(true)).unwrap();
        let entry = &it.entries["blk.0.attn_q.weight"];
        assert_eq!((entry.squares.row(0).to_vec(), entry.counts[0]), (vec![1.5, 6.0], 3.0));
        assert_eq!((it.chunks, it.datasets.as_slice()), (3, ["wiki.txt".to_owned()].as_slice()));
        assert_eq!(parse(&file(false)).unwrap().datasets, [""; 0]);
    }

    #[test]
    fn another_file_says_so() {
        assert!(parse(b"hello, this is no matrix").unwrap_err().contains("neither GGUF nor"));
        assert!(parse(&file(true)[..30]).unwrap_err().contains("it ends at byte 30"));
        assert!(parse(b"").is_err());
    }
}

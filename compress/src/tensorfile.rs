//! One safetensors file for the stages between plan and export: declared first, filled in any order, finished by rename.
//!
//! Unlike a checkpoint it stands alone (no config, no shards) and is read by ranges, so that neither side ever holds more
//! than the tensor in hand. Until [`Create::finish`] the bytes stand under a temporary name beside the final one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use calib::tensor::Dtype;
use fs_err::File;
use kernels::ScaleType;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Headers beyond this length are refused, as everywhere (safetensors' own limit).
const HEADER_LIMIT: u64 = 100_000_000;

/// Type of a stored element, by its name in safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Element {
    /// Packed codes, a `u32` word each.
    U32,
    /// Scales, zeros, hidden states.
    F32,
    /// Scales.
    Bf16,
    /// Scales.
    F16,
    /// Integer zeros, reports.
    U8,
}

impl Element {
    /// Of floating-point values that a checkpoint stores as they are; `None` of FP8 and of integers.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::Bf16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::U32 | Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::U8 => 1,
        }
    }
}

/// A tensor's entry in the header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Element type.
    pub dtype: Element,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Bytes within the data, begin and end.
    pub data_offsets: (u64, u64),
}

impl Entry {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// A tensor before it is written.
#[derive(Clone, Debug)]
pub struct Declared {
    /// Name, unique in the file.
    pub name: String,
    /// Element type.
    pub dtype: Element,
    /// Shape.
    pub shape: Vec<usize>,
}

/// A file being written. Tensors may be put from several threads.
pub struct Create {
    path: PathBuf,
    temporary: PathBuf,
    start: u64,
    entries: BTreeMap<String, Entry>,
    state: Mutex<State>,
}

struct State {
    file: File,
    missing: BTreeSet<String>,
}

impl Create {
    /// Starts a file: the header is written, room for the data is set aside.
    ///
    /// Tensors lie in the order of falling element size, then by name, so that every offset is a multiple of its element.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn new(path: &Path, mut tensors: Vec<Declared>, metadata: &BTreeMap<String, String>) -> Result<Self> {
        tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
        let mut entries = BTreeMap::new();
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!(metadata));
        let mut end = 0_u64;
        for Declared { name, dtype, shape } in tensors {
            let mut entry = Entry { dtype, shape, data_offsets: (end, end) };
            end += entry.bytes() as u64;
            entry.data_offsets.1 = end;
            header.insert(name.clone(), serde_json::json!(entry));
            entries.insert(name, entry);
        }
        let mut text = serde_json::Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let temporary = temporary(path);
        let mut file = File::create(&temporary)?;
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        let start = 8 + text.len() as u64;
        file.set_len(start + end)?;
        let missing = entries.keys().cloned().collect();
        Ok(Self { path: path.to_owned(), temporary, start, entries, state: Mutex::new(State { file, missing }) })
    }

    /// Writes one tensor's bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] for a name that was not declared or was put before, or a wrong length; an IO error.
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let wrong = |what: String| Error::Stage { path: self.path.clone(), what };
        let entry = self.entries.get(name).ok_or_else(|| wrong(format!("{name} was not declared")))?;
        if bytes.len() != entry.bytes() {
            return Err(wrong(format!("{name} takes {} bytes, not {}", entry.bytes(), bytes.len())));
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.missing.remove(name) {
            return Err(wrong(format!("{name} is written twice")));
        }
        state.file.seek(SeekFrom::Start(self.start + entry.data_offsets.0))?;
        state.file.write_all(bytes)?;
        Ok(())
    }

    /// Gives the file its final name, after every byte is on disk.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if a declared tensor is missing; an IO error.
    pub fn finish(self) -> Result<()> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = state.missing.first() {
            return Err(Error::Stage { path: self.path, what: format!("{name} was declared and never written") });
        }
        state.file.sync_all()?;
        drop(state.file);
        fs_err::rename(&self.temporary, &self.path)?;
        sync_folder(&self.path)
    }
}

/// A finished file, opened for reading by ranges.
pub struct Open {
    path: PathBuf,
    start: u64,
    metadata: BTreeMap<String, String>,
    entries: BTreeMap<String, Entry>,
    file: Mutex<File>,
}

impl Open {
    /// Reads and checks the header.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if the file is not one of ours or is damaged; an IO error.
    pub fn new(path: &Path) -> Result<Self> {
        let wrong = |what: &str| Error::Stage { path: path.to_owned(), what: what.to_owned() };
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        if length > HEADER_LIMIT || 8 + length > size {
            return Err(wrong("its header is longer than the file"));
        }
        let mut text = vec![0; length as usize];
        file.read_exact(&mut text)?;
        let mut header: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&text).map_err(|_| wrong("its header is not JSON"))?;
        let metadata = header.remove("__metadata__").unwrap_or_default();
        let metadata = serde_json::from_value(metadata).map_err(|_| wrong("its metadata are not strings"))?;
        let entries: BTreeMap<String, Entry> =
            serde_json::from_value(serde_json::Value::Object(header)).map_err(|_| wrong("its header holds something else than tensors"))?;
        let data = size - 8 - length;
        let whole = |e: &Entry| e.data_offsets.0 <= e.data_offsets.1 && e.data_offsets.1 - e.data_offsets.0 == e.bytes() as u64;
        if entries.values().any(|e| !whole(e) || e.data_offsets.1 > data)
            || entries.values().map(|e| e.data_offsets.1).max().unwrap_or(0) != data
        {
            return Err(wrong("its length does not fit its header: it was cut short"));
        }
        Ok(Self { path: path.to_owned(), start: 8 + length, metadata, entries, file: Mutex::new(file) })
    }

    /// What the file says of itself.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A tensor's header entry.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if it is not in the file.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| Error::Stage { path: self.path.clone(), what: format!("it does not hold {name}") })
    }

    /// All names, rising.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// One tensor's bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if it is not in the file; an IO error.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let Range { start, end } = { self.entry(name)?.data_offsets.0..self.entry(name)?.data_offsets.1 };
        let mut bytes = vec![0; (end - start) as usize];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.start + start))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// The name that a file has until it is whole.
pub fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    path.with_file_name(name)
}

/// Makes a rename inside the folder of `path` survive a power cut.
///
/// # Errors
///
/// An IO error.
pub fn sync_folder(path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        #[cfg(unix)]
        File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?.sync_all()?;
        #[cfg(not(unix))]
        let _ = folder;
    }
    Ok(())
}

/// Writes a small file whole: under a temporary name, then renamed.
///
/// # Errors
///
/// An IO error.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs_err::rename(&temporary, path)?;
    sync_folder(path)
}

/// Values as bytes of a stored type, rounded to nearest.
pub fn scale_bytes(values: &[f32], stored: ScaleType) -> Vec<u8> {
    match stored {
        ScaleType::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        ScaleType::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        ScaleType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// Words as the bytes that stand in files.
pub fn little_endian(words: Vec<u32>) -> Vec<u8> {
    if cfg!(target_endian = "little") {
        return bytemuck::cast_slice(&words).to_vec();
    }
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declared() -> Vec<Declared> {
        vec![
            Declared { name: "b".into(), dtype: Element::U8, shape: vec![3] },
            Declared { name: "a".into(), dtype: Element::F32, shape: vec![1, 2] },
        ]
    }

    #[test]
    fn what_is_put_in_any_order_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let file = Create::new(&path, declared(), &BTreeMap::from([("plan".into(), "p".into())])).unwrap();
        file.put("b", &[1, 2, 3]).unwrap();
        assert!(!path.exists(), "no final name before the end");
        file.put("a", &[0, 0, 128, 63, 0, 0, 0, 64]).unwrap();
        file.finish().unwrap();
        let open = Open::new(&path).unwrap();
        assert_eq!(open.metadata("plan"), Some("p"));
        assert_eq!(open.bytes("b").unwrap(), [1, 2, 3]);
        // The wider element comes first, so that both are aligned.
        assert_eq!(open.entry("a").unwrap().data_offsets, (0, 8));
        let bytes = fs_err::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("a").unwrap().shape(), [1, 2]);
    }

    #[test]
    fn an_incomplete_file_gets_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let file = Create::new(&path, declared(), &BTreeMap::new()).unwrap();
        file.put("b", &[1, 2, 3]).unwrap();
        assert!(file.put("b", &[1, 2, 3]).unwrap_err().to_string().contains("b is written twice"));
        assert!(file.put("a", &[1]).unwrap_err().to_string().contains("8 bytes, not 1"));
        assert!(file.put("c", &[1]).unwrap_err().to_string().contains("c was not declared"));
        assert!(file.finish().unwrap_err().to_string().contains("a was declared and never written"));
        assert!(!path.exists());
    }

    #[test]
    fn a_file_cut_short_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let file = Create::new(&path, declared(), &BTreeMap::new()).unwrap();
        file.put("b", &[1, 2, 3]).unwrap();
        file.put("a", &[0; 8]).unwrap();
        file.finish().unwrap();
        let bytes = fs_err::read(&path).unwrap();
        for cut in [1, 4, bytes.len() - 20] {
            fs_err::write(&path, &bytes[..bytes.len() - cut]).unwrap();
            assert!(Open::new(&path).is_err(), "{cut} bytes missing");
        }
    }
}

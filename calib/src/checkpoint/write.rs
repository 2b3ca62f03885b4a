//! Writes a checkpoint by streaming: what it will hold is declared, the headers are written, then bytes go to their places in any order.
//!
//! Tensors are shared out over the shards in the order of their names with numbers as numbers (layer 2 before layer 10), so that a layer
//! lies together. Within a shard they lie by falling element size, then in that order: offsets leave no hole, so only this order keeps
//! each of them a multiple of its element size, which some loaders need. All is written under temporary names (`.tmp`), synced and
//! renamed in the end, the index last: a directory without its final names is not finished, and a leftover is overwritten.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fs_err::{File, OpenOptions};
use serde_json::json;

use super::header::{self, Entry, HEADER_LIMIT, METADATA};
use super::index::{INDEX, SINGLE, file_names};
use super::{Checkpoint, Problem, SHAPE_ONLY};
use crate::Result;
use crate::tensor::Dtype;

/// The usual limit of a shard's data, bytes: 5 GB, as on the hub.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// What is put behind the name of a file that is not finished.
const TEMPORARY: &str = ".tmp";

/// A tensor to come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its sides, slowest first.
    pub shape: Vec<usize>,
}

/// A checkpoint being written.
pub struct Writer {
    dir: PathBuf,
    /// Final names of the shards.
    names: Vec<String>,
    places: HashMap<String, Place>,
    /// The shard written last, kept open because tensors mostly come shard by shard.
    open: Option<(usize, File)>,
}

/// Where a tensor goes.
struct Place {
    shard: usize,
    /// In the file, header counted.
    offset: u64,
    bytes: u64,
    put: bool,
}

impl Writer {
    /// Lays out the shards and writes their headers under temporary names. The directory is made if it is not there.
    ///
    /// A shard holds at most `max_shard_bytes` of data, or one tensor that is larger. `metadata` goes into every shard, with
    /// `format = "pt"` unless it has a format.
    ///
    /// # Errors
    ///
    /// [`Problem::DeclaredTwice`], [`Problem::ReservedName`], [`Problem::ShapeOverflow`], [`Problem::HeaderTooLong`], and
    /// [`Problem::NoSpace`] before the first byte is written.
    pub fn create(dir: &Path, tensors: Vec<Declared>, max_shard_bytes: u64, mut metadata: BTreeMap<String, String>) -> Result<Self> {
        metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
        let shards = arrange(tensors, max_shard_bytes).map_err(|problem| problem.at(dir))?;
        let names = shard_names(shards.len());
        let headers: Vec<Vec<u8>> = shards.iter().map(|entries| header::build(&metadata, entries)).collect();
        let mut places = HashMap::new();
        for (shard, (entries, header)) in shards.iter().zip(&headers).enumerate() {
            if header.len() as u64 > HEADER_LIMIT {
                return Err(Problem::HeaderTooLong { header: header.len() as u64, limit: HEADER_LIMIT }.at(&dir.join(&names[shard])));
            }
            for Entry { name, bytes, .. } in entries {
                let place = Place { shard, offset: header.len() as u64 + bytes.start, bytes: bytes.end - bytes.start, put: false };
                places.insert(name.clone(), place);
            }
        }
        fs_err::create_dir_all(dir)?;
        remove(dir, |name| name.strip_suffix(TEMPORARY).is_some_and(is_ours))?;
        let sizes = headers.iter().zip(&shards).map(|(header, entries)| header.len() as u64 + data_bytes(entries));
        check_space(dir, sizes.clone().sum())?;
        for ((name, header), size) in names.iter().zip(&headers).zip(sizes) {
            let mut file = File::create(temporary(dir, name))?;
            file.write_all(header)?;
            file.set_len(size)?;
        }
        Ok(Self { dir: dir.to_owned(), names, places, open: None })
    }

    /// Writes a tensor's bytes, little-endian, in any order of tensors.
    ///
    /// # Errors
    ///
    /// [`Problem::Undeclared`], [`Problem::PutTwice`], [`Problem::WrongLength`].
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let tensor = || name.to_owned();
        let Some(place) = self.places.get_mut(name) else {
            return Err(Problem::Undeclared { tensor: tensor() }.at(&self.dir));
        };
        if place.put {
            return Err(Problem::PutTwice { tensor: tensor() }.at(&self.dir));
        }
        if bytes.len() as u64 != place.bytes {
            return Err(Problem::WrongLength { tensor: tensor(), declared: place.bytes, given: bytes.len() as u64 }.at(&self.dir));
        }
        let mut file = match self.open.take() {
            Some((shard, file)) if shard == place.shard => file,
            _ => OpenOptions::new().write(true).open(temporary(&self.dir, &self.names[place.shard]))?,
        };
        file.seek(SeekFrom::Start(place.offset))?;
        file.write_all(bytes)?;
        place.put = true;
        self.open = Some((place.shard, file));
        Ok(())
    }

    /// Syncs the shards, gives them their final names and writes the index, if there is more than one.
    ///
    /// Weight files of an earlier run in the same directory (`model.safetensors`, `model-0000i-of-0000n.safetensors`, the index) that
    /// are not of this one are removed: they would make it two models in one directory.
    ///
    /// # Errors
    ///
    /// [`Problem::NotPut`].
    pub fn finish(mut self) -> Result<()> {
        self.open = None;
        let mut missing: Vec<&String> = self.places.iter().filter(|(_, place)| !place.put).map(|(name, _)| name).collect();
        missing.sort_unstable();
        if let Some(&first) = missing.first() {
            return Err(Problem::NotPut { missing: missing.len(), first: first.clone() }.at(&self.dir));
        }
        for name in &self.names {
            File::open(temporary(&self.dir, name))?.sync_all()?;
        }
        let mut finished = self.names.clone();
        if self.names.len() > 1 {
            write_synced(&temporary(&self.dir, INDEX), self.index().as_bytes())?;
            finished.push(INDEX.to_owned());
        }
        // The index goes first, so that a directory that is half renamed has none.
        remove(&self.dir, |name| name == INDEX)?;
        remove(&self.dir, |name| is_ours(name) && !finished.iter().any(|other| other == name))?;
        for name in &finished {
            fs_err::rename(temporary(&self.dir, name), self.dir.join(name))?;
        }
        sync_dir(&self.dir)
    }

    /// The index's text.
    fn index(&self) -> String {
        let total: u64 = self.places.values().map(|place| place.bytes).sum();
        let map: BTreeMap<&String, &String> = self.places.iter().map(|(name, place)| (name, &self.names[place.shard])).collect();
        format!("{:#}\n", json!({ "metadata": { "total_size": total }, "weight_map": map }))
    }
}

/// Copies a checkpoint's config, index and headers without data into a directory that holds no checkpoint. The copy has the original's
/// [`fingerprint`](Checkpoint::fingerprint), and no values.
///
/// # Errors
///
/// [`Problem::Occupied`] if the directory holds a config or weights.
pub fn write_shape_only(from: &Checkpoint, dir: &Path) -> Result<()> {
    fs_err::create_dir_all(dir)?;
    let weights = |name: &String| name == "config.json" || name == INDEX || name.ends_with(".safetensors");
    if let Some(file) = file_names(dir)?.into_iter().find(weights) {
        return Err(Problem::Occupied { file }.at(dir));
    }
    for shard in &from.shards {
        let mut metadata: BTreeMap<String, String> = shard.header.metadata.iter().cloned().collect();
        metadata.insert(SHAPE_ONLY.0.to_owned(), SHAPE_ONLY.1.to_owned());
        put_in_place(dir, &shard.name(), &header::build(&metadata, &shard.header.entries))?;
    }
    // The config comes last: without it the directory is no checkpoint.
    for name in [INDEX, "config.json"] {
        let source = from.dir().join(name);
        if source.is_file() {
            put_in_place(dir, name, &fs_err::read(source)?)?;
        }
    }
    sync_dir(dir)
}

/// Shares tensors out over shards and lays each out.
fn arrange(mut tensors: Vec<Declared>, max_shard_bytes: u64) -> Result<Vec<Vec<Entry>>, Problem> {
    tensors.sort_by(|a, b| natural(&a.name, &b.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Problem::DeclaredTwice { tensor: pair[0].name.clone() });
    }
    let mut shards = vec![Vec::new()];
    let (mut used, mut total) = (0u64, 0u64);
    for Declared { name, dtype, shape } in tensors {
        if name == METADATA {
            return Err(Problem::ReservedName { tensor: name });
        }
        let overflow = || Problem::ShapeOverflow { tensor: name.clone(), shape: shape.iter().map(|&side| side as u64).collect() };
        let bytes = dtype.bytes_of(&shape).ok_or_else(overflow)?;
        total = total.checked_add(bytes).ok_or_else(overflow)?;
        if used > 0 && used.saturating_add(bytes) > max_shard_bytes {
            shards.push(Vec::new());
            used = 0;
        }
        used += bytes;
        // The place follows when the shard is whole.
        shards
            .last_mut()
            .into_iter()
            .for_each(|shard| shard.push(Entry { name: name.clone(), dtype, shape: shape.clone(), bytes: 0..bytes }));
    }
    for shard in &mut shards {
        // Stable: the order of names stays within a size.
        shard.sort_by_key(|entry| std::cmp::Reverse(entry.dtype.size()));
        let mut end = 0;
        for entry in shard {
            entry.bytes = end..end + entry.bytes.end;
            end = entry.bytes.end;
        }
    }
    Ok(shards)
}

/// Orders names with runs of digits as numbers: `layers.2` before `layers.10`.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut rest_a, mut rest_b) = (a, b);
    while let (Some(first_a), Some(first_b)) = (rest_a.chars().next(), rest_b.chars().next()) {
        let order = if first_a.is_ascii_digit() && first_b.is_ascii_digit() {
            let (number_a, number_b) = (number(&mut rest_a), number(&mut rest_b));
            number_a.len().cmp(&number_b.len()).then(number_a.cmp(number_b))
        } else {
            (rest_a, rest_b) = (&rest_a[first_a.len_utf8()..], &rest_b[first_b.len_utf8()..]);
            first_a.cmp(&first_b)
        };
        if order.is_ne() {
            return order;
        }
    }
    // What is left of one is longer than the other; names that differ in leading zeros alone are told apart as text.
    rest_a.len().cmp(&rest_b.len()).then(a.cmp(b))
}

/// Takes the digits off the front of a text, and returns them without leading zeros.
fn number<'a>(rest: &mut &'a str) -> &'a str {
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (digits, after) = rest.split_at(end);
    *rest = after;
    digits.trim_start_matches('0')
}

/// The names of `count` files.
fn shard_names(count: usize) -> Vec<String> {
    if count == 1 {
        return vec![SINGLE.to_owned()];
    }
    (1..=count).map(|i| format!("model-{i:05}-of-{count:05}.safetensors")).collect()
}

/// Whether a file's name is one that a writer gives.
fn is_ours(name: &str) -> bool {
    let digits = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors")).and_then(|rest| rest.split_once("-of-"));
    name == SINGLE || name == INDEX || numbers.is_some_and(|(i, n)| digits(i) && digits(n))
}

/// The temporary name of a file.
fn temporary(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}{TEMPORARY}"))
}

/// Bytes of data of a shard.
fn data_bytes(entries: &[Entry]) -> u64 {
    entries.last().map_or(0, |entry| entry.bytes.end)
}

/// Refuses to begin what the disk cannot hold.
fn check_space(dir: &Path, needs: u64) -> Result<()> {
    let disk = rustix::fs::statvfs(dir).map_err(std::io::Error::from)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if needs > free {
        return Err(Problem::NoSpace { needs, free, short: needs - free }.at(dir));
    }
    Ok(())
}

/// Removes a directory's files by name.
fn remove(dir: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
    for name in file_names(dir)?.into_iter().filter(|name| which(name)) {
        fs_err::remove_file(dir.join(name))?;
    }
    Ok(())
}

/// Writes a small file whole.
fn put_in_place(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    write_synced(&temporary(dir, name), bytes)?;
    Ok(fs_err::rename(temporary(dir, name), dir.join(name))?)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

/// Makes renames last.
fn sync_dir(dir: &Path) -> Result<()> {
    Ok(File::open(dir)?.sync_all()?)
}

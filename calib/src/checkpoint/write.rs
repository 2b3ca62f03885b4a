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

use super::header::{self, Entry, METADATA};
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
            header::check_length(header.len() as u64 - header::LENGTH_BYTES as u64)
                .map_err(|problem| problem.at(&dir.join(&names[shard])))?;
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
        // No file is longer, so that no sum below overflows.
        total = total.checked_add(bytes).filter(|&total| total <= i64::MAX as u64).ok_or_else(overflow)?;
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

/// Bytes that may still be written on the disk of a directory.
///
/// # Errors
///
/// [`Error::Io`](crate::Error::Io) where there is no such directory.
pub fn free_bytes(dir: &Path) -> Result<u64> {
    let disk = rustix::fs::statvfs(dir).map_err(std::io::Error::from)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Refuses to begin what the disk cannot hold.
fn check_space(dir: &Path, needs: u64) -> Result<()> {
    let free = free_bytes(dir)?;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::super::testing::{dir, names, problem, vectors};
    use super::*;

    fn declared(name: &str, dtype: Dtype, shape: &[usize]) -> Declared {
        Declared { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    /// A writer into an empty directory.
    fn create(dir: &Path, tensors: Vec<Declared>, max_shard_bytes: u64) -> Result<Writer> {
        Writer::create(dir, tensors, max_shard_bytes, BTreeMap::new())
    }

    /// Writes f32 vectors of one value each, the tensor's number.
    fn write(dir: &Path, tensors: &[&str], max_shard_bytes: u64) {
        let mut writer = create(dir, tensors.iter().map(|name| declared(name, Dtype::F32, &[1])).collect(), max_shard_bytes).unwrap();
        for (i, name) in tensors.iter().enumerate() {
            writer.put(name, &(i as f32).to_le_bytes()).unwrap();
        }
        writer.finish().unwrap();
    }

    #[test]
    fn numbers_in_names_are_numbers() {
        let mut sorted = ["l.10.a", "l.2.b", "l.2.a", "e", "l.2", "l.02.a", "l.x", "m", "é.1"];
        sorted.sort_by(|a, b| natural(a, b));
        assert_eq!(sorted, ["e", "l.2", "l.02.a", "l.2.a", "l.2.b", "l.10.a", "l.x", "m", "é.1"]);
        assert_eq!(natural("a1", "a1"), Ordering::Equal);
        assert_eq!(natural("99999999999999999999999", "100000000000000000000000"), Ordering::Less);
    }

    #[test]
    fn larger_elements_come_first() {
        let dir = dir(&[]);
        let tensors = [
            ("l.2.scale", Dtype::Bf16),
            ("l.10.codes", Dtype::I32),
            ("l.10.scale", Dtype::Bf16),
            ("l.2.codes", Dtype::I32),
            ("shape", Dtype::I64),
        ];
        let mut writer =
            create(dir.path(), tensors.iter().map(|(name, dtype)| declared(name, *dtype, &[1])).collect(), SHARD_BYTES).unwrap();
        for (name, dtype) in tensors {
            writer.put(name, &vec![1; dtype.size()]).unwrap();
        }
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let mut places: Vec<(u64, &str)> = checkpoint.tensors().map(|info| (info.bytes.start, info.name.as_str())).collect();
        places.sort_unstable();
        assert_eq!(places, [(0, "shape"), (8, "l.2.codes"), (12, "l.10.codes"), (16, "l.2.scale"), (18, "l.10.scale")]);
    }

    #[test]
    fn shards_and_their_index() {
        let dir = dir(&[]);
        // 8 bytes a shard: two vectors of one f32.
        write(dir.path(), &["l.0", "l.1", "l.10", "l.2", "l.3"], 8);
        let shard = |i: usize| format!("model-0000{i}-of-00003.safetensors");
        assert_eq!(names(dir.path()), ["config.json".to_owned(), shard(1), shard(2), shard(3), INDEX.to_owned()]);
        let index: serde_json::Value = serde_json::from_slice(&fs_err::read(dir.path().join(INDEX)).unwrap()).unwrap();
        let map = json!({ "l.0": shard(1), "l.1": shard(1), "l.2": shard(2), "l.3": shard(2), "l.10": shard(3) });
        assert_eq!(index, json!({ "metadata": { "total_size": 20 }, "weight_map": map }));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.floats("l.10").unwrap(), [2.0]);
    }

    #[test]
    fn the_format_is_said_once() {
        let dir = dir(&[]);
        write(dir.path(), &["a"], SHARD_BYTES);
        let file = fs_err::read(dir.path().join(SINGLE)).unwrap();
        let text = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        assert!(file[8..].starts_with(text.as_bytes()));
    }

    #[test]
    fn what_may_not_be_declared() {
        let dir = dir(&[]);
        let refused = |tensors| problem(create(dir.path(), tensors, 8));
        let twice = refused(vec![declared("a", Dtype::F32, &[1]), declared("a", Dtype::I64, &[2])]);
        assert!(matches!(twice, Problem::DeclaredTwice { tensor } if tensor == "a"));
        assert!(matches!(refused(vec![declared("__metadata__", Dtype::F32, &[1])]), Problem::ReservedName { .. }));
        assert!(
            matches!(refused(vec![declared("a", Dtype::F32, &[usize::MAX, 2])]), Problem::ShapeOverflow { tensor, .. } if tensor == "a")
        );
        let sum = vec![declared("a", Dtype::U8, &[1 << 62]), declared("b", Dtype::U8, &[1 << 62])];
        assert!(matches!(refused(sum), Problem::ShapeOverflow { tensor, .. } if tensor == "b"));
        assert_eq!(names(dir.path()), ["config.json"]);
    }

    #[test]
    fn a_disk_that_is_too_small_is_found_before_anything_is_written() {
        let dir = dir(&[]);
        // 2^60 bytes.
        let found = problem(create(dir.path(), vec![declared("a", Dtype::F32, &[1 << 58])], SHARD_BYTES));
        let Problem::NoSpace { needs, free, short } = found else { panic!("{found}") };
        assert!(needs > 1 << 60 && short == needs - free);
        assert_eq!(names(dir.path()), ["config.json"]);
    }

    #[test]
    fn what_may_not_be_put() {
        let dir = dir(&[]);
        let mut writer = create(dir.path(), vec![declared("a", Dtype::F32, &[2]), declared("b", Dtype::F32, &[2])], 8).unwrap();
        assert!(matches!(problem(writer.put("c", &[0; 8])), Problem::Undeclared { tensor } if tensor == "c"));
        assert!(matches!(problem(writer.put("a", &[0; 7])), Problem::WrongLength { declared: 8, given: 7, .. }));
        writer.put("a", &[0; 8]).unwrap();
        assert!(matches!(problem(writer.put("a", &[0; 8])), Problem::PutTwice { tensor } if tensor == "a"));
        assert!(matches!(problem(writer.finish()), Problem::NotPut { missing: 1, first } if first == "b"));
        // Nothing got a final name.
        assert!(names(dir.path()).iter().all(|name| name == "config.json" || name.ends_with(".tmp")));
    }

    #[test]
    fn what_an_earlier_run_left_is_replaced() {
        let dir = dir(&[("other.safetensors", b"kept"), ("model-00007-of-00009.safetensors.tmp", b"left")]);
        write(dir.path(), &["a", "b", "c"], 4);
        // A run that was killed after its first rename.
        drop(create(dir.path(), vec![declared("z", Dtype::F32, &[1])], 4).unwrap());
        write(dir.path(), &["x", "y"], 4);
        let kept = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX, "other.safetensors"];
        assert_eq!(names(dir.path()), kept);
        write(dir.path(), &["z"], 4);
        assert_eq!(names(dir.path()), ["config.json", SINGLE, "other.safetensors"]);
        assert_eq!(Checkpoint::open(dir.path()).unwrap().floats("z").unwrap(), [0.0]);
    }

    #[test]
    fn a_checkpoint_of_nothing() {
        let dir = dir(&[]);
        write(dir.path(), &[], SHARD_BYTES);
        assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().count(), 0);
    }

    #[test]
    fn a_shape_only_copy_has_the_shape_and_the_fingerprint() {
        let whole = dir(&[("config.json", br#"{"model_type":"x"}"#)]);
        write(whole.path(), &["a", "b", "c"], 8);
        let original = Checkpoint::open(whole.path()).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let copies = [parent.path().join("copy"), parent.path().join("of a copy")];
        write_shape_only(&original, &copies[0]).unwrap();
        write_shape_only(&Checkpoint::open(&copies[0]).unwrap(), &copies[1]).unwrap();
        for dir in &copies {
            let copy = Checkpoint::open(dir).unwrap();
            assert!(copy.is_shape_only() && !original.is_shape_only());
            assert!(copy.tensors().eq(original.tensors()));
            assert_eq!(copy.config(), original.config());
            assert_eq!(copy.fingerprint(), original.fingerprint());
            assert!(matches!(problem(copy.bytes("a")), Problem::ShapeOnly { tensor } if tensor == "a"));
            assert!(matches!(problem(copy.floats("b")), Problem::ShapeOnly { tensor } if tensor == "b"));
        }
    }

    #[test]
    fn a_shape_only_copy_overwrites_nothing() {
        let whole = dir(&[("model.safetensors", &vectors(&[("a", &[1.0])]))]);
        let original = Checkpoint::open(whole.path()).unwrap();
        assert!(matches!(problem(write_shape_only(&original, whole.path())), Problem::Occupied { file } if file == "config.json"));
        assert_eq!(original.floats("a").unwrap(), [1.0]);
    }

    /// Any tensors: names with numbers, all types, up to three sides of up to three.
    fn tensors() -> impl Strategy<Value = Vec<(Declared, Vec<u8>)>> {
        let shape = prop::collection::vec(0usize..4, 0..4);
        let one = ("[a-c]{1,2}\\.[0-9]{1,3}\\.[\"\\\\a-b日]{1,2}", prop::sample::select(Dtype::ALL.to_vec()), shape, any::<u8>());
        prop::collection::vec(one, 0..12).prop_map(|all| {
            let unique: BTreeMap<String, _> = all.into_iter().map(|(name, dtype, shape, seed)| (name, (dtype, shape, seed))).collect();
            let tensor = |(name, (dtype, shape, seed)): (String, (Dtype, Vec<usize>, u8))| {
                let bytes = dtype.bytes_of(&shape).unwrap();
                (Declared { name, dtype, shape }, (0..bytes).map(|i| seed.wrapping_mul(31).wrapping_add(i as u8)).collect())
            };
            unique.into_iter().map(tensor).collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(tensors in tensors().prop_shuffle(), max_shard_bytes in 0u64..200) {
            let dir = dir(&[]);
            let declared = tensors.iter().map(|(declared, _)| declared.clone()).rev().collect();
            let mut writer = create(dir.path(), declared, max_shard_bytes).unwrap();
            for (declared, bytes) in &tensors {
                writer.put(&declared.name, bytes).unwrap();
            }
            writer.finish().unwrap();
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            prop_assert_eq!(checkpoint.tensors().count(), tensors.len());
            for (Declared { name, dtype, shape }, bytes) in &tensors {
                let info = checkpoint.info(name).unwrap();
                prop_assert_eq!((&info.dtype, &info.shape), (dtype, shape));
                prop_assert_eq!(info.bytes.start % dtype.size() as u64, 0);
                prop_assert_eq!(checkpoint.bytes(name).unwrap(), bytes);
            }
            for shard in &checkpoint.shards {
                prop_assert_eq!(shard.header.bytes % 8, 0);
                let filled = shard.header.entries.iter().filter(|entry| !entry.bytes.is_empty()).count();
                prop_assert!(shard.header.data <= max_shard_bytes || filled == 1);
                prop_assert!(SafeTensors::deserialize(&fs_err::read(&shard.path).unwrap()).is_ok());
            }
        }
    }
}

//! Statistics as files: `layer-00000.safetensors` for every layer and, when all are there, `manifest.json`.
//!
//! A layer is finished when its file has its final name, the pass when the manifest exists. Counts are stored as U64, sums
//! as F64, `[domains, experts]` and `[width]` as the types say; the manifest says which tokens they are sums over.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::{ChannelSums, LayerStats, OutputSums, RouterSums};
use crate::arch::Site;
use crate::{Error, Result};

/// What the statistics of a folder are of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this file's form: 1.
    pub schema: u32,
    /// Fingerprint of the model that was run.
    pub model: String,
    /// Decoder layers.
    pub layers: usize,
    /// Names of the domains.
    pub domains: Vec<String>,
    /// The passes that were added up, in order.
    pub parts: Vec<Part>,
}

/// One pass over samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Hash of its samples' tokens.
    pub corpus: String,
    /// Who chose them.
    pub sampler: String,
    /// With which seed.
    pub seed: u64,
    /// How many.
    pub samples: usize,
    /// Tokens a sample.
    pub tokens: usize,
}

/// A folder of statistics.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// A folder, which need not exist yet.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest; `None` while the pass is not finished.
    ///
    /// # Errors
    ///
    /// An IO error or [`Error::Json`].
    pub fn manifest(&self) -> Result<Option<Manifest>> {
        let path = self.dir.join("manifest.json");
        if !path.is_file() {
            return Ok(None);
        }
        serde_json::from_slice(&fs_err::read(&path)?).map(Some).map_err(|source| Error::Json { path, source })
    }

    /// Writes the manifest: the statistics are complete.
    ///
    /// # Errors
    ///
    /// An IO error or [`Error::Json`].
    pub fn finish(&self, manifest: &Manifest) -> Result<()> {
        let path = self.dir.join("manifest.json");
        let text = serde_json::to_string_pretty(manifest).map_err(|source| Error::Json { path: path.clone(), source })?;
        write_whole(&path, |file| file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")))
    }

    /// Where a layer's statistics lie.
    pub fn layer_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:05}.safetensors"))
    }

    /// Writes one layer's statistics.
    ///
    /// # Errors
    ///
    /// An IO error or [`Error::Statistics`].
    pub fn put(&self, layer: usize, stats: &LayerStats) -> Result<()> {
        let path = self.layer_path(layer);
        let fields = Fields::of(stats).0;
        let views: Result<Vec<_>> = fields
            .iter()
            .map(|(name, field)| {
                let view = TensorView::new(field.dtype(), field.shape.clone(), &field.bytes);
                view.map(|v| (name.as_str(), v)).map_err(|e| invalid(&path, e.to_string()))
            })
            .collect();
        let bytes = safetensors::serialize(views?, None).map_err(|e| invalid(&path, e.to_string()))?;
        write_whole(&path, |file| file.write_all(&bytes))
    }

    /// Reads one layer's statistics.
    ///
    /// # Errors
    ///
    /// An IO error, or [`Error::Statistics`] where the file is not one of these.
    pub fn get(&self, layer: usize) -> Result<LayerStats> {
        let path = self.layer_path(layer);
        let bytes = fs_err::read(&path)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| invalid(&path, e.to_string()))?;
        let field = |(name, view): (&str, TensorView<'_>)| {
            let field = Field { count: view.dtype() == Dtype::U64, shape: view.shape().to_vec(), bytes: view.data().to_vec() };
            (name.to_owned(), field)
        };
        Fields(file.iter().map(field).collect()).read().ok_or_else(|| invalid(&path, "a tensor is missing or misshapen".into()))
    }
}

fn invalid(path: &Path, message: String) -> Error {
    Error::Statistics { path: path.into(), message }
}

/// Writes a file under a temporary name, syncs it and gives it its name: it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs_err::create_dir_all(dir)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = std::io::BufWriter::with_capacity(1 << 20, fs_err::File::create(&temporary)?);
    write(&mut file)?;
    let file = file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    file.sync_all()?;
    fs_err::rename(&temporary, path)?;
    // The rename itself is only durable once the folder is; file systems that cannot sync a folder say so, and that is no
    // failure of the write.
    if let Ok(dir) = fs_err::File::open(dir) {
        let _ = dir.sync_all();
    }
    Ok(())
}

/// One tensor of a file: counts (U64) or sums (F64), little endian.
struct Field {
    count: bool,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Field {
    fn dtype(&self) -> Dtype {
        if self.count { Dtype::U64 } else { Dtype::F64 }
    }
}

/// A layer's statistics as named tensors.
#[derive(Default)]
struct Fields(BTreeMap<String, Field>);

impl Fields {
    fn of(stats: &LayerStats) -> Self {
        let mut to = Self::default();
        if let Some(r) = &stats.router {
            to.counts("router.tokens", &[r.tokens.len()], &r.tokens);
            to.counts("router.counts", r.counts.shape(), &r.counts);
            for (name, sums) in [("logits", &r.logits), ("mass", &r.mass), ("weights", &r.weights), ("weights2", &r.weights2)] {
                to.sums(&format!("router.{name}"), sums.shape(), sums);
            }
        }
        if let Some(o) = &stats.outputs {
            to.counts("outputs.counts", o.counts.shape(), &o.counts);
            let sums = [
                ("norms", &o.norms),
                ("norms2", &o.norms2),
                ("weighted", &o.weighted),
                ("weighted2", &o.weighted2),
                ("outputs", &o.outputs),
            ];
            for (name, sums) in sums {
                to.sums(&format!("outputs.{name}"), sums.shape(), sums);
            }
            to.sums("outputs.peaks", &[o.peaks.len()], &o.peaks);
        }
        for (site, c) in &stats.channels {
            to.counts(&format!("channels.{site}.tokens"), &[1], [&c.tokens]);
            to.sums(&format!("channels.{site}.squares"), &[c.squares.len()], &c.squares);
            to.sums(&format!("channels.{site}.weighted"), &[c.weighted.len()], &c.weighted);
        }
        to
    }

    fn counts<'a>(&mut self, name: &str, shape: &[usize], values: impl IntoIterator<Item = &'a u64>) {
        let bytes = values.into_iter().flat_map(|v| v.to_le_bytes()).collect();
        self.0.insert(name.to_owned(), Field { count: true, shape: shape.to_vec(), bytes });
    }

    fn sums<'a>(&mut self, name: &str, shape: &[usize], values: impl IntoIterator<Item = &'a f64>) {
        let bytes = values.into_iter().flat_map(|v| v.to_le_bytes()).collect();
        self.0.insert(name.to_owned(), Field { count: false, shape: shape.to_vec(), bytes });
    }

    fn words(&self, name: &str, count: bool) -> Option<(Vec<usize>, Vec<[u8; 8]>)> {
        let field = self.0.get(name).filter(|f| f.count == count)?;
        let words = field.bytes.chunks_exact(8).map(|w| w.try_into().ok()).collect::<Option<_>>()?;
        Some((field.shape.clone(), words))
    }

    fn count1(&self, name: &str) -> Option<Array1<u64>> {
        let (_, words) = self.words(name, true)?;
        Some(words.into_iter().map(u64::from_le_bytes).collect())
    }

    fn sum1(&self, name: &str) -> Option<Array1<f64>> {
        let (_, words) = self.words(name, false)?;
        Some(words.into_iter().map(f64::from_le_bytes).collect())
    }

    fn count2(&self, name: &str) -> Option<Array2<u64>> {
        let (shape, words) = self.words(name, true)?;
        let [rows, columns] = shape[..] else { return None };
        Array2::from_shape_vec((rows, columns), words.into_iter().map(u64::from_le_bytes).collect()).ok()
    }

    fn sum2(&self, name: &str) -> Option<Array2<f64>> {
        let (shape, words) = self.words(name, false)?;
        let [rows, columns] = shape[..] else { return None };
        Array2::from_shape_vec((rows, columns), words.into_iter().map(f64::from_le_bytes).collect()).ok()
    }

    /// The statistics; `None` where a tensor is missing or of another shape.
    fn read(&self) -> Option<LayerStats> {
        let has = |prefix: &str| self.0.keys().any(|name| name.starts_with(prefix));
        let router = if has("router.") { Some(self.router()?) } else { None };
        let outputs = if has("outputs.") { Some(self.outputs()?) } else { None };
        let names = self.0.keys().filter_map(|name| name.strip_prefix("channels.")?.strip_suffix(".tokens"));
        let channels = names.map(|name| Some((site_of(name)?, self.channels(name)?))).collect::<Option<_>>()?;
        Some(LayerStats { router, outputs, channels })
    }

    fn router(&self) -> Option<RouterSums> {
        let sums = |name: &str| self.sum2(&format!("router.{name}"));
        let read = RouterSums {
            tokens: self.count1("router.tokens")?,
            counts: self.count2("router.counts")?,
            logits: sums("logits")?,
            mass: sums("mass")?,
            weights: sums("weights")?,
            weights2: sums("weights2")?,
        };
        let dim = read.counts.dim();
        let whole = read.tokens.len() == dim.0 && [&read.logits, &read.mass, &read.weights, &read.weights2].iter().all(|a| a.dim() == dim);
        whole.then_some(read)
    }

    fn outputs(&self) -> Option<OutputSums> {
        let sums = |name: &str| self.sum2(&format!("outputs.{name}"));
        let read = OutputSums {
            counts: self.count2("outputs.counts")?,
            norms: sums("norms")?,
            norms2: sums("norms2")?,
            weighted: sums("weighted")?,
            weighted2: sums("weighted2")?,
            outputs: sums("outputs")?,
            peaks: self.sum1("outputs.peaks")?,
        };
        let dim = read.counts.dim();
        let experts = read.outputs.nrows() == dim.1 && read.peaks.len() == dim.1;
        let whole = experts && [&read.norms, &read.norms2, &read.weighted, &read.weighted2].iter().all(|a| a.dim() == dim);
        whole.then_some(read)
    }

    fn channels(&self, site: &str) -> Option<ChannelSums> {
        let tokens = *self.count1(&format!("channels.{site}.tokens"))?.first()?;
        let squares = self.sum1(&format!("channels.{site}.squares"))?;
        let weighted = self.sum1(&format!("channels.{site}.weighted"))?;
        (squares.len() == weighted.len()).then_some(ChannelSums { tokens, squares, weighted })
    }
}

/// The site of a name, as [`Site`] displays it.
pub(super) fn site_of(name: &str) -> Option<Site> {
    let fixed =
        [Site::AttentionIn, Site::QueryB, Site::KvB, Site::AttentionOut, Site::DenseIn, Site::DenseDown, Site::SharedIn, Site::SharedDown];
    fixed.into_iter().find(|site| site.to_string() == name).or_else(|| {
        let (expert, end) = name.strip_prefix("expert.")?.split_once('.')?;
        let expert = expert.parse().ok()?;
        match end {
            "in" => Some(Site::ExpertIn(expert)),
            "down" => Some(Site::ExpertDown(expert)),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> LayerStats {
        let mut router = RouterSums::new(2, 3);
        (router.counts[(1, 2)], router.tokens[1], router.mass[(1, 2)]) = (7, 8, 0.1);
        let mut outputs = OutputSums::new(2, 3, 4);
        outputs.add(1, &crate::stats::OutputChunk::of(&[1.0, -2.0, 3.0, 0.5], &[0.3], 2, |_| 1));
        let sites = [Site::AttentionIn, Site::SharedDown, Site::ExpertIn(2), Site::ExpertDown(11)];
        let channels = sites.into_iter().enumerate().map(|(i, site)| (site, ChannelSums::of(&[1.5, i as f32], 2, Some(&[0.5])))).collect();
        LayerStats { router: Some(router), outputs: Some(outputs), channels }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().join("stats"));
        for (layer, stats) in [(0, LayerStats::default()), (3, stats())] {
            store.put(layer, &stats).unwrap();
            assert_eq!(store.get(layer).unwrap(), stats);
        }
        let bytes = fs_err::read(store.layer_path(3)).unwrap();
        store.put(3, &stats()).unwrap();
        assert_eq!(bytes, fs_err::read(store.layer_path(3)).unwrap());
        let names: Vec<_> = fs_err::read_dir(store.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "no temporary file is left: {names:?}");
    }

    #[test]
    fn the_manifest_says_that_the_pass_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert_eq!(store.manifest().unwrap(), None);
        let part = Part { corpus: "c".into(), sampler: "random".into(), seed: 3, samples: 4, tokens: 5 };
        let manifest = Manifest { schema: 1, model: "m".into(), layers: 2, domains: vec!["en".into()], parts: vec![part] };
        store.finish(&manifest).unwrap();
        assert_eq!(store.manifest().unwrap(), Some(manifest));
    }

    #[test]
    fn a_file_that_is_not_statistics_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        fs_err::write(store.layer_path(0), b"junk").unwrap();
        let error = store.get(0).unwrap_err().to_string();
        assert!(error.contains("layer-00000.safetensors"), "{error}");
        let view = TensorView::new(Dtype::U64, vec![1], &[0; 8]).unwrap();
        fs_err::write(store.layer_path(0), safetensors::serialize([("router.tokens", view)], None).unwrap()).unwrap();
        assert!(store.get(0).unwrap_err().to_string().contains("a tensor is missing or misshapen"));
    }

    #[test]
    fn sites_are_named_as_they_are_shown() {
        for site in [Site::QueryB, Site::DenseIn, Site::ExpertIn(0), Site::ExpertDown(127)] {
            assert_eq!(site_of(&site.to_string()), Some(site));
        }
        assert_eq!(site_of("expert.x.in"), None);
    }
}

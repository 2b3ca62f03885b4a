//! Statistics as files: `layer-00000.safetensors` for every layer and, when all are there, `manifest.json`.
//!
//! A layer is finished when its file has its final name, the pass when the manifest exists. Counts are stored as U64, sums
//! as F64, `[domains, experts]` and `[width]` as the types say; the manifest says which tokens they are sums over.

use std::io::Write;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::fields::{Fields, Stored};
use super::{BlockSums, ExpertStats, LayerStats, OutputSums, RouterSums};
use crate::arch::Site;
use crate::sample::{Drawn, Through};
use crate::{Error, Result};

/// The version of [`Manifest::schema`] that is written.
pub(crate) const SCHEMA: u32 = 1;

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

impl Manifest {
    /// The hashes of the samples of all passes, joined by `+`.
    pub fn corpus(&self) -> String {
        self.parts.iter().map(|part| part.corpus.as_str()).collect::<Vec<_>>().join("+")
    }
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
    /// Tokens of the longest sample.
    pub tokens: usize,
    /// Tokens of all samples: what the statistics are sums over.
    pub tokens_run: usize,
    /// How the samples came about.
    pub drawn: Drawn,
    /// Which tokens the experts' sites were shown.
    pub experts: Through,
    /// Tokens that all experts were run on to see how alike they are.
    pub similarity_tokens: usize,
    /// Whether routing traces were kept.
    pub traces: bool,
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
    /// An IO error, [`Error::Json`], [`Error::OtherVersion`].
    pub fn manifest(&self) -> Result<Option<Manifest>> {
        let path = self.dir.join("manifest.json");
        if !path.is_file() {
            return Ok(None);
        }
        let manifest: Manifest = serde_json::from_slice(&fs_err::read(&path)?).map_err(|source| Error::own_json(path.clone(), source))?;
        if manifest.schema != SCHEMA {
            let what = format!("its form is {}, and this program reads form {SCHEMA}", manifest.schema);
            return Err(Error::OtherVersion { path, what });
        }
        Ok(Some(manifest))
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
        let bytes = fields_of(stats).to_file().map_err(|e| invalid(&path, e.to_string()))?;
        write_whole(&path, |file| file.write_all(&bytes))
    }

    /// Reads one layer's statistics.
    ///
    /// # Errors
    ///
    /// An IO error, [`Error::OtherVersion`] where a tensor is missing, or [`Error::Statistics`] where the file is not one of these.
    pub fn get(&self, layer: usize) -> Result<LayerStats> {
        let path = self.layer_path(layer);
        let fields = Fields::from_file(&fs_err::read(&path)?).map_err(|e| invalid(&path, e.to_string()))?;
        // The file got its name when it was whole, so what it lacks was never written.
        read(&fields).ok_or_else(|| match fields.missing() {
            Some(name) => Error::OtherVersion { path: path.clone(), what: format!("missing tensor `{name}`") },
            None => invalid(&path, "a tensor is misshapen".into()),
        })
    }

    /// Where a layer's routing traces lie.
    pub fn traces_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("traces-{layer:05}.safetensors"))
    }

    /// Writes which experts every token of the samples chose in a layer, best first, `[tokens, top_k]`.
    ///
    /// # Errors
    ///
    /// An IO error or [`Error::Statistics`].
    pub fn put_traces(&self, layer: usize, chosen: &Array2<u16>) -> Result<()> {
        let path = self.traces_path(layer);
        let bytes: Vec<u8> = chosen.iter().flat_map(|e| e.to_le_bytes()).collect();
        let file = TensorView::new(Dtype::U16, chosen.shape().to_vec(), &bytes).and_then(|v| safetensors::serialize([("chosen", v)], None));
        let file = file.map_err(|e| invalid(&path, e.to_string()))?;
        write_whole(&path, |out| out.write_all(&file))
    }

    /// Reads a layer's routing traces; `None` where none were kept.
    ///
    /// # Errors
    ///
    /// An IO error, or [`Error::Statistics`] where the file is not one of these.
    pub fn traces(&self, layer: usize) -> Result<Option<Array2<u16>>> {
        let path = self.traces_path(layer);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = fs_err::read(&path)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| invalid(&path, e.to_string()))?;
        let view = file.tensor("chosen").map_err(|e| invalid(&path, e.to_string()))?;
        let values = view.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        match view.shape() {
            &[rows, top_k] if view.dtype() == Dtype::U16 => Array2::from_shape_vec((rows, top_k), values).ok(),
            _ => None,
        }
        .ok_or_else(|| invalid(&path, "`chosen` is not a matrix of U16".into()))
        .map(Some)
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

fn fields_of(stats: &LayerStats) -> Fields {
    let mut to = Fields::default();
    if let Some(experts) = &stats.experts {
        experts.router.write("router.", &mut to);
        experts.outputs.write("outputs.", &mut to);
        experts.block.write("block.", &mut to);
        experts.similarity.iter().for_each(|s| s.write("similarity.", &mut to));
    }
    stats.channels.iter().for_each(|(site, sums)| sums.write(&format!("channels.{site}."), &mut to));
    stats.gates.iter().for_each(|(site, sums)| sums.write(&format!("gates.{site}."), &mut to));
    to
}

/// The statistics; `None` where a tensor is missing or of another shape.
fn read(from: &Fields) -> Option<LayerStats> {
    let experts = match from.has("router.") {
        true => Some(ExpertStats {
            router: RouterSums::read("router.", from)?,
            outputs: OutputSums::read("outputs.", from)?,
            block: BlockSums::read("block.", from)?,
            similarity: from.optional("similarity.")?,
        }),
        false => None,
    };
    let channels =
        from.between("channels.", ".tokens").map(|name| Some((site_of(name)?, Stored::read(&format!("channels.{name}."), from)?)));
    let gates = from.between("gates.", ".weight").map(|name| Some((site_of(name)?, Stored::read(&format!("gates.{name}."), from)?)));
    Some(LayerStats { experts, channels: channels.collect::<Option<_>>()?, gates: gates.collect::<Option<_>>()? })
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
    use crate::stats::{ChannelSums, GateSums, OutputChunk, Similarity};

    fn stats() -> LayerStats {
        let mut router = RouterSums::new(2, 3, Some(2));
        (router.counts[(1, 2)], router.tokens[1], router.mass[(1, 2)], router.pairs[(0, 1)]) = (7, 8, 0.1, 9);
        let mut outputs = OutputSums::new(2, 3, 4);
        outputs.add(1, &OutputChunk::of(&[1.0, -2.0, 3.0, 0.5], &[0.3], 2, |_| 1));
        let mut block = BlockSums::new(2);
        block.add(1, 0.5, 0.2);
        let similarity = Some(Similarity { tokens: 4, cosines: Array2::eye(3) });
        let sites = [Site::AttentionIn, Site::SharedDown, Site::ExpertIn(2), Site::ExpertDown(11)];
        let channels = sites.into_iter().enumerate().map(|(i, site)| (site, ChannelSums::of(&[1.5, i as f32], 2, Some(&[0.5])))).collect();
        let gates = [(Site::ExpertDown(11), GateSums::of(&[0.5, 1.0], &[2.0, 1.0], 2, None))].into();
        LayerStats { experts: Some(ExpertStats { router, outputs, block, similarity }), channels, gates }
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
    fn traces_are_kept_beside() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert_eq!(store.traces(1).unwrap(), None);
        let chosen = ndarray::array![[1_u16, 300], [2, 0], [65535, 7]];
        store.put_traces(1, &chosen).unwrap();
        assert_eq!(store.traces(1).unwrap(), Some(chosen));
    }

    #[test]
    fn the_manifest_says_that_the_pass_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert_eq!(store.manifest().unwrap(), None);
        let (drawn, experts) = (Drawn::default(), Through::Routed);
        let (corpus, sampler) = ("c".into(), "random".into());
        let part =
            Part { corpus, sampler, seed: 3, samples: 4, tokens: 5, tokens_run: 20, drawn, experts, similarity_tokens: 0, traces: false };
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
        let said = store.get(0).unwrap_err().to_string();
        assert!(said.contains("layer-00000.safetensors: another version") && said.contains("missing tensor `router.counts`"), "{said}");
        let view = TensorView::new(Dtype::U64, vec![1, 1], &[0; 8]).unwrap();
        let tensors = ["tokens", "squares", "weighted"].map(|name| (format!("channels.dense.in.{name}"), view.clone()));
        fs_err::write(store.layer_path(0), safetensors::serialize(tensors, None).unwrap()).unwrap();
        assert!(store.get(0).unwrap_err().to_string().contains("a tensor is misshapen"));
    }

    #[test]
    fn statistics_of_another_version_are_named_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let path = store.dir().join("manifest.json");
        let whole = serde_json::json!({ "schema": 1, "model": "m", "layers": 2, "domains": ["en"], "parts": [] });
        let said = |edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
            let mut manifest = whole.as_object().unwrap().clone();
            edit(&mut manifest);
            fs_err::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
            store.manifest().map_err(|error| error.to_string())
        };
        assert!(said(&|_| {}).unwrap().is_some());
        for (what, edit) in [
            ("missing field `domains`", &(|m: &mut serde_json::Map<_, _>| _ = m.remove("domains")) as &dyn Fn(&mut _)),
            ("unknown field `shards`", &|m: &mut serde_json::Map<_, _>| _ = m.insert("shards".into(), 3.into())),
            ("its form is 2, and this program reads form 1", &|m: &mut serde_json::Map<_, _>| _ = m.insert("schema".into(), 2.into())),
        ] {
            let said = said(edit).unwrap_err();
            assert!(["manifest.json", "another version of moepress", what, "--force"].iter().all(|part| said.contains(part)), "{said}");
        }
        // A file that was torn is no version's.
        fs_err::write(&path, b"{\"schema\": 1,").unwrap();
        assert!(store.manifest().unwrap_err().to_string().contains("not valid JSON"));
    }

    #[test]
    fn sites_are_named_as_they_are_shown() {
        for site in [Site::QueryB, Site::DenseIn, Site::ExpertIn(0), Site::ExpertDown(127)] {
            assert_eq!(site_of(&site.to_string()), Some(site));
        }
        assert_eq!(site_of("expert.x.in"), None);
    }
}

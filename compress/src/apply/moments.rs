//! Second moments on disk (`calibrate.keep_moments`), so that another plan over the same samples is solved without a forward pass.
//!
//! `DIR/moments/layer-00003.safetensors` holds for every site that a plan has solved at `SITE:sums`, the upper triangle in the bands of
//! [`Moment::values`], blended where the plan says so, and `SITE:seen`, in little-endian the tokens behind it (8 bytes), whether it was
//! blended (1 byte), and in f64 `Σ v` and `Σ v x`. `4 · K·(K + 256)/2` bytes a site of `K` inputs, for small models: Qwen3-30B-A3B takes 70 GB.
//!
//! A file counts as long as it is of the same model, samples, objective and experts' tokens, which its metadata say by one hash; any
//! other is replaced.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calib::arch::Site;
use calib::checkpoint::hash_bytes;
use calib::stats::{First, Moment};

use super::work::Job;
use crate::plan::Plan;
use crate::tensorfile::{Create, Declared, Element, Open};
use crate::{Error, Result};

/// Version of the files' form.
const SCHEMA: u32 = 1;

/// Where a plan's moments are kept, and of what they are.
pub struct Keep {
    dir: PathBuf,
    of: String,
}

/// Every site of a layer whose matrices are solved against tokens, with its inputs and whether its moment is blended.
type Sites = BTreeMap<Site, (usize, bool)>;

impl Keep {
    /// Under `dir/moments`; `None` where the plan keeps none.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn new(dir: &Path, plan: &Plan) -> Result<Option<Self>> {
        if !plan.keep_moments {
            return Ok(None);
        }
        let dir = dir.join("moments");
        fs_err::create_dir_all(&dir)?;
        let of = (SCHEMA, &plan.model, &plan.corpus, &plan.objective, &plan.end_loss, plan.through);
        let of = serde_json::to_vec(&of).map_err(|source| Error::Json { path: dir.clone(), source })?;
        Ok(Some(Self { dir, of: hash_bytes(&of) }))
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:05}.safetensors"))
    }

    /// Begins the file of one layer with the sites of `jobs` that need tokens.
    ///
    /// # Errors
    ///
    /// An IO error.
    pub fn create(&self, layer: usize, plan: &Plan, jobs: &[Job<'_>]) -> Result<Write> {
        let declared = sites(plan, jobs).into_iter().flat_map(|(site, (width, _))| {
            let part = |part: &str, dtype, count| Declared { name: format!("{site:?}:{part}"), dtype, shape: vec![count] };
            [part("sums", Element::F32, Moment::stored(width)), part("seen", Element::U8, 9 + 8 * (1 + width))]
        });
        let metadata = [("moepress", "moments".to_owned()), ("of", self.of.clone())];
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Ok(Write(Create::new(&self.path(layer), declared.collect(), &metadata)?))
    }

    /// The files of layers from `first` on; `None` unless each of them can serve its jobs.
    ///
    /// # Errors
    ///
    /// As [`Keep::open`].
    pub fn all(&self, plan: &Plan, layers: &[Vec<Job<'_>>], first: usize) -> Result<Option<Vec<Moments>>> {
        layers.iter().enumerate().map(|(at, jobs)| self.open(first + at, plan, jobs)).collect()
    }

    /// The file of one layer; `None` where there is none, or it cannot serve all of `jobs`: it is of other samples, lacks a site, or
    /// blended another.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if it is damaged; an IO error.
    pub fn open(&self, layer: usize, plan: &Plan, jobs: &[Job<'_>]) -> Result<Option<Moments>> {
        let path = self.path(layer);
        if !path.is_file() {
            return Ok(None);
        }
        let moments = Moments { file: Open::new(&path)?, path };
        if moments.file.metadata("of") != Some(&self.of) {
            return Ok(None);
        }
        for (site, (width, blended)) in sites(plan, jobs) {
            let Ok(entry) = moments.file.entry(&format!("{site:?}:sums")) else { return Ok(None) };
            if entry.shape != [Moment::stored(width)] || moments.seen(site)?.blended != blended {
                return Ok(None);
            }
        }
        Ok(Some(moments))
    }
}

fn sites(plan: &Plan, jobs: &[Job<'_>]) -> Sites {
    let mut found = Sites::new();
    for job in jobs.iter().filter(|job| job.needs_tokens(plan)) {
        if let Some(site) = job.site {
            let (_, blended) = found.entry(site).or_insert((job.shape[1], false));
            *blended |= job.is_blended();
        }
    }
    found
}

/// The file of a layer being written; moments may be put from several threads.
pub struct Write(Create);

impl Write {
    /// Writes one site's moment, `[width, width]`; `None`: no token came.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if the site was not declared or is put twice; an IO error.
    pub fn put(&self, site: Site, moment: Option<&Moment>, (width, blended): (usize, bool)) -> Result<()> {
        let empty;
        let moment = match moment {
            Some(moment) => moment,
            None => {
                empty = Moment::new(width);
                &empty
            }
        };
        let sums: Vec<u8> = moment.values().iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut seen = moment.tokens().to_le_bytes().to_vec();
        seen.push(u8::from(blended));
        let first = moment.first();
        seen.extend(std::iter::once(&first.weight).chain(&first.sums).flat_map(|x| x.to_le_bytes()));
        self.0.put(&format!("{site:?}:sums"), &sums)?;
        self.0.put(&format!("{site:?}:seen"), &seen)
    }

    /// Gives it its name.
    ///
    /// # Errors
    ///
    /// As [`Create::finish`].
    pub fn finish(self) -> Result<()> {
        self.0.finish()
    }
}

/// What stands beside a site's sums.
struct Seen {
    tokens: u64,
    blended: bool,
    first: First,
}

/// A layer's moments, read one by one.
pub struct Moments {
    file: Open,
    path: PathBuf,
}

impl Moments {
    fn seen(&self, site: Site) -> Result<Seen> {
        let bytes = self.file.bytes(&format!("{site:?}:seen"))?;
        let Some((tokens, [blended, rest @ ..])) = bytes.split_first_chunk::<8>() else { return Err(self.damaged(site)) };
        let values: Vec<f64> = rest.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
        let Some((&weight, sums)) = values.split_first() else { return Err(self.damaged(site)) };
        Ok(Seen { tokens: u64::from_le_bytes(*tokens), blended: *blended != 0, first: First { sums: sums.to_vec(), weight } })
    }

    /// A site's moment of `width` inputs, as it was put; `None` where no token came and nothing was blended.
    ///
    /// # Errors
    ///
    /// [`Error::Stage`] if the file does not hold it; an IO error.
    pub fn get(&self, site: Site, width: usize) -> Result<Option<Moment>> {
        let Seen { tokens, blended, first } = self.seen(site)?;
        if tokens == 0 && !blended {
            return Ok(None);
        }
        let bytes = self.file.bytes(&format!("{site:?}:sums"))?;
        let sums = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        Moment::from_values(width, tokens, sums, first).map(Some).ok_or_else(|| self.damaged(site))
    }

    fn damaged(&self, site: Site) -> Error {
        Error::Stage { path: self.path.clone(), what: format!("it holds no whole moment of {site:?}; remove the file") }
    }
}

//! What a change of weights costs at the end of the model, in nats a token (GuidedQuant, arXiv 2505.07004).
//!
//! With targets drawn from the model's own distribution and `ℓ = Σ_t −log p(y_t)`, the Gauss-Newton approximation of the KL
//! divergence that a change `ΔW` of a matrix causes is `½ Σ_i r_i (ΔW H ΔWᵀ)_ii`, over the calibration tokens. In it
//! `v_t` is the mean over a site's output channels of `(∂ℓ/∂z_t)²`, `H = Σ_t v_t x_t x_tᵀ`, and `r_i = Σ_t (∂ℓ/∂z_t,i)²`,
//! divided by its mean over the same channels. The channels of a site are those of all its matrices: gate and up count as
//! one matrix, and so do query, key and value, which share their inputs and so their `H`.
//!
//! Terms between different tokens are left out, so the numbers rank changes better than they predict them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::moment::First;
use super::store::{site_of, write_whole};
use crate::arch::{Part, Projection, Site};
use crate::forward::Routed;
use crate::{Error, Result, linalg};

/// What changes of the matrices of one site cost.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteLoss {
    /// The site.
    pub site: Site,
    /// `H = Σ_t v_t x_t x_tᵀ`, `[in, in]`.
    pub moment: Array2<f32>,
    /// `Σ_t v_t x_t` and `Σ_t v_t`.
    pub first: First,
    /// Rows that entered.
    pub rows: u64,
    /// `r` of each matrix, `[out]`; its mean over all of them is 1.
    pub outputs: Vec<(Part, Array1<f64>)>,
    /// Tokens whose loss was summed.
    pub tokens: u64,
}

impl SiteLoss {
    /// Nats a token that `delta`, a change of the matrix `part`, `[out, in]`, costs; `None` if it does not stand at this site.
    pub fn cost(&self, part: Part, delta: ArrayView2<'_, f32>) -> Option<f64> {
        let (_, r) = self.outputs.iter().find(|(found, _)| *found == part)?;
        Some(cost(self.moment.view(), r.view(), delta) / self.tokens.max(1) as f64)
    }
}

/// `½ Σ_i r_i (ΔW H ΔWᵀ)_ii`: nats over all calibration tokens.
///
/// `h` is `[in, in]`, `r` `[out]`, `delta` `[out, in]`.
///
/// # Panics
///
/// If the three do not fit together.
pub fn cost(h: ArrayView2<'_, f32>, r: ArrayView1<'_, f64>, delta: ArrayView2<'_, f32>) -> f64 {
    assert_eq!((r.len(), h.nrows()), delta.dim(), "outputs and inputs of a change");
    let product = linalg::product(delta, h);
    let row = |(a, b): (ArrayView1<'_, f32>, ArrayView1<'_, f32>)| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let rows = delta.rows().into_iter().zip(product.rows());
    0.5 * rows.zip(r).map(|(pair, r)| r * row(pair)).sum::<f64>()
}

/// The token weights of one site.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteWeights {
    /// `v` of each row, in the order in which rows enter the site.
    pub v: Vec<f32>,
    /// At a routed expert's sites, which rows over all samples these are, rising.
    pub tokens: Option<Vec<u32>>,
    /// `r` of each matrix, `[out]`; its mean over all of them is 1.
    pub outputs: Vec<(Part, Array1<f64>)>,
}

/// The token weights of one decoder layer: small enough to be a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerWeights {
    /// Mean over the channels of `(∂ℓ/∂h)²`, `h` the layer's output; `[tokens]`.
    pub gradient: Vec<f32>,
    /// Its sites.
    pub sites: BTreeMap<Site, SiteWeights>,
}

/// The matrices that can stand at a site, with their names in a file.
fn matrices(site: Site) -> Vec<(Part, &'static str)> {
    use Projection::{Down, Gate, Up};
    let candidates = match site {
        Site::AttentionIn => {
            return vec![
                (Part::Query, "query"),
                (Part::Key, "key"),
                (Part::Value, "value"),
                (Part::QueryA, "query_a"),
                (Part::KvA, "kv_a"),
            ];
        }
        Site::QueryB => return vec![(Part::QueryB, "query_b")],
        Site::KvB => return vec![(Part::KvB, "kv_b")],
        Site::AttentionOut => return vec![(Part::Output, "output")],
        Site::DenseIn => [Part::Dense(Gate), Part::Dense(Up)].to_vec(),
        Site::DenseDown => [Part::Dense(Down)].to_vec(),
        Site::SharedIn => [Part::Shared(Gate), Part::Shared(Up)].to_vec(),
        Site::SharedDown => [Part::Shared(Down)].to_vec(),
        Site::ExpertIn(e) => [Part::Expert(e, Gate), Part::Expert(e, Up)].to_vec(),
        Site::ExpertDown(e) => [Part::Expert(e, Down)].to_vec(),
    };
    let names: &[_] = if candidates.len() == 2 { &["gate", "up"] } else { &["down"] };
    candidates.into_iter().zip(names.iter().copied()).collect()
}

impl LayerWeights {
    /// Writes a safetensors file: `gradient`, and for each site `v.SITE` (F32), `tokens.SITE` (U32) where it is routed, and
    /// `r.SITE.MATRIX` (F64).
    ///
    /// # Errors
    ///
    /// An IO error or [`Error::Statistics`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let floats = |values: &[f32]| (Dtype::F32, values.len(), values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        let mut tensors = vec![("gradient".to_owned(), floats(&self.gradient))];
        for (site, weights) in &self.sites {
            tensors.push((format!("v.{site}"), floats(&weights.v)));
            if let Some(tokens) = &weights.tokens {
                let bytes = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
                tensors.push((format!("tokens.{site}"), (Dtype::U32, tokens.len(), bytes)));
            }
            for (part, name) in matrices(*site) {
                if let Some((_, r)) = weights.outputs.iter().find(|(found, _)| *found == part) {
                    let bytes = r.iter().flat_map(|v| v.to_le_bytes()).collect();
                    tensors.push((format!("r.{site}.{name}"), (Dtype::F64, r.len(), bytes)));
                }
            }
        }
        let invalid = |e: safetensors::SafeTensorError| invalid(path, e.to_string());
        let views: Result<Vec<_>> = tensors
            .iter()
            .map(|(name, (dtype, length, bytes))| Ok((name.as_str(), TensorView::new(*dtype, vec![*length], bytes).map_err(invalid)?)))
            .collect();
        let bytes = safetensors::serialize(views?, None).map_err(invalid)?;
        write_whole(path, |file| file.write_all(&bytes))
    }

    /// Reads what [`LayerWeights::write`] wrote.
    ///
    /// # Errors
    ///
    /// An IO error, or [`Error::Statistics`] where the file is not such a one.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs_err::read(path)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| invalid(path, e.to_string()))?;
        let words = |name: &str, dtype| file.tensor(name).ok().filter(|view| view.dtype() == dtype);
        let of4 = |view: &TensorView<'_>| view.data().as_chunks::<4>().0.to_vec();
        let floats = |name: &str| words(name, Dtype::F32).map(|view| of4(&view).into_iter().map(f32::from_le_bytes).collect::<Vec<_>>());
        let missing = |name: &str| invalid(path, format!("{name} is missing or no F32"));
        let mut weights = Self { gradient: floats("gradient").ok_or_else(|| missing("gradient"))?, sites: BTreeMap::new() };
        for name in file.names() {
            let Some(site) = name.strip_prefix("v.").and_then(site_of) else { continue };
            let tokens = words(&format!("tokens.{site}"), Dtype::U32).map(|view| of4(&view).into_iter().map(u32::from_le_bytes).collect());
            let r = |(part, name): (Part, &str)| {
                let view = words(&format!("r.{site}.{name}"), Dtype::F64)?;
                Some((part, view.data().as_chunks::<8>().0.iter().map(|&word| f64::from_le_bytes(word)).collect()))
            };
            let outputs = matrices(site).into_iter().filter_map(r).collect();
            let v = floats(name).ok_or_else(|| missing(name))?;
            if tokens.as_ref().is_some_and(|tokens: &Vec<u32>| tokens.len() != v.len()) {
                return Err(invalid(path, format!("{site} has as many token numbers as weights")));
            }
            weights.sites.insert(site, SiteWeights { v, tokens, outputs });
        }
        Ok(weights)
    }
}

fn invalid(path: &Path, message: String) -> Error {
    Error::Statistics { path: path.into(), message }
}

/// Hands out a layer's token weights for rows as a [`Tap`](crate::forward::Tap) sees them.
///
/// The rows are those of the same samples, but routing may have changed since (the layers before are compressed). A token
/// that is new to an expert has no weight there. For its down projection `v = c² · mean (∂ℓ/∂h)²`, with the routing weight
/// `c`, is what it would have been; for gate and up that is multiplied by the ratio of the two sites' weights over the
/// expert's own tokens (over all the layer's experts where it has none). Such rows are counted.
#[derive(Debug)]
pub struct RowWeights {
    layer: LayerWeights,
    /// The row that comes next, at sites that all tokens pass.
    next: Mutex<BTreeMap<Site, usize>>,
    strangers: AtomicU64,
}

impl RowWeights {
    /// At the first row of every site.
    pub fn new(layer: LayerWeights) -> Self {
        Self { layer, next: Mutex::default(), strangers: AtomicU64::new(0) }
    }

    /// Rows so far that are new to their expert.
    pub fn strangers(&self) -> u64 {
        self.strangers.load(Ordering::Relaxed)
    }

    /// `v` of the next `rows` rows of a site; at a routed expert's sites of the rows of `routed`.
    ///
    /// # Errors
    ///
    /// [`Error::TokenWeights`] where the weights are not of these samples.
    pub fn take(&self, site: Site, rows: usize, routed: Option<&Routed>) -> Result<Vec<f32>> {
        let weights = self.layer.sites.get(&site);
        let short = |asked| Error::TokenWeights { site, found: weights.map_or(0, |w| w.v.len()), asked };
        match (weights, routed) {
            (Some(SiteWeights { v, tokens: Some(tokens), .. }), Some(routed)) => self.routed(site, (tokens, v), routed),
            (Some(SiteWeights { v, tokens: None, .. }), None) => {
                let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
                let first = next.entry(site).or_default();
                let taken = v.get(*first..*first + rows).ok_or_else(|| short(*first + rows))?.to_vec();
                *first += rows;
                Ok(taken)
            }
            _ => Err(short(rows)),
        }
    }

    fn routed(&self, site: Site, (tokens, v): (&[u32], &[f32]), routed: &Routed) -> Result<Vec<f32>> {
        let known: Vec<Option<f32>> = routed.tokens.iter().map(|token| tokens.binary_search(token).ok().map(|at| v[at])).collect();
        let strangers = known.iter().filter(|v| v.is_none()).count();
        if strangers == 0 {
            return Ok(known.into_iter().flatten().collect());
        }
        self.strangers.fetch_add(strangers as u64, Ordering::Relaxed);
        let ratio = self.ratio(site);
        let estimated = |(known, (&token, &c)): (Option<f32>, (&u32, &f32))| match known {
            Some(v) => Ok(v),
            None => {
                let found = self.layer.gradient.len();
                let gradient = self.layer.gradient.get(token as usize);
                let gradient = gradient.ok_or(Error::TokenWeights { site, found, asked: token as usize + 1 })?;
                Ok((ratio * f64::from(c) * f64::from(c) * f64::from(*gradient)) as f32)
            }
        };
        known.into_iter().zip(routed.tokens.iter().zip(&routed.weights)).map(estimated).collect()
    }

    /// By how much the weights of a site are larger than those of the same expert's down projection.
    fn ratio(&self, site: Site) -> f64 {
        let Site::ExpertIn(expert) = site else { return 1.0 };
        let sum = |site: &Site| self.layer.sites.get(site).map_or(0.0, |w| w.v.iter().map(|&v| f64::from(v)).sum::<f64>());
        let own = sum(&site) / sum(&Site::ExpertDown(expert));
        if own.is_finite() {
            return own;
        }
        let all = |wanted: fn(&Site) -> bool| self.layer.sites.keys().filter(|site| wanted(site)).map(sum).sum::<f64>();
        let all = all(|site| matches!(site, Site::ExpertIn(_))) / all(|site| matches!(site, Site::ExpertDown(_)));
        if all.is_finite() { all } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn a_cost_by_hand() {
        // ΔW = (1, 2; 0, −1), H = (2, 1; 1, 3): row 0: 2 + 2·1·2 + 4·3 = 18, row 1: 3. With r = (½, 1½) over 3 tokens:
        // ½ (9 + 4½) / 3 = 2¼.
        let outputs = vec![(Part::Output, array![0.5, 1.5])];
        let (moment, first) = (array![[2.0, 1.0], [1.0, 3.0]], First::default());
        let site = SiteLoss { site: Site::AttentionOut, moment, first, rows: 9, outputs, tokens: 3 };
        let delta = array![[1.0, 2.0], [0.0, -1.0]];
        assert_eq!(site.cost(Part::Output, delta.view()), Some(2.25));
        assert_eq!(site.cost(Part::Query, delta.view()), None);
    }

    fn layer() -> LayerWeights {
        let gate = Part::Expert(1, Projection::Gate);
        let up = Part::Expert(1, Projection::Up);
        let site = |v: &[f32], tokens: Option<&[u32]>, outputs| SiteWeights { v: v.to_vec(), tokens: tokens.map(<[u32]>::to_vec), outputs };
        let sites = [
            (Site::AttentionIn, site(&[1.0, 2.0, 3.0], None, vec![(Part::Query, array![0.5]), (Part::Value, array![1.5])])),
            (Site::ExpertIn(1), site(&[6.0, 2.0], Some(&[0, 2]), vec![(gate, array![0.25, 1.0]), (up, array![1.5, 1.25])])),
            (Site::ExpertDown(1), site(&[1.0, 1.0], Some(&[0, 2]), vec![(Part::Expert(1, Projection::Down), array![1.0])])),
            (Site::ExpertIn(3), site(&[], Some(&[]), vec![])),
        ];
        LayerWeights { gradient: vec![0.5, 8.0, 0.25], sites: sites.into() }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        layer().write(&path).unwrap();
        assert_eq!(LayerWeights::read(&path).unwrap(), layer());
        fs_err::write(&path, b"junk").unwrap();
        assert!(LayerWeights::read(&path).unwrap_err().to_string().contains("w.safetensors"));
    }

    #[test]
    fn rows_get_their_own_weights_and_strangers_an_estimate() {
        let weights = RowWeights::new(layer());
        assert_eq!(weights.take(Site::AttentionIn, 2, None).unwrap(), [1.0, 2.0]);
        assert_eq!(weights.take(Site::AttentionIn, 1, None).unwrap(), [3.0]);
        let error = weights.take(Site::AttentionIn, 1, None).unwrap_err().to_string();
        assert!(error.contains("attention.in") && error.contains('4') && error.contains('3'), "{error}");
        let routed = Routed { tokens: vec![0, 1, 2], weights: vec![0.3, 0.5, 0.7] };
        // Token 1 is new: c² · gradient = ¼ · 8 = 2 for down; gate and up have (6 + 2) / (1 + 1) = 4 times that.
        assert_eq!(weights.take(Site::ExpertDown(1), 3, Some(&routed)).unwrap(), [1.0, 2.0, 1.0]);
        assert_eq!(weights.take(Site::ExpertIn(1), 3, Some(&routed)).unwrap(), [6.0, 8.0, 2.0]);
        assert_eq!(weights.strangers(), 2);
        // Expert 3 had no token, so it takes the ratio of all.
        let one = Routed { tokens: vec![1], weights: vec![1.0] };
        assert_eq!(weights.take(Site::ExpertIn(3), 1, Some(&one)).unwrap(), [32.0]);
        assert!(weights.take(Site::DenseIn, 1, None).is_err());
    }
}

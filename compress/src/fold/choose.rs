//! The scales of one layer.

use std::collections::BTreeMap;

use calib::Weights;
use calib::arch::{Attention, Mlp, Part, Projection, Role, Site};
use calib::stats::LayerStats;
use calib::tensor;
use kernels::ScaleType;
use rayon::prelude::*;

use super::write::{Factors, stored};
use super::{Account, Folded, Request, objection, width_of};
use crate::quantize::Quantizer;
use crate::repair::awq::{Fold, TokenWeight, error, least, scales};
use crate::{Error, Result};

use Projection::{Down, Gate, Up};

/// One layer, and what is known of it.
pub(super) struct Layer<'a> {
    pub request: &'a Request<'a>,
    pub layer: usize,
    pub stats: &'a LayerStats,
    /// Matrices that are quantized, and the type of their scales.
    pub quantized: &'a BTreeMap<String, ScaleType>,
}

/// Inputs that share a vector of scales.
struct Candidate {
    fold: Fold,
    /// What stands for it in the account.
    named: Part,
    /// Quantizable matrices whose columns are multiplied.
    matrices: Vec<Part>,
    /// Others whose columns are multiplied with them, where the layer has them.
    others: Vec<Part>,
    /// What is divided in return, by row, where the layer has it.
    divided: Vec<Part>,
    /// The channel of each column; `None` where it is the column itself.
    channels: Option<Vec<usize>>,
}

impl Candidate {
    /// Values of channels as values of columns.
    fn columns(&self, values: &[f32]) -> Vec<f32> {
        self.channels.as_ref().map_or_else(|| values.to_vec(), |channels| channels.iter().map(|&c| values[c]).collect())
    }
}

impl Layer<'_> {
    /// Chooses the scales of these folds and notes what came of each.
    pub fn choose(&self, folds: &[Fold], account: &mut Account) -> Result<Factors> {
        let mut factors = Factors::default();
        for candidate in self.candidates().iter().filter(|candidate| folds.contains(&candidate.fold)) {
            let name = self.name(candidate.named).to_owned();
            match self.scale(candidate)? {
                Ok((folded, scales)) => {
                    account.folds.insert(name, folded);
                    if folded.alpha > 0.0 {
                        self.put(candidate, scales, &mut factors)?;
                    }
                }
                Err(why) => _ = account.left_out.insert(name, why.to_owned()),
            }
        }
        Ok(factors)
    }

    fn name(&self, part: Part) -> &str {
        self.request.model.layout().name(Role::Layer(self.layer, part)).unwrap_or_default()
    }

    fn has(&self, part: Part) -> bool {
        self.request.model.layout().name(Role::Layer(self.layer, part)).is_some()
    }

    /// Every vector of scales that the layer could have.
    fn candidates(&self) -> Vec<Candidate> {
        let spec = self.request.model.spec();
        let mut found = vec![Candidate {
            fold: Fold::AttentionIn,
            named: Part::InputNorm,
            matrices: [Part::Query, Part::Key, Part::Value, Part::QueryA, Part::KvA].into_iter().filter(|&p| self.has(p)).collect(),
            others: Vec::new(),
            divided: vec![Part::InputNorm, Part::InputNormBias],
            channels: None,
        }];
        let channels = match &spec.attention {
            // Query heads in a row read one value head.
            Attention::Grouped(a) => {
                let of = |column: usize| column / a.head_dim / (a.heads / a.kv_heads).max(1) * a.head_dim + column % a.head_dim;
                Some((0..a.heads * a.head_dim).map(of).collect())
            }
            Attention::Latent(_) => None,
        };
        found.push(Candidate {
            fold: Fold::AttentionOut,
            named: Part::Output,
            matrices: vec![Part::Output],
            others: Vec::new(),
            divided: vec![Part::Value, Part::ValueBias],
            channels,
        });
        let mlps: Vec<[Part; 3]> = match &spec.layers[self.layer].mlp {
            Mlp::Dense { .. } => vec![[Gate, Up, Down].map(Part::Dense)],
            Mlp::Moe(moe) => {
                let shared = moe.shared.iter().map(|_| [Gate, Up, Down].map(Part::Shared));
                shared.chain((0..moe.experts).map(|e| [Gate, Up, Down].map(|p| Part::Expert(e, p)))).collect()
            }
        };
        found.push(Candidate {
            fold: Fold::MlpIn,
            named: Part::PostNorm,
            matrices: mlps.iter().flat_map(|[gate, up, _]| [*gate, *up]).collect(),
            others: vec![Part::Router, Part::SharedGate],
            divided: vec![Part::PostNorm, Part::PostNormBias],
            channels: None,
        });
        found.extend(mlps.into_iter().map(|[_, up, down]| Candidate {
            fold: Fold::Down,
            named: down,
            matrices: vec![down],
            others: Vec::new(),
            divided: vec![up],
            channels: None,
        }));
        found
    }

    /// The best scales, `[channels]`, or why there are none.
    fn scale(&self, candidate: &Candidate) -> Result<std::result::Result<(Folded, Vec<f32>), &'static str>> {
        let Request { model, allocate, quantizer, params, .. } = *self.request;
        if let Some(why) = objection(model.spec(), candidate.fold) {
            return Ok(Err(why));
        }
        let targets: Vec<(Part, ScaleType)> =
            candidate.matrices.iter().filter_map(|&part| Some((part, *self.quantized.get(self.name(part))?))).collect();
        if targets.is_empty() {
            return Ok(Err("none of its matrices is quantized"));
        }
        let squares = self.squares(candidate);
        if !squares.iter().any(|&square| square > 0.0) {
            return Ok(Err("no calibration token reached it"));
        }
        let alphas: Vec<f64> = (0..params.exponents).map(|i| i as f64 / params.exponents as f64).collect();
        let tried: Vec<Vec<f32>> = alphas.iter().map(|&alpha| candidate.columns(&scales(&squares, alpha))).collect();
        let clips = match quantizer {
            Quantizer::Rtn(params) => params.clips,
            Quantizer::Gptq(params) => params.clips,
            Quantizer::Hqq(_) | Quantizer::Pmq(_) => 1,
        };
        let mut errors = vec![0.0; alphas.len()];
        for (part, scale_type) in targets {
            let Some(d) = part.site().and_then(|site| self.diagonal(site)) else { continue };
            let width = width_of(allocate, params, scale_type).ok_or(Error::Config)?;
            let w = model.matrix(Role::Layer(self.layer, part))?;
            let named = |source| Error::InMatrix { name: self.name(part).to_owned(), source: Box::new(source) };
            let each = tried.par_iter().map(|s| error(w.view(), &d, s, &width, clips)).collect::<Result<Vec<f64>>>().map_err(named)?;
            errors.iter_mut().zip(each).for_each(|(sum, error)| *sum += error);
        }
        let best = least(&errors);
        Ok(Ok((Folded { alpha: alphas[best], before: errors[0], after: errors[best] }, scales(&squares, alphas[best]))))
    }

    /// `Σ_t v_t x_t²` at a site, `[in]`; `None` where no token came.
    fn diagonal(&self, site: Site) -> Option<Vec<f32>> {
        let sums = self.stats.channels.get(&site).filter(|sums| sums.tokens > 0)?;
        let of = match self.request.params.token_weight {
            TokenWeight::None => &sums.squares,
            TokenWeight::Affinity => &sums.weighted,
        };
        Some(of.iter().map(|&x| x as f32).collect())
    }

    /// `Σ_t x_t²` of each channel, over all sites that share it.
    fn squares(&self, candidate: &Candidate) -> Vec<f64> {
        let mut sites: Vec<Site> = candidate.matrices.iter().filter_map(|part| part.site()).collect();
        sites.sort_unstable();
        sites.dedup();
        let mut found: Vec<f64> = Vec::new();
        for sums in sites.iter().filter_map(|site| self.stats.channels.get(site)) {
            for (column, square) in sums.squares.iter().enumerate() {
                let channel = candidate.channels.as_ref().map_or(column, |channels| channels[column]);
                found.resize(found.len().max(channel + 1), 0.0);
                found[channel] += square;
            }
        }
        found
    }

    /// Notes which tensors change by these scales. A norm's gain is rounded to its type, and the scale is what that leaves.
    fn put(&self, candidate: &Candidate, mut scales: Vec<f32>, factors: &mut Factors) -> Result<()> {
        let model = self.request.model;
        if let Some(&norm @ (Part::InputNorm | Part::PostNorm)) = candidate.divided.first() {
            let gain = model.vector(Role::Layer(self.layer, norm))?;
            let divided: Vec<f32> = gain.iter().zip(&scales).map(|(gain, s)| gain / s).collect();
            let dtype = stored(model, self.name(norm))?;
            let kept = tensor::encode(dtype, &divided).and_then(|bytes| tensor::decode(dtype, &bytes)).unwrap_or(divided);
            for ((s, gain), kept) in scales.iter_mut().zip(&gain).zip(kept) {
                let exact = gain / kept;
                if exact.is_normal() {
                    *s = exact;
                }
            }
        }
        let columns = candidate.columns(&scales);
        for &part in candidate.matrices.iter().chain(&candidate.others).filter(|&&part| self.has(part)) {
            factors.columns.insert(part, columns.clone());
        }
        for &part in candidate.divided.iter().filter(|&&part| self.has(part)) {
            factors.rows.insert(part, scales.clone());
        }
        Ok(())
    }
}

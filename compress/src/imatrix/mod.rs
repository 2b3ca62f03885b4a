//! llama.cpp's importance matrices: both of its forms read into diagonal statistics, ours written in the newer one.
//!
//! An importance matrix holds, for every matrix that is quantized, the sum of squares of each input channel and the tokens that it is a
//! sum over; for a stack of experts one row an expert. llama-quantize weighs rounding errors by the means. In the GGUF form
//! ([`gguf`]) `NAME.in_sum2` is `[experts, inputs]` and `NAME.counts` `[experts, 1]`, both F32, row by row (llama.cpp writes the axes the
//! other way round); an expert without tokens has count 0. The legacy form ([`legacy`]) holds means times calls, without the
//! tokens of each expert.
//!
//! MLA's key-value expansion is left out: llama.cpp splits it into two matrices that other inputs enter.

pub mod gguf;
pub mod legacy;

use std::collections::BTreeMap;
use std::path::Path;

use calib::arch::Site;
use calib::stats::{ChannelSums, LayerStats, Manifest};
use ndarray::{Array1, Array2, Axis};

use crate::{Error, Result};

/// An importance matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By the name of llama.cpp's tensor, such as `blk.0.ffn_down_exps.weight`.
    pub entries: BTreeMap<String, Entry>,
    /// What it was measured on.
    pub datasets: Vec<String>,
    /// Samples; 0 where the file does not say.
    pub chunks: u32,
    /// Tokens a sample; 0 where the file does not say.
    pub chunk_tokens: u32,
}

/// One matrix, or one stack of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Sums of squares of the input channels, `[experts, inputs]`; one row for a matrix that is no stack, and for every stack of a
    /// legacy file, whose row holds all experts one after the other.
    pub squares: Array2<f64>,
    /// Tokens that each row is a sum over, `[experts]`; calls in a legacy file.
    pub counts: Array1<f64>,
}

/// Reads either form.
///
/// # Errors
///
/// An IO error; [`Error::Imatrix`] where the file is neither.
pub fn read(path: &Path) -> Result<Imatrix> {
    let bytes = fs_err::read(path)?;
    let fail = |what: String| Error::Imatrix { path: path.to_owned(), what };
    if bytes.starts_with(gguf::MAGIC) { gguf::parse(&bytes).map_err(fail) } else { legacy::parse(&bytes).map_err(fail) }
}

impl Imatrix {
    /// From the statistics of a calibration; `layers` in order.
    pub fn of(manifest: &Manifest, layers: &[LayerStats]) -> Self {
        let mut entries = BTreeMap::new();
        for (layer, stats) in layers.iter().enumerate() {
            let latent = stats.channels.contains_key(&Site::KvB);
            let low_rank = stats.channels.contains_key(&Site::QueryB);
            let experts = |of: fn(usize) -> Site| -> Vec<&ChannelSums> { (0..).map_while(|e| stats.channels.get(&of(e))).collect() };
            for &site in stats.channels.keys() {
                let rows = match site {
                    Site::ExpertIn(0) => experts(Site::ExpertIn),
                    Site::ExpertDown(0) => experts(Site::ExpertDown),
                    Site::ExpertIn(_) | Site::ExpertDown(_) => continue,
                    _ => vec![&stats.channels[&site]],
                };
                for name in tensors(site, latent, low_rank) {
                    entries.insert(format!("blk.{layer}.{name}.weight"), Entry::of(&rows));
                }
            }
        }
        let tokens: usize = manifest.parts.iter().map(|part| part.tokens_run).sum();
        let chunk = manifest.parts.iter().map(|part| part.tokens).max().unwrap_or(0);
        let whole = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self { entries, datasets: manifest.domains.clone(), chunks: whole(tokens.div_ceil(chunk.max(1))), chunk_tokens: whole(chunk) }
    }

    /// The diagonal statistics by layer and site, as far as the names are those of decoder layers. Matrices that share an input agree,
    /// so the first stands for them; there is no routing weight in the file, so `weighted` is the same as `squares`.
    pub fn channels(&self) -> BTreeMap<(usize, Site), ChannelSums> {
        let mut found = BTreeMap::new();
        for (name, entry) in &self.entries {
            let Some((layer, place)) = place(name) else { continue };
            let stack = match place {
                Place::One(site) => {
                    found.entry((layer, site)).or_insert_with(|| entry.row(0));
                    continue;
                }
                Place::Stack(of) => of,
            };
            let entry = self.split(layer, entry);
            for expert in 0..entry.counts.len() {
                found.entry((layer, stack(expert))).or_insert_with(|| entry.row(expert));
            }
        }
        found
    }

    /// The same with every stack one row an expert.
    #[must_use]
    pub fn split_stacks(&self) -> Self {
        let split = |(name, entry): (&String, &Entry)| match place(name) {
            Some((layer, Place::Stack(_))) => (name.clone(), self.split(layer, entry)),
            _ => (name.clone(), entry.clone()),
        };
        Self { entries: self.entries.iter().map(split).collect(), ..self.clone() }
    }

    /// A stack whose experts stand one after the other in one row, cut apart: what enters gate and up has the width of what enters
    /// attention.
    fn split(&self, layer: usize, entry: &Entry) -> Entry {
        let width = |name: &str| self.entries.get(&format!("blk.{layer}.{name}.weight")).map(|entry| entry.squares.ncols());
        let hidden = ["attn_q", "attn_q_a", "attn_kv_a_mqa", "attn_qkv"].into_iter().find_map(width);
        let experts = hidden.zip(width("ffn_gate_exps").or(width("ffn_up_exps"))).map_or(1, |(hidden, stack)| stack / hidden.max(1));
        let (rows, columns) = entry.squares.dim();
        if rows > 1 || experts < 2 || columns % experts != 0 {
            return entry.clone();
        }
        let squares = entry.squares.to_shape((experts, columns / experts)).map_or_else(|_| entry.squares.clone(), |cut| cut.to_owned());
        Entry { counts: Array1::from_elem(squares.nrows(), entry.counts[0]), squares }
    }
}

impl Entry {
    fn of(rows: &[&ChannelSums]) -> Self {
        let inputs = rows.first().map_or(0, |sums| sums.squares.len());
        let squares = Array2::from_shape_fn((rows.len(), inputs), |(e, k)| rows[e].squares[k]);
        Self { squares, counts: rows.iter().map(|sums| sums.tokens as f64).collect() }
    }

    fn row(&self, expert: usize) -> ChannelSums {
        let squares = self.squares.index_axis(Axis(0), expert).to_owned();
        ChannelSums { tokens: self.counts[expert].round() as u64, weighted: squares.clone(), squares }
    }
}

/// What llama.cpp calls the matrices that a site's rows enter; of a stack of experts.
fn tensors(site: Site, latent: bool, low_rank: bool) -> &'static [&'static str] {
    match site {
        Site::AttentionIn if latent && low_rank => &["attn_q_a", "attn_kv_a_mqa"],
        Site::AttentionIn if latent => &["attn_q", "attn_kv_a_mqa"],
        Site::AttentionIn => &["attn_q", "attn_k", "attn_v"],
        Site::QueryB => &["attn_q_b"],
        Site::KvB => &[],
        Site::AttentionOut => &["attn_output"],
        Site::DenseIn => &["ffn_gate", "ffn_up"],
        Site::DenseDown => &["ffn_down"],
        Site::SharedIn => &["ffn_gate_shexp", "ffn_up_shexp"],
        Site::SharedDown => &["ffn_down_shexp"],
        Site::ExpertIn(_) => &["ffn_gate_exps", "ffn_up_exps"],
        Site::ExpertDown(_) => &["ffn_down_exps"],
    }
}

/// What a tensor's name says.
enum Place {
    One(Site),
    Stack(fn(usize) -> Site),
}

/// The layer and the site of `blk.3.ffn_up_exps.weight`; `None` for other names.
fn place(name: &str) -> Option<(usize, Place)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let place = match rest.strip_suffix(".weight")? {
        "attn_q" | "attn_k" | "attn_v" | "attn_q_a" | "attn_kv_a_mqa" => Place::One(Site::AttentionIn),
        "attn_q_b" => Place::One(Site::QueryB),
        "attn_output" => Place::One(Site::AttentionOut),
        "ffn_gate" | "ffn_up" => Place::One(Site::DenseIn),
        "ffn_down" => Place::One(Site::DenseDown),
        "ffn_gate_shexp" | "ffn_up_shexp" => Place::One(Site::SharedIn),
        "ffn_down_shexp" => Place::One(Site::SharedDown),
        "ffn_gate_exps" | "ffn_up_exps" => Place::Stack(Site::ExpertIn),
        "ffn_down_exps" => Place::Stack(Site::ExpertDown),
        _ => return None,
    };
    Some((layer.parse().ok()?, place))
}

#[cfg(test)]
pub(crate) mod tests {
    use calib::sample::{Drawn, Through};
    use calib::stats::Part;

    use super::*;

    fn sums(tokens: u64, squares: &[f64]) -> ChannelSums {
        ChannelSums { tokens, squares: squares.to_vec().into(), weighted: squares.to_vec().into() }
    }

    /// Two experts, of which the second saw no token.
    pub fn small() -> Imatrix {
        let channels = [
            (Site::AttentionIn, sums(10, &[4.0, 9.0])),
            (Site::AttentionOut, sums(10, &[1.0, 2.0, 3.0])),
            (Site::ExpertIn(0), sums(10, &[5.0, 6.0])),
            (Site::ExpertIn(1), sums(0, &[0.0, 0.0])),
            (Site::ExpertDown(0), sums(10, &[7.0])),
            (Site::ExpertDown(1), sums(0, &[0.0])),
        ];
        let part = Part {
            corpus: "c".into(),
            sampler: "random".into(),
            seed: 0,
            samples: 3,
            tokens: 4,
            tokens_run: 10,
            drawn: Drawn::default(),
            experts: Through::Routed,
            similarity_tokens: 0,
            traces: false,
        };
        let manifest = Manifest { schema: 1, model: "m".into(), layers: 1, domains: vec!["en".into(), "code".into()], parts: vec![part] };
        Imatrix::of(&manifest, &[LayerStats { channels: channels.into(), ..LayerStats::default() }])
    }

    #[test]
    fn statistics_have_llama_cpps_names_and_shapes() {
        let it = small();
        let named: Vec<_> = it.entries.iter().map(|(name, entry)| (name.as_str(), entry.squares.dim())).collect();
        let expected = [
            ("blk.0.attn_k.weight", (1, 2)),
            ("blk.0.attn_output.weight", (1, 3)),
            ("blk.0.attn_q.weight", (1, 2)),
            ("blk.0.attn_v.weight", (1, 2)),
            ("blk.0.ffn_down_exps.weight", (2, 1)),
            ("blk.0.ffn_gate_exps.weight", (2, 2)),
            ("blk.0.ffn_up_exps.weight", (2, 2)),
        ];
        assert_eq!(named, expected);
        assert_eq!(it.entries["blk.0.ffn_up_exps.weight"].counts.to_vec(), [10.0, 0.0]);
        assert_eq!((it.chunks, it.chunk_tokens), (3, 4));
    }

    #[test]
    fn channels_are_what_they_were() {
        let channels = small().channels();
        assert_eq!(channels[&(0, Site::AttentionIn)], sums(10, &[4.0, 9.0]));
        assert_eq!(channels[&(0, Site::ExpertIn(1))], sums(0, &[0.0, 0.0]));
        assert_eq!(channels[&(0, Site::ExpertDown(0))], sums(10, &[7.0]));
        assert_eq!(channels.len(), 6);
    }

    #[test]
    fn a_stack_in_one_row_is_cut_by_the_width_of_attention() {
        let entry = |squares: &[f64]| Entry {
            squares: Array2::from_shape_vec((1, squares.len()), squares.to_vec()).unwrap(),
            counts: [5.0].as_slice().to_vec().into(),
        };
        let entries =
            [("attn_q", entry(&[1.0, 2.0])), ("ffn_gate_exps", entry(&[1.0, 2.0, 3.0, 4.0])), ("ffn_down_exps", entry(&[8.0, 9.0]))];
        let entries = entries.into_iter().map(|(name, entry)| (format!("blk.7.{name}.weight"), entry)).collect();
        let whole = Imatrix { entries, ..Imatrix::default() };
        assert_eq!(whole.split_stacks().entries["blk.7.ffn_gate_exps.weight"].squares.dim(), (2, 2));
        let channels = whole.channels();
        assert_eq!(channels[&(7, Site::ExpertIn(1))], sums(5, &[3.0, 4.0]));
        assert_eq!(channels[&(7, Site::ExpertDown(1))], sums(5, &[9.0]));
    }

    #[test]
    fn names_of_nothing_known_have_no_place() {
        assert!(place("blk.x.attn_q.weight").is_none() && place("output.weight").is_none() && place("blk.0.ffn_gate_inp.weight").is_none());
    }
}

//! The plan: what becomes of every tensor. Above it everything decides, below it everything obeys.
//!
//! `plan.json` holds no time stamp and no absolute path, and its keys are sorted: the same inputs give the same bytes.

pub mod experts;
pub mod foreign;
mod shape;
mod summary;
mod sweep;
mod widths;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use calib::arch::{Part, Role};
use calib::backward;
use calib::sample::Through;
use calib::stats::Undercalibrated;
use kernels::{Group, ScaleType};
use serde::{Deserialize, Serialize};

use crate::allocate::{Account, Choice, Substitute};
use crate::export::Zero;
use crate::objective::Objective;
use crate::quantize::{self, Grid, Quantizer, Refine};
use crate::recipe::Recipe;
use crate::repair::Repair;
use crate::{Error, Result};

pub use experts::{Experts, Fate, Repaired};
pub use foreign::Tool;
pub use shape::{Measured, Seen, Shape, Tensor, finished};
pub use summary::{Substituted, Summary};
pub use sweep::{Point, Range, Sweep, sweep};
use widths::Widths;
pub use widths::matrices;

/// The version of [`Plan::schema`] that this program writes.
pub const SCHEMA: u32 = 1;

/// What becomes of one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this file's form.
    pub schema: u32,
    /// Fingerprint of the checkpoint that it was made for.
    pub model: String,
    /// Hash of the calibration samples, where a pass was needed.
    pub corpus: Option<String>,
    /// The solver of every tensor whose action says `Solver::Planned`.
    pub quantizer: Option<Quantizer>,
    /// What the error of a token counts, for a quantizer that solves against tokens.
    #[serde(default)]
    pub objective: Objective,
    /// The loss that token weights of `end_loss` are gradients of.
    #[serde(default, skip_serializing_if = "is_default_loss")]
    pub end_loss: backward::Params,
    /// What improves the quantizer's codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<Refine>,
    /// Which tokens the experts' second moments are over.
    #[serde(default, skip_serializing_if = "is_routed")]
    pub through: Through,
    /// Whether second moments stay on disk, so that another plan needs no forward pass.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_moments: bool,
    /// The order in which layers are solved, and what is mended.
    #[serde(default)]
    pub repair: Repair,
    /// How a program shared out the widths, where one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Account>,
    /// What becomes of the routed experts, where any go; `model` and `tensors` are then those of the reduced model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Experts>,
    /// One entry for every tensor of the checkpoint (FP8 companions folded away), by name.
    pub tensors: BTreeMap<String, Action>,
}

/// What becomes of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// Carried over bit for bit (FP8 is converted to bf16, because the output's config no longer says fp8).
    Keep,
    /// A router that is fitted to its inputs behind compressed layers; its type and its bytes stay.
    Refit,
    /// Left out of the output.
    Drop {
        /// Why.
        reason: String,
    },
    /// A matrix of a routed expert that is dropped: the expert keeps its router row and puts this out instead.
    Substitute(Substitute),
    /// Quantized.
    Quantize(Quantize),
}

/// How one matrix is quantized.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    /// Bits a code.
    pub bits: u8,
    /// Inputs that share a scale.
    pub group: Group,
    /// Where zero lies.
    pub grid: Grid,
    /// Stored type of the scales.
    pub scale: ScaleType,
    /// Who chooses the codes.
    pub solver: Solver,
    /// Input channels that no calibration token excited: their weights are rounded, not solved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dead_channels: usize,
}

impl Quantize {
    /// What a quantizer is asked for.
    pub fn width(&self) -> quantize::Width {
        quantize::Width { bits: self.bits, group: self.group, scale_type: self.scale, grid: self.grid }
    }
}

/// Who chooses the codes of one matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Solver {
    /// The plan's quantizer.
    Planned,
    /// The plan's quantizer, against the expert's second moment blended with the layer's, because too few tokens reached it.
    Blended {
        /// Tokens that did.
        tokens: u64,
        /// Tokens that the recipe's rule wants.
        wanted: u64,
    },
    /// Rounding to nearest instead, and why (an expert that too few tokens reached).
    Rounded {
        /// Why.
        reason: String,
    },
}

/// Decides what becomes of every tensor. Pure: the same inputs give the same plan.
///
/// With `measured`, the recipe's rule says what becomes of an expert that too few tokens reached, and dead channels are counted. Without it (a solver
/// that needs no calibration, or a checkpoint without data) every matrix goes to the solver.
///
/// # Errors
///
/// [`Error::Undecided`] where no choice of widths meets the budget and the rules; [`Error::Undercalibrated`] where the rule is to stop.
pub fn make(recipe: &Recipe, shape: &Shape, measured: Option<&Measured>) -> Result<Plan> {
    let quantizer = recipe.quantize.clone();
    let widths = match (&quantizer, &recipe.allocate) {
        (Some(_), Some(allocate)) => Some(Widths::decide(allocate, shape, measured)?),
        _ => None,
    };
    let rule = recipe.calibrate.as_ref().map_or_else(Undercalibrated::default, |calibrate| calibrate.undercalibrated);
    let solved = measured.filter(|_| quantizer.as_ref().is_some_and(Quantizer::needs_calibration)).map(|measured| (measured, rule));
    stop(solved, shape, widths.as_ref())?;
    let repair = recipe.repair.clone().unwrap_or_default();
    let chosen = |tensor: &Tensor| widths.as_ref().is_some_and(|w| w.chosen.contains_key(&tensor.name));
    let substitute = recipe.allocate.as_ref().and_then(|allocate| allocate.drop);
    let dropped = |tensor: &Tensor| substitute.filter(|_| widths.as_ref().is_some_and(|w| w.dropped.contains(&tensor.name)));
    let layer = |tensor: &Tensor| tensor.quantizable().map(|(layer, ..)| layer);
    let touched: BTreeSet<usize> = shape.tensors.iter().filter(|t| chosen(t)).filter_map(layer).collect();
    let ends = recipe.allocate.as_ref().map_or((None, None), |allocate| (allocate.embedding, allocate.head));
    let group = recipe.allocate.as_ref().map_or(Group::PerChannel, |allocate| allocate.group.0);
    let end = |tensor: &Tensor, bits: Option<u8>| bits.map_or(Action::Keep, |bits| Action::Quantize(rounded_end(bits, group, tensor)));
    let action = |tensor: &Tensor| match (tensor.role, widths.as_ref().and_then(|w| w.chosen.get(&tensor.name)), tensor.quantizable()) {
        (Role::Buffer, ..) => {
            Action::Drop { reason: "loaders make it themselves: a rotary buffer, or a copy of the tied embedding".into() }
        }
        (.., Some(_)) if dropped(tensor).is_some() => dropped(tensor).map_or(Action::Keep, Action::Substitute),
        (_, Some(choice), Some(place)) => Action::Quantize(quantize(choice, tensor, place, solved)),
        (Role::Embedding, ..) if ends.0.is_some() => end(tensor, ends.0),
        (Role::Head, ..) if ends.1.is_some() => end(tensor, ends.1),
        (Role::Layer(layer, Part::Router), ..) if repair.router_repair.is_some() && touched.contains(&layer) => Action::Refit,
        _ => Action::Keep,
    };
    Ok(Plan {
        schema: SCHEMA,
        model: shape.fingerprint.clone(),
        corpus: measured.map(|m| m.corpus.clone()),
        tensors: shape.tensors.iter().map(|tensor| (tensor.name.clone(), action(tensor))).collect(),
        objective: recipe.objective.clone().unwrap_or_default(),
        end_loss: recipe.calibrate.as_ref().and_then(|calibrate| calibrate.end_loss.clone()).unwrap_or_default(),
        refine: recipe.refine.clone(),
        through: recipe.calibrate.as_ref().map(|c| c.experts).unwrap_or_default(),
        keep_moments: recipe.calibrate.as_ref().is_some_and(|c| c.keep_moments),
        repair: repair.clone(),
        allocation: widths.and_then(|w| w.account),
        experts: None,
        quantizer,
    })
}

/// Reads a plan.
///
/// # Errors
///
/// An IO error; [`Error::Json`] if the file is not a plan.
pub fn read(path: &Path) -> Result<Plan> {
    serde_json::from_slice(&fs_err::read(path)?).map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// What calibration saw, and what becomes of experts that it saw too little of.
type Solved<'a> = (&'a Measured, Undercalibrated);

/// What calibration saw of a matrix's inputs.
fn seen(measured: &Measured, layer: usize, part: Part) -> Seen {
    part.site().and_then(|site| measured.sites.get(&(layer, site)).copied()).unwrap_or_default()
}

/// Stops, if that is the rule, where too few tokens reached an expert that is to be quantized.
fn stop(solved: Option<Solved<'_>>, shape: &Shape, widths: Option<&Widths>) -> Result<()> {
    let (Some((measured, rule @ Undercalibrated::Stop(_))), Some(widths)) = (solved, widths) else { return Ok(()) };
    let mut few: BTreeMap<(usize, usize), (u64, u64)> = BTreeMap::new();
    for tensor in shape.tensors.iter().filter(|tensor| widths.chosen.contains_key(&tensor.name)) {
        let Some((layer, part @ Part::Expert(expert, _), inputs)) = tensor.quantizable() else { continue };
        let (tokens, wanted) = (seen(measured, layer, part).rows, rule.wanted(inputs));
        if tokens < wanted {
            let (_, most) = few.entry((layer, expert)).or_insert((tokens, wanted));
            *most = wanted.max(*most);
        }
    }
    let line = |((layer, expert), (tokens, wanted))| format!("layer {layer}, expert {expert}: {tokens} of {wanted} tokens");
    let experts: Vec<String> = few.into_iter().map(line).collect();
    if experts.is_empty() { Ok(()) } else { Err(Error::Undercalibrated { experts }) }
}

/// What becomes of one matrix; `solved` is what calibration saw, where the quantizer solves against it.
fn quantize(choice: &Choice, tensor: &Tensor, (layer, part, inputs): (usize, Part, usize), solved: Option<Solved<'_>>) -> Quantize {
    let seen = solved.map(|(measured, rule)| (seen(measured, layer, part), rule));
    let solver = match (seen, part) {
        (Some((Seen { rows, .. }, rule)), Part::Expert(expert, _)) if rows < rule.wanted(inputs) => match rule {
            Undercalibrated::Rtn(_) if rows == 0 => {
                Solver::Rounded { reason: format!("no calibration token reached expert {expert} of layer {layer}") }
            }
            Undercalibrated::Rtn(_) => {
                let wanted = rule.wanted(inputs);
                Solver::Rounded { reason: format!("expert {expert} of layer {layer} saw {rows} tokens, and {wanted} are wanted") }
            }
            Undercalibrated::Blend(_) | Undercalibrated::Stop(_) => Solver::Blended { tokens: rows, wanted: rule.wanted(inputs) },
        },
        (Some((Seen { rows: 0, .. }, _)), _) => Solver::Rounded { reason: "no calibration token reached it".into() },
        _ => Solver::Planned,
    };
    // Where the layer's tokens stand in, they may excite a channel that the expert's own do not.
    let dead_channels = seen.filter(|_| solver == Solver::Planned).map_or(0, |(seen, _)| seen.dead);
    let Choice { bits, group, grid } = *choice;
    Quantize { bits, group, grid, scale: tensor.scale, solver, dead_channels }
}

fn is_default_loss(params: &backward::Params) -> bool {
    *params == backward::Params::default()
}

fn is_routed(experts: &Through) -> bool {
    *experts == Through::Routed
}

/// The embedding or the head, rounded because the recipe says so.
fn rounded_end(bits: u8, group: Group, tensor: &Tensor) -> Quantize {
    let reason = "the recipe asks for it; nothing is solved outside the decoder layers".to_owned();
    Quantize { bits, group, grid: Grid::Sym, scale: tensor.scale, solver: Solver::Rounded { reason }, dead_channels: 0 }
}

/// A grid in the words of formats.
pub fn zero_of(grid: Grid) -> Zero {
    match grid {
        Grid::Sym => Zero::Symmetric,
        Grid::Half => Zero::Half,
        Grid::Asym => Zero::Integer,
        Grid::Offset => Zero::Real,
    }
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::sensitivity::Table;
    use calib::arch::{Projection, Site};

    fn recipe(quantizer: &str, exclude: &str) -> Recipe {
        let text = format!("schema = 1\n[quantize.{quantizer}]\n[allocate]\nbits = 4\ngroup = 32\nexclude = [{exclude}]\n");
        toml::from_str(&text).unwrap()
    }

    fn tensor(name: &str, role: Role, shape: &[usize]) -> Tensor {
        let bytes = 2 * shape.iter().product::<usize>() as u64;
        Tensor { name: name.into(), shape: shape.into(), role, scale: ScaleType::Bf16, bytes }
    }

    fn shape() -> Shape {
        let expert = |e, p| Role::Layer(0, Part::Expert(e, p));
        let tensors = vec![
            tensor("a.router.weight", Role::Layer(0, Part::Router), &[2, 64]),
            tensor("b.0.up.weight", expert(0, Projection::Up), &[32, 64]),
            tensor("b.0.gate.weight", expert(0, Projection::Gate), &[32, 64]),
            tensor("b.1.up.weight", expert(1, Projection::Up), &[32, 64]),
            tensor("c.inv_freq", Role::Buffer, &[8]),
            tensor("d.q.weight", Role::Layer(0, Part::Query), &[64, 64]),
        ];
        Shape { fingerprint: "f".into(), tensors }
    }

    fn measured() -> Measured {
        let sites = [
            ((0, Site::ExpertIn(0)), Seen { rows: 32, dead: 3 }),
            ((0, Site::ExpertIn(1)), Seen { rows: 0, dead: 64 }),
            ((0, Site::AttentionIn), Seen { rows: 20, dead: 0 }),
        ];
        Measured { corpus: "c".into(), sites: sites.into(), table: None }
    }

    #[test]
    fn every_tensor_has_an_action() {
        let plan = make(&recipe("gptq", "'d.*'"), &shape(), Some(&measured())).unwrap();
        let of = |name: &str| &plan.tensors[name];
        assert_eq!(plan.tensors.len(), 6);
        assert_eq!(*of("a.router.weight"), Action::Keep);
        assert_eq!(*of("d.q.weight"), Action::Keep);
        assert!(matches!(of("c.inv_freq"), Action::Drop { .. }));
        let Action::Quantize(q) = of("b.0.up.weight") else { panic!() };
        assert_eq!((q.bits, q.group, q.dead_channels, &q.solver), (4, Group::Size(32), 3, &Solver::Planned));
        let Action::Quantize(q) = of("b.1.up.weight") else { panic!() };
        assert_eq!((&q.solver, q.dead_channels), (&Solver::Blended { tokens: 0, wanted: 32 }, 0));
        assert_eq!((plan.model.as_str(), plan.corpus.as_deref()), ("f", Some("c")));
    }

    #[test]
    fn the_recipes_rule_says_what_becomes_of_an_expert_that_few_tokens_reached() {
        let ruled = |rule: &str| {
            let mut recipe = recipe("gptq", "");
            recipe.calibrate = Some(toml::from_str(&format!("corpus = []\n[undercalibrated.{rule}]\ntokens_per_input = 1")).unwrap());
            make(&recipe, &shape(), Some(&measured()))
        };
        // 64 inputs: expert 0 has 32 tokens, expert 1 none.
        let solver = |plan: &Plan, name: &str| match &plan.tensors[name] {
            Action::Quantize(q) => q.solver.clone(),
            _ => panic!("{name} is not quantized"),
        };
        let blended = ruled("blend").unwrap();
        assert_eq!(solver(&blended, "b.0.up.weight"), Solver::Blended { tokens: 32, wanted: 64 });
        let sum = blended.summary(&shape());
        assert_eq!((sum.blended_experts, sum.rounded_experts, sum.dead_channels), (2, 0, 0));
        let rounded = ruled("rtn").unwrap();
        let reason = "expert 0 of layer 0 saw 32 tokens, and 64 are wanted".to_owned();
        assert_eq!(solver(&rounded, "b.0.gate.weight"), Solver::Rounded { reason });
        let reason = "no calibration token reached expert 1 of layer 0".to_owned();
        assert_eq!(solver(&rounded, "b.1.up.weight"), Solver::Rounded { reason });
        assert_eq!(rounded.summary(&shape()).rounded_experts, 2);
        let said = ruled("stop").unwrap_err().to_string();
        assert!(said.contains("layer 0, expert 0: 32 of 64 tokens\n  layer 0, expert 1: 0 of 64 tokens"), "{said}");
        // Attention is no expert: 20 tokens have to do.
        assert_eq!(solver(&blended, "d.q.weight"), Solver::Planned);
    }

    #[test]
    fn rounding_to_nearest_needs_no_tokens() {
        let plan = make(&recipe("rtn", ""), &shape(), Some(&measured())).unwrap();
        let planned =
            plan.tensors.values().filter(|a| matches!(a, Action::Quantize(q) if q.solver == Solver::Planned && q.dead_channels == 0));
        assert_eq!(planned.count(), 4);
    }

    #[test]
    fn the_summary_counts_bytes_experts_and_channels_once() {
        let plan = make(&recipe("gptq", ""), &shape(), Some(&measured())).unwrap();
        let sum = plan.summary(&shape());
        // Rows of 64 codes of 4 bits are 8 words, and two scales of 2 bytes: 36 bytes; 32 + 32 + 32 + 64 rows.
        assert_eq!((sum.matrices, sum.bytes_after), (4, 36 * 160));
        assert_eq!(sum.bits_per_weight(), Some(4.5));
        // The router, 2 · 64 bf16.
        assert_eq!((sum.bytes_kept, sum.dropped, sum.excluded), (256, 1, 0));
        // Gate and up of expert 0 share their three dead inputs.
        assert_eq!((sum.blended_experts, sum.rounded_experts, sum.dead_channels), (1, 0, 3));
    }

    fn mixed(budget: &str) -> Recipe {
        let text = format!("schema = 1\n[quantize.gptq]\n[allocate]\n{budget}\ngroup = 32\nchoices = [2, 4, 8]\nexclude = ['d.*']\n");
        toml::from_str(&text).unwrap()
    }

    #[test]
    fn bytes_go_to_the_matrix_that_loses_most() {
        let table = Table {
            choices: mixed("bits_per_weight = 5").allocate.unwrap().options(),
            losses: [("b.0.up.weight", 9.0), ("b.0.gate.weight", 1.0), ("b.1.up.weight", 0.0)]
                .map(|(name, loss)| (name.to_owned(), vec![Some(loss), Some(loss / 16.0), Some(loss / 4096.0)]))
                .into(),
            ..Table::default()
        };
        let measured = Measured { table: Some(table), ..measured() };
        // 32 rows of 64: 640, 1152 and 2176 bytes at 2, 4 and 8 bits. 5 bits of 3 · 2048 weights are 3840 bytes.
        let plan = make(&mixed("bits_per_weight = 5"), &shape(), Some(&measured)).unwrap();
        let bits = |name: &str| match &plan.tensors[name] {
            Action::Quantize(q) => q.bits,
            _ => 16,
        };
        // 8, 2, 2 loses 9/4096 + 1; 4, 4, 2 loses 10/16 in 2944 bytes; 8, 4, 2 does not fit.
        assert_eq!([bits("b.0.up.weight"), bits("b.0.gate.weight"), bits("b.1.up.weight")], [4, 4, 2]);
        let account = plan.allocation.clone().unwrap();
        assert_eq!((account.budget, account.bytes, account.cost.as_str()), (3840, 2944, "end_loss"));
        assert_eq!(serde_json::from_str::<Plan>(&serde_json::to_string(&plan).unwrap()).unwrap(), plan);
        let dry = make(&mixed("bytes = \"2kB\""), &shape(), None).unwrap();
        assert_eq!((dry.allocation.as_ref().unwrap().cost.as_str(), dry.summary(&shape()).bytes_after), ("assumed", 1920));
        let said = make(&mixed("bytes = \"1kB\""), &shape(), None).unwrap_err().to_string();
        assert!(said.contains("1000 bytes") && said.contains("take 1920"), "{said}");
    }

    #[test]
    fn the_grid_of_least_loss_is_taken_and_its_bytes_are_counted() {
        let text = "schema = 1\n[quantize.gptq]\n[allocate]\nbits = 2\ngrid = \"best\"\ngroup = 32\nexclude = ['d.*']\n";
        let recipe: Recipe = toml::from_str(text).unwrap();
        // sym, half, asym, offset
        let losses = [("b.0.up.weight", [4.0, 3.0, 2.0, 2.5]), ("b.0.gate.weight", [4.0, 3.0, 5.0, 1.0]), ("b.1.up.weight", [0.0; 4])];
        let losses = losses.map(|(name, losses)| (name.to_owned(), losses.map(Some).to_vec())).into();
        let table = Table { choices: recipe.allocate.as_ref().unwrap().options(), losses, ..Table::default() };
        let plan = make(&recipe, &shape(), Some(&Measured { table: Some(table), ..measured() })).unwrap();
        let grid = |name: &str| match &plan.tensors[name] {
            Action::Quantize(q) => (q.bits, q.grid),
            _ => panic!("{name}"),
        };
        // Gate and up of an expert are free of one another where no runtime is named.
        assert_eq!(grid("b.0.up.weight"), (2, Grid::Asym));
        assert_eq!(grid("b.0.gate.weight"), (2, Grid::Offset));
        // 32 rows of 64: 16 bytes of codes and 4 of scales each; asym 2 groups · 2 words more, offset 4 bytes a row more.
        assert_eq!(plan.summary(&shape()).bytes_after, 3 * 640 + 16 + 128);
    }

    #[test]
    fn a_plan_reads_back_as_written() {
        let plan = make(&recipe("gptq", ""), &shape(), Some(&measured())).unwrap();
        let text = serde_json::to_string_pretty(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    }
}

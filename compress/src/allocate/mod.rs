//! Which width every matrix gets: sensitivity × choices → losses, a program over them, what a runtime can load.
//!
//! [`sensitivity`] says what a width is predicted to cost a matrix, [`constraints`] which matrices must share one and which widths there
//! are, [`program`] finds the widths with the least total loss within a number of bytes, and [`decide`](decide::decide) joins the three.

pub mod by_layer;
pub mod constraints;
pub mod decide;
pub mod drop;
mod glob;
pub mod hull;
mod knobs;
pub mod pmq;
pub mod program;
pub mod sensitivity;
pub mod several;
mod ways;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use constraints::{Constraints, GateUp, Matrix, Packed, Runtime};
pub use decide::{Account, Decision, Undecided};
pub use drop::Substitute;
pub use glob::Glob;
pub use knobs::{Choice, ChoiceKnob, Cost, DeviceBytes, Fill, GridKnob, GroupKnob, Kernel, Limits, Size, Speed};

use crate::quantize::Grid;

/// Widths: a budget, of which there is exactly one, and what is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Allocate {
    /// One width for every quantized matrix, bits a code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// Stored bits a quantized weight, scales and zeros counted, shared out over the matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// Bytes of what is quantized, such as "55GB", shared out over the matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Size>,
    /// Bytes of the weight files of the compressed-tensors export, such as "60GB".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<Size>,
    /// The widths that a budget may choose from: bits, or `{ bits = 2, group = 32, grid = "asym" }`.
    #[serde(default = "choices")]
    pub choices: Vec<ChoiceKnob>,
    /// Inputs that share a scale: a number that divides every quantized matrix's inputs, or "channel" for whole rows.
    #[serde(default)]
    pub group: GroupKnob,
    /// Where zero lies between the codes: compressed-tensors holds `sym` and `asym`, the dense export all; or `best`.
    #[serde(default)]
    pub grid: GridKnob,
    /// The grids that every asked-for format holds, which `best` chooses from; filled in when a recipe is read.
    #[serde(skip)]
    pub held: Held,
    /// What is to load the result, and so which matrices must share a width. Needed for a budget with an export of
    /// compressed-tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,
    /// Gate and up of an expert each get a width of their own where `native` would tie them.
    #[serde(default, skip_serializing_if = "is_false")]
    pub untied: bool,
    /// Lets the program drop routed experts too: each keeps its router row and puts out this constant instead. `[export.native]` holds
    /// both, `[export.dense]` zero alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop: Option<Substitute>,
    /// Fewest bits, by role; of the experts that stay.
    #[serde(default, skip_serializing_if = "Limits::is_empty")]
    pub min_bits: Limits,
    /// Most bits, by role.
    #[serde(default, skip_serializing_if = "Limits::is_empty")]
    pub max_bits: Limits,
    /// What a width is predicted to cost.
    #[serde(default)]
    pub cost: Cost,
    /// Knobs of the cost `pmq`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pmq: Option<pmq::Params>,
    /// How much of the table of costs is solved.
    #[serde(default)]
    pub fill: Fill,
    /// Bytes that each of several devices has for the quantized matrices of its layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceBytes>,
    /// Time that a token may take in the kernels of the quantized matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// Bits of the embedding (8, 6 or 4), rounded to nearest in symmetric groups; it keeps the source's dtype unless they are named.
    /// Where the head is tied to it, the head's too. The dense export alone holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<u8>,
    /// Bits of the head, in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<u8>,
    /// Matrices that keep the source's dtype: globs over module or tensor names (`*` any run of characters, `?` one).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

fn choices() -> Vec<ChoiceKnob> {
    [2, 3, 4, 5, 6, 8].map(ChoiceKnob::Bits).into()
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// Grids that every asked-for format holds: all of them until somebody says which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held(pub Vec<Grid>);

impl Default for Held {
    fn default() -> Self {
        Self(Grid::ALL.to_vec())
    }
}

/// The four budgets, of which a recipe names exactly one.
pub const BUDGETS: [&str; 4] = ["bits", "bits_per_weight", "bytes", "file"];

impl Allocate {
    /// The budgets that are set, by key.
    pub fn budgets(&self) -> Vec<&'static str> {
        let set = [self.bits.is_some(), self.bits_per_weight.is_some(), self.bytes.is_some(), self.file.is_some()];
        BUDGETS.into_iter().zip(set).filter_map(|(key, set)| set.then_some(key)).collect()
    }

    /// Whether matrices differ in width or grid, so that a program chooses.
    pub fn is_mixed(&self) -> bool {
        self.bits.is_none() || self.options().len() > 1
    }

    /// The widths that a matrix may get: that of `bits`, once a grid, or `choices`.
    pub fn options(&self) -> Vec<Choice> {
        let whole = |knob: &ChoiceKnob| knob.whole(self.group.0, self.grid, &self.held.0);
        match self.bits {
            Some(bits) => self.grid.grids(bits, &self.held.0).into_iter().map(|grid| Choice { bits, group: self.group.0, grid }).collect(),
            None => self.choices.iter().flat_map(whole).collect(),
        }
    }

    /// What limits the choices.
    pub fn constraints(&self) -> Constraints {
        let gate_up = if self.untied { GateUp::Untied } else { GateUp::Tied };
        Constraints { runtime: self.runtime, gate_up, least: self.min_bits, most: self.max_bits }
    }

    /// The patterns of `exclude`.
    pub fn globs(&self) -> Vec<Glob> {
        self.exclude.iter().map(|pattern| Glob::new(pattern)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::Group;

    fn read(text: &str) -> Result<Allocate, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn a_group_is_a_size_or_a_channel() {
        assert_eq!(read("bits = 4").unwrap().group.0, Group::Size(128));
        assert_eq!(read("bits = 4\ngroup = 32").unwrap().group.0, Group::Size(32));
        assert_eq!(read("bits = 4\ngroup = \"channel\"").unwrap().group.0, Group::PerChannel);
        for wrong in ["0", "-1", "\"row\"", "1.5"] {
            let said = read(&format!("bits = 4\ngroup = {wrong}")).unwrap_err().to_string();
            assert!(said.contains("a group size of at least 1, or \"channel\""), "{said}");
        }
    }

    #[test]
    fn budgets_are_named_by_key() {
        assert_eq!(read("bits = 4").unwrap().budgets(), ["bits"]);
        assert_eq!(read("bits_per_weight = 2.5\nfile = \"1GB\"").unwrap().budgets(), ["bits_per_weight", "file"]);
        assert!(read("").unwrap().budgets().is_empty());
    }
}

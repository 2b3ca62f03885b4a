//! The words of `[allocate]` beside its numbers: sizes, choices of a width, limits by role, costs.

use kernels::Group;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::borrow::Cow;
use std::fmt;

use calib::arch::Kind;

use crate::quantize::Grid;

/// Bytes as a recipe writes them: `"55GB"`, `"3.2 MiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// Units of a [`Size`], longest first where one ends another.
const UNITS: [(&str, f64); 9] = [
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("B", 1.0),
];

impl Size {
    /// Reads a number and a unit.
    pub fn parse(text: &str) -> Option<Self> {
        let (unit, factor) = UNITS.iter().find(|(unit, _)| text.ends_with(unit))?;
        let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        (number.is_finite() && number >= 0.0).then(|| Self((number * factor).round() as u64))
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}B", self.0))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom(format!("`{text}` is no size; write a number and a unit, such as \"55GB\"")))
    }
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[0-9.]+ ?([KMGT]iB|[kMGT]?B)$" })
    }
}

/// The group as a recipe writes it: `128` or `"channel"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupKnob(pub Group);

impl Default for GroupKnob {
    fn default() -> Self {
        Self(Group::Size(128))
    }
}

impl Serialize for GroupKnob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Group::Size(size) => serializer.serialize_u64(size as u64),
            Group::PerChannel => serializer.serialize_str("channel"),
        }
    }
}

impl<'de> Deserialize<'de> for GroupKnob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(GroupVisitor)
    }
}

struct GroupVisitor;

impl de::Visitor<'_> for GroupVisitor {
    type Value = GroupKnob;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a group size of at least 1, or \"channel\"")
    }

    fn visit_i64<E: de::Error>(self, size: i64) -> Result<GroupKnob, E> {
        match usize::try_from(size) {
            Ok(size) if size > 0 => Ok(GroupKnob(Group::Size(size))),
            _ => Err(E::invalid_value(de::Unexpected::Signed(size), &self)),
        }
    }

    fn visit_u64<E: de::Error>(self, size: u64) -> Result<GroupKnob, E> {
        self.visit_i64(i64::try_from(size).unwrap_or(i64::MAX))
    }

    fn visit_str<E: de::Error>(self, word: &str) -> Result<GroupKnob, E> {
        match word {
            "channel" => Ok(GroupKnob(Group::PerChannel)),
            _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
        }
    }
}

impl JsonSchema for GroupKnob {
    fn schema_name() -> Cow<'static, str> {
        "Group".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "oneOf": [{ "type": "integer", "minimum": 1 }, { "const": "channel" }] })
    }
}

/// The grid as a recipe writes it: one, or the best of those that the asked-for formats hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GridKnob {
    /// Symmetric, nothing stored; from 2 bits.
    #[default]
    Sym,
    /// Half-integer, nothing stored.
    Half,
    /// An integer zero a group; from 2 bits.
    Asym,
    /// A real zero a group; from 2 bits.
    Offset,
    /// Up to 3 bits each matrix gets the one of least loss out of those that every asked-for format holds, its bytes counted;
    /// from 4 bits on `sym`.
    Best,
}

impl GridKnob {
    /// Fewest bits that it can have.
    pub fn fewest_bits(self) -> u8 {
        if matches!(self, Self::Half | Self::Best) { 1 } else { 2 }
    }

    /// The grids that it stands for at a number of bits, of those in `held`.
    pub fn grids(self, bits: u8, held: &[Grid]) -> Vec<Grid> {
        match self {
            Self::Sym => vec![Grid::Sym],
            Self::Half => vec![Grid::Half],
            Self::Asym => vec![Grid::Asym],
            Self::Offset => vec![Grid::Offset],
            Self::Best if bits > 3 => vec![Grid::Sym],
            // One bit has one grid, whoever holds it.
            Self::Best if bits < 2 => vec![Grid::Half],
            Self::Best => held.to_vec(),
        }
    }
}

/// One width that a matrix may get: bits alone, or bits with a group or a grid of their own.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ChoiceKnob {
    /// Bits a code, with the group and the grid of all.
    Bits(u8),
    /// Bits a code with a group or a grid of their own.
    Own(OwnChoice),
}

/// Bits a code with a group or a grid of their own.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OwnChoice {
    /// Bits a code.
    pub bits: u8,
    /// Inputs that share a scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupKnob>,
    /// Where zero lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<GridKnob>,
}

impl ChoiceKnob {
    /// The whole choices, one a grid out of `held` that it stands for; one bit is the half-integer grid unless it says otherwise.
    pub fn whole(self, group: Group, grid: GridKnob, held: &[Grid]) -> Vec<Choice> {
        let own = match self {
            Self::Bits(bits) => OwnChoice { bits, group: None, grid: None },
            Self::Own(own) => own,
        };
        let common = if own.bits == 1 { GridKnob::Half } else { grid };
        let choice = |grid| Choice { bits: own.bits, group: own.group.map_or(group, |g| g.0), grid };
        own.grid.unwrap_or(common).grids(own.bits, held).into_iter().map(choice).collect()
    }
}

/// A width that a matrix may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Bits a code.
    pub bits: u8,
    /// Inputs that share a scale.
    pub group: Group,
    /// Where zero lies.
    pub grid: Grid,
}

impl Choice {
    /// The width of a matrix whose scales are stored in `scale_type`.
    pub fn width(&self, scale_type: kernels::ScaleType) -> crate::quantize::Width {
        crate::quantize::Width { bits: self.bits, group: self.group, scale_type, grid: self.grid }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grid = match self.grid {
            Grid::Sym => "sym",
            Grid::Half => "half",
            Grid::Asym => "asym",
            Grid::Offset => "offset",
        };
        match self.group {
            Group::Size(size) => write!(f, "{} bits {grid}, group {size}", self.bits),
            Group::PerChannel => write!(f, "{} bits {grid}, whole rows", self.bits),
        }
    }
}

/// Bits by role; a role that is not named has no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Attention matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<u8>,
    /// Routed experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<u8>,
    /// Shared experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<u8>,
    /// MLPs of layers without experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense: Option<u8>,
}

impl Limits {
    /// The limit of a kind of matrix.
    pub fn of(&self, kind: Kind) -> Option<u8> {
        match kind {
            Kind::Attention => self.attention,
            Kind::Expert => self.experts,
            Kind::Shared => self.shared,
            Kind::Dense => self.dense,
            _ => None,
        }
    }

    /// Whether no role has one.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Layers on one device, and the bytes that it has for their quantized matrices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeviceBytes {
    /// First and last decoder layer.
    pub layers: [usize; 2],
    /// Bytes, such as "24GB".
    pub bytes: Size,
}

/// What a token may take in the kernels of the quantized matrices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Speed {
    /// Seconds a token, at most; an expert's matrices count as often as calibration tokens reach it.
    #[schemars(range(min = 0.0))]
    pub seconds_per_token: f64,
    /// What each width takes, one entry a number of bits.
    pub kernels: Vec<Kernel>,
}

/// What a kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Bits a code.
    pub bits: u8,
    /// Nanoseconds for a million weights.
    #[schemars(range(min = 0.0))]
    pub nanoseconds_per_million: f64,
}

/// What a width is predicted to cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// Squared error of the MLPs' output over the calibration tokens, from second moments weighted with the squared routing
    /// weight. Has no unit for attention matrices.
    Hessian,
    /// The same error measured: what comes out of the MLP with the matrix quantized against what comes out without, over the
    /// calibration tokens, weighted with the squared routing weight.
    Output,
    /// MC-MoE's `φ^α · w^β · ε^γ` of an expert, one width for its three matrices.
    Pmq,
    /// QuantMoE-Bench's outlier score of a matrix, which says which come first; of experts alone.
    Outlier,
    /// QuantMoE-Bench's importance of a block, one minus the mean cosine of what enters it and what leaves it; of experts alone.
    BlockImportance,
    /// Nats of KL divergence at the end of the model, from a backward pass: one unit for every matrix.
    #[default]
    EndLoss,
}

impl Cost {
    /// Its name in a recipe.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hessian => "hessian",
            Self::Output => "output",
            Self::Pmq => "pmq",
            Self::Outlier => "outlier",
            Self::BlockImportance => "block_importance",
            Self::EndLoss => "end_loss",
        }
    }

    /// Whether it can tell what a width of this kind of matrix costs.
    pub fn covers(&self, kind: Kind) -> bool {
        match self {
            Self::Hessian | Self::Output => matches!(kind, Kind::Expert | Kind::Shared | Kind::Dense),
            Self::Pmq => kind == Kind::Expert,
            Self::Outlier | Self::BlockImportance => matches!(kind, Kind::Expert | Kind::Shared),
            Self::EndLoss => true,
        }
    }
}

/// How much of the table is solved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// Every matrix is solved at every width.
    #[default]
    Solve,
    /// Every matrix is rounded at every width, one expert in sixteen is solved as well, and the rest takes the ratio of the two.
    Estimate,
}

impl Fill {
    /// Whether nothing is estimated.
    pub fn is_solved(self) -> bool {
        self == Self::Solve
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_kinds_of_units() {
        for (text, bytes) in [("55GB", 55_000_000_000), ("1.5 MiB", 1_572_864), ("0B", 0), ("2kB", 2000), ("3 TiB", 3 << 40)] {
            assert_eq!(Size::parse(text), Some(Size(bytes)), "{text}");
        }
        for text in ["55", "GB", "-1GB", "1e400B", "5 gb", ""] {
            assert_eq!(Size::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_choice_takes_what_it_does_not_name_from_all() {
        #[derive(Deserialize)]
        struct Doc {
            choices: Vec<ChoiceKnob>,
        }
        let doc: Doc = toml::from_str("choices = [1, { bits = 2, group = 32 }, 3, { bits = 4, grid = \"offset\" }]").unwrap();
        let whole: Vec<Choice> = doc.choices.iter().flat_map(|c| c.whole(Group::Size(128), GridKnob::Asym, &[])).collect();
        let choice = |bits, group, grid| Choice { bits, group: Group::Size(group), grid };
        let expected = [choice(1, 128, Grid::Half), choice(2, 32, Grid::Asym), choice(3, 128, Grid::Asym), choice(4, 128, Grid::Offset)];
        assert_eq!(whole, expected);
        assert_eq!(whole[1].to_string(), "2 bits asym, group 32");
    }

    #[test]
    fn the_best_grid_is_one_of_those_that_are_held() {
        let held = [Grid::Sym, Grid::Asym];
        let grids = |bits| GridKnob::Best.grids(bits, &held);
        assert_eq!((grids(1), grids(2), grids(3), grids(4)), (vec![Grid::Half], held.to_vec(), held.to_vec(), vec![Grid::Sym]));
    }
}

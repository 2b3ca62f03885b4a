//! What a runtime can load: which matrices must share a width, and which widths it has.
//!
//! One row a runtime. A tie joins matrices into a class with one choice, summed bytes and summed loss, so the program stays the
//! same; what the ties cost against free widths is the granularity gap.
//!
//! Both generations of transformers are symmetric here: compressed-tensors 0.19 makes room for unpacked zero points when it prepares a
//! model for loading, so that 4.57.3 stops with a size mismatch and 5.17 computes something else without a word.

use std::collections::BTreeMap;

use calib::arch::{Kind, Part, Projection, Role};
use kernels::{Group, ScaleType, layout};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::knobs::{Choice, Limits};
use crate::quantize::Grid;

/// A matrix that gets a width.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// The tensor's name.
    pub name: String,
    /// Its decoder layer.
    pub layer: usize,
    /// What it is there.
    pub part: Part,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// The type that its scales are stored in.
    pub scale: ScaleType,
}

impl Matrix {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        Role::Layer(self.layer, self.part).kind()
    }

    /// Weights.
    pub fn weights(&self) -> u64 {
        self.shape.iter().map(|&side| side as u64).product()
    }

    /// Its bytes at a choice.
    pub fn bytes(&self, choice: &Choice) -> u64 {
        choice.width(self.scale).stored_bytes(self.shape[0], self.shape[1])
    }
}

/// What is to load the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    /// The kernels of this project: a width for each expert's gate with up, and for its down.
    Native,
    /// vLLM from 0.33 on: one width for all experts of a layer.
    Vllm,
    /// llama.cpp: one width for each projection's stack of a layer's experts.
    Gguf,
    /// MLX: as llama.cpp.
    Mlx,
    /// transformers up to 4.57, where experts are modules: a symmetric width for every matrix.
    Transformers4,
    /// transformers from 5.0 on: one symmetric width for all experts of the model.
    Transformers5,
}

/// Which matrices of routed experts share a width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tie {
    Model,
    Layer,
    Stack,
    GateUp,
    Free,
}

/// What one runtime can load.
#[derive(Clone, Copy, Debug)]
struct Rules {
    runtime: Runtime,
    name: &'static str,
    experts: Tie,
    /// Shared experts and dense MLPs: gate with up.
    gate_up: bool,
    /// Query, key and value (MLA: query A with kv A) are one matrix there.
    fused_attention: bool,
    bits: &'static [u8],
    grids: &'static [Grid],
    /// Sizes of a group; empty: any.
    groups: &'static [usize],
    exporter: Exporter,
}

/// Which exporter writes what a runtime loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exporter {
    CompressedTensors,
    /// The layout of this project's own kernels.
    Native,
    /// None yet, and its types are not the ones that are allocated here.
    Missing,
}

const INTEGER: &[Grid] = &[Grid::Sym, Grid::Asym];
const ALL: &[Grid] = &[Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset];
const SYM: &[Grid] = &[Grid::Sym];
const FROM_2: &[u8] = &[2, 3, 4, 5, 6, 7, 8];

#[rustfmt::skip]
const TABLE: [Rules; 6] = [
    Rules { runtime: Runtime::Native, name: "native", experts: Tie::GateUp, gate_up: true, fused_attention: false, bits: &[1, 2, 3, 4, 5, 6, 8], grids: ALL, groups: &[32, 64, 128], exporter: Exporter::Native },
    Rules { runtime: Runtime::Vllm, name: "vllm", experts: Tie::Layer, gate_up: true, fused_attention: true, bits: &[2, 4, 8], grids: INTEGER, groups: &[32, 64, 128], exporter: Exporter::CompressedTensors },
    Rules { runtime: Runtime::Gguf, name: "gguf", experts: Tie::Stack, gate_up: false, fused_attention: false, bits: &[2, 3, 4, 5, 6, 8], grids: ALL, groups: &[], exporter: Exporter::Missing },
    Rules { runtime: Runtime::Mlx, name: "mlx", experts: Tie::Stack, gate_up: false, fused_attention: false, bits: &[2, 3, 4, 5, 6, 8], grids: ALL, groups: &[32, 64, 128], exporter: Exporter::Missing },
    Rules { runtime: Runtime::Transformers4, name: "transformers4", experts: Tie::Free, gate_up: false, fused_attention: false, bits: FROM_2, grids: SYM, groups: &[], exporter: Exporter::CompressedTensors },
    Rules { runtime: Runtime::Transformers5, name: "transformers5", experts: Tie::Model, gate_up: false, fused_attention: false, bits: FROM_2, grids: SYM, groups: &[], exporter: Exporter::CompressedTensors },
];

impl Runtime {
    /// All of them with what each ties, for a person who has to choose.
    pub const MENU: &'static str =
        "transformers4 (a width for every matrix), transformers5 (one for all experts), vllm (one for the experts of a layer)";

    fn rules(self) -> &'static Rules {
        TABLE.iter().find(|rules| rules.runtime == self).unwrap_or(&TABLE[0])
    }

    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        self.rules().name
    }

    /// Why a mixed plan for it cannot be written by these exports, if it cannot.
    pub fn refusal(self, packed: Packed) -> Option<String> {
        let name = self.name();
        let Packed { compressed_tensors, native } = packed;
        match self.rules().exporter {
            Exporter::CompressedTensors if native && !compressed_tensors => Some(format!(
                "runtime {name} does not load the native export; add [export.compressed_tensors], or say runtime = \"native\""
            )),
            Exporter::Native if compressed_tensors && !native => {
                Some(format!("runtime {name} does not load compressed-tensors; add [export.native], or name another runtime"))
            }
            Exporter::CompressedTensors | Exporter::Native => None,
            Exporter::Missing => {
                Some(format!("runtime {name} has no exporter yet, so nothing would load such a plan; choose {}", Self::MENU))
            }
        }
    }

    /// Why a choice is none for a matrix of this kind there, if it is none.
    fn objection(self, kind: Kind, choice: &Choice) -> Option<String> {
        let rules = self.rules();
        let group_fits = match choice.group {
            _ if rules.groups.is_empty() => true,
            Group::Size(size) => rules.groups.contains(&size),
            Group::PerChannel => self == Self::Native,
        };
        let ok = rules.bits.contains(&choice.bits) && rules.grids.contains(&choice.grid) && group_fits;
        (!ok).then(|| {
            format!("runtime {} does not load {choice} {}", rules.name, if kind == Kind::Expert { "for experts" } else { "" })
                .trim_end()
                .to_owned()
        })
    }
}

/// Which packed formats are among the exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// compressed-tensors.
    pub compressed_tensors: bool,
    /// The native layout.
    pub native: bool,
}

/// Whether gate and up must share a width where the runtime ties them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GateUp {
    /// They must.
    #[default]
    Tied,
    /// Each has its own.
    Untied,
}

/// What limits the choices of a matrix.
#[derive(Clone, Copy, Debug, Default)]
pub struct Constraints {
    /// What is to load the result; `None`: nothing but dense loaders, every matrix is free.
    pub runtime: Option<Runtime>,
    /// Whether `native` ties gate to up.
    pub gate_up: GateUp,
    /// Fewest bits.
    pub least: Limits,
    /// Most bits.
    pub most: Limits,
}

impl Constraints {
    /// Classes of matrices that share a width, `[classes]` of indices into `matrices`, in the order of their first member.
    pub fn classes(&self, matrices: &[Matrix]) -> Vec<Vec<usize>> {
        let mut found: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
        for (index, matrix) in matrices.iter().enumerate() {
            found.entry(self.key(index, matrix)).or_default().push(index);
        }
        let mut classes: Vec<Vec<usize>> = found.into_values().collect();
        classes.sort_unstable_by_key(|members| members[0]);
        classes
    }

    fn key(&self, index: usize, matrix: &Matrix) -> Key {
        use Projection::{Down, Gate, Up};
        let alone = Key::Alone(index);
        let Some(runtime) = self.runtime else { return alone };
        let rules = runtime.rules();
        let (layer, gate_up) = (matrix.layer, rules.gate_up && self.gate_up == GateUp::Tied);
        match (matrix.part, rules.experts) {
            (Part::Expert(..), Tie::Model) => Key::Model,
            (Part::Expert(..), Tie::Layer) => Key::Layer(layer),
            (Part::Expert(_, projection), Tie::Stack) => Key::Stack(layer, projection),
            (Part::Expert(expert, Gate | Up), Tie::GateUp) if gate_up => Key::Expert(layer, expert),
            (Part::Expert(..), _) => alone,
            (Part::Shared(Gate | Up), _) if gate_up => Key::Shared(layer),
            (Part::Dense(Gate | Up), _) if gate_up => Key::Dense(layer),
            (Part::Shared(Down) | Part::Dense(Down), _) => alone,
            (Part::Query | Part::Key | Part::Value, _) if rules.fused_attention => Key::Attention(layer),
            (Part::QueryA | Part::KvA, _) if rules.fused_attention => Key::Attention(layer),
            _ => alone,
        }
    }

    /// Bytes of a matrix as the runtime's exporter stores it: llama.cpp's type of so many bits for `gguf`, a share of its arena where
    /// `native` puts it into one, everything else as compressed-tensors does.
    pub fn bytes(&self, matrix: &Matrix, choice: &Choice) -> u64 {
        match self.runtime {
            Some(Runtime::Native) => self.arena_bytes(matrix, choice).unwrap_or_else(|| matrix.bytes(choice)),
            Some(Runtime::Gguf) => ggml_bytes(matrix, choice),
            _ => matrix.bytes(choice),
        }
    }

    /// Bytes of a matrix in an arena of the native layout ([`layout::stored_bytes`]); `None` where it lies in none: whatever is no routed
    /// expert and compressed-tensors holds.
    fn arena_bytes(&self, matrix: &Matrix, choice: &Choice) -> Option<u64> {
        let streams = INTEGER.contains(&choice.grid) && choice.bits >= 2;
        if matrix.kind() != Kind::Expert && streams {
            return None;
        }
        let grid = match choice.grid {
            Grid::Sym => layout::Grid::Sym,
            Grid::Half => layout::Grid::Half,
            Grid::Asym => layout::Grid::Asym,
            Grid::Offset => layout::Grid::Offset,
        };
        let form = layout::Form::new(choice.bits, choice.group, matrix.scale, grid).ok()?;
        let both = matches!(matrix.part, Part::Expert(_, Projection::Gate | Projection::Up)) && self.gate_up == GateUp::Tied;
        Some(if both { layout::stored_bytes(&form.gate_up(), matrix.shape) / 2 } else { layout::stored_bytes(&form, matrix.shape) })
    }

    /// Why a choice is none for a matrix, if it is none.
    pub fn objection(&self, matrix: &Matrix, choice: &Choice) -> Option<String> {
        if let Err(error) = choice.width(matrix.scale).group_len(matrix.shape[1]) {
            return Some(error.to_string());
        }
        let kind = matrix.kind();
        if let Some(least) = self.least.of(kind).filter(|least| choice.bits < *least) {
            return Some(format!("allocate.min_bits asks for at least {least}"));
        }
        if let Some(most) = self.most.of(kind).filter(|most| choice.bits > *most) {
            return Some(format!("allocate.max_bits allows at most {most}"));
        }
        self.runtime.and_then(|runtime| runtime.objection(kind, choice))
    }
}

/// Bytes of llama.cpp's type of so many bits: q2_K, q3_K, q4_K, q5_K, q6_K and q8_0 have blocks of 84, 110, 144, 176 and 210 bytes for 256
/// weights and of 34 for 32; other widths are counted by their bits, and the runtime has none of them.
fn ggml_bytes(matrix: &Matrix, choice: &Choice) -> u64 {
    let (block, bytes) = match choice.bits {
        2 => (256, 84),
        3 => (256, 110),
        4 => (256, 144),
        5 => (256, 176),
        6 => (256, 210),
        8 => (32, 34),
        bits => (8, u64::from(bits)),
    };
    matrix.shape[0] as u64 * (matrix.shape[1] as u64).div_ceil(block) * bytes
}

/// What the members of a class have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Model,
    Layer(usize),
    Stack(usize, Projection),
    Expert(usize, usize),
    Shared(usize),
    Dense(usize),
    Attention(usize),
    Alone(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers of two experts, a shared one, and query, key and output.
    fn matrices() -> Vec<Matrix> {
        let mut found = Vec::new();
        for layer in 0..2 {
            let mut add =
                |part| found.push(Matrix { name: format!("{layer}.{part:?}"), layer, part, shape: [64, 128], scale: ScaleType::Bf16 });
            [Part::Query, Part::Key, Part::Output].into_iter().for_each(&mut add);
            for projection in Projection::ALL {
                add(Part::Shared(projection));
                (0..2).for_each(|expert| add(Part::Expert(expert, projection)));
            }
        }
        found
    }

    fn sizes(runtime: Option<Runtime>, gate_up: GateUp) -> Vec<usize> {
        let rules = Constraints { runtime, gate_up, ..Constraints::default() };
        let mut sizes: Vec<usize> = rules.classes(&matrices()).iter().map(Vec::len).collect();
        sizes.sort_unstable();
        sizes
    }

    #[test]
    fn each_runtime_ties_what_it_must() {
        let tied = GateUp::Tied;
        assert_eq!(sizes(None, tied), [1; 24]);
        assert_eq!(sizes(Some(Runtime::Transformers4), tied), [1; 24]);
        // 12 expert matrices together; 6 of attention and 6 shared alone.
        assert_eq!(sizes(Some(Runtime::Transformers5), tied), [vec![1; 12], vec![12]].concat());
        // A layer: its experts (6), query with key, output, shared gate with up, shared down.
        assert_eq!(sizes(Some(Runtime::Vllm), tied), [vec![1; 4], vec![2; 4], vec![6; 2]].concat());
        // A layer: three stacks of 2, three of attention, three shared.
        assert_eq!(sizes(Some(Runtime::Gguf), tied), [vec![1; 12], vec![2; 6]].concat());
        // A layer: gate with up of 2 experts and the shared one; 3 downs, 3 of attention.
        assert_eq!(sizes(Some(Runtime::Native), tied), [vec![1; 12], vec![2; 6]].concat());
        assert_eq!(sizes(Some(Runtime::Native), GateUp::Untied), [1; 24]);
    }

    #[test]
    fn choices_that_a_runtime_or_a_limit_forbids_are_named() {
        let matrices = matrices();
        let expert = matrices.iter().find(|m| m.kind() == Kind::Expert).unwrap();
        let choice = |bits, grid| Choice { bits, group: Group::Size(128), grid };
        let rules = |runtime| Constraints { runtime, ..Constraints::default() };
        let said = rules(Some(Runtime::Vllm)).objection(expert, &choice(3, Grid::Sym)).unwrap();
        assert_eq!(said, "runtime vllm does not load 3 bits sym, group 128 for experts");
        assert!(rules(Some(Runtime::Transformers5)).objection(expert, &choice(3, Grid::Asym)).is_some());
        assert!(rules(Some(Runtime::Transformers4)).objection(expert, &choice(3, Grid::Asym)).is_some());
        assert_eq!(rules(Some(Runtime::Transformers5)).objection(&matrices[0], &choice(3, Grid::Sym)), None);
        assert_eq!(rules(None).objection(expert, &choice(1, Grid::Half)), None);
        let group = Choice { bits: 4, group: Group::Size(96), grid: Grid::Sym };
        assert!(rules(None).objection(expert, &group).unwrap().contains("do not divide 128 inputs"));
        let limited = Constraints { least: Limits { experts: Some(3), ..Limits::default() }, ..Constraints::default() };
        assert!(limited.objection(expert, &choice(2, Grid::Sym)).unwrap().contains("at least 3"));
        assert_eq!(limited.objection(&matrices[0], &choice(2, Grid::Sym)), None);
    }

    #[test]
    fn native_counts_tiles_and_its_table() {
        let rules = Constraints { runtime: Some(Runtime::Native), ..Constraints::default() };
        let choice = |bits, grid| Choice { bits, group: Group::Size(32), grid };
        let part = Part::Expert(0, Projection::Down);
        let matrix = Matrix { name: "m".into(), layer: 0, part, shape: [70, 130], scale: ScaleType::Bf16 };
        // 128 rows of 256 inputs at 3 bits, 8 groups: 12288 + 2048 of scales, 512 of zeros, 32 in the table.
        assert_eq!(rules.bytes(&matrix, &choice(3, Grid::Half)), 12288 + 2048 + 32);
        assert_eq!(rules.bytes(&matrix, &choice(3, Grid::Asym)), 12288 + 2048 + 512 + 32);
        // Offsets and their scales are f32.
        assert_eq!(rules.bytes(&matrix, &choice(8, Grid::Offset)), 32768 + 2 * 4096 + 32);
        // Gate and up of an expert share tiles and an entry: 2 · 96 rows of 256 inputs.
        let gate = Matrix { part: Part::Expert(0, Projection::Gate), ..matrix.clone() };
        assert_eq!(2 * rules.bytes(&gate, &choice(4, Grid::Sym)), 192 * 128 + 192 * 8 * 2 + 32);
        let shared = Matrix { part: Part::Shared(Projection::Down), shape: [64, 128], ..matrix };
        assert_eq!(rules.bytes(&shared, &choice(3, Grid::Asym)), shared.bytes(&choice(3, Grid::Asym)));
        assert_eq!(rules.bytes(&shared, &choice(3, Grid::Half)), 3072 + 512 + 32);
    }

    #[test]
    fn a_runtime_without_an_exporter_is_refused() {
        let [none, streams, arenas] =
            [(false, false), (true, false), (false, true)].map(|(compressed_tensors, native)| Packed { compressed_tensors, native });
        assert!(Runtime::Native.refusal(streams).unwrap().contains("add [export.native]"));
        assert!(Runtime::Native.refusal(none).is_none() && Runtime::Native.refusal(arenas).is_none());
        assert!(Runtime::Gguf.refusal(none).is_some() && Runtime::Mlx.refusal(none).is_some());
        assert!(
            Runtime::Vllm.refusal(streams).is_none() && Runtime::Vllm.refusal(arenas).unwrap().contains("does not load the native export")
        );
    }
}

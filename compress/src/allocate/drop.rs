//! Experts of no bits: a dropped expert keeps its router row, and puts out one constant instead of what it computes.
//!
//! No token goes to another expert for it, so what it costs does not depend on who else goes, and dropping is one more option beside the
//! widths. An expert's output is `F(x) = W_d h`; with the token weights `v` and the row weights `r` of the cost of `W_d`
//! ([`sensitivity`](super::sensitivity)), a constant `m` costs `Σ_i r_i Σ_t v_t (F(x_t)_i − m_i)²`. Of all constants the weighted mean
//! `m = Σ v F(x) / Σ v = W_d Σ v h / Σ v` costs least, whatever `r`:
//!
//! `Σ_i r_i ((W_d H W_dᵀ)_ii − (W_d Σ v h)_i² / Σ v)` with `H = Σ v h hᵀ`; zero costs the first term alone.
//!
//! With `v = c²` and `r = 1` that is `Σ c² ‖F(x) − mean F‖²`. A mean output in the place of an expert is also vLLM's "novice".

use std::collections::BTreeMap;

use calib::arch::{Part, Projection};
use calib::stats::First;
use ndarray::{Array1, Array2, ArrayView2};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::constraints::Matrix;
use super::sensitivity::row_errors;

/// What a dropped expert puts out, multiplied by its routing weight as its output was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Substitute {
    /// Its mean output over the calibration tokens that it saw, weighted as the cost weighs them; two bytes a hidden channel.
    Mean,
    /// Nothing; no bytes.
    Zero,
}

impl Substitute {
    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Zero => "zero",
        }
    }

    /// Bytes that it is stored in, for so many hidden channels: 16 bits each.
    pub fn bytes(self, hidden: usize) -> u64 {
        match self {
            Self::Mean => 2 * hidden as u64,
            Self::Zero => 0,
        }
    }
}

/// What dropping one expert is predicted to cost, in the unit of the other losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// When it puts out nothing.
    pub zero: f64,
    /// When it puts out its mean output; never more than `zero`.
    pub mean: f64,
}

impl Costs {
    /// From `down` `[hidden, inner]`, the second moment `h` `[inner, inner]` of its inputs and their `first` moment; `rows` is each
    /// output's weight, `[hidden]` (`None`: 1 each), and sums over tokens are multiplied by `unit`.
    pub fn of(down: ArrayView2<'_, f32>, h: &Array2<f32>, first: &First, rows: Option<&[f64]>, unit: f64) -> Self {
        let squares = row_errors(&down.to_owned(), h);
        let sums = through(down, &first.sums);
        let weight = if first.weight > 0.0 { first.weight } else { 1.0 };
        let row = |i: usize| rows.map_or(1.0, |rows| rows[i]);
        let zero: f64 = squares.iter().enumerate().map(|(i, square)| row(i) * square).sum();
        let mean = squares.iter().zip(&sums).enumerate().map(|(i, (square, sum))| row(i) * (square - sum * sum / weight).max(0.0));
        Self { zero: zero * unit, mean: mean.sum::<f64>() * unit }
    }

    /// The one of a substitute.
    pub fn with(&self, substitute: Substitute) -> f64 {
        match substitute {
            Substitute::Mean => self.mean,
            Substitute::Zero => self.zero,
        }
    }
}

/// The mean output of an expert with this down projection `[hidden, inner]`, whose inputs have this first moment; `[hidden]`.
pub fn mean_output(down: ArrayView2<'_, f32>, first: &First) -> Vec<f32> {
    through(down, &first.mean()).iter().map(|&x| x as f32).collect()
}

/// `W x` in f64.
fn through(w: ArrayView2<'_, f32>, x: &[f64]) -> Array1<f64> {
    w.rows().into_iter().map(|row| row.iter().zip(x).map(|(&w, &x)| f64::from(w) * x).sum()).collect()
}

/// An expert that a program may drop.
#[derive(Clone, Debug, PartialEq)]
pub struct Droppable {
    /// Its decoder layer.
    pub layer: usize,
    /// Its three matrices, as indices.
    pub members: Vec<usize>,
    /// Bytes of what it puts out instead.
    pub bytes: u64,
    /// What dropping it costs.
    pub loss: f64,
}

/// The experts that may be dropped, by layer and number: those whose three matrices are all given a width, but for the one of each layer
/// that would cost most. It stays, so that no layer loses all of them. `costs` is by the name of the down projection.
pub fn droppable(matrices: &[Matrix], costs: &BTreeMap<String, Costs>, substitute: Substitute) -> Vec<Droppable> {
    let mut experts: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
    for (index, matrix) in matrices.iter().enumerate() {
        if let Part::Expert(expert, _) = matrix.part {
            experts.entry((matrix.layer, expert)).or_default().push(index);
        }
    }
    let found = |((layer, _), members): ((usize, usize), Vec<usize>)| {
        let down = members.iter().find(|&&m| matches!(matrices[m].part, Part::Expert(_, Projection::Down)))?;
        let loss = costs.get(&matrices[*down].name)?.with(substitute);
        let bytes = substitute.bytes(matrices[*down].shape[0]);
        (members.len() == Projection::ALL.len()).then_some(Droppable { layer, members, bytes, loss })
    };
    let all: Vec<Droppable> = experts.into_iter().filter_map(found).collect();
    let mut dearest: BTreeMap<usize, usize> = BTreeMap::new();
    for (index, expert) in all.iter().enumerate() {
        let first = dearest.entry(expert.layer).or_insert(index);
        if all[*first].loss.total_cmp(&expert.loss).is_lt() {
            *first = index;
        }
    }
    let goes = |(index, expert): &(usize, Droppable)| dearest.get(&expert.layer) != Some(index);
    all.into_iter().enumerate().filter(goes).map(|(_, expert)| expert).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use calib::stats::Moment;
    use kernels::ScaleType;
    use ndarray::array;

    #[test]
    fn costs_by_hand() {
        // W_d = (1, 2; 0, −1), inputs (1, 0) with c² = 1 and (2, 1) with c² = 3: outputs (1, 0) and (4, −1).
        // Nothing: 1·1 + 3·(16 + 1) = 52. The mean is (1 + 12, −3) / 4 = (3.25, −0.75), which leaves
        // 1·(2.25² + 0.75²) + 3·(0.75² + 0.25²) = 5.625 + 1.875 = 7.5.
        let down = array![[1.0_f32, 2.0], [0.0, -1.0]];
        let mut inputs = Moment::new(2);
        inputs.add(array![[1.0_f32, 0.0], [2.0, 1.0]].view(), Some(&[1.0, 3.0]));
        let (first, h) = (inputs.first().clone(), inputs.into_matrix());
        assert_eq!(mean_output(down.view(), &first), [3.25, -0.75]);
        let costs = Costs::of(down.view(), &h, &first, None, 1.0);
        assert!((costs.zero - 52.0).abs() < 1e-5 && (costs.mean - 7.5).abs() < 1e-5, "{costs:?}");
        // Rows that count 2 and 0, half of it a token: nothing (1 + 48)·2/2, the mean (2.25² + 3·0.75²)·2/2 = 6.75.
        let costs = Costs::of(down.view(), &h, &first, Some(&[2.0, 0.0]), 0.5);
        assert!((costs.zero - 49.0).abs() < 1e-5 && (costs.mean - 6.75).abs() < 1e-5, "{costs:?}");
        assert_eq!((Substitute::Mean.bytes(2048), Substitute::Zero.bytes(2048)), (4096, 0));
    }

    #[test]
    fn an_expert_that_says_the_same_to_all_costs_nothing_as_its_mean() {
        let mut inputs = Moment::new(2);
        inputs.add(array![[0.3_f32, -0.7], [0.3, -0.7], [0.3, -0.7]].view(), Some(&[0.2, 0.9, 0.4]));
        let (first, h) = (inputs.first().clone(), inputs.into_matrix());
        let costs = Costs::of(array![[0.6_f32, 2.0], [1.5, -1.0]].view(), &h, &first, None, 1.0);
        assert!(costs.mean < 1e-6 * costs.zero, "{costs:?}");
        // Nothing seen costs nothing.
        let none = Costs::of(array![[1.0_f32]].view(), &Array2::zeros((1, 1)), Moment::new(1).first(), None, 1.0);
        assert_eq!(none, Costs { zero: 0.0, mean: 0.0 });
    }

    #[test]
    fn one_expert_of_a_layer_stays() {
        let matrix = |layer, expert, projection| Matrix {
            name: format!("{layer}.{expert}.{projection:?}"),
            layer,
            part: Part::Expert(expert, projection),
            shape: [8, 4],
            scale: ScaleType::Bf16,
        };
        let of = |layer, expert| Projection::ALL.map(|p| matrix(layer, expert, p));
        let mut matrices: Vec<Matrix> = [of(0, 0), of(0, 1), of(0, 2), of(1, 0), of(1, 1)].concat();
        // The gate of expert 1 of layer 1 is excluded.
        matrices.remove(12);
        let costs: BTreeMap<String, Costs> = [("0.0", 1.0), ("0.1", 9.0), ("0.2", 9.0), ("1.0", 2.0), ("1.1", 5.0)]
            .map(|(name, zero)| (format!("{name}.Down"), Costs { zero, mean: zero / 2.0 }))
            .into();
        let found = droppable(&matrices, &costs, Substitute::Mean);
        // Of two that cost the same the first stays; where only one could go, none does.
        let expected = [(0, vec![0, 1, 2], 0.5), (0, vec![6, 7, 8], 4.5)];
        let found: Vec<_> = found.into_iter().map(|d| (d.layer, d.members, d.loss)).collect();
        assert_eq!(found, expected);
        assert!(droppable(&matrices, &BTreeMap::new(), Substitute::Zero).is_empty());
    }
}

//! What a layer's tokens would make of an expert: the second moments that under-calibrated experts are blended with.
//!
//! For gate and up it is that of what enters the layer's experts. An expert's own inner channels mean nothing in another one, so for
//! down it is that of what this expert makes of the same rows. **Memory**: [`ROWS`] rows an input channel at most, spread evenly over
//! all tokens, in f32; their second moment; and for every expert in flight the three inner widths of those rows.

use calib::arch::{Part, Projection, Role, Site};
use calib::linalg::product;
use calib::stats::{GateSums, Moment};
use calib::{Model, Weights};
use ndarray::{Array2, Zip};

use crate::Result;

/// Rows an input channel that stand for all of a layer's tokens.
const ROWS: usize = 8;

/// Rows that stand for all of a layer's tokens, where its experts have `hidden` inputs and `inner` channels.
pub fn rows(hidden: usize, inner: usize) -> usize {
    ROWS * hidden.max(inner)
}

/// What enters a layer's experts.
pub struct LayerRows {
    rows: Array2<f32>,
    moment: Moment,
}

/// What an expert makes of them.
pub struct Inner {
    /// The second moment of what enters its down projection.
    pub moment: Moment,
    /// What its gate and up projections gave, every row of weight 1.
    pub gates: GateSums,
}

impl LayerRows {
    /// From the rows that enter a layer's experts, `[rows, hidden]`.
    pub fn new(rows: Array2<f32>) -> Self {
        let mut moment = Moment::new(rows.ncols());
        moment.add(rows.view(), None);
        Self { rows, moment }
    }

    /// What one expert makes of them.
    ///
    /// # Errors
    ///
    /// As reading its matrices.
    pub fn inner(&self, model: &Model, layer: usize, expert: usize) -> Result<Inner> {
        let through = |p| -> Result<Array2<f32>> {
            let w = model.matrix(Role::Layer(layer, Part::Expert(expert, p)))?;
            Ok(product(self.rows.view(), w.t()))
        };
        let (mut gate, up) = (through(Projection::Gate)?, through(Projection::Up)?);
        let mut gates = GateSums::new(gate.ncols());
        if let (Some(gate), Some(up)) = (gate.as_slice(), up.as_slice()) {
            gates = GateSums::of(gate, up, gates.gate.len(), None);
        }
        Zip::from(&mut gate).and(&up).for_each(|g, &u| *g = *g / (1.0 + (-*g).exp()) * u);
        let mut moment = Moment::new(gate.ncols());
        moment.add(gate.view(), None);
        Ok(Inner { moment, gates })
    }

    /// Blends what tokens reached the site of an expert with what the layer's would give there.
    ///
    /// # Errors
    ///
    /// As [`LayerRows::inner`].
    pub fn blend(&self, model: &Model, layer: usize, site: Site, own: &mut Moment) -> Result<()> {
        match site {
            Site::ExpertDown(expert) => own.blend(&self.inner(model, layer, expert)?.moment)?,
            _ => own.blend(&self.moment)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_without_tokens_stands_where_the_layers_tokens_would_put_it() {
        let model = crate::testing::fixture("qwen3_moe");
        let hidden = model.spec().hidden;
        let x = Array2::from_shape_fn((40, hidden), |(i, j)| ((i * 7 + j * 13) % 11) as f32 / 5.0 - 1.0);
        let layer = LayerRows::new(x.clone());
        let mut enter = Moment::new(hidden);
        layer.blend(&model, 0, Site::ExpertIn(3), &mut enter).unwrap();
        let expected = x.t().dot(&x) / 40.0;
        let enter = enter.into_matrix();
        assert!(enter.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4));
        // One row by hand: silu(g)·u.
        let of = |p| model.matrix(Role::Layer(0, Part::Expert(3, p))).unwrap().dot(&x.row(0));
        let (g, u) = (of(Projection::Gate), of(Projection::Up));
        let h: Vec<f32> = g.iter().zip(&u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        let one = LayerRows::new(x.slice(ndarray::s![..1, ..]).to_owned());
        let mut down = Moment::new(h.len());
        one.blend(&model, 0, Site::ExpertDown(3), &mut down).unwrap();
        let down = down.into_matrix();
        for ((i, j), value) in down.indexed_iter() {
            assert!((value - h[i] * h[j]).abs() < 1e-6, "{i} {j}: {value}");
        }
        let gates = one.inner(&model, 0, 3).unwrap().gates;
        assert!((gates.weight - 1.0).abs() < 1e-12 && gates.up[0] > 0.0);
    }
}

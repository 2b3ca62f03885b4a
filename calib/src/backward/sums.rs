//! What is made of the rows and gradients at each site: token weights, channel weights and the second moment.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Tensor, backend::Backend};
use ndarray::{Array1, ArrayView2};

use super::Receive;
use crate::arch::{Part, Projection, Site, Spec};
use crate::forward::{SiteRows, spread, values};
use crate::stats::end_loss::{LayerWeights, SiteLoss, SiteWeights};
use crate::stats::{Moment, sites};
use crate::{Error, Result};

/// Sees the rows that enter each site and the gradients at its outputs. One site is served in order, from one thread at a
/// time.
pub(super) trait Sink<B: Backend>: Sync {
    /// Further rows of a site; `tokens` are their numbers at a routed expert's.
    fn rows(&self, layer: usize, seen: SiteRows<B>, tokens: Option<&[u32]>) -> Result<()>;

    /// What enters a layer's experts, batch by batch, and how many rows each was given; before any expert's rows.
    fn entered(&self, _layer: usize, _x: &[Tensor<B, 2>], _loads: &[u64]) -> Result<()> {
        Ok(())
    }

    /// All rows of this site have been seen.
    fn done(&self, layer: usize, site: Site) -> Result<()>;
}

/// Adds up a layer's sites and hands each to the receiver when it is done.
pub(super) struct Sums<'a> {
    spec: &'a Spec,
    receiver: &'a dyn Receive,
    /// Tokens whose loss was summed.
    tokens: u64,
    /// Sites that are not done. A site is taken out while rows are added, so that sites do not wait for one another.
    open: Mutex<BTreeMap<Site, SiteSums>>,
    done: Mutex<BTreeMap<Site, SiteWeights>>,
}

/// Sums over the rows of one site.
struct SiteSums {
    moment: Option<Moment>,
    v: Vec<f32>,
    tokens: Option<Vec<u32>>,
    /// `Σ_t (∂ℓ/∂z_t,i)²` of each matrix.
    squares: Vec<(Part, Vec<f64>)>,
}

impl<'a> Sums<'a> {
    pub fn new(spec: &'a Spec, receiver: &'a dyn Receive, tokens: u64) -> Self {
        Self { spec, receiver, tokens, open: Mutex::default(), done: Mutex::default() }
    }

    /// The layer's token weights, with the gradient at its output.
    pub fn finish(&self, gradient: Vec<f32>) -> LayerWeights {
        LayerWeights { gradient, sites: std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner)) }
    }

    /// Takes what there is of a site, or begins it.
    fn take(&self, layer: usize, site: Site) -> SiteSums {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&site);
        open.unwrap_or_else(|| SiteSums::new(self.spec, layer, site, self.receiver.wants(layer, site)))
    }
}

impl<B: Backend> Sink<B> for Sums<'_> {
    fn rows(&self, layer: usize, seen: SiteRows<B>, tokens: Option<&[u32]>) -> Result<()> {
        let site = seen.site;
        let mut sums = self.take(layer, site);
        sums.add(seen, tokens)?;
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(site, sums);
        Ok(())
    }

    fn entered(&self, layer: usize, x: &[Tensor<B, 2>], loads: &[u64]) -> Result<()> {
        self.receiver.entered(layer, &|most| spread(x, most), loads)
    }

    fn done(&self, layer: usize, site: Site) -> Result<()> {
        let SiteSums { moment, v, tokens, squares } = self.take(layer, site);
        let outputs = normalized(squares);
        if let Some(moment) = moment {
            let (rows, first) = (moment.tokens(), moment.first().clone());
            let loss = SiteLoss { site, moment: moment.into_matrix(), first, rows, outputs: outputs.clone(), tokens: self.tokens };
            self.receiver.site(layer, loss)?;
        }
        self.done.lock().unwrap_or_else(PoisonError::into_inner).insert(site, SiteWeights { v, tokens, outputs });
        Ok(())
    }
}

impl SiteSums {
    fn new(spec: &Spec, layer: usize, site: Site, moment: bool) -> Self {
        let width = sites(spec, layer).into_iter().find(|(found, _)| *found == site).map_or(0, |(_, width)| width);
        let inner = spec.moe(layer).map_or(0, |moe| moe.inner);
        let zeros = |part, width| (part, vec![0.0; width]);
        // Only an expert can go without rows; of the others the first rows say how wide they are.
        let (tokens, squares) = match site {
            Site::ExpertIn(e) => (Some(Vec::new()), [Projection::Gate, Projection::Up].map(|p| zeros(Part::Expert(e, p), inner)).to_vec()),
            Site::ExpertDown(e) => (Some(Vec::new()), vec![zeros(Part::Expert(e, Projection::Down), spec.hidden)]),
            _ => (None, Vec::new()),
        };
        Self { moment: moment.then(|| Moment::new(width)), v: Vec::new(), tokens, squares }
    }

    fn add<B: Backend>(&mut self, seen: SiteRows<B>, tokens: Option<&[u32]>) -> Result<()> {
        let [rows, width] = seen.rows.dims();
        let channels: usize = seen.outputs.iter().map(|(_, dz)| dz.dims()[1]).sum();
        let mut v = vec![0.0; rows];
        for (part, dz) in seen.outputs {
            let width = dz.dims()[1];
            let squares = match self.squares.iter().position(|(found, _)| *found == part) {
                Some(at) => &mut self.squares[at].1,
                None => {
                    self.squares.push((part, vec![0.0; width]));
                    let last = self.squares.len() - 1;
                    &mut self.squares[last].1
                }
            };
            add_squares(&values(dz, "gradients")?, &mut v, squares);
        }
        let v: Vec<f32> = v.into_iter().map(|sum| (sum / channels as f64) as f32).collect();
        if let Some(moment) = &mut self.moment {
            let x = values(seen.rows, "activations")?;
            let x = ArrayView2::from_shape((rows, width), &x).map_err(|e| Error::Device { what: "activations", message: e.to_string() })?;
            moment.add(x, Some(&v));
        }
        self.v.extend(v);
        if let Some(all) = &mut self.tokens {
            all.extend(tokens.unwrap_or_default());
        }
        Ok(())
    }
}

/// Adds the squares of `[rows, channels]` to a sum a row and to one a channel.
fn add_squares(values: &[f32], rows: &mut [f64], channels: &mut [f64]) {
    for (row, sum) in values.chunks_exact(channels.len()).zip(rows) {
        for (&value, channel) in row.iter().zip(&mut *channels) {
            let square = f64::from(value) * f64::from(value);
            *channel += square;
            *sum += square;
        }
    }
}

/// Divides by the mean over all channels; all ones where no gradient came.
fn normalized(squares: Vec<(Part, Vec<f64>)>) -> Vec<(Part, Array1<f64>)> {
    let channels: usize = squares.iter().map(|(_, sums)| sums.len()).sum();
    let mean = squares.iter().flat_map(|(_, sums)| sums).sum::<f64>() / channels as f64;
    let divide = |sums: Vec<f64>| Array1::from(sums).mapv(|sum| if mean > 0.0 { sum / mean } else { 1.0 });
    squares.into_iter().map(|(part, sums)| (part, divide(sums))).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;
    use ndarray::{Array2, array};

    use super::*;
    use crate::device::Cpu;
    use crate::forward::testing::grouped_spec;

    /// Keeps what it is given.
    #[derive(Default)]
    struct Kept(Mutex<Vec<SiteLoss>>);

    impl Receive for Kept {
        fn site(&self, _layer: usize, loss: SiteLoss) -> Result<()> {
            self.0.lock().unwrap().push(loss);
            Ok(())
        }
        fn layer(&self, _layer: usize, _weights: LayerWeights) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn two_matrices_of_one_site_by_hand() {
        let mut spec = grouped_spec();
        spec.hidden = 2;
        let kept = Kept::default();
        let sums = Sums::new(&spec, &kept, 10);
        let tensor = |rows: [[f32; 2]; 2]| Tensor::<Cpu, 2>::from_data(rows, &Default::default());
        let key = Tensor::<Cpu, 2>::from_data([[2.0], [0.0]], &Default::default());
        let outputs = vec![(Part::Query, tensor([[1.0, -1.0], [3.0, 0.0]])), (Part::Key, key)];
        let seen = SiteRows { site: Site::AttentionIn, rows: tensor([[1.0, 2.0], [-1.0, 1.0]]), outputs };
        Sink::<Cpu>::rows(&sums, 0, seen, None).unwrap();
        Sink::<Cpu>::done(&sums, 0, Site::AttentionIn).unwrap();
        // v: (1 + 1 + 4) / 3 = 2 and 9 / 3 = 3. Channels: 10, 1 and 4, mean 5.
        // H = 2 · (1, 2)ᵀ(1, 2) + 3 · (−1, 1)ᵀ(−1, 1) = (5, 1; 1, 11).
        let loss = kept.0.lock().unwrap().pop().unwrap();
        assert_eq!(loss.outputs, [(Part::Query, array![2.0, 0.2]), (Part::Key, array![0.8])]);
        assert!((&loss.moment - &array![[5.0, 1.0], [1.0, 11.0]]).iter().all(|x| x.abs() < 1e-5), "{}", loss.moment);
        assert_eq!((loss.rows, loss.tokens), (2, 10));
        let weights = sums.finish(vec![0.5, 1.0]);
        assert_eq!(weights.sites[&Site::AttentionIn].v, [2.0, 3.0]);
        assert_eq!(weights.sites[&Site::AttentionIn].tokens, None);
    }

    #[test]
    fn an_expert_without_rows_costs_nothing() {
        let spec = grouped_spec();
        let kept = Kept::default();
        let sums = Sums::new(&spec, &kept, 10);
        Sink::<Cpu>::done(&sums, 0, Site::ExpertIn(4)).unwrap();
        let loss = kept.0.lock().unwrap().pop().unwrap();
        assert_eq!(loss.moment, Array2::<f32>::zeros((24, 24)));
        assert_eq!(loss.outputs[1], (Part::Expert(4, Projection::Up), Array1::ones(12)));
        assert_eq!(loss.cost(Part::Expert(4, Projection::Gate), Array2::ones((12, 24)).view()), Some(0.0));
        assert_eq!(sums.finish(vec![]).sites[&Site::ExpertIn(4)].tokens, Some(vec![]));
    }
}

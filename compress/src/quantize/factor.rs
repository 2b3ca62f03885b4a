//! What GPTQ needs of a second moment: the damped Cholesky factor of its inverse, and the order of the columns.
//!
//! One factor serves every matrix that has these inputs (gate and up) and every width.

use calib::linalg::{Upper, inverse_factor};
use kernels::Group;
use ndarray::{Array2, ArrayView2};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Width;
use super::columns::check_finite;
use super::gptq::Params;
use crate::{Error, Result};

/// The order in which columns are solved. They are stored in their own order whatever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// First to last.
    None,
    /// By falling diagonal of the second moment, with scales fixed beforehand on the original weights.
    Static,
    /// Groups by falling mean diagonal, the columns inside a group by falling diagonal: a group stays together, so its scales
    /// are chosen on the weights as they are when it is entered.
    #[default]
    Group,
}

/// A damped second moment, factorized.
#[derive(Clone, Debug)]
pub struct Factor {
    upper: Upper,
    order: Vec<usize>,
    kind: Order,
    /// Sizes of the groups that the order keeps together, falling.
    sizes: Vec<usize>,
    damping: f64,
    lambda: f64,
    dead: usize,
}

impl Factor {
    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.order.len()
    }

    /// `U` with `UᵀU = (H + λ)⁻¹`, rows and columns in the order of [`Factor::order`].
    pub fn upper(&self) -> &Upper {
        &self.upper
    }

    /// The columns in the order in which they are solved.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// How they were ordered.
    pub fn kind(&self) -> Order {
        self.kind
    }

    /// Damping that was needed, as a share of the mean diagonal of the inputs that are not dead.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// What was added to the diagonal.
    pub fn lambda(&self) -> f64 {
        self.lambda
    }

    /// Inputs that were zero for every token.
    pub fn dead_channels(&self) -> usize {
        self.dead
    }

    /// Whether the order keeps the groups of `width` together (`static` need not).
    ///
    /// # Errors
    ///
    /// [`Error::MomentSize`], [`Error::FactorGroups`], and what [`Width::group_len`] says.
    pub(super) fn group_len(&self, inputs: usize, width: &Width) -> Result<usize> {
        if self.inputs() != inputs {
            return Err(Error::MomentSize { moment: self.inputs(), inputs });
        }
        let group = width.group_len(inputs)?;
        let together = self.kind != Order::Group || group == inputs.max(1) || self.sizes.contains(&group);
        if together { Ok(group) } else { Err(Error::FactorGroups { group: width.group }) }
    }
}

/// Damps and factorizes `h = Σ x xᵀ`, `[in, in]`, symmetric.
///
/// `groups` are those of every width that the factor will serve. `λ = damping · mean diag`, over inputs that are not dead;
/// where that does not make it positive definite the damping grows tenfold (from 0 to 1e-4), up to 1.
///
/// # Errors
///
/// [`Error::MomentNotFinite`]; [`Error::NoTokens`] for a moment of zeros; [`Error::Damping`] when a damping of 1 is not enough;
/// [`Error::GroupsDiffer`] when no order keeps all groups together.
pub fn factorize(h: ArrayView2<'_, f32>, groups: &[Group], params: &Params) -> Result<Factor> {
    check_finite(h).map_err(|error| match error {
        Error::WeightNotFinite { value, row, column } => Error::MomentNotFinite { value, row, column },
        other => other,
    })?;
    let diagonal: Vec<f32> = h.diag().to_vec();
    let dead = diagonal.iter().filter(|&&d| d == 0.0).count();
    let alive = diagonal.len() - dead;
    if alive == 0 {
        return Err(Error::NoTokens);
    }
    let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / alive as f64;
    let sizes = sizes(groups, diagonal.len())?;
    let order = match params.order {
        Order::None => (0..diagonal.len()).collect(),
        Order::Static => sorted(&diagonal, 0, diagonal.len(), &[]),
        Order::Group => sorted(&diagonal, 0, diagonal.len(), &sizes),
    };
    let mut damping = params.damping;
    loop {
        let lambda = damping * mean;
        match inverse_factor(permuted(h, &order, lambda as f32)) {
            Ok(upper) => return Ok(Factor { upper, order, kind: params.order, sizes, damping, lambda, dead }),
            Err(source) if damping >= 1.0 => return Err(Error::Damping { damping, source }),
            Err(_) => damping = (10.0 * damping).clamp(1e-4, 1.0),
        }
    }
}

/// The sizes of groups that are smaller than a row, falling, each once.
fn sizes(groups: &[Group], inputs: usize) -> Result<Vec<usize>> {
    let mut sizes: Vec<usize> = groups.iter().map(|group| group.len(inputs)).filter(|&size| size < inputs && size > 0).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.dedup();
    match sizes.iter().zip(sizes.iter().skip(1)).find(|(large, small)| !large.is_multiple_of(**small)) {
        Some((&large, &small)) => Err(Error::GroupsDiffer { small, large }),
        None => Ok(sizes),
    }
}

/// Columns `start .. end`: runs of the largest size by falling mean diagonal, each ordered inside in the same way by the next.
fn sorted(diagonal: &[f32], start: usize, end: usize, sizes: &[usize]) -> Vec<usize> {
    let falling = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let (step, rest) = sizes.split_first().map_or((1, &[][..]), |(&step, rest)| (step, rest));
    let sum = |first: usize| diagonal[first..end.min(first + step)].iter().map(|&d| f64::from(d)).sum::<f64>();
    let mut runs: Vec<(f64, usize)> = (start..end).step_by(step).map(|first| (sum(first), first)).collect();
    runs.sort_by(falling);
    match sizes {
        [] => runs.into_iter().map(|(_, column)| column).collect(),
        _ => runs.into_iter().flat_map(|(_, first)| sorted(diagonal, first, end.min(first + step), rest)).collect(),
    }
}

/// `h` with rows and columns in this order and `lambda` on the diagonal.
fn permuted(h: ArrayView2<'_, f32>, order: &[usize], lambda: f32) -> Array2<f32> {
    let mut damped = Vec::with_capacity(order.len() * order.len());
    for (position, &row) in order.iter().enumerate() {
        let row = h.row(row);
        match row.as_slice() {
            Some(row) => damped.extend(order.iter().map(|&column| row[column])),
            None => damped.extend(order.iter().map(|&column| row[column])),
        }
        damped[position * order.len() + position] += lambda;
    }
    // The length is that of the shape by construction, so the other arm is never taken; it would be refused as singular.
    Array2::from_shape_vec((order.len(), order.len()), damped).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};

    use super::*;

    #[test]
    fn orders_by_hand() {
        let diagonal = [1.0, 2.0, 5.0, 3.0, 9.0, 0.0];
        assert_eq!(sorted(&diagonal, 0, 6, &[]), [4, 2, 3, 1, 0, 5]);
        // Pairs: sums 3, 8, 9.
        assert_eq!(sorted(&diagonal, 0, 6, &[2]), [4, 5, 2, 3, 1, 0]);
        // Threes, by sums 8 and 12, and runs of one inside.
        assert_eq!(sorted(&diagonal, 0, 6, &[3, 1]), [4, 3, 5, 2, 1, 0]);
        assert_eq!(sorted(&[1.0; 4], 0, 4, &[2]), [0, 1, 2, 3], "ties keep their order");
    }

    #[test]
    fn damping_grows_until_it_serves() {
        // Rank one: [2, 2]ᵀ[2, 2]: the mean diagonal is 4.
        let rank_one = || array![[4.0, 4.0], [4.0, 4.0]];
        let factor = factorize(rank_one().view(), &[], &Params { damping: 0.25, ..Params::default() }).unwrap();
        assert_eq!((factor.damping(), factor.lambda()), (0.25, 1.0));
        let factor = factorize(rank_one().view(), &[], &Params { damping: 0.0, ..Params::default() }).unwrap();
        assert_eq!(factor.damping(), 1e-4);
        // Eigenvalues 1 and −0.4 need more than 0.4 of the mean, 0.3.
        let wrong = array![[0.3_f32, 0.7], [0.7, 0.3]];
        assert!(matches!(factorize(wrong.view(), &[], &Params::default()), Err(Error::Damping { damping: 1.0, .. })));
    }

    #[test]
    fn dead_inputs_are_counted_and_left_out_of_the_mean() {
        let factor = factorize(array![[4.0, 0.0], [0.0, 0.0]].view(), &[], &Params { damping: 0.25, ..Params::default() }).unwrap();
        assert_eq!((factor.dead_channels(), factor.lambda()), (1, 1.0));
        assert!(matches!(factorize(Array2::zeros((3, 3)).view(), &[], &Params::default()), Err(Error::NoTokens)));
        let infinite = array![[1.0, f32::INFINITY], [f32::INFINITY, 1.0]];
        assert!(factorize(infinite.view(), &[], &Params::default()).unwrap_err().to_string().contains("inputs 0 and 1 is inf"));
    }

    #[test]
    fn group_sizes_that_cannot_share_an_order_are_named() {
        let eye = Array2::eye(12);
        let groups = [Group::Size(4), Group::PerChannel, Group::Size(2)];
        assert_eq!(factorize(eye.view(), &groups, &Params::default()).unwrap().sizes, [4, 2]);
        let error = factorize(eye.view(), &[Group::Size(4), Group::Size(6)], &Params::default()).unwrap_err();
        assert!(error.to_string().contains("4 does not divide 6"), "{error}");
    }
}

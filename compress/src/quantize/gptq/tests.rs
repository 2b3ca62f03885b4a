//! GPTQ by hand, against a plain reference, and at the edges.

use kernels::{Group, ScaleType, Zeros, bounds};
use ndarray::{Array2, array};

use super::*;
use crate::quantize::testing::{Moment, loss_of, moment, normals};
use crate::quantize::{Error, Grid};

fn width(bits: u8, group: usize, grid: Grid) -> Width {
    Width { bits, group: Group::Size(group), scale_type: ScaleType::Bf16, grid }
}

fn params(order: Order, clips: u16) -> Params {
    Params { damping: 0.01, order, clips }
}

#[test]
fn two_columns_by_hand() {
    // H = [[1, 1], [1, 2]] without damping: R = [[√½, √½], [0, √2]] (H = R·Rᵀ), U = R⁻¹ = [[√2, −√½], [0, √½]].
    // The grid of the row [0.6, 1]: 2 bits, s = 1 / 1.5 as f32, levels −4/3, −2/3, 0, 2/3.
    // Column 0: 0.6 → 2/3, e = (0.6 − 2/3)/√2. Column 1: 1 − e·(−√½) = 1 + (0.6 − 2/3)/2 = 0.9667 → 2/3.
    let w = array![[0.6_f32, 1.0]];
    let factor = factorize(array![[1.0, 1.0], [1.0, 2.0]].view(), &[], &Params { damping: 0.0, ..params(Order::None, 1) }).unwrap();
    let width = Width { bits: 2, group: Group::PerChannel, scale_type: ScaleType::F32, grid: Grid::Sym };
    let solved = gptq(w.view(), &factor, &width, &params(Order::None, 1)).unwrap();
    assert_eq!((solved.matrix.codes, solved.matrix.zeros, solved.matrix.scales), (vec![3, 3], Zeros::Sym, vec![1.0 / 1.5]));
    // ΔW = [−1/15, 1/3]: (1/225 − 2/45 + 2/9) = 41/225.
    assert!((solved.loss.undamped - 41.0 / 225.0).abs() < 1e-6, "{:?}", solved.loss);
}

/// GPTQ as the papers have it: one column at a time, in f64, the inverse by Gauss-Jordan. Its scales are given.
fn reference(w: &Array2<f32>, h: &Array2<f32>, factor: &Factor, scales: &QuantizedMatrix) -> f64 {
    let (rows, n) = w.dim();
    let order = factor.order();
    let damped = |i: usize, j: usize| f64::from(h[(order[i], order[j])]) + if i == j { factor.lambda() } else { 0.0 };
    // [H | 1] → [1 | H⁻¹]
    let mut a = Array2::from_shape_fn((n, 2 * n), |(i, j)| if j < n { damped(i, j) } else { f64::from(j - n == i) });
    for i in 0..n {
        let pivot = a[(i, i)];
        a.row_mut(i).mapv_inplace(|x| x / pivot);
        for k in (0..n).filter(|&k| k != i) {
            let (factor, row) = (a[(k, i)], a.row(i).to_owned());
            a.row_mut(k).scaled_add(-factor, &row);
        }
    }
    let mut inverse = a.slice(ndarray::s![.., n..]).to_owned();
    let mut w = Array2::from_shape_fn((rows, n), |(r, j)| f64::from(w[(r, order[j])]));
    let top = f64::from(u8::MAX >> (8 - scales.bits));
    let mut loss = 0.0;
    for j in 0..n {
        // Textbook OBQ: after column j the inverse loses it, and what is left is the inverse of the rest.
        let pivot = inverse[(j, j)];
        for r in 0..rows {
            let group = order[j] / scales.group_len();
            let (s, z) = (f64::from(scales.scales[r * scales.groups() + group]), f64::from(scales.zero(r, group)));
            let off = w[(r, j)] - ((w[(r, j)] / s + z).clamp(0.0, top).round_ties_even() - z) * s;
            loss += off * off / pivot;
            for k in j..n {
                w[(r, k)] -= off / pivot * inverse[(j, k)];
            }
        }
        let row = inverse.row(j).to_owned();
        for k in j + 1..n {
            let share = row[k] / pivot;
            inverse.row_mut(k).scaled_add(-share, &row);
        }
    }
    loss
}

#[test]
fn agrees_with_one_column_at_a_time_in_f64() {
    for (kind, seed) in [(Moment::White, 1), (Moment::Correlated, 2), (Moment::IllConditioned, 3), (Moment::FewTokens, 4)] {
        for order in [Order::None, Order::Static, Order::Group] {
            let w = normals(96, 160, seed);
            let h = moment(kind, 160, seed);
            let factor = factorize(h.view(), &[Group::Size(32)], &params(order, 16)).unwrap();
            let solved = gptq(w.view(), &factor, &width(3, 32, Grid::Sym), &params(order, 16)).unwrap();
            let expected = reference(&w, &h, &factor, &solved.matrix);
            let off = (solved.loss.damped / expected - 1.0).abs();
            assert!(off < bounds::SOLVER, "{kind:?} {order:?}: {} against {expected}: {off}", solved.loss.damped);
        }
    }
}

#[test]
fn the_loss_is_that_of_the_codes() {
    for order in [Order::None, Order::Static, Order::Group] {
        for grid in [Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset] {
            let (w, h) = (normals(40, 96, 5), moment(Moment::Correlated, 96, 6));
            let factor = factorize(h.view(), &[Group::Size(48)], &params(order, 8)).unwrap();
            let solved = gptq(w.view(), &factor, &width(2, 48, grid), &params(order, 8)).unwrap();
            solved.matrix.check().unwrap();
            let (damped, undamped) = (loss_of(&w, &solved.matrix, &h, factor.lambda()), loss_of(&w, &solved.matrix, &h, 0.0));
            assert!((solved.loss.damped / damped - 1.0).abs() < bounds::FACTOR, "{:?} {damped}", solved.loss);
            assert!((solved.loss.undamped / undamped - 1.0).abs() < bounds::FACTOR, "{:?} {undamped}", solved.loss);
        }
    }
}

#[test]
fn beats_rounding_and_each_bit_helps() {
    for kind in [Moment::White, Moment::Correlated, Moment::IllConditioned, Moment::FewTokens] {
        let mut before = f64::INFINITY;
        for bits in 2..=8 {
            let mut mean = 0.0;
            for seed in 0..3 {
                let (w, h) = (normals(64, 128, seed), moment(kind, 128, 10 + seed));
                let factor = factorize(h.view(), &[Group::Size(64)], &Params::default()).unwrap();
                let width = width(bits, 64, Grid::Sym);
                let solved = gptq(w.view(), &factor, &width, &Params::default()).unwrap();
                let rounded = super::super::rtn::rtn(w.view(), &width, &super::super::rtn::Params { clips: 32 }).unwrap();
                let rounding = loss_of(&w, &rounded, &h, factor.lambda());
                // On white inputs there is nothing to make up for, and codes differ little.
                let most = if kind == Moment::White { 1.03 } else { 1.0 };
                assert!(solved.loss.damped < most * rounding, "{kind:?} {bits}: {} {rounding}", solved.loss.damped);
                mean += solved.loss.damped;
            }
            assert!(mean < before, "{kind:?}: {bits} bits");
            before = mean;
        }
    }
}

#[test]
fn rounding_is_kept_where_it_is_better() {
    // Of 2000 tiny problems some go wrong for a greedy solver; each of them must come back with rounding's codes.
    let mut kept = [0, 0];
    for seed in 0..2000 {
        let (w, h) = (normals(1, 4, seed), moment(Moment::Correlated, 4, seed));
        let factor = factorize(h.view(), &[], &Params::default()).unwrap();
        let width = Width { group: Group::PerChannel, ..width(2, 4, Grid::Sym) };
        let solved = gptq(w.view(), &factor, &width, &Params::default()).unwrap();
        let mut rounded = solved.matrix.clone();
        for (code, &w) in rounded.codes.iter_mut().zip(&w) {
            *code = (w / solved.matrix.scales[0] + 2.0).clamp(0.0, 3.0).round_ties_even() as u8;
        }
        let rounding = loss_of(&w, &rounded, &h, factor.lambda());
        assert!(solved.loss.damped <= rounding * (1.0 + bounds::FACTOR));
        if solved.kept == Kept::Rtn {
            assert_eq!(solved.matrix, rounded);
        }
        kept[usize::from(solved.kept == Kept::Rtn)] += 1;
    }
    assert!(kept[0] > 1000 && kept[1] > 10, "{kept:?}");
}

#[test]
fn a_dead_input_keeps_its_rounded_weights() {
    let (w, mut h) = (normals(20, 64, 7), moment(Moment::Correlated, 64, 8));
    for dead in [3, 40] {
        h.row_mut(dead).fill(0.0);
        h.column_mut(dead).fill(0.0);
    }
    let factor = factorize(h.view(), &[Group::Size(32)], &Params::default()).unwrap();
    let solved = gptq(w.view(), &factor, &width(4, 32, Grid::Sym), &Params::default()).unwrap();
    assert_eq!(solved.dead_channels, 2);
    let back = solved.matrix.dequantize();
    for row in 0..20 {
        for dead in [3, 40] {
            let (scale, w) = (solved.matrix.scales[row * 2 + dead / 32], w[(row, dead)]);
            let nearest = (w / scale).clamp(-8.0, 7.0).round_ties_even() * scale;
            assert_eq!(back[(row, dead)], nearest);
        }
    }
}

#[test]
fn ragged_shapes_and_empty_ones() {
    // 300 rows are a chunk and a tail with padding; 72 columns are two leaves and a tail.
    let (w, h) = (normals(300, 72, 9), moment(Moment::Correlated, 72, 10));
    for group in [Group::PerChannel, Group::Size(36), Group::Size(8)] {
        let factor = factorize(h.view(), &[group], &Params::default()).unwrap();
        let width = Width { group, ..width(3, 8, Grid::Sym) };
        let whole = gptq(w.view(), &factor, &width, &Params::default()).unwrap();
        assert!((whole.loss.damped / loss_of(&w, &whole.matrix, &h, factor.lambda()) - 1.0).abs() < bounds::FACTOR);
        let none = gptq(w.slice(ndarray::s![..0, ..]), &factor, &width, &Params::default()).unwrap();
        assert_eq!((none.matrix.codes.len(), none.loss.damped), (0, 0.0));
        let one = gptq(w.slice(ndarray::s![299.., ..]), &factor, &width, &Params::default()).unwrap();
        assert_eq!(one.matrix.codes, whole.matrix.codes[299 * 72..], "{group:?}: rows do not know one another");
    }
}

#[test]
fn one_factor_serves_every_width() {
    let (w, h) = (normals(32, 128, 11), moment(Moment::Correlated, 128, 12));
    let factor = factorize(h.view(), &[Group::Size(64), Group::Size(32)], &Params::default()).unwrap();
    for group in [Group::Size(64), Group::Size(32), Group::PerChannel] {
        gptq(w.view(), &factor, &Width { group, ..width(2, 1, Grid::Half) }, &Params::default()).unwrap();
    }
    let error = gptq(w.view(), &factor, &width(2, 16, Grid::Half), &Params::default()).unwrap_err();
    assert!(matches!(error, Error::FactorGroups { group: Group::Size(16) }), "{error}");
}

#[test]
fn the_best_grid_is_the_one_with_the_least_loss() {
    let (w, h) = (normals(40, 64, 15), moment(Moment::Correlated, 64, 15));
    let factor = factorize(h.view(), &[Group::Size(32)], &Params::default()).unwrap();
    let widths = [Grid::Asym, Grid::Sym, Grid::Half].map(|grid| width(2, 32, grid));
    let losses = widths.map(|width| gptq(w.view(), &factor, &width, &Params::default()).unwrap().loss.damped);
    let (width, solved) = best(w.view(), &factor, &widths, &Params::default()).unwrap().unwrap();
    let least = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!((solved.loss.damped, losses[widths.iter().position(|other| *other == width).unwrap()]), (least, least));
    assert!(losses.iter().all(|&loss| loss == least || loss > 1.01 * least), "{losses:?}");
    assert_eq!(best(w.view(), &factor, &[], &Params::default()).unwrap(), None);
}

#[test]
fn wrong_input_is_named() {
    let factor = factorize(moment(Moment::White, 8, 1).view(), &[], &Params::default()).unwrap();
    let solve = |w: Array2<f32>, width: Width| gptq(w.view(), &factor, &width, &Params::default()).unwrap_err().to_string();
    let per_channel = Width { group: Group::PerChannel, ..width(2, 8, Grid::Sym) };
    assert!(solve(Array2::ones((2, 6)), per_channel).contains("8 inputs does not fit a matrix of 6"));
    assert!(solve(Array2::ones((2, 8)), width(2, 3, Grid::Sym)).contains("groups of 3 do not divide 8 inputs"));
    let mut w = Array2::ones((2, 8));
    w[(1, 5)] = f32::INFINITY;
    assert!(solve(w, per_channel).contains("weight inf at row 1, column 5"));
    let f16 = Width { scale_type: ScaleType::F16, ..per_channel };
    assert!(solve(Array2::from_elem((2, 8), 1e6), f16).contains("row 0, group 0"));
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (w, h) = (normals(600, 96, 13), moment(Moment::Correlated, 96, 14));
    let factor = factorize(h.view(), &[Group::Size(32)], &Params::default()).unwrap();
    let solve = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| gptq(w.view(), &factor, &width(2, 32, Grid::Asym), &Params::default()).unwrap())
    };
    assert!(solve(1) == solve(3));
}

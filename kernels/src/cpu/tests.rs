//! Products of packed matrices against the dequantized ones in f64.

use ndarray::{Array2, ArrayView2};
use proptest::prelude::*;

use super::*;
use crate::bounds;
use crate::layout::{Form, WIDTHS};
use crate::{QuantizedMatrix, ScaleType, Zeros};

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    }
}

fn matrix([outputs, inputs]: [usize; 2], bits: u8, group: Group, grid: Grid, seed: u64) -> QuantizedMatrix {
    let mut draw = random(seed);
    let (top, groups) = (u8::MAX >> (8 - bits), outputs * (inputs / group.len(inputs)));
    QuantizedMatrix {
        outputs,
        inputs,
        bits,
        group,
        scale_type: ScaleType::F32,
        codes: (0..outputs * inputs).map(|_| draw() as u8 & top).collect(),
        scales: (0..groups).map(|_| (draw() % 255 + 1) as f32 / 4096.0).collect(),
        zeros: match grid {
            Grid::Sym => Zeros::Sym,
            Grid::Half => Zeros::Half,
            Grid::Asym => Zeros::Asym((0..groups).map(|_| draw() as u8 & top).collect()),
            Grid::Offset => Zeros::Offset((0..groups).map(|_| (draw() % 100) as f32 / 32.0).collect()),
        },
    }
}

fn activations(tokens: usize, inputs: usize) -> Vec<f32> {
    let mut draw = random(99);
    (0..tokens * inputs).map(|_| (draw() % 2001) as f32 / 1000.0 - 1.0).collect()
}

fn reference(weights: &Array2<f32>, x: &[f32], inputs: usize) -> Vec<f64> {
    let x = ArrayView2::from_shape((x.len() / inputs, inputs), x).unwrap().mapv(f64::from);
    x.dot(&weights.t().mapv(f64::from)).into_iter().collect()
}

fn apart(found: &[f32], meant: &[f64]) -> f64 {
    assert_eq!(found.len(), meant.len());
    let square = |(apart, whole): (f64, f64), (f, m): (&f32, &f64)| (apart + (f64::from(*f) - m).powi(2), whole + m * m);
    let (apart, whole) = found.iter().zip(meant).fold((0.0, 0.0), square);
    (apart / whole).sqrt()
}

#[test]
fn every_width_grid_and_group_is_the_dequantized_product() {
    for (index, bits) in WIDTHS.into_iter().enumerate() {
        for grid in [Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset] {
            if bits == 1 && grid == Grid::Sym {
                continue;
            }
            for (group, shape) in
                [(Group::Size(32), [72, 160]), (Group::Size(64), [8, 192]), (Group::Size(128), [64, 384]), (Group::PerChannel, [40, 100])]
            {
                let packed = Packed::new(&matrix(shape, bits, group, grid, index as u64)).unwrap();
                let weights = &packed.dequantize().unwrap()[0];
                for tokens in [1, 3, 9] {
                    let x = activations(tokens, shape[1]);
                    let meant = reference(weights, &x, shape[1]);
                    let exact = apart(&Linear::new(packed.clone(), Mode::Exact).apply(&x)[0], &meant);
                    assert!(exact <= bounds::EXACT, "{bits} bits, {grid:?}, {group:?}, {tokens} tokens: {exact}");
                    let fast = apart(&Linear::new(packed.clone(), Mode::Fast).apply(&x)[0], &meant);
                    assert!(fast <= bounds::FAST, "{bits} bits, {grid:?}, {group:?}, {tokens} tokens: {fast}");
                }
            }
        }
    }
}

#[test]
fn one_row_by_hand() {
    // Codes 3, 0, 1, 2 and then 2 (nothing): (3-2)·½ = ½, -1, -½, 0; x = 1, 2, 4, 8: ½ - 2 - 2 + 0.
    let mut codes = vec![2; 32];
    codes[..4].copy_from_slice(&[3, 0, 1, 2]);
    let mut x = vec![100.0; 32];
    x[..4].copy_from_slice(&[1.0, 2.0, 4.0, 8.0]);
    let (group, scale_type) = (Group::Size(32), ScaleType::Bf16);
    let matrix = QuantizedMatrix { outputs: 1, inputs: 32, bits: 2, group, scale_type, codes, scales: vec![0.5], zeros: Zeros::Sym };
    let linear = Linear::new(Packed::new(&matrix).unwrap(), Mode::Exact);
    assert_eq!(linear.apply(&x), [[-3.5]]);
    assert_eq!(linear.apply(&[]), [[0.0_f32; 0]]);
}

#[test]
fn an_expert_with_gate_and_up_together_is_the_one_with_both_apart() {
    let of = |seed, shape| matrix(shape, 4, Group::Size(32), Grid::Sym, seed);
    let (gate, up, down) = (of(1, [40, 64]), of(2, [40, 64]), of(3, [64, 40 - 8]));
    let down = QuantizedMatrix { inputs: 32, ..down };
    let linear = |packed| Linear::new(packed, Mode::Exact);
    let together = linear(Packed::gate_up(&gate, &up).unwrap());
    let (gate, up) = (linear(Packed::new(&gate).unwrap()), linear(Packed::new(&up).unwrap()));
    let x = activations(5, 64);
    let both = together.apply(&x);
    assert_eq!(both, [gate.apply(&x)[0].clone(), up.apply(&x)[0].clone()]);
    // The down matrix above is 32 wide: an expert of 32 channels.
    let of32 = |seed| Linear::new(Packed::new(&of(seed, [32, 64])).unwrap(), Mode::Exact);
    let (gate, up, down) = (of32(4), of32(5), linear(Packed::new(&down).unwrap()));
    let out = expert(&[&gate, &up], &down, &x);
    let (g, u) = (gate.apply(&x).remove(0), up.apply(&x).remove(0));
    let mid: Vec<f32> = g.iter().zip(&u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    assert_eq!(out, down.apply(&mid)[0]);
}

#[test]
fn a_number_that_is_none_stays_in_its_row() {
    let packed = Packed::new(&matrix([16, 64], 4, Group::Size(64), Grid::Sym, 7)).unwrap();
    let mut x = activations(3, 64);
    let clean = Linear::new(packed.clone(), Mode::Exact).apply(&x);
    x[64] = f32::NAN;
    let out = Linear::new(packed, Mode::Exact).apply(&x);
    assert!(out[0][16..32].iter().all(|v| v.is_nan()));
    assert_eq!((&out[0][..16], &out[0][32..]), (&clean[0][..16], &clean[0][32..]));
}

#[test]
fn tokens_do_not_change_one_another() {
    let form = Form::new(3, Group::Size(32), ScaleType::F32, Grid::Asym).unwrap();
    let packed = Packed::new(&matrix([64, 256], 3, form.group, form.grid, 8)).unwrap();
    let x = activations(11, 256);
    for mode in [Mode::Exact, Mode::Fast] {
        let linear = Linear::new(packed.clone(), mode);
        let all = linear.apply(&x).remove(0);
        let alone: Vec<f32> = x.chunks(256).flat_map(|x| linear.apply(x).remove(0)).collect();
        assert_eq!(all, alone, "{mode:?}");
    }
}

proptest! {
    #[test]
    fn ragged_shapes(outputs in 1..100_usize, groups in 1..6_usize, bits in 0..7_usize, seed in 0..1000_u64) {
        let inputs = groups * 32;
        let packed = Packed::new(&matrix([outputs, inputs], WIDTHS[bits], Group::Size(32), Grid::Half, seed)).unwrap();
        let x = activations(2, inputs);
        let meant = reference(&packed.dequantize().unwrap()[0], &x, inputs);
        let found = apart(&Linear::new(packed, Mode::Exact).apply(&x)[0], &meant);
        prop_assert!(found <= bounds::EXACT, "{found}");
    }
}

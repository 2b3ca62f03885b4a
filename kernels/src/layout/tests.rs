//! The bytes of the layout against its written specification, round trips, and what is refused.

use proptest::prelude::*;

use super::transcode::{Meta, ZeroForm, from_compressed_tensors, from_gptq, from_mlx, to_compressed_tensors, to_gptq, to_mlx};
use super::*;

/// A small generator: the tests draw thousands of matrices, and proptest's trees cost more than the matrices.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ self.0 >> 33;
        x.wrapping_mul(0xff51_afd7_ed55_8ccd) >> 16
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.next() as usize % choices.len()]
    }

    fn matrix(&mut self, outputs: usize, inputs: usize, bits: u8, group: Group, grid: Grid) -> QuantizedMatrix {
        let top = u8::MAX >> (8 - bits);
        let groups = outputs * (inputs / group.len(inputs));
        let zeros = match grid {
            Grid::Sym => Zeros::Sym,
            Grid::Half => Zeros::Half,
            Grid::Asym => Zeros::Asym((0..groups).map(|_| self.next() as u8 & top).collect()),
            Grid::Offset => Zeros::Offset((0..groups).map(|_| (self.next() % 1000) as f32 / 64.0 - 3.0).collect()),
        };
        let scale_type = if grid == Grid::Offset { ScaleType::F32 } else { self.of(&[ScaleType::Bf16, ScaleType::F16, ScaleType::F32]) };
        QuantizedMatrix {
            outputs,
            inputs,
            bits,
            group,
            scale_type,
            codes: (0..outputs * inputs).map(|_| self.next() as u8 & top).collect(),
            scales: (0..groups).map(|_| (self.next() % 255 + 1) as f32 / 256.0).collect(),
            zeros,
        }
    }

    fn any(&mut self) -> QuantizedMatrix {
        let bits = self.of(&WIDTHS);
        let grid = self.of(if bits == 1 { &[Grid::Half, Grid::Asym] } else { &[Grid::Sym, Grid::Half, Grid::Asym, Grid::Offset] });
        let group = self.of(&[Group::Size(32), Group::Size(64), Group::Size(128), Group::PerChannel]);
        let inputs = match group {
            Group::Size(size) => size * (1 + self.next() as usize % 3),
            Group::PerChannel => 1 + self.next() as usize % 200,
        };
        let outputs = 1 + self.next() as usize % 80;
        self.matrix(outputs, inputs, bits, group, grid)
    }
}

/// Where the written specification puts bit `bit` of the code at `(row, k)`: word of the tensor, and bit within it. Kept apart from the
/// packer: it walks from the place to the bit by the words of the specification alone.
fn place(bits: usize, padded_inputs: usize, row: usize, k: usize, bit: usize) -> (usize, usize) {
    let (tile, slab) = (row / 64 * (padded_inputs / 128) + k / 128, row % 64 / 16);
    let (r16, k128) = (row % 16, k % 128);
    let (half, j, e, t) = (k128 / 64, k128 % 64 / 16, k128 % 2, k128 % 8 / 2);
    let (lane, p) = (r16 % 8 * 4 + t, 4 * j + (k128 % 16 / 8) * 2 + r16 / 8);
    let (word, at) = match bits {
        3 | 5 if p == 15 => (bit, 15),
        6 if p >= 12 && bit < 4 => (p - 12, 12 + bit),
        6 if p >= 12 => (4 + (p - 12) / 2, 12 + 2 * ((p - 12) % 2) + bit - 4),
        _ => (p / (16 / bits), bits * (p % (16 / bits)) + bit),
    };
    let (s, v) = (half * bits + word, if bits.is_multiple_of(2) { 4 } else { 2 });
    let address = (s / v) * 32 * v + lane * v + s % v;
    ((tile * 4 + slab) * 64 * bits + address, at + 16 * e)
}

#[test]
fn every_bit_lies_where_the_specification_says() {
    let mut draw = Draw(1);
    for bits in WIDTHS {
        let grid = if bits == 1 { Grid::Half } else { Grid::Sym };
        let matrix = draw.matrix(72, 160, bits, Group::Size(32), grid);
        let packed = Packed::new(&matrix).unwrap();
        assert_eq!(packed.words.len(), 128 * 256 * usize::from(bits) / 32);
        let mut seen = vec![0_u32; packed.words.len()];
        for (row, k, bit) in (0..128).flat_map(|row| (0..256).flat_map(move |k| (0..bits).map(move |bit| (row, k, bit)))) {
            let filler = if bits == 1 { 0 } else { 1 << (bits - 1) };
            let code = if row < 72 && k < 160 { matrix.codes[row * 160 + k] } else { filler };
            let (word, at) = place(usize::from(bits), 256, row, k, usize::from(bit));
            assert_eq!(packed.words[word] >> at & 1, u32::from(code >> bit & 1), "{bits} bits, row {row}, input {k}, bit {bit}");
            seen[word] |= 1 << at;
        }
        assert!(seen.iter().all(|&word| word == u32::MAX), "{bits} bits waste some");
    }
}

/// FNV-1a.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn golden_bytes() {
    // Code at (row, k) is (5·row + 3·k) mod 2^b in one slab of 16 x 128. First words by hand at 4 bits, lane 0 (row 0, t = 0): fragment 0 has
    // pairs (0, 1): 0, 3; row 8: 40 mod 16 = 8, 11; (8, 9): 24 mod 16 = 8, 11; row 8: 64 mod 16 = 0, 3, so 0x3bb3 over 0x0880.
    let matrix = |bits: u8| QuantizedMatrix {
        outputs: 16,
        inputs: 128,
        bits,
        group: Group::Size(128),
        scale_type: ScaleType::Bf16,
        codes: (0..16 * 128).map(|i: usize| ((5 * (i / 128) + 3 * (i % 128)) as u8) & (u8::MAX >> (8 - bits))).collect(),
        scales: vec![0.5; 16],
        zeros: Zeros::Half,
    };
    assert_eq!(Packed::new(&matrix(4)).unwrap().words[0], 0x3bb3_0880);
    let found: Vec<String> = WIDTHS
        .into_iter()
        .map(|bits| format!("{:016x}", hash(Packed::new(&matrix(bits)).unwrap().words.iter().flat_map(|word| word.to_le_bytes()))))
        .collect();
    assert_eq!(found, GOLDEN);
}

/// Of widths 1, 2, 3, 4, 5, 6, 8: another value here is another layout, which needs another name.
const GOLDEN: [&str; 7] = [
    "ff64e59b207998a5",
    "cc78b5f859230125",
    "67776dc4c66d9645",
    "29361295e2e93725",
    "b5d8cd920d53fd2d",
    "aa0a7f06f6954da5",
    "49b8abd1d19f6c25",
];

#[test]
fn ten_thousand_matrices_come_back() {
    let mut draw = Draw(2);
    for case in 0..10_000 {
        let matrix = draw.any();
        let packed = Packed::new(&matrix).unwrap();
        let back = &packed.unpack().unwrap()[0];
        if let (Zeros::Offset(found), Zeros::Offset(meant)) = (&back.zeros, &matrix.zeros) {
            assert_eq!((&back.codes, &back.scales), (&matrix.codes, &matrix.scales));
            assert!(found.iter().zip(meant).all(|(f, m)| (f - m).abs() <= 1e-6 * m.abs().max(1.0)), "case {case}");
        } else {
            assert_eq!(back, &matrix, "case {case}");
        }
        let meta = Meta { shape: [matrix.outputs, matrix.inputs], bits: matrix.bits, group: matrix.group, scale_type: matrix.scale_type };
        let ct = to_compressed_tensors(&matrix);
        assert_eq!(ct.is_ok(), matches!(matrix.zeros, Zeros::Sym | Zeros::Asym(_)));
        if let Ok(stored) = ct {
            assert_eq!(from_compressed_tensors(&stored, meta).unwrap(), matrix, "case {case}");
        }
    }
}

#[test]
fn streams_of_gptq_and_mlx_hold_the_same_codes() {
    let mut draw = Draw(3);
    for bits in [2, 3, 4, 8] {
        for grid in [Grid::Sym, Grid::Asym] {
            let mut matrix = draw.matrix(64, 192, bits, Group::Size(64), grid);
            if let Zeros::Asym(zeros) = &mut matrix.zeros {
                zeros.iter_mut().for_each(|zero| *zero = (*zero).max(1));
            }
            let meta = Meta { shape: [64, 192], bits, group: matrix.group, scale_type: matrix.scale_type };
            for form in [ZeroForm::V1, ZeroForm::V2] {
                let stored = to_gptq(&matrix, form).unwrap();
                assert_eq!(from_gptq(&stored, meta, form).unwrap(), matrix);
                // The symmetric constants that loaders of either form expect.
                let (v1, v2) = ([0x5555_5555, 0, 0x7777_7777, 0x7f7f_7f7f], [0xaaaa_aaaa, 0, 0x8888_8888, 0x8080_8080_u32]);
                let index = [2, 3, 4, 8].iter().position(|b| *b == bits).unwrap();
                if grid == Grid::Sym && bits != 3 {
                    assert_eq!(stored.qzeros[0], if form == ZeroForm::V1 { v1[index] } else { v2[index] });
                }
            }
            // The GPTQ column stream is the compressed-tensors row stream, turned.
            let (gptq, ct) = (to_gptq(&matrix, ZeroForm::V2).unwrap(), to_compressed_tensors(&matrix).unwrap());
            assert_eq!(gptq.qweight, transcode_turned(&ct.packed, 64));
            let matrix = QuantizedMatrix { scale_type: ScaleType::F32, ..matrix };
            let meta = Meta { scale_type: ScaleType::F32, ..meta };
            assert_eq!(from_mlx(&to_mlx(&matrix).unwrap(), meta).unwrap(), matrix);
        }
    }
}

fn transcode_turned(words: &[u32], rows: usize) -> Vec<u32> {
    let columns = words.len() / rows;
    (0..words.len()).map(|i| words[i % rows * columns + i / rows]).collect()
}

#[test]
fn what_a_target_does_not_hold_is_named() {
    let mut draw = Draw(4);
    let said = |result: Result<()>| result.unwrap_err().to_string();
    let half = draw.matrix(32, 64, 2, Group::Size(32), Grid::Half);
    assert!(said(to_gptq(&half, ZeroForm::V1).map(drop)).contains("GPTQ v1 does not hold the grid half"));
    assert!(said(to_compressed_tensors(&half).map(drop)).contains("compressed-tensors does not hold the grid half"));
    let offset = draw.matrix(32, 64, 4, Group::Size(32), Grid::Offset);
    assert!(said(to_gptq(&offset, ZeroForm::V2).map(drop)).contains("grid offset"));
    let mut asym = draw.matrix(32, 64, 4, Group::Size(32), Grid::Asym);
    asym.zeros = Zeros::Asym(vec![0; 64]);
    assert!(said(to_gptq(&asym, ZeroForm::V1).map(drop)).contains("use gptq_v2"));
    assert!(to_gptq(&asym, ZeroForm::V2).is_ok());
    let five = draw.matrix(32, 64, 5, Group::Size(32), Grid::Sym);
    assert!(said(to_gptq(&five, ZeroForm::V2).map(drop)).contains("5 bits; it has 2, 3, 4 and 8"));
    let ragged = draw.matrix(20, 64, 3, Group::Size(32), Grid::Sym);
    assert!(said(to_gptq(&ragged, ZeroForm::V2).map(drop)).contains("ends inside a word"));
    // 1.5 · (1 + 2⁻⁷) needs nine bits.
    let mut fine = half;
    (fine.scale_type, fine.scales) = (ScaleType::Bf16, vec![1.007_812_5; 64]);
    assert!(said(to_mlx(&fine).map(drop)).contains("the offset -1.51171875 of row 0, group 0: it is no Bf16"));
    assert!(said(to_mlx(&draw.matrix(32, 64, 1, Group::Size(32), Grid::Half)).map(drop)).contains("1 bits"));
    assert!(said(Form::new(7, Group::PerChannel, ScaleType::Bf16, Grid::Sym).map(drop)).contains("7 bits a code; it has"));
    assert!(said(Form::new(4, Group::Size(16), ScaleType::Bf16, Grid::Sym).map(drop)).contains("groups of 16 inputs"));
    let (gate, up) = (draw.matrix(32, 64, 4, Group::Size(32), Grid::Sym), draw.matrix(32, 64, 2, Group::Size(32), Grid::Sym));
    assert!(said(Packed::gate_up(&gate, &up).map(drop)).contains("tie them"));
}

#[test]
fn gate_and_up_lie_in_turns_of_eight() {
    let mut draw = Draw(5);
    for outputs in [8, 20, 64, 72] {
        let mut of = |grid| {
            let matrix = draw.matrix(outputs, 128, 4, Group::Size(64), grid);
            QuantizedMatrix { scale_type: ScaleType::F32, ..matrix }
        };
        let (gate, up) = (of(Grid::Asym), of(Grid::Asym));
        let packed = Packed::gate_up(&gate, &up).unwrap();
        assert_eq!(packed.form.padded([outputs, 128]), [2 * outputs.next_multiple_of(32), 128]);
        assert_eq!(packed.unpack().unwrap(), [gate.clone(), up]);
        // Scale of gate row 0 and of up row 0: rows 0 and 8 of the first tile.
        assert_eq!(packed.scales[0], gate.scales[0]);
    }
    assert_eq!([0, 7, 8, 15, 16].map(|row| source_row(Rows::GateUp, row)), [(0, 0), (0, 7), (1, 0), (1, 7), (0, 8)]);
}

fn three_experts(draw: &mut Draw) -> (Arena, Vec<u8>, Vec<Packed>) {
    let [low, high, asym] =
        [(2, Grid::Half), (8, Grid::Sym), (3, Grid::Asym)].map(|(bits, grid)| draw.matrix(40, 96, bits, Group::Size(32), grid));
    let packed: Vec<Packed> = [&low, &high, &asym].into_iter().map(|m| Packed::new(m).unwrap()).collect();
    let experts: Vec<(u32, Form)> = packed.iter().enumerate().map(|(e, p)| (e as u32, p.form)).collect();
    let arena = Arena::plan(&experts, [40, 96]).unwrap();
    let mut bytes = vec![0; arena.bytes];
    packed.iter().enumerate().for_each(|(e, p)| arena.fill(&mut bytes, e as u32, p).unwrap());
    (arena, bytes, packed)
}

#[test]
fn an_arena_is_sorted_by_width_and_reads_back() {
    let (arena, bytes, packed) = three_experts(&mut Draw(6));
    assert_eq!(arena.entries.iter().map(|e| (e.form.bits, e.expert)).collect::<Vec<_>>(), [(8, 1), (3, 2), (2, 0)]);
    let stored: u64 = packed.iter().map(|p| stored_bytes(&p.form, p.shape)).sum();
    assert_eq!(stored, (arena.bytes + arena.table().len()) as u64);
    let read = Arena::read(&arena.table(), bytes.len(), [40, 96]).unwrap();
    assert_eq!(read, arena);
    for (e, packed) in packed.iter().enumerate() {
        assert_eq!(&read.take(&bytes, e as u32).unwrap(), packed);
    }
    assert!(read.take(&bytes, 3).unwrap_err().to_string().contains("expert 3 is not in this arena"));
    // 64 x 128 codes of 3 bits; 64 rows of four groups at 2 or 4 bytes; the zeros two to a byte.
    let scale = scale_bytes(packed[2].form.scale_type);
    assert_eq!(packed[2].form.bytes([40, 96]), [3072, 256 * scale, 128]);
}

#[test]
fn a_table_that_lies_is_refused() {
    let (arena, bytes, _) = three_experts(&mut Draw(7));
    let refused = |at: usize, value: u8, words: &str| {
        let mut table = arena.table();
        table[at] = value;
        let said = Arena::read(&table, bytes.len(), [40, 96]).unwrap_err().to_string();
        assert!(said.contains(words), "{said}");
    };
    refused(2, 1, "do not lie in an arena");
    refused(0, 1, "do not lie in an arena");
    refused(12, 0, "permutation");
    refused(16, 7, "7 bits a code");
    refused(17, 4, "groups of 2^4");
    refused(18, 1, "a codebook");
    refused(18, 0x60, "two kinds of zero");
    refused(20, 3, "[3, 1] tiles");
    refused(24, 2, "it stands twice");
    assert!(Arena::read(&arena.table()[1..], bytes.len(), [40, 96]).unwrap_err().to_string().contains("no multiple of 32"));
    assert!(Arena::read(&arena.table(), bytes.len() - 256, [40, 96]).is_err());
}

#[test]
fn an_empty_matrix_has_no_words() {
    let empty = Draw(8).matrix(0, 128, 4, Group::Size(128), Grid::Sym);
    let packed = Packed::new(&empty).unwrap();
    assert!(packed.words.is_empty());
    assert_eq!(packed.unpack().unwrap()[0], empty);
    assert_eq!(stored_bytes(&packed.form, [0, 128]), 32);
}

proptest! {
    #[test]
    fn one_code_changes_its_own_bits_only(seed in 0..u64::MAX, at in 0..usize::MAX) {
        let mut matrix = Draw(seed).any();
        let before = Packed::new(&matrix).unwrap();
        let at = at % matrix.codes.len();
        matrix.codes[at] ^= 1;
        let after = Packed::new(&matrix).unwrap();
        let changed: u32 = before.words.iter().zip(&after.words).map(|(a, b)| (a ^ b).count_ones()).sum();
        prop_assert_eq!(changed, 1);
    }
}

//! MQT-1: the bytes that the kernels of this project read. The written specification of them.
//!
//! *Codes* are unsigned, `0 ..= 2^b − 1`, b one of 1, 2, 3, 4, 5, 6, 8; `w = (q − z) · s`, or `w = s·q + o` where zero is real.
//!
//! *Tiles.* Outputs are padded to 64 rows, inputs to 128 with the code `2^(b−1)` (0 at one bit); scales and zeros of what is padded are 0.
//! `W[Np/64][Kp/128][4 slabs][64·b words]` of 32 bits, little-endian: a slab is 16 rows by 128 inputs, a tile 1024·b bytes.
//!
//! *Lanes.* In a slab lane `l`, `g = l/4`, `t = l%4`, owns 32 codes of each half `h` (64 inputs): code `i = 8j + 2r + e` is row
//! `g + 8·(r&1)`, input `64h + 16j + 8·(r>>1) + 2t + e`: the A fragment `j` of `mma.m16n8k16`.
//!
//! *Words.* Pair `p = 4j + r` puts its even code into the low half of a word and its odd code at the same bit of the high half:
//! b = 1, 2, 4, 8 at bit `b·(p % F)` of word `p / F`, `F = 16/b`; b = 3, 5 so for the pairs 0 … 14 with `F = ⌊16/b⌋`, and bit `c` of pair 15
//! at bit 15 of word `c`; b = 6 so for the pairs 0 … 11, and pair `12 + i` puts its low 4 bits at bit 12 of word `i` and its high 2 bits at
//! bit `12 + 2·(i%2)` of word `4 + i/2`.
//! Word `s = h·b + x` of lane `l` lies at `(s/V)·32·V + l·V + s%V` of the slab, V = 4 (2 where b is odd): a lane loads 16 (8) bytes.
//!
//! *Scales* `S[Np/64][G][64]`, `G = Kp/gs` for groups of 32, 64, 128 and 1 for whole rows; *zeros* likewise, as integers two to a byte
//! (the even row below) up to 4 bits and one to a byte above, or real in the scales' type.
//!
//! *Gate and up* of one width become one tensor ([`Rows::GateUp`]): row `r < 8` of slab `n` is gate row `8n + r`, row `8 + r` is up row `8n + r`.
//!
//! *Arena and table*: see [`table`].

pub mod table;
pub mod transcode;
mod words;

use crate::{Error, Group, QuantizedMatrix, Result, ScaleType, Zeros};

pub use table::{Arena, Entry};
pub(crate) use words::widen_pair;

/// Name of the layout, as it stands in files.
pub const NAME: &str = "MQT-1";

/// Widths that the layout has.
pub const WIDTHS: [u8; 7] = [1, 2, 3, 4, 5, 6, 8];

/// Rows of a tile.
pub const TILE_ROWS: usize = 64;

/// Inputs of a tile.
pub const TILE_INPUTS: usize = 128;

/// Every tensor of an arena starts at a multiple of this many bytes.
pub const ALIGNMENT: usize = 256;

/// Where zero lies between the codes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Grid {
    /// `z = 2^(b−1)`.
    Sym,
    /// `z = (2^b − 1) / 2`.
    Half,
    /// An integer a group.
    Asym,
    /// A real `o = −z·s` a group, stored as `f32` beside scales in `f32`, where it is no number of their own type.
    Offset,
}

impl Grid {
    /// The grid of a matrix.
    pub fn of(zeros: &Zeros) -> Self {
        match zeros {
            Zeros::Sym => Self::Sym,
            Zeros::Half => Self::Half,
            Zeros::Asym(_) => Self::Asym,
            Zeros::Offset(_) => Self::Offset,
        }
    }

    /// The zero that nobody stores; 0 where one is stored.
    pub fn fixed_zero(self, bits: u8) -> f32 {
        match self {
            Self::Sym => f32::from(1_u16 << (bits - 1)),
            Self::Half => (f32::from(1_u16 << bits) - 1.0) / 2.0,
            Self::Asym | Self::Offset => 0.0,
        }
    }
}

/// Which rows a packed tensor holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Rows {
    /// One matrix's, in their order.
    Plain,
    /// Gate and up, interleaved by eight; a shape then is that of one of the two.
    GateUp,
}

/// How a tensor is packed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Form {
    /// Bits a code, one of [`WIDTHS`].
    pub bits: u8,
    /// Inputs a scale: 32, 64, 128, or a whole row.
    pub group: Group,
    /// Stored type of the scales, and of offsets.
    pub scale_type: ScaleType,
    /// Where zero lies.
    pub grid: Grid,
    /// Which rows.
    pub rows: Rows,
}

impl Form {
    /// The form that a matrix of one kind gets: offsets are kept in f32 with their scales, because `z · s` is a number of no 16-bit type.
    ///
    /// # Errors
    ///
    /// [`Error::Holds`] for a width or a group that the layout does not have.
    pub fn new(bits: u8, group: Group, scale_type: ScaleType, grid: Grid) -> Result<Self> {
        let refuse = |what: String| Err(Error::Holds { target: "the native layout", what });
        if !WIDTHS.contains(&bits) {
            return refuse(format!("{bits} bits a code; it has 1, 2, 3, 4, 5, 6 and 8"));
        }
        if bits == 1 && grid == Grid::Sym {
            return refuse("1 bit on the grid sym; use half".to_owned());
        }
        if let Group::Size(size) = group
            && ![32, 64, 128].contains(&size)
        {
            return refuse(format!("groups of {size} inputs; it has 32, 64, 128 and whole rows"));
        }
        let scale_type = if grid == Grid::Offset { ScaleType::F32 } else { scale_type };
        Ok(Self { bits, group, scale_type, grid, rows: Rows::Plain })
    }

    /// The same with gate and up in one tensor.
    #[must_use]
    pub fn gate_up(self) -> Self {
        Self { rows: Rows::GateUp, ..self }
    }

    /// Rows and inputs with their padding, of a matrix `[out, in]`.
    pub fn padded(&self, [outputs, inputs]: [usize; 2]) -> [usize; 2] {
        let rows = match self.rows {
            Rows::Plain => outputs.next_multiple_of(TILE_ROWS),
            Rows::GateUp => 2 * outputs.next_multiple_of(TILE_ROWS / 2),
        };
        [rows, inputs.next_multiple_of(TILE_INPUTS)]
    }

    /// Groups a padded row.
    pub fn groups(&self, padded_inputs: usize) -> usize {
        match self.group {
            Group::Size(size) => padded_inputs / size,
            Group::PerChannel => 1,
        }
    }

    /// Bytes of words, scales and zeros of a matrix `[out, in]`, without the space between them.
    pub fn bytes(&self, shape: [usize; 2]) -> [usize; 3] {
        let [rows, inputs] = self.padded(shape);
        let (groups, scale) = (rows * self.groups(inputs), scale_bytes(self.scale_type));
        let zeros = match self.grid {
            Grid::Sym | Grid::Half => 0,
            Grid::Asym if self.bits <= 4 => groups / 2,
            Grid::Asym => groups,
            Grid::Offset => groups * scale,
        };
        [rows * inputs / 8 * usize::from(self.bits), groups * scale, zeros]
    }
}

/// Bytes that a matrix `[out, in]` takes in a native checkpoint: codes, scales and zeros with their padding, and its entry in the table.
/// Where gate and up share a tensor, `form` is [`Form::gate_up`] and the shape that of one of them; the bytes are those of both.
///
/// They add up: an arena with its table has the bytes of its tensors, in whatever order they lie.
pub fn stored_bytes(form: &Form, shape: [usize; 2]) -> u64 {
    (form.bytes(shape).into_iter().map(|part| part.next_multiple_of(ALIGNMENT)).sum::<usize>() + table::ENTRY_BYTES) as u64
}

/// Bytes of one scale.
pub fn scale_bytes(scale: ScaleType) -> usize {
    match scale {
        ScaleType::Bf16 | ScaleType::F16 => 2,
        ScaleType::F32 => 4,
    }
}

/// One matrix, or gate and up of an expert, in the layout.
#[derive(Clone, PartialEq, Debug)]
pub struct Packed {
    /// How.
    pub form: Form,
    /// `[out, in]` without padding, of each matrix.
    pub shape: [usize; 2],
    /// The tiles.
    pub words: Vec<u32>,
    /// `[Np/64, G, 64]`, values of the form's scale type.
    pub scales: Vec<f32>,
    /// As the scales: integers, offsets, or nothing.
    pub zeros: Vec<f32>,
}

impl Packed {
    /// Packs one matrix.
    ///
    /// # Errors
    ///
    /// As [`Form::new`] and [`QuantizedMatrix::check`].
    pub fn new(matrix: &QuantizedMatrix) -> Result<Self> {
        Self::of(&[matrix], Rows::Plain)
    }

    /// Packs gate and up of one expert into one tensor.
    ///
    /// # Errors
    ///
    /// As [`Packed::new`]; [`Error::Holds`] if they differ in shape, width, group, grid or type of scale.
    pub fn gate_up(gate: &QuantizedMatrix, up: &QuantizedMatrix) -> Result<Self> {
        let of = |m: &QuantizedMatrix| (m.outputs, m.inputs, m.bits, m.group, m.scale_type, Grid::of(&m.zeros));
        if of(gate) != of(up) {
            let what = format!("gate {:?} and up {:?} in one tensor; tie them, or keep them apart", of(gate), of(up));
            return Err(Error::Holds { target: "the native layout", what });
        }
        Self::of(&[gate, up], Rows::GateUp)
    }

    fn of(matrices: &[&QuantizedMatrix], rows: Rows) -> Result<Self> {
        matrices.iter().try_for_each(|matrix| matrix.check())?;
        let first = matrices[0];
        let form = Form { rows, ..Form::new(first.bits, first.group, first.scale_type, Grid::of(&first.zeros))? };
        let shape = [first.outputs, first.inputs];
        let codes: Vec<&[u8]> = matrices.iter().map(|m| m.codes.as_slice()).collect();
        let words = words::pack(&form, shape, &codes);
        let scales = by_tile(&form, shape, |which, row, group| matrices[which].scales[row * matrices[which].groups() + group]);
        let zeros = match form.grid {
            Grid::Sym | Grid::Half => Vec::new(),
            Grid::Asym => by_tile(&form, shape, |which, row, group| matrices[which].zero(row, group)),
            Grid::Offset => by_tile(&form, shape, |which, row, group| {
                let matrix = matrices[which];
                -(matrix.zero(row, group) * matrix.scales[row * matrix.groups() + group])
            }),
        };
        Ok(Self { form, shape, words, scales, zeros })
    }

    /// The matrices again: one, or gate and up. Codes, scales and integer zeros are what was packed, bit for bit; a real zero is
    /// `−o / s`.
    ///
    /// # Errors
    ///
    /// As [`QuantizedMatrix::check`], where the words come from a file.
    pub fn unpack(&self) -> Result<Vec<QuantizedMatrix>> {
        let Form { bits, group, scale_type, grid, .. } = self.form;
        let [outputs, inputs] = self.shape;
        let groups = inputs.checked_div(group.len(inputs)).unwrap_or(0);
        let count = if self.form.rows == Rows::GateUp { 2 } else { 1 };
        let codes = words::unpack(&self.form, self.shape, &self.words);
        let gather = |values: &[f32], which: usize| -> Vec<f32> {
            let at = |index: usize| values[self.at(which, index / groups.max(1), index % groups.max(1))];
            (0..outputs * groups).map(at).collect()
        };
        let matrix = |(which, codes): (usize, Vec<u8>)| {
            let scales = gather(&self.scales, which);
            let zeros = match grid {
                Grid::Sym => Zeros::Sym,
                Grid::Half => Zeros::Half,
                Grid::Asym => Zeros::Asym(gather(&self.zeros, which).into_iter().map(|z| z as u8).collect()),
                Grid::Offset => Zeros::Offset(gather(&self.zeros, which).into_iter().zip(&scales).map(|(o, s)| -o / s).collect()),
            };
            let matrix = QuantizedMatrix { outputs, inputs, bits, group, scale_type, codes, scales, zeros };
            matrix.check().map(|()| matrix)
        };
        codes.into_iter().take(count).enumerate().map(matrix).collect()
    }

    /// Scale and stored zero (0 where none is stored) of matrix `which`, one row and group.
    pub fn scale_and_zero(&self, which: usize, row: usize, group: usize) -> (f32, f32) {
        let at = self.at(which, row, group);
        (self.scales[at], self.zeros.get(at).copied().unwrap_or(0.0))
    }

    /// Place of a scale: of matrix `which`, `row`, `group`.
    fn at(&self, which: usize, row: usize, group: usize) -> usize {
        let groups = self.form.groups(self.form.padded(self.shape)[1]);
        let row = packed_row(self.form.rows, which, row);
        (row / TILE_ROWS * groups + group) * TILE_ROWS + row % TILE_ROWS
    }

    /// Scales and zeros as the bytes that stand in an arena.
    pub fn side_bytes(&self) -> [Vec<u8>; 2] {
        let zeros = match self.form.grid {
            Grid::Sym | Grid::Half => Vec::new(),
            Grid::Asym if self.form.bits <= 4 => {
                self.zeros.as_chunks::<2>().0.iter().map(|[low, high]| (*low as u8) | (*high as u8) << 4).collect()
            }
            Grid::Asym => self.zeros.iter().map(|z| *z as u8).collect(),
            Grid::Offset => scales_to_bytes(&self.zeros, self.form.scale_type),
        };
        [scales_to_bytes(&self.scales, self.form.scale_type), zeros]
    }

    /// From the three parts as they stand in an arena.
    ///
    /// # Errors
    ///
    /// [`Error::Table`] if one has not the length that form and shape ask for.
    pub fn from_bytes(form: Form, shape: [usize; 2], [words, scales, zeros]: [&[u8]; 3]) -> Result<Self> {
        let (expected, found) = (form.bytes(shape), [words.len(), scales.len(), zeros.len()]);
        if expected != found {
            return Err(Error::Table {
                what: format!("parts of {found:?} bytes for {shape:?} at {} bits, which takes {expected:?}", form.bits),
            });
        }
        let words = words.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        let zeros = match form.grid {
            Grid::Sym | Grid::Half => Vec::new(),
            Grid::Asym if form.bits <= 4 => zeros.iter().flat_map(|z| [f32::from(z & 15), f32::from(z >> 4)]).collect(),
            Grid::Asym => zeros.iter().map(|z| f32::from(*z)).collect(),
            Grid::Offset => bytes_to_scales(zeros, form.scale_type),
        };
        Ok(Self { form, shape, words, scales: bytes_to_scales(scales, form.scale_type), zeros })
    }
}

/// Row of the packed tensor that holds `row` of matrix `which` (0: the only one, or gate; 1: up).
pub fn packed_row(rows: Rows, which: usize, row: usize) -> usize {
    match rows {
        Rows::Plain => row,
        Rows::GateUp => row / 8 * 16 + which * 8 + row % 8,
    }
}

/// Matrix and row that a row of the packed tensor holds, padding included.
pub fn source_row(rows: Rows, row: usize) -> (usize, usize) {
    match rows {
        Rows::Plain => (0, row),
        Rows::GateUp => (row % 16 / 8, row / 16 * 8 + row % 8),
    }
}

/// `[Np/64, G, 64]` from a value for each matrix, row and group; 0 where there is only padding.
fn by_tile(form: &Form, shape: [usize; 2], value: impl Fn(usize, usize, usize) -> f32) -> Vec<f32> {
    let [rows, inputs] = form.padded(shape);
    let groups = form.groups(inputs);
    let real = shape[1].checked_div(form.group.len(shape[1])).unwrap_or(0);
    let mut found = vec![0.0; rows * groups];
    for (index, found) in found.iter_mut().enumerate() {
        let (tile, group, within) = (index / (groups * TILE_ROWS), index / TILE_ROWS % groups, index % TILE_ROWS);
        let (which, row) = source_row(form.rows, tile * TILE_ROWS + within);
        if row < shape[0] && group < real {
            *found = value(which, row, group);
        }
    }
    found
}

fn scales_to_bytes(values: &[f32], stored: ScaleType) -> Vec<u8> {
    match stored {
        ScaleType::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        ScaleType::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        ScaleType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn bytes_to_scales(bytes: &[u8], stored: ScaleType) -> Vec<f32> {
    match stored {
        ScaleType::Bf16 => bytes.as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        ScaleType::F16 => bytes.as_chunks().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f32()).collect(),
        ScaleType::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}

#[cfg(test)]
mod tests;

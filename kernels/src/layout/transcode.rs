//! Codes to and from the dense LSB-first streams of compressed-tensors, GPTQ and MLX: the same bits in another order, so nothing is lost.
//!
//! A grid that the target has no room for is refused by name. Scales stay `f32` values of their stored type.

use crate::{Error, Group, QuantizedMatrix, Result, ScaleType, Zeros, pack};

/// Whether GPTQ's stored zeros are one less than what they mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZeroForm {
    /// `gptq`: `z − 1` is stored.
    V1,
    /// `gptq_v2`: `z` is stored.
    V2,
}

/// A matrix as GPTQ stores it, transposed.
#[derive(Clone, PartialEq, Debug)]
pub struct Gptq {
    /// `[K·b/32, N]`: a stream down the inputs of each output.
    pub qweight: Vec<u32>,
    /// `[K/g, N·b/32]`: a stream along the outputs of each group.
    pub qzeros: Vec<u32>,
    /// `[K/g, N]`.
    pub scales: Vec<f32>,
}

/// A matrix as compressed-tensors packs it.
#[derive(Clone, PartialEq, Debug)]
pub struct CompressedTensors {
    /// `[N, K·b/32]`.
    pub packed: Vec<u32>,
    /// `[N, K/g]`.
    pub scales: Vec<f32>,
    /// `[N·b/32, K/g]`, where zeros are integers.
    pub zeros: Option<Vec<u32>>,
}

/// A matrix as MLX stores it: `w = q · scale + bias`.
#[derive(Clone, PartialEq, Debug)]
pub struct Mlx {
    /// `[N, K·b/32]`.
    pub weight: Vec<u32>,
    /// `[N, K/g]`.
    pub scales: Vec<f32>,
    /// `[N, K/g]`, of the scales' type.
    pub biases: Vec<f32>,
}

/// What a stream does not say of its matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Meta {
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Bits a code.
    pub bits: u8,
    /// Inputs a scale.
    pub group: Group,
    /// The scales' stored type.
    pub scale_type: ScaleType,
}

impl Meta {
    fn matrix(self, codes: Vec<u8>, scales: Vec<f32>, zeros: Zeros) -> Result<QuantizedMatrix> {
        let [outputs, inputs] = self.shape;
        let (bits, group, scale_type) = (self.bits, self.group, self.scale_type);
        let matrix = QuantizedMatrix { outputs, inputs, bits, group, scale_type, codes, scales, zeros };
        matrix.check().map(|()| matrix)
    }

    fn groups(&self) -> usize {
        self.shape[1].checked_div(self.group.len(self.shape[1])).unwrap_or(0)
    }
}

fn refuse<T>(target: &'static str, what: impl Into<String>) -> Result<T> {
    Err(Error::Holds { target, what: what.into() })
}

/// The integer zeros of a matrix, `[out, groups]`; refused where they are none.
fn integer_zeros(matrix: &QuantizedMatrix, target: &'static str) -> Result<Vec<u8>> {
    match &matrix.zeros {
        Zeros::Sym => Ok(vec![1 << (matrix.bits - 1); matrix.outputs * matrix.groups()]),
        Zeros::Asym(zeros) => Ok(zeros.clone()),
        Zeros::Half => refuse(target, "the grid half: its zero lies between two codes"),
        Zeros::Offset(_) => refuse(target, "the grid offset: its zeros are real numbers"),
    }
}

fn transposed<T: Copy + Default>(values: &[T], [rows, columns]: [usize; 2]) -> Vec<T> {
    let mut turned = vec![T::default(); values.len()];
    for (index, value) in values.iter().enumerate() {
        turned[index % columns * rows + index / columns] = *value;
    }
    turned
}

/// As GPTQ stores it.
///
/// # Errors
///
/// [`Error::Holds`] for the grids half and offset, for widths other than 2, 3, 4 and 8, for sides that end inside a word, and in v1 for a
/// zero of 0, which would be stored as −1.
pub fn to_gptq(matrix: &QuantizedMatrix, form: ZeroForm) -> Result<Gptq> {
    matrix.check()?;
    let target = if form == ZeroForm::V1 { "GPTQ v1" } else { "GPTQ v2" };
    let (bits, shape) = (matrix.bits, [matrix.outputs, matrix.inputs]);
    if ![2, 3, 4, 8].contains(&bits) {
        return refuse(target, format!("{bits} bits; it has 2, 3, 4 and 8"));
    }
    if let Some(side) = shape.into_iter().find(|side| !(side * usize::from(bits)).is_multiple_of(32)) {
        return refuse(target, format!("a side of {side} codes of {bits} bits, which ends inside a word"));
    }
    let mut zeros = integer_zeros(matrix, target)?;
    if form == ZeroForm::V1 {
        if zeros.contains(&0) {
            return refuse(target, "a zero point of 0, which it would store as -1; use gptq_v2");
        }
        zeros.iter_mut().for_each(|zero| *zero -= 1);
    }
    let by_group = [matrix.outputs, matrix.groups()];
    Ok(Gptq {
        qweight: transposed(&pack::pack_rows(&matrix.codes, shape, bits)?, [shape[0], pack::words(shape[1], bits)]),
        qzeros: pack::pack_rows(&transposed(&zeros, by_group), [by_group[1], by_group[0]], bits)?,
        scales: transposed(&matrix.scales, by_group),
    })
}

/// Reads what [`to_gptq`] wrote; zeros that are all in the middle make the grid `sym`.
///
/// # Errors
///
/// [`Error::Length`], and as [`QuantizedMatrix::check`].
pub fn from_gptq(stored: &Gptq, meta: Meta, form: ZeroForm) -> Result<QuantizedMatrix> {
    let ([outputs, inputs], groups, bits) = (meta.shape, meta.groups(), meta.bits);
    let codes = pack::unpack_columns(&stored.qweight, [inputs, outputs], bits)?;
    let mut zeros = pack::unpack_rows(&stored.qzeros, [groups, outputs], bits)?;
    if form == ZeroForm::V1 {
        // 2^b − 1 means 0: what v1 wraps.
        zeros.iter_mut().for_each(|zero| *zero = (*zero + 1) & (u8::MAX >> (8 - bits)));
    }
    let middle = zeros.iter().all(|&zero| zero == 1 << (bits - 1));
    let zeros = if middle { Zeros::Sym } else { Zeros::Asym(transposed(&zeros, [groups, outputs])) };
    meta.matrix(transposed(&codes, [inputs, outputs]), transposed(&stored.scales, [groups, outputs]), zeros)
}

/// As compressed-tensors packs it (0.18 and later).
///
/// # Errors
///
/// [`Error::Holds`] for the grids half and offset.
pub fn to_compressed_tensors(matrix: &QuantizedMatrix) -> Result<CompressedTensors> {
    matrix.check()?;
    let zeros = integer_zeros(matrix, "compressed-tensors")?;
    let by_group = [matrix.outputs, matrix.groups()];
    let stored = matches!(matrix.zeros, Zeros::Asym(_));
    Ok(CompressedTensors {
        packed: pack::pack_rows(&matrix.codes, [matrix.outputs, matrix.inputs], matrix.bits)?,
        scales: matrix.scales.clone(),
        zeros: stored.then(|| pack::pack_columns(&zeros, by_group, matrix.bits)).transpose()?,
    })
}

/// Reads what [`to_compressed_tensors`] wrote.
///
/// # Errors
///
/// As [`from_gptq`].
pub fn from_compressed_tensors(stored: &CompressedTensors, meta: Meta) -> Result<QuantizedMatrix> {
    let codes = pack::unpack_rows(&stored.packed, meta.shape, meta.bits)?;
    let by_group = [meta.shape[0], meta.groups()];
    let zeros = stored.zeros.as_ref().map(|words| pack::unpack_columns(words, by_group, meta.bits)).transpose()?;
    meta.matrix(codes, stored.scales.clone(), zeros.map_or(Zeros::Sym, Zeros::Asym))
}

/// As MLX stores it.
///
/// # Errors
///
/// [`Error::Holds`] for other widths and groups than it has, and where `−z · s` is no number of the scales' type.
pub fn to_mlx(matrix: &QuantizedMatrix) -> Result<Mlx> {
    const TARGET: &str = "MLX";
    matrix.check()?;
    if ![2, 3, 4, 5, 6, 8].contains(&matrix.bits) {
        return refuse(TARGET, format!("{} bits; it has 2, 3, 4, 5, 6 and 8", matrix.bits));
    }
    if !matches!(matrix.group, Group::Size(32 | 64 | 128)) {
        return refuse(TARGET, format!("{:?}; it has groups of 32, 64 and 128", matrix.group));
    }
    let groups = matrix.groups();
    let bias = |(index, scale): (usize, &f32)| {
        let (row, group) = (index / groups, index % groups);
        let exact = -(f64::from(matrix.zero(row, group)) * f64::from(*scale));
        let bias = exact as f32;
        if f64::from(bias) != exact || matrix.scale_type.round(bias) != bias {
            return refuse(TARGET, format!("the offset {exact} of row {row}, group {group}: it is no {:?}", matrix.scale_type));
        }
        Ok(bias)
    };
    Ok(Mlx {
        weight: pack::pack_rows(&matrix.codes, [matrix.outputs, matrix.inputs], matrix.bits)?,
        scales: matrix.scales.clone(),
        biases: matrix.scales.iter().enumerate().map(bias).collect::<Result<_>>()?,
    })
}

/// Reads what [`to_mlx`] wrote: the grid is the simplest that has these zeros.
///
/// # Errors
///
/// As [`from_gptq`].
pub fn from_mlx(stored: &Mlx, meta: Meta) -> Result<QuantizedMatrix> {
    let codes = pack::unpack_rows(&stored.weight, meta.shape, meta.bits)?;
    let zeros: Vec<f32> = stored.biases.iter().zip(&stored.scales).map(|(bias, scale)| -bias / scale).collect();
    let top = f32::from(u8::MAX >> (8 - meta.bits));
    let all = |zero: f32| zeros.iter().all(|&z| z == zero);
    let zeros = if all((top + 1.0) / 2.0) {
        Zeros::Sym
    } else if all(top / 2.0) {
        Zeros::Half
    } else if zeros.iter().all(|z| z.fract() == 0.0 && (0.0..=top).contains(z)) {
        Zeros::Asym(zeros.iter().map(|&z| z as u8).collect())
    } else {
        Zeros::Offset(zeros)
    };
    meta.matrix(codes, stored.scales.clone(), zeros)
}

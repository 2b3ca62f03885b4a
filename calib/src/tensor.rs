//! Element types as safetensors names them, and their values to and from f32.
//!
//! Bytes are little-endian and may start anywhere: every value is copied out of its bytes, no pointer is cast, because a tensor in the
//! middle of a file need not be aligned. Writing rounds to nearest, ties to even.

use std::fmt;

use half::{bf16, f16};

/// The type of a stored element.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Dtype {
    /// A truth value, one byte.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Float of 4 exponent and 3 mantissa bits, no infinity, largest 448.
    F8E4m3,
    /// Float of 5 exponent and 2 mantissa bits, largest 57344.
    F8E5m2,
    /// A power of two, `2^(e − 127)`: a scale.
    F8E8m0,
    /// Unsigned, 16 bits.
    U16,
    /// Signed, 16 bits.
    I16,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 32 bits.
    I32,
    /// IEEE single precision.
    F32,
    /// Unsigned, 64 bits.
    U64,
    /// Signed, 64 bits.
    I64,
    /// IEEE double precision.
    F64,
}

impl Dtype {
    /// The type that a tensor of this one is made anew in: FP8, whose blocks have scales of their own, becomes bf16.
    #[must_use]
    pub fn anew(self) -> Self {
        match self {
            Self::F32 | Self::F16 => self,
            _ => Self::Bf16,
        }
    }

    /// Every type that this program reads.
    pub const ALL: [Self; 16] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::F8E4m3,
        Self::F8E5m2,
        Self::F8E8m0,
        Self::U16,
        Self::I16,
        Self::F16,
        Self::Bf16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// Its name in a safetensors header.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E4m3 => "F8_E4M3",
            Self::F8E5m2 => "F8_E5M2",
            Self::F8E8m0 => "F8_E8M0",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::F32 => "F32",
            Self::U64 => "U64",
            Self::I64 => "I64",
            Self::F64 => "F64",
        }
    }

    /// The type of a name in a safetensors header, if this program reads it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes an element takes.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4m3 | Self::F8E5m2 | Self::F8E8m0 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// Whether its values are real numbers, so that [`decode`] reads them.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(self, Self::F8E4m3 | Self::F8E5m2 | Self::F8E8m0 | Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }

    /// Bytes a tensor of this shape takes; `None` past 2⁶⁴.
    #[must_use]
    pub fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        shape.iter().try_fold(self.size() as u64, |product, &side| product.checked_mul(side as u64))
    }

    /// The same type in the safetensors crate's words.
    pub(crate) fn in_safetensors(self) -> safetensors::Dtype {
        match self {
            Self::Bool => safetensors::Dtype::BOOL,
            Self::U8 => safetensors::Dtype::U8,
            Self::I8 => safetensors::Dtype::I8,
            Self::F8E4m3 => safetensors::Dtype::F8_E4M3,
            Self::F8E5m2 => safetensors::Dtype::F8_E5M2,
            Self::F8E8m0 => safetensors::Dtype::F8_E8M0,
            Self::U16 => safetensors::Dtype::U16,
            Self::I16 => safetensors::Dtype::I16,
            Self::F16 => safetensors::Dtype::F16,
            Self::Bf16 => safetensors::Dtype::BF16,
            Self::U32 => safetensors::Dtype::U32,
            Self::I32 => safetensors::Dtype::I32,
            Self::F32 => safetensors::Dtype::F32,
            Self::U64 => safetensors::Dtype::U64,
            Self::I64 => safetensors::Dtype::I64,
            Self::F64 => safetensors::Dtype::F64,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Reads float values of any type into f32; `None` if the type is no float.
///
/// Exact but for F64, which is rounded. NaN and infinities come through: see [`first_not_finite`]. Bytes past the last whole element
/// are not read.
#[must_use]
pub fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F8E4m3 => bytes.iter().map(|&byte| E4M3[usize::from(byte)]).collect(),
        Dtype::F8E5m2 => bytes.iter().map(|&byte| E5M2[usize::from(byte)]).collect(),
        Dtype::F8E8m0 => bytes.iter().map(|&byte| e8m0(byte)).collect(),
        Dtype::F16 => elements(bytes, |x| f16::from_le_bytes(x).to_f32()),
        Dtype::Bf16 => elements(bytes, |x: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16)),
        Dtype::F32 => elements(bytes, f32::from_le_bytes),
        Dtype::F64 => elements(bytes, |x| f64::from_le_bytes(x) as f32),
        _ => return None,
    })
}

/// Writes f32 values as a float type, rounding to nearest even; `None` if the type is no float or is a scale (`F8_E8M0`).
///
/// What is too large becomes infinity, or NaN in F8_E4M3, which has none, so that it is found when it is read. PyTorch's casts give the
/// same bytes, but that 2.14 saturates F8_E4M3 at 448: clamp before where that is wanted.
#[must_use]
pub fn encode(dtype: Dtype, values: &[f32]) -> Option<Vec<u8>> {
    Some(match dtype {
        Dtype::F8E4m3 => values.iter().map(|&x| to_f8(x, F8 { mantissa: 3, least: -6, over: 0x7f, nan: 0x7f })).collect(),
        Dtype::F8E5m2 => values.iter().map(|&x| to_f8(x, F8 { mantissa: 2, least: -14, over: 0x7c, nan: 0x7f })).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|&x| x.to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
        _ => return None,
    })
}

/// Position of the first NaN or infinity.
#[must_use]
pub fn first_not_finite(values: &[f32]) -> Option<usize> {
    // A maximum over a run is compiled to vector code, a search that may stop at each element is not.
    const RUN: usize = 4096;
    let run = values.chunks(RUN).position(|run| run.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)) >= 0x7f80_0000)?;
    values[run * RUN..].iter().position(|x| !x.is_finite()).map(|at| run * RUN + at)
}

/// One value an element of `N` bytes.
fn elements<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|&element| value(element)).collect()
}

/// A float of 8 bits: how many of them are mantissa, the exponent of its smallest normal number, and two of its codes.
struct F8 {
    mantissa: i32,
    least: i32,
    /// The code from which on a magnitude is too large.
    over: u32,
    nan: u8,
}

/// Rounds to nearest even.
///
/// A number of exponent `e` is a whole number `n` of steps `2^(max(e, least) − mantissa)`; adding `n` to the exponent field carries by
/// itself, both out of the subnormal numbers and into the next exponent.
fn to_f8(x: f32, format: F8) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | format.nan;
    }
    let exponent = ((x.to_bits() >> 23) & 0xff) as i32 - 127;
    let exponent = exponent.max(format.least);
    let steps = (f64::from(x.abs()) * 2f64.powi(format.mantissa - exponent)).round_ties_even() as u32;
    let code = (((exponent - format.least) as u32) << format.mantissa).saturating_add(steps);
    sign | code.min(format.over) as u8
}

/// All values of F8_E4M3.
static E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = from_e4m3(code as u8);
        code += 1;
    }
    table
};

/// All values of F8_E5M2, which is the upper half of an f16.
static E5M2: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = f16::from_bits((code as u16) << 8).to_f32_const();
        code += 1;
    }
    table
};

/// A value of F8_E4M3: bias 7, and the all-ones code is NaN.
const fn from_e4m3(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = (code >> 3) & 0xf;
    let mantissa = code & 7;
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    if exponent == 0 {
        // Steps of 2^-9.
        return sign * mantissa as f32 * f32::from_bits((127 - 9) << 23);
    }
    sign * (8 + mantissa) as f32 * f32::from_bits((exponent as u32 + 127 - 7 - 3) << 23)
}

/// A value of F8_E8M0; 255 is NaN, and 0 is 2^-127, a subnormal f32.
fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_and_sizes_are_the_crates() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.name(), dtype.in_safetensors().to_string());
            assert_eq!(dtype.size() * 8, dtype.in_safetensors().bitsize());
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("F4"), None);
    }

    #[test]
    fn values_by_hand() {
        // 0x38 is exponent 7 − 7 = 0, mantissa 0; 0x7e is 2^8 · 1.75; 0x01 is 2^-9.
        assert_eq!(decode(Dtype::F8E4m3, &[0x38, 0xb8, 0x7e, 0x01]), Some(vec![1.0, -1.0, 448.0, 2f32.powi(-9)]));
        // 0x3c is 2^0; 0x7b is 2^15 · 1.75; 0x01 is 2^-16.
        assert_eq!(decode(Dtype::F8E5m2, &[0x3c, 0x7b, 0x01]), Some(vec![1.0, 57344.0, 2f32.powi(-16)]));
        assert_eq!(decode(Dtype::F8E8m0, &[127, 130, 0]), Some(vec![1.0, 8.0, 2f32.powi(-127)]));
        assert_eq!(decode(Dtype::Bf16, &[0x80, 0x3f, 0x20, 0xc1]), Some(vec![1.0, -10.0]));
        assert_eq!(decode(Dtype::F16, &[0x00, 0x3c, 0x01, 0x00]), Some(vec![1.0, 2f32.powi(-24)]));
        assert_eq!(decode(Dtype::F64, &1.5f64.to_le_bytes()), Some(vec![1.5]));
        assert_eq!(decode(Dtype::I32, &[0; 4]), None);
        assert_eq!(encode(Dtype::F8E8m0, &[1.0]), None);
    }

    #[test]
    fn ties_go_to_the_even_code() {
        // Between 16 (code 0x58) and 18 (0x59) lies 17, between 18 and 20 (0x5a) 19.
        assert_eq!(encode(Dtype::F8E4m3, &[17.0, 19.0, -17.0, 17.1]), Some(vec![0x58, 0x5a, 0xd8, 0x59]));
        // Half of the smallest step goes to 0, three halves to 2; below the smallest normal number rounding carries into it.
        let step = 2f32.powi(-9);
        assert_eq!(encode(Dtype::F8E4m3, &[0.5 * step, 1.5 * step, 7.6 * step]), Some(vec![0, 2, 8]));
        // 464 is the tie between 448 and what would be 480.
        assert_eq!(encode(Dtype::F8E4m3, &[464.0, 465.0, f32::INFINITY, f32::NAN]), Some(vec![0x7e, 0x7f, 0x7f, 0x7f]));
        assert_eq!(encode(Dtype::F8E5m2, &[61439.0, 61440.0, f32::NEG_INFINITY]), Some(vec![0x7b, 0x7c, 0xfc]));
        // bf16 keeps 8 bits: 1 + 2^-8 is the tie under 1 + 2^-7.
        let tie = 1.0 + 2f32.powi(-8);
        assert_eq!(encode(Dtype::Bf16, &[tie, tie + 2f32.powi(-7)]), Some(vec![0x80, 0x3f, 0x82, 0x3f]));
    }

    #[test]
    fn every_code_comes_back() {
        for dtype in [Dtype::F8E4m3, Dtype::F8E5m2] {
            for code in 0..=255u8 {
                let value = decode(dtype, &[code]).unwrap();
                let back = encode(dtype, &value).unwrap();
                assert!(value[0].is_nan() || back == [code], "{dtype} {code:#x}: {value:?} became {back:?}");
            }
        }
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for code in 0..=u16::MAX {
                let value = decode(dtype, &code.to_le_bytes()).unwrap();
                assert!(value[0].is_nan() || encode(dtype, &value).unwrap() == code.to_le_bytes(), "{dtype} {code:#x}");
            }
        }
    }

    #[test]
    fn bytes_may_start_anywhere() {
        let mut bytes = vec![0];
        bytes.extend(encode(Dtype::F32, &[1.0, -2.5]).unwrap());
        assert_eq!(decode(Dtype::F32, &bytes[1..]), Some(vec![1.0, -2.5]));
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_found() {
        let mut values = vec![f32::MAX; 10_000];
        assert_eq!(first_not_finite(&values), None);
        values[9_999] = f32::NAN;
        assert_eq!(first_not_finite(&values), Some(9_999));
        values[5_000] = f32::NEG_INFINITY;
        assert_eq!(first_not_finite(&values), Some(5_000));
        assert_eq!(first_not_finite(&[]), None);
    }

    proptest! {
        #[test]
        fn f8_is_the_nearest(x in -448f32..448.0, shrink in -40i32..1) {
            let x = x * 2f32.powi(shrink);
            for dtype in [Dtype::F8E4m3, Dtype::F8E5m2] {
                let rounded = decode(dtype, &encode(dtype, &[x]).unwrap()).unwrap()[0];
                let all: Vec<u8> = (0..=255).collect();
                let nearest = decode(dtype, &all).unwrap().iter().map(|y| (f64::from(x) - f64::from(*y)).abs()).filter(|d| !d.is_nan()).fold(f64::MAX, f64::min);
                prop_assert_eq!((f64::from(x) - f64::from(rounded)).abs(), nearest);
            }
        }
    }
}

//! A quantized matrix: codes, scales, zero points, group. Not yet packed.
//!
//! One convention throughout: stored codes `u` are unsigned, `0 ..= 2^bits − 1`, and `w = (u − z) · s`.

use crate::{Error, Result};

/// Inputs that share one scale.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Every run of this many inputs.
    Size(usize),
    /// All inputs of a row.
    PerChannel,
}

impl Group {
    /// Inputs a group, in a matrix of `inputs` inputs.
    pub fn len(self, inputs: usize) -> usize {
        match self {
            Self::Size(size) => size,
            Self::PerChannel => inputs,
        }
    }
}

/// Where zero lies between the codes.
#[derive(Clone, PartialEq, Debug)]
pub enum Zeros {
    /// `z = 2^(bits−1)`: symmetric, nothing stored.
    Sym,
    /// `z = (2^bits − 1) / 2`: half-integer, nothing stored.
    Half,
    /// An integer zero a group, an unsigned code like the weights', `[out, groups]`.
    Asym(Vec<u8>),
    /// A real zero a group, `[out, groups]`.
    Offset(Vec<f32>),
}

/// The stored type of scales. Scales are rounded to it before codes are chosen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl ScaleType {
    /// The nearest value that this type can store.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::Bf16 => half::bf16::from_f32(x).to_f32(),
            Self::F16 => half::f16::from_f32(x).to_f32(),
            Self::F32 => x,
        }
    }
}

/// Codes, scales and zero points of one Linear matrix.
#[derive(Clone, PartialEq, Debug)]
pub struct QuantizedMatrix {
    /// Output features.
    pub outputs: usize,
    /// Input features.
    pub inputs: usize,
    /// Bits a code, 1 to 8.
    pub bits: u8,
    /// Inputs that share a scale.
    pub group: Group,
    /// The type that scales are stored in; `scales` hold values of this type.
    pub scale_type: ScaleType,
    /// Unsigned codes, `[out, in]`.
    pub codes: Vec<u8>,
    /// Scales, `[out, groups]`.
    pub scales: Vec<f32>,
    /// Zero points.
    pub zeros: Zeros,
}

impl QuantizedMatrix {
    /// Inputs a group.
    pub fn group_len(&self) -> usize {
        self.group.len(self.inputs)
    }

    /// Groups a row; 0 without inputs.
    pub fn groups(&self) -> usize {
        self.inputs.checked_div(self.group_len()).unwrap_or(0)
    }

    /// Holds the parts to one another: lengths, codes within their width, scales finite, positive and of their type.
    ///
    /// # Errors
    ///
    /// The first thing that does not hold, with its place.
    pub fn check(&self) -> Result<()> {
        if !(1..=8).contains(&self.bits) {
            return Err(Error::Bits { bits: self.bits });
        }
        let (rows, groups) = (self.outputs, self.groups());
        if groups * self.group_len() != self.inputs {
            return Err(Error::Group { group: self.group_len(), inputs: self.inputs });
        }
        let length = |what, found, columns| {
            let expected = rows * columns;
            if found == expected { Ok(()) } else { Err(Error::Length { what, rows, columns, expected, found }) }
        };
        length("codes", self.codes.len(), self.inputs)?;
        length("scales", self.scales.len(), groups)?;
        let fits = |code: &u8| u16::from(*code) >> self.bits == 0;
        let misfit = |codes: &[u8], columns: usize| match codes.iter().position(|code| !fits(code)) {
            Some(at) => Err(Error::Code { code: codes[at], row: at / columns, column: at % columns, bits: self.bits }),
            None => Ok(()),
        };
        misfit(&self.codes, self.inputs)?;
        let of_its_type = |&s: &f32| s.is_finite() && s > 0.0 && self.scale_type.round(s) == s;
        if let Some(at) = self.scales.iter().position(|scale| !of_its_type(scale)) {
            return Err(Error::Scale { scale: self.scales[at], row: at / groups, group: at % groups, scale_type: self.scale_type });
        }
        match &self.zeros {
            Zeros::Sym | Zeros::Half => Ok(()),
            Zeros::Asym(zeros) => length("zero points", zeros.len(), groups).and_then(|()| misfit(zeros, groups)),
            Zeros::Offset(zeros) => {
                length("zero points", zeros.len(), groups)?;
                match zeros.iter().position(|zero| !zero.is_finite()) {
                    Some(at) => Err(Error::Zero { zero: zeros[at], row: at / groups, group: at % groups }),
                    None => Ok(()),
                }
            }
        }
    }

    /// The zero point of one group of one row, in codes.
    pub fn zero(&self, output: usize, group: usize) -> f32 {
        match &self.zeros {
            Zeros::Sym => f32::from(1u16 << (self.bits - 1)),
            Zeros::Half => (f32::from(1u16 << self.bits) - 1.0) / 2.0,
            Zeros::Asym(z) => f32::from(z[output * self.groups() + group]),
            Zeros::Offset(z) => z[output * self.groups() + group],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> QuantizedMatrix {
        QuantizedMatrix {
            outputs: 2,
            inputs: 4,
            bits: 3,
            group: Group::Size(2),
            scale_type: ScaleType::Bf16,
            codes: vec![0, 7, 1, 2, 3, 4, 5, 6],
            scales: vec![0.5, 1.0, 2.0, 4.0],
            zeros: Zeros::Asym(vec![0, 7, 3, 4]),
        }
    }

    #[test]
    fn parts_that_agree_pass() {
        matrix().check().unwrap();
        assert_eq!((matrix().groups(), matrix().zero(1, 0)), (2, 3.0));
        QuantizedMatrix { outputs: 0, codes: vec![], scales: vec![], zeros: Zeros::Half, ..matrix() }.check().unwrap();
    }

    #[test]
    fn each_part_that_does_not_hold_is_named() {
        let refused = |change: fn(&mut QuantizedMatrix), words: &str| {
            let mut matrix = matrix();
            change(&mut matrix);
            let said = matrix.check().unwrap_err().to_string();
            assert!(said.contains(words), "{said}");
        };
        refused(|m| m.bits = 9, "9 bits");
        refused(|m| m.group = Group::Size(3), "groups of 3 do not divide 4 inputs");
        refused(|m| m.codes.truncate(7), "codes: 7 values for 2 x 4");
        refused(|m| m.scales.push(1.0), "scales: 5 values for 2 x 2");
        refused(|m| m.codes[6] = 8, "code 8 at row 1, column 2");
        refused(|m| m.scales[3] = f32::INFINITY, "scale inf of row 1, group 1");
        refused(|m| m.scales[0] = 1.001, "scale 1.001 of row 0, group 0");
        refused(|m| m.zeros = Zeros::Asym(vec![0, 9, 0, 0]), "code 9 at row 0, column 1");
        refused(|m| m.zeros = Zeros::Offset(vec![0.0, 0.5, f32::NAN, 0.0]), "zero point NaN of row 1, group 0");
    }
}

//! A quantized matrix: codes, scales, zero points, group. Not yet packed.
//!
//! One convention throughout: stored codes `u` are unsigned, `0 ..= 2^bits − 1`, and `w = (u − z) · s`.

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

    /// Groups a row.
    pub fn groups(&self) -> usize {
        self.inputs / self.group_len()
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

//! Packed weights: what they are and their arithmetic.
//!
//! A [`QuantizedMatrix`] holds unsigned codes with scales and zero points; [`pack`] turns codes into words of a layout and
//! back; [`layout`] is the tiled layout that this project's own kernels read; [`dequant`] is the definition of what codes mean;
//! [`emit`] writes the kernels of a checkpoint, [`nvrtc`] compiles them where it can; [`cpu`] multiplies by packed matrices without expanding them; [`bounds`] says how far apart two of them may be.

#[doc(hidden)]
pub mod bounds;
pub mod cpu;
pub mod dequant;
pub mod emit;
mod error;
pub mod layout;
pub mod nvrtc;
pub mod pack;
mod quantized;
pub mod simd;

pub use error::{Error, Result};
pub use quantized::{Group, QuantizedMatrix, ScaleType, Zeros};

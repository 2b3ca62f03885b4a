//! Packed weights: what they are and their arithmetic.
//!
//! A [`QuantizedMatrix`] holds unsigned codes with scales and zero points; [`pack`] turns codes into words of a layout and
//! back; [`dequant`] is the definition of what they mean; [`bounds`] says how far apart two of them may be.

#[doc(hidden)]
pub mod bounds;
pub mod dequant;
mod error;
pub mod pack;
mod quantized;
pub mod simd;

pub use error::{Error, Result};
pub use quantized::{Group, QuantizedMatrix, ScaleType, Zeros};

//! Packed weights: what they are and their arithmetic.
//!
//! A [`QuantizedMatrix`] holds unsigned codes with scales and zero points; [`pack`] turns codes into words of a layout and
//! back; [`dequant`] is the definition of what they mean.

mod quantized;

pub use quantized::{Group, QuantizedMatrix, ScaleType, Zeros};

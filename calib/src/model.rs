//! A checkpoint seen through its family.

/// placeholder
pub struct Model;

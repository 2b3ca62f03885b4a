//! .
pub mod allocate;

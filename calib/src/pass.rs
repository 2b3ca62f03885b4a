//! The calibration pass.

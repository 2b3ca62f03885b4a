//! Calibration samples.

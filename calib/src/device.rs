//! Which backend a run uses.

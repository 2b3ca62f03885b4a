//! Headers, index and tensors by name.

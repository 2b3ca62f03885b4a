//! How samples are chosen.

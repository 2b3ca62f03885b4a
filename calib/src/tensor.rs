//! Conversions between stored and computed values.

//! What can be wrong with codes, scales or packed words.

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: what, where, the numbers, what to do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // ---- pack ----
    /// A width that no code has.
    #[error("{bits} bits a code: a code has 1 to 8 bits")]
    Bits {
        /// The width asked for.
        bits: u8,
    },

    /// A buffer whose length contradicts the shape that came with it.
    #[error("{what}: {found} values for {rows} x {columns}, which takes {expected}; the buffer and the shape are not of one matrix")]
    Length {
        /// What was counted.
        what: &'static str,
        /// Rows of the shape.
        rows: usize,
        /// Columns of the shape.
        columns: usize,
        /// Values that the shape takes.
        expected: usize,
        /// Values found.
        found: usize,
    },

    /// A code that does not fit its width.
    #[error("code {code} at row {row}, column {column} does not fit {bits} bits (at most {})", (1u16 << bits) - 1)]
    Code {
        /// The code.
        code: u8,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
        /// The width.
        bits: u8,
    },

    // ---- quantized ----
    /// A group size that does not divide the inputs.
    #[error("groups of {group} do not divide {inputs} inputs")]
    Group {
        /// Inputs a group.
        group: usize,
        /// Inputs of the matrix.
        inputs: usize,
    },

    /// A scale that no consumer can use.
    #[error("scale {scale} of row {row}, group {group}: a scale is finite, positive and of its stored type ({scale_type:?})")]
    Scale {
        /// The scale.
        scale: f32,
        /// Its row.
        row: usize,
        /// Its group.
        group: usize,
        /// The type that it is stored in.
        scale_type: crate::ScaleType,
    },

    /// A real zero point that is not a number.
    #[error("zero point {zero} of row {row}, group {group} is not finite")]
    Zero {
        /// The zero point.
        zero: f32,
        /// Its row.
        row: usize,
        /// Its group.
        group: usize,
    },

    // ---- layout ----
    /// Something that a format has no room for.
    #[error("{target} does not hold {what}")]
    Holds {
        /// The format.
        target: &'static str,
        /// What it does not hold, and what it does.
        what: String,
    },

    /// An expert table or an arena that contradicts itself or its shape.
    #[error("expert table: {what}")]
    Table {
        /// What is wrong, with its numbers.
        what: String,
    },

    // ---- nvrtc ----
    /// NVRTC, or what is taken for it, does not do what it is asked for.
    #[error("{} {what}", path.display())]
    Nvrtc {
        /// The library.
        path: std::path::PathBuf,
        /// What it does not do, with its own words.
        what: String,
    },
}

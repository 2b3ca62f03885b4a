//! What can go wrong while a recipe is read, a plan is made or a model is changed.

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: what, where, the numbers, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading, running or measuring a model failed.
    #[error(transparent)]
    Calib(#[from] calib::Error),

    // ---- quantize ----
    /// Codes, scales or packed words that do not hold together.
    #[error(transparent)]
    Codes(#[from] kernels::Error),

    /// A weight that no scale can hold.
    #[error("weight {value} at row {row}, column {column} is not finite; nothing can be quantized around it")]
    WeightNotFinite {
        /// The weight.
        value: f32,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
    },

    /// A group that does not fit a matrix.
    #[error("groups of {group} do not divide {inputs} inputs; choose a divisor, such as {nearest}, or one group a channel")]
    GroupSize {
        /// Inputs a group.
        group: usize,
        /// Inputs of the matrix.
        inputs: usize,
        /// The nearest divisor.
        nearest: usize,
    },

    /// A width that a grid does not have.
    #[error("{bits} bits on the grid {grid:?}: it has {} to 8 bits{}", grid.fewest_bits(), grid.hint())]
    GridBits {
        /// Bits a code.
        bits: u8,
        /// The grid.
        grid: crate::quantize::Grid,
    },

    /// A grid without a zero point for a method that fits one.
    #[error("hqq fits a zero point, which the grid {grid:?} does not have; use it on the grids asym or offset")]
    HqqGrid {
        /// The grid.
        grid: crate::quantize::Grid,
    },

    /// A group whose scale its stored type does not reach.
    #[error("row {row}, group {group}: its weights need a scale of {scale}, which {scale_type:?} does not hold; store scales as bf16")]
    ScaleOverflow {
        /// The scale.
        scale: f32,
        /// The row.
        row: usize,
        /// The group.
        group: usize,
        /// The stored type.
        scale_type: kernels::ScaleType,
    },

    /// A second moment of other inputs than the matrix has.
    #[error("a second moment of {moment} inputs does not fit a matrix of {inputs}")]
    MomentSize {
        /// Inputs of the moment.
        moment: usize,
        /// Inputs of the matrix.
        inputs: usize,
    },

    /// A second moment with an infinity or NaN in it.
    #[error("the second moment of inputs {row} and {column} is {value}: an activation overflowed in the calibration pass")]
    MomentNotFinite {
        /// The value.
        value: f32,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
    },

    /// A second moment of nothing.
    #[error("the second moment is zero: no token reached this matrix; round it to nearest instead")]
    NoTokens,

    /// A second moment that damping does not mend.
    #[error("not positive definite even with damping of {damping} times the mean diagonal: {source}")]
    Damping {
        /// The last damping that was tried.
        damping: f64,
        /// What the last factorization said.
        source: calib::Error,
    },

    /// A factor whose column order takes apart the groups of a width.
    #[error("the factor's column order was made for other groups than {group:?}: name every group of every width when factorizing")]
    FactorGroups {
        /// The group that it does not keep together.
        group: kernels::Group,
    },

    /// Group sizes of which one does not divide another, so that no column order keeps both together.
    #[error("groups of {small} and of {large} inputs cannot share one column order: {small} does not divide {large}")]
    GroupsDiffer {
        /// The smaller.
        small: usize,
        /// The larger.
        large: usize,
    },
}

//! Which width every matrix gets: sensitivity × options → losses, a program over them, what a runtime can load.

pub mod hull;
pub mod pmq;
pub mod program;

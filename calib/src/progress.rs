//! How long work tells whoever waits for it how far it is.

/// Hears how far a stage is. Every method has an empty default; called from one thread at a time.
pub trait Progress: Sync {
    /// A stage begins: its name (`layers`, `tokens`) and how many steps it has.
    fn start(&self, _stage: &str, _total: u64) {}

    /// So many further steps of the stage are done.
    fn tick(&self, _steps: u64) {}

    /// The stage is over.
    fn finish(&self) {}
}

/// Tells nobody.
pub struct Quiet;
impl Progress for Quiet {}

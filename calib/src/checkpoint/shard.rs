//! One memory-mapped safetensors file.

use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::header::Header;
use crate::Result;

/// A mapped file and its checked header. Pages are read when they are touched.
pub(super) struct Shard {
    /// Where it lies.
    pub path: PathBuf,
    /// Its header.
    pub header: Header,
    map: Mmap,
}

impl Shard {
    /// Maps a file and checks its header against its length.
    pub fn open(path: &Path) -> Result<Self> {
        let file = fs_err::File::open(path)?;
        // SAFETY: the map is only read, as plain bytes of which every pattern is valid. A file that another process shortens meanwhile
        // ends this one with SIGBUS, and one that it rewrites gives other numbers, neither of which a copy of the model is spared either:
        // checkpoints are written once, and ours are put in place by rename.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }?;
        let header = Header::read(&map).map_err(|problem| problem.at(path))?;
        Ok(Self { path: path.to_owned(), header, map })
    }

    /// The file's name.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Bytes of the data. The header was checked: a tensor's own range is always there, unless the file is shape-only.
    pub fn data(&self, range: &Range<u64>) -> Option<&[u8]> {
        let at = |offset: u64| usize::try_from(offset).ok();
        self.map.get(self.header.bytes..)?.get(at(range.start)?..at(range.end)?)
    }
}

//! Arena and expert table: all experts of a layer's projection in one run of bytes, and where each of them lies.
//!
//! The arena is flat, because experts differ in size: words, scales and zeros of each expert, each at a multiple of 256 bytes. The table
//! has 32 bytes an expert, sorted by width, widest first, then by expert, little-endian:
//! `u32 w_off16, s_off16, z_off16, perm_off16; u8 bits, log2_gs; u16 flags, n_tiles, k_tiles; u32 expert_id, reserved`. Offsets count 16
//! bytes, `0xffffffff` is none; `log2_gs` is 0xff for whole rows; flags: bit 4 gate and up interleaved, 5 integer zeros, 6 offsets, 7
//! half-integer zero, 9-10 the scales' type (0 bf16, 1 f16, 2 f32). Flag 8 and codes in bits 0-3 are refused here: nothing writes them.

use super::{ALIGNMENT, Form, Grid, Packed, Rows, TILE_INPUTS, TILE_ROWS};
use crate::{Error, Group, Result, ScaleType};

/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 32;

/// An offset that points nowhere.
pub const NONE: u32 = u32::MAX;

const GATE_UP: u16 = 1 << 4;
const ZEROS: u16 = 1 << 5;
const OFFSET: u16 = 1 << 6;
const HALF: u16 = 1 << 7;

/// One expert's place in an arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Words, scales, zeros (or offsets): offsets in 16 bytes, the last [`NONE`] where nothing is stored.
    pub offsets: [u32; 3],
    /// How it is packed.
    pub form: Form,
    /// Tiles of rows and of inputs.
    pub tiles: [u16; 2],
    /// Which expert.
    pub expert: u32,
}

impl Form {
    /// `log2_gs` of an entry: 0xff for whole rows.
    pub(crate) fn log2_group(&self) -> u8 {
        match self.group {
            Group::Size(size) => size.trailing_zeros() as u8,
            Group::PerChannel => 0xff,
        }
    }

    /// `flags` of an entry, without that of gate and up: the kind of zero and the type of the scales.
    pub(crate) fn flags(&self) -> u16 {
        let scale = match self.scale_type {
            ScaleType::Bf16 => 0,
            ScaleType::F16 => 1 << 9,
            ScaleType::F32 => 2 << 9,
        };
        let grid = match self.grid {
            Grid::Sym => 0,
            Grid::Half => HALF,
            Grid::Asym => ZEROS,
            Grid::Offset => OFFSET,
        };
        scale | grid
    }
}

impl Entry {
    /// The 32 bytes.
    pub fn to_bytes(&self) -> [u8; ENTRY_BYTES] {
        let form = &self.form;
        let rows = if form.rows == Rows::GateUp { GATE_UP } else { 0 };
        let mut bytes = [0; ENTRY_BYTES];
        let words = [self.offsets[0], self.offsets[1], self.offsets[2], NONE];
        bytes[..16].copy_from_slice(bytemuck::bytes_of(&words.map(u32::to_le)));
        (bytes[16], bytes[17]) = (form.bits, form.log2_group());
        let halves = [form.flags() | rows, self.tiles[0], self.tiles[1]];
        bytes[18..24].copy_from_slice(bytemuck::bytes_of(&halves.map(u16::to_le)));
        bytes[24..28].copy_from_slice(&self.expert.to_le_bytes());
        bytes
    }

    /// Reads an entry.
    ///
    /// # Errors
    ///
    /// [`Error::Table`] for what this version does not know.
    pub fn from_bytes(bytes: &[u8; ENTRY_BYTES]) -> Result<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (flags, expert) = (half(18), word(24));
        let refuse = |what: String| Err(Error::Table { what: format!("expert {expert}: {what}") });
        let grid = match flags & (ZEROS | OFFSET | HALF) {
            0 => Grid::Sym,
            HALF => Grid::Half,
            ZEROS => Grid::Asym,
            OFFSET => Grid::Offset,
            both => return refuse(format!("flags {both:#x} name two kinds of zero")),
        };
        let scale_type = match flags >> 9 & 3 {
            0 => ScaleType::Bf16,
            1 => ScaleType::F16,
            2 => ScaleType::F32,
            _ => return refuse("the scales' type 3 is none".to_owned()),
        };
        if flags & !(GATE_UP | ZEROS | OFFSET | HALF | 3 << 9) != 0 {
            return refuse(format!("flags {flags:#x} hold a codebook, a rotation or something newer; this build reads uniform codes"));
        }
        if word(12) != NONE {
            return refuse("a stored permutation of inputs, which this build does not apply".to_owned());
        }
        let group = match bytes[17] {
            log2 @ 5..=7 => Group::Size(1 << log2),
            0xff => Group::PerChannel,
            other => return refuse(format!("groups of 2^{other} inputs; there are 32, 64, 128 and whole rows")),
        };
        if !super::WIDTHS.contains(&bytes[16]) {
            return refuse(format!("{} bits a code; there are 1, 2, 3, 4, 5, 6 and 8", bytes[16]));
        }
        let rows = if flags & GATE_UP == 0 { Rows::Plain } else { Rows::GateUp };
        let form = Form { bits: bytes[16], group, scale_type, grid, rows };
        Ok(Self { offsets: [word(0), word(4), word(8)], form, tiles: [half(20), half(22)], expert })
    }
}

/// The places of a layer's experts, before any of them is packed.
#[derive(Clone, PartialEq, Debug)]
pub struct Arena {
    /// Sorted by width, widest first, then by expert.
    pub entries: Vec<Entry>,
    /// `[out, in]` of every expert's matrix.
    pub shape: [usize; 2],
    /// Bytes of the arena.
    pub bytes: usize,
}

impl Arena {
    /// Lays out experts, each with its form, all of one shape.
    ///
    /// # Errors
    ///
    /// [`Error::Table`] where a side has more tiles than an entry can say, or the arena more bytes than its offsets reach.
    pub fn plan(experts: &[(u32, Form)], shape: [usize; 2]) -> Result<Self> {
        let mut sorted = experts.to_vec();
        sorted.sort_by_key(|(expert, form)| (std::cmp::Reverse(form.bits), *expert));
        let mut end = 0;
        let mut entries = Vec::with_capacity(sorted.len());
        for (expert, form) in sorted {
            let [rows, inputs] = form.padded(shape);
            let too_large = || Error::Table { what: format!("expert {expert}: {rows} x {inputs} is larger than the layout reaches") };
            let tiles = [rows / TILE_ROWS, inputs / TILE_INPUTS].map(u16::try_from);
            let [Ok(rows), Ok(inputs)] = tiles else { return Err(too_large()) };
            let mut offsets = [NONE; 3];
            for (offset, bytes) in offsets.iter_mut().zip(form.bytes(shape)) {
                if bytes > 0 {
                    *offset = u32::try_from(end / 16).ok().filter(|&at| at != NONE).ok_or_else(too_large)?;
                    end += bytes.next_multiple_of(ALIGNMENT);
                }
            }
            entries.push(Entry { offsets, form, tiles: [rows, inputs], expert });
        }
        Ok(Self { entries, shape, bytes: end })
    }

    /// Reads a table and holds it to its arena.
    ///
    /// # Errors
    ///
    /// [`Error::Table`] for what cannot be read, sizes that are not the shape's, a part that reaches outside the arena or lies crooked,
    /// an expert that stands twice.
    pub fn read(table: &[u8], bytes: usize, shape: [usize; 2]) -> Result<Self> {
        let (chunks, rest) = table.as_chunks();
        if !rest.is_empty() {
            return Err(Error::Table { what: format!("a table of {} bytes is no multiple of {ENTRY_BYTES}", table.len()) });
        }
        let entries: Vec<Entry> = chunks.iter().map(Entry::from_bytes).collect::<Result<_>>()?;
        let mut seen = std::collections::BTreeSet::new();
        for entry in &entries {
            let refuse = |what: String| Err(Error::Table { what: format!("expert {}: {what}", entry.expert) });
            let padded = entry.form.padded(shape);
            let tiles = entry.tiles.map(usize::from);
            if padded != [tiles[0] * TILE_ROWS, tiles[1] * TILE_INPUTS] {
                return refuse(format!("{tiles:?} tiles are not those of {shape:?}"));
            }
            if let Group::Size(size) = entry.form.group
                && !shape[1].is_multiple_of(size)
            {
                return refuse(format!("groups of {size} do not divide {} inputs", shape[1]));
            }
            for (what, (&offset, length)) in ["words", "scales", "zeros"].iter().zip(entry.offsets.iter().zip(entry.form.bytes(shape))) {
                let start = u64::from(offset) * 16;
                let fits = if length == 0 {
                    offset == NONE
                } else {
                    start.is_multiple_of(ALIGNMENT as u64) && start + length as u64 <= bytes as u64
                };
                if !fits {
                    return refuse(format!("{length} bytes of {what} at {start} do not lie in an arena of {bytes}"));
                }
            }
            if !seen.insert(entry.expert) {
                return refuse("it stands twice".to_owned());
            }
        }
        Ok(Self { entries, shape, bytes })
    }

    /// The table's bytes.
    pub fn table(&self) -> Vec<u8> {
        self.entries.iter().flat_map(Entry::to_bytes).collect()
    }

    /// The entry of an expert.
    pub fn entry(&self, expert: u32) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.expert == expert)
    }

    /// Where each part of an entry lies in the arena, bytes: words, scales, zeros.
    pub fn parts(&self, entry: &Entry) -> [std::ops::Range<usize>; 3] {
        let lengths = entry.form.bytes(self.shape);
        std::array::from_fn(|part| {
            let start = if lengths[part] == 0 { 0 } else { entry.offsets[part] as usize * 16 };
            start..start + lengths[part]
        })
    }

    /// Puts a packed expert where its entry says, into the whole arena's bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Table`] if there is no such expert, it was planned in another form, or the arena has another length.
    pub fn fill(&self, arena: &mut [u8], expert: u32, packed: &Packed) -> Result<()> {
        let entry = self.entry(expert).filter(|entry| entry.form == packed.form && self.shape == packed.shape && arena.len() == self.bytes);
        let entry = entry.ok_or_else(|| Error::Table { what: format!("expert {expert} is not what the arena was planned for") })?;
        let [words, scales, zeros] = self.parts(entry);
        for (bytes, word) in arena[words].as_chunks_mut().0.iter_mut().zip(&packed.words) {
            *bytes = word.to_le_bytes();
        }
        let sides = packed.side_bytes();
        arena[scales].copy_from_slice(&sides[0]);
        arena[zeros].copy_from_slice(&sides[1]);
        Ok(())
    }

    /// Takes a packed expert out of the arena's bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Table`] if there is no such expert or the arena has another length.
    pub fn take(&self, arena: &[u8], expert: u32) -> Result<Packed> {
        let entry = self.entry(expert).filter(|_| arena.len() == self.bytes);
        let entry = entry.ok_or_else(|| Error::Table { what: format!("expert {expert} is not in this arena of {} bytes", arena.len()) })?;
        Packed::from_bytes(entry.form, self.shape, self.parts(entry).map(|part| &arena[part]))
    }
}

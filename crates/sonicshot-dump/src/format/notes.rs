//! ELF notes, as cores and kdump-compressed files have them (gABI, "Note Section").

use sonicshot::{Cursor, CutShort, to_u64};

const NT_PRSTATUS: u32 = 1;

/// One ELF note.
pub(crate) struct Note<'a> {
    pub kind: u32,
    pub name: &'a [u8],
    pub text: &'a [u8],
    /// The offset of the text among the notes.
    pub text_at: u64,
}

impl Note<'_> {
    /// Whether the note holds a processor's registers: `NT_PRSTATUS`.
    pub(crate) fn is_registers(&self) -> bool {
        self.kind == NT_PRSTATUS && self.name == b"CORE"
    }
}

/// The ELF notes in `bytes`, up to the first that is cut off.
pub(crate) fn notes_in(bytes: &[u8]) -> impl Iterator<Item = Note<'_>> {
    let mut notes = Cursor::new(bytes);
    let len = to_u64(bytes.len());
    std::iter::from_fn(move || next_note(&mut notes, len).ok())
}

fn next_note<'a>(notes: &mut Cursor<&'a [u8]>, len: u64) -> Result<Note<'a>, CutShort> {
    let (name_len, text_len, kind): (u32, u32, u32) = (notes.le()?, notes.le()?, notes.le()?);
    let padding = |len: u32| u64::from(len).next_multiple_of(4).abs_diff(len.into());
    let name = notes.take(name_len.into())?;
    notes.skip(padding(name_len))?;
    let text_at = len.abs_diff(notes.left());
    let text = notes.take(text_len.into())?;
    // The last one's may be missing.
    notes.skip(padding(text_len).min(notes.left()))?;
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    Ok(Note {
        kind,
        name,
        text,
        text_at,
    })
}

/// An ELF note; `None` if its text is longer than 32 bits count.
pub(crate) fn note(name: &[u8], kind: u32, text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for len in [name.len(), text.len()] {
        out.extend(u32::try_from(len).ok()?.to_le_bytes());
    }
    out.extend(kind.to_le_bytes());
    for part in [name, text] {
        out.extend(part);
        out.resize(out.len().checked_next_multiple_of(4)?, 0);
    }
    Some(out)
}

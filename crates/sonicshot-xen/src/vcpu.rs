//! The virtual processors in images and cores.
//!
//! | domain | image | core |
//! |---|---|---|
//! | HVM, PVH | records `CPU` in the record `HVM_CONTEXT` (`struct hvm_hw_cpu`) | section `.xen_prstatus` (`struct vcpu_guest_context`) |
//! | PV | a record `X86_PV_VCPU_BASIC` each (`struct vcpu_guest_context`) | the same |
//!
//! A processor that is down, since it was never started or was taken offline, has no record in an
//! image, and lacks the flag for being online in a core. The layouts are those of
//! `xen/include/public/arch-x86/hvm/save.h`, `arch-x86/xen.h` and `arch-x86/xen-x86_64.h`.

use crate::core_dump::CoreDump;
use crate::cursor::Cursor;
use crate::{DomainKind, Record, XenError, XlImage};
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Bytes, FileBytes, Mfn, P2m, PageSize, to_u64};

pub(crate) const PRSTATUS_SECTION: &str = ".xen_prstatus";
const PV_VCPU_BASIC: u32 = 4;
const HVM_CONTEXT: u32 = 9;
const HVM_END: u16 = 0;
const HVM_CPU: u16 = 2;
/// `struct hvm_hw_cpu` up to `msr_efer`; what is behind it has changed.
const HVM_CPU_LEN: u64 = 1000;
const MAX_HVM_CPU: u32 = 4096;
const HVM_RIP: u64 = 640;
const HVM_RFLAGS: u64 = 648;
const HVM_CR0: u64 = 656;
const HVM_CR3: u64 = 672;
const HVM_CR4: u64 = 680;
const HVM_CS: u64 = 736;
const HVM_CS_BASE: u64 = 808;
const HVM_EFER: u64 = 992;

/// `struct vcpu_guest_context` of a 64-bit guest. What a 32-bit PV guest has is shorter.
const CONTEXT_LEN: u64 = 5168;
const CONTEXT_FLAGS: u64 = 512;
const CONTEXT_RIP: u64 = 648;
const CONTEXT_CS: u64 = 656;
const CONTEXT_RFLAGS: u64 = 664;
const CONTEXT_CR0: u64 = 4984;
const CONTEXT_CR3: u64 = 5008;
const CONTEXT_CR4: u64 = 5016;
/// `VGCF_online`.
const ONLINE: u64 = 1 << 5;
/// More processors than Xen gives any domain.
const MAX_VCPUS: usize = 1 << 14;

/// Paging and protection; four levels of page tables; long mode.
const CR0_PG_PE: u64 = 1 << 31 | 1;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 10 | 1 << 8;

/// A virtual processor that is not down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Vcpu {
    /// Its number; 0 is the boot processor. A core counts those that Xen has a context of.
    pub id: u32,
    /// Its control registers. A PV guest runs under Xen's own, with paging, in long mode: these
    /// bits are given so, whatever Xen shows the guest. Its `cr3` is the address of the root of its
    /// kernel's page tables as the guest counts, not the machine, without other bits.
    pub control: ControlRegisters,
    /// The next instruction.
    pub rip: u64,
    /// The flags.
    pub rflags: u64,
    /// The selector of the code segment.
    pub cs_selector: u32,
    /// Its base, where the file tells it.
    pub cs_base: Option<u64>,
}

/// The processors of a domain that are not down, lowest first, and how many are known to be down.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Vcpus {
    /// Those that are not down.
    pub online: Vec<Vcpu>,
    /// Those that a core calls down; 0 in an image, which does not say.
    pub offline: usize,
}

impl XlImage {
    /// The domain's processors. `data` is the image that this was [parsed](Self::parse) from.
    ///
    /// # Errors
    /// [`XenError`] if there are none, or what is said of them cannot be.
    pub fn vcpus(&self, data: FileBytes<'_>) -> Result<Vcpus, XenError> {
        let mut online: Vec<Vcpu> = Vec::new();
        let mut end = Cursor::new(data);
        match self.kind() {
            DomainKind::Pv => {
                for record in self.records().iter().filter(|r| r.kind == PV_VCPU_BASIC) {
                    let mut cursor = open(data, record);
                    let id = cursor.le()?;
                    cursor.take(4)?;
                    let len = u64::from(record.len).checked_sub(8);
                    let len = len.ok_or_else(|| {
                        let at = cursor.offset();
                        cursor.malformed("a processor's record", at, record.len.into())
                    })?;
                    let context = context(&mut cursor, len)?;
                    // libxc has made it the guest's number.
                    let root = context.control.cr3;
                    push(&mut online, paravirtualised(&context, id, root), &cursor)?;
                    end = cursor;
                }
            }
            DomainKind::Hvm => {
                let contexts = self.records().iter().filter(|r| r.kind == HVM_CONTEXT);
                for (number, record) in contexts.enumerate() {
                    let mut cursor = open(data, record);
                    if number > 0 {
                        return Err(cursor.malformed("a second context", record.offset, 0));
                    }
                    hvm_context(&mut cursor, record, &mut online)?;
                    end = cursor;
                }
            }
        }
        if online.first().is_none_or(|first| first.id != 0) {
            return Err(end.malformed("no record of the first processor", end.offset(), 0));
        }
        Ok(Vcpus { online, offline: 0 })
    }
}

impl CoreDump {
    /// The domain's processors. `data` is the core that this was [parsed](Self::parse) from.
    ///
    /// # Errors
    /// [`XenError`] if there are none, or what is said of them cannot be.
    pub fn vcpus(&self, data: FileBytes<'_>) -> Result<Vcpus, XenError> {
        let mut cursor = Self::open_section(data, PRSTATUS_SECTION)?;
        let start = cursor.offset();
        let (mut online, mut offline) = (Vec::new(), 0_usize);
        let len = CONTEXT_LEN;
        if Some(cursor.left()) != self.vcpu_count().checked_mul(len) {
            return Err(cursor.malformed("a section of another length", start, cursor.left()));
        }
        let mut ids = 0_u32..=u32::MAX;
        while cursor.left() > 0 {
            let at = cursor.offset();
            let Some(id) = ids.next() else {
                return Err(cursor.malformed("invalid number of processors", start, cursor.left()));
            };
            let context = context(&mut cursor, len)?;
            if context.flags & ONLINE == 0 {
                let down = cursor.malformed("invalid number of processors", at, id.into());
                offline = offline.checked_add(1).ok_or(down)?;
            } else if let Some(p2m) = self.p2m() {
                let root = root_of(p2m, context.control.cr3).ok_or_else(|| {
                    cursor.malformed("a root of page tables", at, context.control.cr3)
                })?;
                push(&mut online, paravirtualised(&context, id, root), &cursor)?;
            } else {
                push(&mut online, fully_virtualised(&context, id), &cursor)?;
            }
        }
        if online.is_empty() {
            return Err(cursor.malformed("no processor that is online", start, to_u64(offline)));
        }
        Ok(Vcpus { online, offline })
    }
}

/// The guest's address of the root that the machine has at `cr3`.
fn root_of(p2m: &P2m, cr3: u64) -> Option<u64> {
    let page = PageSize::SIZE_4K;
    let pfn = p2m.pfn(Mfn::new(cr3 >> page.shift()))?;
    Some(pfn.gpa(page)?.raw())
}

fn open<'a>(data: FileBytes<'a>, record: &Record) -> Cursor<'a> {
    Cursor::at(data, record.place().within, record.body.start())
}

fn push(online: &mut Vec<Vcpu>, vcpu: Vcpu, cursor: &Cursor<'_>) -> Result<(), XenError> {
    let wrong = |what| Err(cursor.malformed(what, cursor.offset(), vcpu.id.into()));
    if online.last().is_some_and(|last| last.id >= vcpu.id) {
        return wrong("a processor that is not above the one before");
    }
    if online.len() >= MAX_VCPUS {
        return wrong("invalid number of processors");
    }
    online.push(vcpu);
    Ok(())
}

fn hvm_context(
    cursor: &mut Cursor<'_>,
    record: &Record,
    online: &mut Vec<Vcpu>,
) -> Result<(), XenError> {
    let end = record.body.start().checked_add(record.len.into());
    loop {
        let at = cursor.offset();
        let (kind, instance, len) = (cursor.le()?, cursor.le()?, cursor.le::<u32>()?);
        let next = cursor.offset().checked_add(len.into());
        let next = next.filter(|next| end.is_some_and(|end| *next <= end));
        let next = next.ok_or_else(|| {
            cursor.malformed("invalid length of a part of the context", at, len.into())
        })?;
        match kind {
            HVM_END => return Ok(()),
            HVM_CPU => {
                let vcpu = (len <= MAX_HVM_CPU).then(|| cursor.take(len.into()));
                let vcpu = vcpu.transpose()?.and_then(|bytes| hvm_cpu(bytes, instance));
                let vcpu = vcpu.ok_or_else(|| {
                    cursor.malformed("invalid length of a processor's context", at, len.into())
                })?;
                push(online, vcpu, cursor)?;
            }
            _ => cursor.seek(next),
        }
    }
}

fn hvm_cpu(bytes: FileBytes<'_>, instance: u16) -> Option<Vcpu> {
    let word = |at: u64| bytes.le_at::<u64>(at);
    if bytes.byte_len() < HVM_CPU_LEN {
        return None;
    }
    Some(Vcpu {
        id: instance.into(),
        control: ControlRegisters::new(
            word(HVM_CR0)?,
            word(HVM_CR3)?,
            word(HVM_CR4)?,
            Some(word(HVM_EFER)?),
        ),
        rip: word(HVM_RIP)?,
        rflags: word(HVM_RFLAGS)?,
        cs_selector: bytes.le_at(HVM_CS)?,
        cs_base: Some(word(HVM_CS_BASE)?),
    })
}

/// A `struct vcpu_guest_context` as it is.
struct Context {
    flags: u64,
    control: ControlRegisters,
    rip: u64,
    rflags: u64,
    cs_selector: u16,
}

fn context(cursor: &mut Cursor<'_>, len: u64) -> Result<Context, XenError> {
    let at = cursor.offset();
    let bytes = cursor.take(CONTEXT_LEN)?;
    let read = || {
        let word = |at: u64| bytes.le_at::<u64>(at);
        let control = ControlRegisters::new(
            word(CONTEXT_CR0)?,
            word(CONTEXT_CR3)?,
            word(CONTEXT_CR4)?,
            None,
        );
        Some(Context {
            flags: word(CONTEXT_FLAGS)?,
            control,
            rip: word(CONTEXT_RIP)?,
            rflags: word(CONTEXT_RFLAGS)?,
            cs_selector: bytes.le_at(CONTEXT_CS)?,
        })
    };
    let context = read().filter(|_| len == CONTEXT_LEN);
    context.ok_or_else(|| cursor.malformed("invalid length of a processor's context", at, len))
}

fn paravirtualised(context: &Context, id: u32, root: u64) -> Vcpu {
    let ControlRegisters { cr0, cr4, .. } = context.control;
    let root = root & !PageSize::SIZE_4K.offset_mask();
    let control = ControlRegisters::new(cr0 | CR0_PG_PE, root, cr4 | CR4_PAE, Some(EFER_LONG));
    Vcpu {
        control,
        ..fully_virtualised(context, id)
    }
}

fn fully_virtualised(context: &Context, id: u32) -> Vcpu {
    Vcpu {
        id,
        control: context.control,
        rip: context.rip,
        rflags: context.rflags,
        cs_selector: context.cs_selector.into(),
        cs_base: None,
    }
}

//! The processors' registers, and what they tell of who owns the memory.

use crate::Domain;
use crate::instance::Instance;
use libvmi_sys as sys;
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Processor, Processors};

/// More processors than any hypervisor gives to a guest.
const MOST: u32 = 16_384;
/// `CR0.ET`, which is always on, and the bits by which caches are off, which an INIT leaves.
const CR0_ET: u64 = 1 << 4;
const CR0_CACHE: u64 = 3 << 29;
/// The instruction pointer of a processor after a reset.
const RESET_RIP: u64 = 0xfff0;

/// All processors of a guest that is paused.
///
/// LibVMI tells neither that one is halted nor that it is in system management mode: such a processor
/// counts as one that runs with these registers, and a guest whose firmware has it is refused.
pub(crate) fn of(instance: &Instance, domain: &Domain) -> Processors {
    if matches!(domain, Domain::File(_)) {
        return Processors::Unknown;
    }
    let count = instance.processors();
    if count == 0 {
        return Processors::NotTold("LibVMI's driver tells no number of processors");
    }
    if count > MOST {
        return Processors::NotTold("LibVMI tells of more processors than there can be");
    }
    let all: Option<Vec<_>> = (0..count).map(|number| one(instance, number)).collect();
    all.map_or(
        Processors::NotTold("LibVMI does not tell the registers of every processor"),
        Processors::Known,
    )
}

fn one(instance: &Instance, number: u32) -> Option<Processor> {
    let value = |register| instance.register(number, register);
    let (cr0, cr3, cr4) = (value(sys::CR0)?, value(sys::CR3)?, value(sys::CR4)?);
    let (efer, rip) = (value(sys::MSR_EFER)?, value(sys::RIP)?);
    Some(judged(number, rip, cr0, cr3, cr4, efer))
}

/// The state of a processor with these registers. The boot processor always counts.
fn judged(number: u32, rip: u64, cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Processor {
    let of_reset =
        rip == RESET_RIP && cr0 & !CR0_CACHE == CR0_ET && cr3 == 0 && cr4 == 0 && efer == 0;
    match of_reset && number != 0 {
        true => Processor::NotStarted,
        false => Processor::Started(ControlRegisters::new(cr0, cr3, cr4, Some(efer))),
    }
}

#[cfg(test)]
mod tests {
    use super::judged;
    use sonicshot::Processor;

    #[test]
    fn a_processor_that_waits_for_its_start_says_nothing_and_all_others_count() {
        let reset = |number| judged(number, 0xfff0, 0x6000_0010, 0, 0, 0);
        assert_eq!(reset(1), Processor::NotStarted);
        assert!(matches!(reset(0), Processor::Started(_)));
        for (rip, cr0, cr3, cr4, efer) in [
            (0xfff1, 0x10, 0, 0, 0),
            (0xfff0, 0x11, 0, 0, 0),
            (0xfff0, 0x10, 0x1000, 0, 0),
            (0xfff0, 0x10, 0, 0x20, 0),
            (0xfff0, 0x10, 0, 0, 0x500),
        ] {
            let processor = judged(1, rip, cr0, cr3, cr4, efer);
            assert!(matches!(processor, Processor::Started(_)), "{processor:?}");
        }
    }
}

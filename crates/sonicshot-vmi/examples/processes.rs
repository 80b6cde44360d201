//! Lists a guest's processes, from its raw memory, and by its own structures: symbols, types and
//! memory by the kernel's addresses.
//!
//! ```console
//! $ cargo run --release -p sonicshot-vmi --example processes -- guest.raw
//!    1      0  7216 KiB  init
//!    2      0         -  kthreadd
//! ```

use sonicshot::{Gpa, GuestBytes, MappedRegions};
use sonicshot_vmi::{GuestOptions, KernelVa, LinuxGuest, Task, VirtualMemory};
use std::error::Error;
use std::io::Write;

/// Above it RAM goes on behind the PCI hole, of which a flat file says nothing.
const PCI_HOLE: u64 = 3 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let file = args
        .next()
        .ok_or("usage: processes GUEST.raw [SYMBOLS]...")?;
    let ram = std::fs::read(&file)?;
    if ram.len() as u64 > PCI_HOLE {
        return Err("this example's guests have at most 3 GiB".into());
    }
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
    let options = args.fold(GuestOptions::new(), GuestOptions::symbols);
    let guest = LinuxGuest::open(&memory, &options)?;
    let sizes = Sizes::of(&guest)?;
    let mut out = std::io::stdout().lock();
    for task in guest.tasks()? {
        let task = task?;
        let size = match sizes.of_task(&guest, &task)? {
            Some(kib) => format!("{kib} KiB"),
            None => "-".into(),
        };
        writeln!(
            out,
            "{:>7} {:>7} {size:>14}  {}",
            task.pid, task.parent, task.name
        )?;
    }
    Ok(())
}

/// The members that are read beside those of a [`Task`]: any other member is read in the same way.
struct Sizes {
    total_vm: u64,
    page_kib: u64,
}

impl Sizes {
    fn of(guest: &LinuxGuest<'_>) -> Result<Self, Box<dyn Error>> {
        let total_vm = guest.member("mm_struct", "total_vm")?;
        Ok(Self {
            total_vm: total_vm.ok_or("no member mm_struct.total_vm")?.offset,
            page_kib: guest.page_size().bytes() / 1024,
        })
    }

    /// The size of a process's address space in KiB (`VmSize`); kernel threads have none.
    fn of_task(&self, guest: &LinuxGuest<'_>, task: &Task) -> Result<Option<u64>, Box<dyn Error>> {
        let Some(mm) = task.memory else {
            return Ok(None);
        };
        let at: KernelVa = mm
            .checked_add(self.total_vm)
            .ok_or("mm_struct at the end")?;
        let pages = guest.read_u64(at)?;
        Ok(Some(pages.checked_mul(self.page_kib).ok_or("too large")?))
    }
}

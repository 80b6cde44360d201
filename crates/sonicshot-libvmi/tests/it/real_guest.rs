//! A real guest's memory, through the C interface: it is classified as it is without, and by the
//! registers that are told.

use crate::fake::{Fake, library, real_ram};
use sonicshot::{Gpa, GuestBytes, GuestMemory, MappedRegions};
use sonicshot_libvmi::{LibVmiGuest, LibVmiSymbols, PausedGuest};
use sonicshot_vmi::symbols::SymbolSource;
use sonicshot_vmi::{AnalysisOptions, GuestOptions, LinuxGuest, VmiError, analyze};
use std::sync::Arc;

const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

fn plain() -> MappedRegions<'static> {
    MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(real_ram()))]).unwrap()
}

/// A value of its VMCOREINFO.
fn told(name: &str) -> String {
    let memory = plain();
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let text = guest.vmcoreinfo().unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.unwrap().to_owned()
}

/// The address of its top-level page table.
fn root() -> u64 {
    let linked = u64::from_str_radix(&told("SYMBOL(swapper_pg_dir)"), 16).unwrap();
    let base: i64 = told("NUMBER(phys_base)").parse().unwrap();
    (linked - START_KERNEL_MAP)
        .checked_add_signed(base)
        .unwrap()
}

fn fake(cr3: u64) -> Fake {
    let len = real_ram().len() as u64;
    let fake = Fake::with_memory(real_ram(), &[(0, len)]);
    fake.say(
        "vcpu",
        &format!("{START_KERNEL_MAP:x},80050033,{cr3:x},6f0,d01"),
    )
}

fn pause(fake: &Fake) -> (LibVmiGuest, PausedGuest) {
    let guest = fake.open().unwrap();
    let paused = guest.pause(None).unwrap();
    (guest, paused)
}

#[test]
fn it_is_classified_as_without_libvmi_and_its_processors_decide() {
    let expected = analyze(&plain(), &AnalysisOptions::new()).unwrap();
    let right = fake(root());
    let (_guest, paused) = pause(&right);
    let found = analyze(&paused, &AnalysisOptions::new()).unwrap();
    assert_eq!(found.counts(), expected.counts());
    assert_eq!(found.facts().release, expected.facts().release);
    assert!(found.pages().runs().eq(expected.pages().runs()));
    // A processor that runs on other page tables: the kernel found does not own the memory.
    let wrong = fake(0x1000);
    let (_guest, paused) = pause(&wrong);
    let error = analyze(&paused, &AnalysisOptions::new()).unwrap_err();
    assert!(matches!(error, VmiError::NotOwner { .. }), "{error}");
    // An owned memory, and the guest with it.
    let (_guest, paused) = pause(&right);
    let owned: Arc<dyn GuestMemory> = Arc::new(paused);
    let again = analyze(&owned, &AnalysisOptions::new()).unwrap();
    assert_eq!(again.counts(), expected.counts());
    drop(owned);
    assert_eq!(right.log().last().unwrap(), "resume");
}

#[test]
fn symbols_are_libvmis_where_the_kernel_tells_none() {
    let memory = plain();
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let at = |name| guest.symbol(name).unwrap().unwrap().raw();
    let names = ["linux_banner", "init_task", "swapper_pg_dir"];
    let plain = fake(root());
    let mut knows = fake(root());
    for name in names {
        knows = knows.say("symbol", &format!("{name}={:x}", at(name)));
    }
    let (unknown, _paused) = pause(&plain);
    let symbols = LibVmiSymbols::new(&unknown, None);
    assert!(symbols.symbol("init_task").unwrap().is_none());
    assert!(symbols.symbol("init_task").unwrap().is_none());
    let asked = plain.log().iter().filter(|call| *call == "init_os").count();
    assert_eq!(asked, 1);
    let (known, paused) = pause(&knows);
    let symbols = Arc::new(LibVmiSymbols::new(&known, None));
    let found = symbols.symbol("init_task").unwrap().unwrap();
    assert_eq!(found.raw(), at("init_task"));
    assert!(symbols.symbol("no_such_symbol").unwrap().is_none());
    // With a table of its own, the kernel's counts, and LibVMI is not asked.
    let other = Arc::new(LibVmiSymbols::new(&unknown, None));
    let options = GuestOptions::new().fallback(other);
    let guest = LinuxGuest::open(&paused, &options).unwrap();
    assert!(
        !guest
            .symbol_sources()
            .iter()
            .any(|origin| origin == "LibVMI")
    );
    let asked = plain.log().iter().filter(|call| *call == "init_os").count();
    assert_eq!(asked, 1);
    let _ = library();
}

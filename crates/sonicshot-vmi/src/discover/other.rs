//! What memory in which no kernel can be read holds instead of one.

use crate::error::VmiError;
use crate::symbols::{search, there};
use sonicshot::{Gpa, GpaRange, GuestMemory};

/// Where the header of an arm64 kernel's image may lie: the image is a multiple of this above the
/// beginning of memory (`Documentation/arch/arm64/booting.rst`; with KASLR, of 64 KiB).
const IMAGE_STEP: u64 = 64 << 10;
/// An image is no smaller.
const LEAST_IMAGE: u64 = 1 << 20;
/// No banner is longer.
const MAX_BANNER: usize = 256;
/// So many that may be one are looked at.
const MAX_BANNERS: u32 = 1 << 16;

/// The error `why` no kernel is found, or one that says more of what is there.
pub(crate) fn say_more(memory: &dyn GuestMemory, why: VmiError) -> VmiError {
    let (VmiError::NoKernel { .. } | VmiError::NoTables { .. }) = &why else {
        return why;
    };
    if has_arm64_image(memory) {
        return VmiError::OtherMachine {
            what: "an arm64 guest: only x86-64 is supported so far",
        };
    }
    match why {
        VmiError::NoKernel { tried } => match banner(memory) {
            Some(banner) => VmiError::BannerAlone { banner, tried },
            None => VmiError::NoKernel { tried },
        },
        why => why,
    }
}

/// Whether the image of an arm64 kernel is in memory: its header is its first page's
/// (`arch/arm64/include/asm/image.h`), which stays there.
fn has_arm64_image(memory: &dyn GuestMemory) -> bool {
    let is_one = |at: Gpa| {
        let mut header = [0; 64];
        if memory.read(at, &mut header).is_err() {
            return false;
        }
        let (words, _) = header.as_chunks::<8>();
        let word = |number: usize| words.get(number).map(|word| u64::from_le_bytes(*word));
        // The size of the image, three words that are reserved, and the magic.
        word(2).is_some_and(|size| size >= LEAST_IMAGE)
            && (4..7).all(|number| word(number) == Some(0))
            && header.get(56..60) == Some(b"ARM\x64")
    };
    // A header is not zero, so it lies in data.
    let in_data = |data: GpaRange| {
        let mut at = data.start().raw().checked_next_multiple_of(IMAGE_STEP);
        while let Some(here) = at.filter(|at| *at < data.end().raw()) {
            if is_one(Gpa::new(here)) {
                return true;
            }
            at = here.checked_add(IMAGE_STEP);
        }
        false
    };
    let mut regions = memory.layout().regions().iter();
    regions.any(|region| there(memory, region).any(in_data))
}

/// The banner of a kernel, as `linux_banner` has it: with a release, and the number of the build.
fn banner(memory: &dyn GuestMemory) -> Option<String> {
    const START: &[u8] = b"Linux version ";
    let mut found = None;
    let mut looked = 0_u32;
    search(memory, START, &mut |at| {
        looked = looked.saturating_add(1);
        let mut text = vec![0; MAX_BANNER];
        // At the end of memory there is less.
        while memory.read(at, &mut text).is_err() && text.len() > START.len() {
            text.truncate(text.len() / 2);
        }
        found = banner_in(&text, START);
        found.is_none() && looked < MAX_BANNERS
    });
    found
}

fn banner_in(text: &[u8], start: &[u8]) -> Option<String> {
    let end = text.iter().position(|byte| !(b' '..0x7f).contains(byte));
    let line = core::str::from_utf8(text.get(..end.unwrap_or(text.len()))?).ok()?;
    let release = line.get(start.len()..)?;
    let is_one = release.starts_with(|c: char| c.is_ascii_digit()) && line.contains(" #");
    is_one.then(|| line.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::{MAX_BANNER, MAX_BANNERS, say_more};
    use crate::error::VmiError;
    use sonicshot::{Gpa, GuestBytes, MappedRegions};

    fn said(ram: &[u8]) -> VmiError {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        let why = VmiError::NoKernel {
            tried: "a test".into(),
        };
        say_more(&memory, why)
    }

    #[test]
    fn what_is_there_instead_is_said() {
        let mut ram = vec![0; 4 << 20];
        assert!(matches!(said(&ram), VmiError::NoKernel { .. }));
        let mut put = |at: usize, bytes: &[u8]| ram[at..at + bytes.len()].copy_from_slice(bytes);
        // A format string, and the banner of a kernel across a page.
        put(0x1000, b"Linux version %s (%s)");
        put(
            0x2ff0,
            b"Linux version 6.1.0 (somebody@somewhere) (gcc) #1 SMP 2026\n\0",
        );
        let error = said(&ram);
        assert_eq!(
            error.to_string(),
            "there is a kernel's banner in memory, `Linux version 6.1.0 (somebody@somewhere) (gcc) #1 \
             SMP 2026`, but no kernel that can be read: a test"
        );
        // One that does not end is cut.
        ram[0x2ff0 + 30..0x3800].fill(b'x');
        ram[0x2ff0 + 40..0x2ff0 + 43].copy_from_slice(b" #1");
        match said(&ram) {
            VmiError::BannerAlone { banner, .. } => assert_eq!(banner.len(), MAX_BANNER),
            other => panic!("{other}"),
        }
        // The first page of an arm64 kernel.
        let mut header = vec![0; 64];
        header[..4].copy_from_slice(b"MZ@\xfa");
        header[16..24].copy_from_slice(&0x220_0000_u64.to_le_bytes());
        header[24] = 0xa;
        header[56..60].copy_from_slice(b"ARM\x64");
        ram[0x20_0000..0x20_0040].copy_from_slice(&header);
        let error = said(&ram);
        assert!(error.to_string().starts_with("an arm64 guest"), "{error}");
        ram[0x20_0000 + 32] = 1;
        assert!(matches!(said(&ram), VmiError::BannerAlone { .. }));
    }

    #[test]
    fn so_many_banners_are_looked_at() {
        for (before, is_found) in [(MAX_BANNERS - 1, true), (MAX_BANNERS, false)] {
            let mut ram = b"Linux version ".repeat(usize::try_from(before).unwrap());
            ram.resize(ram.len().next_multiple_of(4096), 0);
            let mut page =
                b"Linux version 6.1.0 (somebody@somewhere) (gcc) #1 SMP 2026\n\0".to_vec();
            page.resize(4096, 0);
            ram.extend(page);
            let is_said = matches!(said(&ram), VmiError::BannerAlone { .. });
            assert_eq!(is_said, is_found, "{before}");
        }
    }
}

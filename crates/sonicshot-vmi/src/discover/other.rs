//! The content of memory in which no kernel can be read.

use crate::error::VmiError;
use crate::symbols::{search, there};
use sonicshot::{Gpa, GpaRange, GuestBytes, GuestMemory, to_u64, to_usize};

/// The step between places of the header of an arm64 kernel's image: the image is a multiple of this
/// above the beginning of memory (`Documentation/arch/arm64/booting.rst`; with KASLR, of 64 KiB).
const IMAGE_STEP: u64 = 64 << 10;
/// An image is no smaller.
const LEAST_IMAGE: u64 = 1 << 20;
/// So many that may be one are looked at.
const MAX_IMAGES: usize = 64;
/// No banner is longer.
const MAX_BANNER: usize = 256;
/// So many that may be one are looked at.
const MAX_BANNERS: u32 = 1 << 16;

/// The error `why` no kernel is found, or one that says more of what is there.
pub(crate) fn say_more(memory: &dyn GuestMemory, why: VmiError) -> VmiError {
    let (VmiError::NoKernel { .. } | VmiError::NoTables { .. }) = &why else {
        return why;
    };
    if is_arm64(memory) {
        return VmiError::OtherMachine {
            what: "an arm64 guest: only x86-64 is supported so far",
        };
    }
    if matches!(why, VmiError::NoKernel { .. }) && is_zero(memory) {
        return VmiError::NoKernel {
            tried: "the memory is zeroes, all of it".into(),
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
/// (`arch/arm64/include/asm/image.h`), which stays there, and its banner is in it. A header alone may be
/// in any file that the guest has read.
fn is_arm64(memory: &dyn GuestMemory) -> bool {
    let images = arm64_images(memory);
    let mut is_one = false;
    if !images.is_empty() {
        each_banner(memory, &mut |at, _| {
            is_one = images.iter().any(|image| image.contains(at));
            !is_one
        });
    }
    is_one
}

/// The places of images of arm64 kernels, by their headers.
fn arm64_images(memory: &dyn GuestMemory) -> Vec<GpaRange> {
    let image = |at: Gpa| {
        let mut header = [0; 64];
        memory.read(at, &mut header).ok()?;
        let (words, _) = header.as_chunks::<8>();
        let word = |number: usize| words.get(number).map(|word| u64::from_le_bytes(*word));
        // The size of the image, three words that are reserved, and the magic.
        let size = word(2).filter(|size| *size >= LEAST_IMAGE)?;
        let is_one =
            (4..7).all(|number| word(number) == Some(0)) && header.get(56..60) == Some(b"ARM\x64");
        GpaRange::with_len(at, size).filter(|_| is_one)
    };
    let mut found = Vec::new();
    for region in memory.layout().regions() {
        // A header is not zero, so it lies in data.
        for data in there(memory, region) {
            let mut at = data.start().raw().checked_next_multiple_of(IMAGE_STEP);
            while let Some(here) = at.filter(|at| *at < data.end().raw()) {
                found.extend(image(Gpa::new(here)));
                if found.len() >= MAX_IMAGES {
                    return found;
                }
                at = here.checked_add(IMAGE_STEP);
            }
        }
    }
    found
}

/// Whether all of the memory reads as zero: what nobody has written to, or a file that is a hole.
fn is_zero(memory: &dyn GuestMemory) -> bool {
    const WINDOW: usize = 1 << 20;
    let mut buffer = vec![0; WINDOW];
    for region in memory.layout().regions() {
        for data in there(memory, region) {
            let mut at = data.start();
            while let Some(left) = data.end().offset_from(at).filter(|left| *left > 0) {
                let len = to_usize(left).min(buffer.len());
                let (bytes, _) = buffer.split_at_mut(len);
                if memory.read(at, bytes).is_err() || !GuestBytes::from_slice(bytes).is_zero() {
                    return false;
                }
                let Some(next) = at.checked_add(to_u64(len)) else {
                    break;
                };
                at = next;
            }
        }
    }
    true
}

/// The banner of a kernel, as `linux_banner` has it: with a release, and the number of the build.
fn banner(memory: &dyn GuestMemory) -> Option<String> {
    let mut found = None;
    each_banner(memory, &mut |_, banner| {
        found = Some(banner);
        false
    });
    found
}

/// Calls `visit` with each banner and where it is, until it says no.
fn each_banner(memory: &dyn GuestMemory, visit: &mut dyn FnMut(Gpa, String) -> bool) {
    const START: &[u8] = b"Linux version ";
    let mut others = 1..MAX_BANNERS;
    search(memory, &None, START, &mut |at| {
        let mut text = vec![0; MAX_BANNER];
        // At the end of memory there is less.
        while memory.read(at, &mut text).is_err() && text.len() > START.len() {
            text.truncate(text.len() / 2);
        }
        let goes_on = banner_in(&text, START).is_none_or(|banner| visit(at, banner));
        goes_on && others.next().is_some()
    });
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
    use super::{IMAGE_STEP, MAX_BANNER, MAX_BANNERS, MAX_IMAGES, arm64_images, say_more};
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
        let zero = said(&ram).to_string();
        assert!(zero.contains("the memory is zeroes"), "{zero}");
        ram[0x10_0000] = 1;
        match said(&ram) {
            VmiError::NoKernel { tried } => assert_eq!(tried, "a test"),
            other => panic!("{other}"),
        }
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
        // In a file that was read it is alone.
        ram[0x20_0000..0x20_0040].copy_from_slice(&header);
        assert!(matches!(said(&ram), VmiError::BannerAlone { .. }));
        let banner = b"Linux version 6.12.0 (somebody@somewhere) (gcc) #2 SMP 2026\n\0";
        ram[0x30_0000..0x30_0000 + banner.len()].copy_from_slice(banner);
        let error = said(&ram);
        assert!(error.to_string().starts_with("an arm64 guest"), "{error}");
        ram[0x20_0000 + 32] = 1;
        assert!(matches!(said(&ram), VmiError::BannerAlone { .. }));
    }

    #[test]
    fn so_many_images_are_looked_at() {
        let step = usize::try_from(IMAGE_STEP).unwrap();
        let mut ram = vec![0; (MAX_IMAGES + 2) * step];
        for image in ram.chunks_mut(step) {
            image[16..24].copy_from_slice(&0x220_0000_u64.to_le_bytes());
            image[56..60].copy_from_slice(b"ARM\x64");
        }
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        assert_eq!(arm64_images(&memory).len(), MAX_IMAGES);
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

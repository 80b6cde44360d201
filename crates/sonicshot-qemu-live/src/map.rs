//! A guest's RAM as a file of raw memory, of which each guest has a private mapping.

use crate::error::QemuError;
use crate::launch::Words;
use crate::pages::{self, Places};
use crate::qmp::QemuVersion;
use sonicshot::work::{for_each, threads};
use sonicshot_dump::{NewFile, Overwrite};
use sonicshot_serve::{Content, PageSource, ServeError};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// The memory backend that is added.
const BACKEND: &str = "sonicshot-ram";

/// From this version on QEMU can be kept from writing to the file.
const READ_ONLY: QemuVersion = QemuVersion {
    major: 8,
    minor: 2,
    micro: 0,
};

/// The version that `program` says it is, started with `words`: it may be a script that starts one.
pub(crate) fn version(program: &OsStr, words: &[OsString]) -> Result<QemuVersion, QemuError> {
    let failed = |source| QemuError::Io {
        action: "starting",
        path: program.into(),
        source,
    };
    let output = Command::new(program)
        .args(words)
        .arg("--version")
        .output()
        .map_err(failed)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.split_once("version ").and_then(|(_, rest)| {
        let word = rest
            .split(|one: char| !one.is_ascii_digit() && one != '.')
            .next()?;
        let mut numbers = word.split('.').map(|number| number.parse().ok());
        Some(QemuVersion {
            major: numbers.next()??,
            minor: numbers.next()??,
            micro: numbers.next().flatten().unwrap_or(0),
        })
    });
    found.ok_or_else(|| QemuError::Unknown {
        what: "--version",
        found: crate::qmp::shortened(&text),
        expected: "QEMU emulator version N.N.N",
    })
}

/// What QEMU must be told so that its RAM of `bytes` bytes is a private mapping of `file`.
pub(crate) fn options(
    version: QemuVersion,
    words: &Words<'_>,
    file: &Path,
    bytes: u64,
) -> Result<Vec<OsString>, QemuError> {
    if words.mention("memory-backend=") || words.mention("memdev=") {
        return Err(QemuError::not_this(
            "QEMU's command line says what its RAM is made of (memory-backend=, memdev=): leave that \
             out, the file is added here",
        ));
    }
    let name = file.to_str().filter(|name| !name.contains(['\n', '\0']));
    let name = name.ok_or_else(|| QemuError::not_this("the raw file's name is no text"))?;
    // A comma ends an option.
    let name = name.replace(',', ",,");
    let mut backend =
        format!("memory-backend-file,id={BACKEND},size={bytes},mem-path={name},share=off");
    if version >= READ_ONLY {
        backend.push_str(",readonly=on,rom=off");
    } else {
        // What these give back is punched out of the file, under all who have it.
        let punching = ["balloon", "virtio-mem", "free-page-reporting"];
        if let Some(found) = punching.iter().find(|what| words.mention(what)) {
            return Err(QemuError::not_this(format!(
                "QEMU {version} opens a mapped file for writing, and a guest with `{found}` would punch \
                 holes into it: give each guest a file of its own, leave the device out, restore with \
                 --eager, or take QEMU 8.2 or later"
            )));
        }
    }
    Ok(vec![
        "-object".into(),
        backend.into(),
        "-machine".into(),
        format!("memory-backend={BACKEND}").into(),
    ])
}

/// Makes the file at `path`: the guest's RAM as its block has it, `bytes` long. It appears whole or
/// not at all.
pub(crate) fn make(
    source: &dyn PageSource,
    places: &Places,
    bytes: u64,
    path: &Path,
) -> Result<(), QemuError> {
    let out = NewFile::create_new(path, Overwrite::Refuse)?;
    let writing = |source| QemuError::Io {
        action: "writing",
        path: path.to_owned(),
        source,
    };
    out.file().set_len(bytes).map_err(writing)?;
    let regions = source.layout().regions().to_vec();
    let all = regions
        .into_iter()
        .flat_map(|region| pages::runs(source, region));
    for_each(
        threads(None),
        all.filter(|found| !matches!(found, Ok((_, Content::Fill(0))))),
        &mut |_| {},
        || (),
        |(), found| put(source, places, out.file(), found, &writing),
    )?;
    out.finish()?;
    Ok(())
}

fn put(
    source: &dyn PageSource,
    places: &Places,
    file: &File,
    found: Result<pages::Found, ServeError>,
    writing: &impl Fn(std::io::Error) -> QemuError,
) -> Result<(), QemuError> {
    let found = found.map_err(QemuError::Pages)?;
    let bytes = pages::bytes(source, &found).map_err(QemuError::Pages)?;
    let nowhere = || std::io::Error::other("guest memory that is in no block");
    let (mut range, mut rest) = (found.0, bytes.as_slice());
    while !range.is_empty() {
        let (part, _, offset) = places.of(&range).ok_or_else(|| writing(nowhere()))?;
        let len = usize::try_from(part.len()).map_err(|_| writing(nowhere()))?;
        let (now, later) = rest
            .split_at_checked(len)
            .ok_or_else(|| writing(nowhere()))?;
        file.write_all_at(now, offset).map_err(writing)?;
        range = sonicshot::GpaRange::new(part.end(), range.end());
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Words, options};
    use crate::qmp::QemuVersion;
    use std::ffi::OsString;
    use std::path::Path;

    #[test]
    fn nobody_may_write_to_a_file_that_others_have() {
        let version = |major, minor| QemuVersion {
            major,
            minor,
            micro: 0,
        };
        for (major, minor, line, readonly) in [
            (10, 0, "-m 1G", Some(true)),
            (10, 0, "-m 1G -device virtio-balloon-pci", Some(true)),
            (8, 2, "-m 1G", Some(true)),
            (8, 1, "-m 1G", Some(false)),
            (7, 2, "-m 1G -device virtio-balloon-pci", None),
            (7, 2, "-m 1G -device virtio-mem-pci,id=x", None),
            (10, 0, "-machine pc,memory-backend=ram0", None),
            (10, 0, "-numa node,memdev=a", None),
        ] {
            let words: Vec<OsString> = line.split(' ').map(Into::into).collect();
            let found = options(version(major, minor), &Words(&words), Path::new("/a,b"), 7);
            let found = found
                .ok()
                .map(|found| found[1].to_str().unwrap().to_owned());
            let readonly_is = found
                .as_ref()
                .map(|text| text.contains("readonly=on,rom=off"));
            assert_eq!(readonly_is, readonly, "{line}");
            if let Some(text) = found {
                assert!(text.contains("size=7,mem-path=/a,,b,share=off"), "{text}");
            }
        }
    }
}

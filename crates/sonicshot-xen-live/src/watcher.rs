//! A process that outlives the one that saves, however that ends, and has the domain go on.

use crate::{DomainId, LiveError};
use std::fs::symlink_metadata;
use std::io::{self, PipeReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

/// `$1` is the domain, `$2` the image, `$3` the inode that its name has before, `$4` the process that
/// saves, `$5` whether `xl` writes into a pipe, whose end to read from is descriptor 1, `$6` what `xl` is to
/// do with the domain, `$7` whether it goes on with its image too.
///
/// `xl` is let come to its end: killed, or with a pipe that nobody reads, it cannot resume the domain,
/// and leaves it suspended. Then the domain is paused (`save_domain` in xl's `tools/xl/xl_saverestore.c`).
/// An image that has its name is whole, and its guest must not run on beside it.
const SCRIPT: &str = r#"
read -r word && exit 0
xl_runs() {
    for process in /proc/[0-9]*; do
        case "$(tr '\0' ' ' <"$process/cmdline" 2>/dev/null)" in
            *"xl save $3 $1 /proc/$2/fd/"*) return 0 ;;
        esac
    done
    return 1
}
[ "$5" = pipe ] && cat <&1 >/dev/null
while xl_runs "$1" "$4" "$6"; do sleep 0.1; done
[ "$6" = -p ] || exit 0
[ "$7" = goes-on ] && exec xl unpause "$1"
ls -di -- "$2" 2>/dev/null | {
    read -r inode rest
    [ "${inode:-none}" = "$3" ] && xl unpause "$1"
}
"#;

/// Has the domain go on if this process is killed while it is there.
#[derive(Debug)]
pub(crate) struct Watcher {
    child: Child,
    told: Option<ChildStdin>,
}

impl Watcher {
    /// Watches over a save to `image`, which `xl`, called with the option `after`, writes into `pipe` or
    /// into a file. With `-p` a domain that has its image stays paused, or goes on if `goes_on` says so.
    pub(crate) fn start(
        domain: DomainId,
        image: &Path,
        pipe: Option<&PipeReader>,
        after: &str,
        goes_on: bool,
    ) -> Result<Self, LiveError> {
        let failed = |source| LiveError::Io {
            action: "starting what watches over the save to",
            path: image.to_owned(),
            source,
        };
        let inode = match symlink_metadata(image) {
            Ok(there) => there.ino().to_string(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => "none".into(),
            Err(error) => return Err(failed(error)),
        };
        let (kind, read) = match pipe {
            Some(pipe) => {
                let pipe = OwnedFd::from(pipe.try_clone().map_err(failed)?);
                ("pipe", Stdio::from(pipe))
            }
            None => ("file", Stdio::null()),
        };
        let mut child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "sonicshot-watcher", &domain.to_string()])
            .arg(image)
            .args([&inode, &std::process::id().to_string(), kind, after])
            .arg(if goes_on { "goes-on" } else { "" })
            .stdin(Stdio::piped())
            .stdout(read)
            .stderr(Stdio::null())
            // What ends all processes of a terminal does not end it.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let told = child.stdin.take();
        Ok(Self { child, told })
    }
}

impl Drop for Watcher {
    /// Nobody need watch any more: what is to become of the domain is done, or in this process's hands.
    fn drop(&mut self) {
        if let Some(mut told) = self.told.take() {
            // If it has been killed, there is nobody to tell.
            let _ = told.write_all(b"finished\n");
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::Watcher;
    use crate::DomainId;
    use std::fs;
    use std::io;
    use std::path::Path;
    use std::process::Command;
    use std::time::{Duration, Instant};

    /// An `xl` that says what it was asked, and has its output open for a while before it writes.
    const XL: &str = r#"#!/bin/sh
        [ "$1" = save ] || { echo "$@" >>"$LOG"; exit; }
        [ -z "$OUT" ] || exec 3>"$4"
        : >"$LOG.begun"
        sleep 0.5
        { [ -z "$OUT" ] || head -c 300000 /dev/zero >&3; } && echo saved >>"$LOG"
    "#;

    /// The part of a process that is killed: this test's program, called again.
    fn saves(folder: &Path, how: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        command
            .args(["--exact", "watcher::tests::one_that_is_killed", "--ignored"])
            .env("PATH", path)
            .env("LOG", folder.join("log"))
            .env("HOW", how)
            .env("IMAGE", folder.join("image"));
        command
    }

    #[test]
    #[ignore = "is what the other test kills"]
    fn one_that_is_killed() {
        let (how, image) = (
            std::env::var("HOW").unwrap(),
            std::env::var("IMAGE").unwrap(),
        );
        let (image, id) = (Path::new(&image), std::process::id());
        let (reader, writer) = io::pipe().unwrap();
        let pipe = how.contains("pipe").then_some(&reader);
        let after = if how.contains("-c") { "-c" } else { "-p" };
        let watcher = Watcher::start(
            DomainId::new(7),
            image,
            pipe,
            after,
            how.contains("goes on"),
        )
        .unwrap();
        let mut xl = Command::new("xl");
        let to = format!("/proc/{id}/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
        xl.args(["save", after, "7", &to]);
        if pipe.is_some() {
            xl.env("OUT", "1");
        }
        let mut child = xl.spawn().unwrap();
        if how.contains("orderly") {
            child.wait().unwrap();
            drop(watcher);
            return;
        }
        if how.contains("whole") {
            child.wait().unwrap();
            fs::write(image, "whole").unwrap();
            fs::write(image.with_file_name("ready"), "").unwrap();
        }
        std::thread::sleep(Duration::from_secs(60));
        child.wait().unwrap();
    }

    #[test]
    fn a_domain_goes_on_if_its_save_is_killed_and_has_no_image() {
        for (how, said) in [
            ("file", "saved\nunpause 7\n"),
            ("pipe", "saved\nunpause 7\n"),
            ("file -c", "saved\n"),
            ("file replaced", "saved\nunpause 7\n"),
            // Its image is whole: it stays as `xl save -p` leaves it.
            ("file whole", "saved\n"),
            // But one that is to go on does.
            ("file whole goes on", "saved\nunpause 7\n"),
            ("file orderly", "saved\n"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let (xl, log) = (folder.path().join("xl"), folder.path().join("log"));
            fs::write(&xl, XL).unwrap();
            let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(&xl, executable).unwrap();
            if how.contains("replaced") {
                fs::write(folder.path().join("image"), "another").unwrap();
            }
            let mut process = saves(folder.path(), how).spawn().unwrap();
            if how.contains("orderly") {
                assert!(process.wait().unwrap().success());
            } else {
                let start = Instant::now();
                let whole = how.contains("whole");
                let ready = folder
                    .path()
                    .join(if whole { "ready" } else { "log.begun" });
                while !ready.exists() {
                    assert!(start.elapsed() < Duration::from_secs(30), "{how}");
                    std::thread::sleep(Duration::from_millis(5));
                }
                process.kill().unwrap();
                process.wait().unwrap();
            }
            let start = Instant::now();
            let told = || fs::read_to_string(&log).unwrap_or_default();
            while told() != said && start.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(20));
            }
            // What should not come would come now.
            std::thread::sleep(Duration::from_millis(400));
            assert_eq!(told(), said, "{how}");
        }
    }
}

//! A guest that is paused runs on, whatever happens.

use crate::fake::{Fake, bytes, library};
use sonicshot::GuestMemory;
use sonicshot_libvmi::{LibVmiError, watch};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

fn fake() -> Fake {
    Fake::with_memory(&bytes(1 << 20), &[(0, 1 << 20)])
}

#[test]
fn it_is_resumed_once_however_the_look_ends() {
    let all = ["pause", "flush", "resume", "destroy"];
    let resumed = fake();
    resumed
        .open()
        .unwrap()
        .pause(None)
        .unwrap()
        .resume()
        .unwrap();
    assert_eq!(resumed.log(), all);
    let dropped = fake();
    drop(dropped.open().unwrap().pause(None).unwrap());
    assert_eq!(dropped.log(), all);
    let panicked = fake();
    let guest = panicked.open().unwrap();
    let look = catch_unwind(AssertUnwindSafe(|| {
        let _paused = guest.pause(None).unwrap();
        panic!("while it is paused");
    }));
    assert!(look.is_err());
    drop(guest);
    assert_eq!(panicked.log(), all);
    let twice = fake();
    let guest = twice.open().unwrap();
    let first = guest.pause(None).unwrap();
    let second = guest.pause(None).unwrap();
    drop((guest, first, second));
    let pauses = twice.log().iter().filter(|call| *call == "pause").count();
    let resumes = twice.log().iter().filter(|call| *call == "resume").count();
    assert_eq!((pauses, resumes), (2, 2));
}

#[test]
fn one_that_cannot_be_paused_is_not_read_and_not_resumed() {
    let fake = fake().say("no", "pause");
    let error = fake.open().unwrap().pause(None).unwrap_err();
    assert!(matches!(error, LibVmiError::Pause { .. }), "{error:?}");
    assert_eq!(fake.log(), ["pause", "destroy"]);
    // Nor by the other process.
    let mut command = Command::new("sh");
    command.args(["-c", "test \"$(cat)\" = D && echo told >\"$0\""]);
    let said = tempfile::NamedTempFile::new().unwrap();
    command.arg(said.path());
    assert!(fake.open().unwrap().pause(Some(command)).is_err());
    assert_eq!(std::fs::read_to_string(said.path()).unwrap(), "told\n");
}

#[test]
fn one_that_does_not_run_on_is_told() {
    let fake = fake().say("no", "resume");
    let error = fake
        .open()
        .unwrap()
        .pause(None)
        .unwrap()
        .resume()
        .unwrap_err();
    assert!(matches!(error, LibVmiError::Resume { .. }), "{error:?}");
    assert!(error.to_string().contains("xl unpause"), "{error}");
}

#[test]
fn who_watches_resumes_only_a_guest_whose_saver_is_gone() {
    let done = fake();
    let library = || Ok(library());
    assert!(!watch(&b"D"[..], library, &done.domain()).unwrap());
    assert!(done.log().is_empty());
    let gone = fake();
    assert!(watch(&b""[..], library, &gone.domain()).unwrap());
    assert_eq!(gone.log(), ["resume", "destroy"]);
    let neither = fake().say("no", "resume");
    let error = watch(&b""[..], library, &neither.domain()).unwrap_err();
    assert!(matches!(error, LibVmiError::Resume { .. }), "{error:?}");
}

#[test]
fn a_watchdog_that_does_not_start_leaves_the_guest_alone() {
    let fake = fake();
    let guest = fake.open().unwrap();
    let error = guest.pause(Some(Command::new("/nowhere"))).unwrap_err();
    assert!(matches!(error, LibVmiError::Watchdog { .. }), "{error:?}");
    assert!(fake.log().is_empty());
    assert_eq!(guest.pause(None).unwrap().layout().bytes(), 1 << 20);
}

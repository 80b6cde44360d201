//! A Firecracker diff snapshot without its base is told by the type of the error.
use sonicshot_offline::{AnalyzeOptions, OfflineError, OpenOptions, Snapshot};

fn main() -> Result<(), OfflineError> {
    let path = std::env::args().nth(1).unwrap_or_default();
    let snapshot = Snapshot::open(&path, &OpenOptions::new())?;
    match snapshot.analyze(&AnalyzeOptions::new()) {
        Ok(guest) => println!("{path}: Linux {}", guest.facts().release),
        Err(OfflineError::NotWhole { at, .. }) => println!("{path} is a diff: no page at {at}"),
        Err(error) => return Err(error),
    }
    Ok(())
}

//! The README's example of pruning a dump, word for word.

use sonicshot::ClassSet;
use sonicshot_offline::{AnalyzeOptions, OfflineError, OpenOptions, PruneOptions, Snapshot};

fn main() -> Result<(), OfflineError> {
    let snapshot = Snapshot::open("guest.raw", &OpenOptions::new())?;
    let guest = snapshot.analyze(&AnalyzeOptions::new())?;
    let plan = guest.plan(ClassSet::DEFAULT_DROP)?;
    let stats = plan.prune_to("pruned.raw", &PruneOptions::new())?;
    let release = &guest.facts().release;
    println!("Linux {release}: {} bytes left out", stats.dropped_bytes);
    Ok(())
}

//! A save as a checkpoint that refers to the domain's disks.
//!
//! The image that `xl` wrote lies in a file without a name, and the domain is paused: what it has written
//! is on its disks, and it writes no more. So they are opened and compared now, and not before.

use crate::{AfterSave, Compress, ImageCompression, LiveError, SaveOptions, path_of};
use sonicshot::ClassSet;
use sonicshot::checkpoint::Compression;
use sonicshot_dump::{DiskImage, NewFile};
use sonicshot_offline::{
    AnalyzeOptions, CheckpointOptions, OfflineError, OpenOptions, Saved, Snapshot,
};
use std::fs::File;
use std::path::Path;

/// Refuses images that cannot be read, and one that somebody writes to if the domain goes on: it would
/// write over what is referred to.
pub(crate) fn check_disks(options: &SaveOptions) -> Result<(), LiveError> {
    for (_, path) in &options.disks {
        let image = DiskImage::open(path)?;
        if options.after == AfterSave::GoOn {
            let pinned = image.check_pinned();
            pinned.map_err(|source| OfflineError::NotPinned { source })?;
        }
    }
    Ok(())
}

/// Makes durable what the domain has written to its disks: what is referred to must not be lost when this
/// machine stops.
fn sync_disks(options: &SaveOptions) -> Result<(), LiveError> {
    for (_, path) in &options.disks {
        let image = DiskImage::open(path)?;
        let synced = image.files().into_iter().try_for_each(File::sync_data);
        synced.map_err(|source| LiveError::Io {
            action: "writing to disk what is in",
            path: path.clone(),
            source,
        })?;
    }
    Ok(())
}

/// Makes the checkpoint at `path` of the image in `image`, which is gone then.
pub(crate) fn write(
    image: NewFile,
    path: &Path,
    options: &SaveOptions,
) -> Result<Saved, LiveError> {
    let name = path_of(image.file());
    let file = File::open(&name).map_err(|source| LiveError::Io {
        action: "opening the image for",
        path: path.to_owned(),
        source,
    })?;
    // Nobody has it open for writing any more.
    drop(image);
    let mut known = OpenOptions::new();
    known.symbols.clone_from(&options.symbols);
    let snapshot = Snapshot::open(path_of(&file), &known)?;
    let analyze = AnalyzeOptions::new().zero_pages(false).file_places(true);
    sync_disks(options)?;
    let writing = writing(options)?;
    match snapshot.analyze(&analyze) {
        Ok(guest) => Ok(guest.plan(ClassSet::DEFAULT_DROP)?.save(path, &writing)?),
        // The look at the domain has told why.
        Err(OfflineError::Guest { .. }) => Ok(snapshot.keep_all()?.save(path, &writing)?),
        Err(error) => Err(error.into()),
    }
}

fn writing(options: &SaveOptions) -> Result<CheckpointOptions, LiveError> {
    let compression = match options.compress {
        Compress::No => Compression::None,
        Compress::By(ImageCompression::Lz4) => Compression::Lz4,
        Compress::IfFree | Compress::By(_) => Compression::ZSTD,
    };
    let mut pages = sonicshot::checkpoint::SaveOptions::new(compression);
    pages.progress.clone_from(&options.progress);
    let mut writing = CheckpointOptions::new(pages)
        .overwrite(options.overwrite)
        .disk_hash(options.disk_hash)
        .vmm("xen")
        // Of one that goes on nobody has them open, which is looked at once more.
        .disks_are_open(options.after != AfterSave::GoOn);
    for (name, path) in &options.disks {
        writing = writing.disk(name, path)?;
    }
    Ok(writing)
}

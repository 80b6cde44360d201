//! `sonicshot symbols`.

use crate::args::SymbolsMakeArgs;
use crate::error::CliError;
use crate::json::{OfSymbols, SymbolsReport, Version, line, path};
use crate::output::{io, overwrite};
use crate::report::{count, say, size};
use sonicshot::to_u64;
use sonicshot_dump::NewFile;
use sonicshot_vmi::symbols::{SymbolFile, SymbolSource, open_symbol_file};
use std::fs::File;
use std::io::Write;
use std::path::Path;

pub(crate) fn make(args: &SymbolsMakeArgs) -> Result<(), CliError> {
    let out = args.output.as_path();
    // Before the work, not after it.
    if out == Path::new("-") {
        let what = "a symbol file goes to a file, not to standard output: -o FILE";
        return Err(CliError::Usage { what: what.into() });
    }
    if !args.force && out.exists() {
        return Err(CliError::Exists { path: out.into() });
    }
    let sources = args.files.iter().map(|path| open_symbol_file(path));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let sources: Vec<&dyn SymbolSource> = sources.iter().map(AsRef::as_ref).collect();
    // What is wrong is so of what it is made of.
    let names: Vec<String> = args
        .files
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let file = SymbolFile::gather(names.join(", "), &sources)?;
    file.check_build()?;
    let text = file.to_text();
    write(args, &text)?;
    if args.json {
        let report = SymbolsReport {
            version: Version::default(),
            kind: OfSymbols::default(),
            path: path(out),
            build_id: file.build_id().map(hex),
            banner: file.banner().map(str::to_owned),
            facts: to_u64(file.len()),
            bytes: to_u64(text.len()),
        };
        say!("{}", line(&report));
        return Ok(());
    }
    let build = file.build_id().map_or_else(|| "not told".into(), hex);
    say!(
        "{}: {} facts in {}, build ID {build}",
        out.display(),
        count(to_u64(file.len())),
        size(to_u64(text.len()))
    );
    if let Some(banner) = file.banner() {
        say!("{banner}");
    }
    Ok(())
}

/// The file appears whole or not at all, for no more eyes than what it was made of.
fn write(args: &SymbolsMakeArgs, text: &str) -> Result<(), CliError> {
    let open = |path| File::open(path).map_err(io("opening", path));
    let inputs = args.files.iter().map(|path| open(path.as_path()));
    let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
    let inputs: Vec<&File> = inputs.iter().collect();
    let new = NewFile::create(&args.output, overwrite(args.force), &inputs)?;
    let written = new.file().write_all(text.as_bytes());
    written.map_err(io("writing", &args.output))?;
    new.finish()?;
    Ok(())
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

//! The library example of the README, word for word.

use sonicshot::{DropClasses, Gpa, GuestBytes, MappedRegions};
use sonicshot_vmi::{AnalysisOptions, analyze};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ram = std::fs::read("guest.raw")?;
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
    let guest = analyze(&memory, &AnalysisOptions::new())?;
    let plan = guest.plan(&DropClasses::default());
    let release = &guest.facts().release;
    println!("Linux {release}: {} bytes can go", plan.dropped_bytes());
    Ok(())
}

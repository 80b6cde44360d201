//! Replays every target's seeds, and many seeded mutations of them, on stable Rust: no target
//! may panic or hang.
#![allow(missing_docs)]

use sonicshot_fuzz::TARGETS;
use std::fs;
use std::path::Path;

/// Mutations of each seed; more by `SONICSHOT_FUZZ_ROUNDS`.
const ROUNDS: u64 = 400;

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Changes a few bytes, words or lengths of `seed`.
fn mutate(seed: &[u8], state: &mut u64) -> Vec<u8> {
    const WORDS: [u64; 8] = [
        0,
        1,
        0xff,
        0xffff,
        0x7fff_ffff,
        0xffff_ffff,
        1 << 63,
        u64::MAX,
    ];
    let mut data = seed.to_vec();
    for _ in 0..=next(state) % 4 {
        if data.is_empty() {
            break;
        }
        let at = usize::try_from(next(state) % data.len() as u64).unwrap();
        match next(state) % 5 {
            0 => data[at] ^= 1 << (next(state) % 8),
            1 => data[at] = next(state).to_le_bytes()[0],
            2 => data.truncate(at),
            3 => {
                let word = WORDS[usize::try_from(next(state) % 8).unwrap()].to_le_bytes();
                let len = word.len().min(data.len() - at);
                data[at..at + len].copy_from_slice(&word[..len]);
            }
            _ => {
                let from = usize::try_from(next(state) % data.len() as u64).unwrap();
                let len = 8.min(data.len() - at.max(from));
                data.copy_within(from..from + len, at);
            }
        }
    }
    data
}

#[test]
fn no_target_panics() {
    let rounds = std::env::var("SONICSHOT_FUZZ_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS);
    for (name, target) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(name);
        let mut seeds: Vec<_> = fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        seeds.sort();
        assert!(!seeds.is_empty(), "{name} has no seed");
        for seed in seeds {
            let data = fs::read(&seed).unwrap();
            target(&data);
            let mut state = 0x9e37_79b9_7f4a_7c15;
            for _ in 0..rounds {
                target(&mutate(&data, &mut state));
            }
        }
    }
}

//! What differs between the processors that a guest may run on: a folder an architecture.

pub(crate) mod x86_64;

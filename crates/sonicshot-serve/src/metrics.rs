//! The counters of a server: counted by its threads, read by whoever watches it.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use sonicshot::Tally;

/// Upper bounds of the latency's buckets, in microseconds.
const BUCKETS: [u64; 12] = [
    5, 10, 20, 50, 100, 200, 500, 1_000, 5_000, 20_000, 100_000, 1_000_000,
];

/// Counters of all virtual machines together.
#[derive(Debug, Default)]
pub struct Metrics {
    machines: AtomicU64,
    served: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    faults: AtomicU64,
    faulted_bytes: AtomicU64,
    prefetched_bytes: AtomicU64,
    planned_bytes: AtomicU64,
    removed_bytes: AtomicU64,
    waits: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    latency: [AtomicU64; BUCKETS.len()],
    latency_sum: AtomicU64,
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Metrics {
    pub(crate) fn cache(&self, hit: bool) {
        add(if hit { &self.hits } else { &self.misses }, 1);
    }

    /// Reads that found nothing in the cache: chunks were decompressed, or pages read from the file.
    #[must_use]
    pub fn cache_misses(&self) -> u64 {
        get(&self.misses)
    }

    pub(crate) fn fault(&self, took: Duration) {
        add(&self.faults, 1);
        let seconds = Tally::new(took.as_secs()).times(1_000_000);
        let micros = seconds.and(took.subsec_micros().into()).get();
        add(&self.latency_sum, micros);
        let bucket = BUCKETS.iter().position(|bound| micros <= *bound);
        if let Some(bucket) = bucket.and_then(|bucket| self.latency.get(bucket)) {
            add(bucket, 1);
        }
    }

    /// Faults that were served.
    #[must_use]
    pub fn faults(&self) -> u64 {
        get(&self.faults)
    }

    pub(crate) fn faulted(&self, bytes: u64) {
        add(&self.faulted_bytes, bytes);
    }

    pub(crate) fn prefetched(&self, bytes: u64) {
        add(&self.prefetched_bytes, bytes);
    }

    pub(crate) fn planned(&self, bytes: u64) {
        add(&self.planned_bytes, bytes);
    }

    /// Bytes that were put in place before they were asked for.
    #[must_use]
    pub fn prefetched_bytes(&self) -> u64 {
        get(&self.prefetched_bytes)
    }

    pub(crate) fn removed(&self, bytes: u64) {
        add(&self.removed_bytes, bytes);
    }

    /// Bytes that VMMs gave back.
    #[must_use]
    pub fn removed_bytes(&self) -> u64 {
        get(&self.removed_bytes)
    }

    /// A sleep because pages are being given back.
    pub(crate) fn waited(&self) {
        add(&self.waits, 1);
    }

    #[cfg(feature = "server")]
    pub(crate) fn began(&self) {
        add(&self.machines, 1);
    }

    #[cfg(feature = "server")]
    pub(crate) fn ended(&self) {
        self.machines.fetch_sub(1, Ordering::Relaxed);
        add(&self.served, 1);
    }

    #[cfg(feature = "server")]
    pub(crate) fn refused(&self) {
        add(&self.refused, 1);
    }

    #[cfg(feature = "server")]
    pub(crate) fn failed(&self) {
        add(&self.failed, 1);
    }

    /// The counters as Prometheus reads them (text format 0.0.4).
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        for (name, kind, help, value) in [
            (
                "machines",
                "gauge",
                "Virtual machines that are served",
                &self.machines,
            ),
            (
                "machines_ended_total",
                "counter",
                "Virtual machines that were served and ended",
                &self.served,
            ),
            (
                "connections_refused_total",
                "counter",
                "Connections that were refused",
                &self.refused,
            ),
            (
                "machines_failed_total",
                "counter",
                "Virtual machines that were ended because they could not be served",
                &self.failed,
            ),
            (
                "fault_bytes_total",
                "counter",
                "Bytes put in place because of faults, zeroes not counted",
                &self.faulted_bytes,
            ),
            (
                "prefetch_planned_bytes_total",
                "counter",
                "Bytes that are to be in place before they are asked for",
                &self.planned_bytes,
            ),
            (
                "prefetch_bytes_total",
                "counter",
                "Bytes put in place before they were asked for",
                &self.prefetched_bytes,
            ),
            (
                "removed_bytes_total",
                "counter",
                "Bytes that VMMs gave back",
                &self.removed_bytes,
            ),
            (
                "remove_waits_total",
                "counter",
                "Sleeps because pages were being given back",
                &self.waits,
            ),
            (
                "cache_hits_total",
                "counter",
                "Chunks that were found decompressed",
                &self.hits,
            ),
            (
                "cache_misses_total",
                "counter",
                "Chunks that had to be decompressed",
                &self.misses,
            ),
        ] {
            writeln!(out, "# HELP sonicshot_serve_{name} {help}.")?;
            writeln!(out, "# TYPE sonicshot_serve_{name} {kind}")?;
            writeln!(out, "sonicshot_serve_{name} {}", get(value))?;
        }
        self.write_latency(out)
    }

    fn write_latency(&self, out: &mut String) -> fmt::Result {
        const NAME: &str = "sonicshot_serve_fault_seconds";
        writeln!(
            out,
            "# HELP {NAME} From a fault's being read to its page's being there."
        )?;
        writeln!(out, "# TYPE {NAME} histogram")?;
        let mut sum = Tally::ZERO;
        for (bound, count) in BUCKETS.iter().zip(&self.latency) {
            sum.add(get(count));
            writeln!(out, "{NAME}_bucket{{le=\"{}\"}} {sum}", Micros(*bound))?;
        }
        let all = get(&self.faults).max(sum.get());
        writeln!(out, "{NAME}_bucket{{le=\"+Inf\"}} {all}")?;
        writeln!(out, "{NAME}_sum {}", Micros(get(&self.latency_sum)))?;
        writeln!(out, "{NAME}_count {all}")
    }
}

/// Microseconds, written as seconds.
struct Micros(u64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let metrics = Metrics::default();
        for micros in [3, 7, 7, 2_000_000] {
            metrics.fault(Duration::from_micros(micros));
        }
        metrics.cache(true);
        let text = metrics.to_text();
        for line in [
            "# TYPE sonicshot_serve_fault_seconds histogram",
            "sonicshot_serve_fault_seconds_bucket{le=\"0.000005\"} 1",
            "sonicshot_serve_fault_seconds_bucket{le=\"0.000010\"} 3",
            "sonicshot_serve_fault_seconds_bucket{le=\"1.000000\"} 3",
            "sonicshot_serve_fault_seconds_bucket{le=\"+Inf\"} 4",
            "sonicshot_serve_fault_seconds_sum 2.000017",
            "sonicshot_serve_fault_seconds_count 4",
            "sonicshot_serve_cache_hits_total 1",
            "sonicshot_serve_machines 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}

//! Counters for whoever asks: Prometheus, `curl`.

use crate::error::ServeError;
use crate::metrics::Metrics;
use crate::socket::Named;
use crate::until::Until;
use core::time::Duration;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

/// The longest request that is read.
const MAX_REQUEST: usize = 4096;
/// The time that a request may take, whole and with its answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Answers requests for the counters, in a thread, for as long as the process lives: at a port of
/// the loopback (`127.0.0.1:9100`, `[::1]:9100`) or a socket, which `address` names with a slash.
/// Counters tell nothing of the guest's memory but how much of it was touched.
///
/// # Errors
/// [`ServeError::Io`] if the address cannot be had, or is for others than this host.
pub fn expose(address: &str, metrics: Arc<Metrics>) -> Result<(), ServeError> {
    let path = Path::new(address);
    let failed = || ServeError::io("listening for requests for metrics at", path);
    if address.contains('/') {
        let socket = Named::bind(path, |_| Ok(()))?;
        let accept = move || socket.listener.accept().map(|(stream, _)| stream);
        return start(accept, metrics);
    }
    let parsed: Option<SocketAddr> = address.parse().ok();
    let Some(parsed) = parsed.filter(|address| address.ip().is_loopback()) else {
        let what = "neither a socket's name with a slash nor a port of the loopback";
        let error = io::Error::new(io::ErrorKind::InvalidInput, what);
        return Err(failed()(error));
    };
    let listener = TcpListener::bind(parsed).map_err(failed())?;
    start(move || listener.accept().map(|(stream, _)| stream), metrics)
}

/// A connection that does not wait for ever.
trait Hasty: Read + Write + Send + 'static {
    fn hurry(&self, left: Duration) -> io::Result<()>;
}

impl Hasty for UnixStream {
    fn hurry(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left))?;
        self.set_write_timeout(Some(left))
    }
}

impl Hasty for TcpStream {
    fn hurry(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left))?;
        self.set_write_timeout(Some(left))
    }
}

fn start<S: Hasty>(
    accept: impl Fn() -> io::Result<S> + Send + 'static,
    metrics: Arc<Metrics>,
) -> Result<(), ServeError> {
    let thread = std::thread::Builder::new().name("sonicshot-metrics".into());
    let spawned = thread.spawn(move || {
        loop {
            // One that fails has gone; one after the other is enough.
            match accept() {
                Ok(stream) => drop(answer(stream, &metrics)),
                Err(_) => std::thread::sleep(PATIENCE),
            }
        }
    });
    spawned.map(drop).map_err(|source| ServeError::System {
        operation: "starting a thread",
        source,
    })
}

fn answer<S: Hasty>(mut stream: S, metrics: &Metrics) -> io::Result<()> {
    let until = Until::new(PATIENCE);
    // None left is an error too.
    let hurry = |stream: &S| stream.hurry(until.left());
    let mut request = Vec::new();
    let mut part = [0; 512];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < MAX_REQUEST {
        hurry(&stream)?;
        match stream.read(&mut part)? {
            0 => break,
            got => request.extend_from_slice(part.get(..got).unwrap_or(&part)),
        }
    }
    let (status, text) = if request.starts_with(b"GET ") {
        ("200 OK", metrics.to_text())
    } else {
        ("405 Method Not Allowed", String::new())
    };
    let len = text.len();
    hurry(&stream)?;
    // At once: there is room for so much.
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\n\
         Content-Length: {len}\r\nConnection: close\r\n\r\n{text}"
    );
    stream.write_all(answer.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn counters_are_had_by_a_get_on_this_host_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let metrics = Arc::new(Metrics::default());
        metrics.cache(true);
        // What is no socket stays.
        std::fs::write(&path, "x").unwrap();
        let refused = expose(path.to_str().unwrap(), Arc::default()).unwrap_err();
        assert!(refused.to_string().contains("is not a socket"), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
        std::fs::remove_file(&path).unwrap();
        // What an earlier server has left.
        drop(UnixListener::bind(&path).unwrap());
        expose(path.to_str().unwrap(), Arc::clone(&metrics)).unwrap();
        for _ in 0..2 {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(
                answer.contains("\nsonicshot_serve_cache_hits_total 1\n"),
                "{answer}"
            );
        }
        // A request that does not end is answered all the same.
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"GET ").unwrap();
        stream.write_all(&[b'a'; MAX_REQUEST]).unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        // One that takes its time does not keep others from theirs.
        let slow = UnixStream::connect(&path).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let limit = Some(Duration::from_secs(20));
        stream.set_read_timeout(limit).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while (&slow).write_all(b"x").is_ok() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let answered = stream.read_exact(&mut answer);
            slow.shutdown(std::net::Shutdown::Both).unwrap();
            answered.unwrap();
        });
        assert_eq!(&answer, b"HTTP/1.1 200");
        // Somebody serves there.
        assert!(expose(path.to_str().unwrap(), Arc::clone(&metrics)).is_err());
        for address in ["0.0.0.0:0", "192.0.2.1:80", "localhost", ""] {
            assert!(expose(address, Arc::clone(&metrics)).is_err(), "{address}");
        }
    }
}

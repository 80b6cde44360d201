//! Counters for whoever asks: Prometheus, `curl`.

use crate::error::ServeError;
use crate::metrics::Metrics;
use crate::socket::Named;
use crate::until::Until;
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;

/// The longest request that is read.
const MAX_REQUEST: usize = 4096;
/// The time that a request may take, whole and with its answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Connections whose request has not come whole.
const MAX_ASKING: usize = 32;

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
        let listener = &socket.listener;
        listener.set_nonblocking(true).map_err(failed())?;
        let accept = |socket: &Named| {
            let (stream, _) = socket.listener.accept()?;
            stream.set_nonblocking(true).map(|()| stream)
        };
        return start(socket, accept, metrics);
    }
    let parsed: Option<SocketAddr> = address.parse().ok();
    let Some(parsed) = parsed.filter(|address| address.ip().is_loopback()) else {
        let what = "neither a socket's name with a slash nor a port of the loopback";
        let error = io::Error::new(io::ErrorKind::InvalidInput, what);
        return Err(failed()(error));
    };
    let listener = TcpListener::bind(parsed).map_err(failed())?;
    listener.set_nonblocking(true).map_err(failed())?;
    let accept = |listener: &TcpListener| {
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(true).map(|()| stream)
    };
    start(listener, accept, metrics)
}

/// Answers whoever comes to `listener`, which does not block, nor what it gives.
fn start<L: AsFd + Send + 'static, S: Read + Write + AsFd + Send + 'static>(
    listener: L,
    accept: impl Fn(&L) -> io::Result<S> + Send + 'static,
    metrics: Arc<Metrics>,
) -> Result<(), ServeError> {
    let thread = std::thread::Builder::new().name("sonicshot-metrics".into());
    let spawned = thread.spawn(move || {
        let mut asking = VecDeque::new();
        loop {
            if wait(&listener, &mut asking, &metrics).is_err() {
                std::thread::sleep(PATIENCE);
            }
            asking.retain(|one: &Asking<S>| !one.until.left().is_zero());
            match accept(&listener) {
                Ok(stream) => asking.push_back(Asking::new(stream)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // One that fails has gone, or there is no descriptor for it: others give theirs back.
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
            // Who has waited longest makes place: whoever asks does so at once.
            if asking.len() > MAX_ASKING {
                asking.pop_front();
            }
        }
    });
    spawned.map(drop).map_err(|source| ServeError::System {
        operation: "starting a thread",
        source,
    })
}

/// A connection whose request has not come whole.
struct Asking<S> {
    stream: S,
    request: Vec<u8>,
    until: Until,
}

/// Waits until somebody connects, has more to say, or has had his time; answers who has said all.
fn wait<S: Read + Write + AsFd>(
    listener: &impl AsFd,
    asking: &mut VecDeque<Asking<S>>,
    metrics: &Metrics,
) -> io::Result<()> {
    let first = asking
        .front()
        .map(|one| Timespec::try_from(one.until.left()));
    let limit = first.transpose().map_err(io::Error::other)?;
    let mut ready = vec![PollFd::new(listener, PollFlags::IN)];
    ready.extend(
        asking
            .iter()
            .map(|one| PollFd::new(&one.stream, PollFlags::IN)),
    );
    match poll(&mut ready, limit.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let ready: Vec<bool> = ready
        .iter()
        .skip(1)
        .map(|fd| !fd.revents().is_empty())
        .collect();
    let mut ready = ready.into_iter();
    asking.retain_mut(|one| ready.next() != Some(true) || one.go_on(metrics));
    Ok(())
}

impl<S: Read + Write> Asking<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            request: Vec::new(),
            until: Until::new(PATIENCE),
        }
    }

    /// Takes in what there is, and answers it. Says whether more is waited for.
    fn go_on(&mut self, metrics: &Metrics) -> bool {
        let mut part = [0; 512];
        let got = match self.stream.read(&mut part) {
            Ok(got) => part.get(..got).unwrap_or(&part),
            Err(error) => {
                return matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                );
            }
        };
        self.request.extend_from_slice(got);
        let whole = got.is_empty() || self.request.windows(4).any(|end| end == b"\r\n\r\n");
        if !whole && self.request.len() < MAX_REQUEST {
            return true;
        }
        // At once: there is room for so much. Who has gone needs none.
        let _ = self
            .stream
            .write_all(answer(&self.request, metrics).as_bytes());
        false
    }
}

fn answer(request: &[u8], metrics: &Metrics) -> String {
    let (status, text) = if request.starts_with(b"GET ") {
        ("200 OK", metrics.to_text())
    } else {
        ("405 Method Not Allowed", String::new())
    };
    let len = text.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\n\
         Content-Length: {len}\r\nConnection: close\r\n\r\n{text}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::Instant;

    /// Whoever says nothing keeps nobody waiting: fewer than there are places, or more.
    #[test]
    fn who_is_silent_keeps_nobody_waiting() {
        // A port that nobody has.
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = port.local_addr().unwrap().to_string();
        drop(port);
        expose(&address, Arc::default()).unwrap();
        let silent = |count: usize| -> Vec<_> {
            let all = (0..count).map(|_| TcpStream::connect(&address).unwrap());
            all.collect()
        };
        for count in [8, 4 * MAX_ASKING] {
            let mut all = silent(count);
            for _ in 0..20 {
                let start = Instant::now();
                let mut stream = TcpStream::connect(&address).unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
                stream.write_all(b"\r\n").unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
                assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
                all.extend(silent(8));
            }
            // They are closed, the oldest first.
            let limit = Some(Duration::from_secs(20));
            all[0].set_read_timeout(limit).unwrap();
            assert_eq!(all[0].read(&mut [0]).unwrap(), 0);
        }
    }

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

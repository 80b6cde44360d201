//! The messages of a QEMU that takes a guest by postcopy: the pages that it asks for, and the end.

use rustix::net::{RecvFlags, recv};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;

/// The most requests that wait for an answer.
const MAX_REQUESTS: usize = 1 << 16;
/// The longest request, in bytes: a huge page of 1 GiB.
const MAX_REQUEST: u64 = 1 << 30;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQUEST_NAMED: u16 = 3;
const REQUEST: u16 = 4;

/// The pages that QEMU asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub block: String,
    pub offset: u64,
    pub len: u64,
}

/// QEMU's messages so far.
#[derive(Debug, Default)]
pub(crate) struct Hearing {
    pub requests: VecDeque<Request>,
    /// Whether all was well, once it says so.
    pub end: Option<bool>,
    /// The block of the last request.
    last: Option<String>,
    /// The beginning of a message.
    rest: Vec<u8>,
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Hearing {
    /// Takes all that has come; waits for nothing.
    pub(crate) fn hear(&mut self, socket: &UnixStream) -> io::Result<()> {
        let mut bytes = [0; 4096];
        while self.end.is_none() {
            match recv(socket, bytes.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((got, _)) => match bytes.get(..got) {
                    None | Some([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Some(got) => self.take(got)?,
                },
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.rest.extend_from_slice(bytes);
        let mut rest = self.rest.as_slice();
        while self.end.is_none()
            && let Some(len) = whole(rest)
            && let Some((mut now, later)) = rest.split_at_checked(len)
        {
            match message(&mut now, &mut self.last)? {
                Heard::Request(request) if self.requests.len() < MAX_REQUESTS => {
                    self.requests.push_back(request);
                }
                Heard::Request(_) => {
                    return Err(invalid("QEMU asks for more pages than it can wait for"));
                }
                Heard::End(well) => self.end = Some(well),
                Heard::Nothing => {}
            }
            rest = later;
        }
        self.rest = rest.to_vec();
        Ok(())
    }
}

/// The length of the message at the beginning of `bytes`, as far as its head is there.
fn whole(bytes: &[u8]) -> Option<usize> {
    let (_, rest) = bytes.split_first_chunk::<2>()?;
    let (len, _) = rest.split_first_chunk::<2>()?;
    usize::from(u16::from_be_bytes(*len)).checked_add(4)
}

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Request(Request),
    End(bool),
    Nothing,
}

/// The next message; `last` is the block of the last request.
fn message(from: &mut impl Read, last: &mut Option<String>) -> io::Result<Heard> {
    let kind = number::<2>(from)?;
    let len = number::<2>(from)?;
    let mut body = vec![0; usize::from(u16::from_be_bytes(len))];
    from.read_exact(&mut body)?;
    let mut body = body.as_slice();
    match u16::from_be_bytes(kind) {
        SHUT => Ok(Heard::End(number::<4>(&mut body)? == [0; 4])),
        PONG => Ok(Heard::Nothing),
        kind @ (REQUEST_NAMED | REQUEST) => {
            let offset = u64::from_be_bytes(number(&mut body)?);
            let len = u64::from(u32::from_be_bytes(number(&mut body)?));
            if kind == REQUEST_NAMED {
                let [name_len] = number::<1>(&mut body)?;
                let name = body.get(..usize::from(name_len));
                let name = name.and_then(|name| str::from_utf8(name).ok());
                *last = Some(
                    name.ok_or_else(|| invalid("a block's name that is none"))?
                        .into(),
                );
            }
            let block = last
                .clone()
                .ok_or_else(|| invalid("a page of a block without a name"))?;
            if len == 0 || len > MAX_REQUEST {
                return Err(invalid("a request of an invalid length"));
            }
            Ok(Heard::Request(Request { block, offset, len }))
        }
        _ => Err(invalid("a message of QEMU's that is not known")),
    }
}

fn number<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads all messages that are in `data`.
pub(crate) fn fuzz(mut data: &[u8]) {
    let mut last = None;
    while !data.is_empty() && message(&mut data, &mut last).is_ok() {}
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{Heard, Hearing, MAX_REQUEST, MAX_REQUESTS, Request, message};
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    pub(crate) fn said(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut out = kind.to_be_bytes().to_vec();
        out.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        out.extend(body);
        out
    }

    pub(crate) fn request(name: Option<&str>, offset: u64, len: u32) -> Vec<u8> {
        let mut body = offset.to_be_bytes().to_vec();
        body.extend(len.to_be_bytes());
        if let Some(name) = name {
            body.push(u8::try_from(name.len()).unwrap());
            body.extend(name.as_bytes());
        }
        said(if name.is_some() { 3 } else { 4 }, &body)
    }

    #[test]
    fn what_qemu_says_is_read_or_refused() {
        let mut all = request(Some("ram0"), 0x5000, 4096);
        all.extend(request(None, 0x7000, 4096));
        all.extend(said(2, &[0; 4]));
        all.extend(said(1, &[0; 4]));
        let (mut from, mut last) = (all.as_slice(), None);
        let one = |offset| {
            let block = "ram0".into();
            Heard::Request(Request {
                block,
                offset,
                len: 4096,
            })
        };
        for expected in [one(0x5000), one(0x7000), Heard::Nothing, Heard::End(true)] {
            assert_eq!(message(&mut from, &mut last).unwrap(), expected);
        }
        let long = u32::try_from(MAX_REQUEST).unwrap();
        assert!(message(&mut request(Some("x"), 0, long).as_slice(), &mut None).is_ok());
        for wrong in [
            request(None, 0, 4096),
            request(Some("x"), 0, 0),
            request(Some("x"), 0, long + 1),
            said(3, &[0; 12]),
            said(3, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 9, b'x']),
            said(77, &[]),
            said(1, &[]),
            vec![0, 1, 0],
        ] {
            assert!(
                message(&mut wrong.as_slice(), &mut None).is_err(),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn messages_come_in_pieces() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut heard = Hearing::default();
        heard.hear(&theirs).unwrap();
        let mut all = request(Some("ram0"), 0x5000, 4096);
        all.extend(request(None, 0x7000, 4096));
        all.extend(said(1, &[0; 4]));
        for byte in all {
            assert_eq!(heard.end, None);
            ours.write_all(&[byte]).unwrap();
            heard.hear(&theirs).unwrap();
        }
        assert_eq!(heard.end, Some(true));
        let offsets: Vec<_> = heard.requests.iter().map(|asked| asked.offset).collect();
        assert_eq!(offsets, [0x5000, 0x7000]);
        // It says nothing more then; who goes away before is told of.
        drop(ours);
        heard.hear(&theirs).unwrap();
        assert!(Hearing::default().hear(&theirs).is_err());
    }

    #[test]
    fn who_asks_without_end_is_refused() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut heard = Hearing::default();
        let mut refused = None;
        for number in 0..=MAX_REQUESTS as u64 {
            assert!(refused.is_none(), "{number}");
            ours.write_all(&request(Some("x"), number << 12, 4096))
                .unwrap();
            refused = heard.hear(&theirs).err();
        }
        assert_eq!(heard.requests.len(), MAX_REQUESTS);
        assert!(refused.is_some());
    }
}

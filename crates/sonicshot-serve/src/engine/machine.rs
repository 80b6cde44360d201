//! The thread of one virtual machine.

use super::asks::{Asked, Asks};
use super::control::Control;
use super::kept::Kept;
use super::plan::{Part, Plan, Turn};
use super::region::{Region, VmRegion};
use super::{Prefetch, VmOptions};
use crate::address::HostAddress;
use crate::error::ServeError;
use crate::source::{Content, Look, PageSource, Piece};
use crate::uffd::{Event, Kind, Placed, Uffd, Wake};
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use sonicshot::checkpoint::CheckpointError;
use sonicshot::{Gpa, GpaRange, Tally, to_u64, to_usize};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Faults that are held at once. A thread waits for one page at a time: more come only of threads
/// that were ended meanwhile. Those beyond come again.
const FAULTS_HELD: usize = if cfg!(test) { 8 } else { 1 << 16 };
/// Reads of events before anything else is done.
const READS_AT_ONCE: usize = 16;
/// Pages that a prefetch looks at before it looks for faults again.
const LOOKS_AT_ONCE: usize = 1024;
/// The time for which a remove is waited for, at first and at most: it ends when the thread that
/// removes has run.
const FIRST_WAIT: Duration = Duration::from_micros(20);
const LAST_WAIT: Duration = Duration::from_millis(1);
/// The time between two looks at a descriptor that somebody makes sleep.
const PACE: Duration = Duration::from_micros(200);

/// The way in which it ended.
#[derive(Debug)]
pub(crate) enum End {
    /// It was asked to.
    Stopped,
    /// The process whose memory it was has ended.
    Ended,
    /// The peer that asks for pages has all of them, and asks no more.
    Complete,
    /// A page could not be brought in, and the process was ended.
    #[cfg_attr(
        not(feature = "server"),
        expect(dead_code, reason = "a server logs it")
    )]
    Failed(Arc<ServeError>),
}

/// The outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Done,
    /// Something is in place now: look again.
    Again,
    /// Pages are being given back: first read what the kernel tells, and let them be.
    Removing,
    Ended,
}

enum Next {
    Again,
    Wait(Option<Duration>),
    Ended,
    Complete,
}

struct Fault {
    region: usize,
    page: u64,
    since: Instant,
}

pub(crate) struct Machine {
    source: Arc<dyn PageSource>,
    uffd: Arc<Uffd>,
    regions: Vec<Region>,
    options: VmOptions,
    control: Arc<Control>,
    /// The process whose memory it is, if it is not this one.
    peer: Option<Arc<OwnedFd>>,
    /// The peer that asks for pages in words. The memory is then mapped here too, where nobody touches
    /// it.
    asks: Option<Box<dyn Asks>>,
    /// The rest of the range that was asked for, and since when.
    asked: Option<(GpaRange, Instant)>,
    pending: VecDeque<Fault>,
    /// Whether faults came that were not held.
    dropped: bool,
    events: Vec<Event>,
    plan: Plan,
    /// Whether there may be something to read.
    readable: bool,
    /// The length of the next wait for a remove.
    patience: Duration,
    buffer: Vec<u8>,
    page: Vec<u8>,
    /// The record that another server can go on with.
    kept: Option<Kept>,
    messages: Vec<u8>,
}

impl Machine {
    pub fn new(
        source: Arc<dyn PageSource>,
        uffd: Arc<Uffd>,
        regions: &[VmRegion],
        options: VmOptions,
        control: Arc<Control>,
        peer: Option<Arc<OwnedFd>>,
    ) -> Result<Self, ServeError> {
        if source.is_for_analysis() && !options.for_analysis {
            return Err(CheckpointError::CannotRun.into());
        }
        // A thread must not sleep in a read while it is told to stop.
        rustix::io::ioctl_fionbio(&uffd, true).map_err(ServeError::system("FIONBIO"))?;
        let regions = Region::all(regions, source.layout(), &uffd)?;
        let plan = match options.prefetch {
            Prefetch::Nothing => Plan::new(Arc::default()),
            Prefetch::Set | Prefetch::Everything => Plan::new(Arc::clone(&options.set)),
        };
        if options.prefetch != Prefetch::Nothing {
            options.metrics.planned(options.set.bytes());
        }
        if options.prefetch == Prefetch::Everything {
            control.want_everything();
        }
        Ok(Self {
            source,
            uffd,
            regions,
            options,
            control,
            peer,
            asks: None,
            asked: None,
            pending: VecDeque::new(),
            dropped: false,
            events: Vec::new(),
            plan,
            readable: true,
            patience: FIRST_WAIT,
            buffer: Vec::new(),
            page: Vec::new(),
            kept: None,
            messages: vec![0; Uffd::BATCH_BYTES],
        })
    }

    /// Keeps what another server needs to go on, in the file that is returned.
    #[cfg(feature = "server")]
    pub fn keep(&mut self, identity: &str) -> Result<Arc<OwnedFd>, ServeError> {
        let kept = Kept::new(&mut self.regions, identity)?;
        let file = Arc::clone(&kept.file);
        self.kept = Some(kept);
        Ok(file)
    }

    /// Goes on with what another server has kept, which is gone. What it had read and not done is
    /// done: pages that were given back are marked, and who waits for a page asks again.
    #[cfg(feature = "server")]
    pub fn go_on(&mut self, mut kept: Kept, regions: &[VmRegion]) -> Result<(), ServeError> {
        let same = |(region, at): (&Region, &VmRegion)| {
            region.guest == at.guest && region.start == at.host.raw() && region.page == at.page
        };
        let all = self.regions.len() == regions.len();
        if !all || !self.regions.iter().zip(regions).all(same) {
            return Err(ServeError::Kept {
                why: "its regions are not those of the memory",
            });
        }
        kept.put_into(&mut self.regions);
        let mut events = Vec::new();
        Uffd::parse(kept.messages(), &mut events);
        for event in events {
            if let Event::Remove(start, end) = event {
                for region in &mut self.regions {
                    region.give_back(start, end)?;
                }
            }
        }
        for region in &self.regions {
            self.uffd.wake(region.start, region.guest.len());
        }
        self.kept = Some(kept);
        Ok(())
    }

    /// Has pages placed for who asks for them, and not for faults.
    #[cfg(feature = "server")]
    pub fn asked_by(mut self, asks: Box<dyn Asks>) -> Self {
        self.asks = Some(asks);
        self
    }

    /// Serves until it is told to stop, or the process has ended.
    pub fn run(&mut self) -> End {
        let _told = Told(Arc::clone(&self.control));
        loop {
            if self.control.is_stopping() {
                break End::Stopped;
            }
            if self.control.wants_everything() {
                let rest = self.source.by_need();
                let all: Tally = rest.iter().map(GpaRange::len).sum();
                self.options.metrics.planned(all.get());
                self.plan.extend(rest);
            }
            match self.turn() {
                Ok(Next::Again) => {}
                Ok(Next::Wait(limit)) => {
                    if self.wait(limit) {
                        // Who has all may end before it is heard that he asks no more.
                        let all = self.regions.iter().all(Region::is_all_touched);
                        break match self.asks.is_some() && all {
                            true => End::Complete,
                            false => End::Ended,
                        };
                    }
                }
                Ok(Next::Ended) => break End::Ended,
                Ok(Next::Complete) => break End::Complete,
                Err(error) => {
                    if let Some(error) = self.fail(error) {
                        break End::Failed(error);
                    }
                }
            }
        }
    }

    fn turn(&mut self) -> Result<Next, ServeError> {
        // While it is busy, nobody tells it of what has come.
        if self.readable || !self.plan.is_finished() || !self.pending.is_empty() {
            self.read()?;
        }
        while let Some(Fault { region, page, .. }) = self.pending.front() {
            match self.fault(*region, *page)? {
                Step::Again => {}
                Step::Done => {
                    let now = Instant::now();
                    if let Some(fault) = self.pending.pop_front() {
                        self.options.metrics.fault(now.duration_since(fault.since));
                    }
                    self.plan.saw_fault(now);
                    self.patience = FIRST_WAIT;
                }
                Step::Removing => return Ok(self.let_them_be()),
                Step::Ended => return Ok(Next::Ended),
            }
        }
        if core::mem::take(&mut self.dropped) {
            for region in &self.regions {
                self.uffd.wake(region.start, region.guest.len());
            }
            self.readable = true;
            return Ok(Next::Again);
        }
        if let Some(next) = self.serve_asked()? {
            return Ok(next);
        }
        match self.plan.turn() {
            Turn::Now => self.prefetch(),
            Turn::In(limit) => Ok(Next::Wait(Some(limit))),
            // Who asks will ask for what is zero too.
            Turn::Never
                if self.plan.is_everything()
                    && self.asks.is_none()
                    && !self.control.outcome().complete =>
            {
                self.let_go()
            }
            Turn::Never => Ok(Next::Wait(None)),
        }
    }

    /// Places the pages that are asked for. It does not make a prefetch stand back: most are asked
    /// for because nobody waits for any.
    fn serve_asked(&mut self) -> Result<Option<Next>, ServeError> {
        let Some(asks) = &mut self.asks else {
            return Ok(None);
        };
        if self.asked.is_none() {
            match asks.next()? {
                Asked::Nothing => return Ok(None),
                Asked::Closed => return self.closed().map(Some),
                Asked::Pages(range) => self.asked = Some((range, Instant::now())),
            }
        }
        while let Some((range, since)) = self.asked {
            if range.is_empty() {
                self.options.metrics.fault(since.elapsed());
                self.asked = None;
                if let Some(asks) = &mut self.asks {
                    asks.answer()?;
                }
                break;
            }
            let (number, page) = self.asked_page(range)?;
            match self.fault(number, page)? {
                Step::Again => {}
                Step::Done => {
                    let len = self.regions.get(number).map(|region| region.page);
                    let next = len.and_then(|len| range.start().checked_add(len));
                    let next = next.unwrap_or(range.end()).min(range.end());
                    self.asked = Some((GpaRange::new(next, range.end()), since));
                }
                Step::Removing => return Ok(Some(self.let_them_be())),
                Step::Ended => return Ok(Some(Next::Ended)),
            }
        }
        Ok(None)
    }

    /// The region and the first page of the range that is asked for; refused unless it is whole pages
    /// of one region.
    fn asked_page(&self, range: GpaRange) -> Result<(usize, u64), ServeError> {
        let inside = |region: &Region| region.guest.intersection(&range) == range;
        let mut regions = (0..).zip(&self.regions);
        let found = regions.find(|(_, region)| inside(region));
        let page = found.and_then(|(number, region)| {
            let whole = |at: Gpa| {
                let inside = at.offset_from(region.guest.start())?;
                inside.is_multiple_of(region.page).then_some(())
            };
            whole(range.start())?;
            whole(range.end())?;
            Some((number, region.host(range.start())?))
        });
        page.ok_or(ServeError::Asked {
            at: range.start(),
            len: range.len(),
        })
    }

    /// Nothing more is asked for. If not all pages were, whoever runs on lacks some, and nobody
    /// holds on to them.
    fn closed(&mut self) -> Result<Next, ServeError> {
        if self.regions.iter().all(Region::is_all_touched) {
            return Ok(Next::Complete);
        }
        // It is ending, or is ended: a process lets go of its files before it has.
        self.end_peer();
        tracing::warn!("it asks no more, and had not asked for all of its memory: it must not run");
        Ok(Next::Ended)
    }

    /// Ends the process whose memory it is, and waits until it has ended.
    fn end_peer(&self) {
        let Some(peer) = &self.peer else { return };
        if let Err(errno) = pidfd_send_signal(peer, Signal::KILL)
            && errno != Errno::SRCH
        {
            // Its pages stay missing: it waits for ever.
            tracing::error!("the virtual machine cannot be ended: {errno}");
        }
        while self.poll(false, None).is_some() && !self.control.is_stopping() {}
    }

    /// Reads what the kernel tells. All that was given back is noted before anything is done for
    /// a fault: so there is no bound to what is read, for what was given back is told last, and
    /// until that is read no page can be put in place.
    fn read(&mut self) -> Result<(), ServeError> {
        self.readable = false;
        for _ in 0..READS_AT_ONCE {
            self.events.clear();
            let messages = match &mut self.kept {
                Some(kept) => kept.messages(),
                None => self.messages.as_mut_slice(),
            };
            let count = self.uffd.events(messages, &mut self.events)?;
            let now = Instant::now();
            for event in &self.events {
                match *event {
                    Event::Remove(start, end) => {
                        for region in &mut self.regions {
                            self.options.metrics.removed(region.give_back(start, end)?);
                        }
                    }
                    Event::Other(at) => {
                        let at = HostAddress::new(at);
                        return Err(ServeError::FaultKind { at });
                    }
                    Event::Fault(_) if self.pending.len() >= FAULTS_HELD => self.dropped = true,
                    Event::Fault(host) => {
                        let mut regions = (0..).zip(&self.regions);
                        // What is registered and was not told of is nobody's to serve here.
                        if let Some((number, region)) = regions.find(|(_, r)| r.has(host)) {
                            self.pending.push_back(Fault {
                                region: number,
                                page: region.page_of(host),
                                since: now,
                            });
                        }
                    }
                }
            }
            // Fewer than there was room for: that was all.
            if count < Uffd::BATCH {
                return Ok(());
            }
        }
        self.readable = true;
        Ok(())
    }

    /// The next wait for whoever gives pages back.
    fn let_them_be(&mut self) -> Next {
        let limit = self.patience;
        let longer = limit.checked_mul(2);
        self.patience = longer.map_or(LAST_WAIT, |longer| longer.min(LAST_WAIT));
        self.options.metrics.waited();
        self.readable = true;
        Next::Wait(Some(limit))
    }

    /// Waits until there is something to do. Says whether the process has ended.
    fn wait(&mut self, limit: Option<Duration>) -> bool {
        let Some(events) = self.poll(true, limit) else {
            return true;
        };
        if events.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            // Somebody has cleared O_NONBLOCK, which the peer shares: the kernel says ERR and
            // nothing more. That is its own harm, and not its end.
            let _ = rustix::io::ioctl_fionbio(&self.uffd, true);
            self.readable = true;
            return self.poll(false, Some(PACE)).is_none();
        }
        self.readable |= events.contains(PollFlags::IN);
        false
    }

    /// The outcome of the `userfaultfd`, if that is asked for; `None` if the process has ended.
    fn poll(&self, faults: bool, limit: Option<Duration>) -> Option<PollFlags> {
        let none = self.control.wake.as_fd();
        let of_peer = self.peer.as_ref().map(AsFd::as_fd);
        let of_asks = self.asks.as_ref().filter(|_| faults);
        let of_asks = of_asks.map(|asks| asks.fd());
        // What is none is behind the others, and not polled.
        let all = [
            none,
            if faults { self.uffd.as_fd() } else { none },
            of_peer.unwrap_or(none),
            of_asks.unwrap_or(none),
        ];
        let mut fds = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let count = match (of_peer, of_asks) {
            (None, None) => 2,
            (_, None) => 3,
            (_, Some(_)) => 4,
        };
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let (polled, _) = fds.split_at_mut(count);
        if poll(polled, limit.as_ref()).is_err() {
            return Some(PollFlags::empty());
        }
        let [wake, uffd, peer, _] = fds.map(|fd| fd.revents());
        if wake.contains(PollFlags::IN) {
            self.control.seen();
        }
        if of_peer.is_some() && !peer.is_empty() {
            return None;
        }
        Some(if faults { uffd } else { PollFlags::empty() })
    }

    /// Serves a fault, or a part of what comes with it.
    fn fault(&mut self, number: usize, page: u64) -> Result<Step, ServeError> {
        let Some(region) = self.regions.get(number) else {
            return Ok(Step::Done);
        };
        let at = region.gpa(page).ok_or_else(|| outside(region))?;
        if let Some(recorder) = &self.options.recorder
            && let Some(range) = GpaRange::with_len(at, region.page)
        {
            recorder.note(range);
        }
        let placed = if region.is_touched(page) {
            self.put_zeroes(number, page, Wake::Yes)?
        } else {
            self.bring(number, page, at)?
        };
        self.tell_occupied(number)?;
        let Some(region) = self.regions.get(number) else {
            return Ok(Step::Done);
        };
        Ok(match placed {
            // Of several pages this may not have been among those that are there now.
            Placed::Done | Placed::Part(_) if region.is_touched(page) => Step::Done,
            // Somebody was faster, or the range is none any more and all is in place: who waits
            // may have been woken before it slept.
            Placed::There | Placed::Gone if region.is_touched(page) => {
                self.uffd.wake(page, region.page);
                Step::Done
            }
            Placed::Done | Placed::Part(_) | Placed::There | Placed::Gone => Step::Again,
            Placed::Removing => Step::Removing,
            Placed::Ended => Step::Ended,
        })
    }

    /// Of memory of this process, in which nobody but this thread may put a page in place: a page that
    /// was there is not the guest's. Another VMM may have written there what it will, but not where
    /// it has to ask for each page first.
    fn tell_occupied(&mut self, number: usize) -> Result<(), ServeError> {
        let own = self.peer.is_none();
        let told = own || self.asks.is_some();
        let Some(region) = self.regions.get_mut(number).filter(|_| told) else {
            return Ok(());
        };
        if let Some(host) = region.occupied.take()
            && let Some(gpa) = region.gpa(host)
        {
            let at = HostAddress::new(host);
            let error = ServeError::Occupied { at, gpa };
            if !own {
                return Err(error);
            }
            self.control.tell(|outcome| {
                outcome.error.get_or_insert(Arc::new(error));
            });
        }
        Ok(())
    }

    /// Brings in a page that the source has, and nothing else.
    fn bring_one(&mut self, number: usize, page: u64, one: GpaRange) -> Result<Placed, ServeError> {
        let source = Arc::clone(&self.source);
        let mut buffer = core::mem::take(&mut self.buffer);
        let looked = source.look(one, &mut buffer);
        let run = match looked.map_err(failed(one.start()))? {
            Look::Page(piece) => {
                let (placed, bytes) = self.put(number, page, page, &piece, Wake::Yes)?;
                self.options.metrics.faulted(bytes);
                drop(piece);
                self.buffer = buffer;
                return Ok(placed);
            }
            Look::Run(run) => run,
        };
        self.buffer = buffer;
        let whole = one.intersection(&run.range) == one;
        match run.content {
            Content::Fill(0) if whole => self.put_zeroes(number, page, Wake::Yes),
            _ => self.assemble(number, page, one, Wake::Yes),
        }
    }

    /// Brings in a page that the source has, and what comes with it.
    fn bring(&mut self, number: usize, page: u64, at: Gpa) -> Result<Placed, ServeError> {
        let Some(region) = self.regions.get(number) else {
            return Ok(Placed::Gone);
        };
        let one = GpaRange::with_len(at, region.page).ok_or_else(|| outside(region))?;
        if self.options.around <= region.page {
            return self.bring_one(number, page, one);
        }
        let source = Arc::clone(&self.source);
        let run = source.run_at(at).map_err(failed(at))?;
        if one.intersection(&run.range) != one {
            return self.assemble(number, page, one, Wake::Yes);
        }
        match run.content {
            Content::Fill(0) => self.put_zeroes(number, page, Wake::Yes),
            Content::Fill(_) => self.assemble(number, page, one, Wake::Yes),
            Content::Bytes => {
                let window = self.options.around;
                let around = around(region, one, run.range, window);
                let (start, range) = around.ok_or_else(|| outside(region))?;
                let mut buffer = core::mem::take(&mut self.buffer);
                let piece = source.read(range, &mut buffer).map_err(failed(at));
                let placed =
                    piece.and_then(|piece| self.put(number, start, page, &piece, Wake::Yes));
                self.buffer = buffer;
                let (placed, bytes) = placed?;
                self.options.metrics.faulted(bytes);
                Ok(placed)
            }
        }
    }

    /// Puts the bytes in place from `start` on, of which the page at `page` is one. If they are of
    /// more than one mapping, that page alone. Says how many bytes are there now.
    fn put(
        &mut self,
        number: usize,
        start: u64,
        page: u64,
        piece: &Piece<'_>,
        wake: Wake,
    ) -> Result<(Placed, u64), ServeError> {
        let Some(region) = self.regions.get_mut(number) else {
            return Ok((Placed::Gone, 0));
        };
        let bytes = piece.bytes();
        let mut placed = self.uffd.copy(start, bytes, wake)?;
        let (mut from, mut len) = (start, to_u64(bytes.len()));
        if placed == Placed::Gone && len > region.page {
            let inside = page.checked_sub(start).map(to_usize);
            let one = inside.and_then(|inside| bytes.get(inside..));
            let one = one.and_then(|rest| rest.get(..to_usize(region.page)));
            if let Some(one) = one {
                placed = self.uffd.copy(page, one, wake)?;
                (from, len) = (page, region.page);
            }
        }
        Ok((placed, mark(region, placed, from, len)))
    }

    /// Puts one page of zeroes in place.
    fn put_zeroes(&mut self, number: usize, page: u64, wake: Wake) -> Result<Placed, ServeError> {
        let Some(region) = self.regions.get_mut(number) else {
            return Ok(Placed::Gone);
        };
        let placed = match region.kind {
            Kind::Small => self.uffd.zero(page, region.page, wake)?,
            Kind::Huge => {
                self.page.clear();
                self.page.resize(size(region)?, 0);
                self.uffd.copy(page, &self.page, wake)?
            }
        };
        mark(region, placed, page, region.page);
        Ok(placed)
    }

    /// Puts a page in place that is of several runs, or of a word.
    fn assemble(
        &mut self,
        number: usize,
        page: u64,
        one: GpaRange,
        wake: Wake,
    ) -> Result<Placed, ServeError> {
        let Some(region) = self.regions.get_mut(number) else {
            return Ok(Placed::Gone);
        };
        self.page.clear();
        self.page.resize(size(region)?, 0);
        let mut rest = self.page.as_mut_slice();
        let mut at = one.start();
        while !rest.is_empty() {
            let run = self.source.run_at(at).map_err(failed(at))?;
            let part = run.range.intersection(&GpaRange::new(at, one.end()));
            let len = to_usize(part.len());
            if part.is_empty() || part.start() != at || len > rest.len() {
                return Err(ServeError::NotInSnapshot { at });
            }
            let (now, later) = rest.split_at_mut(len);
            match run.content {
                // It is zero.
                Content::Fill(0) => {}
                Content::Fill(word) => fill(now, word),
                Content::Bytes => {
                    let piece = self.source.read(part, &mut self.buffer);
                    let piece = piece.map_err(failed(at))?;
                    if piece.bytes().len() != now.len() {
                        return Err(ServeError::NotInSnapshot { at });
                    }
                    now.copy_from_slice(piece.bytes());
                }
            }
            rest = later;
            at = part.end();
        }
        let placed = self.uffd.copy(page, &self.page, wake)?;
        let bytes = mark(region, placed, page, region.page);
        match wake {
            Wake::Yes => self.options.metrics.faulted(bytes),
            Wake::No => self.options.metrics.prefetched(bytes),
        }
        Ok(placed)
    }

    /// Brings in some of what comes next by the plan.
    fn prefetch(&mut self) -> Result<Next, ServeError> {
        for _ in 0..LOOKS_AT_ONCE {
            let Some((range, part)) = self.plan.next() else {
                return Ok(Next::Again);
            };
            let Some((number, host)) = self.place_of(range) else {
                continue;
            };
            let step = match self.fetch(number, host, range, part) {
                Ok(step) => step,
                Err(error @ ServeError::Occupied { .. }) => return Err(error),
                Err(error) => {
                    // The guest may never ask for it.
                    tracing::error!("prefetch ends: {}", error.with_causes());
                    self.plan.give_up();
                    self.control.tell(|outcome| {
                        outcome.error.get_or_insert(Arc::new(error));
                    });
                    return Ok(Next::Again);
                }
            };
            match step {
                Step::Again => {}
                Step::Done => return Ok(Next::Again),
                Step::Removing => return Ok(self.let_them_be()),
                Step::Ended => return Ok(Next::Ended),
            }
        }
        Ok(Next::Again)
    }

    /// The region that has the first page of `range`, and where that is; the plan goes on behind
    /// what is in none.
    fn place_of(&mut self, range: GpaRange) -> Option<(usize, u64)> {
        let inside = |region: &&Region| !region.guest.intersection(&range).is_empty();
        let first = self.regions.iter().filter(inside).map(|r| r.guest.start());
        let Some(first) = first.min() else {
            self.plan.go_on_at(range.end());
            return None;
        };
        if first > range.start() {
            self.plan.go_on_at(first);
            return None;
        }
        let mut regions = (0..).zip(&self.regions);
        let has = |region: &Region| region.guest.contains(range.start());
        let (number, region) = regions.find(|(_, region)| has(region))?;
        Some((number, region.page_of(region.host(range.start())?)))
    }

    /// Brings in the page at `host`, which has the start of `range`, and what comes with it.
    fn fetch(
        &mut self,
        number: usize,
        host: u64,
        range: GpaRange,
        part: Part,
    ) -> Result<Step, ServeError> {
        let source = Arc::clone(&self.source);
        let Some(region) = self.regions.get(number) else {
            return Ok(Step::Ended);
        };
        let at = region.gpa(host).ok_or_else(|| outside(region))?;
        let one = GpaRange::with_len(at, region.page).ok_or_else(|| outside(region))?;
        if region.is_touched(host) {
            self.plan.go_on_at(one.end());
            return Ok(Step::Again);
        }
        let run = source.run_at(at).map_err(failed(at))?;
        let whole = one.intersection(&run.range) == one;
        let placed = match run.content {
            Content::Fill(0) if whole && part == Part::Rest => {
                let end = run.range.intersection(&region.guest).end();
                // A page that is zero in part is another matter.
                let end = Gpa::new(region.page_of(end.raw()));
                self.plan.go_on_at(end.max(one.end()));
                return Ok(Step::Again);
            }
            Content::Fill(0) if whole => self.put_zeroes(number, host, Wake::No)?,
            Content::Bytes if whole => {
                let wanted = run.range.intersection(&range.intersection(&region.guest));
                let wanted = GpaRange::new(at, wanted.end().max(one.end()));
                let range = upwards(region, host, wanted);
                let mut buffer = core::mem::take(&mut self.buffer);
                let piece = source.read(range, &mut buffer).map_err(failed(at));
                let placed = piece.and_then(|piece| self.put(number, host, host, &piece, Wake::No));
                self.buffer = buffer;
                let (placed, bytes) = placed?;
                self.options.metrics.prefetched(bytes);
                placed
            }
            _ => self.assemble(number, host, one, Wake::No)?,
        };
        self.tell_occupied(number)?;
        Ok(match placed {
            Placed::Removing => Step::Removing,
            Placed::Ended => Step::Ended,
            // What is there now is marked, and passed over next time.
            Placed::Done | Placed::Part(_) | Placed::There | Placed::Gone => Step::Done,
        })
    }

    /// All that is not zero is in place: the kernel can serve the rest alone.
    fn let_go(&mut self) -> Result<Next, ServeError> {
        for region in &self.regions {
            let len = region.guest.len();
            match self.uffd.unregister(region.start, len) {
                Ok(()) => {}
                Err(Errno::AGAIN) => return Ok(self.let_them_be()),
                Err(Errno::NOMEM | Errno::SRCH) => return Ok(Next::Ended),
                // It only goes on asking for what is zero.
                Err(errno) => tracing::debug!("UNREGISTER of {len:#x} bytes: {errno}"),
            }
        }
        self.patience = FIRST_WAIT;
        self.control.tell(|outcome| outcome.complete = true);
        Ok(Next::Again)
    }

    /// The treatment of an error: the process is ended, before it can see anything else than its
    /// own bytes. If that is this one, who waits for the page is, and the others go on.
    fn fail(&mut self, error: ServeError) -> Option<Arc<ServeError>> {
        let error = Arc::new(error);
        let told = Arc::clone(&error);
        self.control.tell(|outcome| {
            outcome.error.get_or_insert(told);
        });
        if self.peer.is_some() {
            self.end_peer();
            return Some(error);
        }
        // What was given back is not known any more: no page may follow.
        if matches!(
            *error,
            ServeError::PageKind { .. } | ServeError::FaultKind { .. }
        ) {
            return Some(error);
        }
        let Some(fault) = self.pending.pop_front() else {
            return Some(error);
        };
        if let Some(region) = self.regions.get(fault.region) {
            self.uffd.poison(fault.page, region.page);
        }
        None
    }
}

/// Tells of the thread's end, whatever ends it.
struct Told(Arc<Control>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.tell(|outcome| {
            outcome.ended = true;
            if std::thread::panicking() {
                outcome.error.get_or_insert(Arc::new(ServeError::Thread));
            }
        });
    }
}

/// A page that a region cannot have.
fn outside(region: &Region) -> ServeError {
    ServeError::NotInSnapshot {
        at: region.guest.end(),
    }
}

fn failed(at: Gpa) -> impl FnOnce(ServeError) -> ServeError {
    move |error| match error {
        ServeError::Page { .. } => error,
        other => ServeError::Page {
            at,
            source: Box::new(other),
        },
    }
}

fn size(region: &Region) -> Result<usize, ServeError> {
    usize::try_from(region.page).map_err(|_| outside(region))
}

/// Marks what is there now, which begins at `start` and was to be `len` bytes. Says how many of
/// them were put there.
fn mark(region: &mut Region, placed: Placed, start: u64, len: u64) -> u64 {
    match placed {
        Placed::Done => region.touch_len(start, len),
        Placed::Part(done) => region.touch_len(start, done.min(len)),
        // The first page was there; a page that is no longer of a mapping is not asked for again.
        Placed::There => {
            if !region.is_touched(start) {
                region.occupied.get_or_insert(start);
            }
            region.touch_len(start, region.page);
            0
        }
        Placed::Gone if len <= region.page => {
            region.touch_len(start, region.page);
            0
        }
        Placed::Gone | Placed::Removing | Placed::Ended => 0,
    }
}

fn fill(out: &mut [u8], word: u64) {
    let bytes = word.to_le_bytes();
    for part in out.chunks_mut(8) {
        for (out, byte) in part.iter_mut().zip(bytes) {
            *out = byte;
        }
    }
}

/// The untouched pages around `one` that come in with it: of `run`, and of an aligned window.
/// Where they begin in the host, and in the guest; `None` if `one` is not in the region.
fn around(region: &Region, one: GpaRange, run: GpaRange, window: u64) -> Option<(u64, GpaRange)> {
    let host = region.host(one.start())?;
    if window <= region.page {
        return Some((host, one));
    }
    let low = one.start().raw().checked_div(window);
    let low = low.and_then(|number| number.checked_mul(window));
    let wide = low.and_then(|low| GpaRange::with_len(Gpa::new(low), window));
    let wide = wide.unwrap_or(one);
    let wide = wide.intersection(&run).intersection(&region.guest);
    let (mut start, mut host_start) = (one.start(), host);
    while let Some(below) = start.raw().checked_sub(region.page)
        && let Some(host_below) = host_start.checked_sub(region.page)
        && below >= wide.start().raw()
        && !region.is_touched(host_below)
    {
        (start, host_start) = (Gpa::new(below), host_below);
    }
    let up = upwards(
        region,
        host,
        GpaRange::new(one.start(), wide.end().max(one.end())),
    );
    Some((host_start, GpaRange::new(start, up.end())))
}

/// The untouched pages from `host` on, as far as `wanted` has them whole; the first in any case.
fn upwards(region: &Region, host: u64, wanted: GpaRange) -> GpaRange {
    let (mut end, mut next) = (wanted.start(), host);
    while let Some(above) = end.checked_add(region.page) {
        if end != wanted.start() && (above > wanted.end() || region.is_touched(next)) {
            break;
        }
        end = above;
        let Some(there) = next.checked_add(region.page) else {
            break;
        };
        next = there;
    }
    GpaRange::new(wanted.start(), end)
}

#[cfg(test)]
#[expect(unsafe_code, reason = "guest memory is a mapping here")]
mod tests {
    use super::*;
    use crate::engine::Vm;
    use core::ptr::NonNull;
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
    use sonicshot::RamLayout;
    use std::sync::mpsc::channel;

    const PAGE: usize = 4096;
    const PAGES: usize = 128;

    /// Every byte is 7.
    struct Sevens(RamLayout);

    impl PageSource for Sevens {
        fn layout(&self) -> &RamLayout {
            &self.0
        }

        fn run_at(&self, at: Gpa) -> Result<crate::Run, ServeError> {
            let range = self.0.region_of(at).copied();
            Ok(crate::Run {
                range: range.ok_or(ServeError::NotInSnapshot { at })?,
                content: Content::Fill(u64::from_le_bytes([7; 8])),
            })
        }

        fn read<'b>(&self, range: GpaRange, _: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
            let at = range.start();
            Err(ServeError::NotInSnapshot { at })
        }

        fn by_need(&self) -> Arc<[GpaRange]> {
            self.0.regions().into()
        }
    }

    /// Until what was given back is read nothing can be put in place, and faults are told first.
    #[test]
    fn more_faults_than_are_held_do_not_hide_what_was_given_back() {
        let len = PAGES * PAGE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let none = core::ptr::null_mut();
        // SAFETY: a new mapping; it stays for as long as the process does.
        let start = unsafe { mmap_anonymous(none, len, access, MapFlags::PRIVATE) }.unwrap();
        let uffd = Uffd::new().unwrap();
        // SAFETY: nobody has touched it, and who will can wait.
        let registered =
            unsafe { uffd.register(NonNull::new(start.cast()).unwrap(), len) }.unwrap();
        let host = start.expose_provenance();
        // They are not waited for: a test that fails must not wait for ever.
        let (done, all) = channel();
        for page in 0..PAGES - 1 {
            let done = done.clone();
            std::thread::spawn(move || {
                let at = core::ptr::with_exposed_provenance::<u8>(host + page * PAGE);
                // SAFETY: mapped, and written by nobody.
                done.send(unsafe { at.read_volatile() }).unwrap();
            });
        }
        std::thread::spawn(move || {
            let at = core::ptr::with_exposed_provenance_mut(host + (PAGES - 1) * PAGE);
            // SAFETY: pages of the mapping, to which there are no references.
            unsafe { madvise(at, PAGE, Advice::LinuxDontNeed) }.unwrap();
            done.send(7).unwrap();
        });
        std::thread::sleep(Duration::from_millis(200));
        let guest = GpaRange::with_len(Gpa::ZERO, to_u64(len)).unwrap();
        let source = Arc::new(Sevens(RamLayout::new(vec![guest]).unwrap()));
        let region = VmRegion::new(&registered, 0, guest, to_u64(PAGE)).unwrap();
        let vm = Vm::start(source, uffd, &[region], VmOptions::default()).unwrap();
        for _ in 0..PAGES {
            assert_eq!(all.recv_timeout(Duration::from_secs(20)), Ok(7));
        }
        drop(vm);
    }

    /// Pages that a server had noted as given back, and those that it had only read when it was killed.
    #[cfg(feature = "server")]
    #[test]
    fn who_goes_on_brings_nothing_back() {
        let len = 8 * PAGE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let none = core::ptr::null_mut();
        // SAFETY: a new mapping; it stays for as long as the process does.
        let start = unsafe { mmap_anonymous(none, len, access, MapFlags::PRIVATE) }.unwrap();
        let uffd = Arc::new(Uffd::new().unwrap());
        // SAFETY: nobody has touched it, and who will can wait.
        let registered =
            unsafe { uffd.register(NonNull::new(start.cast()).unwrap(), len) }.unwrap();
        let host = start.expose_provenance();
        let guest = GpaRange::with_len(Gpa::ZERO, to_u64(len)).unwrap();
        let region = VmRegion::new(&registered, 0, guest, to_u64(PAGE)).unwrap();
        let machine = |regions: &[VmRegion]| {
            let source = Arc::new(Sevens(RamLayout::new(vec![guest]).unwrap()));
            let control = Arc::new(Control::new().unwrap());
            let uffd = Arc::clone(&uffd);
            let options = VmOptions::default();
            let new = Machine::new(source, uffd, regions, options, Arc::clone(&control), None);
            (new.unwrap(), control)
        };
        let at = |page: usize| to_u64(host + page * PAGE);
        let (mut first, _) = machine(&[region]);
        let file = first.keep("a snapshot").unwrap();
        first.regions[0].give_back(at(1), at(2)).unwrap();
        let messages = first.kept.as_mut().unwrap().messages();
        messages[0] = 0x15;
        messages[8..16].copy_from_slice(&at(4).to_ne_bytes());
        messages[16..24].copy_from_slice(&at(6).to_ne_bytes());
        drop(first);
        let (kept, regions) = Kept::open(file, "a snapshot").unwrap();
        let (mut next, control) = machine(&regions);
        next.go_on(kept, &regions).unwrap();
        let serving = std::thread::spawn(move || drop(next.run()));
        // They are not waited for: a test that fails must not wait for ever.
        let (done, all) = channel();
        std::thread::spawn(move || {
            for page in 0..8 {
                let at = core::ptr::with_exposed_provenance::<u8>(host + page * PAGE);
                // SAFETY: mapped, and written by nobody.
                done.send(unsafe { at.read_volatile() }).unwrap();
            }
        });
        for expected in [7, 0, 7, 7, 0, 0, 7, 7] {
            assert_eq!(all.recv_timeout(Duration::from_secs(20)), Ok(expected));
        }
        control.stop();
        serving.join().unwrap();
    }
}

//! Work that is done on several threads.
//!
//! | | |
//! |---|---|
//! | [`for_each`] | many things, in no order: what each gives it puts where it belongs |
//! | [`for_each_told`] | the same, told of while it goes on |
//! | [`map_in_order`] | many things, whose results are wanted one after the other |
//! | [`with_pool`] | jobs of several kinds, handed over as they come up |
//!
//! All of them bound their threads and what is under way, end with the error that one thread would
//! have ended with, and go on with the panic of a job where the caller waits. Where the system gives
//! no more threads, they do the work with those that there are, the caller's alone at worst.

use core::num::NonZeroUsize;
use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvError, TryRecvError, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

/// The most threads that anything here uses.
pub const MAX_THREADS: usize = 256;

/// The number of threads to use: as many as are `wanted`, or one for each core that this process may
/// use; at most [`MAX_THREADS`].
#[must_use]
pub fn threads(wanted: Option<NonZeroUsize>) -> NonZeroUsize {
    const ALL: NonZeroUsize = NonZeroUsize::new(MAX_THREADS).unwrap();
    wanted
        .or_else(|| std::thread::available_parallelism().ok())
        .unwrap_or(NonZeroUsize::MIN)
        .min(ALL)
}

/// Does `each` with every item, on `threads` threads of which the caller's is one.
///
/// Each thread has a state of its own (a buffer, a decompressor), made by `state`.
///
/// ```
/// use sonicshot::work::{for_each, threads};
/// use std::sync::atomic::{AtomicU64, Ordering};
/// let sum = AtomicU64::new(0);
/// for_each(threads(None), 0..100_u64, || (), |(), n| {
///     sum.fetch_add(n, Ordering::Relaxed);
///     Ok::<_, std::io::Error>(())
/// })?;
/// assert_eq!(sum.into_inner(), 4950);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// The error of the first item, in their order, that has one; those behind it may be left out.
pub fn for_each<T, S, E: Send>(
    threads: NonZeroUsize,
    items: impl IntoIterator<Item = T, IntoIter: Send>,
    state: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    for_each_told(threads, items, |_| {}, state, each)
}

/// The same; `done` is told, on the caller's thread, how many items were begun.
///
/// # Errors
/// As [`for_each`].
pub fn for_each_told<T, S, E: Send>(
    threads: NonZeroUsize,
    items: impl IntoIterator<Item = T, IntoIter: Send>,
    mut done: impl FnMut(u64),
    state: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    // An item is only taken while none has failed. So each before one that fails is done too, and
    // the first that fails is the same with any number of threads.
    let failed = AtomicBool::new(false);
    let items = Mutex::new((1_u64..).zip(items));
    let take = || {
        let mut items = lock(&items);
        if failed.load(Ordering::Relaxed) {
            return None;
        }
        items.next()
    };
    let run = |done: &mut dyn FnMut(u64)| -> Result<(), (u64, E)> {
        let mut state = state();
        while let Some((number, item)) = take() {
            if let Err(error) = each(&mut state, item) {
                failed.store(true, Ordering::Relaxed);
                return Err((number, error));
            }
            done(number);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.get())
            .map_while(|_| Builder::new().spawn_scoped(scope, || run(&mut |_| {})).ok())
            .collect();
        let mut first = run(&mut done).err();
        for other in others {
            // A thread that panicked has a bug; its panic goes on here.
            let theirs = other.join().unwrap_or_else(|panic| resume_unwind(panic));
            if let Err((number, error)) = theirs
                && first.as_ref().is_none_or(|(first, _)| number < *first)
            {
                first = Some((number, error));
            }
        }
        first.map_or(Ok(()), |(_, error)| Err(error))
    })
}

/// Does `each` with every item on `threads` threads, and gives the results to `sink`, which runs on
/// the caller's thread, in the order of the items. At most two items a thread are under way, so
/// what waits for `sink` is bounded.
///
/// Each thread has a state of its own, made by `state`.
///
/// ```
/// use sonicshot::work::{map_in_order, threads};
/// let mut squares = Vec::new();
/// map_in_order(threads(None), 0..100, || (), |(), n| n * n, |square| {
///     squares.push(square);
///     Ok::<_, std::io::Error>(())
/// })?;
/// assert!(squares.is_sorted());
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// The first error of `sink`; it is given nothing more then.
pub fn map_in_order<T: Send, S, R: Send, E>(
    threads: NonZeroUsize,
    items: impl IntoIterator<Item = T>,
    state: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, T) -> R + Sync,
    mut sink: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    if threads == NonZeroUsize::MIN {
        let mut state = state();
        let mut items = items.into_iter();
        return items.try_for_each(|item| sink(each(&mut state, item)));
    }
    let each = &each;
    // No more than twice `MAX_THREADS`.
    let depth = threads.get() << 1;
    with_pool(threads, &state, |pool| {
        let mut waiting = VecDeque::with_capacity(depth);
        for item in items {
            if waiting.len() >= depth
                && let Some(oldest) = waiting.pop_front()
            {
                sink(Pending::wait(oldest))?;
            }
            waiting.push_back(pool.submit(move |state: &mut S| each(state, item)));
        }
        waiting
            .into_iter()
            .try_for_each(|oldest| sink(oldest.wait()))
    })
}

/// Runs `body` with threads that do what it hands over, and ends them. Each has a state of its own,
/// made by `state`.
///
/// ```
/// use sonicshot::work::{threads, with_pool};
/// let text = String::from("guest");
/// let (len, upper) = with_pool(threads(None), &|| (), |pool| {
///     let len = pool.submit(|()| text.len());
///     let upper = pool.submit(|()| text.to_uppercase());
///     (len.wait(), upper.wait())
/// });
/// assert_eq!((len, upper.as_str()), (5, "GUEST"));
/// ```
pub fn with_pool<'env, S: 'env, R>(
    threads: NonZeroUsize,
    state: &'env (impl Fn() -> S + Sync),
    body: impl FnOnce(&Pool<'env, S>) -> R,
) -> R {
    let pool = Pool {
        queue: Mutex::new(Queue {
            jobs: VecDeque::new(),
            closed: false,
        }),
        ready: Condvar::new(),
        started: AtomicUsize::new(0),
        state,
    };
    std::thread::scope(|scope| {
        // Also if `body` panics: else the threads would wait for ever, and this for them.
        let closing = Closing(&pool);
        let work = || {
            let mut state = state();
            while let Some(job) = pool.next() {
                job(&mut state);
            }
        };
        let started = (0..threads.get())
            .map_while(|_| Builder::new().spawn_scoped(scope, work).ok())
            .count();
        pool.started.store(started, Ordering::Relaxed);
        let result = body(&pool);
        drop(closing);
        result
    })
}

type Job<'env, S> = Box<dyn FnOnce(&mut S) + Send + 'env>;

/// Threads that wait for jobs; see [`with_pool`].
pub struct Pool<'env, S> {
    queue: Mutex<Queue<'env, S>>,
    ready: Condvar,
    /// If none could be, who hands over a job does it.
    started: AtomicUsize,
    state: &'env (dyn Fn() -> S + Sync),
}

struct Queue<'env, S> {
    jobs: VecDeque<Job<'env, S>>,
    closed: bool,
}

struct Closing<'p, 'env, S>(&'p Pool<'env, S>);

impl<S> Drop for Closing<'_, '_, S> {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.closed = true;
        // Nobody waits for these any more.
        queue.jobs.clear();
        drop(queue);
        self.0.ready.notify_all();
    }
}

impl<'env, S> Pool<'env, S> {
    /// The number of threads that were started. Without any, who hands over a job does it.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.started.load(Ordering::Relaxed)
    }

    /// Hands over a job; jobs are begun in the order in which they come.
    pub fn submit<R: Send + 'env>(
        &self,
        job: impl FnOnce(&mut S) -> R + Send + 'env,
    ) -> Pending<R> {
        self.hand(job, || (), VecDeque::push_back)
    }

    /// The same, for who waits for other things too: `told` is called, where the job was done, once its
    /// result is there.
    pub fn submit_told<R: Send + 'env>(
        &self,
        job: impl FnOnce(&mut S) -> R + Send + 'env,
        told: impl FnOnce() + Send + 'env,
    ) -> Pending<R> {
        self.hand(job, told, VecDeque::push_back)
    }

    /// Hands over a job that is begun before all that wait.
    pub fn submit_first<R: Send + 'env>(
        &self,
        job: impl FnOnce(&mut S) -> R + Send + 'env,
    ) -> Pending<R> {
        self.hand(job, || (), VecDeque::push_front)
    }

    fn hand<R: Send + 'env>(
        &self,
        job: impl FnOnce(&mut S) -> R + Send + 'env,
        told: impl FnOnce() + Send + 'env,
        put: impl FnOnce(&mut VecDeque<Job<'env, S>>, Job<'env, S>),
    ) -> Pending<R> {
        let (answer, result) = sync_channel(1);
        let job = move |state: &mut S| {
            let result = catch_unwind(AssertUnwindSafe(|| job(state)));
            // Who asked may have failed and gone; nobody needs the answer then.
            let _ = answer.send(result);
            told();
        };
        if self.threads() == 0 {
            job(&mut (self.state)());
            return Pending(result);
        }
        put(&mut lock(&self.queue).jobs, Box::new(job));
        self.ready.notify_one();
        Pending(result)
    }

    /// The next job; waits for it. `None` when there will be no more.
    fn next(&self) -> Option<Job<'env, S>> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self
                .ready
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<S> fmt::Debug for Pool<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("jobs", &lock(&self.queue).jobs.len())
            .finish_non_exhaustive()
    }
}

/// The future result of a job.
#[derive(Debug)]
#[must_use = "the result is lost otherwise"]
pub struct Pending<R>(Receiver<Result<R, Box<dyn Any + Send>>>);

impl<R> Pending<R> {
    /// The job's result; waits for it.
    ///
    /// # Panics
    /// If the job did: a bug, which goes on here.
    #[must_use]
    pub fn wait(self) -> R {
        answer(self.0.recv())
    }

    /// The job's result, if it is done.
    ///
    /// # Errors
    /// The result that is still to be waited for.
    ///
    /// # Panics
    /// If the job did.
    pub fn try_wait(self) -> Result<R, Self> {
        match self.0.try_recv() {
            Err(TryRecvError::Empty) => Err(self),
            Ok(result) => Ok(answer(Ok(result))),
            Err(TryRecvError::Disconnected) => Ok(answer(Err(RecvError))),
        }
    }
}

fn answer<R>(result: Result<Result<R, Box<dyn Any + Send>>, RecvError>) -> R {
    match result {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => resume_unwind(panic),
        // The threads end only after the body of the pool, and do all jobs until then; a result
        // that was taken out of the body has none.
        Err(RecvError) => resume_unwind(Box::new("a job whose pool is gone")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{MAX_THREADS, for_each, for_each_told, map_in_order, threads, with_pool};
    use core::num::NonZeroUsize;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    fn n(threads: usize) -> NonZeroUsize {
        NonZeroUsize::new(threads).unwrap()
    }

    #[test]
    fn threads_are_bounded() {
        assert_eq!(threads(Some(n(3))), n(3));
        assert_eq!(threads(Some(n(1 << 20))), n(MAX_THREADS));
        assert!(threads(None) <= n(MAX_THREADS));
    }

    #[test]
    fn each_is_done_once_and_the_first_error_is_the_one() {
        for count in [1, 2, 4, 16] {
            let seen = Mutex::new(Vec::new());
            let mut told = Vec::new();
            for_each_told(
                n(count),
                0..500,
                |n| told.push(n),
                || (),
                |(), n| {
                    seen.lock().unwrap().push(n);
                    Ok::<_, u32>(())
                },
            )
            .unwrap();
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert_eq!(seen, (0..500).collect::<Vec<_>>());
            assert!(told.is_sorted() && told.last().is_none_or(|last| *last <= 500));
            for failing in [&[7, 8, 400][..], &[499], &[0, 1, 2, 3]] {
                let error = for_each(
                    n(count),
                    0..500_u32,
                    || (),
                    |(), n| {
                        // The first of them comes last.
                        if n == failing[0] {
                            std::thread::sleep(Duration::from_millis(2));
                        }
                        if failing.contains(&n) { Err(n) } else { Ok(()) }
                    },
                );
                assert_eq!(error, Err(failing[0]), "{count} threads");
            }
        }
    }

    #[test]
    fn results_come_in_order_with_few_under_way() {
        for count in [1, 2, 4] {
            let begun = AtomicUsize::new(0);
            let mut next = 0;
            let most = 2 * count + 1;
            map_in_order(
                n(count),
                0..200_usize,
                || (),
                |(), n| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    if n % 7 == 0 {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    n
                },
                |n| {
                    assert_eq!(n, next);
                    next += 1;
                    assert!(begun.load(Ordering::SeqCst) <= next + most);
                    Ok::<_, ()>(())
                },
            )
            .unwrap();
            assert_eq!(next, 200);
            let stopped = map_in_order(
                n(count),
                0..200,
                || (),
                |(), n| n,
                |n| {
                    if n == 5 { Err(n) } else { Ok(()) }
                },
            );
            assert_eq!(stopped, Err(5));
        }
    }

    #[test]
    fn a_thread_keeps_its_state() {
        let made = AtomicUsize::new(0);
        let state = || made.fetch_add(1, Ordering::SeqCst);
        let used = with_pool(n(3), &state, |pool| {
            let jobs: Vec<_> = (0..100).map(|_| pool.submit(|number| *number)).collect();
            jobs.into_iter().map(super::Pending::wait).max()
        });
        assert!(used.is_some_and(|used| used < 3));
        assert_eq!(made.into_inner(), 3);
    }

    #[test]
    fn what_is_first_goes_before_what_waits_and_who_waits_is_told() {
        let order = Mutex::new(Vec::new());
        let (begun, first) = std::sync::mpsc::sync_channel(0);
        let told = AtomicUsize::new(0);
        let note = |name| order.lock().unwrap().push(name);
        with_pool(n(1), &|| (), |pool| {
            assert_eq!(pool.threads(), 1);
            let busy = pool.submit(move |()| first.recv().unwrap());
            let later = pool.submit_told(
                |()| note("later"),
                || {
                    told.fetch_add(1, Ordering::SeqCst);
                },
            );
            let sooner = pool.submit_first(|()| note("sooner"));
            begun.send(()).unwrap();
            let () = busy.wait();
            let () = later.wait();
            let () = sooner.wait();
        });
        assert_eq!(*order.lock().unwrap(), ["sooner", "later"]);
        assert_eq!(told.into_inner(), 1);
    }

    #[test]
    fn a_panic_goes_on_where_the_result_is_wanted() {
        type Run<'a> = &'a dyn Fn();
        let pool: Run<'_> = &|| {
            with_pool(n(2), &|| (), |pool| {
                let bad: Vec<_> = (0..8).map(|_| pool.submit(|()| panic!("a bug"))).collect();
                let good = pool.submit(|()| 3);
                assert_eq!(good.wait(), 3, "the threads live on");
                bad.into_iter().for_each(super::Pending::wait);
            });
        };
        let map: Run<'_> = &|| {
            let bug = |(): &mut (), n: u8| assert!(n != 5, "a bug");
            let _ = map_in_order(n(2), 0..9, || (), bug, |()| Ok::<_, ()>(()));
        };
        let each: Run<'_> = &|| {
            let bug = |(): &mut (), n: u8| {
                assert!(n != 5, "a bug");
                Ok::<_, ()>(())
            };
            let _ = for_each(n(2), 0..9, || (), bug);
        };
        let body: Run<'_> = &|| with_pool(n(2), &|| (), |_| panic!("a bug"));
        for run in [pool, map, each, body] {
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
    }
}

//! A guest's kernel, for who looks at more of it than its pages: symbols, types, memory by its own
//! addresses, and its processes.

use super::LinuxGuest;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::symbols::Member;
use crate::{KernelVa, VirtualMemory, VirtualReadError};
use sonicshot::{Gpa, to_usize};

/// More processes than any kernel has: its `PID_MAX_LIMIT` (`include/linux/threads.h`).
const MAX_TASKS: u64 = 1 << 22;
/// `TASK_COMM_LEN`, and room for a kernel that has a longer one.
const MAX_COMM: u64 = 64;

impl<'m> LinuxGuest<'m> {
    /// The address of the symbol `name` in the running kernel: KASLR is in it. Of a per-CPU variable
    /// it is the place in each processor's area. `None` if no source knows it.
    ///
    /// ```no_run
    /// # fn f(guest: &sonicshot_vmi::LinuxGuest<'_>) -> Result<(), Box<dyn std::error::Error>> {
    /// use sonicshot_vmi::VirtualMemory;
    /// let at = guest.symbol("jiffies_64")?.ok_or("no symbol jiffies_64")?;
    /// println!("{} ticks", guest.read_u64(at)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VmiError::Symbols`] if a source is damaged.
    pub fn symbol(&self, name: &str) -> Result<Option<KernelVa>, VmiError> {
        self.kernel.any_symbol(name)
    }

    /// The size of `struct` or `union` `name`, in bytes. `None` if no source knows it.
    ///
    /// # Errors
    /// [`VmiError::Disagree`] if two sources say different sizes, [`VmiError::Symbols`] if one is
    /// damaged.
    pub fn type_size(&self, name: &str) -> Result<Option<u64>, VmiError> {
        self.kernel.any_type_size(name)
    }

    /// The member `path` of `struct name`; `path` may go on into others (`mm.pgd`). `None` if no
    /// source knows it.
    ///
    /// # Errors
    /// As [`type_size`](Self::type_size).
    pub fn member(&self, name: &str, path: &str) -> Result<Option<Member>, VmiError> {
        self.kernel.any_member(name, path)
    }

    /// The constant `name` of an enumeration. `None` if no source knows it.
    ///
    /// # Errors
    /// As [`type_size`](Self::type_size).
    pub fn constant(&self, name: &str) -> Result<Option<i64>, VmiError> {
        self.kernel.any_constant(name)
    }

    /// Fills `buf` with the bytes at an address of the kernel, by its own page tables. The guest has
    /// the methods of [`VirtualMemory`], too.
    ///
    /// # Errors
    /// [`VirtualReadError`] with the first address that is not mapped or cannot be read.
    pub fn read_virtual(&self, at: KernelVa, buf: &mut [u8]) -> Result<(), VirtualReadError> {
        self.kernel.space.read(at, buf)
    }

    /// The guest-physical address of an address of the kernel.
    ///
    /// # Errors
    /// [`VirtualReadError`] if nothing maps it, or a page table cannot be read.
    pub fn translate(&self, at: KernelVa) -> Result<Gpa, VirtualReadError> {
        Ok(self.kernel.space.translate(at)?.at)
    }

    /// The guest's processes, kernel threads among them, as its list of tasks has them: what `/proc`
    /// lists, in the order in which they were started. In a guest that was stopped while it changed
    /// the list one may be missing.
    ///
    /// ```no_run
    /// # fn f(guest: &sonicshot_vmi::LinuxGuest<'_>) -> Result<(), sonicshot_vmi::VmiError> {
    /// for task in guest.tasks()? {
    ///     let task = task?;
    ///     println!("{:>7} {}", task.pid, task.name);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VmiError::Missing`] if no source knows `init_task` or the members of `task_struct`.
    pub fn tasks(&self) -> Result<Tasks<'_, 'm>, VmiError> {
        Tasks::new(&self.kernel)
    }
}

impl VirtualMemory for LinuxGuest<'_> {
    fn read(&self, at: KernelVa, buf: &mut [u8]) -> Result<(), VirtualReadError> {
        self.read_virtual(at, buf)
    }
}

/// A process of the guest: the first thread of one, or a kernel thread.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Task {
    /// Its `struct task_struct`.
    pub at: KernelVa,
    /// Its number, as the guest's first PID namespace has it.
    pub pid: u32,
    /// The number of the process that started it, or has taken it over; 0 of those that the kernel
    /// itself has started.
    pub parent: u32,
    /// Its name (`comm`), at most 15 bytes of Linux's.
    pub name: String,
    /// Its `struct mm_struct`; `None` of a kernel thread, and of a process that has ended.
    pub memory: Option<KernelVa>,
}

/// The guest's processes, one after the other; after an error there is no more.
#[derive(Debug)]
pub struct Tasks<'g, 'm> {
    kernel: &'g Kernel<'m>,
    members: Members,
    /// The list's head, in `init_task`.
    head: KernelVa,
    next: Option<KernelVa>,
    seen: u64,
}

/// The offsets of the members that are read of `task_struct`.
#[derive(Debug, Clone, Copy)]
struct Members {
    tasks: u64,
    tgid: u64,
    parent: u64,
    comm: u64,
    comm_len: usize,
    mm: u64,
}

impl<'g, 'm> Tasks<'g, 'm> {
    fn new(kernel: &'g Kernel<'m>) -> Result<Self, VmiError> {
        let need = |path: &str| {
            let member = kernel.any_member("task_struct", path)?;
            member.ok_or_else(|| kernel.missing(format!("member task_struct.{path}")))
        };
        let comm = need("comm")?;
        let members = Members {
            tasks: need("tasks")?.offset,
            tgid: need("tgid")?.offset,
            parent: need("real_parent")?.offset,
            comm: comm.offset,
            comm_len: to_usize(comm.size.or(comm.len).map_or(1, |len| len.min(MAX_COMM))),
            mm: need("mm")?.offset,
        };
        let init = kernel.any_symbol("init_task")?;
        let init = init.ok_or_else(|| kernel.missing("symbol init_task".into()))?;
        let head = at(init, members.tasks)?;
        let next = kernel.read_ptr("task_struct.tasks.next", head)?;
        Ok(Self {
            kernel,
            members,
            head,
            next: Some(next),
            seen: 0,
        })
    }

    /// The task whose link is at `link`, and the next link.
    fn read(&self, link: KernelVa) -> Result<(Task, KernelVa), VmiError> {
        let members = &self.members;
        let broken = || VmiError::Corrupt {
            what: "task_struct.tasks",
            at: link,
            value: members.tasks,
        };
        let task = link.raw().checked_sub(members.tasks).ok_or_else(broken)?;
        let task = KernelVa::new(task);
        let number = |what, of: KernelVa| self.kernel.read_u32(what, at(of, members.tgid)?);
        let parent = self
            .kernel
            .read_ptr("task_struct.real_parent", at(task, members.parent)?)?;
        let mm = self
            .kernel
            .read_u64("task_struct.mm", at(task, members.mm)?)?;
        let name = at(task, members.comm)?;
        let name = self.kernel.space.read_str(name, members.comm_len);
        let found = Task {
            at: task,
            pid: number("task_struct.tgid", task)?,
            parent: number("task_struct.tgid of a parent", parent)?,
            name: name.map_err(VmiError::read("task_struct.comm"))?,
            memory: (mm != 0).then_some(KernelVa::new(mm)),
        };
        let next = self.kernel.read_ptr("task_struct.tasks.next", link)?;
        Ok((found, next))
    }

    fn step(&mut self) -> Result<Option<Task>, VmiError> {
        let Some(link) = self.next.take().filter(|link| *link != self.head) else {
            return Ok(None);
        };
        VmiError::count("tasks in the guest's list", &mut self.seen, 1)?;
        if self.seen > MAX_TASKS {
            return Err(VmiError::TooMany {
                what: "tasks in the guest's list",
                found: self.seen,
                most: MAX_TASKS,
            });
        }
        let (task, next) = self.read(link)?;
        self.next = Some(next);
        Ok(Some(task))
    }
}

impl Iterator for Tasks<'_, '_> {
    type Item = Result<Task, VmiError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

/// The address of a member.
fn at(start: KernelVa, offset: u64) -> Result<KernelVa, VmiError> {
    start.checked_add(offset).ok_or(VmiError::Corrupt {
        what: "task_struct",
        at: start,
        value: offset,
    })
}

#[cfg(test)]
mod tests {
    use super::{MAX_COMM, MAX_TASKS, Tasks};
    use crate::VmiError;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use crate::symbols::Member;

    /// `tasks` at 8, `tgid` at 24, `real_parent` at 32, `mm` at 40, `comm` at 48.
    fn facts(comm_len: Option<u64>) -> Facts {
        let mut facts = Facts::default();
        facts.symbols.insert("init_task", DIRECT_MAP + 0x1000);
        let members = [("tasks", 8), ("tgid", 24), ("real_parent", 32), ("mm", 40)];
        for (name, offset) in members {
            facts.member("task_struct", name, offset);
        }
        let comm = Member {
            offset: 48,
            size: comm_len,
            len: comm_len,
        };
        facts.members.insert(("task_struct", "comm"), comm);
        facts
    }

    /// Tasks, each a page further up from `init_task` on, with where the list goes on.
    fn ram(tasks: &[(u64, u64, u64, &[u8])]) -> Ram {
        let mut ram = Ram::new(8 << 20);
        for (number, (next, pid, mm, name)) in (1..).zip(tasks) {
            let at = number * 0x1000;
            ram.put(at + 8, DIRECT_MAP + next * 0x1000 + 8);
            ram.put(at + 24, *pid);
            ram.put(at + 32, DIRECT_MAP + 0x1000);
            ram.put(at + 40, *mm);
            let name_at = usize::try_from(at).unwrap() + 48;
            ram.0[name_at..name_at + name.len()].copy_from_slice(name);
        }
        ram
    }

    #[test]
    fn the_list_is_followed_to_its_head_and_no_further_than_an_error() {
        let full = [b'x'; 200];
        let ram = ram(&[
            (2, 0, 0, b"swapper/0"),
            (3, 1, 0xffff_8880_0000_5000, b"init"),
            (1, 2, 0, &full),
        ]);
        let memory = ram.memory();
        for (comm_len, expected) in [(Some(16), 16), (Some(1 << 20), MAX_COMM), (None, 1)] {
            let kernel = kernel(&memory, facts(comm_len));
            let tasks: Result<Vec<_>, _> = Tasks::new(&kernel).unwrap().collect();
            let tasks = tasks.unwrap();
            assert_eq!(tasks.len(), 2);
            assert_eq!((tasks[0].pid, tasks[0].parent), (1, 0));
            assert_eq!(tasks[0].memory.unwrap().raw(), 0xffff_8880_0000_5000);
            assert_eq!(tasks[1].name.len() as u64, expected);
            assert!(tasks[1].memory.is_none());
        }
        // It leads to nowhere.
        let torn = self::ram(&[(2, 0, 0, b"a"), (1 << 30, 1, 0, b"b")]);
        let memory = torn.memory();
        let kernel = kernel(&memory, facts(Some(16)));
        let mut tasks = Tasks::new(&kernel).unwrap();
        assert!(tasks.next().unwrap().is_ok());
        assert!(tasks.next().unwrap().is_err());
        assert!(tasks.next().is_none());
    }

    #[test]
    fn a_list_that_never_comes_back_ends() {
        let ram = ram(&[(2, 0, 0, b"a"), (3, 1, 0, b"b"), (2, 2, 0, b"c")]);
        let memory = ram.memory();
        let kernel = kernel(&memory, facts(Some(16)));
        let mut tasks = Tasks::new(&kernel).unwrap();
        tasks.seen = MAX_TASKS - 2;
        assert!(tasks.next().unwrap().is_ok());
        assert!(tasks.next().unwrap().is_ok());
        let error = tasks.next().unwrap().unwrap_err();
        assert!(matches!(error, VmiError::TooMany { .. }), "{error}");
        assert!(tasks.next().is_none());
    }

    #[test]
    fn what_no_source_knows_is_missing() {
        let ram = Ram::new(8 << 20);
        let memory = ram.memory();
        let kernel = kernel(&memory, Facts::default());
        let error = Tasks::new(&kernel).unwrap_err();
        assert!(error.to_string().contains("task_struct.comm"), "{error}");
    }
}

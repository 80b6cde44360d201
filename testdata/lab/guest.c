/* The lab guest's only program: fills memory, writes down what its kernel says of every page
 * frame, beats, and on request tortures the memory it was restored with.
 *
 * Runs as PID 1 of an initramfs. Modules stand in /modules in the order of /modules/order.
 * Disks: the first holds files (ext4, xfs or btrfs, read into the page cache), the second takes the records.
 * Licence: MIT OR Apache-2.0. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1024UL * 1024UL)
#define PAGE 4096UL

static uint64_t seed = 0x5eed;
static int compressible;
/* Garbage is one word in so many. */
static unsigned long garbage_step = 1;
static unsigned long total_kib;

static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	va_start(args, format);
	int len = vsnprintf(line, sizeof line - 1, format, args);
	va_end(args);
	if (len > (int)sizeof line - 2)
		len = sizeof line - 2;
	line[len++] = '\n';
	if (write(1, line, len) < 0)
		_exit(1);
}

static void die(const char *what)
{
	say("LAB-FAIL %s: %s", what, strerror(errno));
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9UL;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebUL;
	return x ^ (x >> 31);
}

/* Word `i` of pattern `id`; never zero. */
static uint64_t pattern(uint64_t id, uint64_t i)
{
	if (compressible)
		return mix(seed + id * 0x1000003UL + i / 512) | 1;
	return mix(seed + id * 0x100000001b3UL + i) | 1;
}

static void fill(uint64_t *at, size_t bytes, uint64_t id)
{
	for (size_t i = 0; i < bytes / 8; i++)
		at[i] = pattern(id, i);
}

static int check(const uint64_t *at, size_t bytes, uint64_t id)
{
	for (size_t i = 0; i < bytes / 8; i++)
		if (at[i] != pattern(id, i))
			return -1;
	return 0;
}

static unsigned long meminfo(const char *key)
{
	char line[128];
	unsigned long value = 0;
	FILE *file = fopen("/proc/meminfo", "r");
	if (!file)
		die("/proc/meminfo");
	while (fgets(line, sizeof line, file))
		if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ':')
			value = strtoul(line + strlen(key) + 1, NULL, 10);
	fclose(file);
	return value;
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0)
		say("LAB-NOTE %s: %s", path, strerror(errno));
	close(fd);
}

static void load_modules(void)
{
	char name[128], path[192];
	FILE *order = fopen("/modules/order", "r");
	if (!order)
		return;
	while (fgets(name, sizeof name, order)) {
		name[strcspn(name, "\n")] = 0;
		snprintf(path, sizeof path, "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
			say("LAB-NOTE module %s: %s", name, strerror(errno));
		if (fd >= 0)
			close(fd);
	}
	fclose(order);
}

/* Fills `bytes` with garbage that is not zero and lets it go again. */
static int use_memory(size_t bytes, uint64_t id, int want_zero)
{
	pid_t child = fork();
	if (child < 0)
		return -1;
	if (child == 0) {
		uint64_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (at == MAP_FAILED)
			_exit(2);
		for (size_t page = 0; page < bytes / PAGE; page++) {
			uint64_t *words = at + page * (PAGE / 8);
			if (want_zero)
				for (size_t i = 0; i < PAGE / 8; i++)
					if (words[i])
						_exit(3);
			for (size_t i = 0; i < PAGE / 8; i += garbage_step)
				words[i] = pattern(id, page * 512 + i);
		}
		/* A page handed out twice would have been written over by its other owner. */
		for (size_t page = 0; page < bytes / PAGE; page++)
			if (at[page * (PAGE / 8)] != pattern(id, page * 512))
				_exit(4);
		_exit(0);
	}
	int status;
	if (waitpid(child, &status, 0) < 0 || !WIFEXITED(status))
		return -1;
	return WEXITSTATUS(status);
}

static size_t reserve_kib(void)
{
	size_t reserve = 48 * 1024 + total_kib / 32;
	if (total_kib < 256 * 1024)
		reserve = 24 * 1024;
	return reserve;
}

/* Uses nearly all memory that is available, in children of at most 1 GiB each at once. */
static int use_all(uint64_t id, int want_zero)
{
	size_t available = meminfo("MemAvailable");
	size_t reserve = reserve_kib();
	if (available <= reserve)
		return 0;
	return use_memory((available - reserve) * 1024, id, want_zero);
}

static uint64_t hash_file(const char *path)
{
	static uint64_t buffer[64 * 1024 / 8];
	uint64_t hash = 0xcbf29ce484222325UL;
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		die(path);
	ssize_t got;
	while ((got = read(fd, buffer, sizeof buffer)) > 0) {
		memset((uint8_t *)buffer + got, 0, -got & 7);
		for (ssize_t i = 0; i < (got + 7) / 8; i++)
			hash = (hash ^ buffer[i]) * 0x100000001b3UL;
	}
	if (got < 0)
		die(path);
	close(fd);
	return hash;
}

static uint64_t hash_tree(const char *path)
{
	uint64_t sum = 0;
	DIR *dir = opendir(path);
	if (!dir)
		die(path);
	struct dirent *entry;
	while ((entry = readdir(dir))) {
		char below[1024];
		struct stat st;
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
		if (lstat(below, &st))
			continue;
		if (S_ISDIR(st.st_mode))
			sum += mix(hash_tree(below));
		else if (S_ISREG(st.st_mode))
			sum += mix(hash_file(below) + st.st_size);
	}
	closedir(dir);
	return sum;
}

/* The first disk is a Debian root, whose programs run. */
static int apps;

/* All files that nothing writes to. */
static uint64_t hash_files(void)
{
	return apps ? hash_tree("/files/usr") + mix(hash_tree("/files/lab")) : hash_tree("/files");
}

/* Whether a program in the root ends well. */
static int in_root(const char *program)
{
	pid_t child = fork();
	if (child == 0) {
		if (chroot("/files") || chdir("/"))
			_exit(1);
		execl("/bin/sh", "sh", program, NULL);
		_exit(1);
	}
	int status;
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return 0;
	return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void start_apps(void)
{
	mount("/proc", "/files/proc", NULL, MS_BIND, NULL);
	mount("/dev", "/files/dev", NULL, MS_BIND, NULL);
	mkdir("/dev/shm", 0777);
	mount("tmpfs", "/files/dev/shm", "tmpfs", 0, NULL);
	mount("tmpfs", "/files/run", "tmpfs", 0, "mode=777");
	mount("tmpfs", "/files/tmp", "tmpfs", 0, "mode=777");
	if (!in_root("/lab/start"))
		die("the programs of the root");
}

/* The record disk: a line `name length\n` padded to 4 KiB, then the data padded to 4 KiB. */
static off_t record_at;

static void record(int disk, const char *name, const char *path)
{
	static uint8_t *buffer;
	const size_t size = 1 * MIB;
	if (!buffer && posix_memalign((void **)&buffer, PAGE, size))
		die("record buffer");
	int fd = open(path, O_RDONLY);
	if (fd < 0) {
		say("LAB-NOTE no %s", path);
		return;
	}
	off_t header = record_at, length = 0;
	record_at += PAGE;
	for (;;) {
		size_t have = 0;
		ssize_t got = 0;
		while (have < size && (got = read(fd, buffer + have, size - have)) > 0)
			have += got;
		if (have == 0)
			break;
		size_t padded = (have + PAGE - 1) / PAGE * PAGE;
		memset(buffer + have, 0, padded - have);
		if (pwrite(disk, buffer, padded, record_at) != (ssize_t)padded)
			die("record disk");
		record_at += padded;
		length += have;
		if (have < size)
			break;
	}
	close(fd);
	memset(buffer, 0, PAGE);
	snprintf((char *)buffer, PAGE, "%s %ld\n", name, (long)length);
	if (pwrite(disk, buffer, PAGE, header) != (ssize_t)PAGE)
		die("record disk");
}

/* Its processes: number, parent, address space in KiB and name of each, in the order of /proc. */
static void record_tasks(int disk)
{
	FILE *out = fopen("/shm/tasks", "w");
	DIR *all = opendir("/proc");
	if (!out || !all)
		die("/shm/tasks");
	struct dirent *entry;
	while ((entry = readdir(all))) {
		char path[300], line[512];
		unsigned long parent = 0, kib = 0;
		char name[64] = "";
		if (strspn(entry->d_name, "0123456789") != strlen(entry->d_name))
			continue;
		snprintf(path, sizeof path, "/proc/%s/status", entry->d_name);
		FILE *status = fopen(path, "r");
		if (!status)
			continue;
		while (fgets(line, sizeof line, status)) {
			sscanf(line, "Name:\t%63[^\n]", name);
			sscanf(line, "PPid: %lu", &parent);
			sscanf(line, "VmSize: %lu kB", &kib);
		}
		fclose(status);
		fprintf(out, "%s %lu %lu %s\n", entry->d_name, parent, kib, name);
	}
	closedir(all);
	if (fclose(out))
		die("/shm/tasks");
	record(disk, "tasks", "/shm/tasks");
	unlink("/shm/tasks");
}

/* The kernel's own word of its memory, as it is now. */
static void record_all(int disk)
{
	record_at = 0;
	record(disk, "iomem", "/proc/iomem");
	record(disk, "vmcoreinfo", "/sys/kernel/vmcoreinfo");
	record(disk, "cmdline", "/proc/cmdline");
	record(disk, "version", "/proc/version");
	record(disk, "meminfo", "/proc/meminfo");
	record(disk, "kpagecount", "/proc/kpagecount");
	record(disk, "zoneinfo", "/proc/zoneinfo");
	record(disk, "buddyinfo", "/proc/buddyinfo");
	record_tasks(disk);
	record(disk, "kpageflags", "/proc/kpageflags");
	static uint8_t *end;
	if (!end && posix_memalign((void **)&end, PAGE, PAGE))
		die("record buffer");
	memset(end, 0, PAGE);
	strcpy((char *)end, "end 0\n");
	if (pwrite(disk, end, PAGE, record_at) != (ssize_t)PAGE)
		die("record disk");
}

/* Where the kernel's log was when the guest was ready: what it said at boot is its own affair. */
static int kmsg = -1;

static void skip_boot_messages(void)
{
	kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
	if (kmsg < 0 || lseek(kmsg, 0, SEEK_END) < 0)
		die("/dev/kmsg");
}

static int kernel_complains(void)
{
	static const char *const words[] = { "BUG:", "Oops", "WARNING:", "Bad page", "bad page",
		"corruption", "general protection", "Call Trace", "list_del", "list_add",
		"EXT4-fs error", NULL };
	char line[1024];
	int bad = 0;
	for (;;) {
		ssize_t got = read(kmsg, line, sizeof line - 1);
		if (got < 0 && errno == EPIPE)
			continue;
		if (got <= 0)
			break;
		line[got] = 0;
		for (int i = 0; words[i]; i++)
			if (strstr(line, words[i])) {
				say("LAB-KMSG %s", line);
				bad = 1;
				break;
			}
	}
	return bad;
}

/* Persistent memory: `memmap=` makes it of the guest's RAM. */
#define PMEM_BYTES (40 * MIB)
static int pmem = -1;

static uint64_t *pmem_buffer(void)
{
	static uint64_t *buffer;
	if (!buffer && posix_memalign((void **)&buffer, PAGE, MIB))
		die("pmem buffer");
	return buffer;
}

static void fill_pmem(void)
{
	for (int i = 0; i < 100 && access("/dev/pmem0", F_OK); i++)
		usleep(50000);
	/* Past the page cache, or that would answer for the device. */
	pmem = open("/dev/pmem0", O_RDWR | O_DIRECT);
	if (pmem < 0)
		die("/dev/pmem0");
	for (uint64_t i = 0; i < PMEM_BYTES / MIB; i++) {
		fill(pmem_buffer(), MIB, 5000 + i);
		if (pwrite(pmem, pmem_buffer(), MIB, i * MIB) != (ssize_t)MIB)
			die("writing persistent memory");
	}
}

static int check_pmem(void)
{
	for (uint64_t i = 0; pmem >= 0 && i < PMEM_BYTES / MIB; i++)
		if (pread(pmem, pmem_buffer(), MIB, i * MIB) != (ssize_t)MIB ||
		    check(pmem_buffer(), MIB, 5000 + i))
			return -1;
	return 0;
}

/* Writes `state` to memory blocks that are in state `from`, and so many MiB of them; returns how
 * many MiB there were. Those that cannot be changed are passed over. */
static unsigned long change_blocks(const char *from, const char *state, unsigned long mib)
{
	char text[32] = "";
	int size = open("/sys/devices/system/memory/block_size_bytes", O_RDONLY);
	if (size < 0 || read(size, text, sizeof text - 1) <= 0)
		die("block_size_bytes");
	close(size);
	unsigned long block = strtoul(text, NULL, 16) / MIB, done = 0;
	/* From the last on: those that were plugged in, not those of the boot. */
	for (int number = 1024; number > 0 && done < mib; number--) {
		char path[128], now[16] = "";
		snprintf(path, sizeof path, "/sys/devices/system/memory/memory%d/state", number);
		int fd = open(path, O_RDWR);
		if (fd < 0)
			continue;
		if (read(fd, now, sizeof now - 1) > 0 && !strncmp(now, from, strlen(from)) &&
		    write(fd, state, strlen(state)) > 0)
			done += block;
		close(fd);
	}
	return done;
}

static unsigned long offlined_mib;

struct kept {
	uint64_t *anon, *thp, *shm, *huge;
	size_t anon_len, thp_len, shm_len, huge_len;
	uint64_t files;
};

static const char *check_kept(const struct kept *k)
{
	if (check(k->anon, k->anon_len, 1))
		return "anonymous memory";
	if (check(k->thp, k->thp_len, 2))
		return "huge page";
	if (check(k->shm, k->shm_len, 3))
		return "tmpfs";
	if (k->huge_len && check(k->huge, k->huge_len, 4))
		return "hugetlb";
	if (check_pmem())
		return "persistent memory";
	return NULL;
}

/* What is in memory now: nothing is taken, nothing evicted. */
static const char *look(const struct kept *k)
{
	const char *bad = check_kept(k);
	if (!bad && hash_files() != k->files)
		bad = "files";
	if (!bad && apps && !in_root("/lab/check"))
		bad = "the programs of the root";
	if (!bad && kernel_complains())
		bad = "the kernel's log";
	return bad;
}

static void torture(const struct kept *k)
{
	/* First, while the files are still in the page cache: what follows evicts them, and then the
	 * disk would answer for pages that were dropped. */
	const char *bad = look(k);
	if (bad) {
		say("TORTURE-FAIL %s before", bad);
		return;
	}
	for (int round = 0; round < 2; round++) {
		int got = use_all(100 + round, 1);
		if (got) {
			say("TORTURE-FAIL using all memory: %d%s", got,
			    got == 3 ? " (a new page was not zero)" : "");
			return;
		}
	}
	/* What was offline is brought back and used like the rest. */
	if (offlined_mib) {
		if (change_blocks("offline", "online_movable", offlined_mib) != offlined_mib) {
			say("TORTURE-FAIL bringing memory back online");
			return;
		}
		if (use_all(110, 1)) {
			say("TORTURE-FAIL using memory that was offline");
			return;
		}
	}
	put("/proc/sys/vm/compact_memory", "1");
	put("/proc/sys/vm/drop_caches", "3");
	pid_t children[200];
	for (int i = 0; i < 200; i++) {
		children[i] = fork();
		if (children[i] < 0) {
			say("TORTURE-FAIL fork");
			return;
		}
		if (children[i] == 0) {
			char *at = malloc(256 * 1024);
			memset(at, i + 1, 256 * 1024);
			_exit(at[1000 * (i % 200)] == (char)(i + 1) ? 0 : 1);
		}
	}
	for (int i = 0, status; i < 200; i++)
		if (waitpid(children[i], &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status)) {
			say("TORTURE-FAIL child");
			return;
		}
	if (hash_files() != k->files) {
		say("TORTURE-FAIL files");
		return;
	}
	if (apps && !in_root("/lab/check")) {
		say("TORTURE-FAIL the programs of the root");
		return;
	}
	bad = check_kept(k);
	if (bad) {
		say("TORTURE-FAIL %s after", bad);
		return;
	}
	if (kernel_complains()) {
		say("TORTURE-FAIL the kernel complained");
		return;
	}
	say("TORTURE-OK");
}

/* Takes and gives back memory of all kinds without rest, checking what it wrote, until killed. */
static void stress(uint64_t id)
{
	uint64_t state = mix(seed + id);
	size_t most = meminfo("MemAvailable") * 1024 / 8;
	char path[64];
	snprintf(path, sizeof path, "/shm/stress-%lu", (unsigned long)id);
	for (uint64_t round = 0;; round++) {
		state = mix(state + 1);
		size_t bytes = (state % (most / PAGE) + 1) * PAGE;
		uint64_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (at == MAP_FAILED)
			continue;
		for (size_t page = 0; page < bytes / PAGE; page++) {
			if (at[page * (PAGE / 8) + 7])
				say("STRESS-FAIL a new page was not zero");
			at[page * (PAGE / 8)] = pattern(id, round + page);
		}
		int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
		if (fd >= 0) {
			size_t len = bytes < MIB ? bytes : MIB;
			if (write(fd, at, len) < 0)
				say("STRESS-NOTE %s", strerror(errno));
			close(fd);
		}
		pid_t child = fork();
		if (child == 0) {
			for (size_t page = 0; page < bytes / PAGE; page += 3)
				at[page * (PAGE / 8) + 1] = page;
			_exit(0);
		}
		for (size_t page = 0; page < bytes / PAGE; page++)
			if (at[page * (PAGE / 8)] != pattern(id, round + page))
				say("STRESS-FAIL a page has changed");
		if (child > 0)
			waitpid(child, NULL, 0);
		unlink(path);
		munmap(at, bytes);
	}
}

/* Where `text` begins on the kernel's command line. */
static char *on_cmdline(const char *text)
{
	static char line[4096];
	int fd = open("/proc/cmdline", O_RDONLY);
	ssize_t got = read(fd, line, sizeof line - 1);
	close(fd);
	line[got > 0 ? got : 0] = 0;
	return strstr(line, text);
}

static unsigned long option(const char *name, unsigned long otherwise)
{
	char *at = on_cmdline(name);
	if (!at || at[strlen(name)] != '=')
		return otherwise;
	return strtoul(at + strlen(name) + 1, NULL, 10);
}

/* VMCOREINFO as it stands in the notes of /proc/kcore; its length, or 0. */
static size_t vmcoreinfo(char *page)
{
	static char head[32 * 1024];
	int fd = open("/proc/kcore", O_RDONLY);
	size_t have = 0;
	ssize_t got;
	while (fd >= 0 && have < sizeof head &&
	       (got = read(fd, head + have, sizeof head - have)) > 0)
		have += got;
	if (fd >= 0)
		close(fd);
	char *at = memmem(head, have, "OSRELEASE=", 10);
	if (!at)
		return 0;
	size_t len = strnlen(at, head + have - at);
	len = len < PAGE ? len : PAGE - 1;
	memcpy(page, at, len);
	return len;
}

/* All of another guest's memory, from a disk: once as its VMM would have it, in huge pages, and
 * once as a copy of its dump is, in the page cache. */
static void hold_nested(unsigned long number, unsigned long pool)
{
	const size_t huge = 2 * MIB;
	char path[] = "/dev/vda";
	path[7] += number;
	int disk = open(path, O_RDONLY);
	off_t length = disk < 0 ? -1 : lseek(disk, 0, SEEK_END);
	if (length <= 0)
		die(path);
	size_t size = (length + huge - 1) / huge * huge;
	uint8_t *at;
	if (pool) {
		char text[32];
		snprintf(text, sizeof text, "%zu", size / huge);
		put("/proc/sys/vm/nr_hugepages", text);
		at = mmap(NULL, size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	} else
		at = mmap(NULL, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			  -1, 0);
	if (at == MAP_FAILED)
		die("a nested guest's memory");
	if (!pool) {
		at = (uint8_t *)(((uintptr_t)at + huge - 1) & ~(huge - 1));
		madvise(at, size, MADV_HUGEPAGE);
	}
	for (off_t have = 0; have < length;) {
		size_t left = length - have;
		ssize_t got = pread(disk, at + have, left < MIB ? left : MIB, have);
		if (got <= 0)
			die("reading a nested guest's memory");
		have += got;
	}
	mlock(at, size);
}

/* Pages of memory that pass for VMCOREINFO: its first line alone, exact copies, copies in which
 * one digit is another, copies that are cut off. */
static void decoys(size_t pages)
{
	static char text[PAGE];
	size_t len = vmcoreinfo(text);
	if (!len)
		die("/proc/kcore");
	char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			-1, 0);
	if (at == MAP_FAILED)
		die("decoys");
	for (size_t i = 0; i < pages; i++) {
		char *page = at + i * PAGE;
		size_t where = mix(seed + i) % len;
		if (i % 4 == 0) {
			strcpy(page, "OSRELEASE=x\n");
			continue;
		}
		memcpy(page, text, len);
		if (i % 4 == 2) {
			while (where < len && !(page[where] >= '0' && page[where] <= '9'))
				where++;
			if (where < len)
				page[where] = '0' + (page[where] - '0' + 1 + i % 9) % 10;
		} else if (i % 4 == 3)
			memset(page + where, 0, PAGE - where);
	}
	say("DECOYS %lu", (unsigned long)pages);
}

/* Copies `length` bytes of a disk into a file in memory, past the page cache of the disk. */
static int from_disk(int disk, off_t at, size_t length)
{
	uint8_t *buffer;
	int file = syscall(SYS_memfd_create, "boot", 0);
	if (file < 0 || posix_memalign((void **)&buffer, PAGE, MIB))
		die("a file for the next kernel");
	for (size_t done = 0; done < length;) {
		size_t more = length - done < MIB ? length - done : MIB;
		ssize_t got = pread(disk, buffer, MIB, at + done);
		if (got < (ssize_t)more || write(file, buffer, more) != (ssize_t)more)
			die("the next kernel");
		done += more;
	}
	free(buffer);
	return file;
}

/* Loads the next kernel from the third disk: `kernel-length initrd-length command line\n` padded
 * to 4 KiB, the kernel and the initrd, each padded to 1 MiB. */
static void load_next(unsigned long flags)
{
	char *header;
	int disk = open("/dev/vdc", O_RDONLY | O_DIRECT);
	if (disk < 0 || posix_memalign((void **)&header, PAGE, PAGE) ||
	    pread(disk, header, PAGE, 0) != (ssize_t)PAGE)
		die("/dev/vdc");
	size_t kernel, initrd;
	int used = 0;
	header[PAGE - 1] = 0;
	if (sscanf(header, "%zu %zu %n", &kernel, &initrd, &used) < 2)
		die("the next kernel's header");
	char *line = header + used;
	line[strcspn(line, "\n")] = 0;
	off_t second = PAGE + (kernel + MIB - 1) / MIB * MIB;
	int image = from_disk(disk, PAGE, kernel), ram = from_disk(disk, second, initrd);
	if (syscall(SYS_kexec_file_load, image, ram, strlen(line) + 1, line, flags))
		die("kexec_file_load");
	close(image);
	close(ram);
	close(disk);
	free(header);
}

/* Waits until memory has grown by `mib`, bringing online what comes (some kernels do so alone). */
static void wait_for_memory(unsigned long before_kib, unsigned long mib, const char *online)
{
	int brought = 0;
	for (int i = 0; i < 600; i++) {
		DIR *dir = opendir("/sys/devices/system/memory");
		struct dirent *entry;
		while (dir && (entry = readdir(dir))) {
			char path[512], state[16] = "";
			if (strncmp(entry->d_name, "memory", 6))
				continue;
			snprintf(path, sizeof path, "/sys/devices/system/memory/%s/state",
				 entry->d_name);
			int fd = open(path, O_RDWR);
			if (fd >= 0 && read(fd, state, sizeof state - 1) > 0 &&
			    !strncmp(state, "offline", 7)) {
				if (write(fd, online, strlen(online)) < 0)
					say("LAB-NOTE %s: %s", path, strerror(errno));
				else
					brought++;
			}
			if (fd >= 0)
				close(fd);
		}
		if (dir)
			closedir(dir);
		/* Its struct pages may lie in the new memory itself. */
		if (meminfo("MemTotal") >= before_kib + mib * 1024 * 31 / 32) {
			say("PLUGGED, %d blocks brought online", brought);
			return;
		}
		usleep(100000);
	}
	errno = ETIMEDOUT;
	die("waiting for memory");
}

int main(void)
{
	setbuf(stdout, NULL);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mkdir("/files", 0755);
	mkdir("/shm", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	/* A kernel that has no /dev at first has given none. */
	int console = open(on_cmdline("console=hvc0") ? "/dev/hvc0" : "/dev/ttyS0", O_RDWR);
	if (console >= 0) {
		dup2(console, 0);
		dup2(console, 1);
		dup2(console, 2);
	}
	total_kib = meminfo("MemTotal");
	load_modules();
	unsigned long plug = option("lab.plug", 0);
	if (plug) {
		say("PLUG");
		/* What shall go offline again must hold nothing that cannot move. */
		wait_for_memory(total_kib, plug,
				option("lab.offline", 0) ? "online_movable" : "online");
		total_kib = meminfo("MemTotal");
	}
	seed = option("lab.seed", 1);
	compressible = option("lab.compressible", 0);
	unsigned long anon_mib = option("lab.anon", 24);
	unsigned long huge = option("lab.huge", 0);

	for (int i = 0; i < 100 && access("/dev/vdb", F_OK); i++)
		usleep(50000);
	mount("tmpfs", "/shm", "tmpfs", 0, "size=50%");
	if (mount("/dev/vda", "/files", "ext4", 0, NULL) &&
	    mount("/dev/vda", "/files", "xfs", 0, NULL) &&
	    mount("/dev/vda", "/files", "btrfs", 0, NULL))
		die("mounting /dev/vda");

	struct kept k = { 0 };
	k.anon_len = anon_mib * MIB;
	k.anon = mmap(NULL, k.anon_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (k.anon == MAP_FAILED)
		die("anonymous memory");
	fill(k.anon, k.anon_len, 1);
	mlock(k.anon, k.anon_len);

	k.thp_len = (anon_mib >= 16 ? 8 : 2) * MIB;
	uint8_t *thp = mmap(NULL, k.thp_len + 2 * MIB, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (thp == MAP_FAILED)
		die("huge page");
	k.thp = (uint64_t *)(((uintptr_t)thp + 2 * MIB - 1) & ~(2 * MIB - 1));
	madvise(k.thp, k.thp_len, MADV_HUGEPAGE);
	fill(k.thp, k.thp_len, 2);
	mlock(k.thp, k.thp_len);

	k.shm_len = anon_mib / 3 * MIB;
	int shm = open("/shm/kept", O_RDWR | O_CREAT, 0600);
	if (shm < 0 || ftruncate(shm, k.shm_len))
		die("tmpfs");
	k.shm = mmap(NULL, k.shm_len, PROT_READ | PROT_WRITE, MAP_SHARED, shm, 0);
	if (k.shm == MAP_FAILED)
		die("tmpfs");
	fill(k.shm, k.shm_len, 3);

	if (huge) {
		char text[32];
		snprintf(text, sizeof text, "%lu", huge);
		put("/proc/sys/vm/nr_hugepages", text);
		k.huge_len = huge / 2 * 2 * MIB;
		k.huge = mmap(NULL, k.huge_len, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
		if (k.huge == MAP_FAILED)
			die("hugetlb");
		fill(k.huge, k.huge_len, 4);
	}

	/* The disks are copied once and serve all forms of a snapshot: what is dirty stays so. */
	put("/proc/sys/vm/dirty_writeback_centisecs", "0");

	unsigned long next = option("lab.kexec", 0);
	if (next)
		load_next(next == 2 ? KEXEC_FILE_ON_CRASH : 0);
	put("/proc/sys/kernel/sysrq", "1");
	int sysrq = open("/proc/sysrq-trigger", O_WRONLY);

	apps = option("lab.apps", 0);
	if (apps)
		start_apps();

	/* Free pages that are not zero, unless what earlier boots left in them is to stay; then page
	 * cache, clean and dirty. */
	if (!option("lab.empty", 0) && use_all(50, 0))
		die("filling free memory");
	if (option("lab.pmem", 0))
		fill_pmem();
	unsigned long offline = option("lab.offline", 0);
	if (offline) {
		offlined_mib = change_blocks("online", "offline", offline);
		say("OFFLINED %lu MiB", offlined_mib);
		if (offlined_mib < offline)
			die("taking memory offline");
	}
	k.files = hash_files();
	for (unsigned long round = 0; round < option("lab.aged", 0); round++) {
		if (use_all(60 + round, 0))
			die("memory pressure");
		if (hash_files() != k.files)
			die("files under memory pressure");
	}
	int dirty = open(apps ? "/files/var/dirty" : "/files/dirty", O_RDWR | O_CREAT, 0600);
	for (uint64_t i = 0; dirty >= 0 && i < (anon_mib >= 16 ? 1024 : 256); i++) {
		uint64_t page[PAGE / 8];
		fill(page, sizeof page, 1000 + i);
		if (write(dirty, page, sizeof page) != sizeof page)
			die("dirty page cache");
	}
	k.files = hash_files();

	if (option("lab.decoys", 0))
		decoys(option("lab.decoys", 0));
	if (option("lab.nested", 0))
		hold_nested(option("lab.nested", 0), option("lab.pool", 0));
	/* Processes that never leave user space by themselves. */
	for (unsigned long i = 0; i < option("lab.spin", 0); i++)
		if (fork() == 0)
			for (;;)
				__asm__ volatile("" ::: "memory");

	int disk = open("/dev/vdb", O_RDWR | O_DIRECT);
	if (disk < 0)
		die("/dev/vdb");
	record_all(disk);
	skip_boot_messages();
	pid_t stressing[16] = { 0 };
	unsigned long stressors = option("lab.stress", 0);
	for (unsigned long i = 0; i < stressors && i < 16; i++) {
		stressing[i] = fork();
		if (stressing[i] == 0)
			stress(2000 + i);
	}
	int every = option("lab.beat", 1000);
	say("READY");

	for (unsigned long beat = 0;; beat++) {
		char line[64];
		struct pollfd input = { .fd = 0, .events = POLLIN };
		int ready = poll(&input, 1, every);
		if (ready > 0) {
			ssize_t got = read(0, line, sizeof line - 1);
			if (got > 0) {
				line[got] = 0;
				if (strstr(line, "torture")) {
					for (int i = 0; i < 16; i++)
						if (stressing[i] > 0) {
							kill(stressing[i], SIGKILL);
							waitpid(stressing[i], NULL, 0);
							stressing[i] = 0;
						}
					torture(&k);
				}
				else if (strstr(line, "look")) {
					const char *bad = look(&k);
					say(bad ? "LOOK-FAIL %s" : "LOOK-OK", bad);
				} else if (strstr(line, "record")) {
					record_all(disk);
					say("RECORDED");
				} else if (strstr(line, "reboot")) {
					reboot(RB_AUTOBOOT);
				} else if (strstr(line, "sleep")) {
					put("/sys/power/state", "mem");
					say("AWAKE");
				} else if (strstr(line, "spin")) {
					if (fork() == 0)
						for (;;)
							seed = mix(seed);
					say("SPINNING");
				} else if (strstr(line, "kexec")) {
					syscall(SYS_reboot, 0xfee1dead, 672274793, RB_KEXEC, NULL);
				} else if (strstr(line, "sysrq-")) {
					if (write(sysrq, strstr(line, "sysrq-") + 6, 1) < 0)
						say("LAB-NOTE sysrq: %s", strerror(errno));
				} else if (strstr(line, "off")) {
					sync();
					reboot(RB_POWER_OFF);
				}
			}
			continue;
		}
		if (check(k.shm, MIB, 3))
			say("BEAT-FAIL");
		else
			say("BEAT %lu", beat);
	}
}

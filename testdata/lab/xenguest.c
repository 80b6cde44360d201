/* The program of a paravirtual guest under Xen: as guest.c, with its files in memory, or on a disk.
 * Licence: MIT OR Apache-2.0. */
#define main with_disks
#include "guest.c"
#undef main
#include <linux/fs.h>
#include <sys/ioctl.h>

/* Pages that the kernel says are free, in its own allocator. */
static unsigned long free_pages(void)
{
	static uint64_t flags[8192];
	const uint64_t buddy = 1UL << 10; /* KPF_BUDDY */
	unsigned long count = 0;
	ssize_t got;
	int fd = open("/proc/kpageflags", O_RDONLY);
	if (fd < 0)
		die("/proc/kpageflags");
	while ((got = read(fd, flags, sizeof flags)) > 0)
		for (ssize_t i = 0; i < got / 8; i++)
			count += !!(flags[i] & buddy);
	close(fd);
	return count;
}

/* Memory with data in it: pattern `USED_ID` + its index. */
#define USED_ID 5000
static struct used {
	uint64_t *at;
	size_t len;
} used[256];
static int used_count;

/* Takes memory until so much of all that the kernel has is in use. */
static void use_up_to(unsigned long mib)
{
	for (; used_count < 256; used_count++) {
		unsigned long now = (meminfo("MemTotal") - meminfo("MemFree")) / 1024;
		if (now >= mib)
			return;
		size_t len = (mib - now < 64 ? 1 : mib - now < 1024 ? 16 : 256) * MIB;
		uint64_t *at = mmap(NULL, len, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (at == MAP_FAILED)
			die("memory");
		fill(at, len, USED_ID + used_count);
		used[used_count] = (struct used){ at, len };
	}
	die("more pieces of memory than there is room for");
}

/* What the guest has in memory besides that of guest.c. */
static const char *check_more(const uint64_t *zeroes, size_t zeroes_len)
{
	for (size_t i = 0; i < zeroes_len / 8; i++)
		if (zeroes[i])
			return "zeroes";
	for (int i = 0; i < used_count; i++)
		if (check(used[i].at, used[i].len, USED_ID + i))
			return "used memory";
	return NULL;
}

/* Requests of reading that its disk was given. */
static unsigned long reads_of_disk(void)
{
	char line[256];
	unsigned long reads = 0, each;
	FILE *file = fopen("/proc/diskstats", "r");
	if (!file)
		die("/proc/diskstats");
	while (fgets(line, sizeof line, file))
		if (sscanf(line, "%*u %*u xvda %lu", &each) == 1)
			reads += each;
	fclose(file);
	return reads;
}

/* Mounts the disk, or its first partition, and has some of its page cache dirty. */
static void use_disk(void)
{
	load_modules();
	for (int i = 0; i < 200 && access("/dev/xvda", F_OK); i++)
		usleep(50000);
	/* Its partitions are there once it is. */
	const char *device = access("/dev/xvda1", F_OK) ? "/dev/xvda" : "/dev/xvda1";
	if (mount(device, "/files", "ext4", 0, NULL))
		die(device);
	put("/proc/sys/vm/dirty_writeback_centisecs", "0");
	say("DISK %s", device);
}

static void dirty_some(void)
{
	uint64_t page[PAGE / 8];
	int fd = open("/files/dirty", O_RDWR | O_CREAT, 0600);
	for (int i = 0; i < 512; i++) {
		fill(page, sizeof page, 7000 + i);
		if (fd < 0 || write(fd, page, sizeof page) != sizeof page)
			die("dirty page cache");
	}
	close(fd);
}

int main(void)
{
	struct kept k = { 0 };

	/* Not used here. */
	(void)with_disks;
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	int console = open("/dev/hvc0", O_RDWR);
	if (console < 0)
		return 1;
	for (int fd = 0; fd < 3; fd++)
		dup2(console, fd);
	mount("tmpfs", "/shm", "tmpfs", 0, "size=50%");
	int has_disk = option("lab.disk", 0);
	if (has_disk)
		use_disk();
	else
		mount("tmpfs", "/files", "tmpfs", 0, "size=25%");
	total_kib = meminfo("MemTotal");
	seed = option("lab.seed", 1);
	garbage_step = option("lab.garbage_step", 1);
	k.anon_len = k.thp_len = k.shm_len = option("lab.anon", 16) * MIB;
	k.anon = mmap(NULL, k.anon_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	k.thp = mmap(NULL, k.thp_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int shm = open("/shm/kept", O_RDWR | O_CREAT, 0600);
	if (shm < 0 || ftruncate(shm, k.shm_len))
		die("tmpfs");
	k.shm = mmap(NULL, k.shm_len, PROT_READ | PROT_WRITE, MAP_SHARED, shm, 0);
	if (k.anon == MAP_FAILED || k.thp == MAP_FAILED || k.shm == MAP_FAILED)
		die("memory");
	fill(k.anon, k.anon_len, 1);
	fill(k.thp, k.thp_len, 2);
	fill(k.shm, k.shm_len, 3);
	/* Pages in use that are zero must still be so afterwards. */
	size_t zeroes_len = 4 * MIB;
	uint64_t *zeroes = mmap(NULL, zeroes_len, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (zeroes == MAP_FAILED)
		die("memory");
	memset(zeroes, 0, zeroes_len);
	for (int i = 0; i < 64 && !has_disk; i++) {
		char name[64];
		uint64_t page[PAGE / 8];
		snprintf(name, sizeof name, "/files/%d", i);
		int fd = open(name, O_RDWR | O_CREAT, 0600);
		for (int j = 0; j < 16; j++) {
			fill(page, sizeof page, 1000 + i * 16 + j);
			if (write(fd, page, sizeof page) != sizeof page)
				die(name);
		}
		close(fd);
	}
	/* Free memory is not zero, unless that takes too long for what is measured. */
	if (option("lab.garbage", 1) && use_all(50, 0))
		die("filling free memory");
	use_up_to(option("lab.used", 0));
	/* Read after that, which evicts them. */
	k.files = hash_tree("/files");
	if (has_disk) {
		dirty_some();
		k.files = hash_tree("/files");
	}
	skip_boot_messages();
	say("USED %lu", (meminfo("MemTotal") - meminfo("MemFree")) / 1024);
	say("FREE %lu", free_pages());
	say("READY");
	for (;;) {
		char line[64];
		ssize_t got = read(0, line, sizeof line - 1);
		if (got <= 0) {
			usleep(100000);
			continue;
		}
		line[got] = 0;
		const char *bad = check_more(zeroes, zeroes_len);
		if (strstr(line, "torture")) {
			if (bad)
				say("TORTURE-FAIL %s", bad);
			else
				torture(&k);
		} else if (strstr(line, "look")) {
			if (!bad)
				bad = look(&k);
			say("LOOK-%s %s", bad ? "FAIL" : "OK", bad ? bad : "");
		} else if (strstr(line, "reads")) {
			say("READS %lu", reads_of_disk());
		} else if (strstr(line, "write")) {
			int fd = open("/files/written", O_RDWR | O_CREAT, 0600);
			/* Frozen, it has its journal empty, which the disk tells; a commit alone need not. */
			if (fd < 0 || write(fd, line, sizeof line) < 0 || fsync(fd) ||
			    ioctl(fd, FIFREEZE, 0) || ioctl(fd, FITHAW, 0))
				die("/files/written");
			close(fd);
			k.files = hash_tree("/files");
			say("WROTE");
		}
	}
}

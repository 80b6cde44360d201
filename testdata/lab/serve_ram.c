/* Preloaded into a QEMU that knows nothing of it: has its guest's RAM served page by page.
 *
 * The mapping that is as long as the guest's memory (SERVE_RAM bytes) and lies where QEMU has chosen
 * (MAP_FIXED) is that memory, private or of a memfd. It is registered with a userfaultfd before
 * anybody touches it, and sent to the server at SERVE_SOCKET in the form of docs/serve.md; what lies
 * above SERVE_LOW bytes begins at 4 GiB in the guest. Without a word of the server QEMU ends. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

typedef void *(*mmap_fn)(void *, size_t, int, int, int, off_t);

static void fail(const char *what)
{
	perror(what);
	_exit(70);
}

static size_t number(const char *name)
{
	const char *text = getenv(name);

	return text ? strtoull(text, NULL, 10) : 0;
}

static void send_all(int uffd, const char *text)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	struct iovec part = { (void *)text, strlen(text) };
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	char answer[512] = "";
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(name.sun_path, sizeof(name.sun_path), "%s", getenv("SERVE_SOCKET"));
	if (sock < 0 || connect(sock, (void *)&name, sizeof(name)))
		fail("serve_ram: connect");
	control.head.cmsg_level = SOL_SOCKET;
	control.head.cmsg_type = SCM_RIGHTS;
	control.head.cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(&control.head), &uffd, sizeof(int));
	if (sendmsg(sock, &message, 0) != (ssize_t)part.iov_len)
		fail("serve_ram: sendmsg");
	if (read(sock, answer, sizeof(answer) - 1) <= 0 || strcmp(answer, "{\"ok\":true}\n")) {
		fprintf(stderr, "serve_ram: %s\n", answer);
		_exit(70);
	}
	close(sock);
}

static void serve(char *ram, size_t len)
{
	size_t low = number("SERVE_LOW");
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	struct uffdio_register range = { .range = { (unsigned long)ram, len },
					 .mode = UFFDIO_REGISTER_MODE_MISSING };
	char text[512], high[256] = "";
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
		fail("serve_ram: userfaultfd");
	if (low > len || !low)
		low = len;
	if (low < len)
		snprintf(high, sizeof(high), ",{\"host\":%lu,\"len\":%zu,\"gpa\":4294967296,\"page\":4096}",
			 (unsigned long)ram + low, len - low);
	snprintf(text, sizeof(text),
		 "{\"sonicshot\":1,\"regions\":[{\"host\":%lu,\"len\":%zu,\"gpa\":0,\"page\":4096}%s]}",
		 (unsigned long)ram, low, high);
	send_all(uffd, text);
	/* The server has it too, and this process keeps it: nobody reads zeroes if both die. */
}

static void *map(const char *name, void *at, size_t len, int access, int flags, int fd, off_t offset)
{
	static int done;
	mmap_fn real = (mmap_fn)dlsym(RTLD_NEXT, name);
	void *found = real(at, len, access, flags, fd, offset);

	if (found != MAP_FAILED && (flags & MAP_FIXED) && (access & PROT_WRITE)
	    && len == number("SERVE_RAM") && !__atomic_exchange_n(&done, 1, __ATOMIC_SEQ_CST))
		serve(found, len);
	return found;
}

void *mmap(void *at, size_t len, int access, int flags, int fd, off_t offset)
{
	return map("mmap", at, len, access, flags, fd, offset);
}

void *mmap64(void *at, size_t len, int access, int flags, int fd, off_t offset)
{
	return map("mmap64", at, len, access, flags, fd, offset);
}

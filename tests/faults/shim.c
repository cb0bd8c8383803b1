/* Preloaded: counts what a process does to files below one folder, and at the n-th such call fails it or kills the
 * process.
 *
 * Every function that changes a file or its name is here, so that "at every write" means every one. Library code that
 * makes system calls by itself, past libc, is out of reach. fault_arm starts the count, fault_count reads it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FULL, BROKEN, KILL };   /* FULL: no write from there on finds room. BROKEN: this one call gives EIO. */
enum { WRITES, OTHERS };

static char under[PATH_MAX];
static int mode, at, calls;
static char last[64];

void fault_arm(const char *folder, int how, int when) {
    snprintf(under, sizeof under, "%s", folder);
    mode = how; at = when; calls = 0;
}
int fault_count(void) { return calls; }
const char *fault_last(void) { return last; }

static int inside(const char *path) { return under[0] && strncmp(path, under, strlen(under)) == 0; }

static int inside_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

static int inside_at(int dir, const char *path) {
    return (dir == AT_FDCWD || path[0] == '/') ? inside(path) : inside_fd(dir);
}

/* whether the call must fail, with errno set; does not return when it is time to die */
static int fails(int here, int kind, const char *name) {
    if (!here) return 0;
    int now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);   /* a save flushes files in threads */
    if (mode == FULL && now >= at && kind == WRITES) { errno = ENOSPC; return 1; }
    if (now != at) return 0;
    snprintf(last, sizeof last, "%s", name);
    if (mode == KILL) { kill(getpid(), SIGKILL); for (;;) pause(); }
    if (mode == BROKEN) { errno = EIO; return 1; }
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define TRY(here, kind, name) do { if (fails(here, kind, #name)) return -1; } while (0)

ssize_t write(int fd, const void *p, size_t n) {
    REAL(write);
    int here = inside_fd(fd);
    if (here && mode == KILL && calls + 1 == at && n > 1) real(fd, p, n / 2);   /* die in the middle of it */
    TRY(here, WRITES, write);
    return real(fd, p, n);
}
ssize_t pwrite(int fd, const void *p, size_t n, off_t o) { REAL(pwrite); TRY(inside_fd(fd), WRITES, pwrite); return real(fd, p, n, o); }
ssize_t pwrite64(int fd, const void *p, size_t n, off64_t o) { REAL(pwrite64); TRY(inside_fd(fd), WRITES, pwrite64); return real(fd, p, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); TRY(inside_fd(fd), WRITES, writev); return real(fd, v, n); }
ssize_t sendfile(int out, int in, off_t *o, size_t n) { REAL(sendfile); TRY(inside_fd(out), WRITES, sendfile); return real(out, in, o, n); }
ssize_t sendfile64(int out, int in, off64_t *o, size_t n) { REAL(sendfile64); TRY(inside_fd(out), WRITES, sendfile64); return real(out, in, o, n); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); TRY(inside_fd(fd), WRITES, ftruncate); return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); TRY(inside_fd(fd), WRITES, ftruncate64); return real(fd, n); }
int fsync(int fd) { REAL(fsync); TRY(inside_fd(fd), OTHERS, fsync); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); TRY(inside_fd(fd), OTHERS, fdatasync); return real(fd); }
int rename(const char *a, const char *b) { REAL(rename); TRY(inside(a), OTHERS, rename); return real(a, b); }
int renameat(int d, const char *a, int e, const char *b) { REAL(renameat); TRY(inside_at(d, a), OTHERS, renameat); return real(d, a, e, b); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) { REAL(renameat2); TRY(inside_at(d, a), OTHERS, renameat2); return real(d, a, e, b, f); }
int unlink(const char *a) { REAL(unlink); TRY(inside(a), OTHERS, unlink); return real(a); }
int unlinkat(int d, const char *a, int f) { REAL(unlinkat); TRY(inside_at(d, a), OTHERS, unlinkat); return real(d, a, f); }
int rmdir(const char *a) { REAL(rmdir); TRY(inside(a), OTHERS, rmdir); return real(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); TRY(inside(a), WRITES, mkdir); return real(a, m); }

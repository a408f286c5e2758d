/* LD_PRELOAD: after eio_arm(prefix, at), the at-th call on a file under `prefix` fails with EIO, and only that one.
   at = 0 counts without failing. Counted: open (also with O_CREAT), read, pread, write, pwrite, fsync, rename, mkdir,
   unlink, ftruncate. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static char failed[2 * PATH_MAX];
static atomic_long calls, at;

void eio_arm(const char *folder, long number) {
  snprintf(prefix, sizeof prefix, "%s", folder);
  atomic_store(&calls, 0);
  atomic_store(&at, number);
}
long eio_calls(void) { return atomic_load(&calls); }
const char *eio_failed(void) { return failed; } /* the call and its file; empty if none has failed */

static int fails(const char *call, const char *path) {
  if (!prefix[0] || !path || strncmp(path, prefix, strlen(prefix))) return 0;
  if (atomic_fetch_add(&calls, 1) + 1 != atomic_load(&at)) return 0;
  snprintf(failed, sizeof failed, "%s %s", call, path + strlen(prefix));
  errno = EIO;
  return 1;
}
static int fails_fd(const char *call, int fd) {
  char link[64], path[PATH_MAX];
  if (!prefix[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(call, path);
}
#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) { MODE(flags) REAL(open); return fails("open", path) ? -1 : real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) REAL(open64); return fails("open", path) ? -1 : real(path, flags, mode); }
int openat(int at_fd, const char *path, int flags, ...) { MODE(flags) REAL(openat); return fails("open", path) ? -1 : real(at_fd, path, flags, mode); }
ssize_t read(int fd, void *to, size_t size) { REAL(read); return fails_fd("read", fd) ? -1 : real(fd, to, size); }
ssize_t pread64(int fd, void *to, size_t size, off64_t from) { REAL(pread64); return fails_fd("read", fd) ? -1 : real(fd, to, size, from); }
ssize_t write(int fd, const void *from, size_t size) { REAL(write); return fails_fd("write", fd) ? -1 : real(fd, from, size); }
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t to) { REAL(pwrite64); return fails_fd("write", fd) ? -1 : real(fd, from, size, to); }
int fsync(int fd) { REAL(fsync); return fails_fd("fsync", fd) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); return fails_fd("truncate", fd) ? -1 : real(fd, size); }
int rename(const char *from, const char *to) { REAL(rename); return fails("rename", to) ? -1 : real(from, to); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails("mkdir", path) ? -1 : real(path, mode); }
int unlink(const char *path) { REAL(unlink); return fails("unlink", path) ? -1 : real(path); }

/* Stands between a process and its C library (LD_PRELOAD), for the calls that change files below some folders.
 *
 * It counts them; it can let one fail, end the process at one, and write all of them to a log from which `power.py`
 * builds what a loss of power would leave. Nothing happens until `calls_arm` was called, which `calls.py` does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROOTS 4
#define PATH 4096

static char roots[ROOTS][PATH];
static int armed, log_file = -1, error_number;
static long count, fail_at, kill_at;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* Watch calls below the folders in `folders` (one per line). The call number `fails` returns `error`; before the call
 * number `kills` the process is killed (0: none). `log` is a file for all calls, or empty. */
void calls_arm(const char *folders, long fails, int error, long kills, const char *log) {
    int at = 0;
    while (*folders && at < ROOTS) {
        size_t length = strcspn(folders, "\n");
        memcpy(roots[at], folders, length < PATH ? length : PATH - 1);
        at++;
        folders += length + (folders[length] == '\n');
    }
    fail_at = fails, error_number = error, kill_at = kills, count = 0;
    if (*log) log_file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    armed = 1;
}

long calls_count(void) { return count; }

static int below(const char *path) {
    if (!armed || !path) return 0;
    char whole[2 * PATH];
    if (path[0] != '/') {
        if (!getcwd(whole, PATH)) return 0;
        snprintf(whole + strlen(whole), PATH, "/%s", path);
        path = whole;
    }
    for (int at = 0; at < ROOTS && roots[at][0]; at++) {
        size_t length = strlen(roots[at]);
        if (!strncmp(path, roots[at], length) && (path[length] == '/' || !path[length])) return 1;
    }
    return 0;
}

static int file_below(int file) {
    if (!armed || file < 0) return 0;
    char link[64], path[PATH];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

/* Count a call. Returns whether it has to fail. */
static int counted(void) {
    long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (number == kill_at) syscall(SYS_kill, getpid(), SIGKILL);
    if (number != fail_at) return 0;
    errno = error_number;
    return 1;
}

static uint64_t inode(int file) {
    struct stat found;
    return fstat(file, &found) ? 0 : (uint64_t)found.st_ino;
}

/* One record: kind, inode, offset, lengths of two texts or data, and these. */
static void record(char kind, uint64_t node, int64_t offset, const void *first, size_t one, const void *second,
                   size_t two) {
    if (log_file < 0) return;
    int kept = errno;
    uint64_t head[5] = {(uint64_t)kind, node, (uint64_t)offset, one, two};
    pthread_mutex_lock(&mutex);
    syscall(SYS_write, log_file, head, sizeof head);
    if (one) syscall(SYS_write, log_file, first, one);
    if (two) syscall(SYS_write, log_file, second, two);
    pthread_mutex_unlock(&mutex);
    errno = kept;
}

static int opened(const char *path, int flags, mode_t mode, int folder) {
    int changes = (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && below(path);
    struct stat before;
    int existed = changes && !fstatat(folder, path, &before, AT_SYMLINK_NOFOLLOW);
    if (changes && counted()) return -1;
    int file = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (changes && file >= 0) {
        if (!existed) record('o', inode(file), 0, path, strlen(path), NULL, 0);
        else if (flags & O_TRUNC) record('a', inode(file), 0, NULL, 0, NULL, 0);
    }
    return file;
}

#define MODE                                                                                                           \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }

int open(const char *path, int flags, ...) { MODE return opened(path, flags, mode, AT_FDCWD); }
int open64(const char *path, int flags, ...) { MODE return opened(path, flags | O_LARGEFILE, mode, AT_FDCWD); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(path, flags, mode, folder); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(path, flags, mode, folder); }

ssize_t write(int file, const void *data, size_t size) {
    int watched = file_below(file);
    if (watched && counted()) return -1;
    ssize_t done = syscall(SYS_write, file, data, size);
    if (watched && done > 0)
        record('w', inode(file), syscall(SYS_lseek, file, 0, SEEK_CUR) - done, data, (size_t)done, NULL, 0);
    return done;
}

static ssize_t placed(int file, const void *data, size_t size, off_t offset) {
    int watched = file_below(file);
    if (watched && counted()) return -1;
    ssize_t done = syscall(SYS_pwrite64, file, data, size, offset);
    if (watched && done > 0) record('w', inode(file), offset, data, (size_t)done, NULL, 0);
    return done;
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) { return placed(file, data, size, offset); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) { return placed(file, data, size, offset); }

static int flushed(int file, long call) {
    int watched = file_below(file);
    if (watched && counted()) return -1;
    int done = (int)syscall(call, file);
    if (watched && !done) {
        char link[64], path[PATH];
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        ssize_t length = readlink(link, path, PATH);
        record('s', inode(file), 0, path, length < 0 ? 0 : (size_t)length, NULL, 0);
    }
    return done;
}

int fsync(int file) { return flushed(file, SYS_fsync); }
int fdatasync(int file) { return flushed(file, SYS_fdatasync); }

static int sized(int file, off_t size) {
    int watched = file_below(file);
    if (watched && counted()) return -1;
    int done = (int)syscall(SYS_ftruncate, file, size);
    if (watched && !done) record('a', inode(file), size, NULL, 0, NULL, 0);
    return done;
}

int ftruncate(int file, off_t size) { return sized(file, size); }
int ftruncate64(int file, off64_t size) { return sized(file, size); }

static int reserved(int file, off_t offset, off_t size) {
    int watched = file_below(file);
    if (watched && counted()) return error_number; /* this one returns its error */
    int done = syscall(SYS_fallocate, file, 0, offset, size) ? errno : 0;
    if (watched && !done) record('a', inode(file), offset + size, NULL, 0, NULL, 0);
    return done;
}

int posix_fallocate(int file, off_t offset, off_t size) { return reserved(file, offset, size); }
int posix_fallocate64(int file, off64_t offset, off64_t size) { return reserved(file, offset, size); }

int rename(const char *from, const char *to) {
    int watched = below(to);
    if (watched && counted()) return -1;
    int done = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    if (watched && !done) record('r', 0, 0, from, strlen(from), to, strlen(to));
    return done;
}

int mkdir(const char *path, mode_t mode) {
    int watched = below(path);
    if (watched && counted()) return -1;
    int done = (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    if (watched && !done) record('m', 0, 0, path, strlen(path), NULL, 0);
    return done;
}

int unlink(const char *path) {
    int watched = below(path), done = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (watched && !done) record('u', 0, 0, path, strlen(path), NULL, 0);
    return done;
}

int rmdir(const char *path) {
    int watched = below(path), done = (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
    if (watched && !done) record('u', 0, 0, path, strlen(path), NULL, 0);
    return done;
}

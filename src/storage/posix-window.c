/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The window of open descriptors, by which a chain of thousands of files works in a process that
 * may have a few hundred descriptors.
 *
 * Files that are only read get at most three quarters of the descriptors that the process may have.
 * When one more is opened, the descriptor of a file that was not used lately is shut; it is opened
 * again, by the file's name, when somebody wants its bytes. Only regular files that are open for
 * reading and have nothing to flush are shut, and only while their name leads to them. Writers,
 * block devices and files that somebody else opened for us keep their descriptors.
 *
 * Shutting must lose neither the lock bytes nor the certainty of which file it was. Before a file's
 * first descriptor is closed, one page of it is mapped without any access. The mapping keeps the
 * open file description and with it the lock bytes, so other processes see no difference. It keeps
 * the inode too, so no other file can get its number meanwhile: where the name leads to the same
 * device and inode, it leads to the same file, and else the read fails. Later descriptors of the
 * file hold no locks. A change of the lock bytes first moves them to the present descriptor
 * (posix_settle in posix-lock.c).
 *
 * Everybody counts himself into one of the file's counters while he uses the descriptor
 * (posix_begin). To shut it, a thread takes the number away first (POSIX_BUSY) and then looks at
 * the counters: whoever counted before is seen, and whoever counts later sees that the number is
 * gone and waits. If somebody is counted the number is put back and another file is tried; nobody
 * ever waits for a user. No lock is held over a system call.
 *
 * A child process has none of these mappings. It has copies of the descriptors that were open when
 * it was made, and while it lives without calling exec these keep the lock bytes. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "storage/posix.h"

/* So many descriptors are left alone, whatever the limit: closing them would gain nothing. */
#define WINDOW_MIN 16

struct window_list {
    struct posix_link ends; /* next: the first file, prev: the last */
    size_t n;
};

static struct window_list open_files = {.ends = {&open_files.ends, &open_files.ends}};
static struct window_list shut_files = {.ends = {&shut_files.ends, &shut_files.ends}};
static pthread_mutex_t window_lock = PTHREAD_MUTEX_INITIALIZER; /* of both, and changes of fd */
static pthread_cond_t settled = PTHREAD_COND_INITIALIZER;       /* a file is no longer busy */

static struct posix_file *file_of_link(struct posix_link *link)
{
    return (struct posix_file *)((char *)link - offsetof(struct posix_file, link));
}

static void list_add(struct window_list *list, struct posix_file *p)
{
    p->list = list;
    p->link = (struct posix_link){.prev = list->ends.prev, .next = &list->ends};
    list->ends.prev->next = &p->link;
    list->ends.prev = &p->link;
    list->n++;
}

static void list_remove(struct posix_file *p)
{
    if (!p->list)
        return;
    p->link.prev->next = p->link.next;
    p->link.next->prev = p->link.prev;
    p->list->n--;
    p->list = NULL;
}

/* The descriptor or POSIX_SHUT; window_lock is held, and released while another thread is at it. */
static int settled_fd(struct posix_file *p)
{
    while (p->fd == POSIX_BUSY)
        pthread_cond_wait(&settled, &window_lock);
    return p->fd;
}

/* ------------------------------------------------------------------ shut a descriptor */

static bool name_leads_to(const char *name, const struct posix_file *p)
{
    struct stat st;
    if (stat(name, &st) || !S_ISREG(st.st_mode))
        return false;
    return st.st_dev == p->base.id.dev && st.st_ino == p->base.id.ino;
}

static const char *name_of(const struct posix_file *p)
{
    return p->home ? p->home : p->base.path;
}

/* See to it that name_of() will lead to the file, also when the process changes its directory. The
 * kernel tells the name that an open file has now, so it is found although it was renamed. */
static bool find_name(struct posix_file *p, int fd)
{
    char link[64], real[PATH_MAX + 1];
    if (name_of(p)[0] == '/' && name_leads_to(name_of(p), p))
        return true;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, real, PATH_MAX);
    if (n >= 0)
        real[n] = 0;
    else if (!realpath(p->base.path, real))
        return false;
    if (real[0] != '/' || !name_leads_to(real, p))
        return false;
    free(p->home);
    p->home = strdup(real);
    return p->home;
}

/* The mapping is not for children: they would hold the lock bytes after we have let go of them. */
static bool keep_description(struct posix_file *p, int fd)
{
    if (p->mapping)
        return true;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *m = mmap(NULL, page, PROT_NONE, MAP_PRIVATE, fd, 0);
    if (m == MAP_FAILED)
        return false;
    p->mapping = m;
    if (madvise(m, page, MADV_DONTFORK) == 0)
        return true;
    posix_unmap(p);
    return false;
}

void posix_unmap(struct posix_file *p)
{
    if (p->mapping)
        munmap(p->mapping, (size_t)sysconf(_SC_PAGESIZE));
    p->mapping = NULL;
}

static bool in_use(struct posix_file *p)
{
    for (unsigned i = 0; i < DR_STRIPES; i++)
        if (atomic_load(&p->users[i].n))
            return true;
    return false;
}

/* The open file that has been used least lately and is in nobody's use: it is busy from now on, and
 * counts as shut. NULL: there is none. window_lock is held. */
static struct posix_file *choose(int *fd)
{
    for (size_t tries = 2 * open_files.n; tries > 0; tries--) {
        struct posix_file *p = file_of_link(open_files.ends.next);
        list_remove(p);
        list_add(&open_files, p);
        if (atomic_exchange(&p->recent, false) || p->base.dirty)
            continue;
        *fd = p->fd;
        atomic_store(&p->fd, POSIX_BUSY);
        if (!in_use(p)) {
            list_remove(p);
            list_add(&shut_files, p);
            return p;
        }
        atomic_store(&p->fd, *fd);
    }
    return NULL;
}

/* One file leaves the open ones: 1 = its descriptor is free; 0 = it cannot be shut, and is not
 * tried again; -1 = there is none to try. */
static int shut_one(void)
{
    int fd = -1;
    pthread_mutex_lock(&window_lock);
    struct posix_file *p = choose(&fd);
    pthread_mutex_unlock(&window_lock);
    if (!p)
        return -1;
    bool shut = find_name(p, fd) && keep_description(p, fd);
    if (shut)
        close(fd);
    pthread_mutex_lock(&window_lock);
    atomic_store(&p->fd, shut ? POSIX_SHUT : fd);
    if (!shut)
        list_remove(p);
    pthread_cond_broadcast(&settled);
    pthread_mutex_unlock(&window_lock);
    return shut;
}

bool posix_window_make_room(void)
{
    int r;
    do
        r = shut_one();
    while (r == 0);
    return r > 0;
}

static size_t n_open(void)
{
    DR_LOCK_SCOPE(&window_lock);
    return open_files.n;
}

/* Three quarters of what the process may have. The rest is for writers, and for the program that
 * uses the library. */
static void shrink(void)
{
    struct rlimit limit;
    size_t n = n_open();
    if (n <= WINDOW_MIN || getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return;
    while (n > WINDOW_MIN && n > limit.rlim_cur / 4 * 3 && shut_one() >= 0)
        n = n_open();
}

/* ------------------------------------------------------------------ open it again */

/* A descriptor of the same file, or -ESTALE if the name leads elsewhere. Look before opening:
 * merely opening some devices does something. */
static int open_same(struct posix_file *p, bool *direct)
{
    const char *name = name_of(p);
    struct stat st;
    if (stat(name, &st))
        return errno == ENOENT || errno == ENOTDIR || errno == ELOOP ? -ESTALE : -errno;
    if (st.st_dev != p->base.id.dev || st.st_ino != p->base.id.ino)
        return -ESTALE;
    int fd = posix_open_fd(name, O_RDONLY, 0, direct);
    if (fd < 0)
        return fd == -ENOENT || fd == -ENOTDIR || fd == -ELOOP ? -ESTALE : fd;
    if (fstat(fd, &st) == 0 && st.st_dev == p->base.id.dev && st.st_ino == p->base.id.ino)
        return fd;
    close(fd);
    return -ESTALE;
}

static int open_again(struct posix_file *p)
{
    bool direct = p->direct;
    int fd = open_same(p, &direct);
    if (fd >= 0 && !direct)
        p->direct = false;
    if (fd >= 0 && p->random)
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    return fd;
}

int posix_window_open(struct posix_file *p)
{
    pthread_mutex_lock(&window_lock);
    int fd = settled_fd(p);
    bool ours = fd == POSIX_SHUT;
    if (ours)
        atomic_store(&p->fd, POSIX_BUSY);
    pthread_mutex_unlock(&window_lock);
    if (!ours)
        return fd;
    fd = open_again(p);
    pthread_mutex_lock(&window_lock);
    atomic_store(&p->fd, fd < 0 ? POSIX_SHUT : fd);
    atomic_store(&p->recent, true);
    if (fd >= 0 && p->list) {
        list_remove(p);
        list_add(&open_files, p);
    }
    pthread_cond_broadcast(&settled);
    pthread_mutex_unlock(&window_lock);
    if (fd >= 0)
        shrink();
    return fd;
}

const char *posix_reason(struct dr_file *f, int r)
{
    if (posix_file(f)->fd >= 0)
        return NULL;
    if (r == -ESTALE)
        return "its descriptor was closed to keep within the limit of open files, and the name no "
               "longer leads to the file: move it back, or raise the limit (ulimit -n)";
    if (r == -EMFILE || r == -ENFILE)
        return "too many open files: raise the limit (ulimit -n)";
    if (r == -EACCES || r == -EPERM)
        return "its descriptor was closed to keep within the limit of open files, and it may not "
               "be "
               "opened again: change its mode, or raise the limit (ulimit -n)";
    return NULL;
}

/* ------------------------------------------------------------------ come and go */

void posix_window_enter(struct posix_file *p)
{
    if (!p->by_name || p->base.block_device)
        return;
    atomic_store(&p->recent, true);
    pthread_mutex_lock(&window_lock);
    if (!p->list)
        list_add(&open_files, p);
    pthread_mutex_unlock(&window_lock);
    shrink();
}

void posix_window_leave(struct posix_file *p)
{
    DR_LOCK_SCOPE(&window_lock);
    settled_fd(p);
    list_remove(p);
}

/* ------------------------------------------------------------------ names that go */

static bool try_pin(struct dr_file *f)
{
    unsigned pins = f->pins;
    while (pins && !atomic_compare_exchange_weak(&f->pins, &pins, pins + 1))
        ;
    return pins;
}

static struct posix_file *find_in(struct window_list *list, const struct stat *st)
{
    for (struct posix_link *l = list->ends.next; l != &list->ends; l = l->next) {
        struct posix_file *p = file_of_link(l);
        if (p->base.id.ino == st->st_ino && p->base.id.dev == st->st_dev && try_pin(&p->base))
            return p;
    }
    return NULL;
}

/* Pinned, or NULL. An object that nobody pins any more is about to be freed. */
static struct posix_file *find_file(const struct stat *st)
{
    DR_LOCK_SCOPE(&window_lock);
    struct posix_file *p = find_in(&shut_files, st);
    return p ? p : find_in(&open_files, st);
}

static int keep_open(struct posix_file *p, struct dr_error *err)
{
    POSIX_USE(use, p);
    if (use.fd < 0)
        return dr_fail_errno(err, -use.fd, "%s: is in use, and cannot be opened again",
                             p->base.path);
    posix_window_leave(p);
    return 0;
}

int posix_window_keep(const char *path, struct dr_error *err)
{
    struct stat st;
    struct posix_file *p;
    int r = 0;
    if (stat(path, &st) || !S_ISREG(st.st_mode))
        return 0;
    while (r == 0 && (p = find_file(&st))) {
        r = keep_open(p, err);
        dr_file_unpin(&p->base);
    }
    return r;
}

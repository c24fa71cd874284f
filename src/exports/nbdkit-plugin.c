/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbdkit-drover-plugin: disks as NBD exports. nbdkit does the protocol, sockets, TLS and filters
 * and calls the functions of the table at the end; disk-list.c reads the parameters and opens the
 * disks.
 *
 * shown.c knows which export shows which disk. All connections to an export share one open disk, so
 * what one of them flushed is durable for all of them, and each sees what the others wrote.
 * Requests come from many threads at once and go straight to the library. Disks are opened after
 * nbdkit has gone into the background, because locks and threads belong to the process that serves;
 * before that they are opened once to see that they can be, so that failures end nbdkit while
 * somebody looks. */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "exports/disk-list.h"
#include "exports/clients.h"
#include "exports/hang-up.h"
#include "exports/outlive.h"
#include "exports/shown.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static struct disk_list list = DISK_LIST_INIT;

/* Tell nbdkit, which prints it as it is. Clients, and strangers who made images, choose names: what
 * could steer a terminal or look like a line of its own in a log becomes '?'. */
static void say(const char *what, const char *name, const char *behind)
{
    char text[sizeof(((struct dr_error *)0)->text) + 64];
    snprintf(text, sizeof(text), "%s%s%s", what, name, behind);
    for (char *c = text; *c; c++) {
        bool c1 = c[0] == '\xc2' && (unsigned char)c[1] >= 0x80 && (unsigned char)c[1] < 0xa0;
        if (c1)
            *c++ = '?';
        if (c1 || (unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    }
    nbdkit_error("%s", text);
}

/* Tell nbdkit of a failure, in the words of the library. */
static int failed(int r, const struct dr_error *err)
{
    say(err->text[0] ? err->text : strerrordesc_np(-r), "", "");
    nbdkit_set_error(-r);
    errno = -r;
    return -1;
}

/* ------------------------------------------------------------------ the life of the server */

static int plugin_config(const char *key, const char *value)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = disk_list_config(&list, key, value, &err);
    return r < 0 ? failed(r, &err) : 0;
}

static int plugin_config_complete(void)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = disk_list_complete(&list, &err);
    return r < 0 ? failed(r, &err) : 0;
}

static int plugin_get_ready(void)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = disk_list_try(&list, &err);
    return r < 0 ? failed(r, &err) : 0;
}

static void quit(void *user)
{
    (void)user;
    nbdkit_shutdown();
    hang_up_now(); /* no signal comes */
}

/* Clients of the control socket change the exports by these. */

static atomic_bool stopped; /* clients that come are sent away */

static int control_add(void *user, const char *id, const char *name, struct dr_disk *disk,
                       bool writable, struct dr_error *err)
{
    return shown_add(user, id, name, disk, writable, err);
}

static int control_remove(void *user, const char *id, bool hard, struct dr_error *err)
{
    return shown_remove(user, id, hard, clients_hang_up_on, err);
}

static void control_stop(void *user)
{
    (void)user;
    atomic_store(&stopped, true);
    clients_hang_up();
}

static int control_start(void *user, const char *path, const char *port, struct dr_error *err)
{
    (void)user;
    if (!clients_listen_at(path, port))
        return dr_fail(err, EADDRNOTAVAIL,
                       "%s%s: the server listens where it did when it began, and nowhere else",
                       path ? path : "port ", path ? "" : port);
    atomic_store(&stopped, false);
    return 0;
}

static const struct dr_live_exports control_exports = {
    .add = control_add,
    .remove = control_remove,
    .stop = control_stop,
    .start = control_start,
};

static const struct dr_live_options control = {
    .quit = quit, .user = &list, .exports = &control_exports};

static void report_close(void *user, const struct dr_error *err)
{
    bool *well = user;
    if (well)
        *well = false;
    say(err->text, "", "");
}

/* Told to end, but there are clients that do not take their replies. */
static void end_without_clients(void)
{
    bool well = true;
    nbdkit_error("clients do not read the replies to their requests: ending without them");
    disk_list_close(&list, report_close, &well);
    _exit(well ? EXIT_SUCCESS : EXIT_FAILURE);
}

/* A reply to a request that waits for space would be waited for. */
static void end_waiting(void)
{
    clients_end();
    disk_list_end_waiting(&list);
}

static void report_waiting(void *user, const char *name, const char *text)
{
    (void)user;
    say(name, ": its clients' writes wait: ", text);
}

static int plugin_after_fork(void)
{
    struct dr_error err = DR_ERROR_INIT;
    list.waits = report_waiting;
    outlive_clients_that_vanish();
    int r = hang_up_on_signals(end_waiting, end_without_clients, &err);
    if (r == 0)
        r = disk_list_open(&list, &control, &err);
    return r < 0 ? failed(r, &err) : 0;
}

/* No connection is left. */
static void plugin_cleanup(void)
{
    hang_up_stop();
    disk_list_close(&list, report_close, NULL);
}

static void plugin_unload(void)
{
    hang_up_stop();
    disk_list_close(&list, report_close, NULL);
    disk_list_free(&list);
}

static void plugin_dump(void)
{
    struct dr_format_info info;
    printf("drover_version=%s\n", dr_version());
    printf("drover_formats=");
    for (size_t i = 0; dr_format_list(i, &info) == 0; i++)
        printf("%s%s", i ? "," : "", info.name);
    printf("\n");
}

/* ------------------------------------------------------------------ exports */

static int add_name(void *exports, const char *name)
{
    return nbdkit_add_export(exports, name, NULL);
}

static int plugin_list_exports(int readonly, int is_tls, struct nbdkit_exports *exports)
{
    (void)readonly;
    (void)is_tls;
    return shown_list(&list, add_name, exports);
}

static int take_first(void *first, const char *name)
{
    *(const char **)first = nbdkit_strdup_intern(name);
    return 1;
}

static const char *plugin_default_export(int readonly, int is_tls)
{
    const char *first = "";
    (void)readonly;
    (void)is_tls;
    shown_list(&list, take_first, &first);
    return first;
}

static int plugin_preconnect(int readonly)
{
    (void)readonly;
    return atomic_load(&stopped) ? -1 : 0;
}

static void *plugin_open(int readonly)
{
    struct dr_error err = DR_ERROR_INIT;
    struct connection *c;
    const char *name = nbdkit_export_name();
    int socket = clients_socket();
    int r = shown_connect(&list, name ? name : "", readonly, socket, &c, &err);
    if (r == 0)
        return c;
    clients_let_go(socket);
    failed(r, &err);
    return NULL;
}

static void plugin_close(void *handle)
{
    clients_let_go(shown_disconnect(&list, handle));
}

/* Every use of a connection's disk, until end(). NULL: it was removed, or the server has given up
 * its clients. */
static struct dr_disk *begin(struct connection *c)
{
    if (!hang_up_begin_request())
        return NULL;
    struct dr_disk *disk = shown_begin(&list, c);
    if (!disk)
        hang_up_end_request();
    return disk;
}

static void end(struct connection *c)
{
    shown_end(&list, c);
    hang_up_end_request();
}

static int ended(void)
{
    nbdkit_set_error(ESHUTDOWN);
    errno = ESHUTDOWN;
    return -1;
}

/* Unless one was given: the format and the depth; paths are none of a client's business. */
static const char *plugin_export_description(void *handle)
{
    if (list.description)
        return nbdkit_strdup_intern(list.description);
    struct dr_disk *disk = begin(handle);
    if (!disk)
        return NULL;
    size_t n = dr_chain_length(disk);
    const char *text =
        n == 1 ? nbdkit_printf_intern("%s", dr_image_format(disk, 0))
               : nbdkit_printf_intern("%s, a chain of %zu images", dr_image_format(disk, 0), n);
    end(handle);
    return text;
}

static int64_t plugin_get_size(void *handle)
{
    struct dr_disk *disk = begin(handle);
    if (!disk)
        return ended();
    int64_t size = (int64_t)dr_size(disk); /* no disk has more than INT64_MAX bytes */
    end(handle);
    return size;
}

static int plugin_can_write(void *handle)
{
    if (!begin(handle))
        return ended();
    int can = shown_writable(handle);
    end(handle);
    return can;
}

static int plugin_yes(void *disk)
{
    (void)disk;
    return 1;
}

static int plugin_can_fua(void *disk)
{
    (void)disk;
    return NBDKIT_FUA_NATIVE;
}

/* nbdkit reads and drops the bytes: that loads the tables and the host's page cache, too. */
static int plugin_can_cache(void *disk)
{
    (void)disk;
    return NBDKIT_CACHE_EMULATE;
}

/* nbdkit takes no data longer than 64 MiB in one request, so a client had better know. */
static int plugin_block_size(void *handle, uint32_t *minimum, uint32_t *preferred,
                             uint32_t *maximum)
{
    struct dr_disk *disk = begin(handle);
    if (!disk)
        return ended();
    *minimum = 1;
    *preferred = dr_block_size(disk);
    *maximum = 64 << 20;
    end(handle);
    return 0;
}

/* ------------------------------------------------------------------ data
 *
 * Texts of failures are long, and only their beginning is cleared for each request. */

static unsigned io_flags(uint32_t flags)
{
    return (flags & NBDKIT_FLAG_FUA ? DR_FUA : 0) | (flags & NBDKIT_FLAG_FAST_ZERO ? DR_FAST : 0) |
           (flags & NBDKIT_FLAG_MAY_TRIM ? DR_MAY_UNMAP : 0);
}

static int plugin_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
    struct dr_error err;
    dr_error_reset(&err);
    (void)flags;
    struct dr_disk *disk = begin(handle);
    if (!disk)
        return ended();
    int r = dr_pread(disk, buf, offset, count, &err);
    end(handle);
    return r < 0 ? failed(r, &err) : 0;
}

/* What changes the disk may have to wait until there is space for it. */
struct change {
    struct dr_disk *disk;
    enum { WRITE, ZERO, TRIM, FLUSH } kind;
    const void *buf;
    uint32_t count, flags;
    uint64_t offset;
};

static int make_change(void *user, struct dr_error *err)
{
    const struct change *c = user;
    int r;
    switch (c->kind) {
    case WRITE:
        return dr_pwrite(c->disk, c->buf, c->offset, c->count, io_flags(c->flags), err);
    case ZERO:
        return dr_zero(c->disk, c->offset, c->count, io_flags(c->flags), err);
    case TRIM:
        r = dr_discard(c->disk, c->offset, c->count, err);
        return r == 0 && (c->flags & NBDKIT_FLAG_FUA) ? dr_flush(c->disk, err) : r;
    default:
        return dr_flush(c->disk, err);
    }
}

/* That zeros would be slow is an answer, not a failure, and not worth a line in a log. */
static int change(void *handle, struct change *c)
{
    struct dr_error err;
    dr_error_reset(&err);
    c->disk = begin(handle);
    if (!c->disk)
        return ended();
    struct dr_stall *stall = shown_stall(handle);
    int r = stall ? dr_stall_run(stall, make_change, c, &err) : make_change(c, &err);
    end(handle);
    if (r == -ENOTSUP && c->kind == ZERO && (c->flags & NBDKIT_FLAG_FAST_ZERO)) {
        nbdkit_set_error(ENOTSUP);
        errno = ENOTSUP;
        return -1;
    }
    return r < 0 ? failed(r, &err) : 0;
}

static int plugin_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset,
                         uint32_t flags)
{
    struct change c = {.kind = WRITE, .buf = buf, .count = count, .offset = offset, .flags = flags};
    return change(handle, &c);
}

static int plugin_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
    struct change c = {.kind = ZERO, .count = count, .offset = offset, .flags = flags};
    return change(handle, &c);
}

static int plugin_trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
    struct change c = {.kind = TRIM, .count = count, .offset = offset, .flags = flags};
    return change(handle, &c);
}

static int plugin_flush(void *handle, uint32_t flags)
{
    struct change c = {.kind = FLUSH, .flags = flags};
    return change(handle, &c);
}

/* ------------------------------------------------------------------ extents */

/* A client asks again from where an answer ends; what lies in many small pieces must not keep a
 * thread busy for 4 GiB. */
#define MOST_PIECES 16384

static uint32_t extent_type(const struct dr_extent_status *status)
{
    return (status->flags & DR_EXTENT_DATA ? 0 : NBDKIT_EXTENT_HOLE) |
           (status->flags & DR_EXTENT_ZERO ? NBDKIT_EXTENT_ZERO : 0);
}

/* The library's pieces also end where another image or place begins; nbdkit joins what is alike to
 * its client, which with REQ_ONE wants the first extent only. */
static int add_extents(void *disk, uint32_t count, uint64_t offset, uint32_t flags,
                       struct nbdkit_extents *extents)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t pos = offset, end = offset + count;
    uint32_t first = 0;
    for (unsigned n = 0; pos < end && n < MOST_PIECES; n++) {
        struct dr_extent_status status;
        int r = dr_block_status(disk, pos, end - pos, &status, &err);
        if (r < 0 && n > 0)
            return 0; /* damage is told when a client asks for what lies there */
        if (r < 0)
            return failed(r, &err);
        if (n == 0)
            first = extent_type(&status);
        if ((flags & NBDKIT_FLAG_REQ_ONE) && extent_type(&status) != first)
            return 0;
        if (nbdkit_add_extent(extents, pos, status.len, extent_type(&status)) < 0)
            return -1;
        pos += status.len;
    }
    return 0;
}

static int plugin_extents(void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                          struct nbdkit_extents *extents)
{
    struct dr_disk *disk = begin(handle);
    if (!disk)
        return ended();
    int r = add_extents(disk, count, offset, flags, extents);
    end(handle);
    return r;
}

/* ------------------------------------------------------------------ the table */

static struct nbdkit_plugin plugin = {
    .name = "drover",
    .longname = "Drover: copy-on-write disk images",
    .version = DR_VERSION,
    .description = "Serve raw, VMDK, add-cow and qcow2 disks with their backing chains, and disks "
                   "inside VMA archives.",
    .magic_config_key = "disk",
    .config_help = DISK_LIST_HELP,
    .errno_is_preserved = 1,
    .config = plugin_config,
    .config_complete = plugin_config_complete,
    .get_ready = plugin_get_ready,
    .after_fork = plugin_after_fork,
    .cleanup = plugin_cleanup,
    .unload = plugin_unload,
    .dump_plugin = plugin_dump,
    .preconnect = plugin_preconnect,
    .list_exports = plugin_list_exports,
    .default_export = plugin_default_export,
    .export_description = plugin_export_description,
    .open = plugin_open,
    .close = plugin_close,
    .get_size = plugin_get_size,
    .block_size = plugin_block_size,
    .can_write = plugin_can_write,
    .can_flush = plugin_yes,
    .can_trim = plugin_yes,
    .can_zero = plugin_yes,
    .can_fast_zero = plugin_yes,
    .can_extents = plugin_yes,
    .can_multi_conn = plugin_yes,
    .can_fua = plugin_can_fua,
    .can_cache = plugin_can_cache,
    .pread = plugin_pread,
    .pwrite = plugin_pwrite,
    .zero = plugin_zero,
    .trim = plugin_trim,
    .flush = plugin_flush,
    .extents = plugin_extents,
};

/* nbdkit's macro defines it without a declaration, which clang warns of. */
struct nbdkit_plugin *plugin_init(void);
NBDKIT_REGISTER_PLUGIN(plugin)

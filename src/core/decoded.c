/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compressed units that were read lately, decoded: one cache for the process.
 *
 * A reader asks for some bytes of a unit. The first one decodes the whole unit and leaves it here;
 * who asks for the same unit meanwhile waits for that, and later readers copy from memory. Units
 * go, the one not used for the longest time first, when all of them take more than the limit.
 *
 * A reader that wants a whole unit once has it decoded straight into its buffer, and nothing is
 * kept.
 *
 * A reader that goes from one unit to the next in the file reads the coded bytes ahead, in windows
 * of WINDOW bytes, so that small units cost few system calls.
 *
 * A unit is known by its image and its place in the file. Readers hold the place (an epoch) while
 * they are here, and dr_decoded_forget is called before a place is used for something else. Bytes
 * that a window has read ahead may be written meanwhile, so a window is kept only if nothing was
 * forgotten for its image since before it was read.
 */
#include "core/internal.h"
#include "base/bytes.h"

#define BUCKETS   1024u
#define WINDOW    (256u << 10)
#define N_WINDOWS 8u

enum unit_state { UNIT_DECODING, UNIT_READY, UNIT_FAILED };

struct unit {
    const struct dr_image *image;
    const struct dr_file *file;
    uint64_t host;
    uint32_t host_len, len;
    enum unit_state state;
    unsigned users; /* threads that read it or wait for it */
    bool in_table;  /* else the last user frees it */
    struct unit *next_in_bucket;
    struct unit *newer, *older; /* by last use */
    uint8_t bytes[];
};

struct window {
    const struct dr_image *image;
    const struct dr_file *file;
    uint64_t host, len;
    unsigned users;
    bool to_end; /* the file ends with it */
    uint8_t bytes[WINDOW];
};

static struct {
    pthread_mutex_t lock; /* a leaf; not held while anything is read or decoded */
    pthread_cond_t decoded;
    struct unit *buckets[BUCKETS];
    struct unit *newest, *oldest;
    size_t bytes;
    struct window *windows[N_WINDOWS];
    unsigned next_window;
} cache = {.lock = PTHREAD_MUTEX_INITIALIZER, .decoded = PTHREAD_COND_INITIALIZER};

/* ------------------------------------------------------------------ the table; lock held */

static struct unit **bucket_of(const struct dr_image *image, const struct dr_file *file,
                               uint64_t host)
{
    uint64_t h = host ^ (uintptr_t)image >> 4 ^ (uint64_t)(uintptr_t)file << 20;
    return &cache.buckets[(h * 0x9e3779b97f4a7c15ull) >> 54];
}

static struct unit *unit_find(const struct dr_image *image, const struct dr_extent *ext)
{
    struct unit *u = *bucket_of(image, ext->file, ext->host);
    while (u && (u->image != image || u->file != ext->file || u->host != ext->host ||
                 u->len != ext->unit))
        u = u->next_in_bucket;
    return u;
}

static void age_remove(struct unit *u)
{
    *(u->newer ? &u->newer->older : &cache.newest) = u->older;
    *(u->older ? &u->older->newer : &cache.oldest) = u->newer;
}

static void age_add(struct unit *u)
{
    u->newer = NULL;
    u->older = cache.newest;
    *(cache.newest ? &cache.newest->newer : &cache.oldest) = u;
    cache.newest = u;
}

static void unit_free_unused(struct unit *u)
{
    if (u->in_table || u->users > 0)
        return;
    cache.bytes -= sizeof(*u) + u->len;
    free(u);
}

/* Take a unit out of the table. Its present users go on with it. */
static void unit_remove(struct unit *u)
{
    struct unit **link = bucket_of(u->image, u->file, u->host);
    while (*link != u)
        link = &(*link)->next_in_bucket;
    *link = u->next_in_bucket;
    age_remove(u);
    u->in_table = false;
    unit_free_unused(u);
}

static void unit_leave(struct unit *u)
{
    u->users--;
    unit_free_unused(u);
}

static void evict(void)
{
    for (struct unit *u = cache.oldest, *newer; u; u = newer) {
        if (cache.bytes <= dr_cache_limit(DR_CACHE_DECODED))
            return;
        newer = u->newer;
        if (u->users == 0)
            unit_remove(u);
    }
}

/* A unit that the caller is going to decode. NULL: no memory. */
static struct unit *unit_add(const struct dr_image *image, const struct dr_extent *ext)
{
    struct unit *u = malloc(sizeof(*u) + ext->unit);
    if (!u)
        return NULL;
    *u = (struct unit){.image = image,
                       .file = ext->file,
                       .host = ext->host,
                       .host_len = ext->host_len,
                       .len = ext->unit,
                       .users = 1,
                       .in_table = true};
    struct unit **bucket = bucket_of(image, ext->file, ext->host);
    u->next_in_bucket = *bucket;
    *bucket = u;
    age_add(u);
    cache.bytes += sizeof(*u) + u->len;
    evict();
    return u;
}

/* ------------------------------------------------------------------ windows; lock held */

static void window_leave(struct window *w)
{
    if (w && --w->users == 0)
        free(w);
}

static bool window_covers(const struct window *w, const struct dr_image *image,
                          const struct dr_extent *ext)
{
    uint64_t end = w->host + w->len;
    return w->image == image && w->file == ext->file && ext->host >= w->host && ext->host < end &&
           (ext->host + ext->host_len <= end || w->to_end);
}

static struct window *window_find(const struct dr_image *image, const struct dr_extent *ext)
{
    for (unsigned i = 0; i < N_WINDOWS; i++) {
        struct window *w = cache.windows[i];
        if (w && window_covers(w, image, ext)) {
            w->users++;
            return w;
        }
    }
    return NULL;
}

static void window_keep(struct window *w)
{
    struct window **slot = &cache.windows[cache.next_window++ % N_WINDOWS];
    window_leave(*slot);
    *slot = w;
    w->users++;
}

static void windows_drop(const struct dr_image *image)
{
    for (unsigned i = 0; i < N_WINDOWS; i++)
        if (cache.windows[i] && cache.windows[i]->image == image) {
            window_leave(cache.windows[i]);
            cache.windows[i] = NULL;
        }
}

/* ------------------------------------------------------------------ reading and decoding, no lock
 */

/* Does the unit follow the one that was decoded last in this image? Units begin anywhere in the
 * sector after the last one's end. */
static bool is_next(struct dr_image *image, const struct dr_extent *ext)
{
    uint64_t last = atomic_exchange(&image->decoded_at, ext->host);
    uint64_t end = atomic_exchange(&image->decoded_end, ext->host + ext->host_len);
    return ext->host > last && ext->host <= dr_round_up(end, 512);
}

/* *window = coded bytes from ext->host on and further, or NULL: the unit must be read by itself.
 * The caller leaves it. */
static int window_get(struct dr_image *image, const struct dr_extent *ext, struct window **window,
                      struct dr_error *err)
{
    bool sequential = is_next(image, ext);
    pthread_mutex_lock(&cache.lock);
    struct window *w = window_find(image, ext);
    pthread_mutex_unlock(&cache.lock);
    *window = w;
    if (w || !sequential || ext->host_len > WINDOW / 2 || !(w = malloc(sizeof(*w))))
        return 0;
    size_t got;
    uint64_t gen = atomic_load(&image->decoded_gen);
    int r = dr_file_pread_short(ext->file, w->bytes, ext->host, WINDOW, &got, err);
    if (r < 0) {
        free(w);
        return r;
    }
    w->image = image;
    w->file = ext->file;
    w->host = ext->host;
    w->len = got;
    w->users = 1;
    w->to_end = got < WINDOW;
    *window = w;
    DR_LOCK_SCOPE(&cache.lock);
    if (atomic_load(&image->decoded_gen) == gen)
        window_keep(w);
    return 0;
}

/* host_len may be an upper bound at the end of the file: what is there must decode. */
static int read_and_decode(struct dr_image *image, const struct dr_extent *ext, uint8_t *plain,
                           struct dr_error *err)
{
    struct window *w;
    int r = window_get(image, ext, &w, err);
    if (r < 0)
        return r;
    if (w) {
        size_t len = (size_t)dr_min(ext->host_len, w->host + w->len - ext->host);
        r = image->fmt->decode(image, ext, w->bytes + (ext->host - w->host), len, plain, err);
        DR_LOCK_SCOPE(&cache.lock);
        window_leave(w);
        return r;
    }
    size_t got;
    CLEANUP_FREE uint8_t *coded = malloc(ext->host_len ? ext->host_len : 1);
    if (!coded)
        return dr_fail(err, ENOMEM, "%s: out of memory for a compressed unit", image->path);
    r = dr_file_pread_short(ext->file, coded, ext->host, ext->host_len, &got, err);
    return r < 0 ? r : image->fmt->decode(image, ext, coded, got, plain, err);
}

/* The unit, ready, with the caller as one of its users. A thread that waited for a unit that could
 * not be decoded tries for itself. */
static int unit_get(struct dr_image *image, const struct dr_extent *ext, struct unit **out,
                    struct dr_error *err)
{
    DR_LOCK_SCOPE(&cache.lock);
    struct unit *u;
    while ((u = unit_find(image, ext))) {
        u->users++;
        while (u->state == UNIT_DECODING)
            pthread_cond_wait(&cache.decoded, &cache.lock);
        if (u->state == UNIT_READY) {
            if (u->in_table) {
                age_remove(u);
                age_add(u);
            }
            *out = u;
            return 0;
        }
        unit_leave(u);
    }
    u = *out = unit_add(image, ext);
    if (!u)
        return dr_fail(err, ENOMEM, "%s: out of memory for a compressed unit", image->path);
    pthread_mutex_unlock(&cache.lock);
    int r = read_and_decode(image, ext, u->bytes, err);
    pthread_mutex_lock(&cache.lock);
    u->state = r < 0 ? UNIT_FAILED : UNIT_READY;
    pthread_cond_broadcast(&cache.decoded);
    if (r < 0) {
        if (u->in_table)
            unit_remove(u);
        unit_leave(u);
    }
    return r;
}

/* ------------------------------------------------------------------ for the core */

static bool is_known(const struct dr_image *image, const struct dr_extent *ext)
{
    DR_LOCK_SCOPE(&cache.lock);
    return unit_find(image, ext);
}

int dr_decoded_read(struct dr_image *image, const struct dr_extent *ext, uint8_t *buf, size_t len,
                    bool once, struct dr_error *err)
{
    struct unit *u;
    if (ext->inner > ext->unit || len > ext->unit - ext->inner)
        return dr_fail(err, EIO, "%s: a compressed unit of %u bytes does not hold %zu at %u",
                       image->path, ext->unit, len, ext->inner);
    if (!atomic_load(&image->has_decoded))
        atomic_store(&image->has_decoded, true);
    if (once && len == ext->unit && !is_known(image, ext))
        return read_and_decode(image, ext, buf, err);
    int r = unit_get(image, ext, &u, err);
    if (r < 0)
        return r;
    memcpy(buf, u->bytes + ext->inner, len);
    DR_LOCK_SCOPE(&cache.lock);
    unit_leave(u);
    return 0;
}

void dr_decoded_forget(struct dr_image *image, const struct dr_file *file, uint64_t host,
                       uint64_t len)
{
    atomic_fetch_add(&image->decoded_gen, 1);
    if (!atomic_load(&image->has_decoded))
        return;
    DR_LOCK_SCOPE(&cache.lock);
    windows_drop(image);
    for (struct unit *u = cache.newest, *older; u; u = older) {
        older = u->older;
        if (u->image == image && u->file == file && u->host < host + len &&
            host < u->host + u->host_len)
            unit_remove(u);
    }
}

void dr_decoded_close(const struct dr_image *image)
{
    if (!atomic_load(&image->has_decoded))
        return;
    DR_LOCK_SCOPE(&cache.lock);
    windows_drop(image);
    for (struct unit *u = cache.newest, *older; u; u = older) {
        older = u->older;
        if (u->image == image)
            unit_remove(u);
    }
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* zstd files with a seek table, the last frame, which others skip: independent frames that can be
 * decoded at random. The file of the plain bytes decodes whole frames and keeps a few. */
#include <xxhash.h>
#include <zstd.h>

#include "storage/source-codec.h"

#define TABLE_MAGIC  0x184d2a5eu
#define FOOTER_MAGIC 0x8f92eab1u
#define FRAME_HEAD   8u /* magic and length of a frame to be skipped */
#define FOOTER       9u /* number of frames, descriptor, magic */
#define HAS_SUMS     0x80u
#define RESERVED     0x7cu

/* Bounds before anything is allocated. Our own frames have up to 4 MiB; an extent is two of them,
 * so this is 30 TB of data. In memory the table takes 24 bytes a frame, thrice what the file has.
 */
#define FRAMES_MAX (16u << 20)
#define PLAIN_MAX  (32u << 20)
#define CODED_MAX  (40u << 20)
#define CACHE_MAX  (64u << 20) /* bytes of decoded frames to keep, but two at least */
#define SLOTS_MAX  16u
#define PIECE      5461u /* entries of the table read at once: 64 KiB */

struct frame {
    uint64_t coded, plain; /* where it begins; where it ends: the next one */
    uint32_t sum;          /* xxh64's low half of the plain bytes, if the table has sums */
};

enum slot_state { SLOT_EMPTY, SLOT_LOADING, SLOT_READY };

struct slot {
    enum slot_state state;
    size_t frame;
    unsigned users; /* copy out of it */
    uint64_t used;  /* the higher the later; 0 = read to its end, nobody may come again */
    uint8_t *plain;
    size_t room;
};

struct seekable {
    struct dr_file base;
    struct frame *frames; /* n + 1 */
    size_t n;
    bool has_sums;
    pthread_mutex_t lock; /* slots, clock */
    pthread_cond_t moved; /* a slot was loaded or left */
    struct slot slots[SLOTS_MAX];
    unsigned n_slots;
    uint64_t clock;
};

/* ------------------------------------------------------------------ decoding one frame */

static int decode(const struct seekable *s, size_t i, uint8_t *plain, size_t plain_len)
{
    const struct frame *f = &s->frames[i];
    size_t coded_len = (size_t)(f[1].coded - f[0].coded), got;
    CLEANUP_FREE uint8_t *coded = malloc(coded_len ? coded_len : 1);
    if (!coded)
        return -ENOMEM;
    int r = dr_file_pread_short(s->base.under, coded, f->coded, coded_len, &got, NULL);
    if (r < 0)
        return r;
    if (got < coded_len)
        return -EBADMSG;
    size_t n = ZSTD_decompress(plain, plain_len, coded, coded_len);
    if (ZSTD_isError(n) || n != plain_len)
        return -EBADMSG;
    return s->has_sums && (uint32_t)XXH64(plain, n, 0) != f->sum ? -EBADMSG : 0;
}

static int load(const struct seekable *s, struct slot *slot)
{
    const struct frame *f = &s->frames[slot->frame];
    size_t len = (size_t)(f[1].plain - f[0].plain);
    if (len > slot->room) {
        free(slot->plain);
        slot->plain = malloc(len);
        slot->room = slot->plain ? len : 0;
    }
    return slot->plain ? decode(s, slot->frame, slot->plain, len) : -ENOMEM;
}

/* ------------------------------------------------------------------ the frames that are kept */

static struct slot *find(struct seekable *s, size_t frame)
{
    for (unsigned i = 0; i < s->n_slots; i++)
        if (s->slots[i].state != SLOT_EMPTY && s->slots[i].frame == frame)
            return &s->slots[i];
    return NULL;
}

/* The slot that was used least recently; NULL: all are being used. */
static struct slot *oldest(struct seekable *s)
{
    struct slot *best = NULL;
    for (unsigned i = 0; i < s->n_slots; i++) {
        struct slot *slot = &s->slots[i];
        if (slot->state == SLOT_LOADING || slot->users > 0)
            continue;
        if (!best || slot->state == SLOT_EMPTY ||
            (best->state == SLOT_READY && slot->used < best->used))
            best = slot;
    }
    return best;
}

/* The caller holds the lock; it is released while the frame is decoded. */
static int fill_slot(struct seekable *s, struct slot *slot, size_t frame)
{
    slot->state = SLOT_LOADING;
    slot->frame = frame;
    pthread_mutex_unlock(&s->lock);
    int r = load(s, slot);
    pthread_mutex_lock(&s->lock);
    slot->state = r == 0 ? SLOT_READY : SLOT_EMPTY;
    pthread_cond_broadcast(&s->moved);
    return r;
}

/* The decoded frame, which stays until put_back. */
static int borrow(struct seekable *s, size_t frame, struct slot **out)
{
    DR_LOCK_SCOPE(&s->lock);
    for (;;) {
        struct slot *slot = find(s, frame);
        bool ready = slot && slot->state == SLOT_READY;
        if (!slot && (slot = oldest(s))) {
            int r = fill_slot(s, slot, frame);
            if (r < 0)
                return r;
            ready = true;
        }
        if (ready) {
            slot->users++;
            slot->used = ++s->clock;
            *out = slot;
            return 0;
        }
        pthread_cond_wait(&s->moved, &s->lock);
    }
}

/* A frame that was read to its end is reused first. Otherwise a thread that moves on to its next
 * frame would evict a frame that another thread is still reading. */
static void put_back(struct seekable *s, struct slot *slot, bool to_end)
{
    DR_LOCK_SCOPE(&s->lock);
    slot->used = to_end ? 0 : slot->used;
    if (--slot->users == 0)
        pthread_cond_broadcast(&s->moved);
}

/* ------------------------------------------------------------------ the file */

/* The frame that has the plain byte at off, which is inside. */
static size_t frame_at(const struct seekable *s, uint64_t off)
{
    size_t low = 0, high = s->n;
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (s->frames[mid].plain <= off)
            low = mid;
        else
            high = mid;
    }
    return low;
}

static ssize_t seekable_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    struct seekable *s = (struct seekable *)f;
    uint64_t size = s->frames[s->n].plain;
    size_t done = 0;
    len = off < size ? (size_t)dr_min(len, size - off) : 0;
    while (done < len) {
        size_t i = frame_at(s, off + done);
        uint64_t inner = off + done - s->frames[i].plain;
        size_t n = (size_t)dr_min(len - done, s->frames[i + 1].plain - s->frames[i].plain - inner);
        struct slot *slot = NULL;
        int r = borrow(s, i, &slot);
        if (r < 0)
            return r;
        memcpy((uint8_t *)buf + done, slot->plain + inner, n);
        done += n;
        put_back(s, slot, off + done == s->frames[i + 1].plain);
    }
    return (ssize_t)done;
}

static void seekable_close(struct dr_file *f)
{
    struct seekable *s = (struct seekable *)f;
    for (unsigned i = 0; i < SLOTS_MAX; i++)
        free(s->slots[i].plain);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->moved);
    dr_file_unref(s->base.under);
    free(s->frames);
    free(f->path);
    free(s);
}

/* The file is read-only, so there is never anything to flush. */
static int no_flush(struct dr_file *f)
{
    (void)f;
    return 0;
}

static uint64_t seekable_mtime(struct dr_file *f)
{
    return dr_file_mtime(f->under);
}

static int seekable_usage(struct dr_file *f, uint64_t *bytes)
{
    return dr_file_usage(f->under, bytes, NULL);
}

static const char *seekable_reason(struct dr_file *f, int r)
{
    (void)f;
    return r == -EBADMSG ? "the compressed data there is damaged" : NULL;
}

static const struct dr_file_ops seekable_ops = {
    .name = "zstd",
    .close = seekable_close,
    .pread = seekable_pread,
    .flush = no_flush,
    .mtime = seekable_mtime,
    .usage = seekable_usage,
    .reason = seekable_reason,
};

/* ------------------------------------------------------------------ the table */

struct table {
    uint32_t n;
    unsigned entry;    /* bytes */
    uint64_t at, size; /* of its entries; of the file */
};

static int bad_table(const struct dr_file *f, const char *what, struct dr_error *err)
{
    return dr_fail(err, EBADMSG, "%s: bad seek table at its end: %s", f->path, what);
}

static int find_table(struct dr_file *f, struct table *t, struct dr_error *err)
{
    uint8_t foot[FOOTER], head[FRAME_HEAD];
    t->size = dr_file_size(f);
    if (t->size < FRAME_HEAD + FOOTER)
        return -ENOTSUP;
    int r = dr_file_pread(f, foot, t->size - FOOTER, FOOTER, err);
    if (r < 0)
        return r;
    if (get_le32(foot + 5) != FOOTER_MAGIC)
        return -ENOTSUP;
    t->n = get_le32(foot);
    t->entry = foot[4] & HAS_SUMS ? 12 : 8;
    if (foot[4] & RESERVED)
        return bad_table(f, "it has bits of a version that is not known", err);
    uint64_t len = (uint64_t)t->n * t->entry + FOOTER;
    if (t->n > FRAMES_MAX || len + FRAME_HEAD > t->size)
        return bad_table(f, "it lists more frames than there can be", err);
    t->at = t->size - len;
    r = dr_file_pread(f, head, t->at - FRAME_HEAD, FRAME_HEAD, err);
    if (r == 0 && (get_le32(head) != TABLE_MAGIC || get_le32(head + 4) != len))
        r = bad_table(f, "it does not begin where it should", err);
    return r;
}

/* Parse table entries [first, first + n) from raw. *at is the file offset of the first one's
 * frame, and afterwards that of the frame after the last. */
static int take_entries(struct seekable *s, const uint8_t *raw, size_t first, size_t n,
                        struct frame *at, uint64_t *largest, struct dr_error *err)
{
    for (size_t i = first; i < first + n; i++, raw += s->has_sums ? 12 : 8) {
        uint32_t coded = get_le32(raw), plain = get_le32(raw + 4);
        s->frames[i] = *at;
        s->frames[i].sum = s->has_sums ? get_le32(raw + 8) : 0;
        if (coded > CODED_MAX || plain > PLAIN_MAX)
            return bad_table(s->base.under, "it has a frame too large to be decoded at once", err);
        at->coded += coded;
        at->plain += plain;
        *largest = dr_max(*largest, plain);
    }
    return 0;
}

static int read_entries(struct seekable *s, const struct table *t, uint64_t *largest,
                        struct dr_error *err)
{
    struct frame at = {0};
    CLEANUP_FREE uint8_t *raw = malloc((size_t)PIECE * t->entry);
    int r = raw ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", s->base.under->path);
    for (size_t i = 0, n; i < t->n && r == 0; i += n) {
        n = (size_t)dr_min(PIECE, t->n - i);
        r = dr_file_pread(s->base.under, raw, t->at + (uint64_t)i * t->entry, n * t->entry, err);
        if (r == 0)
            r = take_entries(s, raw, i, n, &at, largest, err);
    }
    s->frames[t->n] = at;
    s->n = t->n;
    if (r == 0 && at.coded != t->at - FRAME_HEAD)
        r = bad_table(s->base.under, "its frames do not make up the file", err);
    return r;
}

static int read_table(struct seekable *s, uint64_t *largest, struct dr_error *err)
{
    struct table t = {0};
    int r = find_table(s->base.under, &t, err);
    if (r < 0)
        return r;
    s->has_sums = t.entry > 8;
    s->frames = calloc((size_t)t.n + 1, sizeof(struct frame));
    if (!s->frames)
        return dr_fail(err, ENOMEM, "%s: out of memory", s->base.under->path);
    return read_entries(s, &t, largest, err);
}

int source_seekable_open(struct dr_file *f, struct dr_file **plain, struct dr_error *err)
{
    struct seekable *s = calloc(1, sizeof(*s));
    uint64_t largest = 1;
    *plain = NULL;
    if (!s)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->moved, NULL);
    s->base = (struct dr_file){
        .ops = &seekable_ops,
        .under = dr_file_ref(f),
        .id = f->fs && !f->part ? f->id : (struct dr_file_id){.owner = s, .ino = (uintptr_t)s},
        .path = strdup(f->path),
        .atomic_size = 512,
    };
    int r = s->base.path ? read_table(s, &largest, err)
                         : dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    if (r < 0) {
        seekable_close(&s->base);
        return r;
    }
    s->base.size = s->frames[s->n].plain;
    s->n_slots = (unsigned)dr_max(2, dr_min(SLOTS_MAX, CACHE_MAX / largest));
    return dr_file_adopt(&s->base, f->flags & (DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK), plain, err);
}

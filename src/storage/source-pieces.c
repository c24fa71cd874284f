/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The file decodes whole pieces and keeps a few. A piece that is damaged is kept, too, as damaged:
 * a salvage that asks for each of its sectors decodes it once. */
#include "storage/source-pieces.h"

#include <stdio.h>

#define CACHE_MAX (64u << 20) /* bytes of decoded pieces to keep, but so many at least: */
#define SLOTS_MIN 4u          /* all workers of a copy together are in no more */
#define SLOTS_MAX 16u
#define FIRST     1024u /* pieces that there is room for at first */
#define ODD_MAX   64u   /* pieces of unproven length that are decoded before the list is given up */

enum slot_state { SLOT_EMPTY, SLOT_LOADING, SLOT_READY };

struct slot {
    enum slot_state state;
    size_t piece;
    unsigned users; /* copy out of it */
    uint64_t used;  /* the higher the later; 0 = read to its end, nobody may come again */
    uint8_t *plain;
    size_t room;
    size_t good; /* bytes that can be read */
    int failed;  /* why those behind cannot */
};

struct source_pieces {
    struct dr_file base;
    const struct source_piece_packer *packer;
    enum dr_source_salvage salvage;
    struct source_piece *piece; /* n + 1, the last one only tells the end */
    size_t n, room;
    uint64_t largest;     /* plain bytes */
    uint32_t common;      /* the packer's */
    bool cut;             /* the list ended before the file */
    bool gaps;            /* pieces are missing in the list */
    uint64_t searched;    /* offset in the container: pieces behind gaps are looked for behind it */
    uint64_t cut_at;      /* offset in the container */
    char cut_why[128];    /* a part of a sentence */
    uint64_t displaced;   /* plain bytes from here on may be others; UINT64_MAX = none */
    pthread_mutex_t lock; /* slots, clock, doubts */
    pthread_cond_t moved; /* a slot was loaded or left */
    struct slot slots[SLOTS_MAX];
    unsigned n_slots;
    uint64_t clock;
    uint32_t *doubts;  /* of each piece: bytes at its beginning that were read although it is
                          damaged; NULL: no piece was */
    size_t doubts_end; /* 1 + the last such piece */
};

static uint64_t plain_len(const struct source_pieces *s, size_t i)
{
    return s->piece[i + 1].plain - s->piece[i].plain;
}

/* ------------------------------------------------------------------ decoding one piece */

/* It stands for what is missing. */
static bool is_gap(const struct source_pieces *s, size_t i)
{
    return s->piece[i].coded_len == 0 && plain_len(s, i) > 0;
}

static int decode(const struct source_pieces *s, size_t i, uint8_t *plain, size_t *good)
{
    const struct source_piece *p = &s->piece[i];
    if (is_gap(s, i)) {
        *good = 0;
        return -EBADMSG;
    }
    CLEANUP_FREE uint8_t *coded = malloc(p->coded_len ? p->coded_len : 1);
    size_t got;
    *good = 0;
    if (!coded)
        return -ENOMEM;
    int r = dr_file_pread_short(s->base.under, coded, p->coded, p->coded_len, &got, NULL);
    if (r < 0)
        return r;
    if (got < p->coded_len && s->salvage < DR_SOURCE_SALVAGE_KEEP)
        return -EBADMSG;
    struct source_piece there = *p; /* as much of it as the file has */
    there.coded_len = (uint32_t)got;
    r = s->packer->decode(&there, s->common, coded, plain, (size_t)plain_len(s, i), good);
    return r == 0 && got < p->coded_len ? -EBADMSG : r;
}

/* Under lock. Bytes that no checksum was right for. A hostile file may have millions of such
 * pieces, so each has its own place, and one look at it takes the same time however many there are.
 */
static int note_doubt(struct source_pieces *s, size_t i, size_t good)
{
    if (!s->doubts)
        s->doubts = calloc(s->n, sizeof(*s->doubts));
    if (!s->doubts)
        return -ENOMEM;
    s->doubts[i] = (uint32_t)good; /* at most SOURCE_PIECE_PLAIN_MAX */
    s->doubts_end = dr_max(s->doubts_end, i + 1);
    return 0;
}

/* A salvage remembers damage; others ask again. */
static int load(const struct source_pieces *s, struct slot *slot)
{
    size_t len = (size_t)plain_len(s, slot->piece);
    if (len > slot->room) {
        free(slot->plain);
        slot->plain = malloc(len);
        slot->room = slot->plain ? len : 0;
    }
    if (!slot->plain && len > 0)
        return -ENOMEM;
    slot->failed = decode(s, slot->piece, slot->plain, &slot->good);
    if (slot->failed == 0)
        slot->good = len;
    else if (s->salvage < DR_SOURCE_SALVAGE_KEEP)
        slot->good = 0;
    bool remembered = s->salvage != DR_SOURCE_STRICT && slot->failed != -ENOMEM;
    return remembered ? 0 : slot->failed;
}

/* ------------------------------------------------------------------ the pieces that are kept */

static struct slot *find(struct source_pieces *s, size_t piece)
{
    for (unsigned i = 0; i < s->n_slots; i++)
        if (s->slots[i].state != SLOT_EMPTY && s->slots[i].piece == piece)
            return &s->slots[i];
    return NULL;
}

/* The slot that was used least recently; NULL: all are being used. */
static struct slot *oldest(struct source_pieces *s)
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

/* Called with the lock held, returns with it held, and without it while it decodes. */
static int fill_slot(struct source_pieces *s, struct slot *slot, size_t piece)
{
    slot->state = SLOT_LOADING;
    slot->piece = piece;
    pthread_mutex_unlock(&s->lock);
    int r = load(s, slot);
    pthread_mutex_lock(&s->lock);
    if (r == 0 && slot->failed && slot->good > 0)
        r = note_doubt(s, piece, slot->good);
    slot->state = r == 0 ? SLOT_READY : SLOT_EMPTY;
    pthread_cond_broadcast(&s->moved);
    return r;
}

/* The decoded piece, which stays until put_back. */
static int borrow(struct source_pieces *s, size_t piece, struct slot **out)
{
    DR_LOCK_SCOPE(&s->lock);
    for (;;) {
        struct slot *slot = find(s, piece);
        bool ready = slot && slot->state == SLOT_READY;
        if (!slot && (slot = oldest(s))) {
            int r = fill_slot(s, slot, piece);
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

/* A piece that was read to its end is reused first. Otherwise a thread that moves on to its next
 * piece would evict one that another thread is still reading. */
static void put_back(struct source_pieces *s, struct slot *slot, bool to_end)
{
    DR_LOCK_SCOPE(&s->lock);
    slot->used = to_end ? 0 : slot->used;
    if (--slot->users == 0)
        pthread_cond_broadcast(&s->moved);
}

/* ------------------------------------------------------------------ the file */

/* The piece that has the plain byte at off, which is inside. */
static size_t piece_at(const struct source_pieces *s, uint64_t off)
{
    size_t low = 0, high = s->n;
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (s->piece[mid].plain <= off)
            low = mid;
        else
            high = mid;
    }
    return low;
}

static ssize_t pieces_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    struct source_pieces *s = (struct source_pieces *)f;
    uint64_t size = s->piece[s->n].plain;
    size_t done = 0;
    len = off < size ? (size_t)dr_min(len, size - off) : 0;
    while (done < len) {
        size_t i = piece_at(s, off + done);
        uint64_t inner = off + done - s->piece[i].plain;
        size_t n = (size_t)dr_min(len - done, plain_len(s, i) - inner);
        struct slot *slot = NULL;
        int r = borrow(s, i, &slot);
        if (r < 0)
            return r;
        if (inner + n <= slot->good)
            memcpy((uint8_t *)buf + done, slot->plain + inner, n);
        else
            r = slot->failed;
        done += n;
        put_back(s, slot, r == 0 && off + done == s->piece[i + 1].plain);
        if (r < 0)
            return r;
    }
    return (ssize_t)done;
}

static void pieces_close(struct dr_file *f)
{
    struct source_pieces *s = (struct source_pieces *)f;
    for (unsigned i = 0; i < SLOTS_MAX; i++)
        free(s->slots[i].plain);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->moved);
    dr_file_unref(s->base.under);
    free(s->doubts);
    free(s->piece);
    free(f->path);
    free(s);
}

/* The file is read-only, so there is never anything to flush. */
static int no_flush(struct dr_file *f)
{
    (void)f;
    return 0;
}

static uint64_t pieces_mtime(struct dr_file *f)
{
    return dr_file_mtime(f->under);
}

static int pieces_usage(struct dr_file *f, uint64_t *bytes)
{
    return dr_file_usage(f->under, bytes, NULL);
}

static const char *pieces_reason(struct dr_file *f, int r)
{
    (void)f;
    return r == -EBADMSG ? "the compressed data there is damaged" : NULL;
}

static const struct dr_file_ops pieces_ops = {
    .name = "pieces",
    .close = pieces_close,
    .pread = pieces_pread,
    .flush = no_flush,
    .mtime = pieces_mtime,
    .usage = pieces_usage,
    .reason = pieces_reason,
};

uint64_t dr_source_largest_piece(const struct dr_file *f)
{
    return f && f->ops == &pieces_ops ? ((const struct source_pieces *)f)->largest : 0;
}

bool dr_source_has_gaps(const struct dr_file *f)
{
    return f && f->ops == &pieces_ops && ((const struct source_pieces *)f)->gaps;
}

bool dr_source_doubtful(struct dr_file *f, uint64_t from, uint64_t to,
                        struct dr_source_range *first)
{
    struct source_pieces *s = (struct source_pieces *)f;
    struct dr_source_range best = {UINT64_MAX, 0};
    if (!f || f->ops != &pieces_ops || from >= to || s->n == 0)
        return false;
    DR_LOCK_SCOPE(&s->lock);
    for (size_t i = piece_at(s, from); i < s->doubts_end && s->piece[i].plain < to; i++) {
        uint64_t end = s->piece[i].plain + s->doubts[i];
        if (s->doubts[i] > 0 && end > from) {
            best = (struct dr_source_range){s->piece[i].plain, end};
            break;
        }
    }
    if (s->displaced < to && s->displaced <= best.from) /* all to the end */
        best = (struct dr_source_range){s->displaced, UINT64_MAX};
    if (best.from == UINT64_MAX)
        return false;
    *first = (struct dr_source_range){dr_max(best.from, from), dr_min(best.to, to)};
    return true;
}

/* ------------------------------------------------------------------ the list */

static int make_room(struct source_pieces *s, struct dr_error *err)
{
    if (s->n + 1 < s->room)
        return 0;
    size_t room = s->room ? 2 * s->room : FIRST;
    struct source_piece *more = realloc(s->piece, room * sizeof(*more));
    if (!more)
        return dr_fail(err, ENOMEM, "%s: out of memory", s->base.path);
    if (!s->piece)
        more[0] = (struct source_piece){0};
    s->piece = more;
    s->room = room;
    return 0;
}

int source_pieces_add(struct source_pieces *s, uint64_t coded, uint64_t coded_len, uint64_t len,
                      uint32_t word, struct dr_error *err)
{
    if (coded_len > SOURCE_PIECE_CODED_MAX || len > SOURCE_PIECE_PLAIN_MAX ||
        s->n == SOURCE_PIECES_MAX)
        return -ENOTSUP;
    int r = make_room(s, err);
    if (r < 0)
        return r;
    struct source_piece *p = &s->piece[s->n++];
    p->coded = coded;
    p->coded_len = (uint32_t)coded_len;
    p->word = word;
    p[1] = (struct source_piece){.plain = p->plain + len};
    s->largest = dr_max(s->largest, len);
    return 0;
}

void source_pieces_common(struct source_pieces *s, uint32_t common)
{
    s->common = common;
}

bool source_pieces_salvaging(const struct source_pieces *s)
{
    return s->salvage != DR_SOURCE_STRICT;
}

bool source_pieces_bridging(const struct source_pieces *s)
{
    return s->salvage == DR_SOURCE_SALVAGE_GAPS;
}

int source_pieces_end(struct source_pieces *s, uint64_t at, const char *why)
{
    if (s->salvage == DR_SOURCE_STRICT || s->n == 0)
        return -ENOTSUP;
    if (is_gap(s, s->n - 1))
        s->n--; /* nothing is behind it */
    s->cut = true;
    s->cut_at = at;
    snprintf(s->cut_why, sizeof(s->cut_why), "%s", why);
    return 0;
}

int source_pieces_gap(struct source_pieces *s, uint64_t at, uint64_t *from, struct dr_error *err)
{
    if (!source_pieces_bridging(s) || s->n == 0)
        return -ENOTSUP;
    bool again = is_gap(s, s->n - 1);
    uint64_t last = again ? at : s->piece[s->n - 1].coded;
    *from = s->searched = dr_max(s->searched, last) + 1;
    s->gaps = true;
    if (again)
        return 0;
    uint64_t largest = s->largest; /* nothing is decoded for a gap */
    int r = source_pieces_add(s, at, 0, DR_SOURCE_GAP, 0, err);
    s->largest = largest;
    return r;
}

#define SEARCH_BYTES (128u << 10)

int source_pieces_search(struct dr_file *f, const uint8_t *magic, size_t len, uint64_t *at,
                         struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(SEARCH_BYTES);
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    for (;; *at += SEARCH_BYTES - (len - 1)) {
        size_t got;
        int r = dr_file_pread_short(f, buf, *at, SEARCH_BYTES, &got, err);
        if (r < 0)
            return r;
        const uint8_t *found = memmem(buf, got, magic, len);
        if (found) {
            *at += (uint64_t)(found - buf);
            return 0;
        }
        if (got < SEARCH_BYTES)
            return -ENODATA;
    }
}

/* Does the piece decode to the length that the list has for it? */
static int proves(const struct source_pieces *s, size_t i, bool *good)
{
    size_t len = (size_t)plain_len(s, i), came;
    CLEANUP_FREE uint8_t *buf = malloc(len ? len : 1);
    if (!buf)
        return -ENOMEM;
    int r = decode(s, i, buf, &came);
    *good = r == 0;
    return r == -EBADMSG ? 0 : r;
}

/* The length that a piece surely has: that of the first one that decodes. */
static int usual_length(const struct source_pieces *s, uint64_t *usual)
{
    bool good = false;
    int r = 0;
    *usual = 0;
    for (size_t i = 0; i < s->n && i < ODD_MAX && r == 0 && !good; i++) {
        r = proves(s, i, &good);
        *usual = good ? plain_len(s, i) : 0;
    }
    return r;
}

/* Have some pieces other lengths than the rest? The last one that is not empty always may. */
static int are_mixed(const struct source_pieces *s, uint64_t usual, size_t last, bool *mixed)
{
    int r = 0;
    *mixed = false;
    for (size_t i = 0; i < last && r == 0 && !*mixed; i++)
        if (plain_len(s, i) != usual)
            r = proves(s, i, mixed);
    return r;
}

/* The length that is most likely, of a damaged piece that says len. */
static uint64_t likely_length(uint64_t len, uint64_t usual, bool mixed, bool at_end)
{
    if (len > 0 && (mixed || (at_end && len < usual)))
        return len;
    return usual;
}

/* A damaged piece that ends at end may have another length: what is behind it, another place. */
static void doubt_length(struct source_pieces *s, size_t i, uint64_t end)
{
    s->displaced = dr_min(s->displaced, end);
    if (s->cut)
        return;
    s->cut = true;
    s->cut_at = s->piece[i].coded;
    snprintf(s->cut_why, sizeof(s->cut_why), "how many bytes were packed there is not known");
}

/* Most packers make all pieces but the last one equally long. One that says something else and is
 * damaged may say a wrong length, and what is behind it would come out displaced. */
static int prove_lengths(struct source_pieces *s)
{
    uint64_t usual, old = 0;
    unsigned odd = 0;
    size_t last = s->n - 1;
    bool mixed = false;
    int r = usual_length(s, &usual);
    if (r == 0 && usual == 0)
        return -ENOTSUP;
    while (last > 0 && plain_len(s, last) == 0)
        last--;
    if (r == 0 && s->salvage != DR_SOURCE_STRICT)
        r = are_mixed(s, usual, last, &mixed);
    for (size_t i = 0; i < s->n && r == 0; i++) {
        uint64_t next = s->piece[i + 1].plain, len = next - old;
        bool good = true;
        old = next;
        s->piece[i + 1].plain = s->piece[i].plain + len; /* those in front may have moved */
        if (len == usual || is_gap(s, i))
            continue;
        if (s->salvage == DR_SOURCE_STRICT && ++odd > ODD_MAX)
            return -ENOTSUP;
        r = proves(s, i, &good);
        if (r == 0 && !good && s->salvage == DR_SOURCE_STRICT)
            return -ENOTSUP;
        if (good)
            continue;
        len = len == 0 && i + 1 == s->n ? 0 : likely_length(len, usual, mixed, i >= last);
        s->piece[i + 1].plain = s->piece[i].plain + len;
        s->largest = dr_max(s->largest, len);
        doubt_length(s, i, s->piece[i + 1].plain);
    }
    return r;
}

/* ------------------------------------------------------------------ open */

static int begin(struct source_pieces *s, struct dr_error *err)
{
    int r = s->base.path ? make_room(s, err)
                         : dr_fail(err, ENOMEM, "%s: out of memory", s->base.under->path);
    if (r == 0)
        r = s->packer->find(s->base.under, s, err);
    bool salvage = s->salvage != DR_SOURCE_STRICT;
    bool prove = s->packer->unproven || (salvage && s->packer->proof_for_salvage);
    if (r == 0 && prove && s->n > 0)
        r = prove_lengths(s);
    if (r < 0 && r != -ENOTSUP && r != -EBADMSG)
        return dr_fail_errno(err, -r, "%s: its pieces cannot be read", s->base.path);
    if (r == 0 && s->piece[s->n].plain > INT64_MAX)
        return -ENOTSUP;
    return r;
}

/* Each piece in front of the end has a checksum of its own. */
static void note_end(const struct source_pieces *s, struct dr_unpack_damage *damage)
{
    if (!damage || !s->cut)
        return;
    damage->vouched = damage->came = s->piece[s->n].plain;
    dr_fail(&damage->why, EBADMSG, "%s: damaged %s data at offset %llu: %s", s->base.path,
            s->packer->name, (unsigned long long)s->cut_at, s->cut_why);
}

int source_pieces_open(struct dr_file *f, const struct source_piece_packer *packer,
                       enum dr_source_salvage salvage, struct dr_unpack_damage *damage,
                       struct dr_file **plain, struct dr_error *err)
{
    struct source_pieces *s = calloc(1, sizeof(*s));
    *plain = NULL;
    if (!s)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->moved, NULL);
    s->packer = packer;
    s->salvage = salvage;
    s->displaced = UINT64_MAX;
    s->base = (struct dr_file){
        .ops = &pieces_ops,
        .under = dr_file_ref(f),
        .id = f->fs && !f->part ? f->id : (struct dr_file_id){.owner = s, .ino = (uintptr_t)s},
        .path = strdup(f->path),
        .atomic_size = 512,
        .decoding = 1 + salvage,
    };
    int r = begin(s, err);
    if (r < 0) {
        pieces_close(&s->base);
        return r;
    }
    note_end(s, damage);
    s->base.size = s->piece[s->n].plain;
    s->n_slots = (unsigned)dr_max(SLOTS_MIN, dr_min(SLOTS_MAX, CACHE_MAX / dr_max(1, s->largest)));
    return dr_file_adopt(&s->base, f->flags & (DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK), plain, err);
}

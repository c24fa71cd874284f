/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which layer owns a range: an index over the frozen layers of a chain.
 *
 * Asking one layer after another makes every read cost as much as the chain is deep. A run of
 * layers that do not change has the same first owner at an offset for ever, so the answer is kept:
 * for a window of 32 MiB of the disk a sorted list of segments, each with the first layer of the
 * run that may have something there. A window is built when it is first asked for, by going down
 * the layers with long questions; then it never changes. The owner itself is asked by its map, so
 * where it keeps its bytes is no business of the index.
 *
 * Most layers of a deep chain have nothing in most places. What they said about that is remembered
 * per layer, not per window (struct memo): the next window passes them with a comparison. Where all
 * layers above the lowest of the run are empty for long, that is kept in a bit for each 64th of the
 * disk, and no window is needed. A window in which one layer owns everything says how far beyond it
 * that holds, so that a walk over a large disk takes large steps.
 *
 * A look-up takes no lock: it enters the index's epoch, reads a pointer, searches, leaves. Windows
 * of all chains share one budget (DR_CACHE_INDEX). One that must go is taken out of its slot, and
 * freed when those who may be reading it have left.
 *
 * A chain whose frozen image is thawed should be replaced by a new one. Until that happens its
 * index is out of use: thawing counts (dr_image.thaws), and look-ups notice. Whenever there is no
 * answer - thawed, too fragmented, damage met, no memory - the caller asks layer by layer. */
#include "base/bytes.h"
#include "core/internal.h"

#define WINDOW       (UINT64_C(32) << 20)
#define SEGMENTS_MAX 8192u      /* of a window; more of them are not worth their memory */
#define SLOTS_MAX    (1u << 16) /* of an index */
#define ASKS_MAX     64         /* questions to find out whether a chunk is empty */
#define GRANULE      4096u      /* of what is remembered of a layer, unless the disk is huge */
#define FREED_ROUND  64         /* windows that go at a time */
#define UNKNOWN      UINT32_MAX

struct segment {
    uint32_t end; /* offset in the window; it begins where the one before ends */
    uint32_t owner;
};

struct window {
    uint64_t number;
    uint64_t until; /* a window with one segment: that holds from its begin to here */
    uint32_t n;     /* 0: nothing is known, ask layer by layer */
    struct segment segments[];
};

/* A table of windows: each is in the slot of its number modulo n. */
struct slots {
    size_t n;    /* a power of two */
    size_t hand; /* the next one to empty; under all_lock */
    _Atomic(struct window *) at[];
};

/* The places in which a layer said that it has nothing. Facts about a frozen layer stay true, so
 * threads may read and add them in any order. */
struct memo {
    /* A bit for each 64th of the disk: asked about it as a whole; it is empty. */
    _Atomic uint64_t asked, empty;
    /* The last run that was found empty, first << 32 | end, in granules. */
    _Atomic uint64_t run;
};

struct dr_index {
    struct dr_index *next; /* of the same chain */
    size_t first, last;    /* the run: images[first..last) of the chain */
    struct dr_image *const *images;
    uint64_t size;            /* of the uppermost: nothing is known behind it */
    uint64_t chunk;           /* what a bit of a memo stands for: a multiple of WINDOW */
    uint64_t granule;         /* of the run of a memo: a disk has fewer than 2^32 */
    unsigned thaws;           /* of all layers together, when the index was made */
    _Atomic unsigned checked; /* the count of thawings when that was looked at last */
    _Atomic bool stale;
    struct memo *memos;
    /* A bit for each chunk: all layers but the last of the run are empty there. */
    _Atomic uint64_t lowest;
    _Atomic(struct slots *) slots;  /* NULL until the first window, and when it gave them back */
    struct dr_ranges *readers;      /* for its epoch */
    struct dr_index *newer, *older; /* indexes that have slots; under all_lock */
};

/* ------------------------------------------------------------------ all indexes */

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static struct dr_index *all_newest; /* the index that kept a window last; those that have slots */
static size_t all_bytes;
static _Atomic unsigned thawings;

static size_t window_bytes(const struct window *w)
{
    return sizeof(*w) + w->n * sizeof(struct segment) + 2 * sizeof(void *);
}

static size_t slots_bytes(size_t n)
{
    return sizeof(struct slots) + n * sizeof(struct window *);
}

static void list_remove(struct dr_index *ix)
{
    if (ix->newer)
        ix->newer->older = ix->older;
    else
        all_newest = ix->older;
    if (ix->older)
        ix->older->newer = ix->newer;
    ix->newer = ix->older = NULL;
}

static void list_add_newest(struct dr_index *ix)
{
    ix->older = all_newest;
    if (all_newest)
        all_newest->newer = ix;
    all_newest = ix;
}

/* Take windows out of ix until enough are gone or it has none; free them once nobody reads them.
 * all_lock held: readers wait for nothing, so they leave soon. */
static void drop_windows(struct dr_index *ix, size_t target)
{
    struct slots *slots = ix->slots;
    size_t looked = 0;
    while (all_bytes > target && looked < slots->n) {
        struct window *gone[FREED_ROUND];
        unsigned n = 0;
        for (; n < FREED_ROUND && all_bytes > target && looked < slots->n; looked++) {
            struct window *w = atomic_exchange(&slots->at[slots->hand], NULL);
            slots->hand = (slots->hand + 1) & (slots->n - 1);
            if (!w)
                continue;
            all_bytes -= window_bytes(w);
            gone[n++] = w;
        }
        if (n > 0)
            dr_epoch_drain(ix->readers);
        while (n > 0)
            free(gone[--n]);
    }
}

/* Give back the slots of an index, and the windows in them. all_lock held. */
static void drop_slots(struct dr_index *ix)
{
    struct slots *slots = atomic_exchange(&ix->slots, NULL);
    dr_epoch_drain(ix->readers);
    for (size_t i = 0; i < slots->n; i++) {
        struct window *w = slots->at[i];
        all_bytes -= w ? window_bytes(w) : 0;
        free(w);
    }
    all_bytes -= slots_bytes(slots->n);
    free(slots);
    list_remove(ix);
}

/* Make room for `more` bytes: the index that has kept no window for the longest time gives first,
 * its windows and then its slots; the keeper gives no slots. all_lock held. */
static bool make_room(const struct dr_index *keeper, size_t more)
{
    size_t limit = (size_t)dr_cache_limit(DR_CACHE_INDEX);
    if (more > limit)
        return false;
    if (all_bytes + more <= limit)
        return true;
    size_t target = dr_min(limit - more, limit - limit / 8);
    struct dr_index *oldest = all_newest, *newer;
    while (oldest && oldest->older)
        oldest = oldest->older;
    for (struct dr_index *ix = oldest; ix && all_bytes > target; ix = newer) {
        newer = ix->newer;
        drop_windows(ix, target);
        if (all_bytes > target && ix != keeper)
            drop_slots(ix);
    }
    return all_bytes + more <= limit;
}

size_t dr_index_bytes(void)
{
    DR_LOCK_SCOPE(&all_lock);
    return all_bytes;
}

void dr_index_thawed(struct dr_image *image)
{
    atomic_fetch_add(&image->thaws, 1);
    atomic_fetch_add(&thawings, 1);
}

/* ------------------------------------------------------------------ make, free */

static unsigned count_thaws(const struct dr_index *ix)
{
    unsigned n = 0;
    for (size_t i = ix->first; i < ix->last; i++)
        n += atomic_load(&ix->images[i]->thaws);
    return n;
}

static struct dr_index *index_new(struct dr_image *const *images, size_t first, size_t last)
{
    struct dr_index *ix = calloc(1, sizeof(*ix));
    if (!ix)
        return NULL;
    ix->first = first;
    ix->last = last;
    ix->images = images;
    ix->size = images[first]->size;
    ix->chunk = dr_max(WINDOW, dr_round_up(dr_div_up(ix->size, 64), WINDOW));
    ix->granule = GRANULE;
    while (ix->size / ix->granule > UINT32_MAX)
        ix->granule *= 2;
    ix->memos = calloc(last - first, sizeof(struct memo));
    ix->readers = dr_ranges_new();
    if (!ix->memos || !ix->readers) {
        dr_ranges_free(ix->readers);
        free(ix->memos);
        free(ix);
        return NULL;
    }
    return ix;
}

struct dr_index *dr_index_new(struct dr_image *const *images, size_t n)
{
    struct dr_index *list = NULL;
    unsigned checked = atomic_load(&thawings);
    for (size_t i = 0, end; i < n; i = end) {
        unsigned thaws = 0;
        /* The count first: whoever thaws an image makes it writable before counting. */
        for (end = i; end < n; end++) {
            unsigned more = atomic_load(&images[end]->thaws);
            if (images[end]->writable)
                break;
            thaws += more;
        }
        struct dr_index *ix = end > i + 1 && images[i]->size > 0 ? index_new(images, i, end) : NULL;
        if (ix) {
            ix->thaws = thaws;
            ix->checked = checked;
            ix->next = list;
            list = ix;
        }
        end = dr_max(end, i + 1);
    }
    return list;
}

static void index_free(struct dr_index *ix)
{
    pthread_mutex_lock(&all_lock);
    if (ix->slots)
        drop_slots(ix);
    pthread_mutex_unlock(&all_lock);
    dr_ranges_free(ix->readers);
    free(ix->memos);
    free(ix);
}

void dr_index_free(struct dr_index *list)
{
    while (list) {
        struct dr_index *next = list->next;
        index_free(list);
        list = next;
    }
}

/* ------------------------------------------------------------------ what is remembered of a layer
 */

/* Bits [first, end). */
static uint64_t bits_between(uint64_t first, uint64_t end)
{
    uint64_t low = first < 64 ? UINT64_MAX << first : 0;
    return end < 64 ? low & ~(UINT64_MAX << end) : low;
}

/* The end of the chunks after off whose bits are set without a gap; off itself: its own is not. */
static uint64_t end_of_chunks(const struct dr_index *ix, uint64_t bits, uint64_t off)
{
    uint64_t bit = off / ix->chunk;
    if (!(bits >> bit & 1))
        return off;
    uint64_t clear = ~bits & bits_between(bit, 64);
    return (clear ? (uint64_t)__builtin_ctzll(clear) : 64) * ix->chunk;
}

/* The end of the range from off on in which the layer is known to be empty; off itself: not known.
 */
static uint64_t known_empty(const struct dr_index *ix, const struct memo *memo, uint64_t off)
{
    uint64_t run = atomic_load_explicit(&memo->run, memory_order_relaxed);
    uint64_t first = (run >> 32) * ix->granule, end = (uint32_t)run * ix->granule;
    if (off >= first && off < end)
        return end;
    return end_of_chunks(ix, atomic_load_explicit(&memo->empty, memory_order_relaxed), off);
}

/* Somebody walks: what was found empty last ends at off, or goes on there. The next run will be
 * found in its turn, so there is no need to find out about more of the layer. */
static bool is_walked(const struct dr_index *ix, const struct memo *memo, uint64_t off)
{
    uint64_t run = atomic_load_explicit(&memo->run, memory_order_relaxed);
    return off > 0 && off >= (run >> 32) * ix->granule && off <= (uint32_t)run * ix->granule;
}

static void remember_empty(const struct dr_index *ix, struct memo *memo, uint64_t off, uint64_t end)
{
    uint64_t first = dr_div_up(off, ix->granule), last = end / ix->granule;
    if (first < last)
        atomic_store_explicit(&memo->run, first << 32 | last, memory_order_relaxed);
}

/* Ask layer i, once for each chunk, whether the chunk that holds begin is empty. A long answer also
 * settles the chunks that follow. */
static int ask_chunk(const struct dr_index *ix, size_t i, uint64_t begin)
{
    struct memo *memo = &ix->memos[i - ix->first];
    struct dr_image *image = ix->images[i];
    uint64_t bit = begin / ix->chunk, off = bit * ix->chunk;
    uint64_t end = dr_min(off + ix->chunk, ix->size), far = dr_min(ix->size, image->size);
    uint64_t mask = UINT64_C(1) << bit;
    if (end > image->size || (atomic_load_explicit(&memo->asked, memory_order_relaxed) & mask))
        return 0;
    for (int n = 0; n < ASKS_MAX && off < end; n++) {
        struct dr_extent ext;
        int r = dr_image_map(image, off, far - off, &ext, NULL);
        if (r < 0)
            return r;
        if (ext.kind != DR_HOLE)
            break;
        off += ext.len;
    }
    remember_empty(ix, memo, bit * ix->chunk, off);
    uint64_t whole = off == ix->size ? dr_div_up(off, ix->chunk) : off / ix->chunk;
    uint64_t empty = bits_between(bit, whole);
    atomic_fetch_or_explicit(&memo->empty, empty, memory_order_relaxed);
    atomic_fetch_or_explicit(&memo->asked, empty | mask, memory_order_relaxed);
    return 0;
}

/* ------------------------------------------------------------------ build a window */

/* The segments so far, UNKNOWN where no layer has had anything yet, and those that the layer at
 * hand makes of them. */
struct build {
    struct dr_index *ix;
    uint64_t begin, end; /* of the window, within the size of the uppermost layer */
    uint64_t reach;      /* how far what the layers said about the whole window holds */
    struct segment *now, *next;
    uint32_t n, n_next;
};

static int add(struct build *b, uint64_t end, uint32_t owner)
{
    struct segment *prev = b->n_next ? &b->next[b->n_next - 1] : NULL;
    uint32_t at = (uint32_t)(end - b->begin);
    if (at == (prev ? prev->end : 0))
        return 0;
    if (prev && prev->owner == owner) {
        prev->end = at;
        return 0;
    }
    if (b->n_next == SEGMENTS_MAX)
        return -E2BIG;
    b->next[b->n_next++] = (struct segment){.end = at, .owner = owner};
    return 0;
}

/* Ask layer i about off: *owns tells whether it has something there, *until how far that holds. */
static int ask(struct build *b, size_t i, uint64_t off, bool *owns, uint64_t *until)
{
    const struct dr_index *ix = b->ix;
    struct memo *memo = &ix->memos[i - ix->first];
    struct dr_image *image = ix->images[i];
    struct dr_extent ext;
    *owns = true;
    *until = UINT64_MAX;
    if (off >= image->size)
        return 0; /* the layer has ended: so does every look-up */
    uint64_t empty = known_empty(ix, memo, off);
    if (empty > off) {
        *owns = false;
        *until = empty;
        return 0;
    }
    int r = dr_image_map(image, off, image->size - off, &ext, NULL);
    if (r < 0)
        return r;
    *owns = ext.kind != DR_HOLE;
    *until = off + ext.len;
    if (!*owns)
        remember_empty(ix, memo, off, *until);
    return 0;
}

/* Give layer i what it owns of the UNKNOWN segments. */
static int take_part(struct build *b, size_t i)
{
    uint64_t begin = b->begin, until = b->begin; /* of the segment; of the layer's answer */
    bool owns = false;
    b->n_next = 0;
    for (uint32_t s = 0; s < b->n; s++) {
        uint64_t off = begin, end = b->begin + b->now[s].end;
        begin = end;
        if (b->now[s].owner != UNKNOWN) {
            int r = add(b, end, b->now[s].owner);
            if (r < 0)
                return r;
            continue;
        }
        while (off < end) {
            int r = off >= until ? ask(b, i, off, &owns, &until) : 0;
            if (r == 0 && off == b->begin)
                b->reach = dr_min(b->reach, until);
            uint64_t part = dr_min(until, end);
            if (r == 0)
                r = add(b, part, owns ? (uint32_t)i : UNKNOWN);
            if (r < 0)
                return r;
            off = part;
        }
    }
    struct segment *old = b->now;
    b->now = b->next;
    b->next = old;
    b->n = b->n_next;
    return 0;
}

static bool all_owned(const struct build *b)
{
    for (uint32_t s = 0; s < b->n; s++)
        if (b->now[s].owner == UNKNOWN)
            return false;
    return true;
}

/* Note in how many chunks from the one that begin is in all layers above the last of the run are
 * empty. */
static void remember_lowest(struct dr_index *ix, uint64_t begin)
{
    uint64_t until = UINT64_MAX;
    for (size_t i = 0; i < ix->last - 1 - ix->first && until > begin; i++) {
        uint64_t empty = atomic_load_explicit(&ix->memos[i].empty, memory_order_relaxed);
        until = dr_min(until, end_of_chunks(ix, empty, begin));
    }
    uint64_t first = begin / ix->chunk;
    uint64_t end = until >= ix->size ? 64 : until / ix->chunk;
    if (end > first)
        atomic_fetch_or_explicit(&ix->lowest, bits_between(first, end), memory_order_relaxed);
}

/* The last layer is not asked. It gets what no layer above it has: the caller asks the owner
 * anyway, and goes on below it if that has nothing. */
static int build_segments(struct build *b)
{
    struct dr_index *ix = b->ix;
    size_t lowest = ix->last - 1;
    for (size_t i = ix->first; i < lowest && !all_owned(b); i++) {
        const struct memo *memo = &ix->memos[i - ix->first];
        uint64_t empty = known_empty(ix, memo, b->begin);
        if (empty == b->begin && !is_walked(ix, memo, b->begin)) {
            int r = ask_chunk(ix, i, b->begin);
            if (r < 0)
                return r;
            empty = known_empty(ix, memo, b->begin);
        }
        if (empty >= b->end) {
            b->reach = dr_min(b->reach, empty);
            continue;
        }
        int r = take_part(b, i);
        if (r < 0)
            return r;
    }
    for (uint32_t s = 0; s < b->n; s++)
        if (b->now[s].owner == UNKNOWN)
            b->now[s].owner = (uint32_t)lowest;
    if (b->n == 1 && b->now[0].owner == lowest)
        remember_lowest(ix, b->begin);
    return 0;
}

/* NULL: no memory. */
static struct window *build_window(struct dr_index *ix, uint64_t number)
{
    struct build b = {.ix = ix, .begin = number * WINDOW, .reach = UINT64_MAX, .n = 1};
    b.end = b.begin + dr_min(WINDOW, ix->size - b.begin);
    CLEANUP_FREE struct segment *room = malloc(2 * SEGMENTS_MAX * sizeof(*room));
    if (!room)
        return NULL;
    b.now = room;
    b.next = room + SEGMENTS_MAX;
    b.now[0] = (struct segment){.end = (uint32_t)(b.end - b.begin), .owner = UNKNOWN};
    int r = build_segments(&b);
    if (r == -ENOMEM)
        return NULL;
    uint32_t n = r == 0 ? b.n : 0;
    struct window *w = malloc(sizeof(*w) + n * sizeof(struct segment));
    if (!w)
        return NULL;
    w->number = number;
    w->n = n;
    w->until = n == 1 ? dr_min(dr_max(b.end, b.reach), ix->size) : b.end;
    memcpy(w->segments, b.now, n * sizeof(struct segment));
    return w;
}

/* ------------------------------------------------------------------ keep it */

/* all_lock held. Several disks have to do with the budget, so no slots take more than an eighth. */
static bool make_slots(struct dr_index *ix)
{
    uint64_t most = dr_cache_limit(DR_CACHE_INDEX) / 8 / sizeof(struct window *);
    size_t n = 1;
    if (ix->slots)
        return true;
    while (n < SLOTS_MAX && n < dr_div_up(ix->size, WINDOW) && 2 * n <= most)
        n *= 2;
    struct slots *slots = make_room(ix, slots_bytes(n)) ? calloc(1, slots_bytes(n)) : NULL;
    if (!slots)
        return false;
    slots->n = n;
    all_bytes += slots_bytes(n);
    list_add_newest(ix);
    atomic_store(&ix->slots, slots);
    return true;
}

/* Takes over the window. What was in its slot goes; without room it goes itself. */
static void keep(struct dr_index *ix, struct window *w)
{
    struct window *old = w;
    pthread_mutex_lock(&all_lock);
    if (make_slots(ix) && make_room(ix, window_bytes(w))) {
        struct slots *slots = ix->slots;
        all_bytes += window_bytes(w);
        old = atomic_exchange(&slots->at[w->number & (slots->n - 1)], w);
        if (old) {
            all_bytes -= window_bytes(old);
            dr_epoch_drain(ix->readers);
        }
        list_remove(ix);
        list_add_newest(ix);
    }
    pthread_mutex_unlock(&all_lock);
    free(old);
}

/* ------------------------------------------------------------------ look-up */

static bool usable(struct dr_index *ix)
{
    unsigned now = atomic_load(&thawings);
    if (atomic_load(&ix->checked) != now) {
        if (count_thaws(ix) != ix->thaws)
            atomic_store(&ix->stale, true);
        atomic_store(&ix->checked, now);
    }
    return !atomic_load(&ix->stale);
}

struct dr_index *dr_index_at(struct dr_index *list, size_t i)
{
    while (list && (i < list->first || i >= list->last))
        list = list->next;
    return list && usable(list) ? list : NULL;
}

static bool search(const struct window *w, uint64_t off, size_t *owner, uint64_t *until)
{
    uint64_t begin = w->number * WINDOW;
    uint32_t low = 0, high = w->n - 1, at = (uint32_t)(off - begin);
    if (w->n == 0)
        return false;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        if (w->segments[mid].end <= at)
            low = mid + 1;
        else
            high = mid;
    }
    *owner = w->segments[low].owner;
    *until = w->n == 1 ? w->until : begin + w->segments[low].end;
    return true;
}

/* *known: there is a window, of which nothing may be known. */
static bool find(struct dr_index *ix, uint64_t off, size_t *owner, uint64_t *until, bool *known)
{
    bool found = false;
    uint64_t number = off / WINDOW;
    uint64_t lowest = atomic_load_explicit(&ix->lowest, memory_order_relaxed);
    if (lowest >> off / ix->chunk & 1) {
        *owner = ix->last - 1;
        *until = dr_min(end_of_chunks(ix, lowest, off), ix->size);
        *known = true;
        return true;
    }
    unsigned ticket = dr_epoch_enter(ix->readers);
    struct slots *slots = atomic_load(&ix->slots);
    const struct window *w = slots ? atomic_load(&slots->at[number & (slots->n - 1)]) : NULL;
    *known = w && w->number == number;
    if (*known)
        found = search(w, off, owner, until);
    dr_epoch_leave(ix->readers, ticket);
    return found;
}

uint64_t dr_index_reach(struct dr_index *ix, uint64_t off, uint64_t len)
{
    size_t owner;
    uint64_t until = (off / WINDOW + 1) * WINDOW;
    bool known;
    if (len <= until - off)
        return len;
    if (off < ix->size)
        find(ix, off, &owner, &until, &known);
    return dr_min(len, until - off);
}

bool dr_index_find(struct dr_index *ix, size_t from, uint64_t off, size_t *owner, uint64_t *len)
{
    uint64_t until;
    bool known, found;
    if (off >= ix->size)
        return false;
    found = find(ix, off, owner, &until, &known);
    if (!known) {
        struct window *w = build_window(ix, off / WINDOW);
        if (!w)
            return false;
        found = search(w, off, owner, &until);
        keep(ix, w);
    }
    if (!found || *owner < from)
        return false;
    *len = dr_min(*len, until - off);
    return true;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"

void workload_init(struct workload *w, const struct subject *s, struct dr_fs *fs,
                   struct shadow *view, const uint8_t *below)
{
    *w = (struct workload){.subject = s, .fs = fs, .view = view, .below = below, .align = 1};
    w->buf = malloc(s->size + 1);
    assert_non_null(w->buf);
}

void workload_free(struct workload *w)
{
    free(w->buf);
    w->buf = NULL;
}

const char *op_text(const struct op *op)
{
    static const char *const names[] = {"write",       "zero",  "zero+unmap", "zero+explicit",
                                        "discard",     "flush", "fill",       "drop",
                                        "write coded", "read",  "status",     "reopen"};
    static _Thread_local char text[80];
    snprintf(text, sizeof(text), "%s %llu+%llu", names[op->kind], (unsigned long long)op->off,
             (unsigned long long)op->len);
    return text;
}

/* ------------------------------------------------------------------ choosing */

static enum op_kind choose_kind(struct rnd *rnd)
{
    static const uint8_t weights[OP_KINDS] = {
        [OP_WRITE] = 40,  [OP_ZERO] = 6,  [OP_ZERO_UNMAP] = 6, [OP_ZERO_EXPLICIT] = 6,
        [OP_DISCARD] = 6, [OP_FLUSH] = 8, [OP_FILL] = 6,       [OP_DROP] = 5,
        [OP_CODED] = 5,   [OP_READ] = 8,  [OP_STATUS] = 3,     [OP_REOPEN] = 1,
    };
    unsigned pick = (unsigned)rnd_below(rnd, 100), sum = 0;
    for (enum op_kind k = 0; k < OP_KINDS; k++)
        if (pick < (sum += weights[k]))
            return k;
    return OP_WRITE;
}

/* The unit of the top image; while that is not open, the toy's. */
static void unit_at(const struct workload *w, uint64_t off, uint64_t *start, uint64_t *len)
{
    struct dr_pass pass;
    *start = dr_round_down(off, 4096);
    *len = 4096;
    if (!w->disk)
        return;
    struct dr_image *top = dr_disk_enter(w->disk, &pass)->images[0];
    top->fmt->unit(top, off, start, len);
    dr_disk_leave(w->disk, &pass);
}

struct op workload_next(const struct workload *w, struct rnd *rnd)
{
    static const uint32_t longest[] = {512, 700, 4096, 9000, 65536, 70000, 200000};
    uint64_t size = w->view->size;
    uint64_t max = dr_min(longest[rnd_below(rnd, 7)], size);
    struct op op = {.kind = choose_kind(rnd), .seed = rnd_next(rnd)};
    op.data = (unsigned)rnd_below(rnd, 6);
    op.data = op.data < 3 ? op.data : 0;
    op.len = 1 + rnd_below(rnd, max);
    op.off = rnd_below(rnd, size - op.len + 1);
    switch (rnd_below(rnd, 6)) {
    case 0: /* up to the very end */
        op.off = size - op.len;
        break;
    case 1: /* whole units */
        op.len = dr_max(dr_round_down(op.len, 4096), dr_min(4096, size));
        op.off = dr_round_down(rnd_below(rnd, size - op.len + 1), 4096);
        break;
    case 2: /* whole sectors */
        op.len = dr_max(dr_round_down(op.len, 512), dr_min(512, size));
        op.off = dr_round_down(rnd_below(rnd, size - op.len + 1), 512);
        break;
    default:
        break;
    }
    if (op.kind == OP_CODED) {
        unit_at(w, op.off, &op.off, &op.len);
        op.len = dr_min(op.len, size - op.off);
        op.data = 2;
    } else if (w->align > 1) {
        op.off = dr_round_down(op.off, w->align);
        op.len = dr_min(dr_round_up(op.len, w->align), size - op.off);
    }
    return op;
}

/* ------------------------------------------------------------------ running one */

static void make_data(struct workload *w, const struct op *op)
{
    struct rnd rnd = {op->seed};
    if (op->data == 0)
        rnd_fill(&rnd, w->buf, op->len);
    else
        memset(w->buf, op->data == 1 ? 0 : (int)(1 + rnd_below(&rnd, 255)), op->len);
}

static int run_zero(struct workload *w, const struct op *op)
{
    static const unsigned flags[] = {0, DR_MAY_UNMAP, DR_EXPLICIT};
    shadow_zero(w->view, op->off, op->len);
    return dr_zero(w->disk, op->off, op->len, flags[op->kind - OP_ZERO], &w->err);
}

/* Zeros or as before, and never what the base has. */
static int run_discard(struct workload *w, const struct op *op)
{
    CLEANUP_FREE uint8_t *old = malloc(op->len + 1);
    memcpy(old, w->view->now + op->off, op->len);
    shadow_zero(w->view, op->off, op->len);
    int r = dr_discard(w->disk, op->off, op->len, &w->err);
    if (r)
        return r;
    r = dr_pread(w->disk, w->buf, op->off, op->len, &w->err);
    for (uint64_t i = 0; !r && i < op->len; i++)
        if (w->buf[i] && w->buf[i] != old[i])
            MODEL_FAIL(w->subject, "%s: byte %llu became %02x", op_text(op),
                       (unsigned long long)(op->off + i), w->buf[i]);
    if (!r) /* a sector may be in part zeros, in part old: both are fine from now on */
        shadow_write(w->view, op->off, w->buf, op->len);
    return r;
}

/* As stream does: what shows through becomes the image's own; nothing changes. */
static int run_fill(struct workload *w, const struct op *op)
{
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(w->disk, &pass);
    int r = dr_chain_fill(chain, 0, w->view->now + op->off, op->off, op->len, &w->err);
    dr_disk_leave(w->disk, &pass);
    return r;
}

/* Where the top has nothing, the base must show now; elsewhere nothing has changed. */
static int settle_drop(struct workload *w, struct dr_image *top, const struct op *op)
{
    for (uint64_t off = op->off, end = op->off + op->len; off < end;) {
        struct dr_extent ext;
        int r = dr_image_map(top, off, end - off, &ext, &w->err);
        if (r)
            return r;
        if (ext.kind == DR_HOLE && w->below)
            shadow_write(w->view, off, w->below + off, ext.len);
        else if (ext.kind == DR_HOLE)
            shadow_zero(w->view, off, ext.len);
        off += ext.len;
    }
    return 0;
}

static int run_drop(struct workload *w, const struct op *op)
{
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(w->disk, &pass);
    uint64_t uoff, ulen;
    CLEANUP_FREE uint8_t *zeros = calloc(1, op->len + 1);
    shadow_may(w->view, op->off, w->below ? w->below + op->off : zeros, op->len);
    int r = dr_chain_drop(chain, 0, op->off, op->len, &w->err);
    if (r == -ENOTSUP)
        dr_error_reset(&w->err);
    if (!r) {
        struct dr_extent ext;
        chain->images[0]->fmt->unit(chain->images[0], op->off, &uoff, &ulen);
        if (uoff == op->off && ulen <= op->len)
            r = dr_image_map(chain->images[0], uoff, ulen, &ext, &w->err);
        if (!r && uoff == op->off && ulen <= op->len && ext.kind != DR_HOLE)
            MODEL_FAIL(w->subject, "%s left something", op_text(op));
        if (!r)
            r = settle_drop(w, chain->images[0], op);
    }
    dr_disk_leave(w->disk, &pass);
    return r == -ENOTSUP ? 0 : r;
}

/* Compressed units are whole ones of a format that has them. */
static bool takes_coded(const struct dr_image *top, const struct op *op)
{
    uint64_t uoff, ulen;
    if (!top->fmt->encode || !strcmp(top->fmt->name, "vma") ||
        (top->n_files > 1 && strcmp(top->fmt->name, "toy")))
        return false;
    top->fmt->unit(top, op->off, &uoff, &ulen);
    return op->off == uoff && op->len == dr_min(ulen, top->size - uoff);
}

static int run_coded(struct workload *w, const struct op *op)
{
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(w->disk, &pass);
    struct dr_image *top = chain->images[0];
    int r = 0;
    if (takes_coded(top, op)) {
        uint8_t *coded = malloc(op->len + 4096);
        int64_t n = top->fmt->encode(top, w->buf, op->len, op->off, coded, op->len + 4096);
        assert_true(n > 0);
        shadow_write(w->view, op->off, w->buf, op->len);
        r = dr_chain_write_coded(chain, 0, coded, (uint32_t)n, op->off, op->len, &w->err);
        free(coded);
    }
    dr_disk_leave(w->disk, &pass);
    return r;
}

static int run_read(struct workload *w, const struct op *op)
{
    int r = dr_pread(w->disk, w->buf, op->off, op->len, &w->err);
    if (!r && memcmp(w->buf, w->view->now + op->off, op->len))
        MODEL_FAIL(w->subject, "%s: wrong content", op_text(op));
    return r;
}

static int check_status(struct workload *w, const struct dr_extent_status *st)
{
    if (st->flags & DR_EXTENT_ZERO && !dr_is_zero(w->view->now + st->off, st->len))
        MODEL_FAIL(w->subject, "status says zero at %llu+%llu and it is not",
                   (unsigned long long)st->off, (unsigned long long)st->len);
    if (!(st->flags & DR_EXTENT_OFFSET))
        return 0;
    struct dr_file *f;
    int r = dr_file_open(w->fs, st->file, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &f, &w->err);
    if (!r) {
        r = dr_file_pread_short(f, w->buf, st->host_off, st->len, NULL, &w->err);
        dr_file_unref(f);
    }
    if (!r && memcmp(w->buf, w->view->now + st->off, st->len))
        MODEL_FAIL(w->subject, "status says %s has %llu+%llu at %llu and it has not", st->file,
                   (unsigned long long)st->off, (unsigned long long)st->len,
                   (unsigned long long)st->host_off);
    return r;
}

static int run_status(struct workload *w)
{
    for (uint64_t off = 0; off < w->view->size;) {
        struct dr_extent_status st;
        uint64_t len = w->view->size - off;
        int r = dr_block_status(w->disk, off, len, &st, &w->err);
        if (r)
            return r;
        if (st.off != off || !st.len || st.len > len)
            MODEL_FAIL(w->subject, "status of %llu+%llu answers %llu+%llu", (unsigned long long)off,
                       (unsigned long long)len, (unsigned long long)st.off,
                       (unsigned long long)st.len);
        if ((r = check_status(w, &st)))
            return r;
        off += st.len;
    }
    return 0;
}

/* A second snapshot inside the image comes, or goes again: the disk shows what it did. */
static int toggle_snapshot(struct workload *w)
{
    struct dr_pass pass;
    struct dr_image *top = dr_disk_enter(w->disk, &pass)->images[0];
    int r = dr_image_snapshot_delete(top, "2", &w->err);
    if (r == -ENOENT) {
        dr_error_reset(&w->err);
        r = dr_image_snapshot_create(top, "second", &w->err);
    }
    dr_disk_leave(w->disk, &pass);
    return r;
}

static int run_reopen(struct workload *w)
{
    int r = w->subject->snapshot ? toggle_snapshot(w) : 0;
    if (r)
        return r;
    r = workload_close(w);
    if (!r)
        shadow_flushed(w->view);
    int again = workload_open(w, DR_OPEN_RDWR);
    return r ? r : again;
}

int workload_run(struct workload *w, const struct op *op)
{
    int r;
    dr_error_reset(&w->err);
    if (op->kind == OP_WRITE || op->kind == OP_CODED)
        make_data(w, op);
    switch (op->kind) {
    case OP_WRITE:
        shadow_write(w->view, op->off, w->buf, op->len);
        return dr_pwrite(w->disk, w->buf, op->off, op->len, 0, &w->err);
    case OP_ZERO:
    case OP_ZERO_UNMAP:
    case OP_ZERO_EXPLICIT:
        return run_zero(w, op);
    case OP_DISCARD:
        return run_discard(w, op);
    case OP_FLUSH:
        r = dr_flush(w->disk, &w->err);
        if (!r)
            shadow_flushed(w->view);
        return r;
    case OP_FILL:
        return run_fill(w, op);
    case OP_DROP:
        return run_drop(w, op);
    case OP_CODED:
        return run_coded(w, op);
    case OP_READ:
        return run_read(w, op);
    case OP_STATUS:
        return run_status(w);
    default:
        return run_reopen(w);
    }
}

void workload_settle(struct workload *w, const struct op *op)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t bad, from = dr_round_down(op->off, SHADOW_SECTOR);
    uint64_t len = dr_min(dr_round_up(op->off + op->len, SHADOW_SECTOR), w->view->size) - from;
    if (!op->len)
        return;
    if (dr_pread(w->disk, w->buf, from, len, &err))
        MODEL_FAIL(w->subject, "read after a failed %s: %s", op_text(op), err.text);
    if (!shadow_settle(w->view, from, w->buf, len, &bad))
        MODEL_FAIL(w->subject, "after a failed %s the sector at %llu is neither old nor new",
                   op_text(op), (unsigned long long)bad);
}

void workload_verify(struct workload *w, const char *when)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t bad;
    if (dr_size(w->disk) != w->view->size)
        MODEL_FAIL(w->subject, "%s: the size is %llu", when, (unsigned long long)dr_size(w->disk));
    if (dr_pread(w->disk, w->buf, 0, w->view->size, &err))
        MODEL_FAIL(w->subject, "%s: %s", when, err.text);
    if (!shadow_same(w->view, w->buf, &bad))
        MODEL_FAIL(w->subject, "%s: byte %llu is %02x, not %02x", when, (unsigned long long)bad,
                   w->buf[bad], w->view->now[bad]);
}

int workload_open(struct workload *w, unsigned flags)
{
    return model_open(w->fs, w->subject, flags, &w->disk, &w->err);
}

int workload_close(struct workload *w)
{
    struct dr_disk *disk = w->disk;
    w->disk = NULL;
    return dr_close(disk, &w->err);
}

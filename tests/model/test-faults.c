/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Every single I/O of a run fails in turn. After the failure each sector is old or new; what did
 * not fail holds; and once closed and opened again the image is sound. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "faultfs.h"
#include "model.h"
#include "plant.h"

#define OPS 30

struct run {
    const struct subject *s;
    struct dr_fs *memory;
    struct faultfs *faults;
    struct shadow view;
    uint8_t *below, *base;
    struct workload w;
    struct op ops[OPS];
    uint64_t nth;
    bool broken; /* a flush failed: only a reopen helps */
    bool failed;
};

static const char *run_text(const struct run *r, const char *what)
{
    static char text[3000];
    snprintf(text, sizeof(text), "I/O %llu failed, %s: %s", (unsigned long long)r->nth, what,
             r->w.err.text);
    return text;
}

static void run_setup(struct run *r, const struct subject *s, uint64_t nth)
{
    struct rnd rnd = {model_seed()};
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size;
    *r = (struct run){.s = s, .nth = nth};
    r->memory = dr_fs_memory_new();
    subject_make(s, r->memory, &rnd, &r->view, &r->below);
    if (s->base_format)
        r->base = model_read_all(r->memory, subject_base(s), s->base_format, &size, &err);
    r->faults = faultfs_new(r->memory);
    workload_init(&r->w, s, faultfs_fs(r->faults), &r->view, s->base_format ? r->below : NULL);
    for (int i = 0; i < OPS; i++) {
        r->ops[i] = workload_next(&r->w, &rnd);
        if (i == OPS / 2)
            r->ops[i].kind = OP_FLUSH;
    }
}

static void run_free(struct run *r)
{
    workload_free(&r->w);
    shadow_free(&r->view);
    free(r->below);
    free(r->base);
    faultfs_free(r->faults);
    dr_fs_memory_free(r->memory);
}

static struct faultfs_plan plan_for(const struct subject *s, uint64_t nth)
{
    struct faultfs_plan plan = {.nth = nth};
    if (s->fill) { /* the file has to grow, tables and all */
        plan.error = ENOSPC;
        plan.for_good = nth % 2;
        return plan;
    }
    switch (nth % 4) {
    case 0:
        plan.error = EIO;
        break;
    case 1:
        plan.error = ENOSPC;
        break;
    case 2:
        plan.error = EIO;
        plan.partial = true;
        plan.seed = nth;
        break;
    default:
        plan.error = EIO;
        plan.for_good = true;
        break;
    }
    return plan;
}

static void op_failed(struct run *r, const struct op *op)
{
    r->failed = true;
    if (!faultfs_fired(r->faults))
        MODEL_FAIL(r->s, "no I/O has failed, yet %s: %s", op_text(op), r->w.err.text);
    faultfs_disarm(r->faults); /* from here on the disk works again */
    if (op->kind == OP_FLUSH || op->kind == OP_REOPEN)
        r->broken = true;
    else if (r->w.disk)
        workload_settle(&r->w, op);
}

/* The image works, or says that it does not. */
static void run_ops(struct run *r)
{
    bool before = false;
    for (int i = 0; i < OPS && r->w.disk && !r->broken; i++) {
        if (!workload_run(&r->w, &r->ops[i]))
            continue;
        if (r->failed && !before) { /* a failure inside a write may have been a flush's */
            before = true;
            if (r->w.disk)
                workload_settle(&r->w, &r->ops[i]);
            r->broken = true;
        } else {
            op_failed(r, &r->ops[i]);
        }
    }
}

static void check_sound(struct run *r, bool leaks_allowed)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_check_result result;
    if (model_check(r->memory, r->s, 0, &result, &err))
        MODEL_FAIL(r->s, "I/O %llu failed, check: %s", (unsigned long long)r->nth, err.text);
    if (result.corruptions || result.check_errors)
        MODEL_FAIL(r->s, "I/O %llu failed: %llu corruptions", (unsigned long long)r->nth,
                   (unsigned long long)result.corruptions);
    if (result.leaks && !leaks_allowed)
        MODEL_FAIL(r->s, "I/O %llu failed: %llu leaks without a crash", (unsigned long long)r->nth,
                   (unsigned long long)result.leaks);
}

static void check_base(struct run *r)
{
    struct dr_error err = DR_ERROR_INIT;
    uint64_t size;
    if (!r->base)
        return;
    CLEANUP_FREE uint8_t *now =
        model_read_all(r->memory, subject_base(r->s), r->s->base_format, &size, &err);
    if (!now || memcmp(now, r->base, r->s->base_size))
        MODEL_FAIL(r->s, "%s", run_text(r, "the base has changed"));
}

/* Read-only first: no repair is needed to read. */
static void check_content(struct run *r, bool exact)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    uint64_t size, bad;
    CLEANUP_FREE uint8_t *all =
        model_read_all(r->memory, subject_top(r->s), r->s->format, &size, &err);
    if (!all)
        MODEL_FAIL(r->s, "I/O %llu failed, reopen: %s", (unsigned long long)r->nth, err.text);
    if (exact ? !shadow_same(&r->view, all, &bad) : !shadow_allows(&r->view, all, &bad))
        MODEL_FAIL(r->s, "I/O %llu failed: after the reopen byte %llu is %s",
                   (unsigned long long)r->nth, (unsigned long long)bad,
                   exact ? "wrong" : "neither old nor new");
    if (model_open(r->memory, r->s, DR_OPEN_RDWR, &disk, &err) ||
        dr_pread(disk, r->w.buf, 0, size, &err) || dr_close(disk, &err))
        MODEL_FAIL(r->s, "I/O %llu failed, open for writing: %s", (unsigned long long)r->nth,
                   err.text);
    if (memcmp(all, r->w.buf, size))
        MODEL_FAIL(r->s, "I/O %llu failed: recovery changed the content",
                   (unsigned long long)r->nth);
}

/* False: the n-th I/O is beyond the end of the run. */
static bool fail_nth(const struct subject *s, uint64_t nth)
{
    struct run r;
    run_setup(&r, s, nth);
    struct faultfs_plan plan = plan_for(s, nth);
    faultfs_arm(r.faults, &plan);
    bool opened = !workload_open(&r.w, DR_OPEN_RDWR);
    if (opened)
        run_ops(&r);
    else
        r.failed = true;
    bool closed_well = !r.w.disk || !workload_close(&r.w);
    bool fired = faultfs_fired(r.faults) || r.failed;
    if (!closed_well && !fired)
        MODEL_FAIL(s, "close: %s", r.w.err.text);
    if (!fired && !closed_well)
        r.failed = true;
    faultfs_disarm(r.faults);
    check_content(&r, closed_well && !r.broken);
    /* A failure nobody was told of was that of giving space back. */
    check_sound(&r, !closed_well || r.broken || (fired && !r.failed));
    check_base(&r);
    run_free(&r);
    return fired;
}

static void every_io_fails(void **state)
{
    const struct subject *s = *state;
    for (uint64_t nth = 0; fail_nth(s, nth); nth += SLOWER)
        ;
}

static void published_early(void **state)
{
    const struct subject *s = *state;
    plant_into(s->format, PLANT_EARLY_PUBLISH);
    every_io_fails(state);
}

static void early_publishing_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    if (!model_detects(published_early, *state))
        MODEL_FAIL(*state, "nobody noticed that units are published before their data");
}

static bool two_plain_ones(const struct subject *s)
{
    return !strcmp(s->name, "toy") || !strcmp(s->name, "add-cow-over-raw");
}

static void going_on_without_space(void **state)
{
    plant_into("qcow2", PLANT_NO_SPACE_IGNORED);
    every_io_fails(state);
}

static void ignored_lack_of_space_is_found(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    if (!model_detects(going_on_without_space, *state))
        MODEL_FAIL(*state, "nobody noticed that the refcount table has not grown");
}

static bool full_ones(const struct subject *s)
{
    return s->fill > 0;
}

int main(void)
{
    int r;
    if (MODEL_ONLY_PLANTS) {
        r = model_run("planted: no space for a larger refcount table",
                      ignored_lack_of_space_is_found, full_ones);
    } else {
        r = model_run("every single I/O fails", every_io_fails, NULL);
        r += model_run("planted: published before the data", early_publishing_is_found,
                       two_plain_ones);
    }
    return r ? 1 : 0;
}

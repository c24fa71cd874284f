/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* check: the descriptor against what the extents are. The lines of extents are what counts when a
 * disk is read; createType and ids are labels, and mended where the lines leave one answer. */
#include <inttypes.h>
#include <stdlib.h>
#include <strings.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/check.h"

struct text_check {
    struct dr_image *image;
    bool fix;
    struct dr_check_result *result;
};

static void count_text(const struct text_check *t, bool fixed)
{
    *(fixed ? &t->result->corruptions_fixed : &t->result->corruptions) += 1;
}

/* ------------------------------------------------------------------ createType */

/* Types of which all extents are of one kind. The others may be any mix. */
static const struct {
    const char *name;
    enum vmdk_extent_type extents;
    bool stream;
} types[] = {
    {"monolithicSparse", VMDK_SPARSE, false},   {"twoGbMaxExtentSparse", VMDK_SPARSE, false},
    {"2GbMaxExtentSparse", VMDK_SPARSE, false}, {"streamOptimized", VMDK_SPARSE, true},
    {"monolithicFlat", VMDK_FLAT, false},       {"twoGbMaxExtentFlat", VMDK_FLAT, false},
    {"2GbMaxExtentFlat", VMDK_FLAT, false},     {"vmfs", VMDK_VMFS, false},
    {"vmfsPreallocated", VMDK_VMFS, false},     {"vmfsThin", VMDK_VMFS, false},
    {"vmfsEagerZeroedThick", VMDK_VMFS, false}, {"vmfsThick", VMDK_VMFS, false},
};

/* Do all extents with data have the type, and are they streams or not as stream says? */
static bool all_are(const struct vmdk_state *s, enum vmdk_extent_type type, bool stream)
{
    for (size_t i = 0; i < s->n_extents; i++) {
        const struct vmdk_extent *e = &s->extents[i];
        if (e->type == VMDK_ZERO || e->type == VMDK_ABSENT)
            continue;
        if (e->type != type || (type == VMDK_SPARSE && vmdk_is_stream(e) != stream))
            return false;
    }
    return true;
}

/* The one type that fits what the extents are, or "custom". */
static const char *fitting_type(const struct vmdk_state *s)
{
    bool one = s->n_extents == 1;
    if (all_are(s, VMDK_SPARSE, true))
        return "streamOptimized";
    if (all_are(s, VMDK_SPARSE, false))
        return s->embedded && one ? "monolithicSparse" : "twoGbMaxExtentSparse";
    if (all_are(s, VMDK_FLAT, false))
        return one ? "monolithicFlat" : "twoGbMaxExtentFlat";
    return all_are(s, VMDK_VMFS, false) ? "vmfs" : "custom";
}

/* VMFS is what ESX calls a flat extent, and some programs mix the two words up: the data is read in
 * the same way. */
static bool is_another_word(const struct vmdk_state *s, enum vmdk_extent_type type)
{
    return (type == VMDK_VMFS && all_are(s, VMDK_FLAT, false)) ||
           (type == VMDK_FLAT && all_are(s, VMDK_VMFS, false));
}

static int check_type(const struct text_check *t, struct vmdk_desc *d, bool *edited,
                      struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(t->image);
    CLEANUP_FREE char *type = vmdk_desc_get(d, "createType");
    for (size_t i = 0; type && i < sizeof(types) / sizeof(types[0]); i++) {
        if (strcasecmp(types[i].name, type) != 0 || all_are(s, types[i].extents, types[i].stream))
            continue;
        const char *right = fitting_type(s);
        bool harmless = is_another_word(s, types[i].extents);
        /* A stream is not written again. */
        bool fix = t->fix && vmdk_refuse_streams(t->image, NULL) == 0;
        vmdk_say(t->result, t->image->path,
                 "createType is \"%s\", but by its extents the disk is \"%s\"%s", type, right,
                 harmless && fix ? "; it becomes that" : "");
        if (!harmless)
            count_text(t, fix);
        *edited |= fix;
        return fix ? vmdk_desc_set(d, "createType", right, true, NULL, err) : 0;
    }
    return 0;
}

/* ------------------------------------------------------------------ content ids */

/* VMware's long id ends in the CID. A program that knows only the CID leaves an old one, and
 * VMware's exports never had it, so that is told, and does no harm. */
static int check_long_id(const struct text_check *t, struct vmdk_desc *d, bool *edited,
                         struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(t->image);
    CLEANUP_FREE char *id = vmdk_desc_get(d, "ddb.longContentID");
    if (!id || strlen(id) != 32 || vmdk_cid_is_reserved(s->cid) || all_are(s, VMDK_SPARSE, true) ||
        strtoul(id + 24, NULL, 16) == s->cid)
        return 0;
    vmdk_say(t->result, t->image->path,
             "ddb.longContentID ends in %s, the CID is %08" PRIx32
             ": it is stale, another program has changed the CID since%s",
             id + 24, s->cid, t->fix ? "; it gets a new one" : "");
    if (!t->fix)
        return 0;
    *edited = true;
    return vmdk_desc_renew_long_id(d, s->cid, err);
}

/* ------------------------------------------------------------------ sizes and places */

/* The line says the size, the header how much its tables are for. Less was refused at opening. */
static void check_capacity(const struct text_check *t, const struct vmdk_extent *e)
{
    uint64_t line = e->len / VMDK_SECTOR, slack = dr_max(e->h.grain, 128); /* VirtualBox rounds */
    if (dr_round_up(e->h.capacity, e->h.grain) <= dr_round_up(line, slack))
        return;
    vmdk_say(t->result, vmdk_extent_path(t->image, e),
             "the header says %" PRIu64 " sectors, the descriptor %" PRIu64
             ": what is behind them is not part of the disk",
             e->h.capacity, line);
}

static int report_overlap(void *user, const struct vmdk_extent *a, const struct vmdk_extent *b,
                          struct dr_error *err)
{
    const struct text_check *t = user;
    uint64_t end = dr_min(a->host + a->len, b->host + b->len);
    (void)err;
    vmdk_say(t->result, t->image->files[a->file]->path,
             "the extents of guest offsets %" PRIu64 " and %" PRIu64 " share the bytes %" PRIu64
             " to %" PRIu64 ": a write to one changes the other",
             a->start, b->start, b->host, end - 1);
    count_text(t, false);
    return 0;
}

/* ------------------------------------------------------------------ all together */

static int check_lines(const struct text_check *t, struct dr_error *err)
{
    struct vmdk_desc d;
    bool edited = false;
    int r = vmdk_desc_copy(t->image, &d, err);
    if (r < 0)
        return r;
    r = check_type(t, &d, &edited, err);
    if (r == 0)
        r = check_long_id(t, &d, &edited, err);
    if (r == 0 && edited)
        r = vmdk_store(t->image, &d, 0, err);
    vmdk_desc_free(&d);
    return r;
}

int vmdk_check_text(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                    struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    struct text_check t = {
        .image = image, .fix = (fix & DR_CHECK_FIX_ALL) == DR_CHECK_FIX_ALL, .result = result};
    int r = check_lines(&t, err);
    for (size_t i = 0; r == 0 && i < s->n_extents; i++)
        if (s->extents[i].type == VMDK_SPARSE)
            check_capacity(&t, &s->extents[i]);
    return r < 0 ? r : vmdk_each_overlap(image, report_overlap, &t, err);
}

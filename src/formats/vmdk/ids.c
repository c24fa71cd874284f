/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Content ids and the mark of being written.
 *
 * A VMDK's CID changes with the first change of its content after an open; its children remember
 * the one they were made on. The new CID is durable before the first changed byte: a crash may turn
 * children away needlessly, never the reverse. */
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/notice.h"
#include "formats/vmdk/cowd.h"

uint32_t vmdk_id(const struct dr_image *image)
{
    return vmdk_of(image)->cid;
}

uint32_t vmdk_parent_id(const struct dr_image *image)
{
    return vmdk_of(image)->parent_cid;
}

bool vmdk_is(const struct dr_image *image)
{
    return image->fmt == &dr_format_vmdk;
}

/* ------------------------------------------------------------------ the unclean byte */

int vmdk_mark(struct dr_image *image, struct vmdk_extent *e, bool unclean, bool changes,
              struct dr_error *err)
{
    uint8_t buf[VMDK_HEADER_SIZE];
    struct dr_file *f = image->files[e->file];
    if (e->h.cowd)
        return vmdk_cowd_mark(image, e, unclean, err);
    int r = dr_file_pread(f, buf, 0, sizeof(buf), err);
    if (r < 0)
        return r;
    buf[VMDK_UNCLEAN_AT] = unclean;
    /* 3 means that a change-tracking file is kept, which we do not. */
    if (changes && get_le32(buf + VMDK_VERSION_AT) == 3)
        put_le32(buf + VMDK_VERSION_AT, vmdk_has_zero_grains(e) ? 2 : 1);
    r = dr_file_pwrite(f, buf, 0, sizeof(buf), err);
    if (r == 0)
        e->h.unclean = unclean;
    return r;
}

/* With its id, a parent that was found by its UUID gets a name: one goes with the other. */
static int edit_parent_id(const struct dr_image *image, struct vmdk_desc *d, uint32_t id,
                          struct dr_error *err)
{
    char text[9];
    snprintf(text, sizeof(text), "%08x", id);
    int r = vmdk_desc_set(d, "parentCID", text, false, "CID", err);
    if (r < 0 || !vmdk_of(image)->by_uuid)
        return r;
    return vmdk_desc_set(d, "parentFileNameHint", image->backing_name, true, "createType", err);
}

static int store_cid(struct dr_image *image, uint32_t cid, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    struct vmdk_desc d;
    CLEANUP_FREE char *tracking = vmdk_desc_get(&s->desc, "changeTrackPath");
    int r = vmdk_desc_copy(image, &d, err);
    if (r < 0)
        return r;
    r = vmdk_desc_set_cid(&d, cid, err);
    if (r == 0 && s->parent_moved)
        r = edit_parent_id(image, &d, s->parent_now, err);
    if (r == 0)
        r = vmdk_store(image, &d, VMDK_STORE_ANY_MIX, err);
    vmdk_desc_free(&d);
    if (r < 0)
        return r;
    if (tracking)
        dr_notice("%s: VMware's change tracking (%s) would miss what is written now, and is "
                  "switched off: the next incremental backup has to be a full one",
                  image->path, tracking);
    s->cid = cid;
    s->cid_changed = true;
    if (s->parent_moved) {
        s->parent_cid = s->parent_now;
        s->by_uuid = false;
    }
    s->parent_moved = false;
    return 0;
}

static int renew_cid(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    const struct vmdk_line *l = vmdk_desc_find(&s->desc, "CID");
    uint32_t cid;
    do {
        /* Seven digits stay seven: the text must not move. */
        cid = vmdk_random_cid(l ? l->value_len : 8);
    } while (cid == s->cid);
    return store_cid(image, cid, err);
}

static bool can_be_marked(const struct vmdk_extent *e)
{
    return e->type == VMDK_SPARSE && e->access == VMDK_RW;
}

/* The mark of one extent and, asked, a new CID; one flush where both are in one file. */
static int begin_extent(struct dr_image *image, struct vmdk_extent *e, bool changes,
                        struct dr_error *err)
{
    bool mark = e && can_be_marked(e) && !atomic_load(&e->marked);
    int r = mark ? vmdk_mark(image, e, true, changes, err) : 0;
    if (r == 0 && changes && !vmdk_of(image)->cid_changed)
        r = renew_cid(image, err);
    if (r == 0 && mark)
        r = dr_file_flush(image->files[e->file], err);
    if (r == 0 && mark)
        atomic_store(&e->marked, true);
    return r;
}

int vmdk_begin_write(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err)
{
    struct vmdk_extent *e = off < image->size ? vmdk_extent_at(image, off) : NULL;
    /* Before the CID is a new one: what is refused changes nothing. */
    int r = vmdk_refuse_streams(image, err);
    if (r == 0)
        r = vmdk_refuse_locked(image, err);
    if (r == 0 && e && changes)
        r = vmdk_check_writable(image, e, off, err);
    return r < 0 ? r : begin_extent(image, e, changes, err);
}

/* Clear the mark and make that durable. */
static int unmark(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    if (!atomic_load(&e->marked))
        return 0;
    int r = vmdk_tidy(image, e, err);
    if (r == 0 && e->h.cowd)
        r = vmdk_cowd_settle(image, e, err);
    if (r < 0 || e->torn)
        return r;
    atomic_store(&e->marked, false); /* also after a failure: the mark may be gone, or not */
    r = vmdk_mark(image, e, false, false, err);
    return r < 0 ? r : dr_file_flush(image->files[e->file], err);
}

int vmdk_end_write(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    for (size_t i = 0; i < s->n_extents; i++) {
        int r = unmark(image, &s->extents[i], err);
        if (r < 0)
            return r;
    }
    s->cid_changed = false;
    return 0;
}

/* ------------------------------------------------------------------ parents and commit */

/* The CID that a parent gets while `child` is committed into it. It follows from the child's ids,
 * so anybody who sees both images can tell that a commit was begun, and that no data was written
 * yet. */
uint32_t vmdk_commit_id(const struct dr_image *parent, const struct dr_image *child)
{
    (void)parent; /* its CID may be the new one already */
    uint8_t key[21] = "drover-commit";
    put_le32(key + 13, vmdk_parent_id(child));
    put_le32(key + 17, vmdk_id(child));
    uint64_t hash = XXH3_64bits(key, sizeof(key));
    while (vmdk_cid_is_reserved((uint32_t)hash))
        hash = XXH3_64bits(&hash, sizeof(hash));
    return (uint32_t)hash;
}

int vmdk_set_id(struct dr_image *image, uint32_t id, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    struct vmdk_extent *e = NULL;
    for (size_t i = 0; !e && i < s->n_extents; i++)
        if (can_be_marked(&s->extents[i]))
            e = &s->extents[i];
    if (vmdk_cid_is_reserved(id))
        return dr_fail(err, EINVAL, "%s: %08x cannot be a CID", image->path, id);
    int r = vmdk_refuse_streams(image, err);
    if (r == 0)
        r = vmdk_refuse_locked(image, err);
    if (r == 0)
        r = begin_extent(image, e, false, err);
    if (r == 0)
        atomic_fetch_or(&image->begun, 1); /* so that end_write takes the mark back */
    return r < 0 ? r : store_cid(image, id, err);
}

int vmdk_set_parent_id(struct dr_image *image, uint32_t id, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    struct vmdk_desc d;
    int r = vmdk_desc_copy(image, &d, err);
    if (r < 0)
        return r;
    r = edit_parent_id(image, &d, id, err);
    if (r == 0)
        r = vmdk_store(image, &d, 0, err);
    vmdk_desc_free(&d);
    if (r == 0) {
        s->parent_cid = id;
        s->by_uuid = false;
    }
    s->parent_moved = r < 0; /* the next CID takes it along */
    s->parent_now = id;
    return r;
}

int vmdk_check_parent_id(const struct dr_image *parent, struct dr_error *err)
{
    if (vmdk_id(parent) != VMDK_NO_PARENT)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: its CID is ffffffff, which in a child means that it has no parent; the "
                   "first write to the disk gives it another one",
                   parent->path);
}

int vmdk_check_backing(const struct dr_image *image, const struct dr_image *parent,
                       struct dr_error *err)
{
    if (!vmdk_is(parent))
        return dr_fail(err, EINVAL, "%s: its parent %s is %s, but a VMDK's parent must be a VMDK",
                       image->path, parent->path, parent->fmt->name);
    struct vmdk_state *s = vmdk_of(image);
    if (s->by_uuid)
        return vmdk_check_uuid(image, parent, err);
    uint32_t want = vmdk_parent_id(image), have = vmdk_id(parent);
    s->parent_moved = want != have && want != VMDK_NO_PARENT &&
                      have == vmdk_commit_id(parent, image);
    s->parent_now = have;
    if (want == have || s->parent_moved)
        return 0;
    if (s->bare && !vmdk_of(parent)->bare) /* a generation says nothing of a CID */
        return 0;
    return dr_fail(err, ESTALE,
                   "%s: was made on a parent with CID %08x, but the CID of %s is %08x: the parent "
                   "was changed since, or is another one; if you know that it is right, record it "
                   "anew: drover rebase -u -F vmdk -b %s %s",
                   image->path, want, parent->path, have,
                   image->backing_name ? image->backing_name : parent->path, image->path);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing a descriptor's text. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "base/random.h"
#include "formats/vmdk/descriptor.h"

int vmdk_desc_splice(struct vmdk_desc *d, size_t off, size_t len, const char *with,
                     struct dr_error *err)
{
    size_t n = strlen(with), total = d->len - len + n;
    CLEANUP_FREE char *text = malloc(total + 1);
    if (!text)
        return dr_fail_errno(err, ENOMEM, "VMDK descriptor");
    memcpy(text, d->text, off);
    memcpy(text + off, with, n);
    memcpy(text + off + n, d->text + off + len, d->len - off - len);
    struct vmdk_desc fresh;
    int r = vmdk_desc_parse(&fresh, "VMDK descriptor", text, total, err);
    if (r < 0)
        return r;
    vmdk_desc_free(d);
    *d = fresh;
    return 0;
}

static bool is_ddb(const struct vmdk_desc *d, const struct vmdk_line *l)
{
    return l->key_len > 4 && strncasecmp(d->text + l->key, "ddb.", 4) == 0;
}

/* The line behind which a new header key goes: some readers insist that all of them stand before
 * the extents. */
static const struct vmdk_line *last_header_line(const struct vmdk_desc *d)
{
    const struct vmdk_line *last = NULL;
    for (size_t i = 0; i < d->n_lines; i++) {
        const struct vmdk_line *l = &d->lines[i];
        if (l->kind == VMDK_LINE_EXTENT || (l->kind == VMDK_LINE_KEY && is_ddb(d, l)))
            break;
        if (l->kind == VMDK_LINE_KEY)
            last = l;
    }
    return last;
}

static bool uses_crlf(const struct vmdk_desc *d)
{
    return d->n_lines > 0 && d->lines[0].end - d->lines[0].off == d->lines[0].len + 2;
}

static int insert_line(struct vmdk_desc *d, const char *key, const char *value, bool quoted,
                       const char *after, struct dr_error *err)
{
    const struct vmdk_line *l = after ? vmdk_desc_find(d, after) : NULL;
    if (!l)
        l = last_header_line(d);
    size_t at = l ? l->end : 0;
    const char *eol = uses_crlf(d) ? "\r\n" : "\n", *quote = quoted ? "\"" : "";
    bool open_end = at > 0 && d->text[at - 1] != '\n'; /* the last line has no line end */
    CLEANUP_FREE char *line = NULL;
    if (asprintf(&line, "%s%s=%s%s%s%s", open_end ? eol : "", key, quote, value, quote,
                 open_end ? "" : eol) < 0) {
        line = NULL;
        return dr_fail_errno(err, ENOMEM, "VMDK descriptor");
    }
    return vmdk_desc_splice(d, at, 0, line, err);
}

int vmdk_desc_set(struct vmdk_desc *d, const char *key, const char *value, bool quoted,
                  const char *after, struct dr_error *err)
{
    if (strpbrk(value, "\"\r\n"))
        return dr_fail(err, EINVAL, "%s: a VMDK descriptor cannot hold a quote or a line end in %s",
                       value, key);
    const struct vmdk_line *l = vmdk_desc_find(d, key);
    if (!l)
        return insert_line(d, key, value, quoted, after, err);
    return vmdk_desc_splice(d, l->value, l->value_len, value, err);
}

/* Where the line of a new entry goes: in front of the first one that sorts behind it, else behind
 * the last one, else to the end. */
static size_t place_in_data_base(const struct vmdk_desc *d, const char *key)
{
    size_t at = d->len;
    for (size_t i = 0; i < d->n_lines; i++) {
        const struct vmdk_line *l = &d->lines[i];
        if (l->kind != VMDK_LINE_KEY || !is_ddb(d, l))
            continue;
        size_t n = strlen(key) < l->key_len ? strlen(key) : l->key_len;
        int order = strncasecmp(d->text + l->key, key, n);
        if (order > 0 || (order == 0 && l->key_len > n))
            return l->off;
        at = l->end;
    }
    return at;
}

int vmdk_desc_set_ddb(struct vmdk_desc *d, const char *key, const char *value, struct dr_error *err)
{
    CLEANUP_FREE char *line = NULL;
    if (vmdk_desc_find(d, key))
        return vmdk_desc_set(d, key, value, true, NULL, err);
    size_t at = place_in_data_base(d, key);
    const char *eol = uses_crlf(d) ? "\r\n" : "\n";
    bool open_end = at > 0 && d->text[at - 1] != '\n';
    if (strpbrk(value, "\"\r\n"))
        return dr_fail(err, EINVAL, "%s: a VMDK descriptor cannot hold a quote or a line end in %s",
                       value, key);
    if (asprintf(&line, "%s%s = \"%s\"%s", open_end ? eol : "", key, value, eol) < 0) {
        line = NULL;
        return dr_fail_errno(err, ENOMEM, "VMDK descriptor");
    }
    return vmdk_desc_splice(d, at, 0, line, err);
}

int vmdk_desc_remove(struct vmdk_desc *d, const char *key, struct dr_error *err)
{
    const struct vmdk_line *l = vmdk_desc_find(d, key);
    return l ? vmdk_desc_splice(d, l->off, l->end - l->off, "", err) : 0;
}

int vmdk_desc_comment_out(struct vmdk_desc *d, const char *key, struct dr_error *err)
{
    const struct vmdk_line *l = vmdk_desc_find(d, key);
    return l ? vmdk_desc_splice(d, l->off, 1, "#", err) : 0;
}

/* ------------------------------------------------------------------ content ids */

bool vmdk_cid_is_reserved(uint32_t cid)
{
    return cid == 0 || cid >= UINT32_C(0xfffffffe);
}

uint32_t vmdk_random_cid(size_t digits)
{
    uint32_t cid;
    do {
        cid = dr_random32();
        if (digits == 7)
            cid = (cid & 0x0fffffffu) | 0x01000000u;
    } while (vmdk_cid_is_reserved(cid));
    return cid;
}

int vmdk_desc_renew_long_id(struct vmdk_desc *d, uint32_t cid, struct dr_error *err)
{
    const struct vmdk_line *l = vmdk_desc_find(d, "ddb.longContentID");
    if (!l)
        return 0;
    if (l->value_len != 32)
        return vmdk_desc_comment_out(d, "ddb.longContentID", err);
    uint32_t r[3];
    char text[33];
    dr_random(r, sizeof(r));
    snprintf(text, sizeof(text), "%08x%08x%08x%08x", r[0], r[1], r[2], cid);
    return vmdk_desc_splice(d, l->value, l->value_len, text, err);
}

/* Changed-block tracking would miss our writes: the next incremental backup has to start anew. */
static int drop_change_tracking(struct vmdk_desc *d, struct dr_error *err)
{
    if (!vmdk_desc_find(d, "changeTrackPath"))
        return 0;
    int r = vmdk_desc_comment_out(d, "changeTrackPath", err);
    const struct vmdk_line *v = vmdk_desc_find(d, "version");
    if (r == 0 && v && d->text[v->value] == '3')
        r = vmdk_desc_splice(d, v->value, 1, "1", err);
    return r;
}

int vmdk_desc_set_cid(struct vmdk_desc *d, uint32_t cid, struct dr_error *err)
{
    char text[9];
    const struct vmdk_line *l = vmdk_desc_find(d, "CID");
    bool short_fits = l && l->value_len == 7 && cid >= 0x01000000u && cid <= 0x0fffffffu;
    snprintf(text, sizeof(text), short_fits ? "%07x" : "%08x", cid);
    int r = vmdk_desc_set(d, "CID", text, false, "version", err);
    if (r == 0)
        r = vmdk_desc_renew_long_id(d, cid, err);
    return r < 0 ? r : drop_change_tracking(d, err);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which format an image has, what stands in its place when it is none, and the unpacking of images
 * that a packer made smaller as a whole. */
#include <strings.h>

#include "base/notice.h"
#include "core/internal.h"
#include "storage/source.h"
#include "storage/unpacked.h"

#define HEAD 4096u /* bytes by which formats are known */

/* ------------------------------------------------------------------ what is no image */

/* Known by sight only. Taken for raw their container would be shown as the disk, with no word about
 * it. No LUKS of version 2: a guest may well have encrypted its whole disk. */
static const struct {
    const char *name;
    size_t at, len;
    const char *magic;
} foreign_images[] = {
    {"qcow", 0, 4, "QFI\xfb"},
    {"qed", 0, 4, "QED\0"},
    {"vhdx", 0, 8, "vhdxfile"},
    {"vpc", 0, 8, "conectix"},
    {"vdi", 64, 4, "\x7f\x10\xda\xbe"},
    {"parallels", 0, 16, "WithoutFreeSpace"},
    {"parallels", 0, 16, "WithouFreSpacExt"},
};

/* What people have under the name of an image, and what to do about it. */
static const struct {
    const char *name;
    size_t at, len;
    const char *magic, *hint;
} foreign_files[] = {
    {"a zip archive", 0, 4, "PK\3\4", "unpack it first (`unzip`)"},
    {"a zip archive", 0, 4, "PK\5\6", "unpack it first (`unzip`)"},
    {"a 7-Zip archive", 0, 6, "7z\xbc\xaf\x27\x1c", "unpack it first (`7z x`)"},
    {"a RAR archive", 0, 6, "Rar!\x1a\7", "unpack it first (`unrar x`)"},
    {"a tar archive", 257, 5, "ustar", "take the disk out first (`tar -xf`)"},
    {"a cabinet archive", 0, 8, "MSCF\0\0\0\0", "unpack it first (`cabextract`)"},
    {"an ar or Debian package", 0, 8, "!<arch>\n", "it holds no disk"},
    {"compressed by lzip", 0, 4, "LZIP", "unpack it first (`lzip -d`)"},
    {"compressed by lzma", 0, 5, "\x5d\0\0\x80\0", "unpack it first (`unlzma`)"},
    {"compressed by compress", 0, 3, "\x1f\x9d\x90", "unpack it first (`uncompress`)"},
    {"compressed by lrzip", 0, 4, "LRZI", "unpack it first (`lrzip -d`)"},
    {"a PDF document", 0, 5, "%PDF-", "it holds no disk"},
    {"a pointer of Git LFS", 0, 34, "version https://git-lfs.github.com",
     "what it stands for comes by `git lfs pull`"},
};

static bool has_at(const uint8_t *head, size_t got, size_t at, size_t len, const char *magic)
{
    return at + len <= got && memcmp(head + at, magic, len) == 0;
}

/* Does the text begin like this, behind white space and whatever the case? */
static bool begins_with(const uint8_t *head, size_t got, const char *word)
{
    size_t at = has_at(head, got, 0, 3, "\xef\xbb\xbf") ? 3 : 0, len = strlen(word);
    while (at < got && head[at] && strchr(" \t\r\n", head[at]))
        at++;
    return at + len <= got && strncasecmp((const char *)head + at, word, len) == 0;
}

static const char *kind_of_text(const uint8_t *head, size_t got)
{
    if (begins_with(head, got, "<!doctype html") || begins_with(head, got, "<html"))
        return "a web page";
    if (begins_with(head, got, "<?xml") || begins_with(head, got, "<Envelope"))
        return "an XML document";
    return NULL;
}

static int refuse_file(const char *path, const char *what, const char *hint, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP,
                   "%s: is %s, not a disk image: %s; name the format raw if its bytes are meant as "
                   "they are",
                   path, what, hint);
}

int dr_refuse_foreign(const uint8_t *head, size_t got, const char *path, struct dr_error *err)
{
    for (size_t i = 0; i < sizeof(foreign_images) / sizeof(foreign_images[0]); i++)
        if (has_at(head, got, foreign_images[i].at, foreign_images[i].len, foreign_images[i].magic))
            return dr_fail(err, ENOTSUP,
                           "%s: looks like a %s image, which this version cannot read; name the "
                           "format raw if its bytes are meant as they are",
                           path, foreign_images[i].name);
    for (size_t i = 0; i < sizeof(foreign_files) / sizeof(foreign_files[0]); i++)
        if (has_at(head, got, foreign_files[i].at, foreign_files[i].len, foreign_files[i].magic))
            return refuse_file(path, foreign_files[i].name, foreign_files[i].hint, err);
    const char *text = kind_of_text(head, got);
    return text ? refuse_file(path, text, "the download may have failed", err) : 0;
}

/* ------------------------------------------------------------------ probing */

static int best_format(const uint8_t *head, size_t got, const char *path,
                       const struct dr_format **fmt)
{
    int best = 0;
    const struct dr_format *candidate;
    *fmt = dr_format_find("raw");
    for (size_t i = 0; (candidate = dr_format_at(i)); i++) {
        int score = candidate->flags & DR_FORMAT_NO_PROBE ? 0 : candidate->probe(head, got, path);
        if (score > best) {
            best = score;
            *fmt = candidate;
        }
    }
    return best;
}

int dr_probe_bytes(const uint8_t *head, size_t got, const char *path, const struct dr_format **fmt,
                   struct dr_error *err)
{
    int r;
    if (best_format(head, got, path, fmt) == 0 && (r = dr_refuse_foreign(head, got, path, err)) < 0)
        return r;
    return *fmt ? 0 : dr_fail(err, EINVAL, "%s: no known image format", path);
}

int dr_probe(struct dr_fs *fs, const char *path, unsigned file_flags, const struct dr_format **fmt,
             struct dr_error *err)
{
    DR_CLEANUP_NAME struct dr_name name = {0};
    struct dr_file *file = NULL;
    uint8_t head[HEAD];
    size_t got = 0;
    int r = dr_name_parse(fs, path, &name, err);
    if (r == 0)
        r = dr_file_open(fs, name.file, file_flags, &file, err);
    if (r < 0)
        return r;
    *fmt = name.fmt;
    if (!*fmt)
        r = dr_file_pread_short(file, head, 0, sizeof(head), &got, err);
    if (r == 0 && !*fmt)
        r = dr_probe_bytes(head, got, path, fmt, err);
    const char *packer = r == 0 ? dr_source_compression_of(head, got) : NULL;
    if (r == 0 && ((*fmt)->flags & DR_FORMAT_NO_PROBE) && packer)
        r = dr_fail(err, ENOTSUP,
                    "%s: is compressed by %s: name the format of the image inside, or "
                    "raw if the bytes are meant as they are",
                    path, packer);
    dr_file_unref(file);
    return r;
}

/* ------------------------------------------------------------------ images that are packed */

/* Which format is inside, unless that is said. What is packed twice is named for that. */
static int probe_inside(const struct dr_image *image, const uint8_t *head, size_t got,
                        const char *packer, const struct dr_format **fmt, struct dr_error *err)
{
    const char *again = dr_source_compression_of(head, got);
    if (again)
        return dr_fail(err, ENOTSUP, "%s: is compressed by %s and then by %s: unpack it once first",
                       image->path, again, packer);
    return *fmt ? 0 : dr_probe_bytes(head, got, image->path, fmt, err);
}

static int unpack(struct dr_image *image, const uint8_t *head, size_t got, const char *packer,
                  const struct dr_format **fmt, struct dr_error *err)
{
    struct dr_file *plain;
    CLEANUP_FREE struct dr_unpack_damage *damage = NULL;
    int r = probe_inside(image, head, got, packer, fmt, err);
    if (r < 0 || ((*fmt)->flags & DR_FORMAT_MEMBERS)) /* archives unpack themselves */
        return r;
    if (image->writable)
        return dr_fail(err, EROFS,
                       "%s: is compressed by %s, so it can only be read: unpack it first",
                       image->path, packer);
    if ((image->flags & DR_OPEN_SALVAGE) && !(damage = calloc(1, sizeof(*damage))))
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    r = dr_unpack(image->files[0], !((*fmt)->flags & DR_FORMAT_NO_PROBE), damage, &plain, err);
    if (r == 0 && damage && damage->why.errnum && dr_file_size(plain) == 0) {
        dr_file_unref(plain);
        r = dr_fail(err, damage->why.errnum, "%s", damage->why.text);
    }
    if (r < 0)
        return r;
    dr_file_unref(image->files[0]);
    image->files[0] = plain;
    image->packer = packer;
    image->doubt = damage && damage->why.errnum ? DR_STEAL(damage) : NULL;
    if (image->seen)
        image->seen[0] = (struct dr_seen_file){dr_file_mtime(plain), dr_file_size(plain)};
    return 0;
}

/* The first bytes of a packed file that cannot be read from its beginning on, but in pieces. */
static void head_of_pieces(struct dr_file *f, uint8_t *head, size_t *got)
{
    struct dr_file *plain;
    const char *packer;
    if (dr_source_indexed_file(f, DR_SOURCE_SALVAGE, NULL, &plain, &packer, NULL) < 0)
        return;
    if (dr_file_pread_short(plain, head, 0, HEAD, got, NULL) < 0)
        *got = 0;
    dr_file_unref(plain);
}

/* Raw bytes, and archives, which unpack themselves, are taken as they are where they are named. */
int dr_probe_image(struct dr_image *image, const struct dr_format **fmt, struct dr_error *err)
{
    struct dr_file *file = image->files[0];
    const char *packer = NULL;
    uint8_t head[HEAD];
    size_t got;
    if (*fmt && ((*fmt)->flags & (DR_FORMAT_NO_PROBE | DR_FORMAT_MEMBERS)))
        return 0;
    int r = dr_file_pread_short(file, head, 0, sizeof(head), &got, err);
    if (r < 0)
        return r;
    if (!dr_source_compression_of(head, got))
        return *fmt ? 0 : dr_probe_bytes(head, got, image->path, fmt, err);
    if (!*fmt && best_format(head, got, image->path, fmt) > 0)
        return 0; /* an archive by its name */
    *fmt = (*fmt)->flags & DR_FORMAT_NO_PROBE ? NULL : *fmt;
    r = dr_unpack_head(file, head, sizeof(head), &got, &packer, err);
    if (r == -EBADMSG && (image->flags & DR_OPEN_SALVAGE)) {
        r = 0; /* what came in front of the damage, or comes behind it */
        dr_error_reset(err);
        if (got == 0)
            head_of_pieces(file, head, &got);
        if (got == 0 && !*fmt)
            dr_notice("%s: what is packed in it is damaged from its first byte on: it is taken for "
                      "a raw disk, since its format is not named",
                      image->path);
    }
    return r < 0 ? r : unpack(image, head, got, packer, fmt, err);
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Sequential sources: which kind of bytes it is, and the reading that all kinds share. */
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>

#include "storage/source-pieces.h"

struct dr_source {
    char *name;
    struct source_in in;
    const struct source_codec *codec; /* NULL = plain */
    void *state;
    struct dr_file *plain;  /* reads at random; NULL = one after another only */
    bool ahead;             /* dr_source_read_ahead() */
    uint64_t pos;           /* plain bytes given out */
    int own_fd;             /* to be closed, or -1 */
    struct dr_error failed; /* what stopped the decoder, until dr_source_resume() */
};

static const struct source_codec *const codecs[] = {
    &source_zstd, &source_gzip, &source_lzop, &source_bzip2, &source_xz, &source_lz4,
};

/* ------------------------------------------------------------------ the container's bytes */

#define STOP_LOOK_MS 100
#define PIPE_BYTES   (1 << 20)

static bool is_stopped(const struct source_in *in)
{
    return in->stop && __atomic_load_n(in->stop, __ATOMIC_RELAXED);
}

/* Poll with a timeout before reading: the signal that asks to stop may be delivered to another
 * thread, and then it does not interrupt a read(2). */
static void wait_for_bytes(const struct source_in *in)
{
    struct pollfd p = {.fd = in->fd, .events = POLLIN};

    while (in->stop && !is_stopped(in) && poll(&p, 1, STOP_LOOK_MS) <= 0)
        continue;
}

/* Read what is available now and do not wait for the buffer to fill: the caller may only need
 * the first bytes of a slow pipe. */
static int read_some(struct source_in *in, void *buf, size_t len, size_t *got, struct dr_error *err)
{
    if (in->file) {
        int r = dr_file_pread_short(in->file, buf, in->next, len, got, err);
        in->next += r == 0 ? *got : 0;
        return r;
    }
    ssize_t n;
    wait_for_bytes(in);
    if (is_stopped(in))
        return dr_fail(err, ECANCELED, "%s: stopped on request", in->name);
    do
        n = read(in->fd, buf, len);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return dr_fail_errno(err, errno, "%s: cannot read at offset %llu", in->name,
                             (unsigned long long)in->next);
    *got = (size_t)n;
    in->next += *got;
    return 0;
}

int source_in_fill(struct source_in *in, struct dr_error *err)
{
    if (in->at < in->n || in->end)
        return 0;
    in->at = in->n = 0;
    int r = read_some(in, in->buf, SOURCE_PIECE, &in->n, err);
    in->end = r == 0 && in->n == 0;
    return r;
}

int source_in_take(struct source_in *in, void *buf, size_t len, size_t *got, struct dr_error *err)
{
    *got = 0;
    while (*got < len) {
        int r = source_in_fill(in, err);
        if (r < 0 || in->end)
            return r;
        size_t n = (size_t)dr_min(in->n - in->at, len - *got);
        memcpy((uint8_t *)buf + *got, in->buf + in->at, n);
        in->at += n;
        *got += n;
    }
    return 0;
}

void source_in_move(struct source_in *in, uint64_t pos)
{
    uint64_t first = in->next - in->n; /* of what is in the buffer */
    if (pos < first && in->file) {
        in->next = pos;
        in->at = in->n = 0;
    } else {
        in->at = pos > first ? (size_t)dr_min(pos - first, in->n) : 0;
    }
    in->end = false;
}

/* Of the bytes that were looked at, the last ones stay: a magic may begin in them. */
int source_in_find(struct source_in *in, const uint8_t *magic, size_t len, struct dr_error *err)
{
    for (;;) {
        const uint8_t *from = in->buf + in->at, *found = memmem(from, in->n - in->at, magic, len);
        size_t keep = dr_min(len - 1, in->n - in->at), got;
        if (found) {
            in->at = (size_t)(found - in->buf);
            return 0;
        }
        memmove(in->buf, in->buf + in->n - keep, keep);
        in->at = 0;
        in->n = keep;
        int r = is_stopped(in) ? dr_fail(err, ECANCELED, "%s: stopped on request", in->name)
                               : read_some(in, in->buf + keep, SOURCE_PIECE - keep, &got, err);
        if (r < 0)
            return r;
        in->end = got == 0;
        if (in->end)
            return -ENODATA;
        in->n += got;
    }
}

/* Fill the buffer far enough to recognise the compression. The bytes stay in it for the first
 * read. */
static int look_at_magic(struct source_in *in, struct dr_error *err)
{
    while (in->n < SOURCE_MAGIC) {
        size_t got = 0;
        int r = read_some(in, in->buf + in->n, SOURCE_MAGIC - in->n, &got, err);
        if (r < 0)
            return r;
        if (got == 0)
            break;
        in->n += got;
    }
    return 0;
}

static const struct source_codec *codec_of(const uint8_t *magic, size_t len)
{
    for (size_t i = 0; i < sizeof(codecs) / sizeof(codecs[0]); i++)
        if (codecs[i]->knows(magic, len))
            return codecs[i];
    return NULL;
}

/* ------------------------------------------------------------------ open */

/* Pipes, sockets and tapes are read through a descriptor, files through dr_file. */
static bool must_stream(struct dr_fs *fs, const char *path)
{
    struct stat st;
    return fs == dr_fs_posix() && stat(path, &st) == 0 &&
           (S_ISFIFO(st.st_mode) || S_ISCHR(st.st_mode));
}

static int open_path(struct dr_source *s, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    if (!must_stream(fs, path))
        return dr_file_open(fs, path, 0, &s->in.file, err);
    s->own_fd = s->in.fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    return s->own_fd < 0 ? dr_fail_errno(err, errno, "Could not open '%s'", path) : 0;
}

/* A descriptor of a regular file that stands at its start can be read at random, too. */
static void look_behind(struct dr_source *s, int fd)
{
    s->in.fd = fd;
    if (lseek(fd, 0, SEEK_CUR) == 0 && dr_file_open_fd(fd, s->name, &s->in.file, NULL) < 0)
        s->in.file = NULL;
}

/* How much finding the pieces may cost. */
enum effort {
    SEARCH_INDEX, /* the file has an index */
    SEARCH_WALK,  /* one read a piece */
};

struct index_search {
    enum effort effort;
    enum dr_source_salvage salvage;
    struct dr_unpack_damage *damage;
};

static int open_zstd(struct dr_file *f, const struct index_search *how, struct dr_file **plain,
                     struct dr_error *err)
{
    int r = source_pieces_open(f, &source_zstd_table, how->salvage, how->damage, plain, err);
    if (r == -EBADMSG && how->salvage == DR_SOURCE_STRICT)
        return r;
    if (how->effort == SEARCH_INDEX || (r != -ENOTSUP && r != -EBADMSG))
        return r;
    return source_pieces_open(f, &source_zstd_frames, how->salvage, how->damage, plain, err);
}

static int open_index(const struct source_codec *codec, struct dr_file *f,
                      const struct index_search *how, struct dr_file **plain, struct dr_error *err)
{
    const struct source_piece_packer *packer = codec == &source_gzip   ? &source_gzip_blocks
                                               : codec == &source_lzop ? &source_lzop_blocks
                                                                       : NULL;
    if (codec == &source_zstd)
        return open_zstd(f, how, plain, err);
    if (codec == &source_xz)
        return source_pieces_open(f, &source_xz_blocks, how->salvage, how->damage, plain, err);
    if (how->effort == SEARCH_INDEX || !packer)
        return -ENOTSUP;
    return source_pieces_open(f, packer, how->salvage, how->damage, plain, err);
}

/* Some kinds have another decoder for a salvage, which goes on behind damage. */
static const struct source_codec *salvaging(const struct source_codec *codec)
{
    return codec == &source_bzip2 ? &source_bzip2_blocks
           : codec == &source_xz  ? &source_xz_salvage
                                  : codec;
}

/* An index that is damaged is no failure: the stream is then read from its start like one without
 * an index. */
static int open_codec(struct dr_source *s, bool as_is, const struct index_search *how,
                      struct dr_error *err)
{
    s->codec = as_is ? NULL : codec_of(s->in.buf, s->in.n);
    if (!s->codec) {
        s->plain = s->in.file ? dr_file_ref(s->in.file) : NULL;
        return 0;
    }
    if (s->in.file && open_index(s->codec, s->in.file, how, &s->plain, NULL) < 0)
        s->plain = NULL;
    if (how->salvage != DR_SOURCE_STRICT)
        s->codec = salvaging(s->codec);
    return s->codec->open(s->name, &s->state, err);
}

static struct dr_source *source_new(const char *path, struct dr_error *err)
{
    struct dr_source *s = calloc(1, sizeof(*s));
    if (s) {
        s->own_fd = s->in.fd = -1;
        s->in.name = s->name = strdup(path);
        s->in.buf = malloc(SOURCE_PIECE);
    }
    if (s && s->name && s->in.buf)
        return s;
    dr_source_close(s);
    dr_fail(err, ENOMEM, "%s: out of memory", path);
    return NULL;
}

static int open_how(struct dr_fs *fs, const char *path, int fd, bool as_is,
                    const struct index_search *how, struct dr_source **source, struct dr_error *err)
{
    struct dr_source *s = source_new(path, err);
    int r = 0;
    *source = NULL;
    if (!s)
        return -ENOMEM;
    if (fd >= 0)
        look_behind(s, fd);
    else
        r = open_path(s, fs, path, err);
    if (r == 0)
        r = look_at_magic(&s->in, err);
    if (r == 0)
        r = open_codec(s, as_is, how, err);
    if (r < 0)
        dr_source_close(s);
    else
        *source = s;
    return r;
}

int dr_source_open(struct dr_fs *fs, const char *path, int fd, struct dr_source **source,
                   struct dr_error *err)
{
    return dr_source_open_as(fs, path, fd, false, source, err);
}

int dr_source_open_as(struct dr_fs *fs, const char *path, int fd, bool as_is,
                      struct dr_source **source, struct dr_error *err)
{
    const struct index_search how = {.effort = SEARCH_INDEX};
    return open_how(fs, path, fd, as_is, &how, source, err);
}

int dr_source_open_salvaging(struct dr_fs *fs, const char *path, int fd, struct dr_source **source,
                             struct dr_unpack_damage *damage, struct dr_error *err)
{
    const struct index_search how = {SEARCH_WALK, DR_SOURCE_SALVAGE_GAPS, damage};
    *damage = (struct dr_unpack_damage){.why = DR_ERROR_INIT};
    return open_how(fs, path, fd, false, &how, source, err);
}

int dr_source_open_file(struct dr_file *f, struct dr_source **source, struct dr_error *err)
{
    struct dr_source *s = source_new(f->path, err);
    *source = NULL;
    if (!s)
        return -ENOMEM;
    s->in.file = dr_file_ref(f);
    int r = look_at_magic(&s->in, err);
    s->codec = r == 0 ? codec_of(s->in.buf, s->in.n) : NULL;
    if (s->codec)
        r = s->codec->open(s->name, &s->state, err);
    if (r < 0)
        dr_source_close(s);
    else
        *source = s;
    return r;
}

void dr_source_close(struct dr_source *s)
{
    if (!s)
        return;
    if (s->codec && s->state)
        s->codec->close(s->state);
    dr_file_unref(s->plain);
    dr_file_unref(s->in.file);
    dr_cleanup_close(&s->own_fd);
    free(s->in.buf);
    free(s->name);
    free(s);
}

const char *dr_source_name(const struct dr_source *s)
{
    return s->name;
}

const char *dr_source_compression(const struct dr_source *s)
{
    return s->codec ? s->codec->name : NULL;
}

struct dr_file *dr_source_file(struct dr_source *s)
{
    return s->plain;
}

struct dr_file *dr_source_stored(struct dr_source *s)
{
    return s->in.file;
}

void dr_source_stop_by(struct dr_source *s, const volatile int *stop)
{
    s->in.stop = stop;
}

uint64_t dr_source_stored_pos(const struct dr_source *s)
{
    return s->plain ? s->pos : source_in_pos(&s->in);
}

uint64_t dr_source_pos(const struct dr_source *s)
{
    return s->pos;
}

uint64_t dr_source_vouched(const struct dr_source *s)
{
    return s->codec && !s->plain ? dr_min(s->in.vouched, s->pos) : s->pos;
}

/* ------------------------------------------------------------------ read */

void dr_source_read_ahead(struct dr_source *s)
{
    s->ahead = true;
    if (s->in.fd >= 0)
        fcntl(s->in.fd, F_SETPIPE_SZ, PIPE_BYTES); /* fewer turns; as much as we may have */
}

/* Take the bytes that look_at_magic() buffered, then read exactly what was asked for: another
 * program may go on reading the same pipe. */
static int read_plain(struct dr_source *s, uint8_t *buf, size_t len, size_t *got,
                      struct dr_error *err)
{
    struct source_in *in = &s->in;
    size_t n = (size_t)dr_min(in->n - in->at, len);
    memcpy(buf, in->buf + in->at, n);
    in->at += n;
    *got = n;
    while (*got < len && !in->end) {
        n = 0;
        int r = read_some(in, buf + *got, len - *got, &n, err);
        if (r < 0)
            return r;
        in->end = n == 0;
        *got += n;
    }
    return 0;
}

static int read_decoded(struct dr_source *s, uint8_t *buf, size_t len, size_t *got,
                        struct dr_error *err)
{
    if (s->failed.errnum)
        return dr_fail(err, s->failed.errnum, "%s", s->failed.text);
    for (size_t n = 1; *got < len && n > 0; *got += n) {
        n = 0;
        s->in.given = s->pos + *got;
        int r = s->codec->read(s->state, &s->in, buf + *got, len - *got, &n, &s->failed);
        if (r < 0) {
            *got += n;
            return dr_fail(err, -r, "%s", s->failed.text);
        }
    }
    return 0;
}

int dr_source_read(struct dr_source *s, void *buf, size_t len, size_t *got, struct dr_error *err)
{
    int r;
    *got = 0;
    if (s->plain) /* which leaves *got alone when it fails */
        r = dr_file_pread_short(s->plain, buf, s->pos, len, got, err);
    else if (s->codec)
        r = read_decoded(s, buf, len, got, err);
    else if (s->ahead)
        r = source_in_take(&s->in, buf, len, got, err);
    else
        r = read_plain(s, buf, len, got, err);
    s->pos += *got;
    return r;
}

/* Open the decoder again at the next magic behind the one where it began. Some decoders fail
 * without having taken a byte: it is looked for from the next one on. */
static int open_again(struct dr_source *s, struct dr_error *err)
{
    const struct source_codec *codec = s->codec;
    source_in_move(&s->in, s->in.begun + 1);
    int r = source_in_find(&s->in, codec->magic, codec->magic_len, err);
    if (r < 0)
        return r;
    s->in.begun = source_in_pos(&s->in);
    codec->close(s->state);
    s->state = NULL;
    return codec->open(s->name, &s->state, err);
}

int dr_source_resume(struct dr_source *s)
{
    struct dr_error err = DR_ERROR_INIT;
    if (s->plain || !s->codec || s->failed.errnum != EBADMSG)
        return -ENODATA;
    int r = s->codec->resume ? s->codec->resume(s->state, &s->in, &err) : open_again(s, &err);
    if (r < 0 && (r == -ENODATA || dr_is_damage(r)))
        return -ENODATA;
    s->failed = err; /* what is more than damage fails the next read */
    return 0;
}

int dr_source_skip(struct dr_source *s, uint64_t len, uint64_t *skipped, struct dr_error *err)
{
    *skipped = 0;
    if (s->plain) {
        uint64_t size = dr_file_size(s->plain);
        *skipped = s->pos < size ? dr_min(len, size - s->pos) : 0;
        s->pos += *skipped;
        return 0;
    }
    CLEANUP_FREE uint8_t *scratch = malloc(SOURCE_PIECE);
    if (!scratch)
        return dr_fail(err, ENOMEM, "%s: out of memory", s->name);
    while (*skipped < len) {
        size_t want = (size_t)dr_min(len - *skipped, SOURCE_PIECE), got;
        int r = dr_source_read(s, scratch, want, &got, err);
        *skipped += got;
        if (r < 0 || got < want)
            return r;
    }
    return 0;
}

/* ------------------------------------------------------------------ files */

const char *dr_source_compression_of(const uint8_t *buf, size_t len)
{
    const struct source_codec *codec = codec_of(buf, dr_min(len, SOURCE_MAGIC));
    return codec ? codec->name : NULL;
}

static int codec_of_file(struct dr_file *f, const struct source_codec **codec, struct dr_error *err)
{
    uint8_t magic[SOURCE_MAGIC];
    size_t got;
    int r = dr_file_pread_short(f, magic, 0, sizeof(magic), &got, err);
    *codec = r == 0 ? codec_of(magic, got) : NULL;
    return r;
}

int dr_source_indexed_file(struct dr_file *f, enum dr_source_salvage salvage,
                           struct dr_unpack_damage *damage, struct dr_file **plain,
                           const char **packer, struct dr_error *err)
{
    const struct index_search how = {SEARCH_WALK, salvage, damage};
    const struct source_codec *codec;
    struct dr_error why = DR_ERROR_INIT;
    *plain = NULL;
    int r = codec_of_file(f, &codec, err);
    *packer = codec ? codec->name : NULL;
    if (r < 0)
        return r;
    r = codec ? open_index(codec, f, &how, plain, &why) : -ENOTSUP;
    if (r == -EBADMSG || r == -ENOTSUP)
        return -ENOTSUP;
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

int dr_source_plain_file(struct dr_file *f, struct dr_file **plain, const char **compression,
                         struct dr_error *err)
{
    const struct index_search how = {.effort = SEARCH_WALK};
    const struct source_codec *codec;
    *plain = NULL;
    int r = codec_of_file(f, &codec, err);
    if (r < 0)
        return r;
    *compression = codec ? codec->name : NULL;
    if (!codec) {
        *plain = dr_file_ref(f);
        return 0;
    }
    r = open_index(codec, f, &how, plain, err);
    if (r != -ENOTSUP)
        return r;
    return dr_fail(err, ENOTSUP,
                   "%s: is compressed (%s) so that it can only be read from its start; unpack it, "
                   "or compress it with zstd and a seek table",
                   f->path, codec->name);
}

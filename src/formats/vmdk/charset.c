/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names in a descriptor of another charset than ours. */
#include <iconv.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/descriptor.h"

/* The encodings that are known to be named in descriptors, and iconv's names of what Windows means
 * by them (in the other Shift_JIS a backslash is a yen sign). No others are accepted: the text is
 * hostile, and rare converters had holes. In none of these is a quote or a line end part of another
 * character. */
static const char *find_charset(const char *encoding)
{
    static const struct {
        const char *name, *means;
    } known[] = {
        {"windows-1250", "CP1250"},
        {"windows-1251", "CP1251"},
        {"windows-1252", "CP1252"},
        {"windows-1253", "CP1253"},
        {"windows-1254", "CP1254"},
        {"windows-1255", "CP1255"},
        {"windows-1256", "CP1256"},
        {"windows-1257", "CP1257"},
        {"windows-1258", "CP1258"},
        {"windows-874", "CP874"},
        {"ISO-8859-1", "CP1252"},
        {"ISO-8859-2", "ISO-8859-2"},
        {"ISO-8859-3", "ISO-8859-3"},
        {"ISO-8859-4", "ISO-8859-4"},
        {"ISO-8859-5", "ISO-8859-5"},
        {"ISO-8859-6", "ISO-8859-6"},
        {"ISO-8859-7", "ISO-8859-7"},
        {"ISO-8859-8", "ISO-8859-8"},
        {"ISO-8859-9", "ISO-8859-9"},
        {"ISO-8859-10", "ISO-8859-10"},
        {"ISO-8859-11", "ISO-8859-11"},
        {"ISO-8859-13", "ISO-8859-13"},
        {"ISO-8859-14", "ISO-8859-14"},
        {"ISO-8859-15", "ISO-8859-15"},
        {"ISO-8859-16", "ISO-8859-16"},
        {"KOI8-R", "KOI8-R"},
        {"KOI8-U", "KOI8-U"},
        {"TIS-620", "CP874"},
        {"GBK", "CP936"},
        {"GB2312", "CP936"},
        {"GB18030", "GB18030"},
        {"windows-936", "CP936"},
        {"Big5", "CP950"},
        {"Big5-HKSCS", "BIG5-HKSCS"},
        {"windows-950", "CP950"},
        {"Shift_JIS", "CP932"},
        {"windows-31J", "CP932"},
        {"windows-932", "CP932"},
        {"MS932", "CP932"},
        {"EUC-JP", "EUC-JP"},
        {"EUC-KR", "CP949"},
        {"windows-949", "CP949"},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (strcasecmp(encoding, known[i].name) == 0)
            return known[i].means;
    return NULL;
}

static bool is_ascii(const char *s)
{
    while (*s && !((unsigned char)*s & 0x80))
        s++;
    return *s == '\0';
}

char *vmdk_desc_to_utf8(const struct vmdk_desc *d, const char *name)
{
    CLEANUP_FREE char *encoding = vmdk_desc_get(d, "encoding");
    const char *charset = encoding ? find_charset(encoding) : NULL;
    size_t left = strlen(name), room = left * 4;
    if (!charset || is_ascii(name))
        return NULL;
    CLEANUP_FREE char *in = strdup(name);
    CLEANUP_FREE char *out = calloc(1, room + 1);
    iconv_t cd = iconv_open("UTF-8", charset);
    char *from = in, *to = out;
    bool whole = false;
    if (cd == (iconv_t)-1)
        return NULL;
    if (in && out)
        whole = iconv(cd, &from, &left, &to, &room) != (size_t)-1 && left == 0;
    iconv_close(cd);
    return whole ? DR_STEAL(out) : NULL;
}

char *vmdk_desc_unknown_charset(const struct vmdk_desc *d, const char *name)
{
    /* A text that was converted as a whole is in UTF-8 now. */
    static const char *const plain[] = {"UTF-8", "UTF8", "US-ASCII", "UTF-16"};
    CLEANUP_FREE char *encoding = vmdk_desc_get(d, "encoding");
    if (!encoding || is_ascii(name) || find_charset(encoding))
        return NULL;
    for (size_t i = 0; i < sizeof(plain) / sizeof(plain[0]); i++)
        if (strcasecmp(encoding, plain[i]) == 0)
            return NULL;
    return DR_STEAL(encoding);
}

/* ------------------------------------------------------------------ whole texts */

#define WIDE_SAMPLE 8u /* bytes that show which half of each character is 0 */

/* Does the text begin with ASCII of which each character has two bytes, this half of them 0? */
static bool is_wide_ascii(const uint8_t *buf, size_t len, size_t zero)
{
    if (len < WIDE_SAMPLE)
        return false;
    for (size_t i = 0; i < WIDE_SAMPLE; i += 2)
        if (buf[i + zero] != 0 || buf[i + !zero] == 0 || buf[i + !zero] >= 0x80)
            return false;
    return true;
}

/* Is it UTF-16, and which? NULL: no. *mark: the length of its byte order mark, which some programs
 * leave out. */
static const char *wide_charset(const uint8_t *buf, size_t len, size_t *mark)
{
    *mark = 2;
    if (len >= 2 && buf[0] == 0xff && buf[1] == 0xfe)
        return "UTF-16LE";
    if (len >= 2 && buf[0] == 0xfe && buf[1] == 0xff)
        return "UTF-16BE";
    *mark = 0;
    if (is_wide_ascii(buf, len, 1))
        return "UTF-16LE";
    return is_wide_ascii(buf, len, 0) ? "UTF-16BE" : NULL;
}

/* As old systems of Apple end lines. */
static bool lines_end_with_cr(const char *text, size_t len)
{
    return memchr(text, '\r', len) && !memchr(text, '\n', len);
}

static void end_lines_with_lf(char *text, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (text[i] == '\r')
            text[i] = '\n';
}

static int widen(const char *where, const char *charset, size_t mark, char **text, size_t *len,
                 struct dr_error *err)
{
    size_t left = *len - mark, room = *len * 2;
    char *from = *text + mark, *out = malloc(room + 1), *to = out;
    iconv_t cd = out ? iconv_open("UTF-8", charset) : (iconv_t)-1;
    if (cd == (iconv_t)-1) {
        free(out);
        return dr_fail(err, ENOMEM, "%s: cannot convert a text in %s", where, charset);
    }
    bool whole = iconv(cd, &from, &left, &to, &room) != (size_t)-1 && left == 0;
    iconv_close(cd);
    if (!whole) {
        free(out);
        return dr_fail(err, EINVAL, "%s: the descriptor begins as %s, but is none", where, charset);
    }
    *len = (size_t)(to - out);
    free(*text);
    *text = out;
    return 0;
}

int vmdk_text_decode(const char *where, char **text, size_t *len, bool *recoded,
                     struct dr_error *err)
{
    size_t mark;
    const char *charset = wide_charset((const uint8_t *)*text, *len, &mark);
    int r = charset ? widen(where, charset, mark, text, len, err) : 0;
    if (r < 0)
        return r;
    *len = strnlen(*text, *len);
    *recoded = charset != NULL;
    if (lines_end_with_cr(*text, *len)) {
        end_lines_with_lf(*text, *len);
        *recoded = true;
    }
    return 0;
}

size_t vmdk_text_peek(const uint8_t *buf, size_t len, char text[VMDK_PEEK_MOST])
{
    size_t mark;
    const char *charset = wide_charset(buf, len, &mark);
    size_t n = 0, step = charset ? 2 : 1, low = charset && strcmp(charset, "UTF-16BE") == 0;
    for (size_t i = mark; i + step <= len && n < VMDK_PEEK_MOST; i += step)
        text[n++] = (char)buf[i + low];
    n = strnlen(text, n);
    if (lines_end_with_cr(text, n))
        end_lines_with_lf(text, n);
    return n;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names in a descriptor of another charset than ours. */
#include <iconv.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
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
        {"ISO-8859-1", "CP1252"},
        {"ISO-8859-15", "ISO-8859-15"},
        {"GBK", "CP936"},
        {"GB2312", "CP936"},
        {"Big5", "CP950"},
        {"Shift_JIS", "CP932"},
        {"EUC-JP", "EUC-JP"},
        {"EUC-KR", "CP949"},
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

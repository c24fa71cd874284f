/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "cli/cli.h"

size_t cli_char_length(const char *s)
{
    const unsigned char *c = (const unsigned char *)s;
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t n = c[0] < 0x80 ? 1 : c[0] < 0xc0 ? 0 : c[0] < 0xe0 ? 2 : c[0] < 0xf0 ? 3 : 4;

    if (n == 0 || c[0] > 0xf4)
        return 0;
    if (n == 1)
        return c[0] >= 0x20 && c[0] != 0x7f;
    uint32_t value = c[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((c[i] & 0xc0) != 0x80)
            return 0;
        value = value << 6 | (c[i] & 0x3f);
    }
    bool surrogate = value >= 0xd800 && value <= 0xdfff;
    /* 0x80..0x9f are control characters, too: a terminal may take 0x9b for ESC [. The others end
     * lines, or let text run the other way, so that a name looks like another. */
    bool steers = value < 0xa0 || (value >= 0x2028 && value <= 0x202e) ||
                  (value >= 0x2066 && value <= 0x2069);
    return value < least[n] || value > 0x10ffff || surrogate || steers ? 0 : n;
}

/* Count the bytes at s that can be printed unchanged; 0: the first one must be escaped. Letters
 * of encodings other than UTF-8 are printed. */
static size_t harmless(const char *s, bool lines)
{
    size_t n = cli_char_length(s);

    if (n == 0 && ((unsigned char)*s >= 0xa0 || (lines && *s == '\n')))
        return 1;
    return n;
}

static char *tame(char *text, bool lines)
{
    for (char *c = text; *c;) {
        size_t n = harmless(c, lines);
        if (n == 0)
            *c = '?';
        c += n > 0 ? n : 1;
    }
    return text;
}

char *cli_tame(char *text)
{
    return tame(text, false);
}

void cli_put(const char *text)
{
    CLEANUP_FREE char *hidden = strstr(text, "json:") ? strdup(text) : NULL;
    if (hidden) {
        dr_hide_secrets(hidden);
        text = hidden;
    }
    while (*text) {
        size_t n = harmless(text, false);
        if (n == 0)
            putchar('?');
        else
            fwrite(text, 1, n, stdout);
        text += n > 0 ? n : 1;
    }
}

/* The text with another character for each line end of fmt. */
static char *text_with(char line_end, const char *fmt, va_list ap)
{
    char *own = strdup(fmt), *text = NULL;

    for (char *c = own; c && (c = strchr(c, '\n'));)
        *c = line_end;
    if (!own || vasprintf(&text, own, ap) < 0)
        text = NULL;
    free(own);
    return text;
}

/* Keep the line ends of our own formats and escape those in names and other foreign text, which
 * could forge messages. To tell them apart, format the text twice with different characters for
 * our line ends: ours are where the two texts differ. */
static char *text_of(const char *fmt, va_list ap)
{
    va_list again;

    va_copy(again, ap);
    char *text = text_with('\1', fmt, ap), *other = text_with('\2', fmt, again);
    va_end(again);
    for (size_t i = 0; text && other && text[i]; i++) {
        if (text[i] == '\n')
            text[i] = '?';
        else if (text[i] != other[i])
            text[i] = '\n';
    }
    free(other);
    return text;
}

static void say(const struct cli *cli, const char *fmt, va_list ap)
{
    char *text = text_of(fmt, ap);

    fflush(stdout);
    if (!text) {
        fprintf(stderr, "%s: out of memory\n", cli->prog);
        return;
    }
    /* QEMU's tools print this hint on a separate line. */
    char *hint = cli->role == CLI_DROVER ? NULL : strstr(text, ". Is another process");
    if (hint)
        memmove(hint, hint + 1, strlen(hint));
    if (hint)
        *hint = '\n';
    dr_hide_secrets(text);
    fprintf(stderr, "%s: %s\n", cli->prog, tame(text, true));
    free(text);
}

void cli_error(const struct cli *cli, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    say(cli, fmt, ap);
    va_end(ap);
}

/* "CHILD: cannot open its backing file "NAME": WHY" */
const char *cli_backing_reason(const struct dr_error *err, const char **child_end)
{
    const char *why = NULL;

    *child_end = strstr(err->text, ": cannot open its backing file \"");
    if (*child_end)
        why = strstr(*child_end, "\": ");
    return why ? why + 3 : NULL;
}

/* What qemu-img says in front where there is no such snapshot. */
static const char *snapshot_words(const struct cli *cli, const struct dr_error *err)
{
    bool missing = err->errnum == ENOENT && strstr(err->text, ": has no snapshot ");

    return missing && cli->role == CLI_QEMU_IMG ? "Failed to load snapshot: " : "";
}

void cli_fail(const struct cli *cli, const struct dr_error *err)
{
    const char *end, *why = cli->role == CLI_DROVER ? NULL : cli_backing_reason(err, &end);

    if (why) {
        cli_error(cli, "Could not open '%.*s': Could not open backing file: %s",
                  (int)(end - err->text), err->text, why);
        return;
    }
    cli_error(cli, "%s%s", snapshot_words(cli, err),
              err->text[0] ? err->text : strerror(err->errnum));
}

int cli_usage(const struct cli *cli, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    say(cli, fmt, ap);
    va_end(ap);
    if (cli->role == CLI_DROVER && cli->command)
        fprintf(stderr, "Try 'drover %s --help' for more information\n", cli->command->name);
    else
        fprintf(stderr, "Try '%s --help' for more information\n", cli->prog);
    return cli->command && cli->command->usage_exit ? cli->command->usage_exit : 1;
}

const char *cli_human_size(uint64_t bytes, char *buf)
{
    static const char *const units[] = {"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"};
    double v = (double)bytes;
    size_t unit = 0;

    /* From 1000 on, not 1024, the next unit serves, so that three digits are always enough. */
    while (v >= 1000.0 && unit < 6) {
        v /= 1024.0;
        unit++;
    }
    snprintf(buf, CLI_SIZE_TEXT, "%0.3g %sB", v, units[unit]);
    return buf;
}

static int suffix_shift(char c)
{
    const char *suffixes = "BKMGTPE";
    const char *at = c ? strchr(suffixes, toupper((unsigned char)c)) : NULL;

    return at ? (int)(at - suffixes) * 10 : -1;
}

/* The part behind the point, times 2^shift, in whole bytes. */
static int parse_fraction(const char *digits, size_t n, int shift, uint64_t *bytes)
{
    char text[64] = "0.";

    if (n > 50)
        n = 50;
    memcpy(text + 2, digits, n);
    *bytes = (uint64_t)(strtod(text, NULL) * (double)((uint64_t)1 << shift));
    return 0;
}

static int parse_decimal(const char *text, uint64_t *bytes)
{
    size_t fraction = 0;
    char *end;
    int shift = 0;
    uint64_t part = 0;
    const char *point = NULL;

    errno = 0;
    *bytes = strtoull(text, &end, 10);
    int range = errno;
    if (*end == '.') {
        point = end + 1;
        fraction = strspn(point, "0123456789");
        end += 1 + fraction;
    }
    if (*end) {
        shift = suffix_shift(*end++);
        if (shift < 0 || *end)
            return -EINVAL;
    }
    if (fraction && shift == 0)
        return -EINVAL;
    if (range == ERANGE)
        return -ERANGE;
    if (fraction)
        parse_fraction(point, fraction, shift, &part);
    if (__builtin_mul_overflow(*bytes, (uint64_t)1 << shift, bytes) ||
        __builtin_add_overflow(*bytes, part, bytes))
        return -ERANGE;
    return *bytes > INT64_MAX ? -ERANGE : 0;
}

static int parse_hex(const char *text, uint64_t *bytes)
{
    char *end;
    int shift = 0;

    errno = 0;
    *bytes = strtoull(text + 2, &end, 16);
    int range = errno;
    if (end == text + 2)
        return -EINVAL;
    if (*end) {
        shift = suffix_shift(*end++);
        if (shift < 0 || *end)
            return -EINVAL;
    }
    if (range == ERANGE || __builtin_mul_overflow(*bytes, (uint64_t)1 << shift, bytes) ||
        *bytes > INT64_MAX)
        return -ERANGE;
    return 0;
}

int cli_parse_size(const char *text, uint64_t *bytes)
{
    *bytes = 0;
    while (isspace((unsigned char)*text))
        text++;
    if (*text == '+')
        text++;
    if (!isdigit((unsigned char)*text))
        return -EINVAL;
    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X'))
        return isxdigit((unsigned char)text[2]) ? parse_hex(text, bytes) : -EINVAL;
    return parse_decimal(text, bytes);
}

int cli_get_size(const struct cli *cli, const char *what, const char *text, uint64_t *bytes)
{
    int r = cli_parse_size(text, bytes);

    if (r == -ERANGE) {
        cli_error(cli, "Invalid %s specified. Must be between 0 and 9223372036854775807.", what);
    } else if (r < 0) {
        cli_error(cli, "Invalid %s specified. You may use k, M, G, T, P or E suffixes for", what);
        cli_error(cli, "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.");
    }
    return r;
}

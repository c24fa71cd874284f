/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

static bool is_control(unsigned char c)
{
    return c < 0x20 || c == 0x7f;
}

char *cli_tame(char *text)
{
    for (char *c = text; *c; c++) {
        if (is_control((unsigned char)*c))
            *c = '?';
    }
    return text;
}

void cli_put(const char *text)
{
    for (; *text; text++)
        putchar(is_control((unsigned char)*text) ? '?' : *text);
}

/* Our own texts have newlines, what comes from outside has none left. */
static void say(const struct cli *cli, const char *fmt, va_list ap)
{
    char *text = NULL;

    fflush(stdout);
    if (vasprintf(&text, fmt, ap) < 0)
        return;
    /* QEMU's tools give this hint on a line of its own. */
    char *hint = cli->role == CLI_DROVER ? NULL : strstr(text, ". Is another process");
    if (hint)
        memmove(hint, hint + 1, strlen(hint));
    if (hint)
        *hint = '\n';
    fprintf(stderr, "%s: ", cli->prog);
    for (const char *c = text; *c; c++)
        fputc(is_control((unsigned char)*c) && *c != '\n' ? '?' : *c, stderr);
    fputc('\n', stderr);
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

void cli_fail(const struct cli *cli, const struct dr_error *err)
{
    const char *end, *why = cli->role == CLI_DROVER ? NULL : cli_backing_reason(err, &end);

    if (why) {
        cli_error(cli, "Could not open '%.*s': Could not open backing file: %s",
                  (int)(end - err->text), err->text, why);
        return;
    }
    cli_error(cli, "%s", err->text[0] ? err->text : strerror(err->errnum));
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

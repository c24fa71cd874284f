/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What exports another NBD server has, in qemu-nbd's words, asked through libnbd. */
#include <errno.h>
#include <inttypes.h>
#include <libnbd.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/loaded.h"
#include "cli/serve/serve.h"

/* Of one server; more are not asked about. */
#define MAX_EXPORTS 4096

struct names {
    char **all;
    size_t n;
    bool failed;
};

static int remember(void *user, const char *name, const char *more)
{
    struct names *names = user;
    char **bigger = reallocarray(names->all, names->n + 2, 2 * sizeof(*bigger));
    if (bigger)
        names->all = bigger;
    char *own = bigger ? strdup(name) : NULL, *description = bigger ? strdup(more) : NULL;
    if (!own || !description || names->n >= 2 * MAX_EXPORTS) {
        names->failed = true;
        free(own);
        free(description);
        return 0;
    }
    names->all[names->n++] = own;
    names->all[names->n++] = description;
    return 0;
}

static void names_free(struct names *names)
{
    for (size_t i = 0; i < names->n; i++)
        free(names->all[i]);
    free(names->all);
}

static int remember_context(void *user, const char *context)
{
    return remember(user, context, "");
}

/* The export's flags as the protocol numbers them, with qemu-nbd's names. */
static void print_flags(struct nbd_handle *nbd)
{
    const struct {
        int set;
        unsigned bit;
        const char *name;
    } flags[] = {
        {nbd_is_read_only(nbd), 1, "readonly"},
        {nbd_can_flush(nbd), 2, "flush"},
        {nbd_can_fua(nbd), 3, "fua"},
        {nbd_is_rotational(nbd), 4, "rotational"},
        {nbd_can_trim(nbd), 5, "trim"},
        {nbd_can_zero(nbd), 6, "zeroes"},
        {nbd_can_df(nbd), 7, "df"},
        {nbd_can_multi_conn(nbd), 8, "multi"},
        {nbd_can_cache(nbd), 10, "cache"},
        {nbd_can_fast_zero(nbd), 11, "fast-zero"},
    };
    const size_t n = sizeof(flags) / sizeof(flags[0]);
    unsigned value = 1; /* that there are flags */
    for (size_t i = 0; i < n; i++)
        value |= flags[i].set == 1 ? 1u << flags[i].bit : 0;
    printf("  flags: 0x%x (", value);
    for (size_t i = 0; i < n; i++)
        if (flags[i].set == 1)
            printf(" %s", flags[i].name);
    printf(" )\n");
}

static void print_blocks(struct nbd_handle *nbd)
{
    int64_t least = nbd_get_block_size(nbd, LIBNBD_SIZE_MINIMUM);
    if (least <= 0)
        return;
    printf("  min block: %" PRId64 "\n", least);
    printf("  opt block: %" PRId64 "\n", nbd_get_block_size(nbd, LIBNBD_SIZE_PREFERRED));
    printf("  max block: %" PRId64 "\n", nbd_get_block_size(nbd, LIBNBD_SIZE_MAXIMUM));
}

static void print_contexts(const struct names *contexts)
{
    if (contexts->n > 0)
        printf("  available meta contexts: %zu\n", contexts->n / 2);
    for (size_t i = 0; i < contexts->n; i += 2) {
        printf("   ");
        cli_put(contexts->all[i]);
        printf("\n");
    }
}

/* An export that cannot be asked about is listed by its name, as there. */
static int print_export(struct nbd_handle *nbd, const char *name, const char *description)
{
    struct names contexts = {0};
    printf(" export: '");
    cli_put(name);
    printf("'\n");
    if (*description) {
        printf("  description: ");
        cli_put(description);
        printf("\n");
    }
    if (nbd_set_export_name(nbd, name) < 0)
        return -1;
    nbd_context_callback each = {.callback = remember_context, .user_data = &contexts};
    int listed = nbd_opt_list_meta_context(nbd, each);
    if (nbd_opt_info(nbd) == 0) {
        printf("  size:  %" PRId64 "\n", nbd_get_size(nbd));
        print_flags(nbd);
        print_blocks(nbd);
    }
    if (listed >= 0)
        print_contexts(&contexts);
    int r = contexts.failed ? -1 : 0;
    names_free(&contexts);
    return r;
}

static int reach(struct nbd_handle *nbd, const struct nbd_place *place)
{
    bool tls = place->tls_certificates || place->tls_psk;
    if (nbd_set_opt_mode(nbd, true) < 0 || (tls && nbd_set_tls(nbd, LIBNBD_TLS_REQUIRE) < 0) ||
        (place->tls_certificates && nbd_set_tls_certificates(nbd, place->tls_certificates) < 0) ||
        (place->tls_psk && (nbd_set_tls_psk_file(nbd, place->tls_psk) < 0 ||
                            nbd_set_tls_username(nbd, place->tls_user) < 0)))
        return -1;
    return place->socket ? nbd_connect_unix(nbd, place->socket)
                         : nbd_connect_tcp(nbd, place->host, place->port);
}

static int list(struct nbd_handle *nbd, const struct nbd_place *place, struct names *names)
{
    nbd_list_callback each = {.callback = remember, .user_data = names};
    if (reach(nbd, place) < 0 || nbd_opt_list(nbd, each) < 0)
        return -1;
    printf("exports available: %zu\n", names->n / 2);
    for (size_t i = 0; i < names->n; i += 2)
        if (print_export(nbd, names->all[i], names->all[i + 1]) < 0)
            return -1;
    return nbd_opt_abort(nbd);
}

/* Without the certificate of an authority libnbd would check nothing, and anybody in between could
 * answer for the server. */
static int check_authority(const struct cli *cli, const struct nbd_place *place)
{
    CLEANUP_FREE char *path = NULL;
    if (!place->tls_certificates)
        return 0;
    if (asprintf(&path, "%s/ca-cert.pem", place->tls_certificates) < 0) {
        path = NULL;
        cli_error(cli, "out of memory");
        return 1;
    }
    if (access(path, R_OK) == 0)
        return 0;
    cli_error(cli, "the server's certificate cannot be checked: %s: %s", path, strerror(errno));
    return 1;
}

int list_exports(const struct cli *cli, const struct nbd_place *place)
{
    struct names names = {0};
    struct dr_error err = {0};
    if (check_authority(cli, place) != 0)
        return 1;
    if (dr_load_nbd(&err) < 0) {
        cli_error(cli, "%s", err.text);
        return 1;
    }
    struct nbd_handle *nbd = nbd_create();
    int r = nbd ? list(nbd, place, &names) : -1;
    if (r == 0 && names.failed)
        cli_error(cli, "the server has more than %d exports: not all are listed", MAX_EXPORTS);
    else if (r < 0)
        cli_error(cli, "Failed to list the exports: %s", nbd_get_error());
    names_free(&names);
    nbd_close(nbd);
    return r == 0 && !names.failed ? 0 : 1;
}

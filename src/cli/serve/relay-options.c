/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The handshake of a relayed connection. All that a client asks goes on to the server as it is, and
 * so do the server's replies; before the reply that ends a request for contexts stand ours. A
 * server ignores contexts that it does not know, so it need not be kept from seeing them.
 * https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md */
#include <string.h>

#include "base/bytes.h"
#include "cli/serve/relay.h"

#define OPTION_MAGIC UINT64_C(0x49484156454F5054)
#define REPLY_MAGIC  UINT64_C(0x0003e889045565a9)
#define MOST_OPTION  65536u /* bytes; nbdkit takes no more, either */
#define NO_ZEROES    2u

enum option {
    OPT_EXPORT_NAME = 1,
    OPT_ABORT = 2,
    OPT_GO = 7,
    OPT_LIST_CONTEXTS = 9,
    OPT_SET_CONTEXTS = 10,
    OPT_EXTENDED_HEADERS = 11,
};
enum reply { REP_ACK = 1, REP_CONTEXT = 4, REP_ERROR = 1u << 31, REP_ERR_UNSUP = REP_ERROR + 1 };

struct handshake {
    struct link *link;
    bool zeroes;              /* behind the answer to EXPORT_NAME */
    uint32_t option, len;     /* the request */
    char data[MOST_OPTION];   /* its */
    char reply[MOST_OPTION];  /* one of its replies */
    char export[MOST_OPTION]; /* the one that contexts were chosen for */
    uint32_t export_len;
};

static bool send_reply(struct handshake *h, uint32_t type, const void *data, uint32_t len)
{
    uint8_t head[20];
    put_be64(head, REPLY_MAGIC);
    put_be32(head + 8, h->option);
    put_be32(head + 12, type);
    put_be32(head + 16, len);
    return link_give(h->link->client, head, sizeof(head)) && link_give(h->link->client, data, len);
}

/* ------------------------------------------------------------------ contexts */

/* A counted string of the request at *at, which moves behind it. False: the request is cut off. */
static bool next_string(const struct handshake *h, uint32_t *at, const char **text, uint32_t *len)
{
    if (h->len - *at < 4)
        return false;
    *len = get_be32(h->data + *at);
    *text = h->data + *at + 4;
    if (h->len - *at - 4 < *len)
        return false;
    *at += 4 + *len;
    return true;
}

static bool is_text(const char *text, uint32_t len, const char *expected)
{
    return len == strlen(expected) && memcmp(text, expected, len) == 0;
}

/* A list may be asked for with the beginning of names, up to a colon. */
static bool matches(const struct handshake *h, const char *query, uint32_t len, const char *name)
{
    if (is_text(query, len, name))
        return true;
    if (h->option != OPT_LIST_CONTEXTS)
        return false;
    return is_text(query, len, "qemu:") ||
           (is_text(query, len, CONTEXT_BITMAP) && strncmp(name, query, len) == 0);
}

/* Which of ours does the request want? */
static void find_contexts(const struct handshake *h, bool *wanted)
{
    const struct contexts *c = h->link->relay->contexts;
    const char *text;
    uint32_t at = 0, len, queries;
    if (!next_string(h, &at, &text, &len) || h->len - at < 4)
        return;
    queries = get_be32(h->data + at);
    at += 4;
    for (size_t i = 0; queries == 0 && h->option == OPT_LIST_CONTEXTS && i < c->n; i++)
        wanted[i] = true;
    for (uint32_t q = 0; q < queries && next_string(h, &at, &text, &len); q++)
        for (size_t i = 0; i < c->n; i++)
            wanted[i] |= matches(h, text, len, c->list[i].name);
}

/* The server has agreed to the request: add ours. */
static bool add_contexts(struct handshake *h)
{
    struct link *l = h->link;
    const struct contexts *c = l->relay->contexts;
    bool wanted[CONTEXT_MOST] = {false};
    find_contexts(h, wanted);
    for (size_t i = 0; i < c->n; i++) {
        size_t len = strlen(c->list[i].name);
        if (!wanted[i] || 4 + len > sizeof(h->reply))
            continue;
        put_be32(h->reply, h->option == OPT_SET_CONTEXTS ? CONTEXT_FIRST_ID + (uint32_t)i : 0);
        memcpy(h->reply + 4, c->list[i].name, len);
        if (!send_reply(h, REP_CONTEXT, h->reply, 4 + (uint32_t)len))
            return false;
        if (h->option == OPT_SET_CONTEXTS)
            l->any = l->selected[i] = true;
    }
    return true;
}

/* A new choice takes the place of the one before, also when it fails. */
static void begin_choice(struct handshake *h)
{
    const char *name;
    uint32_t at = 0;
    memset(h->link->selected, 0, sizeof(h->link->selected));
    h->link->any = h->link->base = false;
    h->export_len = 0;
    if (next_string(h, &at, &name, &h->export_len))
        memcpy(h->export, name, h->export_len);
}

/* The client uses an export. What it chose for another one is void. */
static void check_choice(struct handshake *h)
{
    const char *name = h->data;
    uint32_t at = 0, len = h->len;
    if (h->option == OPT_GO && !next_string(h, &at, &name, &len))
        return;
    if (len != h->export_len || memcmp(name, h->export, len) != 0)
        h->link->any = h->link->base = false;
}

/* ------------------------------------------------------------------ options and their replies */

/* One reply of the server. *last: it was the last one of this request. */
static bool pass_reply(struct handshake *h, uint32_t *type, bool *last)
{
    struct link *l = h->link;
    uint8_t head[20];
    if (!link_take(l, l->server, head, sizeof(head)) || get_be64(head) != REPLY_MAGIC)
        return false;
    uint32_t len = get_be32(head + 16);
    *type = get_be32(head + 12);
    *last = *type == REP_ACK || (*type & REP_ERROR);
    if (len > sizeof(h->reply) || !link_take(l, l->server, h->reply, len))
        return false;
    if (h->option == OPT_SET_CONTEXTS && *type == REP_CONTEXT)
        l->base = true;
    bool contexts = h->option == OPT_SET_CONTEXTS || h->option == OPT_LIST_CONTEXTS;
    if (contexts && *type == REP_ACK && l->relay->contexts && !add_contexts(h))
        return false;
    return link_give(l->client, head, sizeof(head)) && link_give(l->client, h->reply, len);
}

/* The size and the flags of the export, or the end of the connection. */
static bool pass_export(struct handshake *h)
{
    check_choice(h);
    return link_pump(h->link, h->link->server, h->link->client, h->zeroes ? 134 : 10);
}

static bool take_option(struct handshake *h, uint8_t *head)
{
    struct link *l = h->link;
    if (!link_take(l, l->client, head, 16) || get_be64(head) != OPTION_MAGIC)
        return false;
    h->option = get_be32(head + 8);
    h->len = get_be32(head + 12);
    return h->len <= sizeof(h->data) && link_take(l, l->client, h->data, h->len);
}

/* True: the client uses an export. */
static bool pass_options(struct handshake *h)
{
    struct link *l = h->link;
    uint8_t head[16];
    for (;;) {
        uint32_t type = 0;
        bool last = false;
        if (!take_option(h, head))
            return false;
        if (h->option == OPT_EXTENDED_HEADERS) { /* the relay does not know them */
            if (!send_reply(h, REP_ERR_UNSUP, "", 0))
                return false;
            continue;
        }
        if (h->option == OPT_SET_CONTEXTS)
            begin_choice(h);
        if (!link_give(l->server, head, sizeof(head)) || !link_give(l->server, h->data, h->len))
            return false;
        if (h->option == OPT_EXPORT_NAME)
            return pass_export(h);
        while (!last)
            if (!pass_reply(h, &type, &last))
                return false;
        if (h->option == OPT_ABORT)
            return false;
        if (h->option == OPT_GO && type == REP_ACK) {
            check_choice(h);
            return true;
        }
    }
}

bool link_negotiate(struct link *l)
{
    uint8_t greeting[18], flags[4];
    if (!link_take(l, l->server, greeting, sizeof(greeting)) ||
        !link_give(l->client, greeting, sizeof(greeting)) ||
        !link_take(l, l->client, flags, sizeof(flags)) ||
        !link_give(l->server, flags, sizeof(flags)))
        return false;
    struct handshake *h = calloc(1, sizeof(*h));
    if (!h)
        return false;
    h->link = l;
    h->zeroes = (get_be16(greeting + 16) & get_be32(flags) & NO_ZEROES) == 0;
    bool used = pass_options(h);
    free(h);
    return used;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/secret.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/cipher.h"
#include "base/cleanup.h"

struct secret {
    struct secret *next;
    char *id;
    void *data; /* by dr_key_alloc */
    size_t len;
};

static struct secret *secrets;
static pthread_mutex_t secrets_lock = PTHREAD_MUTEX_INITIALIZER;

static void secret_free(struct secret *s)
{
    dr_key_free(s->data, s->len);
    free(s->id);
    free(s);
}

/* The link to the secret, or to the end of the list. */
static struct secret **find(const char *id)
{
    struct secret **at = &secrets;
    while (*at && strcmp((*at)->id, id) != 0)
        at = &(*at)->next;
    return at;
}

DR_API int dr_secret_set(const char *id, const void *data, size_t len)
{
    struct secret *s = id && (data || !len) && len <= DR_SECRET_MAX ? calloc(1, sizeof(*s)) : NULL;
    if (!s)
        return id && (data || !len) && len <= DR_SECRET_MAX ? -ENOMEM : -EINVAL;
    s->id = strdup(id);
    s->data = dr_key_alloc(len + 1);
    s->len = len + 1;
    if (!s->id || !s->data) {
        secret_free(s);
        return -ENOMEM;
    }
    if (len)
        memcpy(s->data, data, len);
    DR_LOCK_SCOPE(&secrets_lock);
    struct secret **at = find(id), *old = *at;
    s->next = old ? old->next : NULL;
    *at = s;
    if (old)
        secret_free(old);
    return 0;
}

DR_API void dr_secret_forget(const char *id)
{
    DR_LOCK_SCOPE(&secrets_lock);
    for (struct secret **at = id ? find(id) : &secrets; *at;) {
        struct secret *gone = *at;
        *at = gone->next;
        secret_free(gone);
        if (id)
            break;
    }
}

int dr_secret_get(const char *id, const char *what, void **data, size_t *len, struct dr_error *err)
{
    DR_LOCK_SCOPE(&secrets_lock);
    const struct secret *s = *find(id);
    if (!s)
        return dr_fail(err, ENOENT, "%s: No secret with id '%s'", what, id);
    *len = s->len - 1;
    *data = dr_key_alloc(s->len);
    if (!*data)
        return dr_fail(err, ENOMEM, "%s: out of memory", what);
    memcpy(*data, s->data, *len);
    return 0;
}

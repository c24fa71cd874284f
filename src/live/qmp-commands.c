/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The table of commands, and what becomes of a line: parse it, look the command up, check its
 * arguments against the table, run it. Texts and classes of errors are QEMU's. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/json.h"
#include "live/live.h"

/* ------------------------------------------------------------------ what commands use */

json_t *qmp_fail(struct qmp_error *err, const char *class, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err->text.text, sizeof(err->text.text), fmt, ap);
    va_end(ap);
    err->text.errnum = EINVAL;
    err->class = class;
    return NULL;
}

json_t *qmp_done(int r)
{
    return r < 0 ? NULL : json_object();
}

const char *qmp_string(json_t *args, const char *name)
{
    return json_string_value(json_object_get(args, name));
}

bool qmp_bool(json_t *args, const char *name, bool otherwise)
{
    const json_t *value = json_object_get(args, name);
    return value ? json_is_true(value) : otherwise;
}

uint64_t qmp_number(json_t *args, const char *name)
{
    return (uint64_t)json_integer_value(json_object_get(args, name));
}

static struct live_disk *find_disk(struct dr_live *live, const char *device, const char *node,
                                   struct qmp_error *err)
{
    const char *name = node ? node : device;
    pthread_mutex_lock(&live->lock);
    struct live_disk *on = name ? live_find_device(live, name) : NULL;
    struct live_node *closed = name && !on ? live_find_node(live, name) : NULL;
    pthread_mutex_unlock(&live->lock);
    if (!on && closed && closed->format)
        return live_node_disk(live, closed, &err->text);
    if (!on)
        qmp_fail(err, NULL, "Cannot find device='%s' nor node-name='%s'", device ? device : "",
                 node ? node : "");
    return on;
}

struct live_disk *qmp_device(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    return find_disk(live, qmp_string(args, "device"), qmp_string(args, "node-name"), err);
}

struct live_disk *qmp_root_device(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    const char *device = qmp_string(args, "device");
    return find_disk(live, device, device, err);
}

struct live_disk *qmp_node_device(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    const char *node = qmp_string(args, "node");
    return find_disk(live, node, node, err);
}

/* ------------------------------------------------------------------ arguments */

static bool has_type(const json_t *value, char type)
{
    switch (type) {
    case 's': /* names go to functions that end a string at its first NUL */
        return json_is_string(value) &&
               strlen(json_string_value(value)) == json_string_length(value);
    case 'n':
    case 'u':
        return json_is_integer(value);
    case 'b':
        return json_is_boolean(value);
    case 'o':
        return json_is_object(value);
    case 'R':
        if (json_is_null(value))
            return true;
        /* fall through */
    case 'r':
        return json_is_object(value) || has_type(value, 's');
    default:
        return json_is_array(value);
    }
}

static const char *type_name(char type)
{
    switch (type) {
    case 's':
        return "string";
    case 'n':
        return "integer";
    case 'b':
        return "boolean";
    case 'o':
        return "object";
    case 'r':
        return "BlockdevRef";
    case 'R':
        return "BlockdevRefOrNull";
    default:
        return "array";
    }
}

static const struct qmp_arg *find_arg(const struct qmp_arg *table, const char *name)
{
    while (table->name && strcmp(table->name, name) != 0)
        table++;
    return table->name ? table : NULL;
}

static int check_known(const struct qmp_arg *table, const char *where, json_t *args,
                       struct qmp_error *err)
{
    for (; table->name; table++) {
        const json_t *value = json_object_get(args, table->name);
        if (!value && table->required) {
            qmp_fail(err, NULL, "Parameter '%s%s' is missing", where, table->name);
            return -EINVAL;
        }
        if (value && table->type == 'u' &&
            (!json_is_integer(value) || json_integer_value(value) < 0)) {
            qmp_fail(err, NULL, "Parameter '%s%s' expects uint64", where, table->name);
            return -EINVAL;
        }
        if (value && !has_type(value, table->type)) {
            qmp_fail(err, NULL, "Invalid parameter type for '%s%s', expected: %s", where,
                     table->name, type_name(table->type));
            return -EINVAL;
        }
        if (value && table->type == 'n' && json_integer_value(value) < 0) {
            qmp_fail(err, NULL, "Parameter '%s%s' expects a non-negative value", where,
                     table->name);
            return -EINVAL;
        }
    }
    return 0;
}

int qmp_check_args(const struct qmp_arg *table, const char *where, json_t *args,
                   struct qmp_error *err)
{
    const char *name;
    json_t *value;
    int r = check_known(table, where, args, err);
    if (r < 0)
        return r;
    json_object_foreach(args, name, value) if (!find_arg(table, name))
    {
        qmp_fail(err, NULL, "Parameter '%s%s' is unexpected", where, name);
        return -EINVAL;
    }
    return 0;
}

/* ------------------------------------------------------------------ commands about the wire */

static json_t *version(void)
{
    int major = 0, minor = 0, micro = 0;
    if (sscanf(dr_version(), "%d.%d.%d", &major, &minor, &micro) < 1)
        return NULL;
    return json_pack("{s:{s:i, s:i, s:i}, s:s}", "qemu", "major", major, "minor", minor, "micro",
                     micro, "package", "drover");
}

json_t *qmp_greeting(void)
{
    return json_pack("{s:{s:o, s:[]}}", "QMP", "version", version(), "capabilities");
}

static json_t *query_version(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    (void)live, (void)args, (void)err;
    return version();
}

static json_t *query_commands(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    json_t *all = json_array();
    (void)live, (void)args, (void)err;
    for (size_t t = 0; qmp_tables[t]; t++)
        for (const struct qmp_command *c = qmp_tables[t]; c->name; c++)
            json_array_append_new(all, json_pack("{s:s}", "name", c->name));
    return all;
}

static json_t *capabilities(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    (void)live;
    if (json_array_size(json_object_get(args, "enable")) > 0)
        return qmp_fail(err, NULL, "Capability is not available: out-of-band is not offered");
    return json_object();
}

static json_t *quit(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    (void)args;
    if (!live->quit)
        return qmp_fail(err, NULL, "This server is not ended over its control socket");
    DR_LOCK_SCOPE(&live->lock);
    live->quitting = true;
    return json_object();
}

const struct qmp_command qmp_own_commands[] = {
    {"qmp_capabilities", capabilities, {{"enable", 'l', false}}},
    {"query-version", query_version, {{0}}},
    {"query-commands", query_commands, {{0}}},
    {"quit", quit, {{0}}},
    {0},
};

const struct qmp_command *const qmp_tables[] = {
    qmp_own_commands,    qmp_disk_commands,     qmp_node_commands,        qmp_export_commands,
    qmp_job_commands,    qmp_edit_commands,     qmp_archive_commands,     qmp_bitmap_commands,
    qmp_backup_commands, qmp_snapshot_commands, qmp_transaction_commands, NULL};

/* ------------------------------------------------------------------ a line */

const struct qmp_command *qmp_find_command(const char *name)
{
    for (size_t t = 0; qmp_tables[t]; t++)
        for (const struct qmp_command *c = qmp_tables[t]; c->name; c++)
            if (strcmp(c->name, name) == 0)
                return c;
    return NULL;
}

/* "execute", and nothing else but "arguments" and "id". NULL: err says what is wrong. */
static const char *command_of(json_t *request, struct qmp_error *err)
{
    const char *name;
    json_t *value;
    if (!json_is_object(request)) {
        qmp_fail(err, NULL, "QMP input must be a JSON object");
        return NULL;
    }
    json_object_foreach(request, name, value)
    {
        if (strcmp(name, "exec-oob") == 0) {
            qmp_fail(err, NULL,
                     "QMP input member 'exec-oob' is refused: out-of-band is not "
                     "offered");
            return NULL;
        }
        if (strcmp(name, "execute") != 0 && strcmp(name, "arguments") != 0 &&
            strcmp(name, "id") != 0) {
            qmp_fail(err, NULL, "QMP input member '%s' is unexpected", name);
            return NULL;
        }
    }
    if (json_object_get(request, "arguments") &&
        !json_is_object(json_object_get(request, "arguments"))) {
        qmp_fail(err, NULL, "QMP input member 'arguments' must be an object");
        return NULL;
    }
    if (!json_object_get(request, "execute"))
        qmp_fail(err, NULL, "QMP input lacks member 'execute'");
    else if (!json_is_string(json_object_get(request, "execute")))
        qmp_fail(err, NULL, "QMP input member 'execute' must be a string");
    return qmp_string(request, "execute");
}

static json_t *run(struct dr_live *live, const char *name, json_t *args, bool *negotiated,
                   struct qmp_error *err)
{
    const struct qmp_command *command = qmp_find_command(name);
    bool capable = strcmp(name, "qmp_capabilities") == 0;
    if (!command)
        return qmp_fail(err, "CommandNotFound", "The command %s has not been found", name);
    if (capable && *negotiated)
        return qmp_fail(err, "CommandNotFound",
                        "Capabilities negotiation is already complete, command ignored");
    if (!capable && !*negotiated)
        return qmp_fail(err, "CommandNotFound",
                        "Expecting capabilities negotiation with 'qmp_capabilities'");
    bool checks_itself = command->args[0].name && strcmp(command->args[0].name, "*") == 0;
    if (!checks_itself && qmp_check_args(command->args, "", args, err) < 0)
        return NULL;
    json_t *result = command->run(live, args, err);
    *negotiated |= capable && result;
    if (live_state_save_if_changed(live, &err->text) < 0 && result) {
        json_decref(result);
        return NULL; /* the job goes on, but would not outlive this process: the text says why */
    }
    return result;
}

/* json_dumps() refuses what is not UTF-8; dr_json_text() makes it some. */
static json_t *error_of(const struct qmp_error *err)
{
    return json_pack("{s:s, s:o}", "class", err->class ? err->class : "GenericError", "desc",
                     dr_json_text(err->text.text[0] ? err->text.text : "out of memory"));
}

json_t *qmp_answer(struct dr_live *live, const char *line, size_t len, bool *negotiated)
{
    struct qmp_error err = QMP_ERROR_INIT;
    json_error_t why;
    json_t *request = json_loadb(line, len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &why);
    json_t *result = NULL;
    if (!request)
        qmp_fail(&err, NULL, "JSON parse error, %s", why.text);
    else {
        const char *name = command_of(request, &err);
        json_t *none = json_object(), *args = json_object_get(request, "arguments");
        if (name)
            result = run(live, name, args ? args : none, negotiated, &err);
        json_decref(none);
    }
    json_t *reply = json_object();
    if (result)
        json_object_set_new(reply, "return", result);
    else
        json_object_set_new(reply, "error", error_of(&err));
    if (json_is_object(request) && json_object_get(request, "id"))
        json_object_set(reply, "id", json_object_get(request, "id"));
    json_decref(request);
    return reply;
}

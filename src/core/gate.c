/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The open gate (invariant 6): which files a name found inside an image may lead to. */
#include <stdio.h>

#include "core/internal.h"
#include "storage/part.h"
#include "storage/remote.h"

#define ENV_ALLOW    "DROVER_ALLOW_PATH"
#define SYSTEM_ALLOW "/etc/drover/allow-paths"

static int gate_add(struct dr_gate *gate, const char *dir, struct dr_error *err)
{
    char *real = NULL;
    if (*dir == '\0')
        return 0;
    if (gate->fs->ops->realpath(gate->fs, dir, &real, NULL) < 0)
        return 0; /* a directory that is not there allows nothing */
    size_t n = 0;
    while (gate->allowed && gate->allowed[n])
        n++;
    char **grown = realloc(gate->allowed, (n + 2) * sizeof(char *));
    if (!grown) {
        free(real);
        return dr_fail(err, ENOMEM, "%s: out of memory", dir);
    }
    grown[n] = real;
    grown[n + 1] = NULL;
    gate->allowed = grown;
    return 0;
}

/* The next name of a list with colons, of which those in "https://host:8080/dir" separate nothing.
 */
static char *next_allowed(char **rest)
{
    char *name = *rest, *end = name;
    if (!name)
        return NULL;
    for (end += strcspn(end, ":"); *end; end += 1 + strcspn(end + 1, ":")) {
        bool behind_scheme = strncmp(end, "://", 3) == 0;
        bool is_port = end[1] >= '0' && end[1] <= '9';
        if (!dr_remote_is(name) || (!behind_scheme && !is_port))
            break;
    }
    *rest = *end ? end + 1 : NULL;
    *end = '\0';
    return name;
}

static int gate_add_environment(struct dr_gate *gate, struct dr_error *err)
{
    const char *env = getenv(ENV_ALLOW);
    CLEANUP_FREE char *list = strdup(env ? env : "");
    if (!list)
        return dr_fail(err, ENOMEM, "out of memory");
    char *rest = list, *dir;
    int r = 0;
    while (r == 0 && (dir = next_allowed(&rest)))
        r = gate_add(gate, dir, err);
    return r;
}

static int gate_add_system(struct dr_gate *gate, struct dr_error *err)
{
    FILE *f = fopen(SYSTEM_ALLOW, "re");
    char line[4096];
    int r = 0;
    while (f && r == 0 && fgets(line, sizeof(line), f)) {
        line[strcspn(line, "\r\n")] = '\0';
        if (line[0] == '/' || dr_remote_is(line))
            r = gate_add(gate, line, err);
    }
    if (f)
        fclose(f);
    return r;
}

int dr_gate_make(struct dr_gate *gate, struct dr_fs *fs, const struct dr_open_options *options,
                 struct dr_error *err)
{
    *gate = (struct dr_gate){.fs = fs, .any = options->flags & DR_OPEN_ANY_PATH};
    int r = 0;
    for (size_t i = 0; r == 0 && options->allow_paths && options->allow_paths[i]; i++)
        r = gate_add(gate, options->allow_paths[i], err);
    if (r == 0)
        r = gate_add_environment(gate, err);
    if (r == 0 && fs == dr_fs_posix())
        r = gate_add_system(gate, err);
    if (r < 0)
        dr_gate_clear(gate);
    return r;
}

void dr_gate_clear(struct dr_gate *gate)
{
    for (size_t i = 0; gate->allowed && gate->allowed[i]; i++)
        free(gate->allowed[i]);
    free(gate->allowed);
    gate->allowed = NULL;
}

int dr_real_dir(struct dr_fs *fs, const char *dir, char **real, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = fs->ops->realpath(fs, dir, real, &why);
    if (r == -ENOENT && !fs->ops->mkdir)
        return (*real = strdup(dir)) ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", dir);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

/* Does real lie in the tree of the directory that path is in? path may be a link: both directories
 * count. */
int dr_gate_own_tree(struct dr_fs *fs, const char *path, const char *real, bool *inside,
                     struct dr_error *err)
{
    CLEANUP_FREE char *own = NULL, *bottom = dr_part_bottom(path);
    if (!bottom)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    path = bottom; /* a part is where its file is */
    const char *from[2] = {path, NULL};
    *inside = false;
    struct dr_error why = DR_ERROR_INIT;
    int r = fs->ops->realpath(fs, path, &own, &why);
    if (r < 0 && r != -ENOENT) /* a new image is not there yet: its directory counts */
        return dr_fail(err, -r, "%s", why.text);
    from[1] = own;
    r = 0;
    for (int i = 0; r == 0 && i < 2 && from[i] && !*inside; i++) {
        if (dr_remote_is(from[i]) && !dr_remote_path_length(from[i]))
            continue;
        CLEANUP_FREE char *dir = dr_path_dirname(from[i]);
        CLEANUP_FREE char *real_dir = NULL;
        if (!dir)
            return dr_fail(err, ENOMEM, "%s: out of memory", path);
        r = dr_real_dir(fs, dir, &real_dir, err);
        *inside = r == 0 && dr_path_inside(real_dir, real);
    }
    return r;
}

/* A remote name may be allowed alone, too, and only alone where the server itself is named behind
 * the path: "&socket=" there would lead to another one. */
static bool is_allowed(const char *allowed, const char *real)
{
    if (!dr_remote_is(real))
        return dr_path_inside(allowed, real);
    return strcmp(allowed, real) == 0 || (dr_remote_path_length(real) > 0 &&
                                          !strchr(allowed, '?') && dr_path_inside(allowed, real));
}

static int pass_real(const struct dr_gate *gate, const char *from, const char *real,
                     const char *what, struct dr_error *err)
{
    bool inside = false;
    CLEANUP_FREE char *bottom = dr_part_bottom(real);
    if (!bottom)
        return dr_fail(err, ENOMEM, "%s: out of memory", real);
    real = bottom;
    int r = dr_gate_own_tree(gate->fs, from, real, &inside, err);
    if (r < 0 || inside)
        return r;
    for (size_t i = 0; gate->allowed && gate->allowed[i]; i++)
        if (is_allowed(gate->allowed[i], real))
            return 0;
    CLEANUP_FREE char *dir = dr_remote_is(real) ? strdup(real) : dr_path_dirname(real);
    return dr_fail(err, EACCES,
                   "%s: refuses to open its %s %s: it is outside the image's directory; "
                   "allow it with --allow-path %s, or in " ENV_ALLOW " or " SYSTEM_ALLOW,
                   from, what, real, dir ? dir : "DIR");
}

int dr_gate_pass(const struct dr_gate *gate, const char *from, const char *path,
                 struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    DR_CLEANUP_NAME struct dr_name name = {0};
    if (gate->any)
        return 0;
    int r = dr_name_parse(gate->fs, path, &name, err);
    if (r == 0)
        r = gate->fs->ops->realpath(gate->fs, name.file, &real, err);
    return r < 0 ? r : pass_real(gate, from, real, "backing file", err);
}

int dr_gate_pass_file(const struct dr_gate *gate, const char *from, struct dr_file *file,
                      struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    if (gate->any)
        return 0;
    int r = dr_file_where(gate->fs, file, &real, err);
    return r == 0 ? pass_real(gate, from, real, "backing file", err) : r == -ENOTSUP ? 0 : r;
}

int dr_gate_pass_further(const struct dr_gate *gate, const char *from, const char *real,
                         const char *what, struct dr_error *err)
{
    return gate->any ? 0 : pass_real(gate, from, real, what, err);
}

int dr_gate_check_new(struct dr_fs *fs, const char *from, const char *path,
                      const struct dr_open_options *options, struct dr_error *err)
{
    static const struct dr_open_options defaults;
    struct dr_gate gate = {0};
    if (dr_fs_exists(fs, path))
        return dr_gate_check(fs, from, path, options, err);
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    CLEANUP_FREE char *real_dir = NULL;
    if (!dir)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_real_dir(fs, dir, &real_dir, err);
    if (r == 0)
        r = dr_gate_make(&gate, fs, options ? options : &defaults, err);
    if (r < 0)
        return r;
    CLEANUP_FREE char *real = dr_path_join(real_dir, dr_path_basename(path));
    if (!real)
        r = dr_fail(err, ENOMEM, "%s: out of memory", path);
    else if (!gate.any)
        r = pass_real(&gate, from, real, "new image", err);
    dr_gate_clear(&gate);
    return r;
}

int dr_gate_check(struct dr_fs *fs, const char *from, const char *path,
                  const struct dr_open_options *options, struct dr_error *err)
{
    static const struct dr_open_options defaults;
    struct dr_gate gate;
    int r = dr_gate_make(&gate, fs, options ? options : &defaults, err);
    if (r < 0)
        return r;
    r = dr_gate_pass(&gate, from, path, err);
    dr_gate_clear(&gate);
    return r;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <dlfcn.h>

#include "base/cleanup.h"
#include "base/loaded.h"

int dr_load_library(struct dr_loaded_library *library, struct dr_error *err)
{
    DR_LOCK_SCOPE(&library->lock);
    if (library->handle)
        return 0;
    void *handle = dlopen(library->file, RTLD_LAZY | RTLD_LOCAL);
    if (!handle)
        return dr_fail(err, ENOENT, "cannot load %s: %s", library->file, dlerror());
    for (size_t i = 0; i < library->n; i++) {
        const struct dr_loaded_function *f = &library->functions[i];
        if (!(*f->at = dlsym(handle, f->name)))
            return dr_fail(err, ENOENT,
                           "%s has no function %s: it is older than this program needs",
                           library->file, f->name);
    }
    library->handle = handle;
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Libraries that are loaded when the first of their functions is needed.
 *
 * libcurl alone brings thirty others. A program that opens a local disk would spend most of the
 * time in which it starts on linking what it never calls. So these libraries are not linked: a file
 * defines the functions of one that the house calls, under their own names, and each hands its
 * arguments on to the real one.
 *
 *   #define FUNCTIONS(F) \
 *       F(int, nbd_close, (struct nbd_handle *h), (h)) \
 *       F(...)
 *   DR_LOADED_LIBRARY(nbd, DR_SONAME_NBD, FUNCTIONS, DR_LOADED_NONE)
 *
 * makes dr_load_nbd(), which must have returned 0 before any of them is called. The last argument
 * lists those with "..." among their parameters, which the file writes out itself, with real_NAME.
 * Callable from all threads.
 */
#ifndef DR_BASE_LOADED_H
#define DR_BASE_LOADED_H

#include <assert.h>
#include <pthread.h>
#include <stddef.h>

#include "base/error.h"

struct dr_loaded_function {
    const char *name;
    void **at; /* where the address of the real one goes */
};

struct dr_loaded_library {
    const char *file;
    const struct dr_loaded_function *functions;
    size_t n;
    pthread_mutex_t lock;
    void *handle; /* never closed; set last */
};

int dr_load_archive(struct dr_error *err); /* libarchive */
int dr_load_curl(struct dr_error *err);
int dr_load_gcrypt(struct dr_error *err);
int dr_load_nbd(struct dr_error *err);
int dr_load_xml(struct dr_error *err); /* libxml2 */

/* Loads a library whose functions were not found yet. -ENOENT with the loader's reason. */
int dr_load_library(struct dr_loaded_library *library, struct dr_error *err);

#define DR_LOADED_REAL(type, name, params, args)  static type(*real_##name) params;
#define DR_LOADED_ENTRY(type, name, params, args) {#name, (void **)&real_##name},
#define DR_LOADED_NONE(F)
#define DR_LOADED_CALL(type, name, params, args)                       \
    type name params                                                   \
    {                                                                  \
        assert(real_##name); /* dr_load_...() has returned 0 before */ \
        return real_##name args;                                       \
    }

#define DR_LOADED_LIBRARY(library, soname, FUNCTIONS, VARIADIC)                                  \
    FUNCTIONS(DR_LOADED_REAL)                                                                    \
    VARIADIC(DR_LOADED_REAL)                                                                     \
    static const struct dr_loaded_function library##_functions[] = {                             \
        FUNCTIONS(DR_LOADED_ENTRY) VARIADIC(DR_LOADED_ENTRY)};                                   \
    static struct dr_loaded_library library##_library = {                                        \
        soname, library##_functions, sizeof(library##_functions) / sizeof(*library##_functions), \
        PTHREAD_MUTEX_INITIALIZER, NULL};                                                        \
    int dr_load_##library(struct dr_error *err)                                                  \
    {                                                                                            \
        return dr_load_library(&library##_library, err);                                         \
    }                                                                                            \
    FUNCTIONS(DR_LOADED_CALL)

#endif

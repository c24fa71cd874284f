/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdarg.h>
#include <stdio.h>
#include <archive.h>
#include <archive_entry.h>

#include "base/loaded.h"

#define VARIADIC(F) \
    F(void, archive_set_error, (struct archive * a, int number, const char *format, ...), )

#define FUNCTIONS(F)                                                                          \
    F(mode_t, archive_entry_filetype, (struct archive_entry * a), (a))                        \
    F(void, archive_entry_free, (struct archive_entry * a), (a))                              \
    F(const char *, archive_entry_hardlink, (struct archive_entry * a), (a))                  \
    F(struct archive_entry *, archive_entry_new, (void), ())                                  \
    F(const char *, archive_entry_pathname, (struct archive_entry * a), (a))                  \
    F(const char *, archive_entry_pathname_utf8, (struct archive_entry * a), (a))             \
    F(void, archive_entry_set_filetype, (struct archive_entry * a, unsigned int b), (a, b))   \
    F(void, archive_entry_set_mtime, (struct archive_entry * a, time_t b, long c), (a, b, c)) \
    F(void, archive_entry_set_pathname, (struct archive_entry * a, const char *b), (a, b))    \
    F(void, archive_entry_set_perm, (struct archive_entry * a, mode_t b), (a, b))             \
    F(void, archive_entry_set_size, (struct archive_entry * a, la_int64_t b), (a, b))         \
    F(la_int64_t, archive_entry_size, (struct archive_entry * a), (a))                        \
    F(int, archive_entry_size_is_set, (struct archive_entry * a), (a))                        \
    F(int, archive_entry_sparse_count, (struct archive_entry * a), (a))                       \
    F(int, archive_errno, (struct archive * a), (a))                                          \
    F(const char *, archive_error_string, (struct archive * a), (a))                          \
    F(la_int64_t, archive_filter_bytes, (struct archive * a, int b), (a, b))                  \
    F(int, archive_read_free, (struct archive * a), (a))                                      \
    F(la_int64_t, archive_read_header_position, (struct archive * a), (a))                    \
    F(struct archive *, archive_read_new, (void), ())                                         \
    F(int, archive_read_next_header, (struct archive * a, struct archive_entry * *b), (a, b)) \
    F(int, archive_read_open1, (struct archive * a), (a))                                     \
    F(int, archive_read_set_callback_data, (struct archive * a, void *b), (a, b))             \
    F(int, archive_read_set_read_callback, (struct archive * a, archive_read_callback * b),   \
      (a, b))                                                                                 \
    F(int, archive_read_set_skip_callback, (struct archive * a, archive_skip_callback * b),   \
      (a, b))                                                                                 \
    F(int, archive_read_support_format_tar, (struct archive * a), (a))                        \
    F(int, archive_write_free, (struct archive * a), (a))                                     \
    F(int, archive_write_header, (struct archive * a, struct archive_entry * b), (a, b))      \
    F(struct archive *, archive_write_new, (void), ())                                        \
    F(int, archive_write_open,                                                                \
      (struct archive * a, void *b, archive_open_callback *c, archive_write_callback *d,      \
       archive_close_callback *e),                                                            \
      (a, b, c, d, e))                                                                        \
    F(int, archive_write_set_bytes_per_block, (struct archive * a, int bytes_per_block),      \
      (a, bytes_per_block))                                                                   \
    F(int, archive_write_set_format_gnutar, (struct archive * a), (a))                        \
    F(int, archive_write_set_format_ustar, (struct archive * a), (a))

DR_LOADED_LIBRARY(archive, DR_SONAME_ARCHIVE, FUNCTIONS, VARIADIC)

void archive_set_error(struct archive *a, int number, const char *format, ...)
{
    char text[sizeof(((struct dr_error *)0)->text)];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    real_archive_set_error(a, number, "%s", text);
}

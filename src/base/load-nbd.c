/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <libnbd.h>

#include "base/loaded.h"

#define FUNCTIONS(F)                                                                           \
    F(int, nbd_add_meta_context, (struct nbd_handle * h, const char *name), (h, name))         \
    F(int64_t, nbd_aio_block_status,                                                           \
      (struct nbd_handle * h, uint64_t count, uint64_t offset,                                 \
       nbd_extent_callback extent_callback, nbd_completion_callback completion_callback,       \
       uint32_t flags),                                                                        \
      (h, count, offset, extent_callback, completion_callback, flags))                         \
    F(int, nbd_aio_connect_uri, (struct nbd_handle * h, const char *uri), (h, uri))            \
    F(int, nbd_aio_disconnect, (struct nbd_handle * h, uint32_t flags), (h, flags))            \
    F(int64_t, nbd_aio_flush,                                                                  \
      (struct nbd_handle * h, nbd_completion_callback completion_callback, uint32_t flags),    \
      (h, completion_callback, flags))                                                         \
    F(unsigned, nbd_aio_get_direction, (struct nbd_handle * h), (h))                           \
    F(int, nbd_aio_get_fd, (struct nbd_handle * h), (h))                                       \
    F(int, nbd_aio_is_closed, (struct nbd_handle * h), (h))                                    \
    F(int, nbd_aio_is_connecting, (struct nbd_handle * h), (h))                                \
    F(int, nbd_aio_is_dead, (struct nbd_handle * h), (h))                                      \
    F(int, nbd_aio_is_ready, (struct nbd_handle * h), (h))                                     \
    F(int, nbd_aio_notify_read, (struct nbd_handle * h), (h))                                  \
    F(int, nbd_aio_notify_write, (struct nbd_handle * h), (h))                                 \
    F(int64_t, nbd_aio_pread_structured,                                                       \
      (struct nbd_handle * h, void *buf, size_t count, uint64_t offset,                        \
       nbd_chunk_callback chunk_callback, nbd_completion_callback completion_callback,         \
       uint32_t flags),                                                                        \
      (h, buf, count, offset, chunk_callback, completion_callback, flags))                     \
    F(int64_t, nbd_aio_pwrite,                                                                 \
      (struct nbd_handle * h, const void *buf, size_t count, uint64_t offset,                  \
       nbd_completion_callback completion_callback, uint32_t flags),                           \
      (h, buf, count, offset, completion_callback, flags))                                     \
    F(int64_t, nbd_aio_zero,                                                                   \
      (struct nbd_handle * h, uint64_t count, uint64_t offset,                                 \
       nbd_completion_callback completion_callback, uint32_t flags),                           \
      (h, count, offset, completion_callback, flags))                                          \
    F(int, nbd_can_cache, (struct nbd_handle * h), (h))                                        \
    F(int, nbd_can_df, (struct nbd_handle * h), (h))                                           \
    F(int, nbd_can_fast_zero, (struct nbd_handle * h), (h))                                    \
    F(int, nbd_can_flush, (struct nbd_handle * h), (h))                                        \
    F(int, nbd_can_fua, (struct nbd_handle * h), (h))                                          \
    F(int, nbd_can_meta_context, (struct nbd_handle * h, const char *metacontext),             \
      (h, metacontext))                                                                        \
    F(int, nbd_can_multi_conn, (struct nbd_handle * h), (h))                                   \
    F(int, nbd_can_trim, (struct nbd_handle * h), (h))                                         \
    F(int, nbd_can_zero, (struct nbd_handle * h), (h))                                         \
    F(void, nbd_close, (struct nbd_handle * h), (h))                                           \
    F(int, nbd_connect_tcp, (struct nbd_handle * h, const char *hostname, const char *port),   \
      (h, hostname, port))                                                                     \
    F(int, nbd_connect_unix, (struct nbd_handle * h, const char *unixsocket), (h, unixsocket)) \
    F(struct nbd_handle *, nbd_create, (void), ())                                             \
    F(int64_t, nbd_get_block_size, (struct nbd_handle * h, int size_type), (h, size_type))     \
    F(int, nbd_get_errno, (void), ())                                                          \
    F(const char *, nbd_get_error, (void), ())                                                 \
    F(int64_t, nbd_get_size, (struct nbd_handle * h), (h))                                     \
    F(int, nbd_is_read_only, (struct nbd_handle * h), (h))                                     \
    F(int, nbd_is_rotational, (struct nbd_handle * h), (h))                                    \
    F(int, nbd_opt_abort, (struct nbd_handle * h), (h))                                        \
    F(int, nbd_opt_info, (struct nbd_handle * h), (h))                                         \
    F(int, nbd_opt_list, (struct nbd_handle * h, nbd_list_callback list_callback),             \
      (h, list_callback))                                                                      \
    F(int, nbd_opt_list_meta_context,                                                          \
      (struct nbd_handle * h, nbd_context_callback context_callback), (h, context_callback))   \
    F(int, nbd_set_export_name, (struct nbd_handle * h, const char *export_name),              \
      (h, export_name))                                                                        \
    F(int, nbd_set_opt_mode, (struct nbd_handle * h, bool enable), (h, enable))                \
    F(int, nbd_set_pread_initialize, (struct nbd_handle * h, bool request), (h, request))      \
    F(int, nbd_set_tls, (struct nbd_handle * h, int tls), (h, tls))                            \
    F(int, nbd_set_tls_certificates, (struct nbd_handle * h, const char *dir), (h, dir))       \
    F(int, nbd_set_tls_psk_file, (struct nbd_handle * h, const char *filename), (h, filename)) \
    F(int, nbd_set_tls_username, (struct nbd_handle * h, const char *username), (h, username)) \
    F(int, nbd_set_uri_allow_local_file, (struct nbd_handle * h, bool allow), (h, allow))      \
    F(int, nbd_set_uri_allow_transports, (struct nbd_handle * h, uint32_t mask), (h, mask))

DR_LOADED_LIBRARY(nbd, DR_SONAME_NBD, FUNCTIONS, DR_LOADED_NONE)

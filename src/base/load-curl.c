/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdarg.h>
#include <curl/curl.h>

#include "base/loaded.h"

/* Checks of the arguments, for callers. */
#undef curl_easy_setopt
#undef curl_easy_getinfo

#define VARIADIC(F)                                                     \
    F(CURLcode, curl_easy_getinfo, (CURL * curl, CURLINFO info, ...), ) \
    F(CURLcode, curl_easy_setopt, (CURL * curl, CURLoption option, ...), )

#define FUNCTIONS(F)                                                                               \
    F(void, curl_easy_cleanup, (CURL * curl), (curl))                                              \
    F(CURL *, curl_easy_init, (void), ())                                                          \
    F(CURLcode, curl_easy_perform, (CURL * curl), (curl))                                          \
    F(void, curl_easy_reset, (CURL * curl), (curl))                                                \
    F(const char *, curl_easy_strerror, (CURLcode a), (a))                                         \
    F(char *, curl_easy_unescape, (CURL * handle, const char *string, int length, int *outlength), \
      (handle, string, length, outlength))                                                         \
    F(void, curl_free, (void *p), (p))                                                             \
    F(CURLcode, curl_global_init, (long flags), (flags))                                           \
    F(struct curl_slist *, curl_slist_append, (struct curl_slist * list, const char *data),        \
      (list, data))                                                                                \
    F(void, curl_slist_free_all, (struct curl_slist * list), (list))                               \
    F(CURLU *, curl_url, (void), ())                                                               \
    F(void, curl_url_cleanup, (CURLU * handle), (handle))                                          \
    F(CURLUcode, curl_url_get, (CURLU * handle, CURLUPart what, char **part, unsigned int flags),  \
      (handle, what, part, flags))                                                                 \
    F(CURLUcode, curl_url_set,                                                                     \
      (CURLU * handle, CURLUPart what, const char *part, unsigned int flags),                      \
      (handle, what, part, flags))                                                                 \
    F(const char *, curl_url_strerror, (CURLUcode a), (a))

DR_LOADED_LIBRARY(curl, DR_SONAME_CURL, FUNCTIONS, VARIADIC)

/* The type of the value is the option's. */
CURLcode curl_easy_setopt(CURL *curl, CURLoption option, ...)
{
    CURLcode code;
    va_list value;
    va_start(value, option);
    if (option < CURLOPTTYPE_OBJECTPOINT)
        code = real_curl_easy_setopt(curl, option, va_arg(value, long));
    else if (option >= CURLOPTTYPE_OFF_T && option < CURLOPTTYPE_BLOB)
        code = real_curl_easy_setopt(curl, option, va_arg(value, curl_off_t));
    else
        code = real_curl_easy_setopt(curl, option, va_arg(value, void *));
    va_end(value);
    return code;
}

CURLcode curl_easy_getinfo(CURL *curl, CURLINFO info, ...)
{
    va_list value;
    va_start(value, info);
    CURLcode code = real_curl_easy_getinfo(curl, info, va_arg(value, void *));
    va_end(value);
    return code;
}

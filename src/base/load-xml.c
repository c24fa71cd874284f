/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <libxml/xmlmemory.h>
#include <libxml/xmlreader.h>

#include "base/loaded.h"

#define FUNCTIONS(F)                                                                               \
    F(xmlGenericErrorFunc *, __xmlGenericError, (void), ())                                        \
    F(void **, __xmlGenericErrorContext, (void), ())                                               \
    F(xmlStructuredErrorFunc *, __xmlStructuredError, (void), ())                                  \
    F(void **, __xmlStructuredErrorContext, (void), ())                                            \
    F(void, xmlFreeTextReader, (xmlTextReaderPtr reader), (reader))                                \
    F(int, xmlMemGet,                                                                              \
      (xmlFreeFunc * release, xmlMallocFunc * get, xmlReallocFunc * resize, xmlStrdupFunc * copy), \
      (release, get, resize, copy))                                                                \
    F(xmlTextReaderPtr, xmlReaderForMemory,                                                        \
      (const char *buffer, int size, const char *URL, const char *encoding, int options),          \
      (buffer, size, URL, encoding, options))                                                      \
    F(void, xmlSetGenericErrorFunc, (void *ctx, xmlGenericErrorFunc handler), (ctx, handler))      \
    F(void, xmlSetStructuredErrorFunc, (void *ctx, xmlStructuredErrorFunc handler),                \
      (ctx, handler))                                                                              \
    F(const xmlChar *, xmlTextReaderConstLocalName, (xmlTextReaderPtr reader), (reader))           \
    F(const xmlChar *, xmlTextReaderConstValue, (xmlTextReaderPtr reader), (reader))               \
    F(int, xmlTextReaderDepth, (xmlTextReaderPtr reader), (reader))                                \
    F(int, xmlTextReaderGetParserLineNumber, (xmlTextReaderPtr reader), (reader))                  \
    F(int, xmlTextReaderIsNamespaceDecl, (xmlTextReaderPtr reader), (reader))                      \
    F(int, xmlTextReaderMoveToElement, (xmlTextReaderPtr reader), (reader))                        \
    F(int, xmlTextReaderMoveToFirstAttribute, (xmlTextReaderPtr reader), (reader))                 \
    F(int, xmlTextReaderMoveToNextAttribute, (xmlTextReaderPtr reader), (reader))                  \
    F(int, xmlTextReaderNodeType, (xmlTextReaderPtr reader), (reader))                             \
    F(int, xmlTextReaderRead, (xmlTextReaderPtr reader), (reader))                                 \
    F(xmlChar *, xmlTextReaderReadString, (xmlTextReaderPtr reader), (reader))                     \
    F(void, xmlTextReaderSetStructuredErrorHandler,                                                \
      (xmlTextReaderPtr reader, xmlStructuredErrorFunc f, void *arg), (reader, f, arg))

DR_LOADED_LIBRARY(xml, DR_SONAME_XML2, FUNCTIONS, DR_LOADED_NONE)

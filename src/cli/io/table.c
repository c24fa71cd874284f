/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <string.h>

#include "cli/io/io.h"

#define REPORTS " -C, -- print the numbers for programs\n -q, -- print no numbers\n"

/* The operands and the short texts are what scripts compare: as qemu-io prints them. */
const struct io_command io_commands[] = {
    {"abort", NULL, NULL, "simulate a program crash using abort(3)", NULL, 0, 0, IO_NO_FILE,
     io_abort},
    {"aio_flush", NULL, NULL, "completes all outstanding aio requests", NULL, 0, 0, 0,
     io_aio_flush},
    {"aio_read", NULL, "[-Ciqv] [-P pattern] off len [len..]",
     "asynchronously reads a number of bytes",
     " As readv; errors are told but do not make the command fail.\n"
     " -i, -- send nothing\n" REPORTS,
     2, -1, 0, io_aio_read},
    {"aio_write", NULL, "[-Cfiquz] [-P pattern] off len [len..]",
     "asynchronously writes a number of bytes",
     " As writev; errors are told but do not make the command fail.\n"
     " -i, -- send nothing\n -z, -- write zeros\n -u, -- with -z: space may be given "
     "back\n" REPORTS,
     2, -1, IO_WRITES, io_aio_write},
    {"alloc", NULL, "offset [count]", "checks if offset is allocated in the file", NULL, 1, 2, 0,
     io_alloc},
    {"break", NULL, "event tag", "sets a breakpoint on event and tags the stopped request as tag",
     NULL, 2, 2, 0, io_break},
    {"close", "c", NULL, "close the current open file", NULL, 0, 0, 0, io_close},
    {"discard", "d", "[-Cq] off len", "discards a number of bytes at a specified offset",
     " The range then reads as zeros or as before, never as the parent's.\n" REPORTS, 2, -1,
     IO_WRITES, io_discard},
    {"flush", "f", NULL, "flush all in-core file state to disk", NULL, 0, 0, 0, io_flush},
    {"help", "?", "[command]", "help for one or all commands", NULL, 0, 1, IO_NO_FILE, io_help},
    {"info", "i", NULL, "prints information about the current file", NULL, 0, 0, 0, io_info},
    {"length", "l", NULL, "gets the length of the current file", NULL, 0, 0, 0, io_length},
    {"map", NULL, "", "prints the allocated areas of a file", NULL, 0, 0, 0, io_map},
    {"open", "o", "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
     "open the file specified by path",
     " 'open -o driver=raw /tmp/data' opens a raw disk for writing.\n"
     " -r, -- read-only\n -n, -- the same as -t none\n -U, -- although somebody may write\n"
     " -t, -- cache mode\n -o, -- settings, as --image-opts takes them",
     1, -1, IO_NO_FILE, io_open},
    {"quit", "q", NULL, "exit the program", NULL, 0, -1, IO_NO_FILE, io_quit},
    {"read", "r", "[-abCqv] [-P pattern [-s off] [-l len]] off len",
     "reads a number of bytes at a specified offset",
     " 'read -v 512 1k' shows a kilobyte from offset 512 on.\n"
     " -P, -- every byte must be this\n -s, -- with -P: from this place of the data on\n"
     " -l, -- with -P: so many bytes\n -v, -- show the data\n" REPORTS,
     2, -1, 0, io_read},
    {"readv", NULL, "[-Cqv] [-P pattern] off len [len..]",
     "reads a number of bytes at a specified offset",
     " The lengths are added.\n -P, -- every byte must be this\n -v, -- show the data\n" REPORTS, 2,
     -1, 0, io_readv},
    {"remove_break", NULL, "tag", "remove a breakpoint by tag", NULL, 1, 1, 0, io_break},
    {"reopen", NULL, "[(-r|-w)] [-c cache] [-o options]", "reopens an image with new options",
     " -r, -- read-only\n -w, -- for writing\n -c, -- cache mode\n", 0, -1, 0, io_reopen},
    {"resume", NULL, "tag", "resumes the request tagged as tag", NULL, 1, 1, 0, io_break},
    {"sigraise", NULL, "signal", "raises a signal", " 'sigraise 15' raises SIGTERM.\n", 1, 1,
     IO_NO_FILE, io_sigraise},
    {"sleep", NULL, NULL, "waits for the given value in milliseconds", NULL, 1, 1, IO_NO_FILE,
     io_sleep},
    {"truncate", "t", "[-m prealloc_mode] off", "truncates the current file at the given offset",
     NULL, 1, 3, IO_WRITES, io_truncate},
    {"wait_break", NULL, "tag", "waits for the suspension of a request", NULL, 1, 1, 0, io_break},
    {"write", "w", "[-bcCfnquz] [-P pattern | -s source_file] off len",
     "writes a number of bytes at a specified offset",
     " 'write 512 1k' writes a kilobyte of 0xcd at offset 512.\n"
     " -P, -- write this byte\n -s, -- write what this file holds, again and again\n"
     " -z, -- write zeros\n -u, -- with -z: space may be given back\n"
     " -f, -- durable when the command ends\n" REPORTS,
     2, -1, IO_WRITES, io_write},
    {"writev", NULL, "[-Cfq] [-P pattern] off len [len..]",
     "writes a number of bytes at a specified offset",
     " The lengths are added.\n -P, -- write this byte\n"
     " -f, -- durable when the command ends\n" REPORTS,
     2, -1, IO_WRITES, io_writev},
    {"zone_append", "zap", "offset len [len..]", "appends to a zone: disks have no zones", NULL, 2,
     -1, IO_UNLISTED, io_zone},
    {"zone_close", "zc", "offset len", "closes zones: disks have no zones", NULL, 2, 2, IO_UNLISTED,
     io_zone},
    {"zone_finish", "zf", "offset len", "finishes zones: disks have no zones", NULL, 2, 2,
     IO_UNLISTED, io_zone},
    {"zone_open", "zo", "offset len", "opens zones: disks have no zones", NULL, 2, 2, IO_UNLISTED,
     io_zone},
    {"zone_report", "zrp", "offset number", "tells of zones: disks have no zones", NULL, 2, 2,
     IO_UNLISTED, io_zone},
    {"zone_reset", "zrs", "offset len", "resets zones: disks have no zones", NULL, 2, 2,
     IO_UNLISTED, io_zone},
    {NULL, NULL, NULL, NULL, NULL, 0, 0, 0, NULL},
};

const struct io_command *io_find(const char *name)
{
    for (const struct io_command *c = io_commands; c->name; c++) {
        if (strcmp(c->name, name) == 0 || (c->other_name && strcmp(c->other_name, name) == 0))
            return c;
    }
    return NULL;
}

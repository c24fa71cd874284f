/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Shared by the vma commands, under both names: `drover vma ...` and the tool called vma. */
#ifndef DR_CLI_VMA_H
#define DR_CLI_VMA_H

#include <jansson.h>
#include <sys/types.h>

#include "cli/common/image.h"
#include "cli/common/progress.h"
#include "drover/vma.h"

/* ------------------------------------------------------------------ vma/vma.c */

extern const struct cli_command vma_cmd_list, vma_cmd_config, vma_cmd_create, vma_cmd_extract,
    vma_cmd_verify, vma_cmd_index;

/* "-" is standard input. Failures and oddities are printed. */
int vma_open(const struct cli *cli, const char *name, bool quiet, struct dr_vma **vma);
/* The same; salvage: with what a damaged archive still has. */
int vma_open_as(const struct cli *cli, const char *name, bool quiet, bool salvage,
                struct dr_vma **vma);
enum vma_salvage { VMA_WHOLE, VMA_SALVAGE, VMA_ANY_HEADER /* also one that is damaged */ };
/* The same, with the failure in *err and oddities for message(), which may be NULL. */
int vma_try_open(const char *name, enum vma_salvage salvage,
                 void (*message)(void *user, const char *text), void *user, struct dr_vma **vma,
                 struct dr_error *err);
/* The name of an archive in messages. */
const char *vma_shown(const char *name);
static inline void vma_cleanup(struct dr_vma **vma)
{
    dr_vma_close(*vma);
}
#define CLEANUP_VMA __attribute__((cleanup(vma_cleanup)))

/* Is there nothing in the name that could steer a terminal or forge a line? */
bool vma_is_plain(const char *name);
/* Can a file be called so, without harm to the file system and to who lists it? */
bool vma_is_file_name(const char *name);
/* Does a later configuration file have the same name? */
bool vma_config_comes_again(const struct dr_vma_header *header, size_t i);
/* The name with what is not plain as \xNN, malloc'ed. NULL = out of memory. */
char *vma_escape(const char *name);
/* For JSON: as it is, or escaped where it is not UTF-8. */
json_t *vma_json_name(const char *name);
void vma_print_json(json_t *value);
bool vma_wants_json(const struct cli_args *args);

/* cli_job_begin() with -r and -m. 0 or the exit code. */
int vma_job_begin(const struct cli *cli, const struct cli_args *args, struct cli_job *job);

const struct dr_vma_disk *vma_find_id(const struct dr_vma_header *header, unsigned id);
/* The disk of that name; disk-ID if none has the name. NULL after a message, also if several do. */
const struct dr_vma_disk *vma_find_disk(const struct cli *cli, const char *archive,
                                        const struct dr_vma_header *header, const char *name);

/* ------------------------------------------------------------------ vma/list.c */

/* The lines that programs parse. Names that could forge one are refused before the first line. */
int vma_print_listing(const struct cli *cli, const char *archive,
                      const struct dr_vma_header *header);
/* The first configuration file of that name to standard output. -ENOENT: there is none. */
int vma_print_config(const struct dr_vma_header *header, const char *name);

/* ------------------------------------------------------------------ vma/targets.c */

struct vma_targets {
    const struct cli *cli;
    struct dr_vma_target list[256];
    size_t n;
};

/* Takes the disk over. */
void vma_targets_add(struct vma_targets *t, unsigned id, struct dr_disk *disk, bool is_zero);
/* An image that is there, for writing (or as open says, to compare with). */
int vma_targets_open(struct vma_targets *t, unsigned id, const char *path,
                     const struct dr_open_options *open, bool is_zero, struct dr_error *err);
/* Closes all; the first failure is told. */
int vma_targets_close(struct vma_targets *t);
void vma_targets_cleanup(struct vma_targets *t);
#define CLEANUP_TARGETS __attribute__((cleanup(vma_targets_cleanup)))

/* ------------------------------------------------------------------ vma/damage.c */

/* Damage as it is found: lines, and an array for JSON. */
struct vma_damage {
    const struct cli *cli;
    const struct dr_vma_header *header;
    FILE *lines; /* NULL = none */
    json_t *array;
    size_t n;
};
void vma_damage_add(void *user, const struct dr_vma_damage *damage); /* user: struct vma_damage */
void vma_damage_free(struct vma_damage *d);
/* The numbers of an extraction or a verification, into object. */
void vma_damage_json(json_t *object, const struct vma_damage *d,
                     const struct dr_vma_extract_result *result);

/* ------------------------------------------------------------------ vma/source.c */

/* The contents of a new archive: disks and configuration files, with everything they own. */
struct vma_source {
    const struct cli *cli;
    struct dr_vma_create_disk disks[256];
    size_t n_disks;
    struct dr_vma_config configs[256];
    size_t n_configs;
};

/* "[format=FMT:][NAME=]PATH". A disk called vmstate is a file with the state of a machine. */
int vma_source_disk(struct vma_source *s, const struct cli_args *args, const char *text);
int vma_source_vmstate(struct vma_source *s, const char *path, const char *size);
int vma_source_config(struct vma_source *s, const char *path);
void vma_source_free(struct vma_source *s);
#define CLEANUP_SOURCE __attribute__((cleanup(vma_source_free)))

/* [format=FMT:]NAME=PATH, taken apart; format may be NULL. */
int vma_source_image(struct vma_source *s, const struct cli_args *args, const char *format,
                     const char *name, const char *path);

/* ------------------------------------------------------------------ vma/output.c */

/* --compress and --zstd, or what the name of the archive says. 0 or the exit code. */
int vma_get_compression(const struct cli *cli, const struct cli_args *args, const char *path,
                        struct dr_vma_create_options *o);
/* "-", or the pipe's own name: /dev/stdout. */
bool vma_is_stdout(const char *path);
/* Does the name end as those of archives do? */
bool vma_is_archive_name(const char *path);
/* An archive goes to *fd, where standard output was, and whatever else is printed to standard
 * error. 0, or 1 after a message. */
int vma_take_stdout(const struct cli *cli, int *fd);

/* ------------------------------------------------------------------ vma/map.c
 *
 * The lines that say where each disk of a restore goes. */

struct vma_map_line {
    char *name, *path, *format, *cache, *group;
    uint64_t bps;
    bool skip, write_zeros;
};

struct vma_map {
    struct vma_map_line *lines;
    size_t n;
};

/* Reads until EOF, an empty line or "done". 0, or -1 after a message. */
int vma_map_read(const struct cli *cli, const char *fifo, struct vma_map *map);
const struct vma_map_line *vma_map_find(const struct vma_map *map, const char *name);
void vma_map_free(struct vma_map *map);
#define CLEANUP_MAP __attribute__((cleanup(vma_map_free)))

/* ------------------------------------------------------------------ the tool called vma */

int vma_tool(const struct cli *cli, int argc, char **argv); /* vma/tool.c */

/* vma/restore.c */
struct vma_restore {
    const char *archive, *dir, *fifo; /* fifo NULL = no map */
    const char *disks;                /* "a,b", NULL = all */
    bool verbose;
};
int vma_restore(const struct cli *cli, const struct vma_restore *o);

/* vma/report.c: the lines of -v. */
struct vma_report {
    struct cli_job job; /* first; report.job.job goes to the library */
    uint64_t *zeros;    /* so far, of a creation */
    int percent;
    int64_t start; /* of the reading, seconds */
};
void vma_report_begin(const struct cli *cli, struct vma_report *r, bool verbose);
void vma_report_begin_create(const struct cli *cli, struct vma_report *r, uint64_t *zeros);
static inline void vma_report_end(struct vma_report *r)
{
    cli_job_end(&r->job);
}
#define CLEANUP_REPORT __attribute__((cleanup(vma_report_end)))
void vma_report_totals(const struct dr_vma_extract_result *result);

#endif

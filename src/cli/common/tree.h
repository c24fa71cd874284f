/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Families of images, as a table whose first column is a tree. */
#ifndef DR_CLI_TREE_H
#define DR_CLI_TREE_H

#include <jansson.h>

#include "drover/chain.h"

struct cli_row {
    char *label; /* the name with the branches before it */
    char *format, *size, *disk_size, *note;
    char *allocated, *exclusive, *id; /* NULL without usage */
};

struct cli_table {
    struct cli_row *rows;
    size_t n;
    bool with_usage; /* print what each image holds, too */
};

bool cli_utf8(void); /* the terminal takes box drawing */

/* usage: NULL, or of the image; not used without with_usage. */
int cli_table_add(struct cli_table *table, const char *label, const char *format, uint64_t size,
                  uint64_t disk_size, const struct dr_layer_usage *usage, const char *note);
void cli_table_print(const struct cli_table *table);
void cli_table_free(struct cli_table *table);
#define CLEANUP_TABLE __attribute__((cleanup(cli_table_free)))

/* The families as trees; notes: what does not open, which one was asked about and which is active
 * (has no children). usage: NULL, or what each node holds. */
int cli_tree_print(const struct dr_tree_node *nodes, size_t n, const struct dr_layer_usage *usage,
                   bool ascii);
json_t *cli_tree_json(const struct dr_tree_node *nodes, size_t n,
                      const struct dr_layer_usage *usage);
/* Add what an image holds to its description. */
void cli_usage_json(json_t *image, const struct dr_layer_usage *usage);

#endif

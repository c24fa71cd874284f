/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Faults planted into a driver, to see that a suite notices them. In effect from plant() on, for
 * the rest of the process: call it in a test run by model_detects(). */
#ifndef DROVER_TESTS_PLANT_H
#define DROVER_TESTS_PLANT_H

enum plant {
    PLANT_NONE,
    PLANT_NO_TAIL,       /* zeros instead of the old bytes behind what is written */
    PLANT_EARLY_PUBLISH, /* visible before the data are written */
    PLANT_LONG_PARENT, /* an image called mid says it is as long as it can be: its end is a hole */
    /* add-cow: */
    PLANT_EAGER_BITS,  /* bits go to the file at once, before the data is durable */
    PLANT_NO_PUNCH,    /* zeros: the bit is set, and what lay in the raw file is left there */
    PLANT_EARLY_PUNCH, /* given up: the raw file loses it before the cleared bit is durable */
    PLANT_LOST_BITS,   /* publish starts from the bits as they were at reserve */
    PLANT_GROW_FIRST,  /* the raw file grows before the bits that hide the parent */
    PLANT_GROW_BARE,   /* nothing hides the parent */
    /* qcow2: */
    PLANT_REUSED_EARLY,     /* a place is allocated again before its removal is durable */
    PLANT_LATE_PUNCH,       /* ... before it is punched */
    PLANT_LOST_COUNT,       /* a compressed cluster that goes lowers its neighbour's count, too */
    PLANT_NARROW_LOCK,      /* changes to one cluster do not exclude each other */
    PLANT_LOST_EXTENSION,   /* another parent: PLANT_EXTENSION is not in the header any more */
    PLANT_COPIED,           /* what a snapshot shares says that it is the disk's alone */
    PLANT_NO_SPACE_IGNORED, /* no space for a larger refcount table, and it goes on */
};

#define PLANT_EXTENSION 0x6b656570u /* a header extension that no program knows */

void plant(enum plant fault); /* into the toy */
void plant_into(const char *format, enum plant fault);

/* For plant_into(): put the fault into planted, a copy of the qcow2 driver. */
struct dr_format;
void plant_qcow2(struct dr_format *planted, const struct dr_format *driver, enum plant fault);

#endif

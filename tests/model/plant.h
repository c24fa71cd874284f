/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Faults planted into the toy driver, to see that a suite notices them. In effect from plant() on,
 * for the rest of the process: call it in a test run by model_detects(). */
#ifndef DROVER_TESTS_PLANT_H
#define DROVER_TESTS_PLANT_H

enum plant {
    PLANT_NONE,
    PLANT_NO_TAIL,       /* zeros instead of the old bytes behind what is written */
    PLANT_EARLY_PUBLISH, /* visible before the data are written */
    PLANT_LONG_PARENT, /* an image called mid says it is as long as it can be: its end is a hole */
};

void plant(enum plant fault);

#endif

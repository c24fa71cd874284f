/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdatomic.h>

#include "base/stripe.h"

unsigned dr_stripe_of_thread(void)
{
    static _Atomic unsigned threads;
    static _Thread_local unsigned mine; /* 0 = not chosen yet */
    if (mine == 0)
        mine = atomic_fetch_add(&threads, 1) % DR_STRIPES + 1;
    return mine - 1;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdatomic.h>

#include "base/stripe.h"

_Thread_local unsigned dr_stripe_chosen;

unsigned dr_stripe_choose(void)
{
    static _Atomic unsigned threads;
    dr_stripe_chosen = atomic_fetch_add(&threads, 1) % DR_STRIPES + 1;
    return dr_stripe_chosen;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Chunks of an NBD read in any order: whole only when each byte has come once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>

#include "storage/nbd.h"

#define PIECES 40u
#define OFFSET 1000u

struct piece {
    uint64_t off;
    size_t len;
};

static struct piece some[PIECES];
static unsigned seed = 7;

static unsigned below(unsigned n)
{
    return (unsigned)rand_r(&seed) % n;
}

/* Consecutive ranges from OFFSET on, shuffled; their length in all. */
static uint64_t cut_up(void)
{
    uint64_t at = OFFSET;
    for (unsigned i = 0; i < PIECES; i++) {
        some[i] = (struct piece){at, below(50) + 1};
        at += some[i].len;
    }
    for (unsigned i = PIECES - 1; i > 0; i--) {
        unsigned j = below(i + 1);
        struct piece other = some[i];
        some[i] = some[j];
        some[j] = other;
    }
    return at - OFFSET;
}

static bool is_whole_after(uint64_t len, unsigned n)
{
    struct nbd_pieces pieces = {.n = 0};
    struct nbd_request q = {.command = NBD_READ, .off = OFFSET, .len = len, .pieces = &pieces};
    int error = 0;
    for (unsigned i = 0; i < n; i++)
        nbd_take_piece(&q, NULL, some[i].len, some[i].off,
                       i % 2 ? LIBNBD_READ_DATA : LIBNBD_READ_HOLE, &error);
    return nbd_is_whole(&q);
}

static void all_pieces_in_any_order_are_the_whole(void **state)
{
    (void)state;
    for (int round = 0; round < 2000; round++) {
        uint64_t len = cut_up();
        assert_true(is_whole_after(len, PIECES));
        assert_false(is_whole_after(len, PIECES - 1));
        assert_false(is_whole_after(len + 1, PIECES));
    }
}

static void a_byte_that_comes_twice_does_not_stand_for_another(void **state)
{
    (void)state;
    for (int round = 0; round < 2000; round++) {
        uint64_t len = cut_up();
        struct piece *p = &some[below(PIECES)];
        if (below(2) && p->off > OFFSET)
            p->off--;
        else
            p->off++;
        assert_false(is_whole_after(len, PIECES));
    }
}

static void more_pieces_than_are_looked_after_are_not_the_whole(void **state)
{
    (void)state;
    struct nbd_pieces pieces = {.n = 0};
    struct nbd_request q = {.off = 0, .len = 4 * NBD_PIECES, .pieces = &pieces};
    int error = 0;
    for (int odd = 1; odd >= 0; odd--)
        for (uint64_t i = 0; i < 2 * NBD_PIECES; i++)
            nbd_take_piece(&q, NULL, 1, 2 * i + (uint64_t)odd, LIBNBD_READ_DATA, &error);
    assert_false(nbd_is_whole(&q));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_pieces_in_any_order_are_the_whole),
        cmocka_unit_test(a_byte_that_comes_twice_does_not_stand_for_another),
        cmocka_unit_test(more_pieces_than_are_looked_after_are_not_the_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

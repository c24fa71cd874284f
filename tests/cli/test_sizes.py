# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes: what is understood and how they are printed, against qemu-img."""
import os

import pytest
from conftest import same

GOOD = ["0", "1k", "1M", "1.5G", "0x1000", "0X10", "1b", "1B", " 1M", "+1M", "1.k", "1.0001k", "0.1k", "1.1M",
        "010", "512", "1G", "2.25T", "1t"]
BAD = ["1.5", "1.5b", "1e3", "1E3", "1M ", "1kk", ".5k", ".", "", "0x", "1.5x", "inf", "nan", "-1", "0x1.8",
       "1Q", "9E", "8E", "18446744073709551616", "9223372036854775808", "x", "1 M", "0x1z", "--5"]
SHOWN = ["1000k", "1023k", "999k", "1.5M", "10239M", "1000M", "1023M", "3.33G", "123456789", "12345", "512",
         "1023488", "10T"]


@pytest.mark.parametrize("size", GOOD)
def test_the_same_number_of_bytes_is_understood(t, size):
    assert t.ours("qemu-img", "create", "-q", "ours", "--", size).code == 0
    assert t.real("qemu-img", "create", "-q", "real", "--", size).code == 0
    assert os.path.getsize(t.dir / "ours") == os.path.getsize(t.dir / "real")


@pytest.mark.parametrize("size", BAD)
def test_a_wrong_size_is_refused_in_the_same_words(t, size):
    same(t.ours("qemu-img", "create", "x", "--", size), t.real("qemu-img", "create", "x", "--", size))
    assert t.names() == []


@pytest.mark.parametrize("size", SHOWN)
def test_sizes_are_printed_alike(t, size):
    t.real("qemu-img", "create", "-q", "x", size)
    same(t.ours("qemu-img", "info", "-f", "raw", "x"), t.real("qemu-img", "info", "-f", "raw", "x"))


@pytest.mark.parametrize("option", ["--start-offset=x", "--max-length=-1", "--start-offset=9E", "--max-length=1.5"])
def test_other_sizes_are_refused_in_the_same_words(t, option):
    t.real("qemu-img", "create", "-q", "x", "1M")
    same(t.ours("qemu-img", "map", option, "x"), t.real("qemu-img", "map", option, "x"))

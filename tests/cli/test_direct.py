# SPDX-License-Identifier: LGPL-2.1-or-later
"""Past the host's cache (-t none, -T none) the bytes are the same as through it."""
import random

import pytest

SIZE = (3 << 20) + 512  # ends inside a block of 4096


@pytest.mark.parametrize("fmt", ["raw", "vmdk", "add-cow"])
@pytest.mark.parametrize("modes", [["-t", "none"], ["-T", "none"], ["-t", "none", "-T", "none"]],
                         ids="".join)
def test_a_disk_converted_past_the_cache_is_the_same(t, fmt, modes):
    data = random.Random(7).randbytes(SIZE // 2) + bytes(SIZE - SIZE // 2)
    (t.dir / "a.raw").write_bytes(data)
    t.ok("convert", *modes, "-f", "raw", "-O", fmt, "a.raw", "b")
    t.ok("convert", *modes, "-f", fmt, "-O", "raw", "b", "c.raw")
    assert (t.dir / "c.raw").read_bytes() == data
    t.ok("convert", "-f", fmt, "-O", "raw", "b", "d.raw")
    assert (t.dir / "d.raw").read_bytes() == data


def test_metadata_written_past_the_cache_is_whole(t):
    t.ok("create", "-q", "-f", "vmdk", "d.vmdk", "8M")
    t.ok("io", "-t", "none", "-c", "write -P 3 1000 70000", "-c", "write -P 4 5000001 777", "d.vmdk")
    t.ok("check", "d.vmdk")
    out = t.ok("io", "-r", "-c", "read -P 3 1000 70000", "-c", "read -P 4 5000001 777", "d.vmdk")
    assert "Pattern verification failed" not in out

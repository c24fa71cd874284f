# SPDX-License-Identifier: LGPL-2.1-or-later
"""`drover ctl SOCKET bitmap`: what a person does with the bitmaps of a served disk."""
import json

import pytest

from serving import DROVER, KiB, MiB, drover, run

pytest.importorskip("nbd")


def ctl(*words):
    return run(DROVER, "ctl", "control", "bitmap", *words)


def done(*words):
    r = ctl(*words)
    assert r.returncode == 0, r.stdout
    return r.stdout.splitlines()


@pytest.fixture(name="client")
def served_disk(serve):
    drover("create", "-q", "-f", "qcow2", "disk", str(8 * MiB))
    return serve("disk", "control=control", "export=d", "format=qcow2").connect("d")


def test_bitmaps_are_added_changed_listed_and_removed(client):
    done("add", "d", "kept")
    done("add", "-g", "4k", "--temporary", "mine")
    done("add", "d", "off", "--disabled")
    client.pwrite(b"\xa5" * 4 * KiB, MiB)
    client.flush()
    assert sorted(done("list")) == ["d: kept: 64 KiB set, granularity 64 KiB, enabled",
                                    "d: mine: 4 KiB set, granularity 4 KiB, enabled, temporary",
                                    "d: off: 0 B set, granularity 64 KiB, disabled"]
    done("disable", "kept")
    done("enable", "off")
    client.pwrite(b"\xa5" * 4 * KiB, 3 * MiB)
    client.flush()
    done("merge", "d", "mine", "kept", "off")
    done("clear", "d", "kept")
    done("remove", "off")
    assert sorted(done("list", "d")) == ["d: kept: 0 B set, granularity 64 KiB, disabled",
                                         "d: mine: 128 KiB set, granularity 4 KiB, enabled, temporary"]
    done("merge", "kept", "mine")
    shown = json.loads(done("list", "--json")[0])["return"][0]["inserted"]["dirty-bitmaps"]
    assert {b["name"]: (b["count"], b["persistent"]) for b in shown} == {"kept": (128 * KiB, True), "mine": (128 * KiB, False)}


WRONG = [
    ((), "add|remove|clear|enable|disable|merge|list"),
    (("nonsense", "d", "b"), "'nonsense' is nothing that is done with a bitmap"),
    (("add",), "Expecting: ctl SOCKET bitmap add DISK BITMAP"),
    (("merge", "d"), "Expecting: ctl SOCKET bitmap merge DISK BITMAP SOURCE..."),
    (("clear", "-g", "4k", "d", "b"), "go with `bitmap add` only"),
    (("add", "-g", "1000", "d", "b"), "Granularity must be power of 2"),
    (("add", "none", "b"), "Cannot find device='none'"),
    (("remove", "d", "none"), "Dirty bitmap 'none' not found"),
    (("list", "none"), "the server has no disk 'none'"),
]


@pytest.mark.usefixtures("client")
def test_what_is_wrong_is_said_in_a_line():
    for words, why in WRONG:
        r = ctl(*words)
        assert r.returncode != 0 and why in r.stdout, (words, r.stdout)
    assert done("list") == []

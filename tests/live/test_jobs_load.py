# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random jobs below random clients; and races that need requests which really meet."""
import os
import socket
import struct
import subprocess

import pytest

import programs
from qmp import Control, Refused
from serving import DROVER, KiB, MiB, connect_by_hand, drover, io, run

nbd = pytest.importorskip("nbd")

SIZE = 8 * MiB
LONG = bool(os.environ.get("DROVER_TEST_LONG"))


def make(fmt, name, parent=None):
    args = ["-b", parent[1], "-F", parent[0]] if parent else []
    drover("create", "-q", "-f", fmt, *args, name, *([] if parent else [str(SIZE)]))
    return name


def bytes_of(name, fmt):
    drover("convert", "-f", fmt, "-O", "raw", name, "all.raw")
    with open("all.raw", "rb") as f:
        return f.read()


@pytest.mark.parametrize("first, then", [("vmdk", "vmdk"), ("vmdk", "qcow2"), ("qcow2", "qcow2"), ("raw", "add-cow")])
def test_random_jobs_below_random_programs_change_no_byte(serve, first, then):
    seed = programs.new_seed()
    make(first, "disk")
    server = serve("disk", f"format={first}", "control=control", "export=d")
    part = MiB + 4099  # parts meet in the middle of clusters
    clients = [programs.Program(server, seed + i, (i * part, part)) for i in range(3)]
    control = Control()
    jobs = programs.Jobs(control, seed, then, SIZE, can_grow=first != "vmdk")
    for _ in range(300 if LONG else 15):
        jobs.run_one(between=lambda: clients[0].go_on(2))
        for client in clients:
            client.go_on(1)
    (path, fmt), *_ = control.chain()
    control.close()
    want = b"".join(client.end() for client in clients)
    server.stop()
    assert bytes_of(path, fmt) == want + bytes(jobs.size - len(want))
    assert run(DROVER, "check", path).returncode in (0, 63)  # 63: raw has no check


# ---------------------------------------------------------------- races

CLUSTER = 64 * KiB
OTHERS = {
    "zero": lambda h, length, off: h.aio_zero(length, off),
    "zero without a hole": lambda h, length, off: h.aio_zero(length, off, flags=nbd.CMD_FLAG_NO_HOLE),
    "trim": lambda h, length, off: h.aio_trim(length, off),
}


def finish(handle, cookies):
    for cookie in cookies:
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("fmt", ["vmdk", "qcow2", "add-cow"])
def test_a_zero_or_trim_and_an_allocating_write_in_one_cluster_both_happen(serve, fmt, other):
    """The write covers 40 KiB from the beginning of each cluster, the other request 40 KiB to its end."""
    base = "raw" if fmt == "add-cow" else fmt
    io(make(base, "base"), f"write -P 0x11 0 {SIZE}", fmt=base)
    make(fmt, "disk", (base, "base"))
    server = serve("disk", f"format={fmt}")
    writer, zeroer = server.connect(), server.connect()
    data = nbd.Buffer.from_bytearray(bytearray(b"\x22" * 40 * KiB))
    writes, others = [], []
    for n, off in enumerate(range(0, SIZE, CLUSTER)):
        def write():
            writes.append(writer.aio_pwrite(data, off))

        def zero():
            others.append(OTHERS[other](zeroer, 40 * KiB, off + 24 * KiB))
        for request in (write, zero) if n % 2 else (zero, write):
            request()
    finish(writer, writes)
    finish(zeroer, others)
    seen = bytes(writer.pread(SIZE, 0))
    rest = {b"\0", b"\x11"} if other == "trim" else {b"\0"}
    for off in range(0, SIZE, CLUSTER):
        sectors = [seen[at:at + 512] for at in range(off, off + CLUSTER, 512)]
        assert set(sectors[:48]) == {b"\x22" * 512}, f"at {off}"
        assert set(sectors[48:80]) <= {b"\x22" * 512, bytes(512)}, f"at {off}"
        assert set(sectors[80:]) <= {r * 512 for r in rest}, f"at {off}"
    server.stop()
    assert bytes_of("disk", fmt) == seen
    assert run(DROVER, "check", "disk").returncode == 0


def test_clients_that_read_no_replies_or_vanish_hold_up_no_job(serve):
    make("qcow2", "disk")
    io("disk", "write -P 0x11 0 8M", fmt="qcow2")
    server = serve("disk", "format=qcow2", "control=control", "export=d")
    control = Control()
    jobs = programs.Jobs(control, 1, "qcow2", SIZE, can_grow=False)
    good = programs.Program(server, programs.new_seed(), (0, 4 * MiB))
    with connect_by_hand(server) as stuck:
        for handle in range(16):
            stuck.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, handle, 0, MiB))
        assert stuck.recv(4, socket.MSG_PEEK)
        for _ in range(6):
            with connect_by_hand(server) as vanishing:  # in the middle of a write
                vanishing.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 5 * MiB, MiB) + b"x" * 1000)
                jobs.run_one(between=lambda: good.go_on(1))
    want = good.end()
    (path, fmt), *_ = control.chain()
    control.close()
    server.stop()
    assert bytes_of(path, fmt) == want + b"\x11" * 4 * MiB


@pytest.mark.parametrize("job", [["stream", "--base", "base"], ["stream"], ["commit", "--top", "mid", "--base", "base"],
                                 ["commit", "--base", "base"]], ids=" ".join)
@pytest.mark.parametrize("fmt", ["vmdk", "qcow2"])
def test_a_shorter_image_in_the_middle_hides_what_lies_deeper_during_a_job_and_after_it(serve, fmt, job):
    make(fmt, "base")
    io("base", f"write -P 0x11 0 {SIZE}", fmt=fmt)
    for name, size, parent in ("mid", 2 * MiB, "base"), ("disk", SIZE, "mid"):
        drover("create", "-q", "-f", fmt, "-b", parent, "-F", fmt, name, size)
    server = serve("disk", f"format={fmt}", "control=control", "export=d")
    seed = programs.new_seed()
    across = programs.Program(server, seed, (2 * MiB - 300 * KiB, 600 * KiB))
    reader = server.connect()
    across.go_on(5)
    with subprocess.Popen([DROVER, "ctl", "control", *job, "-r", "8M", "d"], stdout=subprocess.DEVNULL) as client:
        while client.poll() is None:
            assert not any(reader.pread(MiB, 3 * MiB))
            across.go_on(1)
    assert client.returncode == 0
    written = across.end()
    server.stop()
    want = b"\x11" * 2 * MiB + bytes(SIZE - 2 * MiB)
    want = want[:across.base] + written + want[across.base + across.size:]
    path = "base" if job[:2] == ["commit", "--base"] else "disk"
    assert bytes_of(path, fmt) == want


def test_a_disk_that_is_resized_while_it_is_mirrored_goes_on_with_a_copy_of_its_size(serve):
    make("qcow2", "disk")
    io("disk", f"write -P 0x11 0 {SIZE}", fmt="qcow2")
    server = serve("disk", "format=qcow2", "control=control", "export=d")
    control = Control()
    size = SIZE
    control.ask("drive-mirror", device="d", job_id="job", target=os.path.abspath("copy"), sync="full", speed=4 * MiB)
    try:
        control.ask("block_resize", device="d", size=2 * SIZE)
        size = 2 * SIZE
    except Refused:  # that is right, too
        pass
    control.ask("block-job-set-speed", device="job", speed=0)
    states = []
    for state in control.states("job"):
        states.append(state)
        if state == "ready":
            control.ask("job-complete", id="job")
    assert "BLOCK_JOB_COMPLETED" in states, states
    (path, fmt), = control.chain()
    control.close()
    assert os.path.basename(path) == "copy" and server.connect().get_size() == size
    server.stop()
    assert bytes_of(path, fmt) == b"\x11" * SIZE + bytes(size - SIZE)


@pytest.mark.parametrize("fmt", ["vmdk", "qcow2"])
def test_a_stream_and_a_reader_in_another_process_who_hashes_the_base_disturb_neither(serve, fmt):
    make(fmt, "base")
    io("base", f"write -P 0x11 0 {SIZE}", "write -P 0x33 1M 3M", fmt=fmt)
    want = drover("checksum", "base")
    make(fmt, "disk", (fmt, "base"))
    server = serve("disk", f"format={fmt}", "control=control", "export=d")
    guest = programs.Program(server, programs.new_seed(), (MiB - 4099, MiB))
    hashed = 0
    with subprocess.Popen([DROVER, "ctl", "control", "stream", "-r", "8M", "d"], stdout=subprocess.DEVNULL) as client:
        while client.poll() is None:
            assert drover("checksum", "base") == want
            hashed += 1
            guest.go_on(1)
    assert client.returncode == 0 and hashed > 1
    written = guest.end()
    server.stop()
    expected = b"\x11" * MiB + b"\x33" * 3 * MiB + b"\x11" * (SIZE - 4 * MiB)
    assert bytes_of("disk", fmt) == expected[:guest.base] + written + expected[guest.base + guest.size:]
    assert drover("checksum", "base") == want

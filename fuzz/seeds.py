#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes the inputs that fuzzing starts from, small and readable as code: seeds.py DIRECTORY makes
DIRECTORY/TARGET/NAME. Inputs that the fuzzer found and that are worth keeping go to corpus/TARGET/."""
import bz2
import gzip
import hashlib
import io
import os
import struct
import sys
import tarfile
import zlib

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "lib"))
sys.dont_write_bytecode = True
import addcow  # noqa: E402  pylint: disable=wrong-import-position

SECTOR = 512
GRAIN = 8  # sectors


def descriptor(extents, kind="monolithicSparse", cid="8b4f0210", parent="ffffffff", hint=None, more=""):
    text = f"# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent}\ncreateType=\"{kind}\"\n"
    if hint is not None:
        text += f'parentFileNameHint="{hint}"\n'
    text += "\n# Extent description\n" + "".join(e + "\n" for e in extents)
    text += "\n# The Disk Data Base\n#DDB\n\n" + more
    text += 'ddb.virtualHWVersion = "4"\nddb.geometry.cylinders = "0"\nddb.geometry.heads = "16"\n'
    return (text + 'ddb.geometry.sectors = "63"\nddb.adapterType = "ide"\n').encode()


def sparse(text, capacity, grains, version=1, flags=3, gtes=512, unclean=0, magic=b"KDMV", tail=0):
    """A hosted sparse extent: header, descriptor, RGD and its tables, GD and its tables, grains.
    grains: {grain number: None (zero grain) or a fill byte}"""
    desc_sectors = 20 if text is not None else 0
    n_tables = -(-capacity // (GRAIN * gtes))
    gt_sectors = -(-gtes * 4 // SECTOR)
    gd_sectors = -(-n_tables * 4 // SECTOR)
    rgd = 1 + desc_sectors
    gd = rgd + gd_sectors + n_tables * gt_sectors
    overhead = -(-(gd + gd_sectors + n_tables * gt_sectors) // GRAIN) * GRAIN
    header = struct.pack("<4sIIQQQQIQQQBBBBBH", magic, version, flags, capacity, GRAIN,
                         1 if desc_sectors else 0, desc_sectors, gtes, rgd, gd, overhead, unclean,
                         10, 32, 13, 10, 0)
    out = bytearray(header.ljust(SECTOR, b"\0"))
    if desc_sectors:
        out += text.ljust(desc_sectors * SECTOR, b"\0")
    entries = [0] * (n_tables * gtes)
    data, at = b"", overhead
    for number, fill in sorted(grains.items()):
        if fill is None:
            entries[number] = 1
        else:
            entries[number] = at
            data += bytes([fill]) * (GRAIN * SECTOR)
            at += GRAIN
    for start in (rgd, gd):
        first = start + gd_sectors
        directory = b"".join(struct.pack("<I", first + i * gt_sectors) for i in range(n_tables))
        out += directory.ljust(gd_sectors * SECTOR, b"\0")
        for i in range(n_tables):
            table = b"".join(struct.pack("<I", e) for e in entries[i * gtes:(i + 1) * gtes])
            out += table.ljust(gt_sectors * SECTOR, b"\0")
    out = out.ljust(overhead * SECTOR, b"\0") + data
    return bytes(out[:len(out) - tail])


def stream(text, capacity, grains, front=False, cut=0, header_too=False):
    """A streamOptimized extent. front: tables in front of the grains and no footer, else a footer that
    says where they are. grains: {grain number: a fill byte}"""
    desc_sectors, gtes = 2, 512
    n_tables = -(-capacity // (GRAIN * gtes))
    entries, out = [0] * (n_tables * gtes), bytearray()

    def header(gd, overhead):
        return struct.pack("<4sIIQQQQIQQQBBBBBH", b"KDMV", 3, 0x30001, capacity, GRAIN, 1, desc_sectors, gtes, 0, gd,
                           overhead, 0, 10, 32, 13, 10, 1).ljust(SECTOR, b"\0")

    def marker(val, kind):
        return struct.pack("<QII", val, 0, kind).ljust(SECTOR, b"\0")

    def table(i):
        return b"".join(struct.pack("<I", e) for e in entries[i * gtes:(i + 1) * gtes])

    base = 1 + desc_sectors
    tables = [base + 1 + i * 4 for i in range(n_tables)] if front else [0] * n_tables
    overhead = -(-(base + (1 + 4 * n_tables if front else 0)) // GRAIN) * GRAIN
    for i in range(n_tables):
        for number, fill in sorted(grains.items()):
            if number // gtes == i:
                entries[number] = overhead + len(out) // SECTOR
                coded = zlib.compress(bytes([fill, fill ^ 1, 7, number % 251]) * (GRAIN * SECTOR // 4))
                out += struct.pack("<QI", number * GRAIN, len(coded)) + coded
                out += bytes(-len(out) % SECTOR)
        if not front:
            out += marker(4, 1)
            tables[i] = overhead + len(out) // SECTOR
            out += table(i)
    directory = b"".join(struct.pack("<I", t) for t in tables).ljust(SECTOR, b"\0")
    head = text.ljust(desc_sectors * SECTOR, b"\0")
    gd = base
    if front:
        head += directory + b"".join(table(i) for i in range(n_tables))
    else:
        out += marker(1, 2)
        gd = overhead + len(out) // SECTOR
        out += directory + marker(1, 3) + header(gd, overhead)
    out += bytes(SECTOR)
    head = header(gd if front or header_too else 2 ** 64 - 1, overhead) + head
    whole = bytes(head.ljust(overhead * SECTOR, b"\0") + out)
    return whole[:len(whole) - cut]


def streams():
    one = descriptor(['RDONLY 61 SPARSE "generated-stream.vmdk"'], "streamOptimized")
    yield "stream", stream(one, 61, {0: 0x11, 2: 0x22, 7: 0x33})
    yield "stream-header-too", stream(one, 61, {0: 0x11, 2: 0x22}, header_too=True)
    yield "stream-front", stream(one, 61, {0: 0x11, 2: 0x22, 7: 0x33}, front=True)
    yield "stream-empty", stream(one, 61, {})
    yield "stream-cut", stream(one, 61, {0: 0x11, 2: 0x22, 7: 0x33}, cut=3000)
    yield "stream-tables", stream(descriptor(['RDONLY 9000 SPARSE "x"'], "streamOptimized"), 9000, {0: 1, 600: 2, 1124: 3})


def cowd(capacity, grains, grain=1, flags=3, unclean=0, uncounted=0, parent=b""):
    """An extent of ESX. grains: {grain number: a fill byte}"""
    n_tables = -(-capacity // (grain * 4096))
    free = 4 + -(-n_tables * 4 // SECTOR)
    directory, tables, out = [0] * n_tables, {}, []
    for number, fill in grains.items():
        table = number // 4096
        if table not in tables:
            directory[table], tables[table] = free, [0] * 4096
            out.append(tables[table])
            free += 32
        tables[table][number % 4096] = free
        out.append(bytes([fill]) * (grain * SECTOR))
        free += grain
    header = struct.pack("<4s7I", b"COWD", 1, flags, capacity, grain, 4, n_tables, free - uncounted)
    header = (header + parent).ljust(1648, b"\0") + struct.pack("<I", unclean)
    head = header.ljust(2048, b"\0") + struct.pack(f"<{n_tables}I", *directory).ljust(-(-n_tables // 128) * SECTOR, b"\0")
    return head + b"".join(o if isinstance(o, bytes) else struct.pack("<4096I", *o) for o in out)


def sesparse(capacity, grains, replay=0):
    """An extent of later ESX. grains: {grain number: None (zeros), "unmapped" or a fill byte}"""
    n_tables = -(-capacity // (8 * 4096))
    gd_sectors = -(-n_tables * 8 // SECTOR)
    tables_at = 4 + gd_sectors
    grains_at = tables_at + n_tables * 64
    entries, out = [0] * (n_tables * 4096), b""
    for number, fill in grains.items():
        if fill is None or fill == "unmapped":
            entries[number] = (1 if fill else 2) << 60
            continue
        place = len(out) // 4096
        entries[number] = 3 << 60 | (place & 0xfff) << 48 | place >> 12
        out += bytes([fill]) * 4096
    header = struct.pack("<26Q", 0xcafebabe, 0x200000001, capacity, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 1,
                         4, gd_sectors, tables_at, n_tables * 64, 0, 0, 0, 0, grains_at, 8 * (len(out) // 4096 + 8))
    volatile = struct.pack("<4Q", 0xcafecafe, 0, 1, replay)
    directory = struct.pack(f"<{n_tables}Q", *[0x1000000000000000 + i for i in range(n_tables)])
    return (header.ljust(SECTOR, b"\0") + volatile.ljust(3 * SECTOR, b"\0") +
            directory.ljust(gd_sectors * SECTOR, b"\0") + struct.pack(f"<{len(entries)}Q", *entries) + out)


def cowds():
    """What the target vmdk-extent reads: extents, whose disk has 9000 sectors."""
    yield "cowd", cowd(9000, {0: 0x11, 7: 0x33, 4200: 0x22, 8999: 0x44})
    yield "cowd-empty", cowd(9000, {})
    yield "cowd-grains", cowd(9000, {0: 0x11, 70: 0x33}, grain=8)
    yield "cowd-unclean", cowd(9000, {0: 0x11, 5000: 0x33}, unclean=1, uncounted=30)
    yield "cowd-uncounted", cowd(9000, {0: 0x11, 5000: 0x33}, uncounted=33)
    yield "sesparse", sesparse(9000, {0: 0x11, 1: 0x12, 5: None, 7: "unmapped", 1124: 0x33})
    yield "sesparse-empty", sesparse(9000, {})
    yield "sesparse-journal", sesparse(9000, {0: 0x11}, replay=1)
    yield "cowd-inconsistent", cowd(9000, {0: 0x11}, flags=7)


def images():
    yield from streams()
    for name, extent in cowds():
        yield name, extent
    yield "cowd-child", cowd(9000, {0: 0x11}, flags=2, parent=b"flat.vmdk")
    one = descriptor(['RW 61 SPARSE "disk.vmdk"'])
    yield "empty", b""
    yield "raw", b"not an image\n" * 100
    yield "sparse", sparse(one, 61, {0: 0x11, 2: 0x22, 7: 0x33})
    yield "zero-grains", sparse(one, 61, {0: 0x11, 1: None, 2: None}, version=2, flags=7)
    yield "unclean", sparse(one, 61, {0: 0x11, 3: 0x22}, unclean=1)
    yield "no-copy", sparse(one, 61, {0: 0x11}, flags=1)
    yield "cut-grain", sparse(one, 61, {0: 0x11, 7: 0x33}, tail=3000)
    yield "cut-table", sparse(one, 61, {}, tail=2500)
    yield "two-tables", sparse(descriptor(['RW 9000 SPARSE "disk.vmdk"']), 9000, {0: 1, 600: 2, 1124: 3})
    yield "unfinished", sparse(one, 61, {0: 0x11}, magic=b"kdmv")
    yield "cowd-zeros", b"COWD" + bytes(2044)
    mark = b"\n--8<--\n"
    extent = sparse(None, 61, {0: 0x11, 7: 0x33})
    split = descriptor(['RW 61 SPARSE "extent.vmdk"'], "twoGbMaxExtentSparse")
    yield "split", split + mark[1:] + extent
    mixed = ['RW 61 SPARSE "extent.vmdk"', 'RW 100 FLAT "flat.raw" 3', "RW 10 ZERO",
             'RDONLY 8 FLAT "flat.raw" 120']
    yield "mixed", descriptor(mixed, "custom") + mark[1:] + extent
    yield "flat", descriptor(['RW 128 FLAT "flat.raw" 0'], "monolithicFlat")
    yield "vmfs", descriptor(['RW 128 VMFS "flat.raw"'], "vmfs")
    yield "outside", descriptor(['RW 128 FLAT "../flat.raw" 0'], "monolithicFlat")
    yield "itself", descriptor(['RW 1 FLAT "disk.vmdk" 0'], "monolithicFlat")
    yield "child-of-itself", descriptor(['RW 128 FLAT "flat.raw" 0'], "monolithicFlat",
                                        parent="8b4f0210", hint="disk.vmdk")
    yield "add-cow", addcow.header_1("", "flat.raw") + b"\x55" * 16
    yield "add-cow-child", (addcow.header_1('json:{"driver":"vmdk","file":{"filename":"extent.vmdk"}}', "flat.raw") +
                            b"\xf0" + mark + sparse(descriptor(['RW 61 SPARSE "extent.vmdk"']), 61, {0: 0x11}))
    yield "child", sparse(descriptor(['RW 61 SPARSE "disk.vmdk"'], parent="12345678", hint="flat.raw"),
                          61, {1: 0x44})


COPIED, CODED, ZERO = 1 << 63, 1 << 62, 1


def qcow2(entries, version=3, features=(0, 0, 0), order=4, snapshot=None, extensions=b"", extended=False, counts=None,
          dirty=b"", size=40 * SECTOR):
    """Clusters of 512 bytes (16 KiB extended): header, refcount table, block, L1, L2, then data."""
    bits = 14 if extended else 9
    cluster = 1 << bits
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, bits, size, 0, 1, 3 * cluster, cluster, 1,
                         1 if snapshot else 0, 5 * cluster if snapshot else 0)
    if version == 3:
        header += struct.pack(">QQQII", *features, order, 104)
    header += extensions
    counts = counts or [1] * 12
    block = b"".join(struct.pack(">H", c) for c in counts)
    table = b"".join(struct.pack(">QQ", *e) if extended else struct.pack(">Q", e) for e in entries)
    parts = [header, struct.pack(">Q", 2 * cluster), block, struct.pack(">Q", 4 * cluster | COPIED), table,
             snapshot or b"", dirty]
    return b"".join(p.ljust(cluster, b"\0") for p in parts).ljust(12 * cluster, b"\x77")


def qcow2_bitmaps(data):
    """Directories: (table, entries, flags, type, granularity, name, extra data) of each bitmap."""
    sound = (9 * SECTOR, 1, 2, 1, 9, b"bm", b"")
    directories = {
        "two": [sound, (10 * SECTOR, 1, 0, 1, 16, b"other", b"")], "in-use": [sound[:2] + (3,) + sound[3:]],
        "same-name": [sound, sound[:5] + (b"bm", b"")], "same-table": [sound, sound[:5] + (b"x", b"")],
        "extra": [sound[:2] + (6,) + sound[3:6] + (b"12345",)], "foreign": [sound[:6] + (b"12345",)],
        "reserved": [sound[:2] + (1 << 31,) + sound[3:]], "long-table": [(9 * SECTOR, 1 << 27, 1, 1, 9, b"bm", b"")],
        "short-table": [sound[:4] + (31, b"bm", b"")], "coarse": [sound[:4] + (40, b"bm", b"")],
        "header": [(0, 1, 2, 1, 9, b"bm", b"")], "over-l1": [(3 * SECTOR, 1, 2, 1, 9, b"bm", b"")],
        "no-name": [sound[:5] + (b"", b"")],
    }
    for name, rows in directories.items():
        directory = b""
        for at, entries, flags, kind, granularity, label, extra in rows:
            row = struct.pack(">QIIBBHI", at, entries, flags, kind, granularity, len(label), len(extra)) + extra + label
            directory += row.ljust(-(-len(row) // 8) * 8, b"\0")
        extension = struct.pack(">IIIIQQ", 0x23852875, 24, len(rows), 0, len(directory), 5 * SECTOR)
        for table in (0, 1, 11 * SECTOR, 7):  # of the bitmap: bits are 0, are 1, stand there, stand nowhere
            image = bytearray(qcow2(data, features=(0, 0, 1), extensions=extension, snapshot=directory))
            image[9 * SECTOR:11 * SECTOR] = bytes(2 * SECTOR)
            image[9 * SECTOR:9 * SECTOR + 8] = struct.pack(">Q", table)
            yield f"bitmap-{name}-{table}", bytes(image)


def qcow2s():
    data = [6 * SECTOR | COPIED, 7 * SECTOR | COPIED, ZERO, 8 * SECTOR | ZERO | COPIED]
    yield "plain", qcow2(data)
    yield "old", qcow2(data[:2], version=2)
    yield "shared", qcow2([6 * SECTOR, 6 * SECTOR], counts=[1] * 6 + [2] + [1] * 5)
    coded = zlib.compressobj(9, zlib.DEFLATED, -12)
    coded = coded.compress(b"a" * SECTOR) + coded.flush()
    yield "coded", qcow2([6 * SECTOR | CODED, 6 * SECTOR | CODED], dirty=coded, counts=[1] * 6 + [2] + [1] * 5)
    yield "bomb", qcow2([6 * SECTOR | CODED | 1 << 61], dirty=zlib.compress(bytes(1 << 20))[2:])
    yield "extended", qcow2([(6 << 14 | COPIED, 0xffff0000 << 32 | 0xffff), (0, 1 << 32)], features=(16, 0, 0),
                            extended=True, size=40 << 14)
    yield "extended-both", qcow2([(6 << 14 | COPIED, 1 << 32 | 1)], features=(16, 0, 0), extended=True, size=40 << 14)
    yield "dirty", qcow2(data, features=(1, 1, 0), counts=[0] * 12)
    yield "corrupt", qcow2(data, features=(2, 0, 0))
    yield "unknown", qcow2(data, features=(1 << 40, 0, 1 << 50),
                           extensions=struct.pack(">II", 0x6803f857, 48) + b"\0\x28" + b"later".ljust(46, b"\0"))
    yield "data-file", qcow2([COPIED, 0, ZERO | SECTOR * 2 | COPIED], features=(4, 0, 2),
                             extensions=struct.pack(">II", 0x44415441, 8) + b"flat.raw")
    yield "over-the-header", qcow2([COPIED | 0, 1 << 9 | COPIED, 3 * SECTOR | COPIED])
    yield "reserved", qcow2([6 * SECTOR | 1 << 57, 6 * SECTOR | 2, 100 << 40])
    entry = struct.pack(">QIHHIIQIIQQQ", 9 * SECTOR, 1, 1, 4, 0, 0, 0, 0, 24, 0, 40 * SECTOR, (1 << 64) - 1) + b"1name"
    yield "snapshot", qcow2(data, snapshot=entry)
    yield "snapshot-cut", qcow2(data, snapshot=entry[:30])
    small = struct.pack(">QIHHIIQII", 9 * SECTOR, 1, 0, 0, 0, 0, 0, 0, 0)
    yield "snapshots-same-table", qcow2(data, snapshot=small * 12)
    yield "snapshot-over-l1", qcow2(data, snapshot=struct.pack(">QIHHIIQII", 3 * SECTOR, 1, 0, 0, 0, 0, 0, 0, 0))
    yield "snapshot-large-table", qcow2(data, snapshot=struct.pack(">QIHHIIQII", 9 * SECTOR, 1 << 22, 0, 0, 0, 0, 0, 0, 0))
    many = bytearray(qcow2(data, snapshot=small))
    struct.pack_into(">I", many, 60, 65536)
    yield "snapshots-65536", bytes(many)
    for name, at, value in (("l1-over-counts", 40, SECTOR), ("l1-over-itself", 40, 4 * SECTOR), ("counts-over-l1", 48, 3 * SECTOR),
                            ("l1-32m", 36, (1 << 22) << 32), ("size-2-63", 24, (1 << 63) - SECTOR)):
        image = bytearray(qcow2(data))
        struct.pack_into(">Q", image, at, value)
        yield name, bytes(image)
    bitmaps = struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, 32, 5 * SECTOR)
    one = struct.pack(">QIIBBHI", 9 * SECTOR, 1, 2, 1, 9, 2, 0) + b"bm"
    yield "bitmap", qcow2(data, features=(0, 0, 1), extensions=bitmaps, snapshot=one.ljust(32, b"\0"))
    yield from qcow2_bitmaps(data)
    yield "huge", qcow2(data, size=1 << 62)


def descriptors():
    yield "plain", descriptor(['RW 61 SPARSE "disk.vmdk"'])
    yield "child", descriptor(['RW 61 SPARSE "a b.vmdk"'], cid="1", parent="abcdef01", hint="../p\\q.vmdk")
    yield "crlf", descriptor(['RW 61 SPARSE "disk.vmdk"']).replace(b"\n", b"\r\n")
    yield "odd-spaces", (b"# Disk DescriptorFile \n version = 1 \nCID =fffffffe\nparentcid= FFFFFFFF\n"
                         b"CREATETYPE=vmfs\nRw  61\tsparse  \"x\"   \n\n")
    yield "tracking", descriptor(['RW 61 VMFS "x-flat.vmdk" 0'], "vmfs",
                                 more='changeTrackPath="x-ctk.vmdk"\nddb.longContentID = "00ff"\n')
    yield "many", descriptor([f'RW {n} FLAT "f{n}" {n}' for n in range(1, 40)], "twoGbMaxExtentFlat")
    yield "huge-numbers", descriptor(['RW 18446744073709551615 FLAT "x" 99999999999999999999'])
    yield "no-quote", descriptor(['RW 61 SPARSE "disk.vmdk'])
    yield "twice", descriptor(['RW 1 ZERO'], hint="a", more='parentFileNameHint="b"\nCID=00000001\n')
    yield "encoding", descriptor(['RW 1 ZERO'], more='encoding="UTF-8"\n') + "ä".encode() + b"\xff\0rest"


def parents():
    for name in (b"", b"p.vmdk", b"n" * 200):
        for kind, content in images():
            if kind in ("sparse", "child", "flat", "unclean", "vmfs"):
                yield f"{kind}-{len(name)}", bytes([len(name)]) + name + content
        zero = descriptor(["RW 1 ZERO"], hint="old.vmdk", parent="00000007", more="ddb.x = \"" + "y" * 300 + "\"\n")
        yield f"text-{len(name)}", bytes([len(name)]) + name + zero


def addcows():
    def one(header, size=3000, bits=b"\5", name=b"base.raw"):
        return struct.pack(">H", size // 100) + bytes([len(name)]) + name + header + bits

    plain = addcow.header_1("base.raw", "img.raw")
    late = addcow.header_20("base.raw", "img.raw", 9, "raw")
    yield "plain", one(plain)
    yield "no-parent", one(addcow.header_1("", "img.raw"), 40000, b"\xff\0\x10\x80\1" * 2)
    yield "odd-size", one(plain, 20100, b"\1\2\4\x08\xff")
    yield "no-bits", one(plain, 10000, b"")
    yield "bits-past-the-end", one(plain, 1000, b"\xff" * 600, b"")
    yield "large-bitmap", one(plain, 149900, b"\0" * 20 + b"\xf0" * 17)
    yield "empty", one(plain, 0, b"")
    for words in ('{"driver":"raw","file":{"filename":"base.raw"}}', '{"driver":"add-cow","file":{"filename":"disk.add-cow"}}',
                  '{"driver":"vmdk","file":{"driver":"file","filename":"base.raw"}}', '{"driver":', '[1]', '{"driver":7}', '{}'):
        yield "json-" + words[10:14].strip('"') + str(len(words)), one(addcow.header_1("json:" + words, "img.raw"))
    for long in (499, 500, 1023):
        yield f"long-{long}", one(addcow.header_1("x" * long, "img.raw"), name=b"n" * (long % 256))
        yield f"long-new-{long}", one(plain, name=(b"./" * 500 + b"base.raw")[-(long // 4):])
    yield "no-nul", one(addcow.header_1("x" * 1024, "img.raw"))
    yield "behind-nul", one(addcow.header_1(b"base.raw\0x", "img.raw"))
    yield "reserved", one(addcow.header_1("base.raw", "img.raw", reserved=b"\1"))
    yield "version", one(addcow.header_1("base.raw", "img.raw", 2))
    yield "no-image", one(addcow.header_1("base.raw", ""))
    yield "image-is-base", one(addcow.header_1("base.raw", "base.raw"))
    yield "image-is-itself", one(addcow.header_1("base.raw", "disk.add-cow"))
    yield "late", one(late, 20000, b"\5\xff")
    yield "late-64k", one(addcow.header_20("base.raw", "img.raw", 16, "raw"), 140000, b"\2")
    yield "late-all", one(addcow.header_20("", "img.raw", 12, compat=1))
    yield "late-feature", one(addcow.header_20("", "img.raw", 12, features=1))
    yield "late-format", one(addcow.header_20("base.raw", "img.raw", 12, "vmdk"))
    for bits in (8, 22, 32, 255):
        yield f"late-bits-{bits}", one(late[:20] + struct.pack("<I", bits) + late[24:])
    yield "draft", one(addcow.MAGIC_20 + struct.pack("<I", 1) + bytes(4096))
    for n in (8, 11, 76, 1036, 2559):
        yield f"cut-{n}", one(plain[:n], bits=b"")
        yield f"late-cut-{n}", one(late[:n], bits=b"")


def vma_header(disks, configs=()):
    """disks: {id: (name, size)}"""
    fixed, blobs = bytearray(12288), bytearray(1)

    def blob(data):
        at = len(blobs)
        blobs.extend(struct.pack("<H", len(data)) + data)
        return at

    for i, (name, data) in enumerate(configs):
        struct.pack_into(">I", fixed, 2044 + 4 * i, blob(name + b"\0"))
        struct.pack_into(">I", fixed, 3068 + 4 * i, blob(data))
    for number, (name, size) in disks.items():
        struct.pack_into(">IIQ", fixed, 4096 + 32 * number, blob(name + b"\0"), 0, size)
    size = -(-(12288 + len(blobs)) // 512) * 512
    struct.pack_into(">4sI16sq16sIII", fixed, 0, b"VMA\0", 1, VMA_UUID, 1700000000, bytes(16), 12288,
                     len(blobs), size)
    header = bytes(fixed + blobs).ljust(size, b"\0")
    return header[:32] + hashlib.md5(header).digest() + header[48:]


VMA_UUID = b"0123456789abcdef"


def vma_extent(*slots):
    """slots: (id, cluster, mask)"""
    info = b"".join(struct.pack(">HBBI", mask, 0, number, cluster) for number, cluster, mask in slots)
    blocks = [(number, cluster, k) for number, cluster, mask in slots if number for k in range(16) if mask >> k & 1]
    header = struct.pack(">4sHH16s16s", b"VMAE", 0, len(blocks), VMA_UUID, bytes(16)) + info
    header = header.ljust(512, b"\0")
    header = header[:24] + hashlib.md5(header).digest() + header[40:]
    return header + b"".join(bytes([1 + sum(b) % 255]) * 4096 for b in blocks)


def vmas():
    one = vma_header({1: (b"d", 3 * 65536 + 700)}, [(b"qemu-server.conf", b"a: 1\n"), (b"x.fw", b"")])
    two = vma_header({1: (b"a", 65536), 255: (b"b", 65536)})
    state = vma_header({3: (b"vmstate", 100000), 4: (b"d", 512)})
    body = vma_extent((1, 1, 1), (1, 0, 0)) + vma_extent() + vma_extent((0, 9, 7), (1, 3, 3), (1, 2, 0x0101))
    good = one + body
    for flags in (0, 1, 2, 4, 8, 10):
        yield f"good-{flags}", bytes([flags]) + good
        yield f"missing-{flags}", bytes([flags]) + one + vma_extent((1, 1, 1), (1, 3, 0))
        yield f"twice-{flags}", bytes([flags]) + good + vma_extent((1, 2, 2))
        yield f"cut-{flags}", bytes([flags]) + good[:-5000]
        yield f"between-{flags}", bytes([flags]) + one + body[:4608 + 512] + b"?" * 1024 + body[4608 + 512:]
        yield f"zeros-{flags}", bytes([flags]) + good + bytes(1500)
        yield f"odd-end-{flags}", bytes([flags]) + good + b"x"
        yield f"state-{flags}", bytes([flags]) + state + vma_extent((3, 0, 1), (4, 0, 1), (3, 1, 0), (3, 2, 2))
        yield f"disorder-{flags}", bytes([flags]) + state + vma_extent((3, 1, 1), (4, 0, 1), (3, 0, 0), (3, 3, 2))
        yield f"others-{flags}", bytes([flags]) + two + vma_extent((1, 0, 1), (2, 0, 0), (255, 0, 4), (1, 7, 0))
    yield "nothing", b"\0" + vma_header({})
    yield "huge", b"\2" + vma_header({n: (b"d%d" % n, 1 << 48) for n in range(1, 5)}) + vma_extent((4, 1 << 31, 0))


def zstd_frame(data):
    """One frame of stored blocks; up to 255 bytes."""
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(data)]) + struct.pack("<I", len(data) << 3 | 1)[:3] + data


def zstd_table(frames, plain, flags=0):
    sums = struct.pack("<I", 7) if flags & 0x80 else b""
    entries = b"".join(struct.pack("<II", len(f), n) + sums for f, n in zip(frames, plain))
    return (struct.pack("<II", 0x184d2a5e, len(entries) + 9) + entries +
            struct.pack("<IBI", len(frames), flags, 0x8f92eab1))


def lzop(*blocks):
    header = struct.pack(">HHHBBIIIIB", 0x1040, 0x20a0, 0x0940, 1, 5, 1, 0, 0, 0, 0)
    out = b"\x89LZO\0\r\n\x1a\n" + header + struct.pack(">I", zlib.adler32(header))
    for data in blocks:
        out += struct.pack(">III", len(data), len(data), zlib.adler32(data)) + data
    return out + struct.pack(">I", 0)


def vma_sources():
    data = [bytes(range(200)), b"", b"x" * 255]
    frames = [zstd_frame(d) for d in data]
    sizes = [len(d) for d in data]
    yield "zstd", b"\0" + b"".join(frames)
    yield "zstd-skip", b"\0" + struct.pack("<II", 0x184d2a50, 3) + b"abc" + frames[0]
    for flags in (0, 0x80):
        yield f"zstd-table-{flags}", b"\0" + b"".join(frames) + zstd_table(frames, sizes, flags)
    yield "zstd-lies", b"\0" + b"".join(frames) + zstd_table(frames, [201, 0, 255])
    yield "gzip", b"\0" + gzip.compress(b"one" * 1000, mtime=0) + gzip.compress(b"two", mtime=0) + bytes(9)
    yield "bzip2", b"\0" + bz2.compress(b"one" * 1000) + bz2.compress(b"two")
    yield "lzop", b"\0" + lzop(b"one" * 100, b"two") + lzop()
    yield "plain", b"\0" + b"VMA\0" + bytes(1000)

    def disk(number, clusters, *words):
        return struct.pack("<IIQQ", number, 0, clusters, len(words)) + b"".join(struct.pack("<Q", w) for w in words)

    empty = disk(9, 600, 1 << 63 | 600)
    yield "index", b"\1" + disk(1, 40, 1 << 16 | 0xffff, 3 << 62 | 3, 1 << 63 | 35, 500 << 16 | 5) + empty
    yield "index-zeros", b"\1" + disk(1, 40, 1 << 63 | 40) + disk(9, 600, 1 << 63 | 100, 1 << 63 | 500)
    yield "index-long", b"\1" + disk(1, 40, 1 << 63 | 41) + empty
    yield "index-run-first", b"\1" + disk(1, 40, 3 << 62 | 40) + empty


def ovas():
    """The first byte says what it is: 0 an archive, 1 a text."""
    disk = dict(streams())["stream"]
    yield from ova_texts()
    for name, format in ("gnu", tarfile.GNU_FORMAT), ("ustar", tarfile.USTAR_FORMAT), ("pax", tarfile.PAX_FORMAT):
        for long in False, True:
            href = "d" * 120 + ".vmdk" if long else "d.vmdk"
            if long and name == "ustar":
                continue
            text = ovf(f'<File ovf:id="f1" ovf:href="{href}" ovf:size="{len(disk)}"/>',
                       '<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="1" '
                       'ovf:capacityAllocationUnits="byte * 2^20"/>')
            members = {"m.ovf": text, "m.mf": b"SHA1(m.ovf)= " + hashlib.sha1(text).hexdigest().encode(), href: disk}
            yield name + ("-long" if long else ""), b"\0" + tar(members, format)
    pieces = ovf(f'<File ovf:id="f1" ovf:href="d" ovf:chunkSize="1024" ovf:size="{len(disk)}"/>',
                 '<Disk ovf:diskId="d1" ovf:fileRef="f1"/>')
    yield "pieces", b"\0" + tar({"m.ovf": pieces, **{f"d.{n:09}": disk[n * 1024:n * 1024 + 1024]
                                                    for n in range(-(-len(disk) // 1024))}}, tarfile.GNU_FORMAT)


def tar(members, format):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as t:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    short = out.getvalue().rstrip(b"\0")
    return short + bytes(-len(short) % SECTOR + 2 * SECTOR)


def ovf(files, disks):
    space = "http://schemas.dmtf.org/ovf/envelope/1"
    return (f'<?xml version="1.0"?><Envelope xmlns="{space}" xmlns:ovf="{space}"><References>{files}</References>'
            f'<DiskSection><Info>i</Info>{disks}</DiskSection><VirtualSystem ovf:id="v"><Name>n &amp; m</Name>'
            "</VirtualSystem></Envelope>").encode()


def ova_texts():
    yield "descriptor", b"\1" + ovf('<File ovf:id="f" ovf:href="%41.vmdk" ovf:compression="gzip"/>',
                                    '<Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="${c}" ovf:parentRef="p"/>')
    yield "doctype", b'\1<!DOCTYPE a [<!ENTITY b "c">]><Envelope>&b;</Envelope>'
    yield "manifest", b"\1SHA256(a(b).vmdk)= " + b"0f" * 32 + b"\r\nSHA512 (m.ovf) = " + b"a" * 128 + b"\n"


def bitmaps():
    """Files of bitmaps beside a disk of 64 KiB: even = the whole file, odd = contents that get a header."""
    def one(name=b"b", flags=1, distrust=0, bits=9, pages=((0, 1, b"\5"),), zero=0):
        head = struct.pack("<6I", flags, distrust, bits, len(name), len(pages), zero) + name + bytes(-len(name) % 8)
        entries = b"".join(struct.pack("<II", index, kind) for index, kind, _ in pages)
        return head + entries + b"".join(words.ljust(4096, b"\0") for _, kind, words in pages if kind == 1)

    def contents(*rows, disk=65536, files=((65536, 0, 0, 0, 0),), n=None):
        stamps = b"".join(struct.pack("<5Q", *f) for f in files)
        return struct.pack("<QII", disk, len(files), len(rows) if n is None else n) + stamps + b"".join(rows)

    sound = contents(one(), one(b"other", flags=0, bits=16, pages=((0, 2, b""),)))
    yield "sound", b"\1" + sound
    yield "empty", b"\1" + contents()
    yield "no-files", b"\1" + contents(one(), files=())
    yield "distrusted", b"\1" + contents(one(distrust=1), one(b"c", distrust=2), one(b"d"))
    yield "other-disk", b"\1" + contents(one(pages=((1, 1, b"\xff" * 4096), (2, 2, b""))), disk=1 << 26)
    yield "huge-disk", b"\1" + contents(one(bits=21), disk=(1 << 63) - 1)
    yield "full-name", b"\1" + contents(one(b"n" * 1023))
    yield "disk-2^50", b"\1" + contents(one(bits=21, pages=((16383, 2, b""),)), disk=1 << 50)
    for what, row in {"long-name": one(b"n" * 1024), "no-name": one(b""), "nul": one(b"a\0b"), "fine": one(bits=8),
                      "coarse": one(bits=22), "flag": one(flags=2), "why": one(distrust=3), "zero": one(zero=1),
                      "page": one(pages=((1, 2, b""),)), "kind": one(pages=((0, 3, b""),)),
                      "twice": one(pages=((0, 2, b""), (0, 2, b"")))}.items():
        yield "bad-" + what, b"\1" + contents(row)
    yield "same-name", b"\1" + contents(one(), one())
    yield "more", b"\1" + sound + b"\0"
    yield "less", b"\1" + sound[:-1]
    yield "many", b"\1" + contents(one(), n=257)
    yield "no-header", b"\0" + b"DRBITMAP" + bytes(600)
    yield "short", b"\0DRB"


def vmsds():
    one = (b'.encoding = "UTF-8"\nsnapshot.lastUID = "2"\nsnapshot.current = "2"\nsnapshot0.uid = "1"\n'
           b'snapshot0.displayName = "a |22b|22"\nsnapshot0.createTimeHigh = "416404"\nsnapshot0.createTimeLow = "-5"\n'
           b'snapshot0.numDisks = "2"\nsnapshot0.disk0.fileName = "x.vmdk"\nsnapshot0.disk0.node = "scsi0:0"\n'
           b'snapshot0.disk1.fileName = "y.vmdk"\nsnapshot1.uid = "2"\nsnapshot1.parent = "1"\n'
           b'snapshot1.disk0.fileName = "x-000001.vmdk"\nsnapshot.numSnapshots = "2"\n')
    yield "two", one
    yield "crlf", one.replace(b"\n", b"\r\n")
    yield "one-disk", one.replace(b"disk1", b"other").replace(b'"2"\nsnapshot0.disk0', b'"1"\nsnapshot0.disk0')
    yield "empty", b""
    yield "comment", b"# nothing\n\n  \n"
    yield "no-end", b'a = "b"'
    yield "numbers", b'snapshot4095.uid = "1"\nsnapshot4096.uid = "1"\nsnapshot01.uid = "1"\nsnapshot0.disk300.fileName = "x"\n'
    for what, line in {"nul": b'a = "\0"', "no-quote": b"a = b", "quotes": b'a = "b"c"', "no-key": b'= "x"'}.items():
        yield "bad-" + what, one + line + b"\n"


def remote_names():
    names = ["nbd://host/a", "nbd://me@HOST:1/a%62?tls-verify-peer=false", "nbds+unix:///e?socket=/run/s&tls-psk-file=/f", "nbd://[::1]/x",
             "nbd://h", "nbd+unix:///", "nbd:host:10809:exportname=a b", "nbd:[::1]:7:exportname=[x]:8", "nbd:unix:/run/s:exportname=e",
             "nbd:unix:", "nbd:[:exportname=]:1", "http://u:p@host:80/a/b?c#d", "https://host/a/../b", "https://host/%2e%2e/b", "http://host/%00",
             "http://h/a%2fb/%2e", "http://[fe80::1%25eth0]/x", "http:///x",
             'json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"7"},"export":"e"}',
             'json:{"driver":"nbd","server.type":"unix","server.path":"/run/s","reconnect-delay":5}',
             'json:{"driver":"raw","file":{"driver":"nbd","uri":"nbds://h/x","timeout":86400}}',
             'json:{"driver":"qcow2","file.driver":"https","file.url":"https://h/x","file.sslverify":false,"file.cookie":"a=b"}',
             'json:{"driver":"http","url":"http://h/","username":"u","password":"p","timeout":-1}', 'json:{"driver":"nbd","host":"h","colour":1}',
             'json:{"driver":"raw","offset":512,"file":{"driver":"nbd","host":"h"}}', 'json:{"driver":"nbd","driver":"nbd"}']
    for n, name in enumerate(names):
        yield f"name-{n}", name.encode()


def http_answers():
    def answer(*lines, first=100, more=49, ranges=True, size=1000):
        return struct.pack("<HHBxH", first, more, ranges, size) + "".join(line + "\r\n" for line in lines).encode() + b"\r\n"

    ranged = ["HTTP/1.1 206 Partial Content", "Content-Range: bytes 100-149/1000", "Content-Length: 50"]
    yield "range", answer(*ranged, 'ETag: "1"', "Last-Modified: Mon, 30 Nov 2026 12:00:00 GMT")
    yield "shorter", answer(ranged[0], "content-range:bytes 100-120/1000")
    yield "whole", answer("HTTP/1.1 200 OK", "Content-Length: 1000", ranges=False)
    yield "moved", answer("HTTP/1.1 302 Found", "ETag: x", "Content-Encoding: gzip", "", *ranged)
    yield "encoded", answer(*ranged, "Content-Encoding: gzip")
    for n, value in enumerate(["bytes */1000", "bytes */", "bytes 100-149/*", "bytes 149-100/1000", "bytes 100-/1000", "bytes -5/1000", "lines 1-2/3",
                               "bytes 100-149/99999999999999999999", "bytes 99999999999999999999-0/0", "bytes 100-150/1000", "bytes 100-149", "*"]):
        yield f"range-{n}", answer(ranged[0], "Content-Range: " + value)
    yield "long", answer(*ranged, "ETag: " + 600 * "x", "Last-Modified: " + 100 * "y", 2000 * "z")
    yield "no-end", answer(*ranged)[:-12]


def nbd_extents():
    def answer(*entries, size=1 << 20, start=0):
        return struct.pack("<QQ", size, start) + b"".join(struct.pack("<II", *e) for e in entries)

    yield "three", answer((65536, 0), (65536, 3), (1 << 30, 0))
    yield "alike", answer((512, 3), (512, 2), (512, 0), (512, 1), (512, 3))
    yield "behind", answer((0xffffffff, 3), (1, 0), size=1 << 32, start=(1 << 32) - 5)
    yield "nothing", answer()
    yield "empty-one", answer((512, 0), (0, 3), (512, 3))
    yield "odd", answer((512, 0))[:-4]
    yield "many", answer(*((1, n % 2 * 2) for n in range(10000)))
    yield "huge", answer((0xffffffff, 2), (0xffffffff, 0), (0xffffffff, 2), size=(1 << 63) - 1, start=(1 << 63) - (1 << 33))


def luks_headers():
    def one(cipher=b"aes", mode=b"xts-plain64", digest=b"sha256", key=64, payload=4040, iterations=10, slots=8, active=1, first=8, stripes=4000):
        head = struct.pack(">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, cipher, mode, digest, payload, key, 20 * b"d", 32 * b"s", iterations,
                           b"2a2aab8f-fcb9-4e51-adef-6c043189ddd3")
        sectors = (key * 4000 + 4095) // 4096 * 8
        for i in range(slots):
            head += struct.pack(">II32sII", 0x00ac71f3 if i < active else 0xdead, 10, 32 * b"t", first + i * sectors, stripes)
        return head

    yield "xts", one()
    yield "essiv", one(mode=b"cbc-essiv:sha256", digest=b"sha1", key=16, payload=1032, active=3)
    yield "serpent", one(cipher=b"serpent", digest=b"sha512")
    yield "ecb", one(cipher=b"cast5", mode=b"ecb", digest=b"ripemd160", key=16)
    yield "odd-mode", one(mode=b"xts")
    yield "odd-hash", one(digest=b"whirlpool")
    yield "long", one(iterations=1 << 31)
    yield "large", one(payload=(64 << 20) // 512)
    yield "overlap", one(first=0xffff0000)
    yield "cut", one(slots=7)


def main():
    for target, inputs in (("http-answer", http_answers()), ("nbd-extents", nbd_extents()), ("luks", luks_headers()), ("remote-name", remote_names()),
                           ("addcow", addcows()), ("ova", ovas()), ("bitmaps", bitmaps()), ("vma", vmas()), ("vma-source", vma_sources()), ("image", images()), ("image", qcow2s()),
                           ("vmdk-extent", cowds()),
                           ("vmdk-descriptor", descriptors()),
                           ("vmdk-stream", streams()),
                           ("vmdk-parent", parents()), ("vmsd", vmsds())):
        directory = os.path.join(sys.argv[1], target)
        os.makedirs(directory, exist_ok=True)
        for name, content in inputs:
            with open(os.path.join(directory, name), "wb") as f:
                f.write(content)


main()

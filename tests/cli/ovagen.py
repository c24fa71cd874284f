# SPDX-License-Identifier: LGPL-2.1-or-later
"""OVAs made by Python's tarfile, in all its dialects, for the tests."""
import gzip
import hashlib
import io
import random
import tarfile

MIB = 1 << 20
DIALECTS = {"gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMESPACE = "http://schemas.dmtf.org/ovf/envelope/1"


def attributes(more):
    return "".join(f' ovf:{k}="{v}"' for k, v in more.items())


def descriptor(files, disks, name="my machine"):
    """files: {id: {href, ...}}; disks: {id: {fileRef, capacity, ...}}."""
    refs = "".join(f'<File ovf:id="{i}"{attributes(f)}/>' for i, f in files.items())
    all_disks = "".join(f'<Disk ovf:diskId="{i}"{attributes(d)}/>' for i, d in disks.items())
    return (f'<?xml version="1.0" encoding="UTF-8"?>\n<Envelope xmlns="{NAMESPACE}" xmlns:ovf="{NAMESPACE}">\n'
            f'<References>{refs}</References>\n<DiskSection><Info>Disks</Info>{all_disks}</DiskSection>\n'
            f'<VirtualSystem ovf:id="vm"><Info>A machine</Info><Name>{name}</Name></VirtualSystem>\n'
            "</Envelope>\n").encode()


def of_disks(disks):
    """The descriptor of files {name: bytes} that are disks of 5 MiB."""
    return descriptor({f"file{n}": {"href": name, "size": len(data)} for n, (name, data) in enumerate(disks.items())},
                      {f"vmdisk{n}": {"fileRef": f"file{n}", "capacity": 5, "capacityAllocationUnits": "byte * 2^20"}
                       for n in range(len(disks))})


def manifest(members, kind="SHA256"):
    return "".join(f"{kind}({name})= {hashlib.new(kind.lower(), data).hexdigest()}\n"
                   for name, data in members.items()).encode()


def pack(path, members, dialect="gnu"):
    """members: {name: bytes} in order, or a list of pairs."""
    with tarfile.open(path, "w", format=DIALECTS[dialect]) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def zipped(data):
    return gzip.compress(data, 6)


def raw_disk(seed, size=5 * MIB):
    """Mostly zeros, with some bytes that do not compress and some that do."""
    rng = random.Random(seed)
    disk = bytearray(size)
    for at in range(0, size, 640 * 1024):
        disk[at:at + 70000] = rng.randbytes(70000) if at % 3 else b"text " * 14000
    return bytes(disk[:size])

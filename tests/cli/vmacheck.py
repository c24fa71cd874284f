# SPDX-License-Identifier: LGPL-2.1-or-later
"""A reader of VMA archives in plain Python that checks every rule for readers, and for writers too when it is strict."""
import bz2
import gzip
import hashlib
import struct
import subprocess

BLOCK = 4096
CLUSTER = 65536
FIXED = 12288
EXTENT = 512
SLOTS = 59
WRITE_SLOTS = 58


def put(data, at, new):
    return data[:at] + new + data[at + len(new):]


def md5(data):
    return hashlib.md5(data).digest()


def as_bytes(name):
    return name if isinstance(name, bytes) else name.encode()



class Broken(Exception):
    def __init__(self, text, at=None):
        super().__init__(text if at is None else f"at {at}: {text}")
        self.at = at


class Parsed:
    def __init__(self):
        self.configs, self.disks, self.names, self.extents = [], {}, {}, []

    def named(self, name):
        return next(i for i, n in self.names.items() if n == as_bytes(name))

    def content(self, key):
        """The bytes of a disk by id or name."""
        i = key if isinstance(key, int) else self.named(key)
        size, clusters = self.disks[i]
        out = b"".join(clusters.get(n, bytes(CLUSTER)) for n in range(-(-size // CLUSTER)))
        return out[:size]


def plain_bytes(path):
    with open(path, "rb") as f:
        data = f.read()
    if data[:4] == b"\x28\xb5\x2f\xfd" or data[1:4] == b"\x2a\x4d\x18":
        return subprocess.run(["zstd", "-q", "-d", "-c", str(path)], stdout=subprocess.PIPE, check=True).stdout
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    if data[:3] == b"BZh":
        return bz2.decompress(data)
    if data[:4] == b"\x89LZO":
        return subprocess.run(["lzop", "-d", "-c", str(path)], stdout=subprocess.PIPE, check=True).stdout
    return data


def need(condition, text, at=None):
    if not condition:
        raise Broken(text, at)


def parse_blobs(data, offset, size):
    blobs, pos, end = {}, 1, 1
    while pos + 2 <= size:
        length = struct.unpack_from("<H", data, offset + pos)[0]
        if pos + 2 + length <= size:
            blobs[pos] = data[offset + pos + 2:offset + pos + 2 + length]
            end = pos + 2 + length
        pos += 2 + length
    return blobs, end


def string(blobs, pointer, what, at):
    need(pointer in blobs, f"{what}: the pointer {pointer} leads to no blob", at)
    blob = blobs[pointer]
    need(blob.endswith(b"\0") and b"\0" not in blob[:-1] and len(blob) > 1, f"{what}: no proper string {blob!r}", at)
    return blob[:-1]


def parse_header(data, strict):
    need(len(data) >= FIXED, "short header", 0)
    magic, version = struct.unpack_from(">4sI", data, 0)
    need(magic == b"VMA\0", f"magic {magic!r}", 0)
    need(version == 1, f"version {version}", 4)
    out = Parsed()
    out.uuid, out.ctime = data[8:24], struct.unpack_from(">q", data, 24)[0]
    offset, size, total = struct.unpack_from(">III", data, 48)
    out.header_size = total
    bare = total == FIXED and not any(data[2044:FIXED])  # nothing in it: one writer makes such, its reader refuses
    need(FIXED < total <= 64 << 20 or bare and not strict, f"header_size {total}", 56)
    need(len(data) >= total, "the header is cut", len(data))
    need(md5(put(data[:total], 32, bytes(16))) == data[32:48], "header md5", 32)
    need(FIXED <= offset and offset + size <= total, f"blobs {offset}+{size}", 48)
    blobs, end = parse_blobs(data, offset, size)
    for n in range(256):
        name, content = (struct.unpack_from(">I", data, at + 4 * n)[0] for at in (2044, 3068))
        need(bool(name) == bool(content), f"half a config {n}", 2044 + 4 * n)
        if name:
            need(content in blobs, f"config {n}: no contents", 3068 + 4 * n)
            out.configs.append((string(blobs, name, f"config {n}", 2044 + 4 * n), blobs[content]))
    need(data[4096:4128] == bytes(32), "device 0 is in use", 4096)
    for i in range(1, 256):
        at = 4096 + 32 * i
        name, reserved, length = struct.unpack_from(">IIQ", data, at)
        if length:
            out.names[i] = string(blobs, name, f"device {i}", at)
            out.disks[i] = (length, {})
            need(length <= 1 << 48, f"device {i}: {length} bytes", at)
        if strict:
            need(data[at + 16:at + 32] == bytes(16) and reserved == 0, "reserved bytes of a device", at)
            need(length or not name, f"device {i} without a size", at)
    if strict:
        strict_header(data, out, blobs, offset, size, end)
    return out


def strict_header(data, out, blobs, offset, size, end):
    """The rules for writers."""
    total = out.header_size
    need(total % 512 == 0 and offset == FIXED, f"header_size {total}, blobs at {offset}", 48)
    need(total <= 524288, "larger than what Proxmox writes", 56)
    need(data[FIXED] == 0, "byte 0 of the blobs", FIXED)
    need(size == end or not blobs and size <= 1, f"blob_buffer_size {size} is not the end {end}", 52)
    need(not any(data[60:2044]) and not any(data[4092:4096]), "reserved header bytes", 60)
    need(not any(data[offset + size:total]), "padding of the header", offset + size)
    names = [n for n, _ in out.configs]
    need(len(set(names)) == len(names), "config names repeat")
    for name in names:
        need(b"/" not in name and name not in (b".", b".."), f"config name {name!r}")
    need(len(set(out.names.values())) == len(out.names), "device names repeat")
    for i, name in out.names.items():
        need(1 <= i <= 254 and len(name) < 256 and not any(c in b" \t\n/" for c in name), f"device {i} {name!r}")
        need(out.disks[i][0] % 512 == 0 or name == b"vmstate", f"device {i}: size {out.disks[i][0]}")


def parse_extent(data, at, out, strict):
    need(len(data) - at >= EXTENT, "short extent", at)
    head = data[at:at + EXTENT]
    magic, reserved, count = struct.unpack_from(">4sHH", head, 0)
    need(md5(put(head, 24, bytes(16))) == head[24:40], "extent md5", at)
    need(head[8:24] == out.uuid, "extent uuid", at)
    need(magic == b"VMAE" and reserved == 0, "extent magic", at)
    need(count <= SLOTS * 16, f"{count} blocks", at)
    end = at + EXTENT + count * BLOCK
    need(end <= len(data), f"extent of {count} blocks is cut", at)
    pos, used, behind = at + EXTENT, 0, False
    slots = []
    for n in range(SLOTS):
        mask, res, disk, cluster = struct.unpack_from(">HBBI", head, 40 + 8 * n)
        if strict:
            need(disk or not (mask or res or cluster), "an unused slot is not zero", at)
            need(res == 0, "reserved byte of a slot", at)
            need(not (behind and disk), "a used slot behind an unused one", at)
        behind = behind or not disk
        if not disk:
            continue
        used += 1
        need(disk in out.disks, f"no device {disk}", at)
        pos = take_cluster(data, pos, end, at, out, disk, cluster, mask, strict)
        slots.append((disk, cluster, mask))
    need(pos == end, f"{end - pos} bytes are left over", at)
    out.extents.append((at, end - at, slots))
    if strict:
        need(used <= WRITE_SLOTS, f"{used} slots", at)
    return end


def take_cluster(data, pos, end, at, out, disk, cluster, mask, strict):
    size, clusters = out.disks[disk]
    stream = out.names[disk] == b"vmstate"
    if stream:
        need(cluster == len(clusters), f"vmstate {cluster} out of order", at)
    else:
        need(cluster not in clusters, f"cluster {cluster} of {disk} again", at)
        need(cluster * CLUSTER < size, f"cluster {cluster} of {disk} is behind the end", at)
    blocks = []
    for k in range(16):
        if not mask >> k & 1:
            blocks.append(bytes(BLOCK))
            continue
        need(pos + BLOCK <= end, "more blocks than counted", at)
        block = data[pos:pos + BLOCK]
        blocks.append(block)
        pos += BLOCK
        if strict:
            first = cluster * CLUSTER + k * BLOCK
            need(any(block), f"a stored block of zeros, {disk}:{cluster}:{k}", at)
            need(first < size or stream, f"a block behind the end, {disk}:{cluster}:{k}", at)
            need(first + BLOCK <= size or stream or not any(block[size - first:]), "rubbish behind the end", at)
    clusters[cluster] = b"".join(blocks) if mask else ZERO_CLUSTER
    return pos


ZERO_CLUSTER = bytes(CLUSTER)


def parse(data, strict=False):
    """Everything that an archive holds; Broken if a rule is broken. strict: the rules for writers as well."""
    out = parse_header(data, strict)
    at = out.header_size
    while at < len(data):
        at = parse_extent(data, at, out, strict)
    for i, (size, clusters) in out.disks.items():
        if out.names[i] != b"vmstate":
            wanted = -(-size // CLUSTER)
            first = next((n for n in range(wanted) if n not in clusters), None)
            need(first is None, f"device {i} lacks {wanted - len(clusters)} clusters, the first {first}")
    if strict:
        need(out.extents, "no extent at all: Proxmox ends even a config-only archive with one", at)
    return out


def check(path):
    """The archive at path, by all rules for writers."""
    return parse(plain_bytes(path), strict=True)

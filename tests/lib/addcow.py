# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads and writes add-cow images, from the description of the format alone: what Drover's own
driver is measured against.

    make(path, size, bits, backing='base.raw')     # version 1: metadata, and the raw file if asked
    make(path, size, bits, layout='v20', ...)      # the last revision
    image = Image.load(path)                       # or Refused, with the reason's first word
    view(path)                                     # the guest's bytes, through the whole chain
"""
import json
import os
import re
import struct
import subprocess
import tempfile

MAGIC_1, MAGIC_20 = b'ADD_COW\xff', b'ACOW'
HEADER_1 = 2560
STRINGS_20 = 76
ALL_ALLOCATED = 1


class Refused(Exception):
    """No add-cow image, or none that may be opened."""


def up(n, to):
    return -(-n // to) * to


# ---------------------------------------------------------------- bitmaps


def bitmap(size, granule, ranges):
    """One bit a granule, lowest bit first, set for each (offset, length)."""
    bits = bytearray(up(up(size, granule) // granule, 8) // 8)
    for off, length in ranges:
        for n in range(off // granule, up(off + length, granule) // granule):
            bits[n // 8] |= 1 << n % 8
    return bytes(bits)


# ---------------------------------------------------------------- headers


def name_with_format(name, fmt):
    """What version 1 records for a parent of this format; raw needs no word."""
    if not name or fmt in (None, 'raw'):
        return name or ''
    return 'json:' + json.dumps({'driver': fmt, 'file': {'filename': name}}, separators=(',', ':'))


def header_1(backing, image, version=1, reserved=b''):
    """backing, image: bytes or str, as they are to stand there."""
    fields = [b if isinstance(b, bytes) else os.fsencode(b) for b in (backing, image)]
    return (MAGIC_1 + struct.pack('>I', version) + b''.join(f.ljust(1024, b'\0') for f in fields) +
            reserved.ljust(500, b'\0'))


def header_20(backing, image, cluster_bits=16, backing_format='', features=0, compat=0,
              image_format='raw', **fields):
    """fields: any of the numbers, instead of what it should be."""
    back, img = os.fsencode(backing or ''), os.fsencode(image)
    size = max(4096, 1 << cluster_bits)
    f = {'backing_offset': STRINGS_20 if back else 0, 'backing_size': len(back),
         'image_offset': STRINGS_20 + len(back), 'image_size': len(img),
         'header_size': size, **fields}
    out = MAGIC_20 + struct.pack('<IIIII', f['backing_offset'], f['backing_size'],
                                 f['image_offset'], f['image_size'], cluster_bits)
    out += struct.pack('<QQI', features, compat, f['header_size'])
    out += os.fsencode(backing_format).ljust(16, b'\0') + os.fsencode(image_format).ljust(16, b'\0')
    assert len(out) == STRINGS_20
    return (out + back + img).ljust(size, b'\0')


def make(path, size, ranges=(), layout='v1', backing=None, backing_format=None, image=None,
         content=None, cluster_bits=16, compat=0):
    """The metadata file, and with content (bytes) or None (sparse) its raw file too. ranges: what
    the raw file holds. The raw file is left alone if content is False."""
    name = image or os.path.basename(path) + '.raw'
    if layout == 'v1':
        head = header_1(name_with_format(backing, backing_format), name)
        bits = bitmap(size, 512, ranges)
    else:
        if not backing:
            compat |= ALL_ALLOCATED
        fmt = backing_format or ('raw' if backing else '')
        head = header_20(backing, name, cluster_bits, fmt, compat=compat)
        bits = bitmap(size, 1 << cluster_bits, ranges)
        bits = bits.ljust(up(len(bits), 1 << cluster_bits), b'\0')
    with open(path, 'wb') as f:
        f.write(head + bits)
    if content is not False:
        with open(os.path.join(os.path.dirname(path), name), 'wb') as f:
            f.write(content or b'')
            f.truncate(size)


# ---------------------------------------------------------------- reading


def field_1(raw, what):
    """A name with its NUL, and nothing behind that."""
    if b'\0' not in raw:
        raise Refused(f'{what} has no NUL')
    name = raw[:raw.index(b'\0')]
    if any(raw[len(name):]):
        raise Refused(f'draft: bytes behind {what}')
    return os.fsdecode(name)


class Image:
    """One add-cow metadata file."""

    def __init__(self, blob, where=''):
        self.where = where
        if blob[:8] == MAGIC_1:
            self._version_1(blob)
        elif blob[:4] == MAGIC_20:
            self._version_20(blob)
        else:
            raise Refused('not add-cow')

    @classmethod
    def load(cls, path):
        with open(path, 'rb') as f:
            return cls(f.read(), os.path.dirname(path))

    def _version_1(self, blob):
        if len(blob) < HEADER_1:
            raise Refused('truncated header')
        version = struct.unpack_from('>I', blob, 8)[0]
        if version != 1:
            raise Refused(f'draft or version {version}')
        self.layout, self.granule, self.all_allocated = 'v1', 512, False
        self.recorded = field_1(blob[12:1036], 'backing_file')
        self.image = field_1(blob[1036:2060], 'image_file')
        if any(blob[2060:HEADER_1]):
            raise Refused('draft: reserved bytes')
        if not self.image:
            raise Refused('no image_file')
        self.backing, self.backing_format = self.recorded or None, 'raw'
        if self.recorded.startswith('json:'):
            words = json.loads(self.recorded[5:])
            self.backing, self.backing_format = words['file']['filename'], words['driver']
        self.bits = blob[HEADER_1:]

    def _version_20(self, blob):
        if len(blob) < STRINGS_20:
            raise Refused('truncated header')
        back, back_n, img, img_n, shift, features, self.compat, size = \
            struct.unpack_from('<IIIIIQQI', blob, 4)
        if 0 < back < STRINGS_20:
            raise Refused('draft: version number')
        if not 9 <= shift <= 21 or size != max(4096, 1 << shift):
            raise Refused('header_size or cluster_bits')
        if features:
            raise Refused(f'features {features:x}')
        if (back == 0) != (back_n == 0) or back + back_n > size or img + img_n > size or \
                img < STRINGS_20 or not img_n:
            raise Refused('names')
        if len(blob) < size:
            raise Refused('truncated header')
        self.layout, self.granule = 'v20', 1 << shift
        self.all_allocated = bool(self.compat & ALL_ALLOCATED)
        self.backing = os.fsdecode(blob[back:back + back_n]) or None
        self.backing_format = os.fsdecode(blob[44:60].split(b'\0')[0]) or 'raw'
        self.image = os.fsdecode(blob[img:img + img_n])
        self.bits = blob[size:]

    def path_of(self, name):
        return os.path.join(self.where, name)

    def raw(self):
        with open(self.path_of(self.image), 'rb') as f:
            return f.read()

    def size(self):
        return os.path.getsize(self.path_of(self.image))

    def complete(self):
        return all(has for _, _, has in self.runs())

    def runs(self):
        """(offset, end, in the raw file?), neighbours joined."""
        size = self.size()
        n = up(size, self.granule) // self.granule
        if self.all_allocated:
            text = '1' * n
        else:  # a digit a granule, the first one first
            text = bin(int.from_bytes(self.bits, 'little'))[:1:-1][:n].ljust(n, '0')
        return [(m.start() * self.granule, min(m.end() * self.granule, size), m.group()[0] == '1')
                for m in re.finditer('0+|1+', text)]

    def view(self):
        out = bytearray(self.raw())
        below = b''
        if self.backing and not self.all_allocated:
            below = view(self.path_of(self.backing), self.backing_format)
        for off, end, has in self.runs():
            if not has:
                out[off:end] = below[off:end].ljust(end - off, b'\0')
        return bytes(out)


def foreign(path, fmt):
    """What qemu-img says of an image of another format."""
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run(['qemu-img', 'convert', '-f', fmt, '-O', 'raw', path, out.name], check=True)
        return out.read()


def view(path, fmt='add-cow'):
    if fmt == 'add-cow':
        return Image.load(path).view()
    if fmt == 'raw':
        with open(path, 'rb') as f:
            return f.read()
    return foreign(path, fmt)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A registry hive of Windows, written whole: enough for programs that look at a disk and find Windows on it."""
import struct

NONE = 0xffffffff
TEXT, NUMBER = 1, 4
# An owner and nothing else: SYSTEM.
SECURITY = struct.pack('<BBHIIII', 1, 0, 0x8000, 20, 0, 0, 0) + struct.pack('<BB6BI', 1, 1, 0, 0, 0, 0, 0, 5, 18)


class Hive:
    """keys is {'key': {...}, 'value': 'text' or number}, nested."""

    def __init__(self, keys):
        self.bin = bytearray(32)
        self.security = self.cell(b'sk' + struct.pack('<HIIII', 0, 0, 0, self.count(keys), len(SECURITY)) + SECURITY)
        struct.pack_into('<II', self.bin, self.security + 8, self.security, self.security)
        self.root = self.key('ROOT', keys, NONE, 0x2c)

    def count(self, keys):
        return 1 + sum(self.count(value) for value in keys.values() if isinstance(value, dict))

    def cell(self, data):
        """Where it is, counted from the first bin. Its size, negative as it is in use, stands in front."""
        offset = len(self.bin)
        size = (len(data) + 4 + 7) // 8 * 8
        self.bin += struct.pack('<i', -size) + data + bytes(size - 4 - len(data))
        return offset

    def key(self, name, keys, parent, flags=0x20):
        children = sorted((k for k, v in keys.items() if isinstance(v, dict)), key=str.upper)
        values = [k for k, v in keys.items() if not isinstance(v, dict)]
        words = (0, parent, len(children), 0, NONE, NONE, len(values), NONE, self.security, NONE, 64, 0, 64, 128, 0)
        own = self.cell(b'nk' + struct.pack('<HQ15IHH', flags, 0, *words, len(name), 0) + name.encode())
        if children:
            list_ = b''.join(struct.pack('<II', self.key(k, keys[k], own), self.hash(k)) for k in children)
            struct.pack_into('<I', self.bin, own + 4 + 28, self.cell(b'lh' + struct.pack('<H', len(children)) + list_))
        if values:
            list_ = b''.join(struct.pack('<I', self.value(k, keys[k])) for k in values)
            struct.pack_into('<I', self.bin, own + 4 + 40, self.cell(list_))
        return own

    def value(self, name, value):
        if isinstance(value, int):
            length, data, kind = 4 | 1 << 31, value, NUMBER
        else:
            text = (value + '\0').encode('utf-16le')
            length, data, kind = len(text), self.cell(text), TEXT
        return self.cell(b'vk' + struct.pack('<HIIIHH', len(name), length, data, kind, 1, 0) + name.encode())

    @staticmethod
    def hash(name):
        value = 0
        for c in name.upper():
            value = (value * 37 + ord(c)) & NONE
        return value

    def bytes(self):
        rest = -len(self.bin) % 4096
        body = self.bin + (struct.pack('<i', rest) + bytes(rest - 4) if rest else b'')
        body[:32] = b'hbin' + struct.pack('<IIQQI', 0, len(body), 0, 0, 0)
        head = bytearray(4096)
        struct.pack_into('<4sIIQIIIIIII', head, 0, b'regf', 1, 1, 0, 1, 5, 0, 1, self.root, len(body), 1)
        sum_ = 0
        for (word,) in struct.iter_unpack('<I', head[:508]):
            sum_ ^= word
        struct.pack_into('<I', head, 508, sum_)
        return bytes(head + body)

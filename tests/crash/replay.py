# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a power cut may leave of a directory, from a recording of the program that changed it.

    rec = Recording(directory)            # before: keeps what is there
    rec.run([...])                        # the real program, with preload.so
    for k in range(len(rec.records) + 1):
        rec.build(k, random.Random(seed), target)

A file's content up to its last flush is certain; of what came after, any subset may be there, and of
a single write any subset of its sectors. Names are certain up to the last flush of their directory.
"""
import os
import shutil
import struct
import subprocess

CREATE, WRITE, TRUNCATE, PUNCH, ZERO, GROW, FLUSH, RENAME, UNLINK, MKDIR, RMDIR, LINK, \
    FLUSH_DIR = range(1, 14)
KINDS = ('', 'create', 'write', 'truncate', 'punch', 'zero', 'grow', 'flush', 'rename', 'unlink',
         'mkdir', 'rmdir', 'link', 'flush directory')
SECTOR = 512
PRELOAD = os.environ.get('DROVER_PRELOAD') or os.path.join(
    os.path.dirname(os.path.realpath(os.environ.get('DROVER', 'build/drover'))),
    'tests/crash/libdrover-preload.so')


def environment(watch, **more):
    env = dict(os.environ, LD_PRELOAD=PRELOAD, DROVER_WATCH=os.path.realpath(watch))
    # A build with AddressSanitizer wants to be loaded first; it works all the same.
    env['ASAN_OPTIONS'] = env.get('ASAN_OPTIONS', '') + ':verify_asan_link_order=0'
    env.update({k: str(v) for k, v in more.items()})
    return env


class Record:
    def __init__(self, kind, ino, off, length, a, b, data):
        self.kind, self.ino, self.off, self.length = kind, ino, off, length
        self.a, self.b, self.data = a, b, data

    def __repr__(self):
        return f'<{KINDS[self.kind]} {self.ino} {self.off}+{self.length} {self.a} {self.b}>'


def parse(path):
    records = []
    with open(path, 'rb') as f:
        blob = f.read()
    at = 0
    while at < len(blob):
        kind, ino, off, length, la, lb = struct.unpack_from('6Q', blob, at)
        at += 48
        a, b = blob[at:at + la].decode(), blob[at + la:at + la + lb].decode()
        at += la + lb
        data = b''
        if kind == WRITE:
            data = blob[at:at + length]
            at += length
        records.append(Record(kind, ino, off, length, a, b, data))
    return records


def apply(content, r, sectors=None):
    """One change to a bytearray; sectors: which of the write's (indices in the file), None = all."""
    end = r.off + r.length
    if r.kind == TRUNCATE:
        if r.off < len(content):
            del content[r.off:]
        else:
            content.extend(bytes(r.off - len(content)))
        return
    if r.kind == PUNCH:
        end = min(end, len(content))
    if r.kind != PUNCH and end > len(content):
        content.extend(bytes(end - len(content)))
    if r.kind == GROW:
        return
    new = r.data if r.kind == WRITE else bytes(max(0, end - r.off))
    if sectors is None:
        content[r.off:end] = new
        return
    for s in sectors:
        lo, hi = max(r.off, s * SECTOR), min(end, (s + 1) * SECTOR)
        if lo < hi:
            content[lo:hi] = new[lo - r.off:hi - r.off]


def random_sectors(r, rnd):
    first, last = r.off // SECTOR, (r.off + max(r.length, 1) - 1) // SECTOR
    return [s for s in range(first, last + 1) if rnd.random() < 0.5]


def subset(content, pending, rnd, mode, last):
    """Apply some of the changes that no flush has made certain."""
    if mode != 'random':
        for r in pending:
            if mode == 'all' or (mode == 'last' and r is last):
                apply(content, r)
        return
    mood = rnd.random()  # often all or nothing: most faults hide behind neither
    for r in pending:
        pick = rnd.random() if mood < 0.6 else mood - 0.4
        if pick < 0.4:
            apply(content, r)
        elif pick < 0.55 and r.kind in (WRITE, ZERO, PUNCH):
            apply(content, r, random_sectors(r, rnd))


def write_sparse(f, content):
    """What nobody wrote is a hole again."""
    for at in range(0, len(content), 65536):
        piece = content[at:at + 65536]
        if piece.count(0) != len(piece):
            f.seek(at)
            f.write(piece)
    f.truncate(len(content))


class Recording:
    def __init__(self, directory):
        self.directory = os.path.realpath(directory)
        self.names, self.contents, self.times, self.records = {}, {}, {}, []
        self.dirs = set()
        for where, dirs, files in os.walk(self.directory):
            self.dirs.update(os.path.join(where, d) for d in dirs)
            for name in files:
                path = os.path.join(where, name)
                ino = os.stat(path).st_ino
                self.names[path] = ino
                self.times[ino] = os.stat(path).st_mtime_ns
                if ino not in self.contents:
                    with open(path, 'rb') as f:
                        self.contents[ino] = f.read()

    def run(self, argv, log, **kw):
        """Run the real program; its CompletedProcess."""
        env = environment(self.directory, DROVER_RECORD=log, DROVER_COUNT=str(log) + '.count')
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, check=False, **kw)
        self.records = parse(log) if os.path.exists(log) else []
        return done

    def drop_flush(self, n):
        """Planted fault: the n-th flush never happened. The cuts that can tell: up to the file's next one."""
        seen = [i for i, r in enumerate(self.records) if r.kind == FLUSH]
        dropped = self.records.pop(seen[n])
        later = (i for i in range(seen[n], len(self.records))
                 if self.records[i].kind == FLUSH and self.records[i].ino == dropped.ino)
        return range(seen[n], next(later, len(self.records)) + 1)

    def flushes(self):
        return sum(r.kind == FLUSH for r in self.records)

    def interesting(self):
        """Cut points: around everything that is not one of many writes in a row."""
        points = {0, len(self.records)}
        for i, r in enumerate(self.records):
            if r.kind != WRITE or r.length <= 4096 or i + 1 == len(self.records) or \
                    self.records[i + 1].kind != WRITE:
                points.update((i, i + 1))
        return sorted(points)

    # -- what a cut after k records leaves

    def _files(self, k, rnd, mode):
        certain = {ino: bytearray(c) for ino, c in self.contents.items()}
        pending = {}
        for r in self.records[:k]:
            if r.kind == CREATE:
                certain[r.ino], pending[r.ino] = bytearray(), []
            elif r.kind == FLUSH:
                for p in pending.pop(r.ino, []):
                    apply(certain[r.ino], p)
            elif r.kind in (WRITE, TRUNCATE, PUNCH, ZERO, GROW):
                certain.setdefault(r.ino, bytearray())
                pending.setdefault(r.ino, []).append(r)
        for ino, changes in pending.items():
            subset(certain[ino], changes, rnd, mode, self.records[k - 1])
        return certain

    @staticmethod
    def _name_change(names, dirs, r):
        if r.kind == CREATE:
            names[r.a] = r.ino
        elif r.kind == LINK:
            names[r.b] = r.ino
        elif r.kind == UNLINK:
            names.pop(r.a, None)
        elif r.kind == MKDIR:
            dirs.add(r.a)
        elif r.kind == RMDIR:
            dirs.discard(r.a)
        elif r.kind == RENAME and r.off & 2:  # exchange
            names[r.a], names[r.b] = names.get(r.b), r.ino
        elif r.kind == RENAME:
            names.pop(r.a, None)
            names[r.b] = r.ino

    def _names(self, k, rnd, mode):
        names, dirs, pending = dict(self.names), set(self.dirs), []
        for r in self.records[:k]:
            if r.kind in (CREATE, RENAME, UNLINK, LINK, MKDIR, RMDIR):
                pending.append(r)
            elif r.kind == FLUSH_DIR:
                rest = []
                for p in pending:  # the entry that changes is the target's
                    if os.path.dirname(p.b or p.a) == r.a:
                        self._name_change(names, dirs, p)
                    else:
                        rest.append(p)
                pending = rest
        keep = rnd.randrange(len(pending) + 1) if rnd.random() < 0.6 else None
        for i, p in enumerate(pending):
            if mode != 'random':
                there = mode == 'all' or (mode == 'last' and p is self.records[k - 1])
            else:
                there = i < keep if keep is not None else rnd.random() < 0.5
            if there:
                self._name_change(names, dirs, p)
        return names, dirs

    def build(self, k, rnd, target, mode='random'):
        """The directory as a cut after k records may leave it. mode, of what is not certain: all,
        none, the last change alone, or any."""
        if os.path.exists(target):
            shutil.rmtree(target)
        files = self._files(k, rnd, mode)
        names, dirs = self._names(k, rnd, mode)
        os.makedirs(target)

        def moved(path):
            return os.path.join(target, os.path.relpath(path, self.directory))

        for d in sorted(dirs):
            os.makedirs(moved(d), exist_ok=True)
        for path, ino in names.items():
            if not os.path.isdir(os.path.dirname(moved(path))):
                continue  # its directory was never made certain
            with open(moved(path), 'wb') as f:
                write_sparse(f, files.get(ino, b''))
            if ino in self.times and files[ino] == self.contents[ino]:  # nobody wrote to it
                os.utime(moved(path), ns=(self.times[ino], self.times[ino]))

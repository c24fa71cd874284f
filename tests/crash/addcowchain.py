# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chains of add-cow images to be crashed. What they show is read by Drover and, since that could be
wrong in both directions, by a reader made from the description of the format."""
import hashlib
import os
import random
import sys

import crashlib
from crashlib import MIB, SEED, Operation, drover, some_ranges, write

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'lib'))
import addcow  # noqa: E402  pylint: disable=wrong-import-position

TOP = 'top.add-cow'


def content(directory, name):
    with open(os.path.join(directory, name), 'rb') as f:
        return f.read()


def ranges(rnd, size):
    """Zeros and data, a quarter of the disk at most each."""
    return [(pattern, off, min(length, size // 4) // 512 * 512)
            for pattern, off, length in some_ranges(rnd, max(size, 300000), 6) if off < size // 2]


class AddCowChain:
    """base.raw <- mid <- top, and other.raw: alike in part. sizes: of base, mid, top."""

    top = TOP
    share = 1

    def __init__(self, where, sizes=(MIB // 2,) * 3, new_size=None, bare=False):
        self.dir, self.size, self.new_size = os.path.join(where, 'chain'), sizes[2], new_size
        os.makedirs(self.dir)
        rnd = random.Random(SEED)
        common = rnd.randbytes(sizes[0] // 2)
        for name in ('base.raw', 'other.raw'):
            with open(self.path(name), 'wb') as f:
                f.write(common + rnd.randbytes(sizes[0] - len(common)))
        below, fmt = 'base.raw', 'raw'
        for stem, size in (('top', sizes[2]),) if bare else (('mid', sizes[1]), ('top', sizes[2])):
            addcow.make(self.path(f'{stem}.add-cow'), size, backing=below, backing_format=fmt,
                        image=f'{stem}.raw')
            write(self.path(f'{stem}.add-cow'), 'add-cow', ranges(rnd, size))
            below, fmt = f'{stem}.add-cow', 'add-cow'
        self.parents = {name: self.digest(self.dir, name) for name in os.listdir(self.dir)
                        if not name.startswith('top')}
        self.view = addcow.view(self.path(TOP))
        self.expected = os.path.join(where, 'expected.raw')
        with open(self.expected, 'wb') as f:
            f.write(self.view)

    @staticmethod
    def digest(directory, name):
        return hashlib.sha1(content(directory, name)).hexdigest()

    def changed_parent(self, directory):
        return next((name for name, sha1 in self.parents.items()
                     if self.digest(directory, name) != sha1), None)

    def path(self, name):
        return os.path.join(self.dir, name)

    def wanted(self, size):
        """The view, if the disk may have this size."""
        if size not in (self.size, self.new_size):
            return None
        return self.view[:size].ljust(size, b'\0')

    def wrong_view(self, directory, name):
        try:
            now = addcow.view(os.path.join(directory, name))
        except (addcow.Refused, OSError) as e:
            return f'{name}: {e}'
        want = self.wanted(len(now))
        if want is None:
            return f'{name} has {len(now)} bytes'
        if now != want:
            at = next(i for i, (a, b) in enumerate(zip(now, want)) if a != b)
            return f'{name}: byte {at} is {now[at]:02x}, not {want[at]:02x}'
        if len(now) == self.size:
            return crashlib.differs(self.expected, directory, name)
        return None

    def problem(self, op, directory):
        if self.finished(op, directory):
            why = None if content(directory, 'top.raw') == self.view else 'the raw disk is not the view'
        else:
            why = self.wrong_view(directory, TOP)
        if not why and op.argv[0] != 'commit' and self.changed_parent(directory):
            why = f'{self.changed_parent(directory)} has changed'
        if not why and op.result and os.path.exists(os.path.join(directory, op.result)):
            why = self.wrong_view(directory, op.result)
        return why

    @staticmethod
    def finished(op, directory):
        return op.name == 'addcow-retire' and not os.path.exists(os.path.join(directory, TOP))

    @staticmethod
    def unsound(directory):
        if not os.path.exists(os.path.join(directory, TOP)):
            return None
        done = drover('check', '-f', 'add-cow', os.path.join(directory, TOP), ok=False)
        return None if done.returncode == 0 else f'check: {done.returncode} {done.stdout}{done.stderr}'

    @staticmethod
    def qemu_problem(op, directory):
        del op, directory  # it has never heard of the format


def operation(name, *argv, **more):
    return Operation('addcow-' + name, *[a.replace('{t}', '{d}/' + TOP) for a in argv],
                     family=AddCowChain, **more)


UNEVEN = {'sizes': (MIB // 2, 200 * 1024 + 100, 350 * 1024 + 3)}
OPERATIONS = [
    operation('create', 'create', '-q', '-f', 'add-cow', '-b', TOP, '-F', 'add-cow', '{d}/new.add-cow',
              result='new.add-cow'),
    operation('rebase', 'rebase', '-b', 'other.raw', '-F', 'raw', '{t}'),
    operation('rebase-uneven', 'rebase', '-b', 'base.raw', '-F', 'raw', '{t}', chain=UNEVEN),
    # a name that does not fit into the first sector: the whole metadata file is replaced
    operation('rebase-long-name', 'rebase', '-b', './' * 300 + 'other.raw', '-F', 'raw', '{t}'),
    operation('flatten', 'rebase', '-b', '', '{t}'),
    operation('drop-equal', 'rebase', '--drop-equal', '-b', 'other.raw', '-F', 'raw', '{t}'),
    operation('commit', 'commit', '{t}'),
    operation('commit-two', 'commit', '-b', 'base.raw', '{t}'),
    operation('stream', 'stream', '{t}', chain=UNEVEN),
    operation('stream-to-base', 'stream', '--base', 'base.raw', '{t}'),
    operation('retire', 'stream', '--retire', '{t}'),
    operation('snapshot', 'snapshot', '-c', '{t}', result='top-000001.add-cow'),
    operation('convert', 'convert', '-t', 'writeback', '-f', 'add-cow', '-O', 'add-cow', '{t}',
              '{d}/out.add-cow', result='out.add-cow'),
    operation('grow', 'resize', '-f', 'add-cow', '{t}', '900K',
              chain={'sizes': (MIB, 0, 500 * 1024 + 512), 'bare': True, 'new_size': 900 * 1024}),
    operation('shrink', 'resize', '--shrink', '-f', 'add-cow', '{t}', '250K',
              chain={'new_size': 250 * 1024}),
]

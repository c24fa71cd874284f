# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives to be made, replaced, indexed and taken apart while crashes happen. What is there under its final name must be
whole at every moment: an archive by the rules of a reader that is not Drover's, a disk byte by byte."""
import hashlib
import os
import random
import sys

from crashlib import SEED, Operation, drover

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'cli'))
import vmagen  # noqa: E402  pylint: disable=wrong-import-position

CONF = b'memory: 512\n'


def content(directory, name):
    with open(os.path.join(directory, name), 'rb') as f:
        return f.read()


class Archives:
    """new.raw and, in old.vma with its checksums, another disk; and its configuration file. split: split.vmdk holds what
    new.raw does."""

    share = 1

    def __init__(self, where, split=False):
        self.dir = os.path.join(where, 'chain')
        os.makedirs(self.dir)
        rnd = random.Random(SEED)
        self.new, self.old = vmagen.random_disk(rnd, 300 * 1024 + 512), vmagen.random_disk(rnd, 250 * 1024)
        for name, data in (('new.raw', self.new), ('old.raw', self.old), ('qemu-server.conf', CONF)):
            with open(self.path(name), 'wb') as f:
                f.write(data)
        drover('vma', 'create', '-q', self.path('old.vma'), '-d', f'format=raw:x={self.path("old.raw")}', '-c',
               self.path('qemu-server.conf'))
        if split:
            drover('convert', '-f', 'raw', '-O', 'vmdk', '-o', 'subformat=twoGbMaxExtentSparse', self.path('new.raw'),
                   self.path('split.vmdk'))
        self.sources = {name: hashlib.sha1(content(self.dir, name)).hexdigest()
                        for name in ('new.raw', 'old.raw', 'qemu-server.conf')}

    def path(self, name):
        return os.path.join(self.dir, name)

    def wrong_archive(self, directory, name):
        try:
            parsed = vmagen.check(os.path.join(directory, name))
        except vmagen.Broken as e:
            return f'{name}: {e}'
        if parsed.content('x') not in (self.new, self.old) or parsed.configs != [(b'qemu-server.conf', CONF)]:
            return f'{name} holds something else'
        done = drover('vma', 'verify', os.path.join(directory, name), ok=False)  # with checksums, if they are there
        return f'{name}: {done.stdout}{done.stderr}' if done.returncode else None

    def wrong_disk(self, directory, name):
        path = os.path.join(directory, name)
        if name.endswith('.raw'):
            return None if content(directory, name) == self.old else f'{name} is not what the archive holds'
        fine = (self.old, self.new) if name == 'split.vmdk' else (self.old,)
        raw = path + '.check'
        done = drover('convert', '-O', 'raw', path, raw, ok=False)
        try:
            return None if done.returncode == 0 and content('', raw) in fine else f'{name}: {done.stderr}'
        finally:
            if os.path.exists(raw):
                os.unlink(raw)

    def problem(self, op, directory):
        for name, sha1 in self.sources.items():
            if hashlib.sha1(content(directory, name)).hexdigest() != sha1:
                return f'{name} has changed'
        why = None
        for name in ('old.vma', 'out.vma', 'out.vma.zst'):
            if not why and os.path.exists(os.path.join(directory, name)):
                why = self.wrong_archive(directory, name)
            elif name == 'old.vma' and not why:
                why = 'old.vma is gone'
        for name in ('out/x.raw', 'out/x.vmdk', 'x.raw', 'split.vmdk'):
            if not why and os.path.exists(os.path.join(directory, name)):
                why = self.wrong_disk(directory, name)
        conf = os.path.join(directory, 'out/qemu-server.conf')
        if not why and os.path.exists(conf) and content('', conf) != CONF:
            why = 'the configuration file is not whole'
        if not why and op.name == 'vma-index':
            done = drover('compare', '-f', 'raw', os.path.join(directory, 'old.raw'),
                          f'vma:{directory}/old.vma#x', ok=False)
            why = None if done.returncode == 0 else f'{done.returncode} {done.stdout}{done.stderr}'
        return why

    @staticmethod
    def finished(op, directory):
        # All have their names, and nothing says any more that they are to be finished: it says that they exist.
        out = os.path.join(directory, 'out')
        return op.name == 'vma-extract-resume' and os.path.exists(out + '/x.raw') and \
            not os.path.exists(out + '/.drover.partial/.drover.record')

    @staticmethod
    def unsound(directory):
        """After a run to the end: nothing is left over, though what is empty may be somebody's who is beginning."""
        left = [os.path.join(top, name) for top, dirs, files in os.walk(directory) for name in dirs + files
                if name.startswith('.')]
        left = [path for path in left if os.path.isdir(path) or os.path.getsize(path)]
        return f'left over: {left}' if left else None

    @staticmethod
    def qemu_problem(op, directory):
        del op, directory  # it has never heard of the format


def operation(name, *argv, **more):
    return Operation('vma-' + name, 'vma', *argv, family=Archives, **more)


SOURCE = ['-d', 'format=raw:x={d}/new.raw', '-c', '{d}/qemu-server.conf']
OPERATIONS = [
    operation('create', 'create', '-q', '--force', '{d}/out.vma', *SOURCE, result='out.vma'),
    operation('create-zstd', 'create', '-q', '--force', '{d}/out.vma.zst', *SOURCE, result='out.vma.zst'),
    operation('replace', 'create', '-q', '--force', '{d}/old.vma', *SOURCE, result='old.vma'),
    operation('extract', 'extract', '-q', '--force', '{d}/old.vma', '{d}/out', result='out/x.raw'),
    operation('extract-vmdk', 'extract', '-q', '--force', '--to', 'vmdk', '{d}/old.vma', '{d}/out', result='out/x.vmdk'),
    operation('extract-resume', 'extract', '-q', '--resume', '{d}/old.vma', '{d}/out', result='out/x.raw'),
    operation('extract-file', 'extract', '-q', '--force', '--output', '{d}/x.raw', '{d}/old.vma', result='x.raw'),
    operation('extract-split', 'extract', '-q', '--force', '--to', 'vmdk', '-o', 'subformat=twoGbMaxExtentSparse', '--output',
              '{d}/split.vmdk', '{d}/old.vma', result='split.vmdk', chain={'split': True}),
    operation('index', 'index', '-q', '{d}/old.vma', result='old.vma.idx'),
]

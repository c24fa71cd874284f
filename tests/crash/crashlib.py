# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chains to be crashed, the operations that are, and how to look at what is left."""
import hashlib
import os
import random
import shutil
import subprocess

MIB = 1 << 20
DROVER = os.environ.get('DROVER', 'drover')
SEED = int(os.environ.get('DROVER_SEED') or os.environ.get('DROVER_TEST_SEED') or '20091211')
SOAK = int(os.environ.get('DROVER_SOAK') or (os.environ.get('DROVER_TEST_LONG') and '10') or '1')
HAVE_QEMU = shutil.which('qemu-img') is not None


def run(*argv, ok=True, **kw):
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, check=False, **kw)
    if ok:
        assert done.returncode == 0, f'{argv}: {done.returncode}\n{done.stdout}{done.stderr}'
    return done


def drover(*argv, **kw):
    return run(DROVER, *argv, **kw)


def write(path, fmt, ranges):
    """ranges: (pattern or None for zeros, offset, length)."""
    argv = []
    for pattern, off, length in ranges:
        how = 'write -z' if pattern is None else f'write -P {pattern}'
        argv += ['-c', f'{how} {off} {length}']
    drover('io', '-f', fmt, *argv, path)


def some_ranges(rnd, size, n):
    out = []
    for _ in range(n):
        length = rnd.choice((512, 4096, 10000, 65536, 200000))
        off = rnd.randrange(0, size - length) // 512 * 512
        out.append((rnd.choice((None, rnd.randrange(1, 256))), off, length // 512 * 512))
    return out


class Chain:
    """base <- mid <- top, and other: a disk of its own, alike in part."""

    top = 'top.vmdk'
    share = 2  # halves of the crashes that a test asks for

    def __init__(self, where, subformat='monolithicSparse', size=3 * MIB, mid_size=None,
                 sibling=False, bases=None, options=''):
        self.dir, self.size, self.subformat = os.path.join(where, 'chain'), size, subformat
        self.bases, self.options = bases or subformat, options
        os.makedirs(self.dir)
        rnd = random.Random(SEED)
        self.make('base.vmdk', size)
        common = some_ranges(rnd, size, 5)
        write(self.path('base.vmdk'), 'vmdk', common + some_ranges(rnd, size, 3))
        self.make('mid.vmdk', mid_size or size, 'base.vmdk')
        write(self.path('mid.vmdk'), 'vmdk', some_ranges(rnd, mid_size or size, 4))
        self.make('top.vmdk', size, 'mid.vmdk')
        write(self.path('top.vmdk'), 'vmdk', some_ranges(rnd, size, 4))
        self.make('other.vmdk', size)
        write(self.path('other.vmdk'), 'vmdk', common + some_ranges(rnd, size, 3))
        if sibling:
            self.make('sibling.vmdk', size, 'mid.vmdk')
        self.parents = {name: self.digest(self.dir, name) for name in os.listdir(self.dir)
                        if not name.startswith('top')}
        self.expected = os.path.join(where, 'expected.raw')
        drover('convert', '-f', 'vmdk', '-O', 'raw', self.path('top.vmdk'), self.expected)

    @staticmethod
    def digest(directory, name):
        with open(os.path.join(directory, name), 'rb') as f:
            return hashlib.sha1(f.read()).hexdigest()

    def changed_parent(self, directory):
        """The name of a file that is no part of the top and has changed, or None."""
        return next((name for name, sha1 in self.parents.items()
                     if self.digest(directory, name) != sha1), None)

    def path(self, name):
        return os.path.join(self.dir, name)

    def problem(self, op, directory):
        """What is wrong with a directory in which op was cut off, or None."""
        why = differs(self.expected, directory, 'top.vmdk')
        if not why and op.argv[0] != 'commit' and self.changed_parent(directory):
            why = f'{self.changed_parent(directory)} has changed'
        if not why and op.result and os.path.exists(os.path.join(directory, op.result)):
            why = differs(self.expected, directory, op.result)
        return why

    @staticmethod
    def unsound(directory):
        """What check says of the top, leaks apart, or None."""
        top = os.path.join(directory, 'top.vmdk')
        done = drover('check', '-f', 'vmdk', top, ok=False)
        if done.returncode == 3:  # what the crash leaked, and nothing worse
            done = drover('check', '-r', 'leaks', '-f', 'vmdk', top, ok=False)
        return None if done.returncode == 0 else f'check: {done.returncode} {done.stdout}{done.stderr}'

    @staticmethod
    def finished(op, directory):
        """Is there nothing left that op could be done to?"""
        del op, directory
        return False

    def qemu_problem(self, op, directory):
        why = differs(self.expected, directory, 'top.vmdk', 'qemu-img')
        if not why or op.other_tools:
            return why
        # commit: for one moment only Drover knows the parent; never the wrong content though
        return why if 'mismatch at' in why or 'differ' in why else None

    def make(self, name, size, backing=None):
        more = ['-b', backing, '-F', 'vmdk'] if backing else []
        subformat = self.subformat if backing else self.bases
        drover('create', '-q', '-f', 'vmdk', '-o', f'subformat={subformat}{self.options}', *more,
               self.path(name), str(size))


class Tree(Chain):
    """An image is taken out below the top, or the top goes back to the base."""

    def problem(self, op, directory):
        why = differs(self.expected, directory, 'top.vmdk')
        if why and '-a' in op.argv:  # an empty image on base
            why = None if same_view(directory, 'top.vmdk', 'base.vmdk') else why
        if not why and '--down' not in op.argv and self.digest(directory, 'base.vmdk') != self.parents['base.vmdk']:
            why = 'base.vmdk has changed'
        return why

    @staticmethod
    def finished(op, directory):
        return '-d' in op.argv and not os.path.exists(os.path.join(directory, 'mid.vmdk'))

    def qemu_problem(self, op, directory):
        return None if '-a' in op.argv else super().qemu_problem(op, directory)


class Operation:
    """argv: with {d} for the directory. result: a further image that, where it exists, must be
    whole."""

    def __init__(self, name, *argv, result=None, chain=None, other_tools=True, family=Chain):
        self.name, self.argv, self.result = name, argv, result
        self.chain, self.other_tools, self.family = chain or {}, other_tools, family

    def make(self, where):
        """The images it is done to."""
        return self.family(str(where), **self.chain)

    def command(self, directory):
        return [DROVER] + [a.replace('{d}', directory) for a in self.argv]


def same_view(directory, a, b):
    return run(DROVER, 'compare', '-f', 'vmdk', '-F', 'vmdk', a, b, ok=False, cwd=directory).returncode == 0


SPLIT = {'subformat': 'twoGbMaxExtentSparse'}
FLAT = {'bases': 'monolithicFlat'}
OPERATIONS = [
    Operation('rebase', 'rebase', '-b', 'other.vmdk', '-F', 'vmdk', '{d}/top.vmdk'),
    Operation('rebase-split', 'rebase', '-b', 'other.vmdk', '-F', 'vmdk', '{d}/top.vmdk',
              chain=SPLIT),
    Operation('rebase-onto-grandparent', 'rebase', '-b', 'base.vmdk', '-F', 'vmdk',
              '{d}/top.vmdk'),
    Operation('rebase-shorter', 'rebase', '-b', 'base.vmdk', '-F', 'vmdk', '{d}/top.vmdk',
              chain={'mid_size': MIB}),
    Operation('rebase-onto-flat', 'rebase', '-b', 'other.vmdk', '-F', 'vmdk', '{d}/top.vmdk',
              chain=FLAT),
    Operation('rebase-zero-grains', 'rebase', '-b', 'other.vmdk', '-F', 'vmdk', '{d}/top.vmdk',
              chain={'options': ',zeroed_grain=on'}),
    # a name that does not fit into the descriptor's first sector
    Operation('rebase-long-name', 'rebase', '-b', './' * 400 + 'other.vmdk', '-F', 'vmdk',
              '{d}/top.vmdk'),
    Operation('flatten', 'rebase', '-b', '', '{d}/top.vmdk'),
    Operation('drop-equal', 'rebase', '--drop-equal', '-b', 'other.vmdk', '-F', 'vmdk',
              '{d}/top.vmdk'),
    Operation('commit', 'commit', '{d}/top.vmdk', other_tools=False),
    Operation('commit-keep', 'commit', '-d', '{d}/top.vmdk', other_tools=False),
    Operation('commit-two', 'commit', '-b', 'base.vmdk', '{d}/top.vmdk', other_tools=False),
    Operation('commit-into-flat', 'commit', '-b', 'base.vmdk', '{d}/top.vmdk', chain=FLAT,
              other_tools=False),
    Operation('commit-split', 'commit', '{d}/top.vmdk', chain=SPLIT, other_tools=False),
    Operation('delete-up', 'snapshot', '-q', '--up', '-d', 'mid.vmdk', '{d}/top.vmdk', family=Tree),
    Operation('delete-down', 'snapshot', '-q', '--down', '-d', 'mid.vmdk', '{d}/top.vmdk', family=Tree,
              other_tools=False),
    Operation('go-back', 'snapshot', '-q', '-a', 'base.vmdk', '{d}/top.vmdk', family=Tree),
    Operation('stream', 'stream', '{d}/top.vmdk'),
    Operation('stream-to-base', 'stream', '--base', 'base.vmdk', '{d}/top.vmdk'),
    Operation('stream-split', 'stream', '{d}/top.vmdk', chain=SPLIT),
    Operation('snapshot', 'snapshot', '-c', '{d}/top.vmdk', result='top-000001.vmdk'),
    Operation('snapshot-split', 'snapshot', '-c', '{d}/top.vmdk', result='top-000001.vmdk',
              chain=SPLIT),
    Operation('convert', 'convert', '-t', 'writeback', '-f', 'vmdk', '-O', 'vmdk',
              '{d}/top.vmdk', '{d}/out.vmdk', result='out.vmdk'),
    Operation('convert-raw', 'convert', '-t', 'writeback', '-f', 'vmdk', '-O', 'raw',
              '{d}/top.vmdk', '{d}/out.raw', result='out.raw'),
    Operation('convert-split', 'convert', '-t', 'writeback', '-f', 'vmdk', '-O', 'vmdk', '-o',
              'subformat=twoGbMaxExtentSparse', '{d}/top.vmdk', '{d}/out.vmdk',
              result='out.vmdk'),
    Operation('convert-flat', 'convert', '-t', 'writeback', '-f', 'vmdk', '-O', 'vmdk', '-o',
              'subformat=monolithicFlat', '{d}/top.vmdk', '{d}/out.vmdk', result='out.vmdk'),
]


def format_of(name):
    return name.rsplit('.', 1)[1]


def differs(expected, directory, name, tool=DROVER):
    """None, or how the guest's view of an image differs."""
    argv = [tool, 'compare', '-f', 'raw', '-F', format_of(name), expected,
            os.path.join(directory, name)]
    done = run(*argv, ok=False)
    return None if done.returncode == 0 else f'{done.returncode} {done.stdout}{done.stderr}'


def kill_points(total, limit):
    limit *= SOAK
    if total <= limit:
        return range(1, total + 1)
    step = total / limit  # the switches are at the end
    return sorted({1 + int(i * step) for i in range(limit)} | set(range(max(1, total - 8), total + 1)))


def finish(op, chain, directory):
    """Run op again, to its end; None or what is wrong then."""
    if chain.finished(op, directory):
        return chain.problem(op, directory)
    done = run(*op.command(directory), ok=False, cwd=directory)
    if done.returncode != 0:
        return f'the rerun failed: {done.returncode} {done.stderr}'
    why = chain.problem(op, directory)
    return f'after the rerun: {why}' if why else chain.unsound(directory)

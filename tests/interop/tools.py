# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same few things done by Drover and by QEMU's tools, and what a disk must hold."""
import os
import random
import subprocess

MIB = 1 << 20
DROVER = os.environ.get('DROVER', 'drover')
SAMPLES = os.environ.get('DROVER_SAMPLES', '')
SEED = int(os.environ.get('DROVER_SEED') or os.environ.get('DROVER_TEST_SEED') or '20091211')


def run(*argv, ok=True, **kw):
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, check=False, **kw)
    if ok:
        assert done.returncode == 0, f'{argv}: {done.returncode}\n{done.stdout}{done.stderr}'
    return done


class Drover:
    name = 'drover'
    img, io = [DROVER], [DROVER, 'io']


class Qemu:
    name = 'qemu'
    img, io = ['qemu-img'], ['qemu-io']


TOOLS = [Drover, Qemu]


def create(tool, path, fmt, size, options='', backing=None, backing_format='vmdk'):
    argv = tool.img + ['create', '-q', '-f', fmt]
    argv += ['-o', options] if options else []
    argv += ['-b', backing, '-F', backing_format] if backing else []
    run(*argv, path, size)


def create_encrypted(path, size, method):
    """An image encrypted with the password abc. QEMU measures the processor first, which fails now and then."""
    argv = ['qemu-img', 'create', '-q', '--object', 'secret,id=s,data=abc', '-f', 'qcow2', '-o',
            f'encrypt.format={method},encrypt.key-secret=s' + (',encrypt.iter-time=100' if method == 'luks' else ''),
            path, size]
    for _ in range(30):
        if run(*argv, ok=False).returncode == 0:
            return
    run(*argv)


def compare(tool, a, a_format, b, b_format):
    run(*tool.img, 'compare', '-f', a_format, '-F', b_format, a, b)


class Disk:
    """A disk and what it must hold."""

    def __init__(self, path, fmt, size, content=None):
        self.path, self.format, self.size = str(path), fmt, size
        self.content = bytearray(content[:size] if content else b'')
        self.content.extend(bytes(size - len(self.content)))

    def write(self, tool, rnd, n=6):
        argv = []
        for _ in range(n):
            length = min(rnd.choice((512, 4096, 65536, 131072, 300000)), self.size) // 512 * 512
            off = rnd.randrange(0, self.size - length + 1) // 512 * 512
            if rnd.random() < 0.15:
                off = (self.size - length) // 512 * 512  # up to the end
            pattern = rnd.choice((None, rnd.randrange(1, 256), rnd.randrange(1, 256)))
            how = 'write -z' if pattern is None else f'write -P {pattern}'
            argv += ['-c', f'{how} {off} {length}']
            self.content[off:off + length] = bytes([pattern or 0]) * length
        run(*tool.io, '-f', self.format, *argv, self.path)

    def expect(self, where):
        expected = os.path.join(str(where), 'expected.raw')
        with open(expected, 'wb') as f:
            f.write(self.content)
        return expected

    def verify(self, where, tools=None):
        """Every tool sees what was written."""
        expected = self.expect(where)
        for tool in tools or TOOLS:
            compare(tool, expected, 'raw', self.path, self.format)
        out = os.path.join(str(where), 'out.raw')
        for tool in tools or TOOLS:
            run(*tool.img, 'convert', '-f', self.format, '-O', 'raw', self.path, out)
            with open(out, 'rb') as f:
                assert f.read() == bytes(self.content), f'{tool.name} reads something else'


def rng(*what):
    return random.Random('/'.join(str(w) for w in (SEED,) + what))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command lines that other projects run, word for word as their sources build them.

Each line runs in two equal directories: in one with Drover under QEMU's names first in PATH, in the
other with QEMU's own tools. It must end, print and leave the same. PROJECTS is also what the manual
tells of these projects."""
import filecmp
import json
import os
import re
import shutil
import subprocess

import pytest

from tools import DROVER, MIB, run

pytestmark = pytest.mark.usefixtures('qemu')
NAMES = ('qemu-img', 'qemu-io', 'qemu-nbd')


def fill(where):
    """What the lines work on: a base with data and a snapshot, a disk on it, one beside it, a raw disk."""
    def img(*args):
        run('qemu-img', *args, cwd=where)

    def write(name, fmt, *commands):
        run('qemu-io', '-f', fmt, *[word for command in commands for word in ('-c', command)], name, cwd=where)

    img('create', '-q', '-f', 'qcow2', 'base.qcow2', '8M')
    write('base.qcow2', 'qcow2', 'write -P 1 0 1M', 'write -P 2 5M 256k')
    img('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', 'mid.qcow2')
    write('mid.qcow2', 'qcow2', 'write -P 3 1M 128k')
    img('create', '-q', '-f', 'qcow2', '-b', 'mid.qcow2', '-F', 'qcow2', 'top.qcow2')
    write('top.qcow2', 'qcow2', 'write -P 4 2M 192k', 'write -z 5M 64k')
    img('create', '-q', '-f', 'qcow2', 'disk.qcow2', '8M')
    write('disk.qcow2', 'qcow2', 'write -P 5 0 512k')
    img('snapshot', '-c', 'before', 'disk.qcow2')
    write('disk.qcow2', 'qcow2', 'write -P 6 256k 1M')
    img('create', '-q', '-f', 'qcow2', 'marked.qcow2', '8M')
    img('bitmap', '--add', 'marked.qcow2', 'one')
    img('bitmap', '--add', '--disable', 'marked.qcow2', 'two')
    write('marked.qcow2', 'qcow2', 'write -P 7 3M 1M')
    img('create', '-q', '-f', 'raw', 'disk.raw', '8M')
    write('disk.raw', 'raw', 'write -P 8 1M 2M')
    img('create', '-q', '-f', 'raw', 'target.raw', '8M')
    img('create', '-q', '-f', 'qcow2', 'target.qcow2', '8M')
    img('convert', '-f', 'raw', '-O', 'vmdk', '-o', 'subformat=streamOptimized', 'disk.raw', 'disk.vmdk')


LIMITS = ['prlimit', '--as=1073741824', '--cpu=30', '--']  # oslo.concurrency, vdsm and CDI start it so
ENV = ['env', 'LC_ALL=C', 'LANG=C']


def words(line):
    return line.split()


# Project: [what it does, [command line, ...]]. Lines of one entry run one after another.
PROJECTS = {
    'OpenStack': [
        ('nova: look at a disk in use', [LIMITS + ENV + words('qemu-img info disk.qcow2 --force-share --output=json -f qcow2')]),
        ('nova: look at a chain', [LIMITS + ENV + words('qemu-img info top.qcow2 --force-share --output=json')]),
        ('nova: an image becomes raw', [words('qemu-img convert -t none -O raw -f qcow2 disk.qcow2 new.raw')]),
        ('nova: where O_DIRECT is not', [words('qemu-img convert -t writeback -O qcow2 -f raw -c disk.raw new.qcow2')]),
        ('nova: a snapshot of an instance',
         [words('qemu-img convert -t none -O qcow2 -f qcow2 -c top.qcow2 new.qcow2')]),
        ('nova: extend the root disk', [words('qemu-img resize -f qcow2 disk.qcow2 16777216')]),
        ('nova: an ephemeral disk', [words('qemu-img create -f raw new.raw 4194304')]),
        ('nova: a disk over the image cache',
         [words('qemu-img create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 new.qcow2 8388608')]),
        ('nova: a disk of its own again', [['qemu-img', 'rebase', '-b', '', 'top.qcow2'], words('qemu-img info top.qcow2')]),
        ('nova: a snapshot inside', [words('qemu-img snapshot -c save disk.qcow2'), words('qemu-img snapshot -d save disk.qcow2')]),
        ('nova: delete a snapshot of a machine that is off',
         [words('qemu-img rebase -b base.qcow2 -F qcow2 top.qcow2')]),
        ('glance: convert at import', [LIMITS + words('qemu-img info -f qcow2 --output=json disk.qcow2'),
                                       words('qemu-img convert -f qcow2 -O raw disk.qcow2 new.raw')]),
        ('cinder: look at a volume', [LIMITS + ENV + words('qemu-img info --output=json --force-share disk.raw')]),
        ('cinder: an image into a volume', [words('qemu-img convert -O raw -t none -f qcow2 disk.qcow2 target.raw')]),
        ('cinder: a volume into an image', [words('qemu-img convert -O qcow2 -t none -f raw disk.raw new.qcow2')]),
        ('cinder: resize an image', [words('qemu-img resize disk.qcow2 1G')]),
        ('cinder: a snapshot on NFS',
         [words('qemu-img create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 new.qcow2'),
          words('qemu-img rebase -u -b base.qcow2 new.qcow2 -F qcow2')]),
        ('cinder: delete one', [words('qemu-img commit -d top.qcow2')]),
        ('cinder: clone on NFS', [words('qemu-img convert -O qcow2 mid.qcow2 new.qcow2')]),
    ],
    'CDI': [
        ('look at an image', [LIMITS + words('qemu-img info --output=json disk.qcow2')]),
        ('import', [words('qemu-img convert -t writeback -p -O raw disk.qcow2 new.raw')]),
        ('import with its space', [words('qemu-img convert -o preallocation=falloc -t none -p -O raw disk.qcow2 new.raw')]),
        ('import filled', [words('qemu-img convert -o preallocation=full -S 0 -t writeback -p -O raw disk.qcow2 new.raw')]),
        ('grow to the size of the claim', [words('qemu-img resize -f raw disk.raw 10485760')]),
        ('grow with its space', [words('qemu-img resize --preallocation=falloc -f raw disk.raw 10485760')]),
        ('a blank disk', [words('qemu-img create -f raw new.raw 10485760 -o preallocation=falloc')]),
        ('a delta of a warm migration', [words('qemu-img rebase -p -u -F raw -b target.raw target.qcow2'),
                                         words('qemu-img commit -p target.qcow2')]),
        ('measure', [words('qemu-img measure -O qcow2 --output=json disk.qcow2')]),
        ('KubeVirt: look at a disk', [words('qemu-img info disk.qcow2 --output json -U')]),
        ('KubeVirt: an ephemeral disk',
         [words('qemu-img create -f qcow2 -b disk.raw -F raw new.qcow2')]),
    ],
    'Packer': [
        ('create', [words('qemu-img create -f qcow2 new.qcow2 40960M'), words('qemu-img create -f qcow2 new.qcow2-1 5G')]),
        ('create over an image', [words('qemu-img create -f qcow2 -b base.qcow2 -F qcow2 new.qcow2 64M')]),
        ('resize', [words('qemu-img resize -f qcow2 disk.qcow2 40960M')]),
        ('convert', [words('qemu-img convert -O qcow2 disk.qcow2 disk.qcow2.convert')]),
        ('convert packed', [words('qemu-img convert -c -O qcow2 disk.qcow2 disk.qcow2.convert')]),
        ('convert with arguments of the user', [words('qemu-img convert -o lazy_refcounts=on,preallocation=metadata -O qcow2 disk.qcow2 new.qcow2')]),
        ('a box for VMware', [words('qemu-img convert -f qcow2 -O vmdk -o subformat=streamOptimized disk.qcow2 new.vmdk')]),
    ],
    'Lima': [
        ('look at an image', [words('qemu-img info --output=json --force-share disk.qcow2')]),
        ('look at a raw disk', [words('qemu-img info --output=json --force-share disk.raw')]),
        ('make it raw', [words('qemu-img convert -O raw disk.qcow2 new.raw'), words('qemu-img resize -f raw new.raw 16777216')]),
        ('a data disk', [words('qemu-img create -f qcow2 new.qcow2 107374182400')]),
        ('a disk over the base', [words('qemu-img create -f qcow2 -F qcow2 -b base.qcow2 new.qcow2 107374182400')]),
        ('resize', [words('qemu-img resize -f qcow2 disk.qcow2 107374182400')]),
        ('snapshots', [words('qemu-img snapshot -c tag disk.qcow2'), words('qemu-img snapshot -a tag disk.qcow2'),
                       words('qemu-img snapshot -l disk.qcow2'), words('qemu-img snapshot -d tag disk.qcow2')]),
    ],
    'Proxmox VE': [
        ('allocate', [words('qemu-img create -o preallocation=metadata -f qcow2 -- new.qcow2 8192K'),
                      words('qemu-img create -o preallocation=off -f raw -- new.raw 8192K'),
                      words('qemu-img create -f vmdk -- new.vmdk 8192K')]),
        ('look', [words('qemu-img info --output=json -f qcow2 -- disk.qcow2'), words('qemu-img info --output=json -f raw -- disk.raw'),
                  words('qemu-img info --output=json --backing-chain -- top.qcow2')]),
        ('a disk over a snapshot',
         [words('qemu-img create -F qcow2 -b base.qcow2 -f qcow2 -o extended_l2=on,cluster_size=128k,preallocation=metadata -- new.qcow2')]),
        ('a linked clone', [words('qemu-img create -b base.qcow2 -F qcow2 -f qcow2 new.qcow2')]),
        ('measure', [words('qemu-img measure --output=json --size 8192K -O qcow2'),
                     words('qemu-img measure --output=json --size 8192K -O qcow2 -o cluster_size=128k,extended_l2=on')]),
        ('resize', [words('qemu-img resize --preallocation=metadata -f qcow2 -- disk.qcow2 16777216'),
                    words('qemu-img resize --preallocation=off -f raw -- disk.raw 16777216')]),
        ('snapshots', [words('qemu-img snapshot -c snap disk.qcow2'), words('qemu-img snapshot -a snap disk.qcow2'),
                       words('qemu-img snapshot -l disk.qcow2'), words('qemu-img snapshot -d snap disk.qcow2')]),
        ('copy to a new volume', [words('qemu-img convert -p -n -f qcow2 -O raw disk.qcow2 zeroinit:target.raw')]),
        ('copy at a bounded rate', [words('qemu-img convert -p -n -T none -r 1048576K -f raw -O qcow2 disk.raw zeroinit:target.qcow2')]),
        ('copy a snapshot', [words('qemu-img convert -p -n -l snapshot.name=before -f qcow2 -O raw disk.qcow2 target.raw')]),
        ('copy into a chain of volumes',
         [words('qemu-img convert -p -n --target-image-opts -f raw disk.raw '
                'driver=qcow2,file.driver=file,file.filename=target.qcow2')]),
        ('import of a VMDK', [words('qemu-img convert -p -n -f vmdk -O qcow2 disk.vmdk target.qcow2')]),
        ('the newest snapshot goes', [words('qemu-img commit mid.qcow2')]),
        ('one in between goes', [words('qemu-img rebase -b base.qcow2 -F qcow2 -f qcow2 top.qcow2')]),
        ('a copy of EFI variables', [words('qemu-img dd -n -f raw -O qcow2 bs=1048576 osize=5242880 if=disk.raw of=target.qcow2')]),
        ('a copy of EFI variables in a snapshot',
         [words('qemu-img dd -n -f qcow2 -l before -O raw bs=1048576 osize=8388608 if=disk.qcow2 of=target.raw')]),
    ],
    'oVirt': [
        ('bitmaps are known', [words('sh -c') + [r"qemu-img --help | grep -cE '^[[:space:]]+bitmap (.+) filename bitmap'"]]),
        ('info', [words('qemu-img info --output json -f qcow2 marked.qcow2'), words('qemu-img info --output json -f qcow2 -U top.qcow2'),
                  LIMITS + words('qemu-img info --output json disk.raw')]),
        ('measure', [words('qemu-img measure --output json -O qcow2') +
                     ['json:' + json.dumps({'file': {'driver': 'file', 'filename': 'top.qcow2'}, 'driver': 'qcow2', 'backing': None})],
                     words('qemu-img measure --output json -O raw') +
                     ['json:' + json.dumps({'file': {'driver': 'file', 'filename': 'top.qcow2'}, 'driver': 'qcow2'})]]),
        ('create', [words('qemu-img create -f qcow2 -o compat=1.1 -b base.qcow2 -F qcow2 new.qcow2 8388608'),
                    words('qemu-img create -f qcow2 -o compat=0.10 new2.qcow2 8388608'),
                    words('qemu-img create -f raw -o preallocation=falloc new.raw 8388608'),
                    words('qemu-img create -f qcow2 -o compat=1.1 -b absent -F qcow2 -u new3.qcow2 8388608')]),
        ('check', [words('qemu-img check --output json -f qcow2 disk.qcow2')]),
        ('copy', [words('qemu-img convert -p -t none -T none -f qcow2 -O raw disk.qcow2 new.raw')]),
        ('copy to a device', [words('qemu-img convert -p -t none -T none -f raw -O raw -n -W disk.raw target.raw')]),
        ('copy in a chain', [words('qemu-img convert -p -t none -T none -f qcow2 -O qcow2 '
                                   '-o compat=1.1,backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2 new.qcow2')]),
        ('copy with bitmaps', [words('qemu-img convert -p -t none -T none -f qcow2 -O qcow2 -o compat=1.1 --bitmaps marked.qcow2 new.qcow2'),
                               words('qemu-img info --output json new.qcow2')]),
        ('export packed', [words('qemu-img convert -p -t none -T none -f qcow2 -O qcow2 -o compat=1.1 -c -W disk.qcow2 new.qcow2')]),
        ('commit', [words('qemu-img commit -p -t none -b base.qcow2 -f qcow2 top.qcow2')]),
        ('commit and keep', [words('qemu-img commit -p -t none -d -f qcow2 top.qcow2')]),
        ('map', [words('qemu-img map --output json top.qcow2')]),
        ('amend', [words('qemu-img amend -o compat=0.10 disk.qcow2')]),
        ('resize', [words('qemu-img resize -f qcow2 disk.qcow2 16777216')]),
        ('rebase', [words('qemu-img rebase -t none -T none -u -f qcow2 -F qcow2 -b mid.qcow2 top.qcow2'),
                    words('qemu-img rebase -t none -T none -f qcow2 -F qcow2 -b base.qcow2 top.qcow2')]),
        ('compare', [words('qemu-img compare -p -f qcow2 -F qcow2 -s disk.qcow2 disk.qcow2'),
                     words('qemu-img compare -p -f qcow2 -F raw disk.qcow2 disk.raw')]),
        ('bitmaps', [words('qemu-img bitmap --add --enable disk.qcow2 new -g 131072'),
                     words('qemu-img bitmap --add --disable disk.qcow2 old'),
                     words('qemu-img bitmap --merge one -F qcow2 -b marked.qcow2 disk.qcow2 old'),
                     words('qemu-img bitmap --remove disk.qcow2 new'), words('qemu-img info --output json disk.qcow2')]),
    ],
    'CloudStack': [
        ('look', [words('qemu-img info -U top.qcow2')]),
        ('copy over an empty volume',
         [words('qemu-img convert -n --target-is-zero -W -S 1M -O qcow2 -U --image-opts driver=qcow2,file.filename=disk.qcow2 target.qcow2')]),
        ('copy a snapshot',
         [words('qemu-img convert -O qcow2 -l snapshot.name=before -t none -U --image-opts driver=qcow2,file.filename=disk.qcow2 new.qcow2')]),
        ('snapshots', [words('qemu-img snapshot -c save --image-opts driver=qcow2,file.filename=disk.qcow2'),
                       words('qemu-img snapshot -d save --image-opts driver=qcow2,file.filename=disk.qcow2')]),
        ('another parent', [words('qemu-img rebase -u -F qcow2 -b mid.qcow2 top.qcow2'), words('qemu-img rebase -F qcow2 -b base.qcow2 top.qcow2')]),
        ('resize', [words('qemu-img resize disk.qcow2 +1048576'),
                    words('qemu-img resize --image-opts driver=qcow2,file.filename=disk.qcow2 16777216')]),
    ],
}


def normal(text):
    """What two runs cannot share: how often progress was shown, where clusters went, what a file takes, when it was."""
    text = re.sub(r'( {4}\([\d.]+/100%\)[\r\n])+', 'PROGRESS', text)
    text = re.sub(r'\[\s+\]', '[]', text)
    text = re.sub(r'( 00:00:00.000 ) *0?$', r'\1', text, flags=re.M)  # newer versions record no ICOUNT
    text = re.sub(r'"icount": 0,\s*', '', text)
    text = re.sub(r'"actual-size": \d+', '"actual-size": N', text)
    text = re.sub(r'"(image-end-offset|allocated-clusters|offset|date-sec|date-nsec|cid|parent-cid)": \d+', r'"\1": N', text)
    text = re.sub(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d', 'TIME', text)
    return re.sub(r'disk size: .*', 'disk size', text)


def described(where, name):
    """What a file is and says of itself, but for its content."""
    info = json.loads(run('qemu-img', 'info', '--output=json', name, cwd=where).stdout)
    for key in ('actual-size', 'dirty-flag'):
        info.pop(key, None)
    for snapshot in info.get('snapshots', []):
        snapshot.pop('date-sec'), snapshot.pop('date-nsec')
    return json.loads(re.sub(r'"(cid|parent-cid)": \d+', r'"\1": 0', json.dumps(info)))


def same_images(ours, real):
    """Each file that one directory has, the other has, of the same kind and with the same disk in it."""
    assert sorted(os.listdir(ours)) == sorted(os.listdir(real))
    for name in sorted(os.listdir(ours)):
        a, b = ours / name, real / name
        if filecmp.cmp(a, b, shallow=False):
            continue
        try:
            theirs = described(real, name)
        except AssertionError:  # a chain that leads nowhere: the real one made that
            assert run('qemu-img', 'info', name, cwd=ours, ok=False).returncode == 1
            continue
        assert described(ours, name) == theirs
        fmt = theirs['format']
        if os.path.exists(real / theirs.get('backing-filename', name)):
            if fmt == 'qcow2':
                run('qemu-img', 'check', '-q', '-f', fmt, name, cwd=ours)
            run('qemu-img', 'compare', '-f', fmt, '-F', fmt, a, b)


@pytest.fixture(name='both', scope='module')
def fixture_both(tmp_path_factory):
    """Two equal directories, filled once; each test copies them."""
    if not shutil.which('qemu-img'):
        pytest.skip('qemu-img is not installed')
    top = tmp_path_factory.mktemp('lines')
    (top / 'template').mkdir()
    fill(top / 'template')
    (top / 'bin').mkdir()
    for name in NAMES:
        (top / 'bin' / name).symlink_to(os.path.abspath(DROVER))
    return top


# What only Proxmox VE's qemu-img knows, and what means the same to QEMU's.
QEMU_S = {
    'dd -n -f raw -O qcow2 bs=1048576 osize=5242880 if=disk.raw of=target.qcow2': 'convert -n -f raw -O qcow2 disk.raw target.qcow2',
    'dd -n -f qcow2 -l before -O raw bs=1048576 osize=8388608 if=disk.qcow2 of=target.raw':
        'convert -n -f qcow2 -l before -O raw disk.qcow2 target.raw',
}


PARENTS = {'top.qcow2': ['mid.qcow2', 'base.qcow2'], 'mid.qcow2': ['base.qcow2']}


def copy(template, lines, where):
    """Of the template what the lines name, with the parents of that."""
    where.mkdir()
    text = ' '.join(word for argv in lines for word in argv)
    for name in {name for file in os.listdir(template) if file in text for name in [file, *PARENTS.get(file, [])]}:
        shutil.copy(template / name, where / name)


def qemu_s(argv):
    other = QEMU_S.get(' '.join(argv[1:]))
    return argv[:1] + other.split() if other else [word.replace('zeroinit:', '') for word in argv]


def play(lines, where, path, real):
    """What each line printed, and how it ended."""
    told = []
    for argv in lines:
        done = run(*(qemu_s(argv) if real else argv), cwd=where, ok=False, env={**os.environ, 'PATH': path}, stdin=subprocess.DEVNULL, timeout=60)
        told.append((argv, done.returncode, normal(done.stdout), done.stderr))
    return told


def rows():
    """The table of these lines in the manual."""
    text = ''
    for project, entries in PROJECTS.items():
        for what, lines in entries:
            shown = '`, `'.join(' '.join(word or "''" for word in argv[argv.index(start(argv)):]).replace('|', '\\|') for argv in lines)
            text += f'| {project} | {what} | `{shown}` |\n'
    return text


def start(argv):
    """The program, behind what sets its limits and its environment."""
    return next(word for word in argv if word.split()[:1] and word.split()[0] in NAMES + ('sh',))


def test_the_manual_has_every_line():
    manual = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../docs/clients.md')
    with open(manual, encoding='utf-8') as f:
        assert rows() in f.read()


CASES = [pytest.param(entry[1], id=f'{project}-{entry[0]}') for project, entries in PROJECTS.items() for entry in entries]


@pytest.mark.parametrize('lines', CASES)
def test_a_line_ends_prints_and_leaves_what_it_does_with_qemu(both, tmp_path, lines):
    told = {}
    for who in ('ours', 'real'):
        copy(both / 'template', lines, tmp_path / who)
        path = os.environ['PATH'] if who == 'real' else f'{both}/bin:' + os.environ['PATH']
        told[who] = play(lines, tmp_path / who, path, who == 'real')
    for ours, real in zip(told['ours'], told['real']):
        assert ours == real
    assert all(code == 0 or 'compare' in argv for argv, code, _, _ in told['real'])
    same_images(tmp_path / 'ours', tmp_path / 'real')
    shutil.rmtree(tmp_path)

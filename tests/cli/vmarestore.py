# SPDX-License-Identifier: LGPL-2.1-or-later
"""One who restores an archive as Proxmox does: reads the program's lines from a pipe, makes volumes when CTIME comes, and
tells through a fifo where each disk goes. The program is called as "vma", in the directory of the restore."""
import os
import re
import shlex
import signal
import subprocess
import threading

DEV = re.compile(r'^DEV:\sdev_id=(\d+)\ssize:\s(\d+)\sdevname:\s(\S+)$')
MAP = re.compile(r'^#qmdump#map:(\S+):(\S+):(\S*):(\S*):$')


class Restore:
    """volume: makes the target of a disk and gives its map line, or None. Runs in cwd; before: the shell pipeline in
    front of the program."""

    def __init__(self, cwd, volume, source='backup.vma', before='', more=b'done\n'):
        self.dir, self.volume, self.more = str(cwd), volume, more
        self.fifo, self.tmp = os.path.join(self.dir, 'map.fifo'), os.path.join(self.dir, 'vzdumptmp1')
        self.devices, self.configs_there, self.lines = [], None, []
        self.problem = None
        os.mkfifo(self.fifo)
        command = f'{before} ./vma extract -v -r {shlex.quote(self.fifo)} {source} {shlex.quote(self.tmp)}'
        self.process = subprocess.Popen(['bash', '-c', 'set -o pipefail; ' + command], cwd=self.dir, stdin=subprocess.DEVNULL,
                                        env={**os.environ, 'LC_ALL': 'C', 'TZ': 'UTC'}, stdout=subprocess.PIPE,
                                        stderr=open(os.path.join(self.dir, 'errors'), 'wb'), start_new_session=True)

    def answer(self):
        self.configs_there = sorted(os.listdir(self.tmp))
        with open(os.path.join(self.tmp, 'qemu-server.conf'), encoding='ascii') as f:
            conf = f.read()
        wanted = [MAP.match(line).group(2) for line in conf.splitlines() if line.startswith('#qmdump#map:')]
        assert sorted(name for _, _, name in self.devices) == sorted(wanted)
        lines = [self.volume(self, name, size) for _, size, name in self.devices]
        with open(self.fifo, 'wb') as f:
            f.write(b''.join(line.encode() + b'\n' for line in lines if line) + self.more)

    def watch(self, timeout=60):
        """-> exit code"""
        killer = threading.Timer(timeout, lambda: os.killpg(self.process.pid, signal.SIGKILL))
        killer.start()
        try:
            for line in self.process.stdout:
                text = line.decode().rstrip('\n')
                self.lines.append(text)
                match = DEV.match(text)
                if match:
                    self.devices.append((int(match.group(1)), int(match.group(2)), match.group(3)))
                if text.startswith('CTIME: '):
                    self.answer()
            return self.process.wait()
        finally:
            killer.cancel()
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process.stdout.close()

    @property
    def errors(self):
        with open(os.path.join(self.dir, 'errors'), encoding='utf-8', errors='replace') as f:
            return f.read()


def raw_volume(restore, name, size, options='', zero=0, fill=b'\0', extra=0):
    path = os.path.join(restore.dir, 'vm-100-' + name + '.raw')
    length = -(-size // 1024) * 1024 + extra
    with open(path, 'wb') as f:
        f.write(fill * length) if fill != b'\0' else f.truncate(length)
    return f'{options}format=raw:{zero}:{name}={path}'

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory that a program takes."""
import os
import subprocess

# A child that this process starts counts this process's memory as its own, from before it became the program. So a small
# one stands in between.
BETWEEN = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def peak(*argv, **env):
    """Run it; its output, and the most memory that it had, in bytes."""
    done = subprocess.run(["/usr/bin/python3", "-SE", "-c", BETWEEN, *argv], env=os.environ | env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text, _, most = done.stdout.rstrip().rpartition("\n")
    return text, int(most)

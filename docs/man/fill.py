#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""fill.py DROVER TEMPLATE OUTPUT: puts what `drover COMMAND --help` says in place of the line @COMMANDS@."""
import subprocess
import sys


def help_of(program, *words):
    return subprocess.run([program, *words, "--help"], check=True, capture_output=True, text=True).stdout


def commands(program):
    section = help_of(program).split("Commands:\n", 1)[1].split("\n\n", 1)[0]
    return [line.split()[0] for line in section.splitlines()]


def pod(program, command):
    """The usage line and the description as they are, options as verbatim text."""
    lines = help_of(program, command).rstrip().splitlines()
    usage = lines[0].removeprefix("usage: ")
    body = "\n".join("  " + line if line else "" for line in lines[1:])
    return f"=head2 {usage.replace('<', 'E<lt>')}\n\n{body}\n"


def main():
    program, template, output = sys.argv[1:]
    text = open(template, encoding="utf-8").read()
    assert "\n@COMMANDS@\n" in text
    filled = "\n".join(pod(program, c) for c in commands(program))
    with open(output, "w", encoding="utf-8") as f:
        f.write(text.replace("@COMMANDS@\n", filled))


main()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables of options, the manual, the help and the completion say the same."""
import os
import re
import shutil
import subprocess

import pytest
from conftest import TOP


def tables(t):
    """command -> set of options as typed: {"-f", "--format", ...}; and which take an argument."""
    found = {}
    for line in t.ok("completion", "list").splitlines():
        command, letter, name, arg = line.split("\t")
        options = found.setdefault(command, {})
        if letter != "-":
            options["-" + letter] = arg
        if name != "-":
            options["--" + name] = arg
    return found


def manual():
    """command -> options named in =item lines of its section, and those of every command."""
    found, section = {}, None
    with open(os.path.join(TOP, "docs", "man", "drover.pod"), encoding="utf-8") as f:
        for line in f:
            head = re.match(r"=head[12] (?:drover )?(\w[\w -]*)", line)
            if head:
                section = head.group(1).strip()
            if line.startswith("=item") and section:
                for option in re.findall(r"B<(--?[\w-]+)>", line):
                    found.setdefault(section, set()).add(option)
    return found


def test_the_manual_knows_every_option_and_no_other(t):
    man = manual()
    common = man["COMMON OPTIONS"]
    for command, options in tables(t).items():
        told = man.get(command, set())
        missing = set(options) - told - common
        assert not missing, f"not in the manual, {command}: {sorted(missing)}"
        unknown = told - set(options)
        assert not unknown, f"only in the manual, {command}: {sorted(unknown)}"
    assert common <= set().union(*tables(t).values())
    assert set(man) - {"COMMON OPTIONS"} <= set(tables(t))


def test_every_command_has_a_section_of_the_manual(t):
    with open(os.path.join(TOP, "docs", "man", "drover.pod"), encoding="utf-8") as f:
        heads = set(re.findall(r"^=head2 (\w[\w ]*)$", f.read(), flags=re.M))
    assert set(tables(t)) <= heads


def test_the_manual_is_sound_pod(t):
    if not shutil.which("podchecker"):
        pytest.skip("podchecker is missing")
    r = subprocess.run(["podchecker", os.path.join(TOP, "docs", "man", "drover.pod")], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def commands():
    return ["create", "info", "map", "measure", "compare", "checksum", "convert", "dd", "rebase", "commit", "stream", "addcow", "snapshot", "serve", "io", "chain", "check",
            "recover", "resize", "amend", "compact", "bitmap", "backup", "restore", "mount", "unmount", "vma", "ova", "ctl", "bench", "completion"]


def children():
    return ["vma " + c for c in ("list", "config", "create", "extract", "verify", "index")] + ["backup list", "backup verify", "backup prune"] + ["ova create", "ova list"]


@pytest.mark.parametrize("command", commands() + children())
def test_help_is_one_screen_and_shows_every_option(t, command):
    words = command.split()
    for args in ([*words, "--help"], [*words, "-h"], ["help", *words]):
        out = t.ok(*args)
        lines = out.splitlines()
        assert lines[0].startswith(f"usage: drover {command} ") and len(lines) <= 47
        assert all(len(line) <= 100 for line in lines), max(lines, key=len)
        for option in tables(t)[command]:
            assert re.search(rf"(^|[ ,]){re.escape(option)}\b", out, flags=re.M), option


def test_the_overview_names_every_command(t):
    out = t.ok("--help")
    assert out == t.ok("help") == t.ok("-h")
    assert re.findall(r"^  (\w+) +\S", out, flags=re.M) == sorted(commands(), key=lambda c: out.index(f"\n  {c} "))
    assert set(commands() + children()) == set(tables(t))
    assert re.findall(r"^  (vma \w+) +\S", t.ok("vma", "--help"), flags=re.M) + \
        re.findall(r"^  (backup \w+) +\S", t.ok("backup", "--help"), flags=re.M) + \
        re.findall(r"^  (ova \w+) +\S", t.ok("ova", "--help"), flags=re.M) == children()


def test_version(t):
    assert re.match(r"^drover \d+\.\d+\.\d+\n$", t.ok("version"))
    assert t.ok("--version") == t.ok("-V") == t.ok("version")


def test_wrong_use_says_where_help_is(t):
    for args, hint in (([], "drover --help"), (["nope"], "drover --help"), (["map"], "drover map --help"),
                       (["map", "--nope"], "drover map --help"), (["help", "nope"], "drover --help"),
                       (["vma"], "drover vma --help"), (["vma", "nope"], "drover vma --help"),
                       (["vma", "list"], "drover vma list --help")):
        r = t.drover(*args)
        assert r.code == 1 and r.out == "" and r.err.endswith(f"Try '{hint}' for more information\n"), r


def test_the_nearest_command_is_suggested(t):
    for args, meant in ((["creat"], "create"), (["vma", "extrct"], "extract"), (["ova", "lst"], "list")):
        r = t.drover(*args)
        assert r.code == 1 and f"(did you mean '{meant}'?)" in r.err, r


def test_the_completion_completes(t):
    script = t.ok("completion", "bash")
    ask = script + '\nCOMP_WORDS=(drover {words}); COMP_CWORD={n}; _drover; printf "%s\\n" "${{COMPREPLY[@]}}"'
    def complete(words, n):
        text = ask.replace("{words}", words).replace("{n}", str(n)).replace("{{", "{").replace("}}", "}")
        r = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, cwd=t.dir)
        return r.stdout.split()
    assert complete("com", 1) == ["compare", "commit", "compact", "completion"]
    assert complete("rebase --dr", 2) == ["--drop-equal", "--dry-run"]
    assert complete("vma ver", 2) == ["verify"] and complete("vma extract --sa", 3) == ["--salvage"]
    (t.dir / "disk.vmdk").write_text("")
    assert complete("map di", 2) == ["disk.vmdk"]

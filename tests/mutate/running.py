# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds a mutant in a copy of the tree and runs the tests that can tell, the quickest first.

In the copy the library is a shared one, so a mutant costs one compilation and one link. One build
notes for every test which basic blocks it runs (cover.c); a test that never comes near the changed
line is not run for it. These notes are kept in the copy and are good until the library or the test
changes.
"""
import bisect
import hashlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PYTHON = "/usr/bin/python3"
MAP_SIZE = 16 << 20  # as cover.c has it
COVER_SECONDS = 60
PYTESTS = ("cli", "crash", "interop")
FAILED = b"[  FAILED  ]"  # cmocka goes on with the other tests of a program; we need not
SANITIZERS = {"plain": [],
              "asan": ["-Db_sanitize=address,undefined", "-Db_lundef=false"],
              "tsan": ["-Db_sanitize=thread", "-Db_lundef=false"]}
ONE_LIBRARY = [("src/meson.build", "static_library('drover-internal', lib_sources,",
                "shared_library('drover-internal', lib_sources, "
                "c_args: meson.project_build_root().endswith('build-cover') ? '-fsanitize-coverage=trace-pc' : [],"),
               ("src/meson.build", "link_whole: drover_static", "link_with: drover_static"),
               ("src/meson.build", ", pic: true)", ")"),
               ("meson.build", "'-fvisibility=hidden',", "")]


RUNNING = set()  # the processes of run(), each the leader of a session


def stop_all():
    for pid in list(RUNNING):
        os.killpg(pid, signal.SIGKILL)


def usage(session):
    """The seconds of processor time that the processes of a session have had, and whether one wants more."""
    ticks, wants = 0, False
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
                fields = stat.read().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            ticks += sum(int(field) for field in fields[11:15])
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/stat", encoding="utf-8", errors="replace") as stat:
                    wants = wants or stat.read().rpartition(")")[2].split()[0] in "RD"
        except (FileNotFoundError, ProcessLookupError):
            pass
    return ticks / os.sysconf("SC_CLK_TCK"), wants


def hangs(session, limit):
    """Whether a command that ran out of time has had that time. On a busy machine it may only have waited."""
    for _ in range(10):
        used, wants = usage(session)
        if used >= limit:
            return True
        if wants:
            return False
        time.sleep(0.1)
    return True


def run(command, limit, cwd, env=None, memory=None):
    """The exit status, 1 as soon as a test of it fails, None when it takes too long. Leaves no process."""
    child = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True)
    RUNNING.add(child.pid)
    if memory:
        resource.prlimit(child.pid, resource.RLIMIT_AS, (memory, memory))
    end, tail, out = time.monotonic() + limit, b"", child.stdout.fileno()
    try:
        while time.monotonic() < end or not hangs(child.pid, limit):
            if select.select([out], [], [], 0.1)[0]:
                chunk = os.read(out, 65536)
                if not chunk:
                    return child.wait(max(20, end - time.monotonic()))
                if FAILED in tail + chunk:
                    return 1
                tail = chunk[-len(FAILED):]
            elif child.poll() is not None:
                return child.returncode
        return None
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        RUNNING.discard(child.pid)
        child.wait()
        child.stdout.close()


def file_hash(*paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as content:
            digest.update(content.read())
    return digest.hexdigest()


class Blocks:
    """The basic blocks of the library of the covering build, by the address behind their first call."""

    def __init__(self, library, top):
        listed = subprocess.run(["objdump", "-d", "-l", "--no-show-raw-insn", library], capture_output=True,
                                text=True, check=True).stdout
        self.addresses, self.of_line = [], {}
        where, called, open_block = None, False, None
        for line in listed.splitlines():
            found = re.match(r"(/.*\.[ch]):(\d+)", line)
            if found:
                where = os.path.relpath(os.path.normpath(found[1]), top), int(found[2])
            elif line.endswith(">:"):
                open_block, called = None, False
            elif line.startswith(" ") and ":" in line:
                if called:
                    open_block = len(self.addresses)
                    self.addresses.append(int(line.partition(":")[0], 16))
                    self.note(called, open_block)
                if open_block is not None and where:
                    self.note(where, open_block)
                called = where if "__sanitizer_cov_trace_pc" in line else False

    def note(self, where, block):
        self.of_line[where] = self.of_line.get(where, 0) | 1 << block

    def seen(self, path):
        """The blocks that are set in a map, as the bits of a number."""
        try:
            with open(path, "rb") as content:
                bytes_set = content.read()
        except FileNotFoundError:
            return 0
        mask = 0
        for number, address in enumerate(self.addresses):
            mask |= bytes_set[address] << number
        return mask

    def near(self, path, first, last):
        """The blocks of these lines; when they have none, those of the line before that has some."""
        mask = 0
        for line in range(first, last + 1):
            mask |= self.of_line.get((path, line), 0)
        while not mask and first > 0:
            first -= 1
            mask = self.of_line.get((path, first), 0)
        return mask


class Tree:
    """A copy of the sources with builds of its own. It stays, so that a second session starts soon."""

    def __init__(self, where, suites, limit, first=None):
        """What the first tree has learnt of the tests holds for the others, too."""
        self.top, self.suites, self.limit = where, suites, limit
        self.tmp, self.objects, self.good = os.path.join(where, "t"), {}, set()
        self.commands = {}  # of each build, the programs by their names
        self.copy_sources()
        self.build("plain", SANITIZERS["plain"])
        self.objects = self.object_hashes("plain")
        self.tests, self.blocks = (first.tests, first.blocks) if first else self.covered_tests()

    def copy_sources(self):
        """Only what differs is copied, and gets the time of now: a mutant may have been built here last."""
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP, capture_output=True,
                                text=True, check=True).stdout.splitlines()
        changes = {}
        for path, old, new in ONE_LIBRARY:
            changes.setdefault(path, []).append((old.encode(), new.encode()))
        for path in listed:
            source, copy = os.path.join(TOP, path), os.path.join(self.top, path)
            if not os.path.isfile(source):
                continue
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            with open(source, "rb") as content:
                text = content.read()
            for old, new in changes.get(path, []):
                if old not in text:
                    sys.exit(f"mutate: {path} has no {old.decode()!r} any more: mend ONE_LIBRARY")
                text = text.replace(old, new)
            if os.path.isfile(copy):
                with open(copy, "rb") as content:
                    if content.read() == text:
                        continue
            with open(copy, "wb") as content:
                content.write(text)
            shutil.copymode(source, copy)

    def build_dir(self, build):
        return os.path.join(self.top, "build-" + build)

    def build(self, build, options):
        directory, env = self.build_dir(build), dict(os.environ, CC="gcc")
        commands = [["ninja", "-C", directory]]
        if not os.path.exists(os.path.join(directory, "build.ninja")):
            commands.insert(0, ["meson", "setup", directory, "-Dwerror=false", "-Db_asneeded=false"] + options)
        for command in commands:
            done = subprocess.run(command, cwd=self.top, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"mutate: {' '.join(command)} failed:\n{done.stdout[-3000:]}")

    def ninja(self, build):
        return run(["ninja", "-C", self.build_dir(build)], 600, self.top) == 0

    # ------------------------------------------------------------ which tests run what

    def covered_tests(self):
        """All tests that can be run, with their time and the blocks they run; and the blocks there are."""
        runtime = os.path.join(self.top, "cover.so")
        subprocess.run(["gcc", "-O2", "-fPIC", "-shared", "-o", runtime, "tests/mutate/cover.c"], cwd=self.top, check=True)
        self.build("cover", ["-Doptimization=1", "-Db_lundef=false",
                             "-Dc_link_args=" + runtime])
        library = os.path.join(self.build_dir("cover"), "src/libdrover-internal.so")
        bare = os.path.join(self.top, "bare.so")
        subprocess.run(["strip", "-g", "-o", bare, library], check=True)
        blocks = Blocks(library, self.top)
        notes = os.path.join(self.top, "cover.json")
        try:
            with open(notes, encoding="utf-8") as kept:
                known = json.load(kept)
        except FileNotFoundError:
            known = {}
        new, tests, library_hash = {}, [], file_hash(bare)
        for name, key, measure in self.measures(library_hash, blocks):
            if key not in known:
                print(f"mutate: looking at what {name} runs", flush=True)
            new[key] = known.get(key) or measure()
            tests += [dict(test, covers=int(test["covers"], 16)) for test in new[key]]
            with open(notes, "w", encoding="utf-8") as keep:
                json.dump({**known, **new}, keep)
        # What was not asked for now is kept, too, as long as the library is the same.
        kept = {key: tests_of for key, tests_of in known.items() if key.endswith(library_hash)}
        with open(notes, "w", encoding="utf-8") as keep:
            json.dump({**kept, **new}, keep)
        return tests, blocks

    def measures(self, library, blocks):
        """(name, what the measurement depends on, function that measures) of every program and suite."""
        for program in self.programs("cover"):
            key = file_hash(program["command"][0]) + library
            yield program["name"], program["name"] + key, lambda p=program: self.cover_program(p, blocks)
        for suite in PYTESTS:
            if suite in self.suites:
                directory = os.path.join(self.top, "tests", suite)
                files = sorted(os.path.join(directory, f) for f in os.listdir(directory) if not f.startswith("__"))
                key = file_hash(os.path.join(self.build_dir("cover"), "drover"), *files) + library
                yield suite, suite + key, lambda s=suite: self.cover_pytest(s, blocks)

    def programs(self, build):
        listed = json.loads(subprocess.run(["meson", "introspect", "--tests", self.build_dir(build)],
                                           capture_output=True, text=True, check=True).stdout)
        for test in listed:
            suites = {suite.partition(":")[2] for suite in test["suite"]}
            if "pytest" not in suites and suites & self.suites & {"unit", "model", "fuzz"}:
                yield {"name": test["name"], "command": test["cmd"], "env": test["env"]}

    def cover_program(self, program, blocks):
        seen = os.path.join(self.top, "seen.map")
        with open(seen, "wb") as empty:
            empty.truncate(MAP_SIZE)
        begin = time.monotonic()
        status = self.run_here(program["command"], COVER_SECONDS, "cover", dict(program["env"], DROVER_COVER=seen))
        if status not in (0, 77, None):  # what repeats its work for longer has shown by now what it runs
            print(f"mutate: {program['name']} fails without any change: left out")
            return []
        return [{"name": program["name"], "suite": "", "seconds": time.monotonic() - begin,
                 "covers": hex(blocks.seen(seen))}]

    def cover_pytest(self, suite, blocks):
        items = os.path.join(self.top, "items")
        shutil.rmtree(items, ignore_errors=True)
        os.makedirs(items)
        self.run_here([PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "items",
                       os.path.join("tests", suite)], 3600, "cover",
                      {"DROVER_COVER_ITEMS": items, "PYTHONPATH": os.path.join(self.top, "tests/mutate")})
        tests = []
        for note in sorted(os.listdir(items)):
            if not note.endswith(".json"):
                continue
            with open(os.path.join(items, note), encoding="utf-8") as content:
                item = json.load(content)
            if item["failed"]:
                print(f"mutate: {item['id']} fails without any change: left out")
                continue
            covers = blocks.seen(os.path.join(items, note[:-5] + ".map"))
            if covers:
                tests.append({"name": item["id"], "suite": suite, "seconds": item["seconds"], "covers": hex(covers)})
        shutil.rmtree(items, ignore_errors=True)
        return tests

    # ------------------------------------------------------------ running

    def run_here(self, command, limit, build, env):
        """In a temporary directory of its own; a mutant must not eat the machine's memory."""
        shutil.rmtree(self.tmp, ignore_errors=True)
        os.makedirs(self.tmp, exist_ok=True)
        plain = self.build_dir("cover" if build == "cover" else "plain")
        env = dict(os.environ, TMPDIR=self.tmp, DROVER=os.path.join(plain, "drover"), PYTHONDONTWRITEBYTECODE="1",
                   DROVER_PRELOAD=os.path.join(plain, "tests/crash/libdrover-preload.so"), **env)
        return run(command, limit, self.top, env, None if build in ("asan", "tsan") else 8 << 30)

    def object_hashes(self, build):
        """What the compiler made of each source, without the notes for debuggers."""
        hashes = {}
        with open(os.path.join(self.build_dir(build), "compile_commands.json"), encoding="utf-8") as commands:
            for entry in json.load(commands):
                path = os.path.relpath(os.path.join(entry["directory"], entry["file"]), self.top)
                if path.startswith("src/"):
                    hashes[path] = self.object_hash(os.path.join(entry["directory"], entry["output"]))
        return hashes

    def object_hash(self, path):
        bare = os.path.join(self.top, "bare.o")
        subprocess.run(["strip", "-g", "-o", bare, path], check=True)
        return path, file_hash(bare)

    def judge(self, mutant):
        """Sets the mutant's verdict: broken, same, killed or survived."""
        path = os.path.join(self.top, mutant.path)
        with open(path, encoding="utf-8") as source:
            before = source.read()
        try:
            self.write(path, mutant.text)
            if not self.ninja("plain"):
                mutant.verdict = "broken"
                return
            output, was = self.objects[mutant.path]
            if self.object_hash(output)[1] == was:
                mutant.verdict = "same"
                return
            tests = self.tests_of(mutant)
            mutant.tests = len(tests)
            for build in [b for b in ("plain", "asan", "tsan") if b == "plain" or b in self.suites]:
                mutant.by = self.first_failure(build, tests, mutant, before)
                if mutant.by:
                    mutant.verdict = "killed"
                    return
            mutant.verdict = "survived"
        finally:
            self.write(path, before)

    def tests_of(self, mutant):
        """Those that run the changed lines, or else the nearest ones before. The compiler may give a
        condition's code to the line above, and to its own only a block that never runs."""
        for first in range(mutant.line, max(mutant.line - 20, 0), -1):
            near = self.blocks.near(mutant.path, first, mutant.last)
            tests = [test for test in self.tests if test["covers"] & near]
            if tests:
                return tests
        return []

    @staticmethod
    def write(path, text):
        with open(path, "w", encoding="utf-8") as source:
            source.write(text)

    def first_failure(self, build, tests, mutant, before):
        """Quick tests first, and among them those that are named like the file."""
        if build != "plain":
            tests = [test for test in tests if not test["suite"] and
                     (build != "tsan" or not re.search("-(faults|power)$", test["name"]))]
            self.build(build, SANITIZERS[build])
        if build not in self.commands:
            self.commands[build] = {program["name"]: program for program in self.programs(build)}
        commands = self.commands[build]
        words, spent = set(re.split(r"[/.-]", mutant.path)), 0

        def order(test):
            step = bisect.bisect([0.3, 1, 4, 15], test["seconds"])
            if not test["suite"] and step < 4:
                step = -1  # all these together take less time than a Python suite
            return step, test["suite"], -len(words & set(test["name"].split("-"))), test["seconds"]
        waiting = sorted(tests, key=order)
        while waiting and spent + waiting[0]["seconds"] <= self.limit:
            if waiting[0]["suite"]:
                first = order(waiting[0])[:2]
                batch = [test for test in waiting if order(test)[:2] == first][:60]
                command = [PYTHON, "-m", "pytest", "-qx", "-p", "no:cacheprovider"] + [test["name"] for test in batch]
                env, name = {}, f"{batch[0]['suite']}"
            else:
                batch = waiting[:1]
                command, env, name = commands[batch[0]["name"]]["command"], commands[batch[0]["name"]]["env"], batch[0]["name"]
            seconds = sum(test["seconds"] for test in batch)
            begin = time.monotonic()
            # What takes seconds may take ten times as long on a busy machine; minutes seldom do.
            status = self.run_here(command, max(20, min(10 * seconds, 60 + 3 * seconds)) * (1 if build == "plain" else 5),
                                   build, env)
            spent += time.monotonic() - begin
            if status not in (0, 77) and (build == "plain" or self.passes_unchanged(build, name, command, env, mutant, before)):
                return f"{name} ({build}{', time' if status is None else ''})"
            waiting = waiting[len(batch):]
        mutant.cut = bool(waiting)
        return ""

    def passes_unchanged(self, build, name, command, env, mutant, before):
        """Whether a test passes under a sanitizer without the change; asked when it failed for the first time."""
        if (build, name) not in self.good:
            path = os.path.join(self.top, mutant.path)
            self.write(path, before)
            self.ninja(build)
            if self.run_here(command, 1800, build, env) not in (0, 77):
                print(f"mutate: {name} ({build}) fails without any change", flush=True)
            else:
                self.good.add((build, name))
            self.write(path, mutant.text)
            self.ninja(build)
        return (build, name) in self.good

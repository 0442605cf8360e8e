"""Cut runs off at every file event, on a full disk, by signals and kills at random: all must go on, bit for bit.

    python tests/benchmarks/torture.py              # writes docs/interruption.md; about a quarter of an hour
    python tests/benchmarks/torture.py --short      # one save of each stage, to standard output

A run is a fork of this process, which has loaded PyTorch once, on the tests' tiny data with one thread. What a SIGKILL
leaves is the folder as it is at that moment. So one run of each stage is watched: before each of its file events (a file
opened for writing, fsync, rename, link, mkdir, unlink, ..) its folder is copied, once more with what grew since the last
event cut in half; each copy that differs from all before is a case, which another fork goes on with. Its weights,
optimizer and list of files must be those of the run that was watched, which nothing had cut off.
"""
import argparse
import collections
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
sys.argv[0] = str(Path(__file__).resolve())

import torch
from safetensors.torch import load_file

import pages
import stages
from stages import MODULES, STAGES, Project

NEEDS = {"base": (), "meta": ("base",), "lora": ("meta",), "lora-all": ("meta",), "pretrain": ("meta",),
         "finetune": ("meta", "lora", "pretrain")}
NAMES = ("open", "fsync", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.remove", "os.chmod",
         "os.truncate")         # events: those of sys.audit, and fsync, which has none there


# ---------------------------------------------------------------------------------------------------------------- forks

class Ended:
    """How a fork ended: its exit code, below 0 for a signal, and what it printed."""

    def __init__(self, pid: int, output):
        self.pid, self.output, self.code = pid, output, None

    def wait(self) -> "Ended":
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self

    @property
    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    @property
    def lines(self) -> list[str]:
        """What it said, without the progress bars."""
        lines = []
        for line in self.said.replace("\r", "\n").splitlines():
            if "error: " in line:
                lines.append(line[line.index("error: "):])
            elif line.strip() and "it/s" not in line and "s/it" not in line and "|" not in line:
                lines.append(line)
        return lines


def start(function, *args, rank: int | None = None, world: int = 1, port: int = 0) -> Ended:
    """Have a fork of this process run function(*args), as this rank of so many where there are several."""
    output = tempfile.TemporaryFile("w+", errors="replace")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Ended(pid, output)
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        if rank is not None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        function(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(project: Project, stage: str, *flags, before=None) -> None:
    """In a fork: run a stage; before: what is called first."""
    if before is not None:
        before()
    os.chdir(ROOT)
    MODULES[stage].main(project.argv(stage, *flags))


def start_ranks(project: Project, stage: str, flags, world: int, before=None) -> list[Ended]:
    """A run's processes, one fork for each."""
    if world == 1:
        return [start(train, project, stage, *flags)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank):
        train(project, stage, *flags, before=before and (lambda: before(rank)))
    return [start(run, rank, rank=rank, world=world, port=port) for rank in range(world)]


# ------------------------------------------------------------------------------------------------ a run that is watched

def files_of(folder: Path) -> dict[str, str]:
    """Path below this folder -> a digest of what is there, or where a link points."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "link " + os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


class Watcher:
    """Copies a folder before each file event in it; `cases` are those copies that differ from all before."""

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies = folder, copies
        self.events, self.seen, self.busy = collections.Counter(), set(), False
        self.sizes = {}                                         # inode -> size at the event before
        copies.mkdir()

    def listen(self) -> None:
        sys.addaudithook(self)
        fsync = os.fsync

        def watched(descriptor):
            self("fsync", [os.readlink(f"/proc/self/fd/{descriptor}")])
            fsync(descriptor)
        os.fsync = watched

    def __call__(self, name, args) -> None:
        if self.busy or name not in NAMES or not isinstance(args[0], (str, os.PathLike)):
            return
        if name == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        paths = [os.path.abspath(path) for path in args[:2] if isinstance(path, (str, os.PathLike))]
        if any(path.startswith(str(self.folder)) for path in paths):
            self.busy = True
            self.events[name] += 1
            self.keep()
            self.busy = False

    def keep(self) -> None:
        """The folder as it is, and once with each file that was written since the last event cut in half."""
        if not self.folder.is_dir():
            return
        sizes = {}                                      # inode -> the file's size
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                inode, size = path.stat().st_ino, path.stat().st_size
                sizes[inode] = size
                if size > (old := self.sizes.get(inode, 0)):
                    self.copy(cut=(path.relative_to(self.folder), old + (size - old) // 2))
        self.sizes = sizes
        self.copy()

    def copy(self, cut=None) -> None:
        target = self.copies / f"{len(self.seen):04d}"
        shutil.copytree(self.folder, target, symlinks=True)
        if cut:
            os.truncate(target / cut[0], cut[1])
        digest = repr(files_of(target))
        if digest in self.seen:
            shutil.rmtree(target)
        self.seen.add(digest)


# ----------------------------------------------------------------------------------------------- what was it and is now

def flat(value, name="") -> dict:
    """The tensors and numbers of nested dictionaries and lists, {path: value}."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {name: value}
    found = {}
    for key, part in value:
        found |= flat(part, f"{name}/{key}")
    return found


def difference(one: Path, other: Path) -> str:
    """How a finished stage's folder differs from another one's, in a few words; nothing where it does not."""
    names, listed = [], []
    for folder in (one, other):
        its = [name for name in files_of(folder) if name != ".lock"]
        names.append({name for name in its if not name.startswith("step-")})
        # Where a stop made a checkpoint, another one is kept beside the last: as many, with the same files.
        listed.append(sorted(re.sub(r"^step-\d+", "step-N", name) for name in its))
    if listed[0] != listed[1]:
        return f"other files: {sorted(set(listed[0]) ^ set(listed[1]))[:4] or 'more of them'}"
    for name in sorted(names[0]):
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(other / name)
        elif name.endswith(".pt"):
            a, b = (flat(torch.load(folder / name, weights_only=True)) for folder in (one, other))
        elif name == "log.jsonl":
            a, b = ([line.split(",")[0] for line in (folder / name).read_text().splitlines()] for folder in (one, other))
            if "lora" not in one.parts[-1] and a != b:
                return f"log.jsonl has the steps {a}, not {b}"
            continue
        else:
            continue
        if a.keys() != b.keys():
            return f"{name} has other names"
        for key in a:
            if key.endswith("/lr"):                             # each step sets it
                continue
            if not (torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]):
                return f"{name}: other {key}"
    return ""


class Table:
    """What became of cases: how many there were, and went on bit for bit, were refused, or lost something."""

    def __init__(self, column: str):
        self.column, self.rows, self.problems = column, {}, []

    def add(self, row: str, ended: Ended, problem: str) -> None:
        its = self.rows.setdefault(row, collections.Counter())
        its["cases"] += 1
        if ended.code == 2:
            its["refused"] += 1
        elif ended.code != 0 or problem:
            its["lost"] += 1
        else:
            its["bit for bit"] += 1
            return
        self.problems.append(f"{row}: exit code {ended.code}; {problem}; {' / '.join(ended.lines[-3:])[-600:]}")
        print("  ", self.problems[-1], flush=True)

    def text(self, **columns: dict) -> str:
        """columns: more of them, {title: {row: text}}."""
        rows = []
        for name, its in self.rows.items():
            more = {title: str(texts[name]) for title, texts in columns.items()}
            rows.append({self.column: name} | more | {"cases": str(its["cases"])} |
                        {title: str(its[title]) for title in ("bit for bit", "refused", "lost")})
        return pages.table(rows)


class Torture:
    """Everything in one folder; `straight` holds the runs that nothing cut off."""

    def __init__(self, folder: Path, steps: int, every: int):
        self.folder = folder
        stages.write_suite(folder / "data")
        stages.write_config(folder / "config.yaml", folder / "data", folder / "straight")
        self.straight = self.project("straight")
        self.flags = ("--steps", steps, "--save-every", every)

    def project(self, name) -> Project:
        return Project(self.folder / "data", self.folder / "config.yaml", self.folder / name)

    def case(self, name: str, stage: str, copy: Path | None = None) -> Project:
        """New runs with what a stage needs, and this copy of its folder."""
        project = self.project(name)
        shutil.rmtree(project.runs, ignore_errors=True)
        for needed in NEEDS[stage]:
            shutil.copytree(self.straight.runs / needed, project.runs / needed, copy_function=os.link)
        project.runs.mkdir(exist_ok=True)
        if copy is not None:
            shutil.copytree(copy, project.runs / stage, symlinks=True)
        return project

    def have_straight(self) -> None:
        """Those runs that nothing cut off which are not there yet."""
        for stage in STAGES:
            if not (self.straight.runs / stage).is_dir():
                ended = start(train, self.straight, stage, *self.flags_of(stage)).wait()
                assert ended.code == 0, ended.said

    def flags_of(self, stage: str) -> tuple:
        return (*self.flags, "--teachers-at-once", 2) if stage == "lora" else self.flags

    def watched(self, stage: str) -> Watcher:
        """Run the stage that the others are compared with; the copies of its folder on the way."""
        watcher = Watcher(self.straight.runs / stage, self.folder / f"copies-{stage}")

        def run():
            train(self.straight, stage, *self.flags_of(stage), before=watcher.listen)
            watcher.busy = False
            watcher.keep()
            (self.folder / f"events-{stage}").write_text(repr(dict(watcher.events)))
        ended = start(run).wait()
        assert ended.code == 0, ended.said
        watcher.events = collections.Counter(eval((self.folder / f"events-{stage}").read_text()))
        return watcher

    def goes_on(self, table: Table, row: str, project: Project, stage: str, flags=None, straight=None) -> None:
        """Whether the same command, started again, ends as the run that nothing cut off."""
        ended = start(train, project, stage, *(flags or self.flags_of(stage))).wait()
        problem = ended.code == 0 and difference(project.runs / stage, straight or self.straight.runs / stage)
        table.add(row, ended, problem or "")

    # ------------------------------------------------------------------------------------------------- parts

    def file_events(self, most: int | None, rng) -> str:
        """Each stage cut off before each of its file events; most: at most so many cases of a stage."""
        table, events, kinds = Table("stage"), {}, collections.Counter()
        shutil.rmtree(self.straight.runs, ignore_errors=True)
        for stage in STAGES:
            watcher = self.watched(stage)
            events[stage] = sum(watcher.events.values())
            kinds += watcher.events
            copies = sorted(watcher.copies.iterdir())
            if most is not None and len(copies) > most:
                copies = sorted(rng.sample(copies, most))
            for copy in copies:
                self.goes_on(table, stage, self.case("case", stage, copy), stage)
            print(f"{stage}: {events[stage]} events, {table.rows[stage]}", flush=True)
        self.problems += table.problems
        kinds = ", ".join(f"{name.removeprefix('os.')} {n}" for name, n in kinds.most_common())
        return table.text(events=events) + "\n\n" + pages.paragraph(f"Events by kind: {kinds}.") + "\n"

    def random_kills(self, moments: int, worlds, rng) -> str:
        """Kill all processes of a run at a random moment, start it again, and so on to its end."""
        table = Table("stage")
        for world in worlds:
            straight = {}
            for stage in STAGES:                        # with this number of processes, and how long it takes
                project, begun = self.case(f"straight-{world}", stage), time.time()
                ranks = start_ranks(project, stage, self.flags_of(stage), world)
                for ended in ranks:
                    assert ended.wait().code == 0, ended.said
                kept = self.folder / f"straight-{world}-{stage}"
                shutil.move(project.runs / stage, kept)
                straight[stage] = kept, time.time() - begun
            for n in range(moments):
                stage = STAGES[n % len(STAGES)]
                kept, seconds = straight[stage]
                project = self.case("killed", stage)
                ranks = start_ranks(project, stage, self.flags_of(stage), world)
                time.sleep(rng.uniform(0.1, 1) * seconds)
                for ended in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(ended.pid, signal.SIGKILL)
                for ended in ranks:
                    ended.wait()
                ranks = start_ranks(project, stage, self.flags_of(stage), world)
                codes = [ended.wait().code for ended in ranks]
                problem = f"{codes}" if any(codes) else difference(project.runs / stage, kept)
                table.add(f"{stage}, {world} process{'es' * (world > 1)}", ranks[0], problem)
        self.problems += table.problems
        return table.text() + "\n"

    def signals(self, stage="pretrain") -> str:
        """SIGTERM and SIGINT, once and twice, to one or both of two processes, in a step and in a save."""
        table = Table("case")
        flags = ("--steps", 6, "--save-every", 2)
        project = self.case("straight-2", stage)
        for ended in start_ranks(project, stage, flags, 2):
            assert ended.wait().code == 0, ended.said
        kept = project.runs / stage
        for where in ("before the first step", "in a step", "in a save"):
            for whom in ("rank 0", "rank 1", "both"):
                for number in (signal.SIGTERM, signal.SIGINT):
                    for times in (1, 2):
                        project = self.case("signalled", stage)
                        ranks = start_ranks(project, stage, flags, 2, sender(where, whom, number, times))
                        codes = [ended.wait().code for ended in ranks]
                        lines = ranks[0].lines + ranks[1].lines
                        problem = "" if codes == [130, 130] else f"exit codes {codes}"
                        if "Traceback" in "".join(lines):
                            problem += "; a traceback"
                        if where != "before the first step":
                            for word in ("saving step", "stopped after step"):
                                if sum(word in line for line in lines) != 1:
                                    problem += f"; not one line '{word}'"
                        ended = ranks[0]
                        if not problem:
                            again = start_ranks(project, stage, flags, 2)
                            codes = [ended.wait().code for ended in again]
                            problem = f"{codes}" if any(codes) else difference(project.runs / stage, kept)
                            ended = again[0]
                        if problem:
                            problem = f"{number.name}, {times} times: {problem}"
                        table.add(f"{where}, {whom}", ended, problem)
        self.problems += table.problems
        return table.text() + "\n"

    def full_disks(self, sizes: int) -> str:
        """Each stage in a file system of its own that is too small, at so many sizes, and then grows."""
        table, ends = Table("stage"), {}
        for stage in STAGES:
            folder = self.straight.runs / stage
            size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
            ends[stage] = collections.Counter()
            for n in range(sizes):
                project = self.case("full", stage)
                mount = project.runs / stage
                mount.mkdir()
                kilobytes = 24 + int(size / 1024 * 2.5 * n / sizes) // 4 * 4
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", mount], check=True)
                try:
                    ended = start(train, project, stage, *self.flags_of(stage)).wait()
                    errors = [line for line in ended.lines if "error" in line or "Traceback" in line]
                    ends[stage]["in one line" if (ended.code, len(errors)) == (2, 1) else
                                "it sufficed" if ended.code == 0 else "otherwise"] += 1
                    if ended.code not in (0, 2) or len(errors) > 1:
                        self.problems.append(f"{stage}, {kilobytes} k: {ended.code} {' / '.join(ended.lines[-4:])[-900:]}")
                        print("  ", self.problems[-1], flush=True)
                    subprocess.run(["mount", "-o", "remount,size=100m", mount], check=True)
                    self.goes_on(table, stage, project, stage)
                finally:
                    subprocess.run(["umount", "-l", mount], check=True)
        self.problems += table.problems
        columns = {title: {stage: ends[stage][title] for stage in STAGES}
                   for title in ("it sufficed", "in one line", "otherwise")}
        return table.text(**columns) + "\n"

    def things_in_the_way(self, stage="finetune") -> str:
        """A folder where a file should be, and a file system that can only be read."""
        table = Table("case")
        middle = self.case("middle", stage)
        start(lambda: train(middle, stage, *self.flags, before=lambda: stop_at(2))).wait()
        for name in ("run.yaml", "log.jsonl", "latest", ".lock", "config.yaml", "model.safetensors", "optimizer.pt",
                     "step-000004", "training_tasks.json", "config.yaml.tmp", "only to be read"):
            project = self.case("in-the-way", stage, middle.runs / stage)
            folder = project.runs / stage
            if name == "only to be read":
                subprocess.run(["mount", "--bind", folder, folder], check=True)
                subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
            else:
                if is_there := os.path.lexists(folder / name):
                    os.rename(folder / name, project.runs / "aside")
                (folder / name / "mine").mkdir(parents=True)
            ended = start(train, project, stage, *self.flags).wait()
            errors = [line for line in ended.lines if line.startswith("error: ")]
            problem = "" if (ended.code, len(errors)) == (2, 1) else f"first {ended.code}, {ended.lines[-3:]}"
            if name == "only to be read":
                subprocess.run(["umount", "-l", folder], check=True)
            elif not (folder / name / "mine").is_dir():
                problem += "; a folder of others was removed"
            else:
                shutil.rmtree(folder / name)
                if is_there:
                    os.rename(project.runs / "aside", folder / name)
            ended = start(train, project, stage, *self.flags).wait()
            problem = problem or (ended.code == 0 and difference(folder, self.straight.runs / stage)) or ""
            table.add(name, ended, problem)
        self.problems += table.problems
        return table.text() + "\n"

    def launcher(self) -> str:
        """Real launches of two processes, each cut off once and then started again until it ends."""
        table, steps = Table("case"), ("--steps", "60", "--save-every", "20")
        straight = self.case("launched-straight", "pretrain")
        command = launch_command(straight, steps)
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
        shell = self.folder / "job.sh"
        shell.write_text(SHELL)
        for name, flags, cut in LAUNCHES:
            project = self.case("launched", "pretrain")
            output = tempfile.TemporaryFile("w+", errors="replace")
            command = launch_command(project, steps, flags)
            log, code, begun = project.runs / "pretrain" / "log.jsonl", None, time.time()
            if cut == "shell":
                code = subprocess.run(["bash", shell, log, *map(str, command)], cwd=ROOT, stdout=output,
                                      stderr=subprocess.STDOUT, timeout=600).returncode
                problem = "" if code == 0 else f"exit code {code}"
            else:
                running = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
                while running.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 5):
                    time.sleep(0.1)
                ranks = [int(pid) for pid in subprocess.run(
                    ["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()]
                cut(running, ranks)
                code, begun = running.wait(), time.time()
                while any(os.path.exists(f"/proc/{rank}") for rank in ranks) and time.time() < begun + 90:
                    time.sleep(0.2)
                took = time.time() - begun
                expected = {"SIGKILL to the launcher": -signal.SIGKILL,
                            "SIGKILL to rank 1, `--max-restarts 3`": 0}.get(name, 130)
                problem = "" if code == expected else f"exit code {code}"
                if took > 60:
                    problem += f"; ranks were there {took:.0f} s later"
            output.seek(0)
            said = output.read()
            if "Traceback" in said:
                problem += "; a traceback"
            for _ in range(1 if code else 0):
                problem += "; again" * bool(subprocess.run(command, cwd=ROOT, capture_output=True).returncode)
            ended = Ended(0, output)
            ended.code = 0
            folders = project.runs / "pretrain", straight.runs / "pretrain"
            table.add(name, ended, problem or difference(*folders))
            print(name, "\n".join(ended.lines[-6:]), flush=True)
        self.problems += table.problems
        return table.text() + "\n"

    problems = []


# What a batch system does: a SIGTERM before the time is up, and the same command once more in the next job.
SHELL = """
log=$1
shift
until "$@"; do
    code=$?
    [ "$code" = 130 ] || exit "$code"
done &
job=$!
until [ "$(wc -l < "$log" 2> /dev/null || echo 0)" -gt 5 ]; do sleep 0.1; done
kill -TERM $(pgrep -P $job)
wait $job
"""


def launch_command(project: Project, steps, flags=()) -> list[str]:
    words = ["-m", "bench.launch", "--nproc-per-node", "2", *flags, "train_hyper.py", "--stage", "pretrain"]
    return [sys.executable, *words, "--config", str(project.config), "--runs", str(project.runs), *steps]


def to_launcher(*numbers):
    def cut(running, ranks):
        for number in numbers:
            running.send_signal(number)
            time.sleep(0.3)
    return cut


def to_ranks(number, *which):
    def cut(running, ranks):
        for rank in which:
            os.kill(ranks[rank], number)
    return cut


# Name, the launcher's flags, cut(launcher, ranks).
LAUNCHES = [
    ("SIGTERM to the launcher", (), to_launcher(signal.SIGTERM)),
    ("SIGINT to the launcher, three times", (), to_launcher(signal.SIGINT, signal.SIGINT, signal.SIGINT)),
    ("SIGTERM to one rank, `--max-restarts 3`", ("--max-restarts=3",), to_ranks(signal.SIGTERM, 1)),
    ("SIGTERM to launcher and ranks", (), lambda running, ranks: (
        to_ranks(signal.SIGTERM, 0, 1)(running, ranks), to_launcher(signal.SIGTERM)(running, ranks))),
    ("SIGKILL to the launcher", (), to_launcher(signal.SIGKILL)),
    ("SIGKILL to rank 1, `--max-restarts 3`", ("--max-restarts=3",), to_ranks(signal.SIGKILL, 1)),
    ("a batch system: SIGTERM, and the same command again", (), "shell"),
]


def stop_at(step: int) -> None:
    """In a fork: a SIGTERM in this step, counted from 1."""
    at_call("bench.runs", "Log.__call__", step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def at_call(module: str, name: str, n: int, do) -> None:
    """In a fork: have do() called just before the n-th call of this function from now on."""
    owner, count = sys.modules[module], [0]
    *parts, name = name.split(".")
    for part in parts:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def called(*args, **kwargs):
        count[0] += 1
        if count[0] == n:
            do()
        return function(*args, **kwargs)
    setattr(owner, name, called)


def sender(where: str, whom: str, number: int, times: int):
    """before(rank) of a run's forks: some of them get a signal, while others go on."""
    places = {"before the first step": ("bench.runs", "Run.begin", 1), "in a step": ("bench.runs", "Run.is_finite", 1),
              "in a save": ("common", "save_tensors", 1)}

    def before(rank):
        def send():
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.05)

        def while_it_saves():
            """Rank 0 alone writes: it waits while the other one gets the signal in its next step."""
            if whom != "rank 1":
                send()
            time.sleep(1.5)
        if where == "in a save" and rank == 0:
            at_call(*places[where], while_it_saves)
        elif where == "in a save" and whom != "rank 0":
            at_call("bench.runs", "Run.is_finite", 3, send)     # it has come to the step after the save
        elif where != "in a save" and whom in (f"rank {rank}", "both"):
            at_call(*places[where], send)
    return before


# Part of the page -> its heading and what is counted there.
PARTS = {
    "events": ("Cut off at a file event", """Before each file event of a run (start, two saves of which the second is the
        last, end) its folder is copied as it is, and once with what was written since the event before cut in half. Each
        copy that differs from all before is a case: what a SIGKILL there leaves. The same command goes on with it. *Bit
        for bit*: weights and optimizer are those of the run that nothing cut off, and so is the list of files."""),
    "kills": ("Killed at random moments", """All processes of a run get a SIGKILL at a random moment, then the same command
        is run again, and its end is compared as above, with a run of as many processes."""),
    "signals": ("Stopped", """Stage pretrain on two processes. SIGTERM and SIGINT, once and twice, are four cases of each row.
        Besides the comparison, both processes leave with exit code 130, without a traceback; in and after the first
        step one line says that it saves and one where it stopped."""),
    "launcher": ("The launcher", """`python -m bench.launch --nproc-per-node 2`, stage pretrain, each cut off once. After a
        stop its exit code is 130; ranks whose launcher is gone leave within a minute. Then the same command is run again
        (for `--max-restarts` the launcher does that itself), and the end is compared as above."""),
    "disks": ("A full disk", """Each stage in a file system of its own, at several sizes. Where it does not suffice the run
        is to end *in one line* with exit code 2; the file system is enlarged and the same command run again."""),
    "ways": ("Something in the way", """A run of stage finetune with a checkpoint; then a folder with a file of somebody
        else's stands where this file or folder belongs. The run is to end in one line with exit code 2, and to leave that
        folder alone; when it is gone, the same command goes on."""),
}


HOW = """## How a run is stopped

Ctrl-C (SIGINT) and SIGTERM, to any of a run's processes, are one question, however often it is asked: the step ends,
its state is saved, all processes leave together with exit code 130, and the same command goes on. A signal while
libraries or models load ends the run at once, or at the latest before its first step.

`python -m bench.launch` is torchrun with another end: its options and its code, but it waits as long as a save takes
(torchrun sends SIGKILL after 30 seconds, and leaves its processes alone at a second signal), it ends with the exit code
of its processes (130 after a stop, 2 after a mistake of the user's, 1 after a crash) and prints nothing beside their
lines, except which of them was killed. `--max-restarts 3` starts all again when one crashed or was killed, not after a
stop or a mistake. On one node it uses 127.0.0.1, so the host's name need not resolve.

`torchrun` itself works too. When a process ends with another code than 0 it prints two lines of log, the traceback of
its own `ChildFailedError` and a table, some forty lines, and exits with 1. The scripts cannot help that: an exit code
of 0 would tell the shell that all is done. Give it `--shutdown-timeout 600` (PyTorch 2.13; 2.11 has no such
option) and `--local-addr 127.0.0.1`. Processes whose launcher is gone save and leave within a minute.

A batch system's job that is stopped two minutes before its time and queued again:

```bash
#SBATCH --signal=TERM@120 --requeue --open-mode=append
srun --ntasks=1 python -m bench.launch --nproc-per-node 8 --max-restarts 3 \\
    train_hyper.py --stage finetune --config configs/sni-xl.yaml || code=$?
if [ "${code:-0}" = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
```

"""


def write(name: str, text: str) -> None:
    """Put a part into docs/interruption.md; the others stay."""
    path = ROOT / "docs" / "interruption.md"
    old = path.read_text() if path.is_file() else ""
    page = "# What interrupts a run, and what is lost\n\n" + pages.paragraph(
        "Written by `tests/benchmarks/torture.py`; nothing is to be refused or lost. Runs are those of the tests: tiny",
        "models, four steps, one thread, forks of one process.") + "\n\n" + HOW
    for part, (title, words) in PARTS.items():
        its = pages.part_of(old, part)
        if part == name:
            said = pages.paragraph(" ".join(words.split()), f"By `{pages.command_line()}`.")
            its = f"## {title}\n\n{said}\n\n{text}\n"
        if its:
            page += pages.part(part, its)
    path.write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--short", action="store_true", help="one save of each stage, some of its events; nothing is written")
    add("--moments", type=int, default=30, help="kills at random, on one process and on two")
    add("--sizes", type=int, default=12, help="file systems of each stage, as root")
    add("--most", type=int, help="at most so many cases of a stage's file events, drawn at random")
    add("--seed", type=int, default=0)
    add("--parts", default=",".join(PARTS), help="of the page; the others stay as they are")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), *((2, 1) if args.short else (4, 2)))
        if args.short:
            print(torture.file_events(args.most or 5, rng))
            sys.exit(bool(torture.problems))
        makers = {"events": lambda: torture.file_events(args.most, rng),
                  "kills": lambda: torture.random_kills(args.moments, (1, 2), rng), "signals": torture.signals,
                  "launcher": torture.launcher, "disks": lambda: torture.full_disks(args.sizes), "ways": torture.things_in_the_way}
        for name in args.parts.split(","):
            torture.have_straight()
            text = makers[name]()
            print(text, flush=True)
            write(name, text)
    sys.exit(bool(torture.problems))


if __name__ == "__main__":
    main()

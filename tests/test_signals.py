"""SIGTERM and SIGINT, once or more often, end a run after its save; the launcher ends as its ranks do, without a traceback."""
import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch.distributed.elastic.multiprocessing import PContext

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import call, process

import common
from bench import launch

SIGNALS = [signal.SIGTERM, signal.SIGINT]
FLAGS = ("--steps", "4", "--save-every", "2")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.numbers
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(finished, tmp_path, monkeypatch, capsys, number, times):
    straight, cut = (finished.copy(tmp_path / name, ("meta",)) for name in ("straight", "cut"))
    straight.run("pretrain", *FLAGS)
    save, there = common.save_tensors, []

    def interrupted(path, *args):
        for _ in range(times):
            os.kill(os.getpid(), number)
        there.append(path)
        save(path, *args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(common, "save_tensors", interrupted)
        capsys.readouterr()
        cut.run("pretrain", *FLAGS)
    said = capsys.readouterr()
    assert end.value.code == 130 and "Traceback" not in said.err
    assert said.out.count("saving step 3") == said.out.count("stopped after step 3") == 1
    assert len(there) == 2 and cut.record("pretrain")["step"] == 3          # step 2's and that of the stop
    assert (cut.runs / "pretrain" / "step-000002" / "config.yaml").is_file()
    cut.run("pretrain", *FLAGS)
    new, old = cut.weights("pretrain"), straight.weights("pretrain")
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)


# ------------------------------------------------------------------------------------------------------------ launcher

RANK = """
import os, signal, sys, time
what, rank = sys.argv[1], os.environ["RANK"]
restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
asked = []
signal.signal(signal.SIGTERM, lambda *args: asked.append(1))
os.write(1, f"{rank} of {os.environ['WORLD_SIZE']} at {os.environ['MASTER_ADDR']}, {restarts}\\n".encode())
open(f"{sys.argv[2]}/{rank}", "w").close()
if what == "mistake":
    if rank == "0":
        sys.exit(2)
if what == "crash" and rank == "0":
    raise ValueError("of a rank")
if what == "killed" and rank == "1" and restarts < sys.argv[3]:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "killed":
    sys.exit(0)
end = time.time() + 60
while not asked and time.time() < end:
    time.sleep(0.02)
if what == "stop" and rank == "0":                  # it saves, longer than torchrun would wait
    time.sleep(float(sys.argv[3]))
    os.write(1, b"saved\\n")
sys.exit(130)
"""


@pytest.fixture
def launched(tmp_path, monkeypatch, capfd):
    """(exit code, what was printed) of a launch of two ranks that do as RANK says, in this process."""
    script, there = tmp_path / "rank.py", tmp_path / "there"
    script.write_text(RANK)
    there.mkdir()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)                   # nohup's children ignore it

    def run(what, *words, flags=(), send=()):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGQUIT")

        def signals():
            end = time.time() + 60
            while len(list(there.iterdir())) < 2 and time.time() < end:
                time.sleep(0.02)
            for number in send:
                os.kill(os.getpid(), number)
                time.sleep(0.3)
        sender = threading.Thread(target=signals if send else int)
        sender.start()
        with pytest.raises(SystemExit) as end:
            call(launch, "--nproc-per-node=2", *flags, str(script), what, str(there), *words)
            sys.exit(0)
        sender.join()
        said = capfd.readouterr()
        return end.value.code, said.out + said.err
    yield run
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.parametrize("send", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM, signal.SIGINT], [signal.SIGHUP]],
                         ids=lambda send: "-".join(number.name for number in send))
def test_the_launcher_waits_for_a_save_however_many_signals_come(launched, monkeypatch, send):
    wait = PContext.close
    asked = []
    monkeypatch.setattr(PContext, "close", lambda self, sig=None, timeout=30: (asked.append(timeout), wait(self, sig, timeout)))
    code, said = launched("stop", "1.5", send=send)
    assert code == 130 and said.count("saved") == 1 and "Traceback" not in said
    assert sorted(said.splitlines()) == ["0 of 2 at 127.0.0.1, 0", "1 of 2 at 127.0.0.1, 0", "saved"]
    assert max(asked) > 24 * 3600                                           # torchrun's are 30 seconds


def test_the_launcher_ends_with_a_users_mistake_without_a_word_and_without_a_restart(launched):
    code, said = launched("mistake", flags=["--max-restarts=3"])
    assert code == 2 and sorted(said.splitlines()) == ["0 of 2 at 127.0.0.1, 0", "1 of 2 at 127.0.0.1, 0"]


def test_of_a_crash_the_launcher_leaves_the_ranks_own_traceback_alone(launched):
    code, said = launched("crash")
    assert code == 1 and said.count("Traceback") == 1 and said.rstrip().endswith("ValueError: of a rank")


def test_a_killed_rank_is_named_and_all_start_again_where_that_was_asked_for(launched):
    code, said = launched("killed", "1")
    assert code == 1 and "error: rank 1 was killed by SIGKILL" in said and "0 of 2 at 127.0.0.1, 1" not in said
    code, said = launched("killed", "2", flags=["--max-restarts=3"])
    assert code == 0 and said.count("rank 1 was killed") == 2 and "1 of 2 at 127.0.0.1, 2" in said


@pytest.mark.parametrize("flags, told", [
    (["--nnodes=two"], "two"), (["--nproc-per-node=gpu"], "Cuda"), (["--rdzv-backend=none-such"], "none-such"),
    (["--signals-to-handle=SIGNONE"], "SIGNONE")])
def test_what_the_launcher_cannot_do_is_one_line(launched, flags, told):
    if torch.cuda.is_available() and told == "Cuda":
        pytest.skip("there is a GPU")
    code, said = launched("mistake", flags=flags)
    lines = [line for line in said.splitlines() if "master_addr is only used" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0]


def test_a_wrong_option_under_two_processes_ends_in_one_line():
    """And so does a script that is not there, before any rank is started."""
    launcher = [sys.executable, "-m", "bench.launch", "--nproc-per-node", "2"]
    done = process(*launcher, "train_hyper.py", "--stage", "finetune", "--lrr", "3", code=2)
    assert done.stderr == "error: unknown option --lrr; did you mean --lr?\n" and not done.stdout
    assert process(*launcher, "train_hyperr.py", code=2).stderr.startswith("error: train_hyperr.py: no such script")

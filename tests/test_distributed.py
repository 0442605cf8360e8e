"""Two processes, joined by gloo as torchrun starts them, train what one process trains on the same batches."""
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import apart
from stages import ROOT, process

import config
import data
import t5
import train_teacher
from bench import optim
from bench.runs import Run

pytestmark = pytest.mark.numbers
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SHARED = ("--steps=3", "--save-every=2", "--seed=3")
FINETUNE = ("--alignment=factors", "--train-embeddings", *SHARED)


@pytest.fixture(scope="module")
def launched(finished, tmp_path_factory):
    """One launch with two ranks, since a launch takes seconds: meta, lora and lora-all, one after
    the other, then finetune with all three losses, on runs of its own. Returns both projects."""
    teachers = finished.copy(tmp_path_factory.mktemp("two") / "runs", ("base",))
    student = finished.copy(tmp_path_factory.mktemp("two") / "runs", ("meta", "lora", "pretrain"))
    flags = ("--teachers-at-once=2", *SHARED)
    scripts = [["train_teacher", *teachers.argv(stage, *flags)] for stage in ("meta", "lora", "lora-all")]
    scripts.append(["train_hyper", *student.argv("finetune", *FINETUNE)])
    launcher = tmp_path_factory.mktemp("two") / "scripts.py"
    launcher.write_text(f"import glob, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_hyper, train_teacher\n"
                        "dist = train_teacher.common.dist\ndestroy = dist.destroy_process_group\n"
                        "dist.destroy_process_group = lambda: None\n"          # a second group may hang
                        f"for name, *argv in {scripts!r}:\n    sys.modules[name].main(argv)\n"
                        "destroy()\n"
                        "tasks = glob.glob('/proc/self/task/*/comm')\n"
                        "names = ' '.join(open(task).read().strip() for task in tasks)\n"
                        "sys.stdout.write(f'\\nthreads left: {names}\\n')\n")     # in one piece: two ranks write
    teachers.said = process(*TORCHRUN, launcher).stdout
    return teachers, student


@pytest.fixture
def teachers(launched):
    return launched[0]


@pytest.fixture
def student(launched):
    return launched[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_thread_of_gloo_outlives_a_script(teachers):
    """One that does may let go of a tensor after the interpreter has ended, which aborts the process."""
    left = [line for line in teachers.said.splitlines() if "threads left:" in line]
    assert len(left) == 2 and not any("gloo" in line for line in left)


def test_meta_on_two_ranks_equals_one_process_with_two_micro_batches(finished, teachers, tmp_path):
    one, half = (finished.copy(tmp_path / name, ("base",)) for name in ("one", "half"))
    one.run("meta", "--accumulate=2", *SHARED)
    half.run("meta", *SHARED)
    two, lr = teachers.weights("meta"), teachers.record("meta")["lr"]
    assert apart(two, one.weights("meta"), lr) < 0.03
    assert apart(two, half.weights("meta"), lr) > 0.1           # the second rank's half counts


def test_lora_on_two_ranks_equals_one_exactly_and_leaves_out_no_teacher(teachers, tmp_path):
    one = teachers.copy(tmp_path / "one", ("meta",))
    one.run("lora", "--teachers-at-once=2", *SHARED)
    folders = sorted(path.parent.name for path in one.runs.glob("lora/*/model.safetensors"))
    assert len(folders) > 4 and folders == sorted(path.parent.name for path in teachers.runs.glob("lora/*/model.safetensors"))
    for folder in folders:
        two, its = teachers.weights("lora", folder), one.weights("lora", folder)
        assert two.keys() == its.keys() and all(torch.equal(two[name], its[name]) for name in two)
    assert teachers.record("lora")["finished"]


def test_one_lora_on_two_ranks_equals_one_process_with_two_micro_batches(teachers, tmp_path):
    one, half = (teachers.copy(tmp_path / name, ("meta",)) for name in ("one", "half"))
    one.run("lora-all", "--accumulate=2", *SHARED)
    half.run("lora-all", *SHARED)
    lr = teachers.record("lora-all")["lr"]
    for folder in (["lora-all"], ["lora-all", "all"]):
        assert apart(teachers.weights(*folder), one.weights(*folder), lr) < 0.03
        assert apart(teachers.weights(*folder), half.weights(*folder), lr) > 0.1
    assert [row["step"] for row in teachers.log("lora-all")] == [1, 2, 3]
    assert teachers.record("lora-all")["finished"]


def test_ranks_that_start_at_different_times_leave_out_no_teacher(finished, tmp_path):
    """Rank 1 may come to the list of teachers when rank 0 has finished its first: here, all of its own."""
    late = finished.copy(tmp_path / "late", ("meta",))
    options = config.parse(train_teacher.parser(), "lora", late.argv("lora", "--teachers-at-once=1"))
    for rank in (0, 1):
        run = Run(str(late.runs / "lora"), options, rank, 2, {}, ranks_share_a_batch=False)
        train_teacher.train_lora(options, run)
    assert len(list(late.runs.glob("lora/*/model.safetensors"))) == len(list(finished.runs.glob("lora/*/model.safetensors")))


def test_two_ranks_speak_once_and_log_once(teachers):
    assert teachers.said.count("effective batch 8 = 2 ranks x 4 tasks") == 1                # meta
    assert teachers.said.count("effective batch 16 = 2 ranks x 4 tasks x 2 instances") == 1
    assert teachers.said.count("effective batch 4 = 4 tasks") == 1                          # lora, where ranks share no batch
    assert [row["step"] for row in teachers.log("meta")] == [1, 2, 3]
    assert teachers.record("meta")["finished"] and (teachers.runs / "meta" / "optimizer.pt").is_file()


def test_finetuning_on_two_ranks_equals_one_process_with_two_micro_batches(finished, student, tmp_path):
    one, half = (finished.copy(tmp_path / name, ("meta", "lora", "pretrain")) for name in ("one", "half"))
    one.run("finetune", "--accumulate=2", *FINETUNE)
    half.run("finetune", *FINETUNE)
    two, lr = student.weights("finetune"), student.record("finetune")["lr"]
    assert apart(two, one.weights("finetune"), lr) < 0.03
    assert apart(two, half.weights("finetune"), lr) > 0.1


def test_the_log_of_two_ranks_is_of_the_whole_step_not_of_one_ranks_half(finished, student, tmp_path):
    one = finished.copy(tmp_path / "one", ("meta", "lora", "pretrain"))
    one.run("finetune", "--accumulate=2", *FINETUNE)
    for two, row in zip(student.log("finetune"), one.log("finetune"), strict=True):
        for term in ("loss", "ce", "kl", "ins"):
            assert two[term] == pytest.approx(row[term], rel=0.01), (term, two, row)


def test_gradients_are_added_up_a_slice_at_a_time(monkeypatch):
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 4, 5, 1)]
    for n, p in enumerate(parameters[:3]):
        p.grad = torch.arange(len(p)) + 10.0 * n
    before, messages = [p.grad.clone() for p in parameters[:3]], []

    def all_reduce(flat):
        messages.append(len(flat))
        flat *= 2

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    optim.sum_gradients(iter(parameters), size=6)
    assert messages == [3, 4, 6]
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(parameters, before)) and parameters[3].grad.eq(0).all()

def test_dropout_differs_between_micro_batches_and_is_the_same_on_two_ranks_as_in_one_process(
        finished, tmp_path, monkeypatch):
    """Every micro-batch is the same here and nothing is learned: logits differ by dropout alone."""
    options = config.parse(train_teacher.parser(), "meta", finished.argv("meta", "--lr=0"))
    logits = t5.logits

    def logits_of(rank, world, accumulate):
        """{(step, number among all ranks' micro-batches): logits}"""
        llm, tokenizer = t5.load_llm(str(finished.runs / "base"))
        for module in llm.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        options.accumulate, seen = accumulate, {}
        ids, mask = data.tokenize(tokenizer, ["Find the city ."] * 2, 9)
        labels = data.labels(tokenizer, ["Rome", "Paris"], 9)
        folder = str(tmp_path / f"{rank}-of-{world}")

        def record(*args):
            step, i = divmod(len(seen), accumulate)
            seen[step, rank + world * i] = logits(*args)
            return seen[step, rank + world * i]

        with monkeypatch.context() as patch:
            patch.setattr(t5, "logits", record)
            run = Run(folder, options, rank, world, {})
            train_teacher.train_llm(run, llm, tokenizer, lambda *at: [], lambda *at: (ids, mask, labels))
        return seen

    one = logits_of(0, 1, 2)
    two = logits_of(0, 2, 1) | logits_of(1, 2, 1)
    assert sorted(one) == sorted(two) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(torch.equal(one[at], two[at]) for at in one)
    assert not any(torch.equal(one[a], one[b]) for a in one for b in one if a < b)

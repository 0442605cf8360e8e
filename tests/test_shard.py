"""--shard: two processes that hold a part of each weight train what one process trains, in float64 to 1e-6 after ten steps."""
import contextlib
import sys

import pytest
import torch

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from conftest import exactly
from stages import MODULES, ROOT, call, process

import t5
from bench import shard

pytestmark = pytest.mark.numbers
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# A rate that does not depend on the number of steps, so that a finished stage can go on.
SHARED = ("--steps=10", "--save-every=100", "--seed=0", "--schedule=constant", "--warmup=0")
STAGES = {  # stage -> (what it reads, its options): every optimizer, with and without checkpointing
    "base": ((), ("--optimizer=muon", "--checkpointing")),
    "meta": (("base",), ("--optimizer=adamw", "--lr=1e-3", "--no-curriculum", "--validate-every=5")),
    "lora-all": (("meta",), ("--optimizer=adamw", "--checkpointing")),
    "pretrain": (("meta",), ("--optimizer=adafactor", "--train-norms")),
    "finetune": (("meta", "lora", "pretrain"), ("--optimizer=muon", "--checkpointing", "--train-norms", "--train-embeddings",
                                                     "--validate-every=5")),
}
RESUMED = {  # stage -> the options of its first five steps, and of the others
    "meta": ("--shard", "--no-shard"),
    "finetune": ("--no-shard", "--shard"),
}


@contextlib.contextmanager
def doubled():
    """Within: models, losses and what is trained are in float64; a fingerprint is what it was in float32."""
    load, fingerprint, single = t5.load_llm, t5.fingerprint, torch.Tensor.float

    def load_double(*args, **kwargs):
        llm, tokenizer = load(*args, **kwargs)
        return llm.double(), tokenizer

    def fingerprint_of_floats(llm):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", single)
            return fingerprint(llm)

    with exactly(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5, "load_llm", load_double)
        patch.setattr(t5, "fingerprint", fingerprint_of_floats)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def run_all(runs, singles):
    """In each of two processes, runs in float64 and then others as they are: [[script's name, *words], ...]"""
    dist = sys.modules["common"].dist
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None         # a second group may hang
    with doubled():
        for name, *argv in runs:
            sys.modules[name].main(argv)            # stages.py has imported both scripts
    for name, *argv in singles:
        sys.modules[name].main(argv)
    destroy()


@pytest.fixture(scope="module")
def launched(finished, tmp_path_factory):
    """One launch with two ranks: {(stage, way): its project}. Ways: two, shard and, of some stages, resumed or bf16."""
    root, projects, runs, singles = tmp_path_factory.mktemp("shard"), {}, [], []

    def add(stage, way, *flags, runs=runs):
        reads, own = STAGES[stage]
        if (stage, way) not in projects:
            projects[stage, way] = finished.copy(root / stage / way, reads)
        runs.append([MODULES[stage].__name__, *projects[stage, way].argv(stage, *SHARED, *own, *flags)])

    for stage in STAGES:
        add(stage, "two")
        add(stage, "shard", "--shard")
    for stage, (first, then) in RESUMED.items():
        add(stage, "resumed", first, "--steps=5")
        add(stage, "resumed", then)
    add("finetune", "bf16", "--shard", "--precision=bf16", runs=singles)
    launcher = root / "all.py"
    launcher.write_text(f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\nimport test_shard\ntest_shard.run_all({runs!r}, {singles!r})\n")
    process(*TORCHRUN, launcher, seconds=500)
    return projects


@pytest.fixture(scope="module")
def alone(finished, tmp_path_factory):
    """{stage: its project}, run by one process with two micro-batches."""
    root, projects = tmp_path_factory.mktemp("alone"), {}
    with doubled():
        for stage, (reads, own) in STAGES.items():
            projects[stage] = finished.copy(root / stage, reads)
            call(MODULES[stage], *projects[stage].argv(stage, *SHARED, *own, "--accumulate=2"))
    return projects


def apart(a: dict, b: dict) -> float:
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    assert all(p.dtype == torch.float64 for p in a.values())
    return max((a[name] - b[name]).abs().max().item() for name in a)


def flat(state, at="") -> dict:
    """The tensors of an optimizer's state, by where they stand."""
    found = {}
    for key, value in (enumerate(state) if isinstance(state, list) else state.items()):
        if isinstance(value, (dict, list)):
            found |= flat(value, f"{at}/{key}")
        elif torch.is_tensor(value):
            found[f"{at}/{key}"] = value.double()
    return found


@pytest.mark.parametrize("way", ["two", "shard"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one_to_a_millionth_after_ten_steps(launched, alone, stage, way):
    two, one = launched[stage, way], alone[stage]
    assert apart(two.weights(stage), one.weights(stage)) < 1e-6
    states = [torch.load(project.runs / stage / "optimizer.pt")["optimizer"] for project in (two, one)]
    ours, theirs = map(flat, states)
    assert ours and ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}")
    for row, its in zip(two.log(stage), one.log(stage), strict=True):
        for name in {"loss", "grad_norm", "validation", "validation_shuffled"} & its.keys():
            assert row[name] == pytest.approx(its[name], rel=1e-3), name


@pytest.mark.parametrize("stage", RESUMED)
def test_a_run_goes_on_with_and_without_shard(launched, alone, stage):
    resumed = launched[stage, "resumed"]
    assert apart(resumed.weights(stage), alone[stage].weights(stage)) < 1e-6
    assert resumed.record(stage)["shard"] == (RESUMED[stage][1] == "--shard")


@pytest.mark.parametrize("stage", ["meta", "finetune"])
def test_losses_on_held_out_tasks_and_the_best_checkpoint_are_those_of_one_process(launched, alone, stage):
    dealt, one = launched[stage, "shard"], alone[stage]
    rows = [row for row in dealt.log(stage) if "validation" in row]
    assert len(rows) == 2
    assert dealt.record(stage, "best")["step"] == one.record(stage, "best")["step"]
    assert apart(dealt.weights(stage, "best"), one.weights(stage, "best")) < 1e-6
    assert not (dealt.runs / stage / "best" / "optimizer.pt").exists()


def test_what_is_gathered_in_bf16_trains_float32_weights(launched, alone):
    half, one = launched["finetune", "bf16"], alone["finetune"]
    for row, its in zip(half.log("finetune"), one.log("finetune"), strict=True):
        for name in {"loss", "validation"} & its.keys():
            assert row[name] == pytest.approx(its[name], rel=0.03), name
    assert all(p.dtype == torch.float32 for p in half.weights("finetune").values())


def test_what_is_trained_did_move_and_ranks_did_read_different_batches(launched, alone, finished):
    start = finished.weights("base")
    moved = alone["meta"].weights("meta")
    assert max((moved[name] - start[name]).abs().max().item() for name in start) > 1e-4


def test_one_process_has_nobody_to_deal_out_to(project):
    assert "torchrun" in project.refuses("pretrain", "--fresh", "--shard")
    assert "torchrun" in project.refuses("meta", "--fresh", "--shard")


def test_teachers_are_independent_so_their_stage_ignores_it_with_a_reason(project):
    assert "--shard has no use" in project.run("lora", "--fresh", "--shard")
    assert project.record("lora")["finished"] and project.record("lora")["shard"] is False


def test_rows_are_dealt_out_and_gathered_whatever_their_number(monkeypatch):
    """7 rows among 3 ranks are 3, 3 and 1; 2 rows are 1, 1 and none."""
    for n, sizes in ((7, [3, 3, 1]), (2, [1, 1, 0]), (3, [1, 1, 1])):
        whole, dealt = torch.arange(n * 2.0).view(n, 2), []
        for rank in range(3):
            monkeypatch.setattr(shard.dist, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(shard.dist, "get_world_size", lambda: 3)
            part = torch.nn.Parameter(torch.zeros(1))
            part.whole = whole
            dealt.append(shard.rows(part, whole))
        assert [len(rows) for rows in dealt] == sizes and torch.equal(torch.cat(dealt), whole)
        assert [len(rows) for rows in dealt] == [len(x) for x in torch.chunk(whole, 3)] + [0] * (3 - len(torch.chunk(whole, 3)))

        def all_gather(outs, mine):
            assert mine.shape == (-(-n // 3), 2)
            for out, rows in zip(outs, dealt, strict=True):
                out[:len(rows)] = rows

        monkeypatch.setattr(shard.dist, "all_gather", all_gather)
        assert torch.equal(shard.gather(part, dealt[2]), whole)


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_teacher
from bench import shard
name, left = {name!r}, [{calls}]
place = shard if name == "gather" else getattr(shard.collectives, name)
attribute = "gather" if name == "gather" else "__call__"
meet = getattr(place, attribute)

def dying(*args, **kwargs):
    left[0] -= 1
    if not left[0] and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return meet(*args, **kwargs)

setattr(place, attribute, dying)
train_teacher.main({argv!r})
"""


@pytest.mark.parametrize("name, calls", [("DefaultAllGather", 30), ("DefaultReduceScatter", 3), ("gather", 2)])
def test_where_a_rank_is_killed_in_a_gather_the_others_end_in_one_line(finished, tmp_path, name, calls):
    """In a forward pass, in a backward pass, and where a checkpoint is put together."""
    project, script = finished.copy(tmp_path / "runs", ("base",)), tmp_path / "dying.py"
    argv = project.argv("meta", "--shard", "--steps=3", "--save-every=1", "--no-curriculum")
    script.write_text(DYING.format(root=str(ROOT), name=name, calls=calls, argv=argv))
    done = process(sys.executable, "-m", "bench.launch", "--nproc-per-node=2", script, code=1)
    lines = sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "Traceback" not in done.stderr and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: rank 0 lost another rank") and "rank 1 was killed by SIGKILL" in lines[1]

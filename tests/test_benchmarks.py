"""The benchmarks that are run by hand still call the code as it is."""
import types

import pytest
import torch
from safetensors.torch import load_file

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, STAGES


def test_teachers_are_trained_beside_pefts(finished, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    for folder in ("tests", "tests/benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import training
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(finished.data)
    monkeypatch.setattr(training, "ROOT", tmp_path)
    ran = []

    def compare(case, ways, rounds):
        for way, run in ways.items():
            if case == "batch 1":
                run()
                ran.append(way)
        return dict.fromkeys(ways, 1.0)
    section = types.SimpleNamespace(compare=compare, add_column=lambda *args: None)
    training.teachers(section, types.SimpleNamespace(size="tiny", device="cpu"))
    assert ran == ["PEFT, one after another", "ours, at once"]


def test_stages_read_weights_that_were_halved_to_be_carried(project, monkeypatch):
    for folder in ("tests", "tests/benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import sni_scratch
    for stage in STAGES:
        project.run(stage, "--fresh")
        before = {path: load_file(path) for path in (project.runs / stage).rglob("model.safetensors")}
        assert any(before.values())
        sni_scratch.halve(project.runs / stage)
        for path, weights in before.items():
            halved = load_file(path)
            assert halved.keys() == weights.keys()
            assert all(torch.equal(x, weights[name].bfloat16()) for name, x in halved.items())
    assert "TAGI, right instruction" in project.run("evaluate", "--no-cost")

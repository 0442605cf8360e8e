"""tests/gpu.sh, which is for a machine with a GPU, runs here in its dry form and leaves no page."""
import pytest
import torch

pytest.register_assert_rewrite("stages")
pytest_plugins = ("stages",)
from stages import ROOT, process


def test_the_dry_form_runs_checks_every_stage_and_a_benchmark_and_writes_nothing():
    page = ROOT / "docs" / "gpu.md"
    before = page.read_bytes() if page.exists() else None
    said = process("bash", "tests/gpu.sh", "--dry", seconds=400).stdout
    assert "checks: " in said and " passed" in said and "failed" not in said
    for stage in ("meta", "lora", "lora-all", "pretrain", "finetune"):
        assert f"| tiny | {stage} |" in said
    assert "### Generating adapters once" in said and "Left out" not in said
    assert (page.read_bytes() if page.exists() else None) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    assert "--dry" in process("bash", "tests/gpu.sh", code=1).stderr.splitlines()[-1]

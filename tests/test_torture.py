"""What a kill at a file event leaves goes on, bit for bit: the short form of tests/benchmarks/torture.py."""
import re
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("stages")
from stages import ROOT, STAGES, environment


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
def test_each_stage_goes_on_from_what_a_kill_leaves_in_its_saves():
    words = [sys.executable, "tests/benchmarks/torture.py", "--short", "--most=3"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = re.findall(r"^\| ([a-z-]+) \| (\d+) \| 3 \| 3 \| 0 \| 0 \|$", done.stdout, re.M)
    assert [stage for stage, _ in rows] == list(STAGES) and all(int(events) > 50 for _, events in rows)

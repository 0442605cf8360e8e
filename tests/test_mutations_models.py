"""Whatever is damaged in a file of a model, and whatever an option says: it works or ends in one line."""
import random

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations_models import KINDS, damaged

from bench import recorded
from common import UserError
from hypernet import TAGI


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2 ** 32 - 1))
def test_a_damaged_file_or_a_wrong_option_works_or_ends_in_one_line(kind, seed):
    try:
        KINDS[kind](random.Random(seed))
    except UserError as error:
        assert len(str(error)) <= 300 and str(error).isprintable()


@pytest.mark.parametrize("key, value", [
    ("finished", [1]), ("finished", "yes"), ("finished", 1), ("step", "x"), ("step", 1.5), ("steps", None), ("steps", True), ("rank", "abc"),
    ("rank", 2.5), ("rank", 10 ** 30), ("alpha", float("nan")), ("alpha", -1), ("alpha", True), ("seed", -1), ("seed", [0]), ("lr", float("inf")),
    ("targets", {}), ("targets", None), ("llm_path", 5), ("llm_path", None), ("llm_is_relative", "no"), ("llm_fingerprint", 12), ("width", 0),
    ("generator", "x"), ("fusion", True), ("train_norms", "yes"), ("format", None), ("processes", "1"), ("max_input", []), ("warmup", 7)])
def test_a_value_of_a_wrong_type_in_a_checkpoints_config_is_named(key, value):
    for use in (lambda folder: TAGI.load(folder), lambda folder: recorded.load_options(folder)):
        def change(rng, path):
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {key: value}))
        root = damaged(None, "run", "config.yaml", change)
        with pytest.raises(UserError, match=f"run/config.yaml.*{key}"):
            use(str(root / "run"))


@pytest.mark.parametrize("key", recorded.OF_A_STUDENT)
def test_a_checkpoint_without_a_key_that_it_needs_is_refused(key):
    def change(rng, path):
        record = yaml.safe_load(path.read_text())
        del record[key]
        path.write_text(yaml.safe_dump(record))
    root = damaged(None, "run", "config.yaml", change)
    with pytest.raises(UserError, match=f"run/config.yaml.*no {key}"):
        TAGI.load(str(root / "run"))

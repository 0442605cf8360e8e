"""Whatever is damaged in a file of a model, and whatever an option says: it works or ends in one line."""
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations_models import KINDS

from common import UserError


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2 ** 32 - 1))
def test_a_damaged_file_or_a_wrong_option_works_or_ends_in_one_line(kind, seed):
    try:
        KINDS[kind](random.Random(seed))
    except UserError as error:
        assert len(str(error)) <= 300 and str(error).isprintable()

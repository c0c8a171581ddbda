"""The published models' own numbers, within the bounds of the table in examples/parity.md."""

import parity
import pytest


@pytest.mark.parametrize("name", parity.CASES)
def test_parity(name):
    if parity.missing(name):
        pytest.skip(f"{', '.join(parity.missing(name))} not installed")
    bound, difference, _ = parity.CASES[name]
    assert difference() <= bound

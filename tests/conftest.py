"""What several test files share."""

from __future__ import annotations

import pytest

from fastllm.measure.poison import poisoned as poisoned_outputs


@pytest.fixture
def poisoned():
    """Outputs are NaN before the kernel runs; ``check()`` finds writes outside of them."""
    with poisoned_outputs() as memory:
        yield memory

"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm.measure.poison import poisoned as poisoned_outputs


@pytest.fixture
def poisoned():
    """Outputs are NaN before the kernel runs; ``check()`` finds writes outside of them."""
    with poisoned_outputs() as memory:
        yield memory


@pytest.fixture(scope="session")
def real_path() -> Path:
    """The real model's GGUF file (`make test` installs it), its contents checked."""
    from fastllm.models import real_model

    try:
        return real_model.find(verify=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))

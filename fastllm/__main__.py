"""``python -m fastllm`` is the command ``fastllm``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""One contender, which serves on stdin and stdout; `peers.py` and `session_options.py` start them.

    python examples/benchmarks/speed/contender.py artifact olmoe.onnx --threads 2
    python examples/benchmarks/speed/contender.py llama --help

Of what is imported here, only the standard library and numpy are there in every contender's
environment; each imports the library that it is about.
"""

from __future__ import annotations

import importlib
import sys

KINDS = ("artifact", "llama", "pytorch")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(KINDS)}}} ...")
    importlib.import_module(f"contenders.{sys.argv.pop(1)}").main()

"""CUDA source -> machine code for one GPU, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from alloc_moe.runtime.cuda.bindings import call, nvrtc
from alloc_moe.runtime.errors import DeviceError

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "kernels"
SOURCES = (
    "linear.cu",
    "attention.cu",
    "experts.cu",
    "rows.cu",
    "flash.cu",
    "grouped.cu",
    "grouped_blocks.cu",
)
TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
"""What TYPE is in the sources, by the data type of activations."""
_CACHE = "ALLOC_MOE_CACHE"
_FLAGS = "ALLOC_MOE_KERNEL_FLAGS"


def compile_kernels(
    kernels: Iterable[str], *, dtype: str, capability: tuple[int, int]
) -> tuple[bytes, dict[str, str]]:
    """Return a cubin and each kernel's name in it.

    Compiling takes some ten seconds; the result is kept in ``$ALLOC_MOE_CACHE``, by default in the
    user's cache folder. ``$ALLOC_MOE_KERNEL_FLAGS`` are more options for NVRTC, to try kernels out:
    ``-DGROUPS_IN_ATTENTION`` has Hopper's warp groups attend to prompts.

    Args:
        kernels: C++ expressions, ``linear<2048, 0, 1, 4, true>``.
        dtype: Of activations, a key of `TYPES`.
        capability: The GPU's, such as (9, 0).

    Raises:
        DeviceError: NVRTC can't compile them.
    """
    wanted = sorted(set(kernels))
    key, options, sources = _key(wanted, dtype, capability)
    folder = _cache_folder()
    kept = _read(folder, key)
    if kept is not None:
        return kept
    logger.info("Compiling %d kernels for this GPU; later they are on disk.", len(wanted))
    cubin, names = _compile(wanted, options, sources)
    _write(folder, key, cubin, names)
    return cubin, names


def _key(
    wanted: list[str], dtype: str, capability: tuple[int, int]
) -> tuple[str, list[str], dict[str, str]]:
    """Return what identifies the result, the options, and the sources by name."""
    # Hopper's products of warp groups are for that very architecture.
    target = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    options = [f"-DTYPE={TYPES[dtype]}", f"--gpu-architecture={target}"]
    options += ["-std=c++17", "-default-device", *os.environ.get(_FLAGS, "").split()]
    sources = {path.name: path.read_text() for path in sorted(FOLDER.iterdir()) if path.is_file()}
    version = call(nvrtc.nvrtcVersion())
    content = json.dumps([wanted, options, sources, version])
    return hashlib.sha256(content.encode()).hexdigest(), options, sources


def _compile(
    kernels: list[str], options: list[str], sources: dict[str, str]
) -> tuple[bytes, dict[str, str]]:
    main = "".join(f'#include "{name}"\n' for name in SOURCES)
    texts = [text.encode() for text in sources.values()]
    names = [name.encode() for name in sources]
    program = call(nvrtc.nvrtcCreateProgram(main.encode(), b"step.cu", len(texts), texts, names))
    for kernel in kernels:
        call(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
    flags = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(status):
        log = b" " * call(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise DeviceError(
            f"NVRTC can't compile the kernels: {' '.join(log.decode().split())[:1000]}"
        )
    cubin = b" " * call(nvrtc.nvrtcGetCUBINSize(program))
    call(nvrtc.nvrtcGetCUBIN(program, cubin))
    lowered = {
        kernel: call(nvrtc.nvrtcGetLoweredName(program, kernel.encode())).decode()
        for kernel in kernels
    }
    nvrtc.nvrtcDestroyProgram(program)
    return cubin, lowered


def _cache_folder() -> Path:
    if given := os.environ.get(_CACHE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "alloc-moe"


def _read(folder: Path, key: str) -> tuple[bytes, dict[str, str]] | None:
    try:
        data = (folder / f"{key}.cubin").read_bytes()
        size = int.from_bytes(data[:8], "little")
        names = json.loads(data[8 : 8 + size])
        cubin, digest = data[8 + size : -32], data[-32:]
    except (OSError, ValueError, IndexError):
        return None
    if hashlib.sha256(data[:-32]).digest() != digest:
        return None
    return cubin, names


def _write(folder: Path, key: str, cubin: bytes, names: dict[str, str]) -> None:
    """Keep a cubin; where nothing can be written, it is compiled again next time."""
    header = json.dumps(names).encode()
    data = len(header).to_bytes(8, "little") + header + cubin
    data += hashlib.sha256(data).digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, folder / f"{key}.cubin")
    except OSError:
        return

"""Which onnxruntime execution provider runs an artifact: CUDA where it works, else the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from alloc_moe.runtime.errors import ArtifactError, DeviceError, GenerationError
from alloc_moe.runtime.execution.finite import is_whole

logger = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "cuda"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_FATAL, _ERROR, _WARNING = 4, 3, 2  # onnxruntime's log severities; warning is its default
_MOST_PER_CORE = 8
# By default onnxruntime multiplies float32 as TF32 there: logits differ by 0.3 from the CPU's.
_CUDA_OPTIONS = {"use_tf32": "0"}
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(
        kind
        for kind in vars(ort_errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
    RuntimeError,  # what of C++ has no type of its own
)
"""What onnxruntime raises."""


def most_threads() -> int:
    """Return the most threads that can be asked for: many more than cores take forever."""
    return _MOST_PER_CORE * (os.cpu_count() or 1)


def session_options(
    *,
    threads: int | None = None,
    stop_spinning: bool = False,
    data_folder: Path | None = None,
    more: Mapping[str, str] | None = None,
) -> onnxruntime.SessionOptions:
    """Return settings of a session that logs errors only.

    Args:
        threads: Threads that share the work of one operator; by default one per physical core.
        stop_spinning: Let idle threads sleep between calls.
        data_folder: Where the external data are of a model that is given as its content.
        more: What else onnxruntime can be told, by name: a switch or number of its SessionOptions
            (``enable_cpu_mem_arena``), or an entry of its session configuration, which has a dot
            in its name (``session.intra_op.allow_spinning``). Goes before the other arguments.

    Raises:
        GenerationError: There are no threads, no such option, or it takes no such value.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    check_threads(threads)
    if threads is not None:
        options.intra_op_num_threads = int(threads)
    if stop_spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path",
            utf8_path(data_folder.resolve()),
        )
    for name, value in (more or {}).items():
        if not isinstance(value, str):
            raise GenerationError(f"The option {name} is {value!r:.60}. Give a text, such as '0'.")
        if "." in name:
            options.add_session_config_entry(name, value)
        else:
            _set(options, name, value)
    return options


def quiet_run() -> onnxruntime.RunOptions:
    """Return options of a run whose errors are raised only, and not printed besides."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL
    return options


def utf8_path(path: Path) -> str:
    """Return a path as onnxruntime takes it, whatever locale it was decoded by.

    Raises:
        ArtifactError: It is no UTF-8.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeError as error:
        raise ArtifactError(
            f"onnxruntime can't open {str(path)!r}, whose name is no UTF-8. Rename it."
        ) from error


def check_threads(threads: int | None) -> None:
    """Raise GenerationError for a number of threads that can't run a model; None is the default."""
    if threads is not None and not (is_whole(threads, 1) and threads <= most_threads()):
        raise GenerationError(
            f"{threads} threads can't run a model here. Give 1 to {most_threads()}, "
            f"{_MOST_PER_CORE} per core."
        )


def _set(options: onnxruntime.SessionOptions, name: str, value: str) -> None:
    old = getattr(options, name, None)
    if name.startswith("_") or not isinstance(old, int):  # switches are integers too
        raise GenerationError(
            f"onnxruntime's SessionOptions have no switch or number {name!r}. Entries of the "
            "session's configuration have a dot in their names, as session.intra_op.allow_spinning."
        )
    if name.endswith("_num_threads") and value.isdecimal() and len(value) < 20 and int(value):
        check_threads(int(value))
    allowed = {"0": False, "1": True} if isinstance(old, bool) else None
    try:
        setattr(options, name, allowed[value] if allowed else int(value))
    except (KeyError, ValueError, TypeError) as error:  # the last of numbers that don't fit
        takes = "0 or 1" if allowed else "a whole number"
        raise GenerationError(f"{name} is {value!r}. It takes {takes}.") from error


def create_session(
    model: str | bytes, options: onnxruntime.SessionOptions, *, ep: Provider, name: Path
) -> onnxruntime.InferenceSession:
    """Return a session on the provider asked for.

    Args:
        model: The path of an ONNX file, or its content.
        options: Settings of the session.
        ep: ``cpu``; ``cuda``; or ``auto``, which is CUDA if it can be used and else the CPU, with
            one line in the log that says why.
        name: What to call the model in messages.

    Raises:
        DeviceError: ``cuda`` can't be used.
        ArtifactError: onnxruntime can't load the model.
        GenerationError: There is no such provider.
    """
    check_provider(ep)
    if ep == "cpu":
        return _on_cpu(model, options, name=name)
    reason = cuda_obstacle()
    if reason is None:
        session, reason = _on_cuda(model, options)
        if session is not None:
            return session
    if ep == "cuda":
        raise DeviceError(f"CUDA can't be used: {reason}. Use --ep cpu, or see to that first.")
    if CUDA in onnxruntime.get_available_providers():
        logger.info("Running on the CPU: %s.", reason)
    return _on_cpu(model, options, name=name)


def check_provider(ep: str) -> None:
    """Raise GenerationError if there is no such provider."""
    if ep not in get_args(Provider):
        raise GenerationError(f"The provider is {ep!r:.60}. Give auto, cpu or cuda.")


def tries_cuda(ep: Provider) -> bool:
    """Whether a session on this provider runs on CUDA, as far as can be told before it is made."""
    return ep != "cpu" and cuda_obstacle() is None


def cuda_obstacle() -> str | None:
    """Return why CUDA can't be used here, as far as can be told before a session is made."""
    if CUDA not in onnxruntime.get_available_providers():
        return "this build of onnxruntime has no CUDA provider (the package onnxruntime-gpu has it)"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver was found"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count:
        return "the NVIDIA driver finds no GPU that it can use"
    return None


def _on_cpu(
    model: str | bytes, options: onnxruntime.SessionOptions, *, name: Path
) -> onnxruntime.InferenceSession:
    try:
        return _session(model, options, [CPU])
    except ORT_ERRORS as error:
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} can't load {name}: {ort_message(error)}"
        ) from error


def _on_cuda(
    model: str | bytes, options: onnxruntime.SessionOptions
) -> tuple[onnxruntime.InferenceSession | None, str]:
    """Return a session, or None and the reason."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    try:
        with _silent_log():
            session = _session(model, options, [(CUDA, _CUDA_OPTIONS), CPU])
    except ORT_ERRORS as error:
        return None, ort_message(error)
    if CUDA in session.get_providers():
        return session, ""
    missing = printed.getvalue().strip().partition("\n")[0]
    hint = "its CUDA or cuDNN libraries can't be loaded (pip install 'onnxruntime-gpu[cuda,cudnn]')"
    return None, f"{hint}: {missing}" if missing else hint


def _session(
    model: str | bytes,
    options: onnxruntime.SessionOptions,
    providers: Sequence[str | tuple[str, dict[str, str]]],
) -> onnxruntime.InferenceSession:
    # without enable_fallback=0, onnxruntime prints to stdout and tries other providers by itself
    return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)


@contextlib.contextmanager
def _silent_log() -> Iterator[None]:
    """Keep onnxruntime from telling on stderr what we tell in one line."""
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def ort_message(error: Exception) -> str:
    """Return onnxruntime's words without its codes, on one line."""
    return " ".join(str(error).rpartition("[ONNXRuntimeError] : ")[2].split())

"""Kernels compiled by NVRTC, which needs no GPU, and what is kept of that."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="NVIDIA's Python packages aren't installed")

from alloc_moe.runtime.cuda import compiling
from alloc_moe.runtime.errors import DeviceError

KERNELS = (
    "embed<64>",
    "linear<64, 0, 1, 4, true>",
    "attention<64, 2>",
    "attention<192, 1>",
    "route<64, 2, 32, true>",
    "gate_up<64, 0, 0, 1, 4>",
    "down<64, 0, 0, 0, 1, 8>",
    "grouped_down<64, 128, 3>",
    "append<192>",
    "flash<64>",
    "flash<192>",
    "grouped_gate_up_blocks<192, 4, 256, 4, 3>",
    "grouped_gate_up_blocks<192, 8, 128, 3, 3>",
    "grouped_down_blocks<64, 4, 128, 3, 3>",
    "grouped_down_blocks<64, 8, 256, 4, 3>",
    "decode_weight<4>",
    "decode_weight<8>",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep compiled kernels in a folder of the test's own."""
    monkeypatch.setenv("ALLOC_MOE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_all_kernels_compile(capability: tuple[int, int]) -> None:
    cubin, names = compiling.compile_kernels(KERNELS, dtype="float16", capability=capability)
    assert cubin.startswith(b"\x7fELF")
    assert set(names) == set(KERNELS)


def test_kernels_that_are_tried_out_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOC_MOE_KERNEL_FLAGS", "-DGROUPS_IN_ATTENTION")
    cubin, _ = compiling.compile_kernels(["flash<64>"], dtype="bfloat16", capability=(9, 0))
    assert cubin.startswith(b"\x7fELF")
    monkeypatch.setenv("ALLOC_MOE_KERNEL_FLAGS", "-DNO_SUCH(")
    with pytest.raises(DeviceError, match="NVRTC can't compile the kernels"):
        compiling.compile_kernels(["flash<64>"], dtype="bfloat16", capability=(9, 0))


def test_a_kept_result_is_read_and_a_damaged_one_made_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    kernels, settings = ["embed<32>"], {"dtype": "bfloat16", "capability": (8, 0)}

    def is_compiled() -> bool:
        caplog.clear()
        assert compiling.compile_kernels(kernels, **settings) == first
        return "Compiling 1 kernels" in caplog.text

    first = compiling.compile_kernels(kernels, **settings)
    assert "Compiling 1 kernels" in caplog.text
    assert not is_compiled()
    (file,) = folder.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert is_compiled()


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALLOC_MOE_CACHE", str(tmp_path / "file"))
    cubin, _ = compiling.compile_kernels(["embed<32>"], dtype="float32", capability=(8, 0))
    assert cubin.startswith(b"\x7fELF")


def test_what_nvrtc_refuses_is_one_sentence() -> None:
    with pytest.raises(DeviceError, match="NVRTC can't compile the kernels"):
        compiling.compile_kernels(["nothing<1>"], dtype="float16", capability=(9, 0))

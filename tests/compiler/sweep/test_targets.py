"""A sweep of ways to spend bytes: its plans are those of a compile, and none is made twice."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from alloc_moe.compiler.commands.alloc_compile import compile_command
from alloc_moe.compiler.commands.alloc_sweep import sweep_command
from alloc_moe.compiler.errors import SweepError
from alloc_moe.compiler.sweep import models, running, targets
from alloc_moe.compiler.sweep.models import WeightType
from alloc_moe.compiler.sweep.records import Cell, SweepResults
from alloc_moe.compiler.sweep.report.tables import from_csv
from alloc_moe.compiler.sweep.targets import ladder
from alloc_moe.compiler.sweep.ways import WAYS, parse_ways
from alloc_moe.runtime.artifact.files import find_artifact

TEXT = "few of the experts are chosen; a router of the layer is enough for them. " * 3
SIZES = "90KB,150KB"
pytestmark = pytest.mark.slow


def swept(model: Path, folder: Path, *options: object) -> Result:
    text = folder.parent / "heldout.txt"
    text.write_text(TEXT)
    given = [model, "--text", text, "--tokens", 256, "-o", folder, "--threads", 1, *options]
    return CliRunner().invoke(sweep_command, list(map(str, given)))

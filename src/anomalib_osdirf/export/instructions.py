# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What OpenVINO does to a process for the sake of matrix instructions (AMX), and how the process survives it."""

import ctypes
import logging
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "ONEDNN_MAX_CPU_ISA"
WITHOUT_AMX = "AVX512_CORE_FP16"

_DISABLED = 2  # SS_DISABLE
_ROOM = 2**16

# One INT8 and one bfloat16 matrix product, by the library that OpenVINO's CPU plugin computes with.
_TRIAL = """
import numpy as np, openvino as ov
from openvino import opset13 as ops
x = ops.parameter([1, 64, 64], np.float32)
weights = ops.constant(np.eye(64, dtype=np.float32))
scale = [np.float32(value) for value in (-1, 1, -1, 1)]
y = ops.matmul(ops.fake_quantize(x, *scale, 256), ops.fake_quantize(weights, *scale, 255), False, True)
y = ops.matmul(ops.relu(y), weights, False, True)
ov.compile_model(ov.Model([y], [x]), "CPU")(np.ones((1, 64, 64), np.float32))
"""


@lru_cache(maxsize=1)
def amx_is_broken() -> bool:
    """Tell, by a trial in another process, whether OpenVINO's matrix instructions (AMX) kill a process here."""
    flags = Path("/proc/cpuinfo")
    if os.environ.get(VARIABLE) or not flags.is_file() or "amx_tile" not in flags.read_text(encoding="utf-8"):
        return False
    trial = subprocess.run([sys.executable, "-c", _TRIAL], check=False, capture_output=True)
    return trial.returncode < 0


def avoid_broken_instructions() -> None:
    """Keep this process from dying of matrix instructions; to be called before OpenVINO computes anything in it."""
    if not os.environ.get(VARIABLE) and amx_is_broken():
        os.environ[VARIABLE] = WITHOUT_AMX
        logger.warning(
            "This machine announces AMX instructions and kills whoever uses them, so OpenVINO goes without in this "
            "process; set %s=%s for other programs that run INT8 or bfloat16 models here.",
            VARIABLE,
            WITHOUT_AMX,
        )


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def make_room_for_signals() -> None:
    """Let signals be handled on this thread's own stack again; to be called after OpenVINO has compiled a model in it.

    Where the processor has AMX, OpenVINO's CPU plugin (2026.4) sets a signal stack of the size that the kernel needs to
    store the registers, and nothing more. Python's handlers are run on it: Ctrl-C, or the end of a child process, would
    be a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        return
    present, none, library = _SignalStack(), _SignalStack(None, _DISABLED, 0), ctypes.CDLL(None)
    library.sigaltstack(None, ctypes.byref(present))
    if not present.flags & _DISABLED and present.size < _ROOM:
        library.sigaltstack(ctypes.byref(none), None)

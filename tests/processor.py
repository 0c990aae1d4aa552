# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What the processor of this machine does by default, and what a model asks it for."""

from pathlib import Path


def has_bfloat16() -> bool:
    """Tell whether OpenVINO's CPU plugin computes in bfloat16 unless told otherwise."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def precisions(file: Path) -> set[str]:
    """Name the precisions that OpenVINO's CPU plugin computes a model in at default settings."""
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU")
    return {node.get_rt_info()["runtimePrecision"].astype(str) for node in compiled.get_runtime_model().get_ops()}

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What the processor of this machine does by default."""


def has_bfloat16() -> bool:
    """Tell whether OpenVINO's CPU plugin computes in bfloat16 unless told otherwise."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

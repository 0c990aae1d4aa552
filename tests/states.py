# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""State dicts, which hold tensors and, of a scorer, plain values."""

from typing import Any

import torch


def assert_same_state(one: dict[str, Any], other: dict[str, Any], rtol: float, atol: float) -> None:
    """Compare two state dicts: tensors within tolerances, NaN equal to NaN, plain values exactly."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                value, other[name], rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert value == other[name], name

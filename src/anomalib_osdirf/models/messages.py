# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Messages common to all models."""

NEVER_FITTED = (
    "This model was never fitted, so it can't score images; train it first, or pass ckpt_path of a finished training."
)

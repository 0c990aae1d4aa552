# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's and NNCF's usage statistics, which they send to their makers unless a user has opted out."""

import sys


def send_nothing() -> None:
    """Keep OpenVINO and NNCF from sending usage statistics, if nobody has imported them yet.

    Both do without the package that sends them where it can't be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

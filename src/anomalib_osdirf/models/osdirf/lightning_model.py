# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSD-IRF as an anomalib model."""

from typing import Any

from anomalib.models.components import AnomalibModule

from anomalib_osdirf.export.exact_export import ExactExport
from anomalib_osdirf.models.osdirf.torch_model import OSDIRFModel
from anomalib_osdirf.registration import register
from anomalib_osdirf.training.field_training import FieldTraining


class OSDIRF(FieldTraining, ExactExport, AnomalibModule):  # type: ignore[misc] # parents' to_onnx differ
    """One-step diffusion with the inverse residual field (OSD-IRF, arXiv 2604.18393).

    A denoiser is trained on the features of normal images. At test time one evaluation gives the inverse residual
    field. Its negative log density, in units of held-out normal variation, is the anomaly map.

    Args:
        timestep: Timestep of the noise schedule, 0 to 999, at which the field is read. Defaults to ``200``.
        density: ``position``, a Gaussian per position and cluster of images, for aligned parts; ``mixture``, a mixture
            of Gaussians shared by all positions, for parts that lie anywhere; ``auto``, whichever finds more of the
            anomalies painted on held-out training images; or ``standard``, the paper's N(0, I). Defaults to ``auto``.
        max_steps: Optimiser steps to train for; ``trainer.max_steps`` and ``trainer.max_epochs`` override it.
            Defaults to ``None``: 300 steps.
        **arguments: Those of :class:`~anomalib_osdirf.training.field_training.FieldTraining`.

    Raises:
        ValueError: If an argument is unknown or out of range.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> model = OSDIRF(backbone="mobilenetv2_100", backbone_weights="mobilenetv2_100.safetensors")
        >>> Engine().train(model, datamodule=Folder("parts", root="parts", normal_dir="good"))  # doctest: +SKIP
    """

    model: OSDIRFModel
    network_class = OSDIRFModel
    default_steps = 300

    def __init__(
        self,
        timestep: int = 200,
        density: str = "auto",
        max_steps: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)


register(OSDIRF)

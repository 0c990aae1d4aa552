# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""InvAD as an anomalib model."""

from typing import Any

from anomalib.models.components import AnomalibModule

from anomalib_osdirf.export.exact_export import ExactExport
from anomalib_osdirf.models.invad.torch_model import InvADModel
from anomalib_osdirf.registration import register
from anomalib_osdirf.training.field_training import FieldTraining


class InvAD(FieldTraining, ExactExport, AnomalibModule):  # type: ignore[misc] # parents' to_onnx differ
    """Anomaly detection by DDIM inversion of features (InvAD, arXiv 2504.05662).

    A denoiser is trained on the features of normal images, as for OSD-IRF. At test time several steps of DDIM
    inversion, with one evaluation each, map them to a latent. Its norm at each position is the anomaly map.

    Args:
        whiten: Scale the principal components to unit variance; no effect with ``feature_dim=None``. Defaults to
            ``True``.
        prediction_type: What the denoiser's network predicts: ``v_prediction``, the velocity, from which the noise
            follows, or ``epsilon``, the noise itself. Defaults to ``v_prediction``.
        num_inference_steps: Number of inversion steps, one evaluation of the denoiser each. Defaults to ``3``.
        timestep_spacing: Timesteps at which the denoiser is evaluated: ``paper`` ([333, 666, 999] for three steps),
            ``released`` ([0, 500, 999], as in the released code), or a list. Defaults to ``released``.
        image_score: ``nll``, the negative log density of the whole latent; ``diff``, the largest minus the smallest
            norm at any position; or ``nll_diff``, the sum of both, standardised on training images. Defaults to
            ``nll_diff``.
        max_steps: Optimiser steps to train for; ``trainer.max_steps`` and ``trainer.max_epochs`` override it.
            Defaults to ``600``.
        **arguments: Those of :class:`~anomalib_osdirf.training.field_training.FieldTraining`.

    Raises:
        ValueError: If an argument is unknown or out of range.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> model = InvAD(backbone="mobilenetv2_100", backbone_weights="mobilenetv2_100.safetensors")
        >>> Engine().train(model, datamodule=Folder("parts", root="parts", normal_dir="good"))  # doctest: +SKIP
    """

    model: InvADModel
    network_class = InvADModel
    needs_denoiser = True

    def __init__(
        self,
        whiten: bool = True,
        prediction_type: str = "v_prediction",
        num_inference_steps: int = 3,
        timestep_spacing: str | list[int] = "released",
        image_score: str = "nll_diff",
        max_steps: int = 600,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)


register(InvAD)

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The network of OSD-IRF: image -> features -> one evaluation of the denoiser -> density -> map and score."""

from collections.abc import Sequence
from typing import Any

from anomalib.data import InferenceBatch
from torch import Tensor

from anomalib_osdirf.denoisers import fold
from anomalib_osdirf.density import IMAGE_SCORES, image_score
from anomalib_osdirf.diffusion import STATES, check_timestep, inverse_residual_field
from anomalib_osdirf.models.feature_network import FeatureNetwork, ReadOutNetwork, upsampled


class OSDIRFModel(FeatureNetwork):
    """OSD-IRF as a torch module.

    Args:
        timestep: Timestep t at which the field is read, 0 to 999.
        state: What the denoiser is asked about: ``clean`` features z or ``scaled`` ones, sqrt(abar_t) z.
        image_score: How the map becomes one score.
        **arguments: Arguments of :class:`~anomalib_osdirf.models.feature_network.FeatureNetwork`.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    def __init__(self, timestep: int, state: str, image_score: str, **arguments: Any) -> None:  # noqa: ANN401
        check_timestep("timestep", timestep)
        if state not in STATES:
            msg = f"state={state!r} is unknown; use one of {', '.join(STATES)}."
            raise ValueError(msg)
        if image_score not in IMAGE_SCORES:
            msg = f"image_score={image_score!r} is unknown; use one of {', '.join(IMAGE_SCORES)}."
            raise ValueError(msg)
        super().__init__(**arguments)
        self.timestep = timestep
        self.state = state
        self.image_score = image_score

    def deploy(self) -> "DeployedOSDIRF":
        """See :meth:`FeatureNetwork.deploy`."""
        return DeployedOSDIRF(self)


class DeployedOSDIRF(ReadOutNetwork):
    """The part of a fitted :class:`OSDIRFModel` that scores images: the inverse residual field and its density.

    Args:
        model: The fitted model.
    """

    def __init__(self, model: OSDIRFModel) -> None:
        super().__init__(model)
        self.denoiser = fold(model.ema.module, model.timestep)
        self.abar = model.schedule.abar(model.timestep)
        self.state = model.state
        self.image_score = model.image_score

    def field(self, z: Tensor) -> Tensor:
        """Inverse residual field, in noise standard deviations: one evaluation of the denoiser."""
        return inverse_residual_field(self.denoiser, z, self.abar, self.state)

    def read_out(self, field: Tensor, size: Sequence[int]) -> InferenceBatch:
        """Negative log densities in nats, as a map and as one score."""
        nll = self.density(field.float())
        return InferenceBatch(pred_score=image_score(nll, self.image_score), anomaly_map=upsampled(nll[:, None], size))

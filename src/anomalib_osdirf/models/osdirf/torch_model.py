# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSD-IRF as a torch module: the field of one evaluation of the denoiser, and its density."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from anomalib_osdirf.diffusion import check_timestep, inverse_residual_field
from anomalib_osdirf.models.field_model import FieldModel
from anomalib_osdirf.models.field_network import FieldNetwork
from anomalib_osdirf.models.scorer import Scorer


class OSDIRFModel(FieldModel):
    """OSD-IRF (arXiv 2604.18393); other arguments are :class:`~anomalib_osdirf.models.field_network.FieldNetwork`'s."""

    def __init__(self, timestep: int, density: str, **arguments: Any) -> None:
        check_timestep("timestep", timestep)
        scorer = Scorer(density)
        # A network that predicts the velocity and starts at 0 has the features, scaled, for its field: no denoiser.
        network = FieldNetwork(one_step_field, [timestep], whiten=False, prediction_type="v_prediction", **arguments)
        super().__init__(network, scorer)


def one_step_field(denoisers: Sequence[Callable[[Tensor], Tensor]], z: Tensor, abars: Sequence[float]) -> Tensor:
    """Inverse residual field ``(B, D, h, w)`` of features z at the one timestep given."""
    return inverse_residual_field(denoisers[0], z, abars[0])

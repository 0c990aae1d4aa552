# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The read-out of InvAD: DDIM inversion in several steps, and the density of the latent that it ends at."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_osdirf.denoisers import fold
from anomalib_osdirf.diffusion import ddim_inversion, inversion_timesteps
from anomalib_osdirf.models.feature_network import FeatureNetwork, ReadOutNetwork, upsampled

SCORE_TERMS = {"nll": ("nll",), "diff": ("diff",), "nll_diff": ("nll", "diff")}


class InvADModel(FeatureNetwork):
    """InvAD as a torch module.

    Args:
        num_inference_steps: Number of inversion steps, one evaluation of the denoiser each.
        timestep_spacing: ``paper``, ``released``, or the timesteps themselves.
        image_score: ``nll``, ``diff`` or ``nll_diff``.
        **arguments: Arguments of :class:`~anomalib_osdirf.models.feature_network.FeatureNetwork`.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    def __init__(
        self,
        num_inference_steps: int,
        timestep_spacing: str | Sequence[int],
        image_score: str,
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        if image_score not in SCORE_TERMS:
            msg = f"image_score={image_score!r} is unknown; use one of {', '.join(SCORE_TERMS)}."
            raise ValueError(msg)
        if arguments["denoiser"] == "none":
            msg = "denoiser=none leaves InvAD nothing to invert with; use another one, or OSDIRF with state=clean."
            raise ValueError(msg)
        timesteps = inversion_timesteps(num_inference_steps, timestep_spacing)
        super().__init__(**arguments)
        self.timesteps = timesteps
        self.image_score = image_score
        self.score = self.build_sum(len(SCORE_TERMS[image_score]))

    def deploy(self) -> "DeployedInvAD":
        """See :meth:`FeatureNetwork.deploy`."""
        return DeployedInvAD(self)


class DeployedInvAD(ReadOutNetwork):
    """The part of a fitted :class:`InvADModel` that scores images; it holds a folded denoiser for each timestep.

    Args:
        model: The fitted model.
    """

    def __init__(self, model: InvADModel) -> None:
        super().__init__(model)
        averaged = model.averaged_denoiser()
        self.denoisers = nn.ModuleList(fold(averaged, timestep) for timestep in model.timesteps)
        self.abars = [model.schedule.abar(timestep) for timestep in model.timesteps]
        self.terms = SCORE_TERMS[model.image_score]
        self.score = model.score

    def field(self, z: Tensor) -> Tensor:
        """Latent z_T at the end of the inversion, in noise standard deviations."""
        return ddim_inversion(list(self.denoisers), z, self.abars)

    def fitted_buffers(self) -> dict[str, Tensor]:
        """See :meth:`ReadOutNetwork.fitted_buffers`."""
        buffers = {**super().fitted_buffers(), **dict(self.score.named_buffers(prefix="score"))}
        buffers.pop("log_normaliser", None)
        return buffers

    def read_out(self, field: Tensor, size: Sequence[int], details: Tensor | None = None) -> InferenceBatch:
        """Length of the latent at each position as a map (Mahalanobis, where the density is fitted), and one score."""
        field = field.float()
        distance = self._distance(field)
        return InferenceBatch(
            pred_score=self.total(self._score_terms(distance), field),
            anomaly_map=upsampled(distance.unflatten(1, (1, *field.shape[-2:])), size),
        )

    def terms_of(self, field: Tensor) -> Tensor:
        """See :meth:`ReadOutNetwork.terms_of`."""
        return self._score_terms(self._distance(field))

    def _distance(self, field: Tensor) -> Tensor:
        return self.density.squared_distance(field).sqrt()

    def _score_terms(self, distance: Tensor) -> Tensor:
        """NLL of the whole latent, and largest minus smallest length of any position: shape ``(B, terms)``.

        The NLL goes without its factor and its constant, which the standardisation would take away again.
        """
        terms = {
            "nll": lambda: distance.square().sum(dim=1),
            "diff": lambda: distance.amax(dim=1) - distance.amin(dim=1),
        }
        return torch.stack([terms[name]() for name in self.terms], dim=1)

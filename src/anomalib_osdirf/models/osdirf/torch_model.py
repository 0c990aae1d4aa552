# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The network of OSD-IRF: image -> features -> one evaluation of the denoiser -> density -> map and score."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor

from anomalib_osdirf.denoisers import fold
from anomalib_osdirf.density import BlockGaussian, Density, SumByKind, image_score
from anomalib_osdirf.diffusion import STATES, check_timestep, inverse_residual_field
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.feature_network import FeatureNetwork, ReadOutNetwork, upsampled

SCORE_TERMS = {"max": ("max",), "top_k": ("top_k",), "mean": ("mean",), "max_top_k": ("max", "top_k")}
_NOISE_SEED = 0


class OSDIRFModel(FeatureNetwork):
    """OSD-IRF as a torch module.

    Args:
        timestep: Timestep t at which the field is read, 0 to 999.
        state: What the denoiser is asked about: ``clean`` features z, ``scaled`` ones, sqrt(abar_t) z, or ``noised``
            ones, sqrt(abar_t) z + sqrt(1 - abar_t) eps with one fixed noise field eps.
        image_score: How the field's map becomes one score, a key of :data:`SCORE_TERMS`.
        map_grid_size: Side of the finer grid whose features' own density the map has added; ``None`` for none.
        **arguments: Arguments of :class:`~anomalib_osdirf.models.feature_network.FeatureNetwork`.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    noise: Tensor | None

    def __init__(
        self,
        timestep: int,
        state: str,
        image_score: str,
        map_grid_size: int | None = None,
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        check_timestep("timestep", timestep)
        if state not in STATES:
            msg = f"state={state!r} is unknown; use one of {', '.join(STATES)}."
            raise ValueError(msg)
        if image_score not in SCORE_TERMS:
            msg = f"image_score={image_score!r} is unknown; use one of {', '.join(SCORE_TERMS)}."
            raise ValueError(msg)
        if arguments["denoiser"] == "none" and state != "clean":
            msg = f"denoiser=none takes the features themselves as the field, not state={state!r}; add state=clean."
            raise ValueError(msg)
        super().__init__(**arguments)
        if map_grid_size is not None and map_grid_size < 1:
            msg = f"map_grid_size={map_grid_size} is not a positive number of positions; use 32, or null for none."
            raise ValueError(msg)
        self.feature_density = (
            None if map_grid_size is None else BlockGaussian(self.whitening.out_channels, map_grid_size)
        )
        self.map_grid_size = map_grid_size
        self.timestep = timestep
        self.state = state
        self.image_score = image_score
        self.score = self.build_sum(len(SCORE_TERMS[image_score]))
        noise = None
        if state == "noised":
            size = (self.whitening.out_channels, arguments["grid_size"], arguments["grid_size"])
            noise = torch.randn(size, generator=torch.Generator().manual_seed(_NOISE_SEED), device="cpu")
        self.register_buffer("noise", noise)

    def deploy(self) -> "DeployedOSDIRF":
        """See :meth:`FeatureNetwork.deploy`."""
        return DeployedOSDIRF(self)


class DeployedOSDIRF(ReadOutNetwork):
    """The part of a fitted :class:`OSDIRFModel` that scores images: the inverse residual field and its density.

    Args:
        model: The fitted model.
    """

    noise: Tensor | None

    def __init__(self, model: OSDIRFModel) -> None:
        super().__init__(model)
        self.denoiser = fold(model.averaged_denoiser(), model.timestep)
        self.abar = model.schedule.abar(model.timestep)
        self.state = model.state
        self.register_buffer("noise", model.noise)
        self.terms = SCORE_TERMS[model.image_score]
        self.score = model.score
        self.feature_density: Density | None = model.feature_density
        self.details_size = model.map_grid_size

    def field(self, z: Tensor) -> Tensor:
        """Inverse residual field, in noise standard deviations: one evaluation of the denoiser."""
        return inverse_residual_field(self.denoiser, z, self.abar, self.state, self.noise)

    @property
    def has_constants(self) -> bool:
        """See :meth:`ReadOutNetwork.has_constants`; one term alone stays in nats, unless kinds differ in theirs."""
        return len(self.terms) > 1 or isinstance(self.score, SumByKind)

    def _details(self, maps: list[Tensor]) -> Tensor | None:
        """Features z on the map's grid, shape ``(B, D, map_grid_size, map_grid_size)``."""
        if self.details_size is None:
            return None
        z: Tensor = self.whitening(self.backbone.fine(maps, self.details_size))
        return z

    def fit_details(self, moments: StreamingMoments) -> None:
        """Fit the features' own density."""
        assert isinstance(self.feature_density, BlockGaussian)
        self.feature_density.fit_moments(moments, StreamingMoments())
        self.feature_density.num_images = moments.count

    @contextmanager
    def leaving_out(self, fields: Callable[[], Density], details: StreamingMoments | None) -> Iterator[None]:
        """See :meth:`ReadOutNetwork.leaving_out`."""
        kept = self.feature_density
        if isinstance(kept, BlockGaussian) and details is not None:
            self.feature_density = kept.leave_one_out(details)
        try:
            with super().leaving_out(fields, details):
                yield
        finally:
            self.feature_density = kept

    def fitted_buffers(self) -> dict[str, Tensor]:
        """See :meth:`ReadOutNetwork.fitted_buffers`."""
        details = dict(self.feature_density.named_buffers(prefix="feature_density")) if self.feature_density else {}
        constants = dict(self.score.named_buffers(prefix="score")) if self.has_constants else {}
        return {**super().fitted_buffers(), **details, **constants}

    def read_out(self, field: Tensor, size: Sequence[int], details: Tensor | None = None) -> InferenceBatch:
        """Negative log densities in nats as a map, and one score of the field, a sum or, in nats, its one term."""
        field = field.float()
        nll = self.density.map(field)
        terms = self._score_terms(nll)
        score = self.total(terms, field) if self.has_constants else terms.squeeze(1)
        anomaly_map = upsampled(nll, size)
        if self.feature_density is not None and details is not None:
            anomaly_map = anomaly_map + upsampled(self.feature_density.map(details.float()), size)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def terms_of(self, field: Tensor) -> Tensor:
        """See :meth:`ReadOutNetwork.terms_of`; in nats."""
        return self._score_terms(self.density.map(field))

    def _score_terms(self, nll: Tensor) -> Tensor:
        """Return what the image score is summed of, shape ``(B, terms)``, nats."""
        return torch.stack([image_score(nll, term) for term in self.terms], dim=1)

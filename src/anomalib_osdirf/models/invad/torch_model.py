# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""InvAD as a torch module: DDIM inversion in several steps, and the density of the latent that it ends at."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_osdirf.diffusion import ddim_inversion, inversion_timesteps
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.field_model import FieldModel
from anomalib_osdirf.models.field_network import FieldNetwork
from anomalib_osdirf.models.region import RegionOfInterest
from anomalib_osdirf.models.scorer import Fit, Images, extremes_of_maps, map_of
from anomalib_osdirf.processes import ALONE, DistributedContext

IMAGE_SCORES = {"nll": ("nll",), "diff": ("diff",), "nll_diff": ("nll", "diff")}
# Below this share of its size, a quantity that should vary between images is rounding noise.
_NO_SPREAD = 1e-6


class InvADModel(FieldModel):
    """InvAD (arXiv 2504.05662); other arguments are :class:`~anomalib_osdirf.models.field_network.FieldNetwork`'s."""

    def __init__(
        self,
        num_inference_steps: int,
        timestep_spacing: str | Sequence[int],
        image_score: str,
        **arguments: Any,
    ) -> None:
        if arguments["denoiser"] == "none":
            raise ValueError("denoiser=none leaves InvAD nothing to invert with; use another one, or OSDIRF.")
        timesteps = inversion_timesteps(num_inference_steps, timestep_spacing)
        scorer = LatentScorer(image_score)
        super().__init__(FieldNetwork(ddim_inversion, timesteps, **arguments), scorer)


class LatentScorer(nn.Module):
    """Map and score of a latent that is N(0, I) for normal images.

    The map is the latent's length at each position. The score is the sum of the negative log density of the whole
    latent and of Diff, the largest minus the smallest length, each in standard deviations of training images, or one of
    them. (The released evaluation scales both by their minima and maxima over the test set, anomalies included.)
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, image_score: str) -> None:
        super().__init__()
        if image_score not in IMAGE_SCORES:
            raise ValueError(f"image_score={image_score!r} is unknown; use one of {', '.join(IMAGE_SCORES)}.")
        self.names = IMAGE_SCORES[image_score]
        self.num_images = 0
        self.roi: RegionOfInterest | None = None  # the network's
        self.register_buffer("scale", torch.ones(len(self.names)))
        self.register_buffer("offset", torch.zeros(len(self.names)))

    def forward(self, field: Tensor, fine: Tensor, size: Sequence[int]) -> InferenceBatch:
        """Score latents z_T ``(B, D, h, w)``, and return maps of a size ``(H, W)``; fine features are not used."""
        del fine
        length = field.float().square().sum(dim=1).sqrt()
        anomaly_map = map_of(length, None, size, self.roi)
        return InferenceBatch(pred_score=self._score(self._terms(length)), anomaly_map=anomaly_map)

    def _score(self, terms: Tensor) -> Tensor:
        return (terms * self.scale + self.offset).sum(dim=1)

    def _terms(self, length: Tensor) -> Tensor:
        """Terms of the score, shape ``(B, terms)``; the NLL without factor and constant, which standardising undoes."""
        flat = length.flatten(1)
        terms = {"nll": flat.square().sum(dim=1), "diff": flat.amax(dim=1) - flat.amin(dim=1)}
        return torch.stack([terms[name] for name in self.names], dim=1)

    @torch.no_grad()
    def fit(
        self,
        images: Images,
        painted: Callable[[], Iterable[Any]] | None = None,
        processes: DistributedContext = ALONE,
        size: Sequence[int] = (1, 1),
        fine: Mapping[str, Any] | None = None,
    ) -> Fit:
        """Fit the score normalisation, see :meth:`~anomalib_osdirf.models.scorer.Scorer.fit`."""
        del painted, fine
        moments = StreamingMoments()
        terms, extremes = [], []
        for field, _, _ in images():
            length = field.float().square().sum(dim=1).sqrt()
            terms.append(self._terms(length))
            extremes.append(extremes_of_maps(length, None, size, self.roi))
            moments.update(terms[-1])
        moments = moments.pooled(processes)
        variance = moments.covariance().diagonal()
        deviation, root_mean_square = variance.sqrt(), (variance + moments.mean.square()).sqrt()
        scale = torch.where(deviation > _NO_SPREAD * root_mean_square, 1 / deviation, 1.0)
        self.scale.copy_(scale)
        self.offset.copy_(-scale * moments.mean)
        self.num_images = moments.count
        if self.roi is not None:
            self.roi.lowest.copy_(processes.gathered(torch.cat(extremes)[:, 1]).min())
        scores = self._score(torch.cat(terms))
        return Fit(self.scale.new_zeros(0), torch.cat([scores[:, None], torch.cat(extremes)], dim=1))

    def refit(self, images: Images, size: Sequence[int] = (1, 1)) -> Tensor:
        """Refit on the latents of a changed network."""
        return self.fit(images, size=size).held_out

    def buffers_in_use(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of the buffers that :meth:`refit` changes and scoring reads."""
        return self.named_buffers(recurse=False)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the state dict keeps besides tensors."""
        return {"num_images": self.num_images}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.num_images = state["num_images"]

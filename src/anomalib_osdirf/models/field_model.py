# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A field network and a scorer: image in, anomaly map and score out."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn

from anomalib_osdirf.features import tiles
from anomalib_osdirf.models.field_network import FieldNetwork, FrozenFieldNetwork
from anomalib_osdirf.models.messages import NEVER_FITTED

_TILES_AT_ONCE = 16


class FieldModel(nn.Module):
    """Scores images by the field of a network.

    Args:
        network: Image to field, a :class:`FieldNetwork` or, for deployment, a frozen one.
        scorer: Field to map and score, such as :class:`~anomalib_osdirf.models.scorer.Scorer`.
    """

    network: Any
    scorer: Any

    def __init__(self, network: nn.Module, scorer: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.scorer: Any = scorer
        self.scorer.roi = self.network.roi
        self.tiler: Tiler | None = None

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)``, or their tiles: the score of an image is then that of its worst tile.

        Raises:
            RuntimeError: If the scorer was never fitted.
        """
        self.check_fitted()
        if torch.compiler.is_exporting():
            return self._join(images, [self._score(some) for some in self.tiles_of(images)])
        with torch.autocast(images.device.type, enabled=False):
            return self._join(images, [self._score(some.float()) for some in self.tiles_of(images)])

    def _join(self, images: Tensor, parts: Sequence[InferenceBatch]) -> InferenceBatch:
        if self.tiler is None:
            return parts[0]
        scores, maps = (torch.cat([getattr(part, name) for part in parts]) for name in ("pred_score", "anomaly_map"))
        score = scores.view(len(images), -1).amax(dim=1)
        return InferenceBatch(pred_score=score, anomaly_map=tiles.join(self.tiler, maps, images.shape))

    def _score(self, images: Tensor) -> InferenceBatch:
        field, fine = self.network(images)
        batch: InferenceBatch = self.scorer(field, fine, images.shape[-2:])
        return batch

    def tiles_of(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the tiles of images ``(B, 3, H, W)``, some at a time, or the images where there is no tiler."""
        if self.tiler is None:
            yield images
        else:
            cut = tiles.cut(self.tiler, images)
            # At once in a graph, which would have the network once for each part.
            yield from cut.split(len(cut) if torch.compiler.is_exporting() else _TILES_AT_ONCE)

    def freeze(self) -> "FieldModel":
        """Return the same model for deployment, see :meth:`FieldNetwork.freeze`."""
        assert isinstance(self.network, FieldNetwork)
        frozen = FieldModel(self.network.freeze(), self.scorer).eval()
        frozen.tiler = self.tiler
        return frozen

    @property
    def is_frozen(self) -> bool:
        """Whether this is for deployment."""
        return isinstance(self.network, FrozenFieldNetwork)

    def check_fitted(self) -> None:
        """Raise an error if the scorer was never fitted."""
        if self.scorer.num_images == 0:
            raise RuntimeError(NEVER_FITTED)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FieldModel":
        """Convert weights, as every move to a device or precision does.

        Only the trained denoiser is converted to half precision: statistics, densities and averages need the digits.
        """
        for module in self.children():
            for name, child in module.named_children():
                child._apply(fn if name == "denoiser" else partial(_unless_half, fn))  # noqa: SLF001
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = _unless_half(fn, buffer)  # noqa: SLF001
        return self


def _unless_half(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a conversion, but for its precision if that is half."""
    converted = fn(tensor)
    return tensor.to(converted.device) if converted.dtype in {torch.float16, torch.bfloat16} else converted

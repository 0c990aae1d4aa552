# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Frozen backbones, cut after the last layer that is used, and the loading of their weights."""

import copy
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session  # type: ignore[attr-defined] # loaded lazily
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.features.batch_norm import fold_batch_norms
from anomalib_osdirf.features.filter_bank import FilterBank

FILTER_BANK = "filter_bank"
FINE = 2  # fine positions for one of the field's, in each direction
# Layers by default. Those of stride 2 and 4 cost detection where parts don't lie alike (docs/lab-notes.md).
_DEFAULT_STRIDES = (8, 16)
_IMAGES_AT_ONCE = 4  # on a CPU
_PATIENCE = 10.0  # seconds that the model hub has to answer


class Backbone(nn.Module):
    """A frozen network whose layers are brought to one grid, averaged over 3 x 3 positions and concatenated.

    The grid has ``2 * grid_size`` positions a side. These are the fine features; :func:`coarse` averages them onto the
    field's grid.

    Args:
        name: timm model name, or ``filter_bank`` for the fixed filters that need no weights.
        network: Maps an image ``(B, 3, H, W)`` to a list of feature maps, one for each layer.
        channels: Channels of each map.
        strides: Stride of each map.
        grid_size: Side of the field's grid, in positions.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        grid_size: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.out_channels = sum(channels)
        self.max_stride = max(strides)
        self.grid_size = grid_size

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: a frozen network's batch norms must not follow the training batches."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor) -> Tensor:
        """Extract fine features.

        Args:
            images: Pre-processed images, shape ``(B, 3, H, W)``.

        Returns:
            Shape ``(B, C, 2 * grid_size, 2 * grid_size)``.

        Raises:
            ValueError: If the image is too small for the grid.
        """
        side = FINE * self.grid_size
        features = torch.cat([resized(map_, side) for map_ in self.maps(images)], dim=1)
        # PatchCore's local average (Roth et al. 2022, section 3.1): a feature says what its surroundings look like.
        return functional.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the map of each layer, shape ``(B, C_l, H / s_l, W / s_l)``, of images as :meth:`forward` takes them.

        Raises:
            ValueError: If the image is too small for the grid.
        """
        height, width = images.shape[-2:]
        smallest = self.grid_size * self.max_stride
        if min(height, width) < smallest:
            msg = (
                f"grid_size={self.grid_size} with a layer of stride {self.max_stride} needs images of at least "
                f"{smallest} x {smallest} pixels, got {height} x {width}; use a smaller grid_size, layers of smaller "
                "stride, or a larger Resize in the pre-processor."
            )
            raise ValueError(msg)
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            maps: list[Tensor] = self.network(images)
            return maps
        # Large batches fall out of a processor's caches, and channels last suit its convolutions.
        few = images.contiguous(memory_format=torch.channels_last).split(_IMAGES_AT_ONCE)
        parts = [self.network(part) for part in few]
        return [torch.cat(part) for part in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def folded(self) -> "Backbone":
        """Return a copy for scoring, its batch norms folded into its convolutions."""
        copied = copy.deepcopy(self)
        copied.network = fold_batch_norms(self.network)
        return copied

    def load_pretrained(self, weights: str | Path | None) -> None:
        """Load pre-trained weights, from a local file or from the model hub.

        Args:
            weights: A ``.safetensors`` or ``.pth`` file, or ``None`` to download (or take from the hub's cache).

        Raises:
            ValueError: If the file is missing, unreadable or of another network.
            RuntimeError: If the download fails.
        """
        if self.name == FILTER_BANK:
            return
        state = self._download() if weights is None else self._read(Path(weights))
        network: Any = self.network.model
        missing = [key for key in network.state_dict() if key not in state]
        own_shapes = {key: value.shape for key, value in network.state_dict().items()}
        wrong = [key for key, shape in own_shapes.items() if key in state and state[key].shape != shape]
        if missing or wrong:
            msg = (
                f"backbone_weights={str(weights)!r} is not a weights file of {self.name}: of its {len(own_shapes)} "
                f"tensors {len(missing)} are missing and {len(wrong)} have another shape (first: "
                f"{(missing + wrong)[0]}); give the file of timm's {self.name}."
            )
            raise ValueError(msg)
        network.load_state_dict({key: state[key] for key in own_shapes})

    def _read(self, weights: Path) -> dict[str, Tensor]:
        if not weights.is_file():
            msg = f"backbone_weights={str(weights)!r} does not exist; give the path of a .safetensors or .pth file."
            raise ValueError(msg)
        try:
            return load_state_dict(str(weights), weights_only=True)
        except Exception as error:
            msg = (
                f"backbone_weights={str(weights)!r} can't be read as a .safetensors or .pth weights file (truncated or "
                f"of another format?); give the file of timm's {self.name}."
            )
            raise ValueError(msg) from error

    def _download(self) -> dict[str, Tensor]:
        offline = constants.HF_HUB_OFFLINE
        trouble = "HF_HUB_OFFLINE switches off" if offline else ""
        if not offline:
            try:
                get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            except Exception as error:  # noqa: BLE001 - of the HTTP library that the hub's client has
                # Have it look in its cache alone; it would try for a minute.
                trouble, constants.HF_HUB_OFFLINE = f"can't be reached ({type(error).__name__})", True
        try:
            return timm.create_model(self.name, pretrained=True).state_dict()
        except Exception as error:
            msg = (
                f"pre_trained=true needs the weights of {self.name} from the model hub, which "
                f"{trouble or f'failed ({type(error).__name__})'}; give a local file with --model.backbone_weights "
                f"(backbone_weights=<file>), or use backbone={FILTER_BANK}, which needs no weights."
            )
            raise RuntimeError(msg) from error
        finally:
            constants.HF_HUB_OFFLINE = offline


def resized(map_: Tensor, side: int) -> Tensor:
    """Bring a map ``(B, C, H, W)`` to ``side`` x ``side`` positions: averaged if it is larger, else interpolated."""
    size = (side, side)
    height, width = map_.shape[-2:]
    if (height, width) == size:
        return map_
    if min(height, width) < side:
        return functional.interpolate(map_, size=size, mode="bilinear", align_corners=False)
    if height % side == 0 and width % side == 0:  # the same, up to seven times as fast in OpenVINO
        return functional.avg_pool2d(map_, (height // side, width // side))
    return functional.adaptive_avg_pool2d(map_, size)


def coarse(fine: Tensor) -> Tensor:
    """Average fine features ``(B, C, 2 h, 2 w)`` onto the field's grid, shape ``(B, C, h, w)``."""
    return functional.avg_pool2d(fine, FINE)


def build_backbone(name: str, layers: Sequence[str] | None, grid_size: int) -> Backbone:
    """Build a backbone's architecture without loading any weights.

    Args:
        name: timm model name, or ``filter_bank``.
        layers: Names of the layers to use; ``None`` takes those of stride 8 and 16.
        grid_size: Side of the field's grid.

    Returns:
        The backbone, cut after the last of its layers.

    Raises:
        ValueError: If the name, a layer or the grid size is unknown or impossible.
    """
    if not isinstance(grid_size, int) or grid_size < 1:
        msg = f"grid_size={grid_size!r} is not a positive number of positions; 8 and 16 are usual."
        raise ValueError(msg)
    if name == FILTER_BANK:
        _check_layers(name, layers, FilterBank.LAYERS)
        filters = FilterBank(layers)
        return Backbone(name, filters, filters.channels, filters.strides, grid_size)
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}" if close else "timm.list_models() names them"
        msg = f"backbone={name!r} is not a timm model; {hint}, or use {FILTER_BANK!r}, which needs no weights."
        raise ValueError(msg)
    # timm's feature getter prunes every block behind the last one that is asked for.
    info = _feature_network(name, None).feature_info
    names, strides = info.module_name(), info.reduction()
    _check_layers(name, layers, names)
    if layers is None:
        indices = [index for index, stride in enumerate(strides) if stride in _DEFAULT_STRIDES]
        if not indices:
            msg = f"layers=null finds no layer of stride 8 or 16 in {name}; choose layers among {', '.join(names)}."
            raise ValueError(msg)
    else:
        indices = sorted(names.index(layer) for layer in layers)
    network = _feature_network(name, indices)
    info = network.feature_info
    return Backbone(name, network, info.channels(), info.reduction(), grid_size)


def _feature_network(name: str, indices: Sequence[int] | None) -> Any:  # noqa: ANN401 - timm's own wrapper, untyped
    arguments: dict[str, Any] = {} if indices is None else {"out_indices": tuple(indices)}
    try:
        return timm.create_model(name, pretrained=False, features_only=True, feature_cls="getter", **arguments)
    except (RuntimeError, AttributeError, TypeError) as error:
        msg = (
            f"backbone={name!r} offers no intermediate feature maps in timm; use another, efficientnet_b4 for example."
        )
        raise ValueError(msg) from error


def _check_layers(name: str, layers: Sequence[str] | None, known: Sequence[str]) -> None:
    if layers is None:
        return
    unknown = [layer for layer in layers if layer not in known]
    if unknown or not layers or len(set(layers)) != len(layers):
        msg = f"layers={list(layers)!r} must be distinct layers of {name}; choose among {', '.join(known)}."
        raise ValueError(msg)

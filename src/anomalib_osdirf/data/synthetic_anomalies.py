# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Anomalies painted onto normal images, to train on."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator, generate_perlin_noise
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms.v2.functional import resize

from anomalib_osdirf.data.reading import BrokenFileError, trouble_with

FOREGROUNDS = ("none", "auto")

_BLEND_FACTOR = (0.2, 0.8)
_PATCHES_PER_SIDE = 8
_ATTEMPTS = 10
# A border colour that leaves less than this share of an image as foreground was not a background's colour.
_SMALLEST_FOREGROUND = 0.05


class SyntheticAnomalies:
    """Paints an anomaly onto half of the images of a batch.

    anomalib's ``PerlinAnomalyGenerator`` gives the masks and blends textures; an image keeps a share of 0.2 to 0.8 of
    itself under the mask. Everything random follows the seed of the call, whatever the images' device.

    Args:
        anomaly_source_path: Folder of textures to fill masks with, searched with its subfolders.
        shuffled_patches: Fill masks with the image's own shuffled patches; done in any case where nothing else is.
        drawn_textures: Fill masks with clouds of two random colours. Of several fillings, chance takes one for each
            mask.
        foreground: ``auto`` limits anomalies to what differs from the colour of the image's border.
        foreground_masks: Folder of masks, not 0 where anomalies may be, each named as its image but for the extension.

    Raises:
        ValueError: If a folder is missing or empty, or an argument is unknown or contradicts another.
    """

    def __init__(
        self,
        anomaly_source_path: str | Path | None = None,
        shuffled_patches: bool = False,
        drawn_textures: bool = False,
        foreground: str = "none",
        foreground_masks: str | Path | None = None,
    ) -> None:
        check_foreground(foreground, foreground_masks)
        self.foreground = foreground
        # The generator draws one of its own constants when it is made.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.generator = PerlinAnomalyGenerator(anomaly_source_path, 1.0, _BLEND_FACTOR)
        if anomaly_source_path is not None:
            _check_folder("anomaly_source_path", anomaly_source_path, self.generator.anomaly_source_paths, "textures")
            self.generator.anomaly_source_paths.sort()  # the order of a folder's files is the file system's
        self.fillings: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = []
        if anomaly_source_path is not None:
            self.fillings.append(self._fill_with_textures)
        if drawn_textures:
            self.fillings.append(self._fill_with_clouds)
        if shuffled_patches or not self.fillings:
            self.fillings.append(self._fill_with_patches)
        self.masks: dict[str, Path] | None = None
        if foreground_masks is not None:
            files = [path for path in Path(foreground_masks).glob("*") if path.suffix.lower() in IMG_EXTENSIONS]
            _check_folder("foreground_masks", foreground_masks, files, "masks")
            self.masks = {path.stem: path for path in files}

    def check_masks(self, image_paths: Iterable[str]) -> None:
        """Refuse training images without a foreground mask, where foreground masks are used."""
        if self.masks is None:
            return
        missing = [path for path in image_paths if Path(path).stem not in self.masks]
        if missing:
            raise ValueError(
                f"foreground_masks has no mask for {len(missing)} of the training images, such as {missing[0]}; add "
                f"{Path(missing[0]).stem}.png, or use foreground='auto'."
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, image_paths: Sequence[str] | None, seed: int) -> tuple[Tensor, Tensor]:
        """Paint anomalies onto half of the images ``(B, 3, H, W)``, an odd number of them rounded by chance.

        Only foreground masks need the images' paths. Masks are 1 on the anomalies, else 0, ``(B, 1, H, W)``.
        """
        painted, masks = images.clone(), torch.zeros_like(images[:, :1])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            count = (len(images) + int(torch.randint(2, (1,)))) // 2
            for index in torch.randperm(len(images))[:count].tolist():
                image = images[index].cpu().float()
                allowed = self._foreground(image, None if image_paths is None else image_paths[index])
                painted[index], masks[index] = self._paint(image, allowed)
        return painted, masks

    def _paint(self, image: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Paint one image; it stays as it is where no mask meets the foreground."""
        for _ in range(_ATTEMPTS):
            painted, mask = self.fillings[int(torch.randint(len(self.fillings), (1,)))](image)
            mask = mask * allowed
            if mask.any():
                return torch.where(mask > 0, painted, image), mask
        return image, torch.zeros_like(allowed)

    def _fill_with_textures(self, image: Tensor) -> tuple[Tensor, Tensor]:
        try:
            painted, mask = self.generator(image)
        except RuntimeError as error:
            # The generator chose a file and did not say which.
            trouble = next(filter(None, map(trouble_with, self.generator.anomaly_source_paths)), None)
            if trouble is None:
                raise
            msg = f"anomaly_source_path has a broken texture: {trouble}; repair or remove it."
            raise BrokenFileError(msg) from error
        return painted, mask

    def _fill_with_patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self._fill(image, shuffle_patches(self.generator.augmenters(image), _PATCHES_PER_SIDE))

    def _fill_with_clouds(self, image: Tensor) -> tuple[Tensor, Tensor]:
        noise = generate_perlin_noise(image.shape[-2], image.shape[-1], device=image.device)
        first, second = torch.rand(2, 3, 1, 1)
        return self._fill(image, torch.lerp(first, second, (noise / 2 + 0.5).clamp(0, 1)))

    def _fill(self, image: Tensor, texture: Tensor) -> tuple[Tensor, Tensor]:
        """Blend a texture into the whole image, to be cut out with the mask."""
        _, mask = self.generator.generate_perturbation(image.shape[-2], image.shape[-1], image.device)
        low, high = _BLEND_FACTOR
        return torch.lerp(image, texture, low + (high - low) * torch.rand(1)), mask.permute(2, 0, 1)

    def _foreground(self, image: Tensor, path: str | None) -> Tensor:
        """Return 1 where an anomaly may be, shape ``(1, H, W)``."""
        if self.masks is not None:
            if path is None:
                msg = "foreground_masks needs the images' file names; train on a data set of files, or leave it out."
                raise ValueError(msg)
            self.check_masks([path])
            file = self.masks[Path(path).stem]
            try:
                mask = read_image(str(file), ImageReadMode.GRAY)
            except RuntimeError as error:
                trouble = trouble_with(file) or f"{str(file)!r} can't be read, as it is no PNG, JPEG, WebP or GIF file"
                msg = f"foreground_masks has a broken mask: {trouble}; repair or replace it."
                raise BrokenFileError(msg) from error
            return (resize(mask, list(image.shape[-2:]), antialias=True) > 127).to(image.dtype)
        if self.foreground == "auto":
            return automatic_foreground(image)
        return torch.ones_like(image[:1])


def shuffle_patches(image: Tensor, per_side: int) -> Tensor:
    """Put patches of an image ``(C, H, W)``, ``per_side`` squared, together in random order; odd rows stay."""
    channels, height, width = (
        size // divisor for size, divisor in zip(image.shape, (1, per_side, per_side), strict=True)
    )
    inner = image[:, : per_side * height, : per_side * width]
    patches = inner.reshape(channels, per_side, height, per_side, width).transpose(2, 3).flatten(1, 2)
    shuffled = patches[:, torch.randperm(per_side**2)].unflatten(1, (per_side, per_side)).transpose(2, 3)
    result = image.clone()
    result[:, : per_side * height, : per_side * width] = shuffled.reshape_as(inner)
    return result


def automatic_foreground(image: Tensor) -> Tensor:
    """Find the object on a plain background: what is far from the median colour of the border, by Otsu's threshold.

    Of an image ``(3, H, W)`` in [0, 1] this is 1 on the object, 0 elsewhere, ``(1, H, W)``; all 1 if none is found.
    """
    border = torch.cat((image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]), dim=1)
    distance = (image - border.median(dim=1).values[:, None, None]).norm(dim=0)
    levels = (255 * distance / distance.max().clamp_min(1e-6)).byte().numpy()
    _, binary = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    foreground = torch.from_numpy(cv2.medianBlur(binary, 5)).to(image.dtype)[None]
    return foreground if foreground.mean() > _SMALLEST_FOREGROUND else torch.ones_like(foreground)


def check_foreground(foreground: str, foreground_masks: str | Path | None) -> None:
    """Refuse an unknown choice of foreground, and one that contradicts a folder of masks."""
    if foreground not in FOREGROUNDS:
        raise ValueError(f"foreground={foreground!r} is unknown; use one of {', '.join(FOREGROUNDS)}.")
    if foreground == "auto" and foreground_masks is not None:
        msg = f"foreground='auto' and foreground_masks={str(foreground_masks)!r} exclude each other; leave one out."
        raise ValueError(msg)


def _check_folder(name: str, folder: str | Path, files: Sequence[Path], what: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError(f"{name}={str(folder)!r} is not a folder; give the path of a folder of {what}.")
    if not files:
        raise ValueError(f"{name}={str(folder)!r} holds no image; put {what} in it ({', '.join(IMG_EXTENSIONS)}).")

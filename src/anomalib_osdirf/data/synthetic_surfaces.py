# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""A data set that needs no download: surfaces with defects, drawn from a seed and kept as PNG files.

The files lie as in MVTec AD, so any anomalib model reads them::

    <root>/<category>/synthetic_surfaces.json
    <root>/<category>/train/good/000.png
    <root>/<category>/test/good/000.png
    <root>/<category>/test/<defect>/000.png
    <root>/<category>/ground_truth/<defect>/000_mask.png

A set that was drawn with other arguments keeps its folder; the new one goes to ``<root>/<category>-<digest>``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from numpy.typing import NDArray

from anomalib_osdirf.data.surface_drawing import SURFACES, draw_surface
from anomalib_osdirf.registration import register_datamodule

logger = logging.getLogger(__name__)

# Raise it whenever the same arguments would give other pictures.
GENERATOR_VERSION = 1
RECORD_NAME = "synthetic_surfaces.json"
MINIMUM_IMAGE_SIZE = 32
_PARTIAL = ".partial"
_LONGEST_DRAWING = 24 * 3600.0  # seconds
CATEGORIES = tuple(SURFACES)


class SyntheticSurfaces(AnomalibDataModule):
    """Drawn surfaces with defects: a data set that is made on the spot, without a download.

    Four surfaces, each with five kinds of defect: ``weave`` (a cloth), ``brushed_metal`` (a sheet under a lamp),
    ``printed_parts`` (a tray of parts, the only one whose pictures are aligned) and ``loose_parts`` (screws, washers
    and nuts that lie anywhere, turned any way). Brightness varies from picture to picture and defects keep to the
    surface's own range of values, so they show in structure rather than in brightness.

    Args:
        root (Path | str | None): Folder for the drawn files; anomalib's folder for data sets when ``None``.
            Defaults to ``"./datasets/SyntheticSurfaces"``.
        category (str): Which surface: ``"weave"``, ``"brushed_metal"``, ``"printed_parts"`` or ``"loose_parts"``.
            Defaults to ``"weave"``.
        num_train (int): Number of normal pictures to train on. Defaults to ``150``.
        num_test_good (int): Number of normal pictures to test on. Defaults to ``30``.
        num_test_per_defect (int): Number of test pictures of each of the five kinds of defect. Defaults to ``10``.
        image_size (int): Side of the pictures in pixels. Defaults to ``256``.
        seed (int): Seed of the drawings and of anomalib's splits. Defaults to ``0``.
        train_batch_size (int): Training batch size. Defaults to ``32``.
        eval_batch_size (int): Validation and test batch size. Defaults to ``32``.
        num_workers (int): Number of processes that read files; the files are small, so none is quickest.
            Defaults to ``0``.
        test_split_mode (TestSplitMode | str): How the test set is made. Defaults to ``TestSplitMode.FROM_DIR``.
        test_split_ratio (float): Share of the pictures for testing, where the mode asks for one. Defaults to ``0.2``.
        val_split_mode (ValSplitMode | str): How the validation set is made. Defaults to ``ValSplitMode.SAME_AS_TEST``.
        val_split_ratio (float): Share of the pictures for validation, where the mode asks for one. Defaults to ``0.5``.
        **augmentations: anomalib's augmentations: ``augmentations``, or ``train_augmentations``, ``val_augmentations``
            and ``test_augmentations``.

    Raises:
        ValueError: If the category is unknown, or a count, the image size or the seed is out of range.

    Example:
        >>> from anomalib_osdirf.data import SyntheticSurfaces
        >>> datamodule = SyntheticSurfaces(category="brushed_metal", num_train=20)
        >>> datamodule.prepare_data()  # doctest: +SKIP
        >>> datamodule.setup()  # doctest: +SKIP
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/SyntheticSurfaces",
        category: str = "weave",
        num_train: int = 150,
        num_test_good: int = 30,
        num_test_per_defect: int = 10,
        image_size: int = 256,
        seed: int = 0,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        **augmentations: Any,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
            **augmentations,
        )
        if category not in SURFACES:
            msg = f"category is {category!r}, which is not a drawn surface: choose one of {', '.join(CATEGORIES)}."
            raise ValueError(msg)
        for name, value, least in (
            ("num_train", num_train, 1),
            ("num_test_good", num_test_good, 1),
            ("num_test_per_defect", num_test_per_defect, 1),
            ("image_size", image_size, MINIMUM_IMAGE_SIZE),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, which is too small: use a whole number of at least {least}.")

        self.root = Path(resolve_dataset_root(root, "SyntheticSurfaces"))
        self.category = category
        self.num_train = num_train
        self.num_test_good = num_test_good
        self.num_test_per_defect = num_test_per_defect
        self.image_size = image_size
        self.drawing_seed = seed

    @property
    def record(self) -> dict[str, Any]:
        """Everything that decides what the pictures look like."""
        return {
            "generator_version": GENERATOR_VERSION,
            "category": self.category,
            "num_train": self.num_train,
            "num_test_good": self.num_test_good,
            "num_test_per_defect": self.num_test_per_defect,
            "image_size": self.image_size,
            "seed": self.drawing_seed,
        }

    @property
    def directory(self) -> Path:
        """Folder of this set: ``<root>/<category>``, unless another set or somebody else's files lie there."""
        plain = self.root / self.category
        if not plain.exists() or self._holds_this_set(plain):
            return plain
        digest = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:8]
        return self.root / f"{self.category}-{digest}"

    def _holds_this_set(self, directory: Path) -> bool:
        """Return whether a folder holds the set that the arguments describe."""
        try:
            return json.loads((directory / RECORD_NAME).read_text(encoding="utf-8")) == self.record
        except (OSError, ValueError):
            return False

    def _pictures(self) -> Iterator[tuple[str, str, str | None, int]]:
        """Yield the split, the folder, the defect and the number of each picture."""
        for number in range(self.num_train):
            yield "train", "good", None, number
        for number in range(self.num_test_good):
            yield "test", "good", None, number
        for defect in SURFACES[self.category].defects:
            for number in range(self.num_test_per_defect):
                yield "test", defect, defect, number

    def prepare_data(self) -> None:
        """Draw the set, unless it is there already.

        It is drawn in a temporary folder that is renamed when all is written, so neither an interruption nor another
        process that draws the same set leaves half a set behind. Nothing that exists is changed or deleted.
        """
        if self._holds_this_set(self.directory):
            logger.info("Found the drawn set in %s.", self.directory)
            return
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(f".{self.category}-*{_PARTIAL}"):
            if time.time() - left.stat().st_mtime > _LONGEST_DRAWING:  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.category}-", suffix=_PARTIAL, dir=self.root) as temporary:
            unfinished = Path(temporary) / self.category
            logger.info("Drawing the surfaces for %s.", self.directory)
            self._draw(unfinished)
            self._move_into_place(unfinished)

    def _draw(self, directory: Path) -> None:
        """Draw all pictures and masks, and the record last."""
        for split, folder, defect, number in self._pictures():
            # The name's checksum stands for the picture's group, so that adding a surface or defect moves no other.
            group = zlib.crc32(f"{self.category}/{split}/{folder}".encode())
            picture, mask = draw_surface(self.category, defect, self.image_size, (self.drawing_seed, group, number))
            _write_png(directory / split / folder / f"{number:03d}.png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            if defect is not None:
                _write_png(directory / "ground_truth" / folder / f"{number:03d}_mask.png", mask)
        (directory / RECORD_NAME).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")

    def _move_into_place(self, finished: Path) -> None:
        """Rename a finished set to its folder, or leave it when another process was first with the same set."""
        # The folder can be taken by a set with other arguments meanwhile: the second try then has another name.
        for _ in range(2):
            target = self.directory
            if self._holds_this_set(target):
                return
            if not target.exists():
                try:
                    finished.rename(target)
                except OSError:
                    if not target.exists():
                        raise
                else:
                    return
        if not self._holds_this_set(self.directory):
            msg = f"root has a folder {str(self.directory)!r} that is not this set: rename it or choose another root."
            raise FileExistsError(msg)

    def _setup(self, _stage: str | None = None) -> None:
        """Read the drawn files as an MVTec AD category."""
        directory = self.directory
        self.train_data = MVTecADDataset(split=Split.TRAIN, root=self.root, category=directory.name)
        self.test_data = MVTecADDataset(split=Split.TEST, root=self.root, category=directory.name)


def _write_png(path: Path, picture: NDArray[Any]) -> None:
    """Write a picture in OpenCV's order of channels, and fail where OpenCV only returns False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, data = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 2])
    if not encoded:
        raise OSError(f"The picture for {path} could not be encoded as PNG.")
    path.write_bytes(data.tobytes())


register_datamodule(SyntheticSurfaces)

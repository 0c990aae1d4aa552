# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""One model for many categories: trained on all of them, tested on each."""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.data.datasets.base.image import AnomalibDataset
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torchvision.transforms.v2 import Compose, Transform

from anomalib_osdirf.data.category_evaluator import measure_by_category, restore_evaluator
from anomalib_osdirf.registration import register_datamodule

logger = logging.getLogger(__name__)

_SUBSETS = ("train_data", "val_data", "test_data")


class CategoryDataset(AnomalibDataset):
    """Concatenation of each category's data set; ``samples`` also has each image's category and index in it."""

    def __init__(self, datasets: Mapping[str, AnomalibDataset]) -> None:
        self.datasets = dict(datasets)
        super().__init__()
        frames = [
            dataset.samples.assign(category=category, position=range(len(dataset)))
            for category, dataset in self.datasets.items()
        ]
        # Not through the property, which would sort by path: categories stay together.
        self._samples = pd.concat(frames, ignore_index=True)
        tasks = {str(dataset.samples.attrs["task"]) for dataset in self.datasets.values()}
        self._samples.attrs = {"task": max(tasks)}  # segmentation where any category has masks

    def __getitem__(self, index: int) -> Any:
        """Return an image as its category's data set does."""
        row = self.samples.iloc[index]
        return self.datasets[row.category][int(row.position)]

    @property
    def augmentations(self) -> Transform | None:
        """What the data sets do to their images, in one, to look at."""
        transforms = [dataset.augmentations for dataset in self.datasets.values() if dataset.augmentations is not None]
        return Compose(transforms) if transforms else None

    @augmentations.setter
    def augmentations(self, augmentations: Transform | None) -> None:
        if augmentations is not None:
            for dataset in self.datasets.values():
                dataset.augmentations = augmentations

    @property
    def collate_fn(self) -> Any:
        """Collate images with and without masks."""
        return collate


class CategoryBatches(BatchSampler):
    """Batches that end where the category changes; ``categories`` has that of each image of the data set."""

    def __init__(self, sampler: Iterable[int], batch_size: int, drop_last: bool, categories: Sequence[str]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.categories = categories

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the image indices of each batch."""
        batch: list[int] = []
        for index in self.sampler:
            if batch and (len(batch) == self.batch_size or self.categories[index] != self.categories[batch[0]]):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(1 for _ in self)


def collate(items: list[ImageItem]) -> Any:
    """Collate a batch; fields that some images lack, such as masks, are dropped."""
    items = [copy.copy(item) for item in items]
    for name in ("gt_mask", "mask_path", "gt_label"):
        if any(getattr(item, name) is None for item in items):
            for item in items:
                setattr(item, name, None)
    return ImageBatch.collate(items)


class MultiCategory(AnomalibDataModule):
    """Several categories for one model: trained on all of them, tested on each.

    Each category is a datamodule of anomalib's or of this package, with its own files, splits and augmentations;
    batches are made here. While a model is tested on it, each of the model's test metrics is computed for every
    category and reported as ``<category>/<metric>``, with the plain mean as ``mean/<metric>``: scores of one category
    are never ranked against those of another, and none is cut off at the ends of the common normalisation. A
    category without masks has no pixel metrics and does not count in their mean.

    Threshold and normalisation are the model's, one for all categories, found on their validation images together.

    Args:
        categories (list[AnomalibDataModule] | dict[str, AnomalibDataModule]): Datamodules of the categories. In a list,
            a category is called by its datamodule's category, or else by its name.
        name (str): Name of the whole, for the results folder. Defaults to ``"MultiCategory"``.
        train_batch_size (int): Training batch size. Defaults to ``32``.
        eval_batch_size (int): Validation and test batch size; a batch has images of one category only. Defaults to
            ``32``.
        num_workers (int): Number of processes that read files. Defaults to ``0``.

    Raises:
        ValueError: If there are no categories, two of one name, or something else than datamodules.

    Example:
        >>> from anomalib_osdirf.data import MultiCategory, SyntheticSurfaces
        >>> surfaces = [SyntheticSurfaces(category=name) for name in ("weave", "brushed_metal")]
        >>> MultiCategory(surfaces, name="surfaces").category_names
        ('weave', 'brushed_metal')
    """

    def __init__(
        self,
        categories: list[AnomalibDataModule] | dict[str, AnomalibDataModule],
        name: str = "MultiCategory",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(train_batch_size, eval_batch_size, num_workers)
        for argument, value in (("train_batch_size", train_batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{argument} is {value}, which is too small: use a whole number of at least 1.")
        self.categories = dict(categories) if isinstance(categories, Mapping) else _named(categories)
        if not self.categories:
            raise ValueError("categories is empty: give at least one datamodule.")
        for category, datamodule in self.categories.items():
            if not isinstance(datamodule, AnomalibDataModule):
                raise ValueError(  # noqa: TRY004 - whoever wrote the configuration reads it
                    f"categories has {category!r}, which is a {type(datamodule).__name__} and no datamodule; "
                    "`anomalib benchmark` builds none inside another, `python -m anomalib_osdirf benchmark` does."
                )
            if not category or category == "mean" or "/" in category:
                raise ValueError(
                    f"categories has the name {category!r}, which can't be one: give a dict with names without a slash."
                )
        self._name = name
        self._category_of: dict[str, str] = {}

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the whole."""
        return self._name

    @property
    def category_names(self) -> tuple[str, ...]:
        """Names of the categories."""
        return tuple(self.categories)

    def category_of(self, image_path: str) -> str:
        """Return the category of a validation or test image."""
        return self._category_of[image_path]

    def prepare_data(self) -> None:
        """Have each category's files ready, by download where its datamodule does that."""
        for datamodule in self.categories.values():
            datamodule.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the categories, and have a test report them one by one."""
        for datamodule in self.categories.values():
            # A category resizes its images to what the trainer's model wants, so that they stack.
            datamodule.trainer = self.trainer
            datamodule.setup(stage)
        if not self._is_setup:
            self._setup(stage)
            self._is_setup = isinstance(stage, TrainerFn)
        self._check_processes()
        if isinstance(stage, TrainerFn) and stage in {TrainerFn.TESTING, TrainerFn.PREDICTING}:
            measure_by_category(self.trainer, self.category_of)

    def _check_processes(self) -> None:
        """Refuse more processes than a category has images: metrics of a category wait for every process."""
        count = getattr(self.trainer, "world_size", 1)
        for subset in _SUBSETS[1:]:
            dataset = getattr(self, subset, None)
            for category, images in dataset.samples.category.value_counts().items() if dataset is not None else ():
                if images < count:
                    raise ValueError(
                        f"categories has {category!r}, whose {images} images in {subset} are too few for {count} "
                        f"processes; use --trainer.devices {images} at most."
                    )

    def teardown(self, stage: str) -> None:
        """Restore the model's own evaluator."""
        if self.trainer is not None:
            restore_evaluator(self.trainer)
        super().teardown(stage)

    def _setup(self, _stage: str | None = None) -> None:
        for subset in _SUBSETS:
            datasets = {
                category: getattr(datamodule, subset)
                for category, datamodule in self.categories.items()
                if getattr(datamodule, subset, None) is not None
            }
            if datasets:
                _check_images(subset, datasets)
                setattr(self, subset, CategoryDataset(datasets))
        self._category_of = {}
        for dataset in (getattr(self, subset, None) for subset in ("val_data", "test_data")):
            if dataset is not None:
                self._remember(dataset.samples)

    def _remember(self, samples: pd.DataFrame) -> None:
        for path, category in zip(samples.image_path.map(str), samples.category, strict=True):
            if self._category_of.setdefault(path, category) != category:
                raise ValueError(
                    f"categories {self._category_of[path]!r} and {category!r} share the image {path!r}; a test image "
                    "can only count for one of them."
                )

    def val_dataloader(self) -> DataLoader:
        """Return validation images, each batch of one category."""
        return self._batched("val_data")

    def test_dataloader(self) -> DataLoader:
        """Return test images, each batch of one category."""
        return self._batched("test_data")

    def _batched(self, subset: str) -> DataLoader:
        dataset = getattr(self, subset, None)
        if dataset is None:
            raise ValueError(f"no category has {subset}: set val_split_mode or test_split_mode of their datamodules.")
        return DataLoader(
            dataset,
            batch_sampler=CategoryBatches(
                SequentialSampler(dataset),
                batch_size=self.eval_batch_size,
                drop_last=False,
                categories=dataset.samples.category.tolist(),
            ),
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or dataset.collate_fn,
        )


def _named(datamodules: Sequence[AnomalibDataModule]) -> dict[str, AnomalibDataModule]:
    names = [getattr(one, "category", "") or getattr(one, "name", "") or str(one) for one in datamodules]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"categories has the name {twice[0]!r} twice; give a dict of names and datamodules, such as "
            f"{{{twice[0] + '_a'!r}: ..., {twice[0] + '_b'!r}: ...}}."
        )
    return dict(zip(names, datamodules, strict=True))


def _check_images(subset: str, datasets: Mapping[str, AnomalibDataset]) -> None:
    """Refuse data sets of other things than images, such as depth maps or videos."""
    for category, dataset in datasets.items():
        if dataset.collate_fn not in {ImageBatch.collate, collate}:
            raise ValueError(
                f"categories has {category!r}, whose {subset} ({type(dataset).__name__}) does not give plain image "
                "batches; use datamodules of images."
            )


register_datamodule(MultiCategory)

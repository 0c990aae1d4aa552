# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Finds good parts, defective parts and masks in a user's folder."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anomalib_osdirf.inference.reading import IMAGE_SUFFIXES

_MASKS = ("ground_truth", "mask", "masks")
_NO_DEFECTS = {"good", "train", *_MASKS}
_HELD_OUT = 0.2  # share of the good images that anomalib's Folder tests with where there are no others
_NAMED = 3


@dataclass(frozen=True)
class Parts:
    """The folders of training data found in a folder, and the images of each."""

    root: Path
    good: Path
    good_test: Path | None = None  # None: some of the good images are held out for testing
    defects: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    ignored: tuple[Path, ...] = ()  # files that are no images
    images: dict[Path, list[Path]] = field(default_factory=dict)

    @property
    def held_out(self) -> int:
        """Number of good training images that are held out for testing."""
        return 0 if self.good_test else int(len(self.images[self.good]) * _HELD_OUT)

    def folder_arguments(self) -> dict[str, Any]:
        """Return the arguments of anomalib's ``Folder``."""
        below = {
            "normal_dir": [self.good],
            "normal_test_dir": [self.good_test] if self.good_test else [],
            "abnormal_dir": self.defects,
            "mask_dir": self.masks,
        }
        places = {name: [str(one.relative_to(self.root)) for one in folders] for name, folders in below.items()}
        # A threshold from good parts alone must not come from those that it is tested with.
        own_validation = not self.defects and self.held_out >= 2
        return {
            "name": self.root.name or "parts",
            "root": str(self.root),
            **{name: found[0] if len(found) == 1 else found for name, found in places.items() if found},
            "test_split_ratio": _HELD_OUT,
            "val_split_mode": "from_test" if own_validation else "same_as_test",
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Describe what was found and how it is used."""
        held_out = f", of which {self.held_out} are held out for testing" if self.held_out else ""
        yield "Good parts", self._named([self.good]) + held_out
        if self.good_test:
            yield "Test", f"{self._named([self.good_test])}, good parts that are not trained on"
        if self.defects:
            yield "Defects", f"{self._named(self.defects)}, for threshold and test only"
            yield "Masks", self._named(self.masks) if self.masks else "none: no pixel metrics"
        else:
            yield "Defects", "none: only false alarms can be tested"
        if self.ignored:
            yield "Ignored", f"{_few([one.name for one in self.ignored])}, which are no images"

    def _named(self, folders: list[Path] | tuple[Path, ...]) -> str:
        return ", ".join(f"{len(self.images[one])} in {one.relative_to(self.root)}" for one in folders)


def find_parts(folder: Path, exclude: Path | None = None) -> Parts:
    """Find parts in a folder, not looking into one to exclude, such as that of the results.

    Good parts are in ``good`` or, as in MVTec AD, ``train/good``; defective ones in the folders beside it or in
    ``test/<kind>``. Masks are in ``ground_truth``, ``mask`` or ``masks``, in a folder for each kind or in one for all.

    Raises:
        ValueError: If there is nothing to train on, or masks don't fit to images.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give one with good parts in its subfolder 'good'.")
    top = _folders(root, exclude)
    good = top.get("good") or _folders(top.get("train")).get("good")
    if good is None:
        raise ValueError(_nothing_good(folder, top))
    kinds = _folders(top["test"]) if "test" in top else {name: top[name] for name in top.keys() - _NO_DEFECTS}
    good_test = kinds.pop("good", None)
    files = {one: _files(one) for one in [good, *([good_test] if good_test else []), *kinds.values()]}
    images = {one: [file for file in found if _is_image(file)] for one, found in files.items()}
    if good_test and not images[good_test]:
        good_test = None
    defects = tuple(kinds[name] for name in sorted(kinds) if images[kinds[name]])
    masks = _find_masks(top, defects, images)
    ignored = tuple(file for one in (good, *defects) for file in files[one] if not _is_image(file))
    parts = Parts(root, good, good_test, defects, masks, ignored, images)
    _check_number(parts, folder)
    return parts


def _check_number(parts: Parts, folder: Path) -> None:
    place, count = str(folder / parts.good.relative_to(parts.root)), len(parts.images[parts.good])
    if not count:
        has = f"; it has {_few([one.name for one in parts.ignored])}" if parts.ignored else ""
        raise ValueError(f"{place!r} has no images: looked for files that end in {', '.join(IMAGE_SUFFIXES)}{has}.")
    tested = parts.good_test or parts.defects or parts.held_out
    if count < 2 or not tested:
        images = "1 image" if count == 1 else f"{count} images"
        needed = 2 if parts.good_test or parts.defects else round(1 / _HELD_OUT)
        why = "" if needed == 2 else ", one of them to test with"
        raise ValueError(
            f"{place!r} has {images} of good parts; a training needs at least {needed}{why}, and 50 or more are better."
        )


def _find_masks(top: dict[str, Path], defects: tuple[Path, ...], images: dict[Path, list[Path]]) -> tuple[Path, ...]:
    folder = next((top[name] for name in _MASKS if name in top), None)
    if folder is None or not defects:
        return ()
    of_kinds = _folders(folder)
    found = tuple(of_kinds[one.name.lower()] for one in defects if one.name.lower() in of_kinds) or (folder,)
    for one in found:
        images[one] = [file for file in _files(one) if _is_image(file)]
    # As anomalib pairs them.
    parts = sorted(file for one in defects for file in images[one])
    masks = sorted(file for one in found for file in images[one])
    if not masks:
        return ()
    advice = "; name each as its image, or move the folder away to go without masks."
    stems = {mask.stem.removesuffix("_mask") for mask in masks}
    missing = [part for part in parts if part.stem not in stems]
    if missing:
        where = f"{folder.name!r} has no mask for {_few([f'{one.parent.name}/{one.name}' for one in missing])}"
        raise ValueError(where + advice)
    if len(masks) != len(parts):
        raise ValueError(f"{folder.name!r} has {len(masks)} masks for {len(parts)} defective images{advice}")
    for part, mask in zip(parts, masks, strict=True):
        if mask.stem.removesuffix("_mask") != part.stem:
            raise ValueError(f"{folder.name!r} has {mask.name} where that of {part.name} is expected{advice}")
    return found


def _nothing_good(folder: Path, top: dict[str, Path]) -> str:
    found = [f"folder {one.name!r}" for one in top.values()]
    loose = [file.name for file in folder.iterdir() if _is_image(file)]
    if loose:
        found.append("1 image" if len(loose) == 1 else f"{len(loose)} images")
    has = f"it has {_few(found)}" if found else "it is empty"
    return f"{str(folder)!r} has no good parts: looked for images in 'good' and 'train/good', and {has}."


def _folders(folder: Path | None, exclude: Path | None = None) -> dict[str, Path]:
    """Return the folders in a folder by their names in lower case, without hidden ones."""
    if folder is None or not folder.is_dir():
        return {}
    excluded = None if exclude is None else exclude.resolve()
    found = (one for one in sorted(folder.iterdir()) if one.is_dir() and one.resolve() != excluded)
    return {one.name.lower(): one for one in found if not one.name.startswith((".", "_"))}


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")

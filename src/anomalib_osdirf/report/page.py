# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file about one or more results folders, with everything it needs inside."""

import base64
import logging
import math
import os
import shlex
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from anomalib_osdirf.colours import COLOURS, THRESHOLD, TRUTH
from anomalib_osdirf.export import metadata
from anomalib_osdirf.post_processing.p_values import EXPONENTS, normalise, raw_scores
from anomalib_osdirf.progress import duration
from anomalib_osdirf.report import statistics
from anomalib_osdirf.report.exports import Export, find_exports
from anomalib_osdirf.report.pictures import map_outline, mask_outline, page_picture
from anomalib_osdirf.report.results import FILE_NAME, Results
from anomalib_osdirf.report.statistics import Estimate
from anomalib_osdirf.runs import shown as shown_path

logger = logging.getLogger(__name__)

PAGE_NAME = "report.html"
PREDICTIONS = "predictions.csv"
# Characters of base64 that pictures may take: with charts and figures, 500 images stay below 10 MB.
_PICTURE_BUDGET = 8_000_000
_CHARACTERS_PER_IMAGE = 90  # of names and scores
_SMALLEST_SIDE, _LARGEST_SIDE = 112, 256
_BEST_CATCHES = 6
_NEEDED = {"jinja2": "jinja2", "vl_convert": "vl-convert-python"}


@dataclass
class Run:
    """One results folder, as the page shows it."""

    results: Results
    label: str = ""

    @property
    def entries(self) -> dict[str, Any]:
        """What was stored by name."""
        return self.results.entries

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.entries.get("model", "model"))

    @property
    def data(self) -> str:
        """Name of data and category."""
        data = self.entries.get("data", {})
        return " / ".join(str(data[name]) for name in ("name", "category") if data.get(name))

    @cached_property
    def knots(self) -> list[float] | None:
        """By which scores are normalised so that they have p-values; ``None`` where they have none."""
        values = self.entries.get("post_processing") or {}
        return values.get("image_knots") if values.get("enable_normalization") else None

    @property
    def rate(self) -> float | None:
        """False-alarm rate that the threshold is set for, ``None`` for none."""
        return None if self.knots is None else self._calibration["false_alarm_rate"]

    @property
    def _calibration(self) -> dict[str, Any]:
        """What normal images say about the image threshold; empty where it is not of a rate."""
        return ((self.entries.get("post_processing") or {}).get("calibration") or {}).get("image", {})

    @cached_property
    def scale(self) -> tuple[float, float] | None:
        """Factor and offset that anomalib normalises scores with; ``None`` where that is not how they are."""
        values = self.entries.get("post_processing") or {}
        threshold, low, high = (values.get(name) for name in ("image_threshold", "image_min", "image_max"))
        if self.knots is not None or not values.get("enable_normalization"):
            return None
        if threshold is None or low is None or high is None or high <= low:
            return None
        return 1 / (high - low), 0.5 - threshold / (high - low)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Scores as they are normalised, but not clipped to 0 and 1; the model's own where they are not."""
        if self.knots is not None:
            return normalise(self.results.scores, np.array(self.knots))
        return self.results.scores if self.scale is None else self.results.scores * self.scale[0] + self.scale[1]

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        """Mask of the images that count: those with a score and a known label."""
        return np.isfinite(self.scores) & (self.results.labels >= 0)

    @cached_property
    def threshold(self) -> tuple[float | None, str]:
        """Threshold, and where it comes from."""
        values = self.entries.get("post_processing") or {}
        if values.get("enable_thresholding") and values.get("image_threshold") is not None:
            own = "the model's own"
            if self.knots is None and self.scale is None:
                return float(values["image_threshold"]), own
            if self.knots is not None:
                found = self._calibration
                rate, low, high = (f"{100 * share:.2g} %" for share in (self.rate, *found["interval"]))
                own = f"{own}, for {rate} of false alarms: {low} to {high} by {found['images']} normal images"
            return 1 - float(values.get("image_sensitivity", 0.5)), own
        best = statistics.best_threshold(self.scores[self.scored], self.results.labels[self.scored])
        return best, "the best F1 on these test images, as the model has none of its own"

    @cached_property
    def category_names(self) -> list[str]:
        """Names of the categories of the tested images."""
        return sorted(set(self.results.categories))

    @cached_property
    def metrics(self) -> dict[str, Estimate]:
        """Metrics of images and pixels, with intervals.

        Of several categories, means over those that have a metric: scores are not ranked across categories.
        """
        categories = np.array(self.results.categories)
        parts = [self._metrics_of(category, self.scored & (categories == category)) for category in self.category_names]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: statistics.mean([part[name] for part in parts if name in part]) for name in names}

    def _metrics_of(self, category: str, chosen: NDArray[np.bool_]) -> dict[str, Estimate]:
        # Seeds differ between categories, whose intervals would not be independent of each other otherwise.
        seed = zlib.crc32(f"{self.data}/{category}".encode())
        scores, labels = self.scores[chosen], self.results.labels[chosen]
        images = statistics.image_metrics(scores, labels, self.threshold[0], seed)
        found = {f"image {name}": estimate for name, estimate in images.items()}
        normal, anomalous, regions, known = self._pixels
        if len(normal):
            counted = chosen[known]
            pixels = statistics.pixel_metrics(normal[counted], anomalous[counted], regions[counted], seed)
            found |= {f"pixel {name}": estimate for name, estimate in pixels.items()}
        return found

    @cached_property
    def _pixels(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        return self.results.pixel_counts()

    @cached_property
    def groups(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Figures of each category and defect type, against the normal images of the same category."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        labels, types = self.results.labels, np.array(self.results.defect_types)
        categories = np.array(self.results.categories)
        for category in self.category_names:
            inside = self.scored & (categories == category)
            names = sorted(set(types[inside & (labels == 1)].tolist()))
            several = [""] if len(names) != 1 else []  # "": all defect types together
            for defect_type in [*several, *names]:
                chosen = inside & ((labels == 0) | (types == defect_type) | (not defect_type))
                anomalies = int((chosen & (labels == 1)).sum())
                found[category, defect_type] = {"images": anomalies, **self._metrics_of(category, chosen)}
        return found

    @cached_property
    def exports(self) -> list[Export]:
        """Models in the folder."""
        return find_exports(self.results.folder, self.entries.get("latencies"))

    @property
    def tested_images(self) -> frozenset[tuple[str | None, int]]:
        """Paths and labels of the tested images."""
        return frozenset(zip(self.results.paths, self.results.labels.tolist(), strict=True))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Numbers of images by their label."""
        found = Counter(self.results.labels.tolist())
        return {"normal": found[0], "anomalous": found[1], "unlabelled": found[-1]}

    @cached_property
    def remarks(self) -> list[str]:
        """What a reader must know about this run's results."""
        remarks = []
        training, test = self.entries.get("training") or {}, self.entries.get("test") or {}
        if training.get("state") == "started":
            remarks.append("The training was interrupted, or still runs.")
        if not test:
            remarks.append("No test was run yet.")
        elif test.get("state") != "finished":
            total = test.get("images")
            of_all = f" of {total}" if total else ""
            remarks.append(f"The test was interrupted, or still runs: {len(self.results.ids)}{of_all} images are here.")
        if self.results.ids:
            if not self.counts["anomalous"]:
                remarks.append("There are no defective test images: only false alarms can be judged.")
            if not self.counts["normal"]:
                remarks.append("There are no normal images: only misses can be judged.")
            if self.counts["unlabelled"]:
                remarks.append(f"{self.counts['unlabelled']} images have no label and are only shown.")
            unscored = int((~np.isfinite(self.results.scores)).sum())
            if unscored:
                remarks.append(f"{unscored} images have no finite score and are only shown.")
        return remarks

    @cached_property
    def telling_order(self) -> list[int]:
        """Images, the most telling first: those that are furthest on the wrong side, but for a few best catches."""
        threshold = self.threshold[0] or 0.0
        signs = np.where(self.results.labels == 1, -1.0, np.where(self.results.labels == 0, 1.0, 0.0))
        wrongness = np.nan_to_num(signs * (self.scores - threshold), nan=-np.inf)
        order: list[int] = np.argsort(-wrongness, kind="stable").tolist()
        catches = [index for index in reversed(order) if signs[index] < 0 and wrongness[index] < 0][:_BEST_CATCHES]
        return catches + [index for index in order if index not in catches]

    @cached_property
    def pixel_threshold(self) -> float | None:
        """The model's own threshold of its maps, ``None`` for none."""
        return _raw_threshold(self.entries.get("post_processing") or {}, "pixel")

    @cached_property
    def model_file(self) -> Path | None:
        """The file that a threshold is set in: the exported OpenVINO model, or else the checkpoint."""
        found = [export.path for export in self.exports if export.format == "OpenVINO"]
        found += [Path(self.entries["checkpoint"])] if self.entries.get("checkpoint") else []
        return found[0] if found else None


def write_page(folders: Sequence[Path], output: Path) -> Path:
    """Write a page about results folders to a file, and return that.

    Raises:
        ValueError: If a folder has no results.
        ModuleNotFoundError: If packages of the extra ``report`` are missing.
    """
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        msg = f"A report page needs {' and '.join(missing)}; install the extra: pip install 'anomalib-osdirf[report]'."
        raise ModuleNotFoundError(msg)
    runs = _load(folders)
    html = _render(runs, output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(output)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return output


def write_page_or_warn(folders: Sequence[Path], output: Path) -> Path | None:
    """Write a page at the end of a test, which must not fail for a missing package or a full disk after hours.

    Where there is one, this is a warning, and ``None`` is returned.
    """
    try:
        return write_page(folders, output)
    except (ModuleNotFoundError, OSError) as error:
        reason = f"The page {output} can't be written ({error.strerror})." if isinstance(error, OSError) else error
        command = shlex.join(["python", "-m", "anomalib_osdirf", "report", *map(str, folders)])
        logger.warning("%s The results are kept: `%s` makes the page then.", reason, command)
        return None


def _load(folders: Sequence[Path]) -> list[Run]:
    seen: list[Path] = []
    runs = []
    for folder in folders:
        place = folder.parent if folder.name == FILE_NAME else folder
        if place.resolve() not in seen:
            seen.append(place.resolve())
            runs.append(Run(Results(place)))
    if not any(run.results.ids or len(run.results.losses) for run in runs):
        names = ", ".join(repr(str(run.results.folder)) for run in runs)
        msg = f"results folder {names} has neither a test's nor a training's results yet; wait for it, or test again."
        raise ValueError(msg)
    # As short as tells the runs apart.
    parts = [(run.model, run.data, run.results.folder.name, str(run.results.folder)) for run in runs]
    for wanted in ((0,), (0, 1), (0, 1, 2), (0, 1, 3)):
        labels = [" · ".join(part[number] for number in wanted if part[number]) for part in parts]
        if len(set(labels)) == len(runs):
            break
    for run, label in zip(runs, labels, strict=True):
        run.label = label
    return runs


def _render(runs: list[Run], place: Path) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anomalib_osdirf.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"figure": _figure, "bytes": decimal, "duration": duration}
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    data = ", ".join(dict.fromkeys(run.data for run in runs if run.data))
    pictures, shown, side = _pictures(runs)
    return environment.get_template("report.html.jinja").render(
        title=f"{models} on {data}" if data else models,
        made=metadata.now(),
        version=metadata.versions()["anomalib-osdirf"],
        runs=runs,
        tests_differ=len({run.tested_images for run in runs if run.results.ids}) > 1,
        metric_rows=_metric_rows(runs),
        means=_means(runs),
        group_rows=_group_rows(runs),
        side=side,
        level=round(100 * statistics.LEVEL),
        replicates=statistics.REPLICATES,
        tables=[_link(run.results.folder / PREDICTIONS, place) for run in runs],
        data={
            "pictures": pictures,
            "colours": COLOURS.tolist(),
            "runs": [_run_data(run, shown[index]) for index, run in enumerate(runs)],
        },
        outline_colours={"truth": TRUTH, "threshold": THRESHOLD},
        charts=_charts(),
    )


@cache
def _charts() -> str:
    """Return Vega, Vega-Lite and Vega-Embed."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg] # its stub knows no default
    return bundle.replace("</script", "<\\/script")


def _link(file: Path, place: Path) -> str | None:
    """Return the address of a file for a page in a folder, ``None`` where there is no such file there or below."""
    if not file.is_file() or not file.resolve().is_relative_to(place.resolve()):
        return None
    return quote(file.resolve().relative_to(place.resolve()).as_posix())


# ---------------------------------------------------------------------- tables


def _metric_rows(runs: list[Run]) -> list[tuple[str, list[Estimate | float | None]]]:
    """Rows of the table of metrics: ours with intervals, then those that anomalib logged besides."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    rows: list[tuple[str, list[Estimate | float | None]]] = [
        (name, [run.metrics.get(name) for run in runs]) for name in sorted(names, key=_metric_order)
    ]
    logged = [_logged(run) for run in runs]
    others = dict.fromkeys(name for values in logged for name in values if name not in names)
    rows += [(name, [values.get(name) for values in logged]) for name in others]
    return rows


def _logged(run: Run) -> dict[str, float | None]:
    """Return the metrics that anomalib logged, of several categories their means; ``None`` where one has no value."""
    prefix = "mean/" if len(run.category_names) > 1 else ""
    values = {name.removeprefix(prefix): value for name, value in (run.entries.get("metrics") or {}).items()}
    known = {name: None if value is None or math.isnan(value) else value for name, value in values.items()}
    return {name.replace("_", " "): value for name, value in known.items() if name.startswith(("image_", "pixel_"))}


def _metric_order(name: str) -> int:
    order = ("AUROC", "AP", "F1Max", "AUPRO", "F1", "miss rate", "false-alarm rate")
    return 10 * name.startswith("pixel") + order.index(name.split(" ", 1)[1])


def _means(runs: list[Run]) -> list[tuple[str, dict[str, Estimate]]]:
    """Means over data sets of the models that were tested on several."""
    found = []
    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model and run.metrics]
        if len({run.data for run in own}) == len(own) > 1:
            names = [name for name in own[0].metrics if all(name in run.metrics for run in own)]
            found.append((model, {name: statistics.mean([run.metrics[name] for run in own]) for name in names}))
    return found


def _group_rows(runs: list[Run]) -> list[tuple[str, str, list[dict[str, Any] | None]]]:
    keys = dict.fromkeys(key for run in runs for key in run.groups)
    return [(*key, [run.groups.get(key) for run in runs]) for key in keys]


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------------- data for the page's script


def _raw_threshold(values: dict[str, Any], level: str) -> float | None:
    """Return the threshold of raw scores or maps that a post-processor's values amount to, ``None`` for none."""
    low, high, threshold, knots = (values.get(f"{level}_{name}") for name in ("min", "max", "threshold", "knots"))
    if threshold is None or not values.get("enable_thresholding"):
        return None
    limit = 1 - float(values.get(f"{level}_sensitivity", 0.5))
    if limit == 0.5 or not values.get("enable_normalization"):
        return float(threshold)
    if knots is not None:
        return float(raw_scores(limit, np.array(knots)))
    return None if low is None or high is None else float(threshold + (limit - 0.5) * (high - low))


def _run_data(run: Run, shown: dict[int, list[Any]]) -> dict[str, Any]:
    results = run.results
    type_of = list(zip(results.categories, results.defect_types, strict=True))
    types = sorted(set(type_of))
    paths = [
        Path(path).as_posix() if path else f"image {number}"
        for path, number in zip(results.paths, results.ids, strict=True)
    ]
    folder = _common_folder(paths)
    scored = run.scored
    return {
        "label": run.label,
        "threshold": run.threshold[0],
        "origin": run.threshold[1],
        "scale": run.scale,
        "rate": run.rate,
        "knots": None if run.knots is None else list(zip(EXPONENTS, run.knots, strict=True)),
        "model": None if run.model_file is None else shown_path(run.model_file),
        "range": _map_range(run),
        "auroc": _interval(run.metrics.get("image AUROC")),
        "folder": folder,
        "names": [path[len(folder) :] for path in paths],
        "types": [" / ".join(filter(None, one)) for one in types],
        "type": [types.index(one) for one in type_of],
        "labels": results.labels.tolist(),
        "scores": [None if not np.isfinite(score) else float(f"{score:.9g}") for score in run.scores],
        "sizes": results.sizes.tolist(),
        "shown": [shown.get(index) for index in range(len(paths))],
        "curves": statistics.curves(run.scores[scored], results.labels[scored]),
        "losses": _thin(run.results.losses).tolist(),
    }


def _interval(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [estimate.value, estimate.low, estimate.high]


def _common_folder(paths: list[str]) -> str:
    """Return the folder that all paths have in common, but for the last, which tells the defect type."""
    folders = {Path(path).parent for path in paths}
    try:
        common = Path(os.path.commonpath(folders))
    except ValueError:  # no paths, or both absolute and relative ones
        return ""
    common = common.parent if common in folders else common
    return "" if common == Path() else f"{common.as_posix().rstrip('/')}/"


def _thin(losses: NDArray[np.float64], most: int = 600) -> NDArray[np.float64]:
    """Average neighbouring losses until there are at most so many; none of models that log a constant, as PaDiM."""
    finite = losses[np.isfinite(losses).all(axis=1)]
    if len(finite) > 1 and np.ptp(finite[:, 1]) == 0:
        return np.zeros((0, 2))
    parts = np.array_split(finite, min(most, len(finite))) if len(finite) else []
    return np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2).round(5)


def _pictures(runs: list[Run]) -> tuple[list[str], list[dict[int, list[Any]]], int]:
    """Choose the pictures that fit into the page, and make them ready.

    Returns:
        The pictures as addresses, for each run by image the numbers of picture and map, the
        map's range, and the outlines of the truth and of what is above the threshold; and the longest side.
    """
    sizes = [run.results.picture_bytes() for run in runs]
    names = _CHARACTERS_PER_IMAGE * sum(map(len, sizes))
    budget = max(_PICTURE_BUDGET - names, _PICTURE_BUDGET // 4)
    total = 4 / 3 * sum(int(size.sum()) for size in sizes)
    scale = min(1.0, (budget / max(total, 1)) ** 0.5)
    side = max(_SMALLEST_SIDE, int(_LARGEST_SIDE * scale))
    collected = _Collected()
    shown: list[dict[int, list[Any]]] = [{} for _ in runs]
    # Small runs first: what they do not need of their share is left to the others.
    for done, number in enumerate(sorted(range(len(runs)), key=lambda index: int(sizes[index].sum()))):
        run = runs[number]
        limit = collected.characters + (budget - collected.characters) / (len(runs) - done)
        # Those that the gallery shows first, until the page is full.
        order = run.telling_order
        stored = run.results.pictures(run.results.ids[index] for index in order)
        for index, item in zip(order, stored, strict=True):
            if collected.characters > limit:
                break
            low, high = item["map_low"] or 0.0, item["map_high"] or 0.0
            outlines = [mask_outline(item["mask"]), map_outline(item["map"], low, high, run.pixel_threshold)]
            collected.characters += sum(map(len, outlines))
            shown[number][index] = [
                collected.add(page_picture(item["picture"], side)),
                collected.add(page_picture(item["map"], side)),
                float(f"{low:.4g}"),
                float(f"{high:.4g}"),
                *outlines,
            ]
    return list(collected.numbers), shown, side


@dataclass
class _Collected:
    """Pictures, each once."""

    numbers: dict[str, int] = field(default_factory=dict)
    characters: int = 0

    def add(self, data: bytes | None) -> int | None:
        """Return the picture's number."""
        if data is None:
            return None
        address = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        if address not in self.numbers:
            self.numbers[address] = len(self.numbers)
            self.characters += len(address)
        return self.numbers[address]


def _map_range(run: Run) -> tuple[float, float]:
    """Return the range of the maps' common scale: anomalib's minimum and maximum, or else of the values there are."""
    values = run.entries.get("post_processing") or {}
    low, high = values.get("pixel_min"), values.get("pixel_max")
    if low is None or high is None or high <= low:
        return run.results.map_range() or (0.0, 1.0)
    return low, high

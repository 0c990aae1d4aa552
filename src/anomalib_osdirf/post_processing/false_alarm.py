# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processor with thresholds of the best F1 or, without defects, of a false-alarm rate."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_osdirf.post_processing.drift import quantiles
from anomalib_osdirf.post_processing.p_values import EXPONENTS, THRESHOLD, Array, normalise, raw_scores
from anomalib_osdirf.post_processing.tail import (
    FEWEST_SCORES,
    LEVEL,
    Calibration,
    calibrate,
    calibrate_without_spread,
    counted_interval,
    images_needed,
    supports,
    unsupported,
)
from anomalib_osdirf.processes import ALONE, DistributedContext

logger = logging.getLogger(__name__)

DEFAULT_RATE = 0.01
SOURCES = ("auto", "validation", "training")
LEVELS = ("image", "pixel")
_TAKEN_BY_F1 = {"image": "normal and defective validation images", "pixel": "masks of defects"}
_NAMES = {
    "validation": "held-out normal images",
    "training": "training images, each held out",
}


class F1Midpoint(F1AdaptiveThreshold):
    """The threshold of the best F1, midway between the lowest score that counts as a defect and the next lower one.

    anomalib's lies exactly on that lowest score, and what is not above the threshold is called normal.
    """

    def compute(self) -> Tensor:  # type: ignore[override] # as anomalib's
        """Return the threshold; NaN where there are not both normal and anomalous samples."""
        scores, truth = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        if truth.min() == truth.max():
            return scores.new_full((), float("nan"))
        lowest: Tensor = super().compute()
        lower = scores[scores < lowest]
        if not len(lower):
            return lowest - 1e-6 * lowest.abs().clamp(min=1)
        middle = (lowest + lower.max()) / 2
        return torch.where(middle < lowest, middle, lower.max())  # of neighbours in floating point, the lower one


class PValueScale(nn.Module):
    """Normalises raw scores or maps by their p-values, see :func:`~anomalib_osdirf.post_processing.p_values.normalise`.

    Steps that are filled to the brim add exactly their share, so that a score at the threshold is exactly 0.5.
    """

    knots: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.full((len(EXPONENTS),), float("nan")))

    def forward(self, raw: Tensor) -> Tensor:
        """Return values in (0, 1) in the order of the raw ones, of any shape."""
        values = raw.to(self.knots.dtype)
        widths = self.knots[1:] - self.knots[:-1]
        first = EXPONENTS[0]
        # Below the first knot e falls off as 1 / distance, with the same slope: nothing is cut off.
        slope = (EXPONENTS[1] - first) / first
        total = first / (1 + slope * (self.knots[0] - values).clamp(min=0) / widths[0])
        last = len(EXPONENTS) - 2
        for index in range(last + 1):
            filled = ((values - self.knots[index]) / widths[index]).clamp(min=0, max=None if index == last else 1)
            total = total + (EXPONENTS[index + 1] - EXPONENTS[index]) * filled
        return total / (1 + total)


class FalseAlarmPostProcessor(PostProcessor):
    """Sets image and pixel thresholds from the validation data; the default post-processor of our models.

    With a ``false_alarm_rate``, both come from normal images alone, and anomalous ones are not looked at. Without one,
    each level decides for itself: the image threshold is that of the best F1 where there are normal and anomalous
    validation images, the pixel threshold where there are masks of defects; otherwise it comes from normal images, at
    a rate of 1 % or the smallest that their number supports.

    The image threshold of a rate is exceeded by the scores of that share of normal images, the pixel threshold by the
    maps of that share, anywhere in them: a false alarm is an image, for masks too. Scores and maps are then normalised
    to z in (0, 1), in their own order, with the threshold at 0.5, and mean something: p = rate^(z / (1 - z)) is the
    share of normal images whose score (whose map, somewhere) is at least as high. With the best F1 they are normalised
    as by anomalib.

    It takes the place of anomalib's post-processor in any model.

    Args:
        false_alarm_rate: Share of normal images that may be called anomalous, such as 0.01. Defaults to ``None``.
        extrapolate: Allow a rate of less than one in as many normal images as there are, by continuing the tail of
            their scores. Defaults to ``False``.
        images: Which normal images tell: those of the ``validation`` data; ``training`` images, each scored as if the
            density had not seen it, which models with a density can do; or ``auto``, validation images where there are
            enough for the rate, else the more numerous ones. Defaults to ``auto``.
        image_sensitivity: 0.5 keeps the image threshold; more finds more. At a rate, s moves it to the p-value
            rate^((1 - s) / s). Defaults to ``0.5``.
        pixel_sensitivity: The same for the pixel threshold. Defaults to ``0.5``.

    Raises:
        ValueError: If an argument is unknown or out of range.

    Example:
        >>> from anomalib_osdirf import OSDIRF
        >>> model = OSDIRF(post_processor=FalseAlarmPostProcessor(0.001, extrapolate=True))  # doctest: +SKIP
    """

    def __init__(
        self,
        false_alarm_rate: float | None = None,
        extrapolate: bool = False,
        images: str = "auto",
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        # Scores and maps have scales of their own: neither's threshold can stand in for the other's.
        super().__init__(
            enable_threshold_matching=False, image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity
        )
        if false_alarm_rate is not None and not 0 < false_alarm_rate < 1:
            msg = f"false_alarm_rate={false_alarm_rate} is not a share between 0 and 1; use 0.01 for one image in 100."
            raise ValueError(msg)
        if images not in SOURCES:
            raise ValueError(f"images={images!r} is unknown; use one of {', '.join(SOURCES)}.")
        self.false_alarm_rate = false_alarm_rate
        self.extrapolate = extrapolate
        self.images = images
        # Of each level whose threshold is that of a rate: false_alarm_rate, source, images, interval.
        self.calibration: dict[str, dict[str, Any]] = {}
        # Raw scores of held-out normal images, by their quantiles: source, images, quantiles.
        self.normal_scores: dict[str, Any] = {}
        self.image_scale = PValueScale()
        self.pixel_scale = PValueScale()
        self._image_threshold_metric = F1Midpoint(fields=["pred_score", "gt_label"], strict=False)
        self._pixel_threshold_metric = F1Midpoint(fields=["anomaly_map", "gt_mask"], strict=False)
        self._forget()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (
            *super()._checkpoint_config_keys,
            "false_alarm_rate",
            "extrapolate",
            "images",
            "calibration",
            "normal_scores",
        )

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what a checkpoint has; a sensitivity that was set to something else than the default stays."""
        own = {name: getattr(self, name) for name in ("image_sensitivity", "pixel_sensitivity")}
        super().load_checkpoint_config({**config, **{name: value for name, value in own.items() if value != 0.5}})

    # ------------------------------------------------------------------ which images

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check before the training that there are enough normal images."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.false_alarm_rate is None or not hasattr(datamodule, "train_data"):
            return  # dataloaders' images are unlabelled before they are seen: the end of a validation tells
        reason = getattr(pl_module, "reason_no_held_out_scores", _no_density(pl_module))
        counts = self._usable({"validation": _normal_images(datamodule), "training": len(datamodule.train_data)})
        if reason is not None:
            counts.pop("training", None)
        if not counts:
            raise ValueError(f"images=training is not possible, since {reason}; use images=validation.")
        source = self._choose(counts)
        if not self._is_enough(counts[source]):
            message = unsupported(counts[source], self.false_alarm_rate, _NAMES[source])
            if source == "validation" and reason is not None:
                message += (
                    f" Training images don't count, since {reason}; --data.val_split_mode from_train holds some out."
                )
            raise ValueError(message)

    def _usable(self, by_source: dict[str, Any]) -> dict[str, Any]:
        return {source: value for source, value in by_source.items() if self.images in {"auto", source}}

    def _choose(self, counts: dict[str, int]) -> str:
        """Return the first source with enough images for the rate, or else that with most."""
        rate = self.false_alarm_rate or DEFAULT_RATE
        enough = [source for source, count in counts.items() if supports(count, rate)]
        return enough[0] if enough else max(counts, key=lambda source: counts[source])

    def _is_enough(self, count: int) -> bool:
        rate = self.false_alarm_rate or DEFAULT_RATE
        return supports(count, rate) or (self.extrapolate and count >= FEWEST_SCORES)

    # ------------------------------------------------------------------ fit

    def _forget(self) -> None:
        # Rows of normal images: score, largest and smallest value of the map.
        self._noted: dict[str, list[Tensor]] = {"validation": [], "training": []}

    @property
    def is_waiting(self) -> bool:
        """Whether there are noted training images from which no threshold has been set."""
        return bool(self._noted["training"])

    def note_training(self, rows: Tensor) -> None:
        """Note scores, and largest and smallest map values, ``(N, 3)``, of training images scored as if new."""
        self._noted["training"] = [rows.float().cpu()]

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Note the scores of a batch's normal images and, without a rate, what the best F1 takes."""
        if self.false_alarm_rate is None:
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        score: Any
        score, anomaly_map, label = (getattr(outputs, name, None) for name in ("pred_score", "anomaly_map", "gt_label"))
        if label is None or (score is None and anomaly_map is None):
            return
        if anomaly_map is None:
            highest = lowest = torch.full_like(score, float("nan")).flatten()
        else:
            values = anomaly_map.flatten(1)
            highest, lowest = values.amax(dim=1), values.amin(dim=1)
        rows = torch.stack([highest if score is None else score.flatten(), highest, lowest], dim=1)
        self._noted["validation"].append(rows[~label.flatten().bool()].float().cpu())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Set the thresholds, and log how; Lightning's trial runs have too few images for a rate."""
        del pl_module
        trial = trainer is not None and (trainer.sanity_checking or trainer.fast_dev_run)
        if trial and self.false_alarm_rate is not None:
            self._forget()
            return
        for level in self.fit(ALONE if trainer is None else DistributedContext.of(trainer)):
            logger.info(self._description(level))

    def fit(self, processes: DistributedContext = ALONE) -> list[str]:
        """Set thresholds and scales from the images noted, and return the levels that have new ones.

        Raises:
            ValueError: If the images are too few for the requested rate, or their scores allow no threshold.
        """
        rows = {}
        for source, noted in self._noted.items():
            own = torch.cat([torch.zeros(0, 3), *noted])
            rows[source] = processes.collected(own, torch.arange(len(own))).double().numpy()
        self._forget()
        usable = self._usable(rows)
        source = self._choose({name: len(values) for name, values in usable.items()})
        normal, trained = usable[source], len(rows["training"]) > 0
        # All are found before any is set: what was fitted before outlasts a failure.
        found = {level: self._by_f1(level) or self._by_rate(level, source, normal, trained) for level in LEVELS}
        fitted = {level: one for level, one in found.items() if one is not None}
        for level, one in fitted.items():
            getattr(self, f"_{level}_threshold").fill_(one.threshold)
            getattr(self, f"{level}_min").fill_(one.low)
            getattr(self, f"{level}_max").fill_(one.high)
            getattr(self, f"{level}_scale").knots.copy_(torch.tensor(one.knots, dtype=torch.float64))
            self.calibration.pop(level, None)
            if one.calibration:
                self.calibration[level] = one.calibration
        stays = self.normal_scores.get("source") == "training" and not trained
        if len(normal) and not stays and not np.isnan(normal[:, 0]).any():
            self.normal_scores = {"source": source, "images": len(normal), "quantiles": quantiles(normal[:, 0])}
        return list(fitted)

    def move_image_threshold(self, value: float) -> None:
        """Set the image threshold; where it has a false-alarm rate, p-values stay, and the rate follows.

        Raises:
            ValueError: If the value is so far away from all scores that p-values can't be kept.
        """
        found = self.calibration.get("image")
        if found is not None:
            knots = self.image_scale.knots.double().numpy()
            normalised = float(normalise(np.array(value), knots))
            exponent = normalised / (1 - normalised)
            wanted = exponent * np.array(EXPONENTS)
            moved = raw_scores(wanted / (1 + wanted), knots)
            moved[THRESHOLD] = value
            rate, images = found["false_alarm_rate"] ** exponent, found["images"]
            if not (np.diff(moved.astype(np.float32)) > 0).all() or rate < 1e-300:
                msg = f"VALUE {value:g} is too far away from all scores; give one near {knots[THRESHOLD]:g}."
                raise ValueError(msg)
            # Beyond what is counted, only an upper end is known.
            low, high = counted_interval(max(rate, 1 / (images + 1)), images)
            interval = [low if supports(images, rate) else 0.0, high]
            self.calibration["image"] = {**found, "false_alarm_rate": rate, "interval": interval}
            self.image_scale.knots.copy_(torch.from_numpy(moved))
        self._image_threshold.fill_(value)

    def _by_f1(self, level: str) -> "_Fitted | None":
        """Return the threshold of the best F1; ``None`` without both normal and anomalous samples."""
        metric, extremes = (getattr(self, f"_{level}_{name}_metric") for name in ("threshold", "min_max"))
        threshold = float(metric.compute()) if metric.update_called else math.nan
        low, high = extremes.compute().tolist() if extremes.update_called else (math.nan, math.nan)
        metric.reset()
        extremes.reset()
        return None if math.isnan(threshold) else _Fitted(threshold, low, high)

    def _by_rate(self, level: str, source: str, rows: Array, trained: bool) -> "_Fitted | None":
        """Return the threshold of a rate; ``None`` without normal images, or if that from training images stays."""
        if not trained and self.calibration.get(level, {}).get("source") == "training":
            return None
        scores, highest, lowest = rows.T
        values = scores if level == "image" else highest
        if np.isnan(values).any() or (self.false_alarm_rate is None and not len(values)):
            return None
        found, rate = self._calibrated(values, source)
        # Displays go from the least to the largest: as far above the threshold as normal values lie below it.
        low = float((scores if level == "image" else lowest).min())
        high = 2 * found.threshold - low
        interval = list(found.interval)
        calibration = {"false_alarm_rate": rate, "source": source, "images": len(values), "interval": interval}
        return _Fitted(found.threshold, low, high, found.knots, calibration)

    def _calibrated(self, values: Array, source: str) -> tuple[Calibration, float]:
        """Calibrate on scores, at the requested rate or else the default one, or the smallest that is supported."""
        if self.false_alarm_rate is not None:
            return calibrate(values, self.false_alarm_rate, self.extrapolate, _NAMES[source]), self.false_alarm_rate
        rate = DEFAULT_RATE if self._is_enough(len(values)) else 1 / (len(values) + 1)
        if len(values) < FEWEST_SCORES or np.ptp(values) == 0:
            return calibrate_without_spread(values, rate), rate
        return calibrate(values, rate, self.extrapolate), rate

    def _description(self, level: str) -> str:
        """Describe a threshold's source and its uncertainty."""
        start = f"{level.capitalize()} threshold {float(getattr(self, f'_{level}_threshold')):.6g}, "
        found = self.calibration.get(level)
        if found is None:
            return f"{start}of the best F1 on validation images."
        rate, images = found["false_alarm_rate"], found["images"]
        reason = few = ""
        if self.false_alarm_rate is None:
            reason = f" (the best F1 takes {_TAKEN_BY_F1[level]})"
            if rate > DEFAULT_RATE:
                few = f" ({_percent(DEFAULT_RATE)} takes {images_needed(DEFAULT_RATE)} images)"
        extrapolated = ", extrapolated" if rate < (1 - 1e-9) / (images + 1) else ""
        low, high, level_of = (_percent(share) for share in (*found["interval"], LEVEL))
        return (
            f"{start}from {images} {_NAMES[found['source']]}{reason}: the false-alarm rate {_percent(rate)}{few} lies "
            f"between {low} and {high} ({level_of} interval{extrapolated})."
        )

    # ------------------------------------------------------------------ use

    def _normalised(self, level: str, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if level in self.calibration:
            scaled: Tensor = getattr(self, f"{level}_scale")(values)
            return scaled
        names = (f"{level}_min", f"{level}_max", f"{level}_threshold")
        return self._normalize(values, *(getattr(self, name) for name in names))

    def normalize_batch(self, batch: Any) -> None:
        """Normalise predicted scores and maps."""
        batch.anomaly_map = self._normalised("pixel", batch.anomaly_map)
        batch.pred_score = self._normalised("image", batch.pred_score)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise predictions and compare them with the thresholds, see anomalib."""
        score: Any = predictions.pred_score
        anomaly_map: Any = predictions.anomaly_map
        if score is None and anomaly_map is None:
            raise ValueError("At least one of pred_score or anomaly_map must be provided.")
        score = self._normalised("image", torch.amax(anomaly_map, dim=(-2, -1)) if score is None else score)
        anomaly_map = self._normalised("pixel", anomaly_map)
        return InferenceBatch(
            pred_score=score,
            anomaly_map=anomaly_map,
            pred_label=self._apply_threshold(score, self.normalized_image_threshold),
            pred_mask=self._apply_threshold(anomaly_map, self.normalized_pixel_threshold),
        )


@dataclass(frozen=True)
class _Fitted:
    """A level's threshold and display range and, with a rate, its knots and ``calibration``."""

    threshold: float
    low: float
    high: float
    knots: tuple[float, ...] = (math.nan,) * len(EXPONENTS)
    calibration: dict[str, Any] | None = None


def _no_density(module: Any) -> str:
    return f"{type(module).__name__} can't score them as if it had not seen them"


def _normal_images(datamodule: Any) -> int:
    """Count the normal validation images."""
    samples = getattr(getattr(datamodule, "val_data", None), "samples", None)
    return 0 if samples is None else int((samples.label_index == 0).sum())


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"

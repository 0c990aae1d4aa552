# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processor with thresholds from normal images alone, at a false-alarm rate."""

import logging
from typing import Any

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric

from anomalib_osdirf.post_processing.p_values import EXPONENTS, Array
from anomalib_osdirf.post_processing.tail import FEWEST_SCORES, LEVEL, Calibration, calibrate, supports, unsupported

logger = logging.getLogger(__name__)

SOURCES = ("auto", "validation", "training")
_NAMES = {
    "validation": "held-out normal images",
    "training": "training images, each held out",
}


class PValueScale(nn.Module):
    """Normalises raw scores or maps by their p-values, see :func:`~anomalib_osdirf.post_processing.p_values.normalise`.

    Steps that are filled to the brim add exactly their share, so that a score at the threshold is exactly 0.5.
    """

    knots: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.full((len(EXPONENTS),), float("nan")))

    def forward(self, raw: Tensor) -> Tensor:
        """Return values in (0, 1) in the order of the raw ones, of any shape; these themselves before a fit."""
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
        return torch.where(torch.isnan(self.knots[0]), values, total / (1 + total))


class FalseAlarmPostProcessor(PostProcessor):
    """Sets thresholds from normal images alone, such that a given share of normal images is called anomalous.

    No anomalous image is needed, and those among the validation images are not looked at. The image threshold is
    exceeded by the scores of that share of normal images, the pixel threshold by the maps of that share, anywhere in
    them: a false alarm is an image, for masks too. Scores and maps are normalised to z in (0, 1), in their own order,
    with the thresholds at 0.5, and mean something: p = false_alarm_rate^(z / (1 - z)) is the share of normal images
    whose score (whose map, somewhere) is at least as high.

    It takes the place of anomalib's post-processor in any model; models of this package make one from
    ``false_alarm_rate``.

    Args:
        false_alarm_rate: Share of normal images that may be called anomalous, such as 0.01.
        extrapolate: Allow a rate of less than one in as many normal images as there are, by continuing the tail of
            their scores. Defaults to ``False``.
        images: Which normal images tell: those of the ``validation`` data; ``training`` images, each scored as if the
            density had not seen it, which models with a density can do; or ``auto``, validation images where there are
            enough for the rate, else training images. Defaults to ``auto``.
        image_sensitivity: 0.5 keeps the image threshold at the rate; s moves it to the p-value rate^((1 - s) / s).
            Defaults to ``0.5``.
        pixel_sensitivity: The same for the pixel threshold. Defaults to ``0.5``.

    Raises:
        ValueError: If an argument is unknown or out of range.

    Example:
        >>> from anomalib_osdirf import OSDIRF
        >>> model = OSDIRF(post_processor=FalseAlarmPostProcessor(0.001, extrapolate=True))  # doctest: +SKIP
    """

    def __init__(
        self,
        false_alarm_rate: float,
        extrapolate: bool = False,
        images: str = "auto",
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        super().__init__(image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity)
        if not 0 < false_alarm_rate < 1:
            msg = f"false_alarm_rate={false_alarm_rate} is not a share between 0 and 1; use 0.01 for one image in 100."
            raise ValueError(msg)
        if images not in SOURCES:
            msg = f"images={images!r} is unknown; use one of {', '.join(SOURCES)}."
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self.extrapolate = extrapolate
        self.images = images
        self.calibration: dict[str, Any] = {}
        self.image_scale = PValueScale()
        self.pixel_scale = PValueScale()
        # Of each normal image: its score, and the largest and smallest value of its map.
        self.normal_values = CatMetric(nan_strategy="disable")
        self._source: str | None = None

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate", "extrapolate", "images", "calibration")

    # ------------------------------------------------------------------ which images

    @property
    def source(self) -> str:
        """Which normal images the thresholds are, or will be, from."""
        return self._source or str(self.calibration.get("source", "validation"))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Look for enough normal images before the training rather than after it."""
        self.choose_source(pl_module, getattr(trainer, "datamodule", None))

    def choose_source(self, module: Any, datamodule: Any) -> str:  # noqa: ANN401
        """Decide which normal images tell, and refuse what they can't.

        Args:
            module: The model.
            datamodule: Its data, ``None`` if they came as dataloaders: whether those do shows at their end only.

        Returns:
            ``validation`` or ``training``.

        Raises:
            ValueError: If there are too few normal images for the rate.
        """
        held_out, reason = _normal_images(datamodule), getattr(module, "reason_no_held_out_scores", _no_density(module))
        counts: dict[str, int] = {}
        if self.images != "training":
            if held_out is None:  # unlabelled before they are seen: the end of a validation tells
                self._source = "validation"
                return self._source
            counts["validation"] = held_out
        if self.images != "validation" and reason is None:
            counts["training"] = len(datamodule.train_data)
        if not counts:
            msg = f"images=training is not possible, since {reason}; use images=validation."
            raise ValueError(msg)
        enough = [source for source, count in counts.items() if supports(count, self.false_alarm_rate)]
        self._source = enough[0] if enough else max(counts, key=lambda source: counts[source])
        count = counts[self._source]
        if not enough and (not self.extrapolate or count < FEWEST_SCORES):
            message = unsupported(count, self.false_alarm_rate, _NAMES[self._source])
            if self._source == "validation" and reason is not None:
                message += (
                    f" Training images don't count, since {reason}; --data.val_split_mode from_train holds some out."
                )
            raise ValueError(message)
        return self._source

    # ------------------------------------------------------------------ fit

    def add(self, batch: Any, normal: bool = False) -> None:  # noqa: ANN401 - any anomalib batch
        """Note the scores and maps of a batch's normal images, those with a label that says so.

        Args:
            batch: Raw scores ``(B,)`` and maps ``(B, 1, H, W)``, either or both, and ``gt_label``.
            normal: Take all images for normal, whatever their labels.
        """
        score: Any = getattr(batch, "pred_score", None)
        anomaly_map: Any = getattr(batch, "anomaly_map", None)
        label: Any = torch.zeros(len(batch.pred_score)) if normal else getattr(batch, "gt_label", None)
        if label is None or (score is None and anomaly_map is None):
            return
        if anomaly_map is None:
            highest = lowest = torch.full_like(score, float("nan")).flatten()
        else:
            values = anomaly_map.flatten(1)
            highest, lowest = values.amax(dim=1), values.amin(dim=1)
        rows = torch.stack([highest if score is None else score.flatten(), highest, lowest], dim=1)
        own = rows[~label.flatten().bool()]
        if len(own):
            self.normal_values.update(own.float())

    def on_validation_batch_end(
        self,
        trainer: Any,  # noqa: ANN401
        pl_module: Any,  # noqa: ANN401
        outputs: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Note the scores of normal validation images, if they set the thresholds."""
        if self.source == "validation":
            self.add(outputs)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Set the thresholds, if validation images do; Lightning's trial runs have too few of them.

        Raises:
            ValueError: If there are too few normal images for the rate.
        """
        if trainer is not None and (trainer.sanity_checking or trainer.fast_dev_run):
            self.normal_values.reset()
        elif self.source == "validation":
            self.fit("validation")

    def fit(self, source: str) -> None:
        """Set thresholds and scales from the images noted, and say how sure they are.

        Args:
            source: Which images those were, ``validation`` or ``training``.

        Raises:
            ValueError: If they are too few for the rate, or their scores allow no threshold.
        """
        rows = self.normal_values.compute() if self.normal_values.update_called else torch.empty(0, 3)
        self.normal_values.reset()
        scores, highest, lowest = rows.double().cpu().numpy().T
        found = {"image": self._calibrate(source, scores)}
        if not np.isnan(highest).any():
            found["pixel"] = self._calibrate(source, highest)
        # Only now, so that what was fitted before outlasts a failure.
        self.calibration, self._source = {"source": source, "images": len(rows)}, None
        for level, bottom in (("image", scores.min()), ("pixel", lowest.min())):
            if level in found:
                self._set(level, found[level], float(bottom))

    def _calibrate(self, source: str, values: Array) -> Calibration:
        return calibrate(values, self.false_alarm_rate, self.extrapolate, _NAMES[source])

    def _set(self, level: str, found: Calibration, bottom: float) -> None:
        """Set threshold and scale of images or pixels, whose lowest value is ``bottom``."""
        getattr(self, f"{level}_scale").knots.copy_(torch.tensor(found.knots, dtype=torch.float64))
        getattr(self, f"_{level}_threshold").fill_(found.threshold)
        # What displays go from and to: as far above the threshold as normal values lie below it.
        getattr(self, f"{level}_min").fill_(bottom)
        getattr(self, f"{level}_max").fill_(2 * found.threshold - bottom)
        self.calibration[f"{level}_interval"] = list(found.interval)
        logger.info(
            "%s threshold %.6g, from %d %s: the false-alarm rate %s lies between %s and %s (%s interval%s).",
            level.capitalize(),
            found.threshold,
            found.images,
            _NAMES[self.calibration["source"]],
            *(_percent(share) for share in (self.false_alarm_rate, *found.interval, LEVEL)),
            "" if supports(found.images, self.false_alarm_rate) else ", extrapolated",
        )

    # ------------------------------------------------------------------ use

    def normalize_batch(self, batch: Any) -> None:  # noqa: ANN401
        """Normalise predicted scores and maps."""
        if batch.anomaly_map is not None:
            batch.anomaly_map = self.pixel_scale(batch.anomaly_map)
        if batch.pred_score is not None:
            batch.pred_score = self.image_scale(batch.pred_score)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise predictions and compare them with the thresholds, see anomalib.

        Raises:
            ValueError: If there are neither scores nor maps.
        """
        score: Any = predictions.pred_score
        anomaly_map: Any = predictions.anomaly_map
        if score is None and anomaly_map is None:
            msg = "At least one of pred_score or anomaly_map must be provided."
            raise ValueError(msg)
        score = self.image_scale(torch.amax(anomaly_map, dim=(-2, -1)) if score is None else score)
        anomaly_map = None if anomaly_map is None else self.pixel_scale(anomaly_map)
        return InferenceBatch(
            pred_score=score,
            anomaly_map=anomaly_map,
            pred_label=self._apply_threshold(score, self.normalized_image_threshold),
            pred_mask=self._apply_threshold(anomaly_map, self.normalized_pixel_threshold),
        )


def _no_density(module: Any) -> str:  # noqa: ANN401
    return f"{type(module).__name__} can't score them as if it had not seen them"


def _normal_images(datamodule: Any) -> int | None:  # noqa: ANN401
    """Count the normal validation images; ``None`` if that can't be told."""
    if not hasattr(datamodule, "train_data"):
        return None
    samples = getattr(getattr(datamodule, "val_data", None), "samples", None)
    return 0 if samples is None else int((samples.label_index == 0).sum())


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"

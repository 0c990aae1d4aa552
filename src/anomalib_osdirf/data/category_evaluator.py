# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Test metrics and pictures per category; metrics use the model's raw scores."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anomalib.metrics import AnomalibMetric, Evaluator
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class CategoryEvaluator(Evaluator):
    """Computes test metrics for each category, and their mean; has pictures saved in a folder for each category.

    anomalib's post-processor cuts scores off at half a range above and below the threshold. With one threshold for
    many categories that can be all scores of one of them. So this callback comes before it, and maps scores and maps
    into (0, 1) by the minimum and maximum of the validation alone, in a way that keeps their order.

    Without ``category_of`` all images are of one category, whose metrics have no prefix and no mean.
    """

    def __init__(self, test_metrics: Sequence[AnomalibMetric], category_of: Callable[[str], str] | None = None) -> None:
        super().__init__(test_metrics=test_metrics)
        self.category_of = category_of
        self.replaced: list[Evaluator] | None = None  # a list, or it would become a part of this module
        self._picture_folder: list[Path | None] = []
        self._metrics: dict[str, list[Any]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset."""
        super().on_test_start(trainer, pl_module)
        self._metrics.clear()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Update the metrics of the batch's category."""
        batch = args[1]
        category = self._category(batch)
        self._sort_pictures(trainer, pl_module, category)
        if category not in self._metrics:
            self._metrics[category] = [copy.deepcopy(metric) for metric in self.test_metrics]
            for metric in self._metrics[category]:
                metric.reset()
                metric.compute_on_cpu = self.compute_on_cpu and trainer.world_size == 1
        scaled = _scaled(batch, pl_module)
        for metric in self._metrics[category]:
            metric.update(scaled)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log what each category has, and the mean of each metric over the categories that have it."""
        del trainer
        values: dict[str, dict[str, float]] = {}
        for category, metrics in self._metrics.items():
            for metric in metrics:
                value = float(metric.compute()) if metric.update_called else math.nan
                if not math.isnan(value):
                    values.setdefault(metric.name, {})[category] = value
        categories = tuple(self._metrics)
        self._metrics.clear()  # pixels take a lot of memory
        if self.category_of is None:
            logged = {name: of_category[""] for name, of_category in values.items()}
        else:
            logged = {f"{one}/{name}": by[one] for one in categories for name, by in values.items() if one in by}
            logged |= {f"mean/{name}": sum(by.values()) / len(by) for name, by in values.items()}
        # The same in all processes already: so one would also be told not to have synchronised them.
        pl_module.log_dict(logged, sync_dist=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the visualizer."""
        super().on_test_end(trainer, pl_module)
        self._unsort_pictures(pl_module)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save pictures of a prediction by category, too."""
        self._sort_pictures(trainer, pl_module, self._category(args[1]))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the visualizer."""
        super().on_predict_end(trainer, pl_module)
        self._unsort_pictures(pl_module)

    def _sort_pictures(self, trainer: Any, model: Any, category: str) -> None:
        """Save the batch's pictures in its category's folder; anomalib names them by the last folder."""
        visualizer = model.visualizer
        if category and hasattr(visualizer, "output_dir"):
            if not self._picture_folder:
                self._picture_folder.append(visualizer.output_dir)
            folder = self._picture_folder[0] or Path(trainer.default_root_dir) / "images"
            visualizer.output_dir = Path(folder) / category

    def _unsort_pictures(self, model: Any) -> None:
        if self._picture_folder:
            model.visualizer.output_dir = self._picture_folder.pop()

    def _category(self, batch: Any) -> str:
        if self.category_of is None:
            return ""
        categories = {self.category_of(str(path)) for path in batch.image_path}
        if len(categories) > 1:
            msg = f"A test batch mixes the categories {', '.join(sorted(categories))}; use MultiCategory's dataloader."
            raise ValueError(msg)
        return categories.pop()


def _scaled(batch: Any, model: Any) -> Any:
    """Return a batch with labels and masks of the model's threshold, and scores and maps in [0, 1], in raw order."""
    raw, post_processor = copy.copy(batch), model.post_processor
    if post_processor is None:
        return raw
    result = copy.copy(batch)
    post_processor.post_process_batch(result)
    result.pred_score = _to_unit_range(raw.pred_score, post_processor.image_min, post_processor.image_max)
    result.anomaly_map = _to_unit_range(raw.anomaly_map, post_processor.pixel_min, post_processor.pixel_max)
    return result


def _to_unit_range(values: Tensor | None, smallest: Tensor, largest: Tensor) -> Tensor | None:
    span = largest - smallest
    if values is None or not span > 0:  # no range was ever found
        return values
    centred = (values - smallest) / span - 0.5
    return 0.5 + centred / (1 + 2 * centred.abs())  # not cut off: what lies outside keeps its order, too


def measure_by_category(trainer: Any, category_of: Callable[[str], str]) -> None:
    """Replace a model's evaluator by a :class:`CategoryEvaluator` with the same test metrics.

    A callback takes part in a test once it is among the trainer's; it must come before the post-processor.
    """
    restore_evaluator(trainer)
    replaced = [callback for callback in trainer.callbacks if isinstance(callback, Evaluator)]
    metrics: list[Any] = [metric for evaluator in replaced for metric in evaluator.test_metrics]
    ours = CategoryEvaluator(metrics, category_of)
    ours.compute_on_cpu = all(evaluator.compute_on_cpu for evaluator in replaced)
    ours.replaced = replaced
    trainer.callbacks[:] = [ours, *(callback for callback in trainer.callbacks if callback not in replaced)]


def restore_evaluator(trainer: Any) -> None:
    """Undo :func:`measure_by_category`."""
    for evaluator in [callback for callback in trainer.callbacks if isinstance(callback, CategoryEvaluator)]:
        if evaluator.replaced is not None:
            trainer.callbacks.remove(evaluator)
            trainer.callbacks.extend(evaluator.replaced)

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What every model of this package adds to anomalib's exports."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pre_processing import PreProcessor

from anomalib_osdirf.export import exact_export_transform


class ExactExport(ExportMixin):
    """Keeps the exported pre-processing equal to the trained one, and refuses to export what can't score."""

    model: Any
    pre_processor: Any

    def make_pre_processor_exact(self) -> None:
        """Give the pre-processor an export transform that resizes as it does in training.

        anomalib makes one without antialiasing whenever it builds or restores a pre-processor.
        """
        if isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.export_transform = exact_export_transform(self.pre_processor.transform)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as a pickled torch module, see anomalib."""
        return self._export(export_root, lambda root: ExportMixin.to_torch(self, root, model_file_name))

    def to_onnx(self, export_root: Path | str, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401
        """Export to ONNX, see anomalib; opset 18 unless told otherwise, which the exporter writes natively."""
        kwargs = {"opset_version": 18, **kwargs}
        return self._export(export_root, lambda root: ExportMixin.to_onnx(self, root, *args, **kwargs))

    def to_openvino(self, export_root: Path | str, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401
        """Export to OpenVINO, see anomalib."""
        return self._export(export_root, lambda root: ExportMixin.to_openvino(self, root, *args, **kwargs))

    def check_fitted(self) -> None:
        """Raise an error if the model can't score yet."""
        raise NotImplementedError

    def _export(self, export_root: Path | str, export: Callable[[Path], Path]) -> Path:
        """Export into a temporary folder beside the destination and move the files when all are complete."""
        if not hasattr(self.model, "deployed"):  # inside another export: OpenVINO's goes through ONNX's
            return export(Path(export_root))
        self.check_fitted()
        self.make_pre_processor_exact()
        destination = Path(export_root)
        destination.mkdir(parents=True, exist_ok=True)
        full_model = self.model
        with tempfile.TemporaryDirectory(dir=destination, prefix=".export-") as name, torch.no_grad():
            temporary = Path(name)
            try:
                self.model = full_model.eval().deployed()
                model_path = export(temporary).relative_to(temporary)
            finally:
                self.model = full_model
            for file in [path for path in temporary.rglob("*") if path.is_file()]:
                target = destination / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, target)
        return destination / model_path

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The denoiser and the density that CONTRIBUTING.md writes, from training to exported models."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from scipy.stats import multivariate_normal

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.denoisers import VelocityDenoiser, fold
from anomalib_osdirf.models import field_network, scorer
from anomalib_osdirf.scoring import CrossFitted, Sample
from exactness import TOLERANCES, compare, export, predict, textured_files

MakeModel = Callable[..., OSDIRF]
MakeFolder = Callable[..., Folder]
MakeEngine = Callable[..., Engine]


def _block(name: str, folder: Path) -> dict[str, Any]:
    """Run the block of CONTRIBUTING.md that defines a class, and return its names."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"class {name}(" in block)
    (folder / "block.py").write_text(block, encoding="utf-8")
    return runpy.run_path(str(folder / "block.py"))


def _export_says_what_predict_says(model: OSDIRF, data: Folder, engine: MakeEngine, root: Path) -> None:
    run = engine()
    run.fit(model, datamodule=data)
    checkpoint = Path(str(run.best_model_path))
    images = textured_files(root / "images")
    compare(predict(OSDIRF(), images, root, checkpoint), export("openvino", root, checkpoint), *TOLERANCES["openvino"])


def test_the_denoiser_trains_and_exports(
    tiny: MakeModel, folder: MakeFolder, engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = _block("TwoConvolutions", tmp_path)["TwoConvolutions"]
    built = denoiser(8)
    z, timesteps = torch.randn(3, 8, 4, 4), torch.full((3,), 200)
    with torch.no_grad():
        assert not built(z, timesteps).any()
        torch.nn.init.normal_(built.output.weight)
        torch.testing.assert_close(fold(built, 200)(z), built(z, timesteps))

    def build(name: str, dim: int, *_: object) -> torch.nn.Module:
        return VelocityDenoiser(denoiser(dim))

    monkeypatch.setattr(field_network, "build_denoiser", build)
    _export_says_what_predict_says(tiny(), folder(), engine, tmp_path)


def test_the_density_fits_scores_and_exports(
    tiny: MakeModel, folder: MakeFolder, engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _block("IsotropicGaussians", tmp_path)
    density, fit = names["IsotropicGaussians"], names["fit_isotropic"]
    fields, numbers = torch.randn(200, 3, 1, 1) * 2 + 1, torch.arange(200)
    fitted = fit([Sample(fields, 0 * numbers, numbers)], folds=4)
    reference = multivariate_normal(fields.mean(dim=0).flatten(), fields.var(dim=0, correction=0).mean() * torch.eye(3))
    expected = torch.as_tensor(-reference.logpdf(fields.flatten(1)), dtype=torch.float32)
    torch.testing.assert_close(fitted.density(fields).flatten(), expected, rtol=1e-4, atol=1e-4)

    def fit_positions(samples: Any, clusters: int, folds: int, *_: object, **arguments: Any) -> CrossFitted:
        result: CrossFitted = fit(samples, folds, arguments["processes"])
        return result

    monkeypatch.setattr(scorer, "fit_positions", fit_positions)
    monkeypatch.setattr(scorer, "_densities", lambda structure: (density(), density()) if structure else (None, None))
    _export_says_what_predict_says(tiny(density="position"), folder(), engine, tmp_path)

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""InvAD through anomalib's engine and command line: training, checkpoints shared with OSDIRF, exports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback, Trainer

from anomalib_osdirf import OSDIRF, DiffusionAD, InvAD
from conftest import TINY, pre_processor
from exactness import TOLERANCES, compare, export, predict, textured_files, unclip
from small_data import small_folder

CONFIGS = Path(__file__).parents[2] / "configs"
MakeFolder = Callable[..., Folder]
MakeEngine = Callable[..., Engine]


def _small(**arguments: Any) -> InvAD:
    return InvAD(**{**TINY, "seed": 0, "pre_processor": pre_processor(), **arguments})


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("invad")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    engine.fit(_small(whiten=False), datamodule=small_folder(parts))  # features as OSDIRF has them
    return Path(str(engine.best_model_path))


def _scores(model: Any, engine: Engine, datamodule: Folder, checkpoint: Path | None = None) -> dict[str, float]:
    """Metrics of a test, and the scores of its images."""
    metrics = engine.test(model, datamodule=datamodule, ckpt_path=checkpoint)[0]
    return dict(metrics)


def _raw(model: Any, parts: Path) -> torch.Tensor:
    datamodule = small_folder(parts)
    datamodule.setup("test")
    with torch.no_grad():
        images = [model.pre_processor(item.image[None]) for item in datamodule.test_data]
        return torch.cat([model.eval().model(image).pred_score for image in images])


def test_training_and_its_checkpoint(finished: Path, folder: MakeFolder, engine: MakeEngine, parts: Path) -> None:
    model = InvAD.load_from_checkpoint(finished)
    assert model.model.timesteps == [0, 500, 999]
    assert model.model.density.num_images == 12
    assert model.model.score.scale.shape == (2,)
    loaded, named = _scores(model, engine(), folder()), _scores(InvAD(), engine(), folder(), finished)
    assert loaded == pytest.approx(named, abs=1e-6)
    assert {"image_AUROC", "pixel_AUROC"} <= set(loaded)


def test_checkpoint_of_osdirf_loads_as_invad(
    trained: Any,
    finished: Path,
    folder: MakeFolder,
    engine: MakeEngine,
    parts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seed and training are the same, so that only the read-out can differ: refitted, it is that of a training."""
    native = InvAD.load_from_checkpoint(finished)
    native_metrics = _scores(native, engine(), folder())

    model = InvAD.load_from_checkpoint(trained.checkpoint)
    assert "The checkpoint was trained as OSDIRF: features and denoiser are taken over; density, image" in caplog.text
    assert "OSDIRF(whiten=True)" in caplog.text
    assert model.hparams["density"] == "standard"
    assert model.hparams["grid_size"] == TINY["grid_size"]
    with pytest.raises(RuntimeError, match="trained as OSDIRF, and what InvAD scores by must be fitted"):
        model.to_torch(tmp_path)
    metrics = _scores(model, engine(), folder())
    assert metrics == pytest.approx(native_metrics, abs=1e-5)
    torch.testing.assert_close(_raw(model, parts), _raw(native, parts), rtol=1e-4, atol=1e-4)
    for name, value in native.post_processor.state_dict().items():
        torch.testing.assert_close(model.post_processor.state_dict()[name], value, rtol=1e-4, atol=1e-4, equal_nan=True)

    named = InvAD()
    assert _scores(named, engine(), folder(), trained.checkpoint) == pytest.approx(native_metrics, abs=1e-5)


def test_training_resumed_at_its_end_as_the_other_model_only_fits_the_read_out(
    trained: Any, finished: Path, folder: MakeFolder, engine: MakeEngine, parts: Path
) -> None:
    run = engine()
    before = trained.checkpoint.read_bytes()
    metrics = run.train(InvAD(), datamodule=folder(), ckpt_path=trained.checkpoint)[0]
    assert trained.checkpoint.read_bytes() == before
    refitted = InvAD.load_from_checkpoint(str(run.best_model_path))
    native = InvAD.load_from_checkpoint(finished)
    assert dict(metrics) == pytest.approx(_scores(native, engine(), folder()), abs=1e-5)
    torch.testing.assert_close(refitted.model.ema.state_dict(), native.model.ema.state_dict())
    torch.testing.assert_close(_raw(refitted, parts), _raw(native, parts), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(refitted.post_processor.image_threshold, native.post_processor.image_threshold)


def test_checkpoint_of_invad_loads_as_osdirf(
    trained: Any, finished: Path, folder: MakeFolder, engine: MakeEngine, parts: Path
) -> None:
    model = OSDIRF.load_from_checkpoint(finished)
    engine().validate(model, datamodule=folder())
    reference = OSDIRF.load_from_checkpoint(trained.checkpoint)
    torch.testing.assert_close(_raw(model, parts), _raw(reference, parts), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        model.post_processor.image_threshold, reference.post_processor.image_threshold, rtol=1e-5, atol=1e-5
    )


def test_prediction_needs_a_fitted_read_out(trained: Any, parts: Path, engine: MakeEngine) -> None:
    with pytest.raises(RuntimeError, match=r"`anomalib train --model InvAD --ckpt_path` with the training's data does"):
        engine().predict(InvAD(), data_path=parts / "test/good", ckpt_path=trained.checkpoint)


def test_checkpoint_of_a_model_that_is_no_relative(trained: Any, folder: MakeFolder, engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="holds a trained OSDIRF, which can't be loaded as DiffusionAD; use"):
        engine().test(DiffusionAD(), datamodule=folder(), ckpt_path=trained.checkpoint)


def test_own_read_out_arguments_are_kept_on_a_relatives_checkpoint(
    trained: Any, folder: MakeFolder, engine: MakeEngine
) -> None:
    model = InvAD(image_score="diff", num_inference_steps=1, timestep_spacing=[500], density="position_full")
    _scores(model, engine(), folder(), trained.checkpoint)
    assert model.model.timesteps == [500]
    assert model.model.score.scale.shape == (1,)
    assert model.model.density.mean.any()


@pytest.fixture(scope="module")
def unclipped(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unclip(finished, InvAD, tmp_path_factory.mktemp("unclipped"))


@pytest.fixture(scope="module")
def predicted(unclipped: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("predicted")
    return predict(InvAD(), textured_files(root / "images"), root, unclipped)


@pytest.mark.parametrize("kind", list(TOLERANCES))
def test_exports_say_what_engine_predict_says(
    kind: str, unclipped: Path, predicted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)
    compression = kind if kind in {"FP16", "INT8"} else None
    file = export("openvino" if compression else kind, tmp_path, unclipped, compression, InvAD())
    compare(predicted, file, *TOLERANCES[kind])


@pytest.mark.parametrize("image_score", ["nll_diff", "diff"])
def test_quantised_read_out_is_fitted_on_the_quantised_network(
    image_score: str, folder: MakeFolder, engine: MakeEngine, tmp_path: Path
) -> None:
    import openvino

    model = _small(image_score=image_score, density="position_full")
    engine().fit(model, datamodule=folder())
    datamodule = folder()
    path = engine().export(model, "openvino", export_root=tmp_path, compression_type="INT8_PTQ", datamodule=datamodule)
    compiled = openvino.compile_model(str(path), "CPU")
    values = json.loads(Path(str(path)).with_suffix(".json").read_text(encoding="utf-8"))
    scores = [compiled(item.image[None].numpy())["pred_score"].item() for item in datamodule.val_data]
    span = values["image_max"] - values["image_min"]
    ends = [(values[f"image_{name}"] - values["image_threshold"]) / span + 0.5 for name in ("min", "max")]
    assert [min(scores), max(scores)] == pytest.approx(np.clip(ends, 0, 1).tolist(), abs=1e-4)


def test_commands(trained: Any, parts: Path, tmp_path: Path) -> None:
    """As a user types them, on OSDIRF's checkpoint; all in one other process, because start-up is most of it."""
    data = [
        "--data=Folder",
        "--data.name=parts",
        f"--data.root={parts}",
        "--data.normal_dir=train/good",
        "--data.normal_test_dir=test/good",
        "--data.abnormal_dir=test/dent",
        "--data.mask_dir=masks",
        "--data.num_workers=0",
    ]
    quiet = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    checkpoint = "results/InvAD/parts/v0/weights/lightning/model.ckpt"
    commands = [
        ["train", "--model=InvAD", *data, f"--ckpt_path={trained.checkpoint}", *quiet],
        ["test", "--model=InvAD", *data, f"--ckpt_path={checkpoint}", *quiet],
        ["predict", "--model=InvAD", f"--data={parts / 'test' / 'dent'}", f"--ckpt_path={checkpoint}", *quiet],
        ["export", "--model=InvAD", "--export_type=torch", f"--ckpt_path={checkpoint}"],
    ]
    code = "import json, sys; from anomalib_osdirf.__main__ import main; print(*map(main, json.loads(sys.argv[1])))"
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.split()[-4:] == ["0", "0", "0", "0"]
    assert {"model.ckpt", "model.pt"} <= {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("name", ["invad.yaml", "invad_paper.yaml"])
def test_configs_are_valid(name: str) -> None:
    config = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))["model"]
    assert config["class_path"] == "InvAD"
    with torch.device("meta"):
        model = InvAD(**config["init_args"])
    millions = sum(parameter.numel() for parameter in model.model.denoiser.parameters()) / 1e6
    assert millions == pytest.approx(1221 if "paper" in name else 0.615, rel=0.03)


def test_learning_rate_of_the_paper(folder: MakeFolder, engine: MakeEngine) -> None:
    """Up from 1e-6 to 5e-5 over the warm-up's epochs, then half a cosine down to 5e-6 at the end."""
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    arguments = {"learning_rate": 5e-5, "initial_learning_rate": 1e-6, "final_learning_rate": 5e-6}
    model = _small(**arguments, warmup_epochs=2, max_epochs=6)
    engine(callbacks=[Watch()]).fit(model, datamodule=folder())
    assert len(rates) == 18  # three batches an epoch
    expected = [1e-6 + (5e-5 - 1e-6) * step / 6 for step in range(6)]
    expected += [5e-6 + (5e-5 - 5e-6) * 0.5 * (1 + np.cos(np.pi * step / 12)) for step in range(12)]
    assert rates == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 20 * 2**30, reason="needs 20 GB of memory"
)
def test_paper_size_trains_in_pure_bfloat16(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Builds and takes one optimiser step; float32 with its average does not fit 24 GB."""
    script = tmp_path / "step.py"
    script.write_text(PAPER_SIZE_STEP, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(CONFIGS / "invad_paper.yaml"), str(parts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parameters, gigabytes, changed = done.stdout.split()[-3:]
    with capsys.disabled():
        print(f"\ndit_gigant: {int(parameters) / 1e9:.2f} billion parameters, {float(gigabytes):.1f} GB at the most")
    assert int(parameters) == pytest.approx(1.22e9, rel=0.01)
    assert float(gigabytes) < 20
    assert changed == "True"


PAPER_SIZE_STEP = """
import resource, sys
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

# One step of inversion: every step holds a copy of the denoiser, and this is about training.
shorter = {"num_inference_steps": 1, "timestep_spacing": [999], "pre_trained": False}
_, model, _ = Engine.from_config(sys.argv[1], **{f"model.init_args.{name}": value for name, value in shorter.items()})
data = Folder("parts", root=sys.argv[2], normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/dent",
    train_batch_size=1, num_workers=0)
data.setup("fit")
data.train_data.subsample([0, 1], inplace=True)
denoiser = model.model.denoiser
before = denoiser.output.weight.detach().clone()
Engine(accelerator="cpu", devices=1, precision="bf16-true", fast_dev_run=True).fit(model, datamodule=data)
print(sum(one.numel() for one in denoiser.parameters()),
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, bool((denoiser.output.weight != before).any()))
"""

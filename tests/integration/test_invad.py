# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""InvAD through anomalib's engine and command line: training, checkpoints, exports."""

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
    engine.fit(_small(learning_rate=1e-2), datamodule=small_folder(parts))
    return Path(str(engine.best_model_path))


def _scores(model: Any, engine: Engine, datamodule: Folder, checkpoint: Path | None = None) -> dict[str, float]:
    """Metrics of a test, and the scores of its images."""
    metrics = engine.test(model, datamodule=datamodule, ckpt_path=checkpoint)[0]
    return dict(metrics)


def test_training_and_its_checkpoint(finished: Path, folder: MakeFolder, engine: MakeEngine) -> None:
    model = InvAD.load_from_checkpoint(finished)
    assert model.model.network.timesteps == [0, 500, 999]
    assert model.model.scorer.num_images == 12
    assert model.model.scorer.scale.shape == (2,)
    assert model.model.network.kept_step == TINY["max_steps"]  # trained, whatever it explains
    loaded, named = _scores(model, engine(), folder()), _scores(InvAD(), engine(), folder(), finished)
    assert loaded == pytest.approx(named, abs=1e-6)
    assert {"image_AUROC", "pixel_AUROC"} <= set(loaded)


def test_checkpoint_of_another_model_is_refused(
    trained: Any, finished: Path, folder: MakeFolder, engine: MakeEngine, parts: Path, tmp_path: Path
) -> None:
    for checkpoint, name, other in ((trained.checkpoint, "OSDIRF", InvAD), (finished, "InvAD", OSDIRF)):
        for action in (
            lambda: other.load_from_checkpoint(checkpoint),  # noqa: B023 - called in this turn of the loop
            lambda: engine().train(other(), datamodule=folder(), ckpt_path=checkpoint),  # noqa: B023
            lambda: engine().test(other(), datamodule=folder(), ckpt_path=checkpoint),  # noqa: B023
            lambda: engine().predict(other(), data_path=parts / "test/good", ckpt_path=checkpoint),  # noqa: B023
            lambda: engine().export(other(), "torch", export_root=tmp_path / "out", ckpt_path=checkpoint),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"ckpt_path .*{name}.*{other.__name__}"):
                action()
    with pytest.raises(ValueError, match=r"ckpt_path .*OSDIRF.*DiffusionAD.*--model OSDIRF"):
        engine().test(DiffusionAD(), datamodule=folder(), ckpt_path=trained.checkpoint)


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


@pytest.mark.parametrize("image_score", ["nll_diff", pytest.param("diff", marks=pytest.mark.slow)])
def test_quantised_network_has_thresholds_of_its_own(
    image_score: str, folder: MakeFolder, engine: MakeEngine, tmp_path: Path
) -> None:
    import openvino

    model = _small(image_score=image_score)
    engine().fit(model, datamodule=folder())
    datamodule = folder()
    path = engine().export(model, "openvino", export_root=tmp_path, compression_type="INT8_PTQ", datamodule=datamodule)
    compiled = openvino.compile_model(str(path), "CPU")
    values = json.loads(Path(str(path)).with_suffix(".json").read_text(encoding="utf-8"))
    scores = [compiled(item.image[None].numpy())["pred_score"].item() for item in datamodule.val_data]
    span = values["image_max"] - values["image_min"]
    ends = [(values[f"image_{name}"] - values["image_threshold"]) / span + 0.5 for name in ("min", "max")]
    assert [min(scores), max(scores)] == pytest.approx(np.clip(ends, 0, 1).tolist(), abs=1e-4)


@pytest.mark.slow
def test_commands(parts: Path, tmp_path: Path) -> None:
    """As a user types them; all in one other process, because start-up is most of it."""
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
    small = [f"--model.{name}={value}" for name, value in {**TINY, "backbone": "filter_bank"}.items()]
    checkpoint = "results/InvAD/parts/v0/weights/lightning/model.ckpt"
    commands = [
        ["train", "--model=InvAD", *small, *data, *quiet],
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
    millions = sum(parameter.numel() for parameter in model.model.network.denoiser.parameters()) / 1e6
    assert millions == pytest.approx(1221 if "paper" in name else 0.635, rel=0.03)


def test_learning_rate_of_the_paper(folder: MakeFolder, engine: MakeEngine) -> None:
    """Up from 1e-6 to 5e-5 over the warm-up's epochs, then half a cosine down to 5e-6 at the end."""
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    arguments = {"learning_rate": 5e-5, "initial_learning_rate": 1e-6, "final_learning_rate": 5e-6}
    model = _small(**arguments, warmup_epochs=2, max_epochs=6)
    engine(callbacks=[Watch()]).fit(model, datamodule=folder())
    assert len(rates) == 12  # two batches an epoch
    expected = [1e-6 + (5e-5 - 1e-6) * step / 4 for step in range(4)]
    expected += [5e-6 + (5e-5 - 5e-6) * 0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(8)]
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
denoiser = model.model.network.denoiser
before = denoiser.output.weight.detach().clone()
Engine(accelerator="cpu", devices=1, precision="bf16-true", fast_dev_run=True).fit(model, datamodule=data)
print(sum(one.numel() for one in denoiser.parameters()),
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, bool((denoiser.output.weight != before).any()))
"""

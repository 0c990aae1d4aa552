# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""anomalib's commands with our model's name, nothing imported and no flag, as a user types them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anomalib_osdirf.__main__ import main

MODEL = [
    "--model=OSDIRF",
    "--model.backbone=test_efficientnet",
    "--model.pre_trained=false",
    "--model.feature_dim=8",
    "--model.grid_size=4",
    "--model.max_steps=4",
    "--model.pre_processor=anomalib.pre_processing.PreProcessor",
    "--model.pre_processor.transform=torchvision.transforms.v2.Resize",
    "--model.pre_processor.transform.size=[64,64]",
]
QUIET = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]


def _data(root: Path) -> list[str]:
    return [
        "--data=Folder",
        "--data.name=parts",
        f"--data.root={root}",
        "--data.normal_dir=train/good",
        "--data.normal_test_dir=test/good",
        "--data.abnormal_dir=test/dent",
        "--data.mask_dir=masks",
        "--data.val_split_mode=same_as_test",
        "--data.num_workers=0",
    ]


def _anomalib(*arguments: str, folder: Path) -> str:
    """Run the `anomalib` command in its own process, with no knowledge of ours but the start-up hook."""
    command = Path(sys.executable).with_name("anomalib")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout + process.stderr


def test_train_in_a_process_of_its_own(parts: Path, tmp_path: Path) -> None:
    output = _anomalib("train", *MODEL, *_data(parts), *QUIET, folder=tmp_path)
    assert "image_AUROC" in output
    assert "Features of 12 images: cached," in output
    assert "Scorer: fitted on 12 images." in output
    checkpoints = list(tmp_path.rglob("model.ckpt"))
    assert any(path.resolve().parts[-5:-3] == ("parts", "v0") for path in checkpoints)


def test_benchmark_in_a_process_of_its_own(parts: Path, tmp_path: Path) -> None:
    """Short and dotted class paths, of two models."""
    init_args = {
        "backbone": "test_efficientnet",
        "pre_trained": False,
        "feature_dim": 8,
        "grid_size": 4,
        "max_steps": 2,
    }
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {
                "class_path": {"grid": ["OSDIRF", "anomalib_osdirf.models.InvAD"]},
                "init_args": init_args,
            },
            "data": {
                "class_path": "Folder",
                "init_args": {
                    "name": "parts",
                    "root": str(parts),
                    "normal_dir": "train/good",
                    "normal_test_dir": "test/good",
                    "abnormal_dir": "test/dent",
                    "mask_dir": "masks",
                    "num_workers": 0,
                },
            },
        },
    }
    (tmp_path / "benchmark.yaml").write_text(json.dumps(config), encoding="utf-8")
    _anomalib("benchmark", "--config", "benchmark.yaml", folder=tmp_path)
    rows = next(tmp_path.rglob("results.csv")).read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3
    assert "image_AUROC" in rows[0]
    assert ["InvAD" in row for row in rows[1:]] == [False, True]


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_commands_on_a_checkpoint_with_no_argument_repeated(
    command: str, trained: Any, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [f"--data={parts / 'test' / 'dent'}"] if command == "predict" else _data(parts)
    assert main([command, "--model=OSDIRF", *data, f"--ckpt_path={trained.checkpoint}", *QUIET]) == 0
    if command == "predict":
        assert len(list(tmp_path.rglob("*.png"))) == 4


def test_export_command_without_a_root_writes_into_the_run_folder(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """anomalib gives all models of a results folder one place, where they would overwrite each other."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "results/OSDIRF/parts/v0"
    (run / "weights/lightning").mkdir(parents=True)
    shutil.copy(trained.checkpoint, run / "weights/lightning/model.ckpt")
    arguments = [
        "--model=OSDIRF",
        "--export_type=onnx",
        "--ckpt_path=results/OSDIRF/parts/v0/weights/lightning/model.ckpt",
    ]
    assert main(["export", *arguments]) == 0
    assert {"model.onnx", "model.json"} <= {path.name for path in (run / "weights/onnx").iterdir()}
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["OSDIRF"]


def test_export_command_takes_our_options_through_onnx_kwargs(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"post_processor": False, "inference_precision": "any"}
    arguments = ["--model=OSDIRF", "--export_type=openvino", f"--ckpt_path={trained.checkpoint}", "--export_root=out"]
    assert main(["export", *arguments, "--compression_type=FP16", f"--onnx_kwargs={json.dumps(options)}"]) == 0
    values = json.loads(next((tmp_path / "out").rglob("model.json")).read_text(encoding="utf-8"))
    assert values["compression_type"] == "FP16"
    assert {name: values[name] for name in options} == options


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--model.help", "OSDIRF"])
    output = capsys.readouterr().out
    for name in ("backbone_weights", "feature_dim", "timestep", "density", "denoiser", "cache_memory_gb"):
        assert re.search(
            rf"--model\.(init_args\.)?{name} ", output
        )  # older versions of jsonargparse write the long form
    assert "Timestep of the noise schedule" in output


def test_unknown_argument_value_is_one_clear_line(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model=OSDIRF", "--model.denoiser=gan", *_data(parts)]) == 1
    assert "denoiser='gan'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()


def test_quickstart_config_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomalib.engine import Engine

    from anomalib_osdirf.data import SyntheticSurfaces
    from anomalib_osdirf.quickstart import config_file

    monkeypatch.chdir(tmp_path)
    _, model, datamodule = Engine.from_config(config_file(), **{"data.init_args.category": "printed_parts"})
    assert type(model).__name__ == "OSDIRF"
    assert isinstance(datamodule, SyntheticSurfaces)
    assert datamodule.category == "printed_parts"


def test_missing_weights_file_leaves_nothing_but_the_configuration_behind(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument for argument in MODEL if "pre_trained" not in argument]
    assert main(["train", *arguments, "--model.backbone_weights=gone.pth", *_data(parts), *QUIET]) == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"config.yaml"}

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A site without internet, as docs/offline.md has it, in a network namespace that has no network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from environments import install, make_environment, output_of

ROOT = Path(__file__).parents[2]
BACKBONE = "test_efficientnet"
NO_NETWORK = ("unshare", "--net", "--map-root-user")
# The first line makes sure that there is none.
RUN_ALL = """
import json, socket, sys
assert not [name for _, name in socket.if_nameindex() if name != "lo"]
from anomalib_osdirf.__main__ import main
print(*map(main, json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module", autouse=True)
def namespace() -> None:
    """Skip where no network namespace can be made."""
    if shutil.which(NO_NETWORK[0]) is None:
        pytest.skip("network namespace: there is no `unshare`")
    made = subprocess.run([*NO_NETWORK, "true"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"network namespace: not permitted here ({made.stderr.strip()})")


def _train_and_use(parts: Path, folder: Path, **environment: str) -> list[str]:
    """Ask the doctor, train, test, predict and export, in one process; return the exit statuses."""
    weights = folder / "weights.safetensors"
    save_file(timm.create_model(BACKBONE, pretrained=False).state_dict(), weights)
    data = [f"--data.root={parts}", "--data.normal_dir=train/good", "--data.abnormal_dir=test/dent"]
    data = ["--data=Folder", "--data.name=parts", *data, "--data.num_workers=0"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    small = ["--model.feature_dim=8", "--model.grid_size=8", "--model.max_steps=2"]
    checkpoint = "--ckpt_path=results/OSDIRF/parts/v0/weights/lightning/model.ckpt"
    backbone = [f"--model.backbone={BACKBONE}", f"--model.backbone_weights={weights}"]
    commands = [
        ["doctor", f"--backbone={BACKBONE}", f"--weights={weights}"],
        ["train", "--model=OSDIRF", *backbone, *small, *data, *quiet],
        ["test", "--model=OSDIRF", checkpoint, *data, *quiet],
        ["predict", "--model=OSDIRF", checkpoint, f"--data={parts / 'test' / 'dent'}", *quiet],
        ["export", "--model=OSDIRF", checkpoint, "--export_type=openvino"],
    ]
    # Nothing may come from what this machine has in its cache.
    hub = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [*NO_NETWORK, sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        cwd=folder,
        env={**hub, "HF_HOME": str(folder / "empty"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"ok    weights of {BACKBONE}: {weights} fits" in done.stdout
    assert {"model.ckpt", "model.xml"} <= {path.name for path in folder.rglob("*")}
    return done.stdout.split()[-len(commands) :]


def test_training_test_prediction_and_export_with_a_weights_file(parts: Path, tmp_path: Path) -> None:
    assert _train_and_use(parts, tmp_path) == ["0"] * 5


@pytest.mark.slow
def test_the_same_with_the_hub_switched_off(parts: Path, tmp_path: Path) -> None:
    assert _train_and_use(parts, tmp_path, HF_HUB_OFFLINE="1") == ["0"] * 5


def test_a_wheelhouse_is_installed_from_without_a_network(tmp_path: Path) -> None:
    wheelhouse = tmp_path / "wheelhouse"
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    output_of(*wheel, "--wheel-dir", wheelhouse, ROOT)
    python = make_environment(tmp_path / "environment")
    install(python, "--find-links", wheelhouse, "anomalib-osdirf", within=NO_NETWORK)
    code = "import anomalib_osdirf; print(anomalib_osdirf.__file__)"
    assert Path(output_of(*NO_NETWORK, python, "-c", code, cwd=tmp_path)).is_relative_to(tmp_path / "environment")

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment and resumed, a training ends as the undisturbed one; `benchmarks/kills.py` does it at random."""

import itertools
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_osdirf import OSDIRF
from anomalib_osdirf.features.backbone import Backbone
from anomalib_osdirf.models.scorer import Scorer
from anomalib_osdirf.training import field_training
from anomalib_osdirf.training.diffusion_training import ResumeCheckpoint
from anomalib_osdirf.training.feature_cache import FeatureCache
from anomalib_osdirf.training.field_training import FieldTraining
from conftest import TINY, any_denoiser_is_kept, pre_processor
from limits import largest_file, needs_limits
from small_data import small_folder
from states import assert_same_state

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows can't fork")

MakeFolder = Callable[..., Folder]
MakeModel = Callable[..., OSDIRF]
MakeEngine = Callable[..., Engine]

# A spilled cache, several checkpoints, and steps left after the last of them.
ARGUMENTS: dict[str, Any] = {"seed": 0, "max_steps": 7, "checkpoint_every_n_steps": 2, "cache_memory_gb": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the forks do: other threads don't come along, and sums of several are in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def judged_early() -> Iterator[None]:
    """Keep the denoiser of step 2, which is in every checkpoint."""
    with any_denoiser_is_kept(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(field_training, "_JUDGED_EVERY", 2)
        yield


@pytest.fixture(scope="module")
def undisturbed(
    one_thread: None, judged_early: None, parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """State of a training that nobody interrupted."""
    root = tmp_path_factory.mktemp("undisturbed")
    model = OSDIRF(**{**TINY, **ARGUMENTS, "pre_processor": pre_processor()})
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, enable_progress_bar=False)
    engine.fit(model, datamodule=small_folder(parts))
    state = torch.load(str(engine.best_model_path), weights_only=True)["state_dict"]
    assert state["model.network.kept_step"] == 2
    return dict(state)


def _killed(train: Callable[[], None], owner: Any, name: str, call: int, die: Callable[..., None]) -> int:
    """Train in a process that dies at the n-th call of a function, and return its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        original, count = getattr(owner, name), itertools.count(1)

        def function(*args: Any, **kwargs: Any) -> Any:
            if next(count) == call:
                die(*args)
            return original(*args, **kwargs)

        setattr(owner, name, function)
        train()
        os._exit(0)
    except SystemExit as end:
        os._exit(int(str(end.code)))
    except BaseException:  # noqa: BLE001 - a fork must never go on with the tests
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _kill(number: int, *_: object) -> None:
    os.kill(os.getpid(), number)


def _write_half_and_die(content: Any, file: Any) -> None:
    file.write(b"PK" + bytes(5000))
    file.flush()
    _kill(signal.SIGKILL)


@pytest.mark.parametrize(
    ("owner", "name", "call", "die", "resumed_from"),
    [
        pytest.param(Backbone, "maps", 2, partial(_kill, signal.SIGTERM), None, id="feature pass"),
        pytest.param(torch, "save", 1, _write_half_and_die, None, id="first checkpoint"),
        pytest.param(FieldTraining, "training_step", 6, partial(_kill, signal.SIGTERM), "resume.ckpt", id="step"),
        pytest.param(torch, "save", 2, _write_half_and_die, "resume.ckpt", id="later checkpoint"),
        pytest.param(Scorer, "_take", 1, partial(_kill, signal.SIGKILL), "resume.ckpt", id="scorer fit"),
        pytest.param(torch, "save", 4, _write_half_and_die, "resume.ckpt", id="last checkpoint"),
        pytest.param(ResumeCheckpoint, "remove", 1, partial(_kill, signal.SIGKILL), "resume.ckpt", id="end"),
    ],
)
def test_killed_and_resumed(
    owner: Any,
    name: str,
    call: int,
    die: Callable[..., None],
    resumed_from: str | None,
    undisturbed: dict[str, Any],
    folder: MakeFolder,
    tiny: MakeModel,
    engine: MakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    status = _killed(lambda: engine().fit(tiny(**ARGUMENTS), datamodule=folder()), owner, name, call, die)
    # 143 by Lightning's handler of SIGTERM.
    assert status in {-signal.SIGKILL, -signal.SIGTERM, 143}
    assert list((tmp_path / "tmp").iterdir()) == []
    found = {file.name: file for file in tmp_path.rglob("*.ckpt")}
    for file in found.values():
        saved = torch.load(file, weights_only=True)["state_dict"].keys()
        missing = undisturbed.keys() - saved
        assert saved <= undisturbed.keys()
        assert all("density" in name for name in missing)  # which are there once they are fitted
    if resumed_from is None:
        assert not found
    run = engine()
    run.fit(tiny(**ARGUMENTS), datamodule=folder(), ckpt_path=found.get(str(resumed_from)))
    state = torch.load(str(run.best_model_path), weights_only=True)["state_dict"]
    assert_same_state(state, undisturbed, rtol=0, atol=1e-6)
    assert [file.name for file in Path(str(run.best_model_path)).parent.iterdir()] == ["model.ckpt"]
    if resumed_from is not None:
        assert not list(tmp_path.rglob("*.partial"))


@needs_limits
def test_full_disk_keeps_the_training_and_its_last_checkpoint(
    undisturbed: dict[str, Any], folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path
) -> None:
    """The disk is full from the fifth step on, and there is room again for the resumed training."""

    with ExitStack() as limits:

        class Fill(Callback):
            def on_train_batch_end(self, trainer: Any, *_: object) -> None:
                if trainer.global_step == 5:
                    limits.enter_context(largest_file(20_000))

        with pytest.raises(ValueError, match=r"--ckpt_path \S+\.$"):
            engine(callbacks=[Fill()]).fit(tiny(**ARGUMENTS), datamodule=folder())
    (kept,) = tmp_path.rglob("resume.ckpt")
    assert torch.load(kept, weights_only=True)["global_step"] == 4
    run = engine()
    run.fit(tiny(**ARGUMENTS), datamodule=folder(), ckpt_path=kept)
    state = torch.load(str(run.best_model_path), weights_only=True)["state_dict"]
    assert_same_state(state, undisturbed, rtol=0, atol=1e-6)
    assert not list(tmp_path.rglob("*.partial"))


@needs_limits
def test_cache_that_finds_no_room_says_what_helps() -> None:
    with largest_file(20_000), pytest.raises(OSError, match="TMPDIR"):
        FeatureCache(100, (8, 4, 4), memory_limit=0)


@needs_limits
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_export_that_finds_no_room_leaves_nothing(
    kind: str, trained: Any, engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f, **_: Path(f).write_bytes(bytes(100_000)))
    with largest_file(20_000), pytest.raises(OSError, match=r"export_root='.*out'"):
        engine().export(OSDIRF(), kind, export_root=tmp_path / "out", ckpt_path=trained.checkpoint)
    assert list((tmp_path / "out").iterdir()) == []

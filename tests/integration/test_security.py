# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Files of strangers run no code, nothing is sent anywhere, and nothing is written but where the user expects it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from anomalib_osdirf import OSDIRF, DiffusionAD
from anomalib_osdirf.__main__ import main
from anomalib_osdirf.features import build_backbone
from anomalib_osdirf.inference.scoring import load_scorer
from brightness import brightness_model

MakeFolder = Callable[..., Folder]
MakeModel = Callable[..., OSDIRF]
MakeEngine = Callable[..., Engine]


class Malice:
    """Pickles to a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def malicious(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint that makes a folder when it is unpickled."""
    trace = tmp_path / "trace"
    torch.save({"state_dict": {}, "hyper_parameters": {}, "loops": Malice(trace)}, tmp_path / "model.ckpt")
    yield tmp_path / "model.ckpt"
    assert not trace.exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert trace.exists()  # or it proves nothing


def test_malicious_checkpoints_are_refused(
    malicious: Path, folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, tmp_path: Path
) -> None:
    for action in (
        lambda: engine().train(tiny(), datamodule=folder(), ckpt_path=malicious),
        lambda: engine().test(OSDIRF(), datamodule=folder(), ckpt_path=malicious),
        lambda: engine().predict(OSDIRF(), datamodule=folder(), ckpt_path=malicious),
        lambda: engine().export(OSDIRF(), "torch", ckpt_path=malicious, export_root=tmp_path / "out"),
        lambda: OSDIRF.load_from_checkpoint(malicious),
        lambda: DiffusionAD.load_from_checkpoint(malicious),
        lambda: load_scorer(malicious),
    ):
        with pytest.raises(ValueError, match=r"model\.ckpt' is refused"):
            action()


def test_malicious_weights_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"conv_stem.weight": Malice(trace)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"backbone_weights=.*weights\.pth'"):
        build_backbone("test_efficientnet", None, 4).load_pretrained(tmp_path / "weights.pth")
    assert not trace.exists()


def test_broken_checkpoints_are_named(trained: Any, folder: MakeFolder, engine: MakeEngine, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(trained.checkpoint.read_bytes()[:-1000])
    for action in (
        lambda: engine().test(OSDIRF(), datamodule=folder(), ckpt_path=tmp_path / "model.ckpt"),
        lambda: OSDIRF.load_from_checkpoint(tmp_path / "model.ckpt"),
        lambda: load_scorer(tmp_path / "model.ckpt"),
    ):
        with pytest.raises(ValueError, match=r"model\.ckpt'"):
            action()


# ---------------------------------------------------------------------- network, files

_watched: list[tuple[str, tuple[Any, ...]]] | None = None
_PATHS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and (event.startswith(("socket.", "os.")) or event in {"open", "subprocess.Popen"}):
        _watched.append((event, arguments))


@pytest.fixture(scope="module", autouse=True)
def watcher() -> None:
    sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Note what Python does to the system."""
    global _watched  # noqa: PLW0603 - a hook can't be removed
    _watched = events = []
    try:
        yield events
    finally:
        _watched = None


def _connections(events: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    names = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
    return [(event, arguments) for event, arguments in events if event in names]


def _written(events: list[tuple[str, tuple[Any, ...]]]) -> set[Path]:
    paths: list[Any] = []
    for event, arguments in events:
        if event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths.append(arguments[0])
        elif event in _PATHS:
            paths += arguments[: _PATHS[event]]
    return {Path(os.fsdecode(path)) for path in paths if not isinstance(path, int)}


def test_nothing_is_sent_and_nothing_written_elsewhere(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, temporary = tmp_path / "work", tmp_path / "tmp"
    for path in (work, temporary):
        path.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    model = ["--model=OSDIRF", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
    data = ["--data=Folder", "--data.name=parts", f"--data.root={parts}", "--data.normal_dir=train/good"]
    data += ["--data.normal_test_dir=test/good", "--data.abnormal_dir=test/dent", "--data.num_workers=0"]
    small = ["--model.backbone=filter_bank", "--model.grid_size=4", "--model.max_steps=2"]
    with watched() as events:
        main(["train", *model, *small, "--model.cache_memory_gb=0", *data])
        (checkpoint,) = work.rglob("model.ckpt")
        main(["predict", *model, f"--data={parts / 'test' / 'dent'}", f"--ckpt_path={checkpoint}"])
        main(["export", "--model=OSDIRF", "--export_type=torch", f"--ckpt_path={checkpoint}"])
    assert len(events) > 100
    assert _connections(events) == []
    assert not {event for event, _ in events} & {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
    elsewhere = {path for path in _written(events) if not path.resolve().is_relative_to(tmp_path.resolve())}
    assert {path for path in elsewhere if path != Path(os.devnull) and "__pycache__" not in path.parts} == set()
    assert list(temporary.iterdir()) == []


def test_the_hub_is_left_alone_when_offline(
    folder: MakeFolder, tiny: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with watched() as events, pytest.raises(RuntimeError, match="HF_HUB_OFFLINE"):
        engine().fit(tiny(pre_trained=True), datamodule=folder())
    assert _connections(events) == []


def test_openvino_sends_no_usage_statistics(tmp_path: Path) -> None:
    """In a process of its own, as nobody has imported OpenVINO there yet."""
    import openvino

    model = openvino.convert_model(brightness_model(tmp_path))
    openvino.save_model(model, tmp_path / "model.xml")
    code = f"""
import os, sys
from pathlib import Path
import numpy as np
names = {{"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "os.fork"}}  # a process of its own sends
sys.addaudithook(lambda event, arguments: os._exit(3) if event in names else None)
from anomalib_osdirf.inference.scoring import load_scorer
load_scorer(Path({str(tmp_path / "model.xml")!r})).score(np.zeros((9, 9, 3), np.float32))
assert "openvino" in sys.modules
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("compression", [None, "INT8_PTQ"])
def test_exports_send_no_usage_statistics(
    compression: str | None, tiny: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):  # noqa: N818
        pass

    def ask() -> None:
        raise Asked

    monkeypatch.setattr("anomalib_osdirf.export.exact_export.send_nothing", ask)
    with pytest.raises(Asked):
        tiny().to_openvino(tmp_path, compression_type=compression, datamodule=object())

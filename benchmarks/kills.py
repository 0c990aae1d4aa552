# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Kill trainings and exports at random moments, go on with `--ckpt_path`, and compare with the undisturbed ones.

Each run is anomalib's command line in a process of its own, on a small drawn data set. The moments are random within
each phase by turns; signals are SIGKILL and SIGTERM by turns; one resumed training in four is killed again.

python benchmarks/kills.py --kills 50 --output kills.json
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils import read_image

from anomalib_osdirf import OSDIRF, DiffusionAD
from anomalib_osdirf.__main__ import main as run_command
from anomalib_osdirf.data import SyntheticSurfaces
from anomalib_osdirf.export.exact_export import ExactExport
from anomalib_osdirf.training.checkpoint_files import CheckpointFiles
from anomalib_osdirf.training.diffusion_training import DiffusionTraining
from anomalib_osdirf.training.field_training import FieldTraining

TRAINING_PHASES = ("feature pass", "training", "scorer fit", "validation", "checkpoint")
EXPORTS = ("torch", "onnx", "openvino")
DATA = {"num_train": 24, "num_test_good": 4, "num_test_per_defect": 1, "image_size": 96}
# A spilled cache, and checkpoints often enough to be hit.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "OSDIRF": {"backbone": "filter_bank", "grid_size": 8, "cache_memory_gb": 0, "max_steps": 40},
    "DiffusionAD": {
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "residual_blocks": 1,
        "attention_levels": 1,
        "segmentation_channels": 8,
        "max_steps": 12,
    },
}
CLASSES: dict[str, Any] = {"OSDIRF": OSDIRF, "DiffusionAD": DiffusionAD}
PARTIAL = ("*.partial", ".unfinished-*")


@dataclass
class Moment:
    """When to kill: so many seconds after the n-th beginning of a phase."""

    phase: str
    occurrence: int
    delay: float
    signal: str


@dataclass
class Trial:
    """What came of one interrupted run."""

    model: str
    moments: list[Moment] = field(default_factory=list)
    resumed_from: list[str] = field(default_factory=list)
    broken_files: list[str] = field(default_factory=list)  # with a name that would be picked up
    left_in_temporary_folder: list[str] = field(default_factory=list)
    left_in_results: list[str] = field(default_factory=list)  # after the run that ended well
    differences: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class Child:
    """A process that runs anomalib's command line and tells which phases begin and end.

    Args:
        arguments: The command line.
        folder: Its folder, with its folder of temporary files.
    """

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.marks: list[tuple[float, str]] = []
        self._rest = b""
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self._pipe, pipe = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _be_child(arguments, folder, pipe)
        os.close(pipe)

    def read(self, seconds: float | None) -> bool:
        """Take note of what it tells within so many seconds; return ``False`` once it has ended."""
        ready, _, _ = select.select([self._pipe], [], [], seconds)
        if not ready:
            return True
        told = os.read(self._pipe, 4096)
        *lines, self._rest = (self._rest + told).split(b"\n")
        self.marks += [(time.perf_counter(), line.decode()) for line in lines]
        return bool(told)

    def wait(self) -> int:
        """Wait for its end, and return its status."""
        while self.read(None):
            pass
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_at(self, moment: Moment) -> bool:
        """Kill it at a moment; return whether it lived so long."""
        while [mark for _, mark in self.marks].count(f"+{moment.phase}") < moment.occurrence:
            if not self.read(None):
                return False
        end = time.perf_counter() + moment.delay
        while (left := end - time.perf_counter()) > 0:
            if not self.read(left):
                return False
        os.kill(self.pid, signal.Signals[moment.signal])
        return True


def _be_child(arguments: list[str], folder: Path, pipe: int) -> None:
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    tempfile.tempdir = str(folder / "tmp")
    for owner, name, phase in (
        (FieldTraining, "_feature_pass", "feature pass"),
        (DiffusionTraining, "on_train_start", "training"),
        (FieldTraining, "fit_scoring", "scorer fit"),
        (DiffusionAD, "fit_scoring", "scorer fit"),
        (DiffusionTraining, "_validate", "validation"),
        (CheckpointFiles, "save_checkpoint", "checkpoint"),
        (ExactExport, "_export", "export"),
    ):
        setattr(owner, name, _telling(getattr(owner, name), phase, pipe))
    try:
        status = run_command(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - the log has it
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def _telling(original: Callable[..., Any], phase: str, pipe: int) -> Callable[..., Any]:
    @wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        os.write(pipe, f"+{phase}\n".encode())
        try:
            return original(*args, **kwargs)
        finally:
            os.write(pipe, f"-{phase}\n".encode())

    return function


class Kills:
    """All trials.

    Args:
        folder: Scratch folder.
        seed: Seed of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        data = SyntheticSurfaces(root=folder / "data", **DATA)
        data.prepare_data()
        files = sorted((data.directory / "test").rglob("*.png"))
        self.images = torch.stack([read_image(file, as_tensor=True) for file in files])
        self.undisturbed: dict[str, Path] = {}
        self.spans: dict[str, dict[str, list[float]]] = {}
        self.signals = self._by_turns(["SIGKILL", "SIGTERM"])

    @staticmethod
    def _by_turns(items: list[Any]) -> Iterator[Any]:
        while True:
            yield from items

    # ------------------------------------------------------------------ commands

    def train_command(self, model: str, checkpoint: Path | None = None) -> list[str]:
        """Return the command line of a training."""
        arguments = {"seed": 0, "checkpoint_every_n_steps": 3, **ARGUMENTS[model]}
        return [
            "fit",
            f"--model={model}",
            *(
                f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}"
                for name, value in arguments.items()
            ),
            "--model.pre_processor=anomalib.pre_processing.PreProcessor",
            "--model.pre_processor.transform=torchvision.transforms.v2.Resize",
            "--model.pre_processor.transform.size=[128,128]",
            "--data=anomalib_osdirf.data.SyntheticSurfaces",
            f"--data.root={self.folder / 'data'}",
            *(f"--data.{name}={value}" for name, value in DATA.items()),
            "--data.train_batch_size=8",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.enable_progress_bar=false",
            *([f"--ckpt_path={checkpoint}"] if checkpoint else []),
        ]

    def export_command(self, kind: str) -> list[str]:
        """Return the command line of an export of the undisturbed model."""
        checkpoint = self.undisturbed["OSDIRF"]
        return ["export", "--model=OSDIRF", f"--ckpt_path={checkpoint}", f"--export_type={kind}", "--export_root=out"]

    # ------------------------------------------------------------------ undisturbed

    def undisturb(self, name: str, command: list[str]) -> Path:
        """Run a command to its end, and note how long its phases take.

        Returns:
            Its folder.
        """
        folder = self.folder / f"undisturbed-{name}"
        child = Child(command, folder)
        if child.wait():
            msg = f"the undisturbed run failed, see {folder / 'log.txt'}."
            raise RuntimeError(msg)
        spans: dict[str, list[float]] = {}
        begun: dict[str, float] = {}
        for moment, mark in child.marks:
            if mark.startswith("+"):
                begun[mark[1:]] = moment
            else:
                spans.setdefault(mark[1:], []).append(moment - begun[mark[1:]])
        if "training" in spans:  # from its first step to the fit that follows its last
            times = dict(reversed([(mark, moment) for moment, mark in child.marks]))
            spans["training"] = [times["+scorer fit"] - times["-training"]]
        self.spans[name] = spans
        return folder

    # ------------------------------------------------------------------ trials

    def moment(self, name: str, phase: str | None) -> Moment:
        """Draw a moment in a phase, in any at all where it is ``None``."""
        spans = self.spans[name]
        phase = phase or self.random.choice(sorted(spans))
        number = self.random.randrange(len(spans[phase]))
        # A little longer than the phase: its end is a moment as well.
        delay = self.random.uniform(0, 1.1 * spans[phase][number])
        return Moment(phase, number + 1, delay, next(self.signals))

    def train(self, model: str, phase: str, number: int) -> Trial:
        """Interrupt a training, once or twice, and let it end."""
        trial, folder, checkpoint = Trial(model), self.folder / f"trial-{number}", None
        wanted = 2 if self.random.random() < 0.25 else 1
        for attempt in range(100):
            child = Child(self.train_command(model, checkpoint), folder)
            if len(trial.moments) < wanted:
                moment = self.moment(model, None if attempt else phase)
                if child.kill_at(moment):
                    trial.moments.append(moment)
            status = child.wait()
            self._inspect(folder, trial)
            if status == 0 and (finished := _newest(folder, "model.ckpt")):
                break
            if status > 0 and status != 128 + signal.SIGTERM:
                trial.error = f"status {status}, see {folder / 'log.txt'}"
                return trial
            checkpoint = _newest(folder, "resume.ckpt") or _newest(folder, "model.ckpt")
            trial.resumed_from.append(checkpoint.name if checkpoint else "nothing")
        trial.left_in_results = _left(folder)
        trial.differences = self._compare(model, finished)
        return trial

    def export(self, kind: str, number: int) -> Trial:
        """Interrupt an export, and do it again."""
        name = f"export-{kind}"
        trial, folder = Trial(name), self.folder / f"trial-{number}"
        moment = self.moment(name, "export")
        child = Child(self.export_command(kind), folder)
        if child.kill_at(moment):
            trial.moments.append(moment)
        child.wait()
        model = folder / "out" / "weights" / kind / f"model.{_SUFFIXES[kind]}"
        if model.exists() and _scores(model, self.images) is None:
            trial.broken_files.append(str(model))
        trial.resumed_from.append("nothing")
        if child := Child(self.export_command(kind), folder):
            status = child.wait()
        if status:
            trial.error = f"status {status}, see {folder / 'log.txt'}"
            return trial
        trial.left_in_temporary_folder = sorted(path.name for path in (folder / "tmp").iterdir())
        trial.left_in_results = _left(folder)
        whole = self.folder / f"undisturbed-{name}" / "out" / model.relative_to(folder / "out")
        expected, actual = (_scores(path, self.images) for path in (whole, model))
        assert expected is not None
        assert actual is not None
        trial.differences = {"predictions": float((expected - actual).abs().max())}
        return trial

    def _inspect(self, folder: Path, trial: Trial) -> None:
        trial.broken_files += [str(file) for file in folder.rglob("*.ckpt") if not _is_whole(file)]
        trial.left_in_temporary_folder += [path.name for path in (folder / "tmp").iterdir()]

    def _compare(self, model: str, checkpoint: Path) -> dict[str, float]:
        """Return the largest differences to the undisturbed training."""
        pair = [CLASSES[model].load_from_checkpoint(path).eval() for path in (self.undisturbed[model], checkpoint)]
        states = [{key: value for key, value in one.state_dict().items() if torch.is_tensor(value)} for one in pair]
        assert states[0].keys() == states[1].keys()
        largest = dict.fromkeys(("weights", "scorer", "thresholds"), 0.0)
        for key, value in states[0].items():
            name = "thresholds" if key.startswith("post_processor") else "scorer" if "scorer" in key else "weights"
            difference = (value.double() - states[1][key].double()).abs().nan_to_num()
            largest[name] = max(largest[name], float(difference.max()) if difference.numel() else 0.0)
        with torch.no_grad():
            scores = [one(self.images) for one in pair]
        largest["predictions"] = max(
            float((scores[0].pred_score - scores[1].pred_score).abs().max()),
            float((scores[0].anomaly_map - scores[1].anomaly_map).abs().max()),
        )
        return largest


_SUFFIXES = {"torch": "pt", "onnx": "onnx", "openvino": "xml"}


def _scores(model: Path, images: torch.Tensor) -> torch.Tensor | None:
    """Score images with an exported model, ``None`` if it can't be read."""
    try:
        if model.suffix == ".pt":
            with torch.no_grad():
                exported = torch.load(model, weights_only=False)["model"].eval()
                return exported(images).pred_score.flatten()
        from anomalib_osdirf.inference.scoring import load_scorer

        scorer = load_scorer(model)
        return torch.tensor([scorer.score(image.permute(1, 2, 0).numpy()).score for image in images])
    except Exception:  # noqa: BLE001 - a broken model is what is looked for
        return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(torch.load(checkpoint, map_location="cpu", weights_only=True))
    except Exception:  # noqa: BLE001 - whatever is wrong with it
        return False


def _newest(folder: Path, name: str) -> Path | None:
    return max(folder.rglob(name), key=lambda file: file.stat().st_mtime_ns, default=None)


def _left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for pattern in PARTIAL for path in folder.rglob(pattern))


def main() -> None:
    """Run the trials, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="interrupted runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", type=Path, default=Path("kills"), help="scratch folder, removed if all went well")
    parser.add_argument("--output", type=Path, help="JSON file for all details")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    kills = Kills(arguments.folder.resolve(), arguments.seed)
    for model in ARGUMENTS:
        folder = kills.undisturb(model, kills.train_command(model))
        kills.undisturbed[model] = next(folder.rglob("model.ckpt"))
    for kind in EXPORTS:
        kills.undisturb(f"export-{kind}", kills.export_command(kind))
    # DiffusionAD has no feature pass.
    plan = [("OSDIRF", phase) for phase in TRAINING_PHASES] + [("DiffusionAD", phase) for phase in TRAINING_PHASES[1:]]
    plan += [("export", kind) for kind in EXPORTS]
    trials: list[Trial] = []
    while sum(len(trial.moments) for trial in trials) < arguments.kills:
        model, phase = plan[len(trials) % len(plan)]
        number = len(trials)
        trials.append(kills.export(phase, number) if model == "export" else kills.train(model, phase, number))
        print(json.dumps(asdict(trials[-1])), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps([asdict(trial) for trial in trials], indent=1), "utf-8")
        if not trials[-1].error:
            shutil.rmtree(kills.folder / f"trial-{number}")
    print(f"python benchmarks/kills.py --kills {arguments.kills} --seed {arguments.seed}")
    print(f"kills: {Counter(f'{m.phase}, {m.signal}' for trial in trials for m in trial.moments)}")
    print(f"resumed from: {Counter(name for trial in trials for name in trial.resumed_from)}")
    for name in ("weights", "scorer", "thresholds", "predictions"):
        values = [trial.differences[name] for trial in trials if name in trial.differences]
        print(f"largest difference, {name}: {max(values):.1e} (median {statistics.median(values):.1e})")
    for name in ("broken_files", "left_in_temporary_folder", "left_in_results"):
        print(f"{name}: {sum(len(getattr(trial, name)) for trial in trials)}")
    errors = [trial.error for trial in trials if trial.error]
    print(f"errors: {len(errors)}", *errors, sep="\n")
    if not errors:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()

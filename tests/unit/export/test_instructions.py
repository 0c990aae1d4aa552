# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

import logging
import os

import pytest

from anomalib_osdirf.export import instructions


def test_a_processor_that_dies_of_amx_goes_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(instructions.VARIABLE, raising=False)
    monkeypatch.setattr(instructions, "amx_is_broken", lambda: True)
    with caplog.at_level(logging.WARNING):
        instructions.avoid_broken_instructions()
        instructions.avoid_broken_instructions()
    assert os.environ[instructions.VARIABLE] == instructions.WITHOUT_AMX
    assert len(caplog.records) == 1
    assert "kills whoever uses them" in caplog.text


def test_a_sound_processor_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(instructions.VARIABLE, raising=False)
    monkeypatch.setattr(instructions, "amx_is_broken", lambda: False)
    instructions.avoid_broken_instructions()
    assert instructions.VARIABLE not in os.environ


def test_the_trial_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the instructions in question it must come to its end anywhere, or its verdict means nothing."""
    import subprocess
    import sys

    environment = {**os.environ, instructions.VARIABLE: instructions.WITHOUT_AMX}
    subprocess.run([sys.executable, "-c", instructions._TRIAL], check=True, env=environment)

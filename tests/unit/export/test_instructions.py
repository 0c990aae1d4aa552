# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

import logging
import os
import subprocess
import sys

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
    environment = {**os.environ, instructions.VARIABLE: instructions.WITHOUT_AMX}
    subprocess.run([sys.executable, "-c", instructions._TRIAL], check=True, env=environment)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signal stacks are Linux's here")
@pytest.mark.parametrize(("size", "kept"), [(12_000, False), (2**17, True)])
def test_signals_have_room(size: int, kept: bool) -> None:
    """In a process of its own, whose signal stack is its own as well."""
    program = f"""
import ctypes
from anomalib_osdirf.export.instructions import _SignalStack, make_room_for_signals
memory, stack, library = ctypes.create_string_buffer({size}), _SignalStack(), ctypes.CDLL(None)
small = _SignalStack(ctypes.addressof(memory), 0, {size})
assert library.sigaltstack(ctypes.byref(small), None) == 0
make_room_for_signals()
library.sigaltstack(None, ctypes.byref(stack))
print(stack.flags == 0 and stack.size == {size})
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said.strip() == str(kept)

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The command says what is wrong."""

from pathlib import Path

import pytest

from anomalib_osdirf.__main__ import main


def test_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomalib_osdirf.app import command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["app", str(tmp_path)]) == 1
    assert "pip install 'anomalib-osdirf[app]'" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    assert main(["app", str(tmp_path / "gone.xml")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["app", "model.xml", "--watch", str(tmp_path / "gone")]) == 1
    assert "--watch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["app", "model.xml", "--port", "99999"])
    assert "use 1 to 65535" in capsys.readouterr().err

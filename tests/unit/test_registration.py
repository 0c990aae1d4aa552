# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

import gc
from collections.abc import Callable, Iterator

import anomalib.data
import anomalib.models
import pytest
import torch
from anomalib.data import get_datamodule
from anomalib.models import AnomalibModule, Padim, get_model, list_models

from anomalib_osdirf import OSDIRF, DiffusionAD, InvAD
from anomalib_osdirf.data import SyntheticSurfaces
from anomalib_osdirf.registration import register, register_datamodule

MakeModel = Callable[..., type[AnomalibModule]]


@pytest.fixture
def make_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeModel]:
    """Make a model class as some plug-in would; anomalib forgets it after the test."""
    monkeypatch.setattr(anomalib.models, "ALLOWED_MODULES", set(anomalib.models.ALLOWED_MODULES))
    names_before = set(vars(anomalib.models))

    def make(
        name: str = "ToyModel",
        base: type = AnomalibModule,
        module: str = "toy_plugin.models.toy.lightning_model",
    ) -> type[AnomalibModule]:
        return type(base)(name, (base,), {"__module__": module})

    yield make
    for name in set(vars(anomalib.models)) - names_before:
        delattr(anomalib.models, name)
    gc.collect()  # AnomalibModule.__subclasses__() holds weak references


def test_registered_model_is_an_attribute_of_anomalib_models(make_model: MakeModel) -> None:
    model_class = make_model()
    assert register(model_class) is model_class
    assert anomalib.models.ToyModel is model_class


def test_every_package_around_the_model_is_allowed(make_model: MakeModel) -> None:
    before = set(anomalib.models.ALLOWED_MODULES)
    register(make_model())
    added = {"toy_plugin", "toy_plugin.models", "toy_plugin.models.toy"}
    assert anomalib.models.ALLOWED_MODULES == before | added


def test_registering_twice_changes_nothing(make_model: MakeModel) -> None:
    model_class = register(make_model())
    allowed = set(anomalib.models.ALLOWED_MODULES)
    assert register(model_class) is model_class
    assert anomalib.models.ALLOWED_MODULES == allowed


def test_reloaded_model_takes_the_place_of_its_former_self(make_model: MakeModel) -> None:
    register(make_model())
    reloaded = register(make_model())
    assert anomalib.models.ToyModel is reloaded


@pytest.mark.parametrize("name", ["Padim", "PADIM", "CFM"])
def test_models_of_anomalib_are_not_shadowed(make_model: MakeModel, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} .* anomalib\.models\."):
        register(make_model(name))
    assert anomalib.models.Padim is Padim


def test_functions_of_anomalib_are_not_shadowed(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"anomalib\.models\.get_model"):
        register(make_model("get_model"))
    assert anomalib.models.get_model is get_model


def test_indirect_subclass_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(TypeError, match="AnomalibModule"):
        register(make_model(base=Padim))


@pytest.mark.parametrize(
    "name",
    [
        "OSDIRF",
        "osdirf",
        {"class_path": "OSDIRF"},
        {"class_path": "anomalib.models.OSDIRF"},
        {"class_path": "anomalib_osdirf.OSDIRF"},
        {"class_path": "anomalib_osdirf.models.OSDIRF"},
    ],
    ids=str,
)
def test_anomalib_gets_our_model_by_every_name(name: str | dict[str, str]) -> None:
    assert type(get_model(name)) is OSDIRF


@pytest.mark.parametrize("case", ["snake", "pascal"])
@pytest.mark.parametrize("model_class", [OSDIRF, InvAD, DiffusionAD])
def test_listed_name_leads_back_to_the_model(model_class: type[AnomalibModule], case: str) -> None:
    """The snake case of OSDIRF is o_s_d_i_r_f in anomalib, in the manner of its own anomaly_d_i_n_o."""
    wanted = model_class.__name__.lower()
    name = next(name for name in list_models(case) if name.replace("_", "").lower() == wanted)
    with torch.device("meta"):
        assert type(get_model(name)) is model_class


def test_anomalibs_benchmark_finds_our_datamodules_by_every_name() -> None:
    for name in ("SyntheticSurfaces", "anomalib_osdirf.data.SyntheticSurfaces"):
        found = get_datamodule({"class_path": name, "init_args": {"category": "brushed_metal"}})
        assert isinstance(found, SyntheticSurfaces)
        assert found.category == "brushed_metal"


def test_datamodules_of_anomalib_are_not_shadowed() -> None:
    original = anomalib.data.Folder
    with pytest.raises(ValueError, match=r"Folder .*anomalib\.data\..*Folder"):
        register_datamodule(type("Folder", (SyntheticSurfaces,), {}))
    assert anomalib.data.Folder is original

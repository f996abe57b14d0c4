"""What another package holds a model in is known by its type's name, and its framework is not imported."""

import sys

import importlib_metadata
import pytest
import torch

import commhub
from commhub.registry import _models
from commhub.testing import mlp
from commhub.training import _register

KNOWN = """
import commhub

def hold(trainer):
    return [trainer.held]

MODELS = (
    commhub.ModelSpec(type="weaver.loop.Trainer", advice="Use weaver_commhub.attach(trainer).", models=hold),
    commhub.ModelSpec(type="weaver.loop.Base", advice="Nothing serves it."),
)
"""


def of(name, *bases, package="weaver.loop"):
    """A class of another package."""
    return type(name, bases, {"__module__": package, "held": None})


Base = of("Base")
Trainer = of("Trainer", Base)


@pytest.fixture
def known(site):
    site.add("weaver-commhub", models=(["weaver"], KNOWN))
    return site


@pytest.mark.parametrize(
    ("made", "advice"),
    [
        (Trainer, "Use weaver_commhub.attach(trainer)."),
        (of("Mine", Trainer, package="__main__"), "Use weaver_commhub.attach(trainer)."),
        (of("Other", Base), "Nothing serves it."),
    ],
)
def test_register_says_what_serves_a_type_and_those_that_derive_from_it(known, made, advice):
    with pytest.raises(commhub.RegistrationError) as told:
        commhub.register(made(), "fp16")
    assert str(told.value).endswith(f"is no DistributedDataParallel model and holds none. {advice}")
    assert "weaver" not in sys.modules


def test_of_what_nobody_knows_it_says_what_to_wrap_it_in(known):
    for model in (mlp(), of("Strange", torch.nn.Module, package="other")()):
        with pytest.raises(commhub.RegistrationError, match="Wrap it in one"):
            commhub.register(model, "fp16")
    for model in (7, of("Strange", package="other")()):
        with pytest.raises(commhub.RegistrationError, match=r"Give the torch\.nn\.parallel\.Distributed"):
            commhub.register(model, "fp16")


def test_no_module_is_loaded_for_a_model_of_another_package(site):
    module = site.add("weaver-commhub", models=(["weaver"], KNOWN))
    assert _models.advice_on(mlp()) == ""
    assert f"{module}_models" not in sys.modules


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise SystemExit(3)", "SystemExit"),
        ("MODELS = [1]", "not a tuple of ModelSpec"),
        ("MODELS = 7", "not a tuple of ModelSpec"),
        ("import commhub\nMODELS = (commhub.ModelSpec(type='', advice='x'),)", "write one line of text"),
        ("import commhub\nMODELS = (commhub.ModelSpec(type='x', advice='a\\nb'),)", "write one line of text"),
        ("import commhub\nMODELS = (commhub.ModelSpec(type='x', advice='a', models=3),)", "give a function, or None"),
        ("", "MODELS"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_named_with_the_reason(site, source, reason):
    site.add("weaver-commhub", models=(["weaver"], source))
    with pytest.raises(commhub.RegistrationError, match="weaver-commhub serves models of weaver, but") as told:
        commhub.register(Trainer(), "fp16")
    assert reason in str(told.value)
    with pytest.raises(commhub.PluginError, match="Repair, upgrade or uninstall weaver-commhub"):
        commhub.registration(Trainer())


def test_a_broken_adapter_says_nothing_of_other_packages(site):
    site.add("weaver-commhub", models=(["weaver"], "raise ValueError"))
    for strange in (of("Strange", package="other")(), of("Strange", torch.nn.Module, package="other")()):
        with pytest.raises(commhub.RegistrationError) as told:
            commhub.register(strange, "fp16")
        assert "weaver" not in str(told.value)


def test_the_extra_that_serves_a_package_is_named_where_it_is_not_installed(site, monkeypatch):
    monkeypatch.setattr(_models, "_own_extras", lambda: ["all", "weaver", "py-torch-loom"])
    with pytest.raises(commhub.RegistrationError, match=r"pip install 'commhub\[weaver\]'"):
        commhub.register(Trainer(), "fp16")
    with pytest.raises(commhub.RegistrationError, match=r"pip install 'commhub\[py-torch-loom\]'"):
        commhub.register(of("Fit", package="py_torch_loom.fit")(), "fp16")


def test_the_extras_are_those_of_the_core(monkeypatch):
    assert "bench" in _models._own_extras()

    def nowhere(_name):
        raise importlib_metadata.PackageNotFoundError

    monkeypatch.setattr(importlib_metadata, "metadata", nowhere)
    assert _models._own_extras() == []


def test_what_an_adapter_raises_is_a_plugin_error(known):
    trainer = Trainer()
    del Base.held
    try:
        del Trainer.held
        with pytest.raises(commhub.PluginError, match="which models Trainer holds cannot be told: AttributeError"):
            commhub.registration(trainer)
    finally:
        Base.held = Trainer.held = None


def holder_of_models():
    model = torch.nn.parallel.DistributedDataParallel(mlp())
    trainer = Trainer()
    spec = commhub.ModelSpec(type="weaver.loop.Trainer", advice="x", models=lambda trainer: trainer.held)
    _models.spec_of, real = (lambda asked: spec if asked is trainer else None), _models.spec_of
    _register.spec_of = _models.spec_of
    try:
        trainer.held = [model, None]
        found = [commhub.registration(trainer)]
        registration = commhub.register(model, "fp16")
        found.append(commhub.registration(trainer) is registration)
        second = torch.nn.parallel.DistributedDataParallel(mlp())
        commhub.register(second, "fp16")
        trainer.held = [model, second]
        with pytest.raises(commhub.RegistrationError, match="Trainer holds 2 models with a hook"):
            commhub.registration(trainer)
        return found
    finally:
        _models.spec_of = _register.spec_of = real


def test_the_registration_is_found_on_what_holds_the_model(ranks):
    assert ranks(holder_of_models, 1) == [[None, True]]

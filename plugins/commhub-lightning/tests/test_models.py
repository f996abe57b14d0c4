"""What the core says of Lightning's types, and that its table loads neither Lightning nor torch."""

import subprocess
import sys
import tomllib
from importlib import import_module, util
from pathlib import Path

import pytest

import commhub

ROOT = Path(__file__).parents[1]
HOMES = {"lightning": ("lightning.pytorch", "lightning.fabric"), "pytorch_lightning": ("pytorch_lightning",) * 2}


@pytest.fixture(params=HOMES)
def package(request):
    if util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed here")
    return request.param


def test_the_table_loads_neither_lightning_nor_torch():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    [module] = set(points["commhub.models.v1"].values())
    names = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "commhub_lightning"}
    code = f"import sys, {module} as m; assert len(m.MODELS) == 6; print({names} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


def test_every_type_of_the_table_is_under_its_package_s_entry_point():
    import commhub_lightning_models

    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert {spec.type.partition(".")[0] for spec in commhub_lightning_models.MODELS} == set(points["commhub.models.v1"])


def test_a_trainer_is_told_what_serves_it(package):
    pl = import_module(HOMES[package][0])
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    face = "commhub_lightning" if package == "lightning" else "commhub_lightning.pytorch_lightning"
    with pytest.raises(commhub.RegistrationError, match=rf"Give Trainer\(strategy={face}.CommHubDDPStrategy"):
        commhub.register(trainer, "fp16")


def test_a_module_of_a_user_s_own_is_told_that_its_trainer_wraps_it(package):
    pl = import_module(HOMES[package][0])
    kind = type("Net", (pl.LightningModule,), {"__module__": __name__})
    with pytest.raises(commhub.RegistrationError, match="Its trainer wraps it"):
        commhub.register(kind(), "fp16")


def test_fabric_is_told_to_give_the_module():
    if util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed here")
    fabric = import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    with pytest.raises(commhub.RegistrationError, match=r"fabric\.setup"):
        commhub.register(fabric, "fp16")


def test_a_trainer_that_does_not_train_holds_no_model(package):
    import commhub_lightning_models

    pl = import_module(HOMES[package][0])
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    [spec] = [one for one in commhub_lightning_models.MODELS if one.type == f"{pl.__name__}.trainer.trainer.Trainer"]
    assert list(spec.models(trainer)) == []

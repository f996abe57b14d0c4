"""The errors form one tree, and each is also the builtin that fits it."""

import pytest

import commhub

BUILTINS = {
    "UnknownHookError": LookupError,
    "HookConflictError": LookupError,
    "HookOptionError": ValueError,
    "HookMismatchError": RuntimeError,
    "CheckpointError": ValueError,
    "PluginError": ImportError,
    "RegistrationError": RuntimeError,
    "HookError": RuntimeError,
    "HookTimeoutError": TimeoutError,
}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_every_error_is_a_commhub_error_and_its_builtin(name, builtin):
    error = getattr(commhub, name)
    assert issubclass(error, commhub.CommhubError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize("name", BUILTINS)
def test_the_text_of_an_error_is_its_message(name):
    assert str(getattr(commhub, name)("powersgd: it's gone")) == "powersgd: it's gone"


def test_a_timeout_is_a_hook_error():
    assert issubclass(commhub.HookTimeoutError, commhub.HookError)

"""A backward that ended in an exception of the user's own, after which FSDP does not end another by itself."""

import pytest

from .sharding import error_of, gradients, inside, loss_of, mesh, sharded

FEEDBACK = "quantize_per_channel(bits=4, dense_small=False, group_size=32)"


def stopped(between):
    """A backward that fails, and what a forward says before ``reset_iter_state`` and after it."""
    if between:
        model, registration = sharded(mesh(), "powersgd(rank=2, start_step=0)")
    else:
        model, registration = inside(FEEDBACK)
    loss_of(model, 0).backward()

    def stop(*_):
        raise RuntimeError("stopped")

    handle = model.blocks[0].norm1.register_full_backward_pre_hook(stop)
    errors = [error_of(loss_of(model, 1).backward)]
    handle.remove()
    model.zero_grad()
    errors += [error_of(loss_of, model, 2) for _ in range(2)]
    model.reset_iter_state()
    steps = [registration.step]
    loss_of(model, 2).backward()
    found = gradients(model)
    return errors, [*steps, registration.step], sum(bool(g.abs().sum()) for g in found.values()) > 0


@pytest.mark.parametrize("between", [False, True])
def test_the_next_forward_says_how_to_go_on(ranks, between):
    for errors, steps, came in ranks(stopped, 4 if between else 2, between):
        assert errors[0] == ("RuntimeError", "stopped")
        for kind, text in errors[1:]:
            assert kind == "HookError"
            assert "reset_iter_state()" in text
        assert steps == [1, 2]
        assert came

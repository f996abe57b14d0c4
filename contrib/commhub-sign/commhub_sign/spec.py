"""What ``commhub list`` and ``commhub info`` show of this package. Imports no torch."""

from commhub import HookSpec, Option, hookimpl


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="sign",
            summary="Signs and a scale for every 64 elements, with error feedback, summed in two steps.",
            factory="commhub_sign._hook:Sign",
            options=(
                Option(name="group_size", type=int, default=64, help="Elements per scale, a multiple of 8."),
                Option(
                    name="dense_small",
                    type=bool,
                    default=True,
                    help="Average vectors and parameters of less than 1024 elements exactly.",
                ),
                Option(name="start_step", type=int, default=1000, help="So many steps are averaged exactly first."),
                Option(
                    name="rules",
                    type=dict,
                    default={},
                    help="By glob on parameter names: 'dense', for what is averaged exactly.",
                ),
            ),
            sent_bytes="2 * (p-1)/p * p * ceil(ceil(numel / group_size) / p) * (group_size/8 + max(4, itemsize))",
            reference="https://arxiv.org/abs/1901.09847",
        )
    ]

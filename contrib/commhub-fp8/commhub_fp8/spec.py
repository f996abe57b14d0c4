"""What ``commhub list`` and ``commhub info`` show of this package. Imports no torch."""

from commhub import HookSpec, Option, hookimpl


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="fp8",
            summary="8-bit floats (e4m3) and a scale for every 512, with error feedback, summed in two steps.",
            factory="commhub_fp8._hook:FP8",
            options=(
                Option(name="group_size", type=int, default=512, help="Elements per scale, a multiple of 16."),
                Option(
                    name="error_feedback", type=bool, default=True, help="Add what was not sent to the next gradient."
                ),
                Option(
                    name="dense_small",
                    type=bool,
                    default=True,
                    help="Average vectors and parameters of less than 1024 elements exactly.",
                ),
                Option(name="start_step", type=int, default=0, help="So many steps are averaged exactly first."),
                Option(
                    name="rules",
                    type=dict,
                    default={},
                    help="By glob on parameter names: 'dense', for what is averaged exactly.",
                ),
            ),
            tolerance=0.06,
            sent_bytes="2 * (p-1)/p * numel * (1 + max(4, itemsize) / group_size)",
            reference="https://arxiv.org/abs/2209.05433",
        )
    ]

"""What ``commhub list`` and ``commhub info`` show of this package. Imports no torch."""

from commhub import HookSpec, Option, hookimpl


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="two_level",
            summary="Average within each host, then between hosts with any hook.",
            factory="commhub_two_level._hook:TwoLevel",
            options=(
                Option(name="inner", type="hook", default="fp16", help="The hook between hosts."),
                Option(
                    name="ranks_per_host",
                    type=int,
                    help="Take so many consecutive ranks as one host; none: as they are found.",
                ),
            ),
            sent_bytes="2 * (h-1)/h * numel * itemsize + (inner if h < p else 0)",
            reference="https://arxiv.org/abs/1807.11205",
        )
    ]

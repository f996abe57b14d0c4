"""What the registry knows about this plugin. Imports no torch."""

from commhub import HookSpec, Option, hookimpl


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="bf16",
            summary="Average in bfloat16: half the bytes of float32, and its range.",
            factory="commhub_bf16._hook:Bf16",
            options=(
                Option(
                    name="rules",
                    type=dict,
                    default={},
                    help="By glob on parameter names: 'dense', for what travels in the gradients' own dtype.",
                ),
            ),
            tolerance=8e-3,
            sent_bytes="2 * (p-1)/p * numel * 2",
            reference="https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html",
        )
    ]

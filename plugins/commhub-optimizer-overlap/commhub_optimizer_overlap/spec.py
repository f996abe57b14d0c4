"""What the registry knows about this plugin. Imports no torch."""

from commhub import HookSpec, Option, hookimpl

_UNDO = Option(
    name="undo",
    type=bool,
    default=True,
    help="Keep what a step overwrites, so that one that fails counts on all ranks or on none.",
)
_INNER = Option(name="inner", type="hook", default="allreduce", help="The hook that averages the gradients.")


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="optimizer_overlap",
            summary="Step the optimizer for each bucket as soon as it is reduced, while later ones travel.",
            factory="commhub_optimizer_overlap._hook:OptimizerOverlap",
            options=(
                _INNER,
                _UNDO,
                Option(
                    name="master",
                    type=bool,
                    default=False,
                    help="Keep 16-bit parameters in float32 too, and step those.",
                ),
                Option(
                    name="reduce_dtype",
                    type=str,
                    default=None,
                    help="The dtype in which the inner hook averages; none: the gradients' own.",
                    choices=("fp32", "bf16", "fp16"),
                ),
            ),
            needs=("optimizer",),
            exact=True,
            sent_bytes="inner",
            reference="https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html",
        ),
        HookSpec(
            name="zero_overlap",
            summary="Step ZeroRedundancyOptimizer for each reduced bucket: owners send its parameters at once.",
            factory="commhub_optimizer_overlap._zero:ZeroOverlap",
            options=(
                _INNER,
                _UNDO,
                Option(
                    name="mode",
                    type=str,
                    default="interleaved",
                    help="Update each bucket when it is reduced, or (stepwise) all of them when the last one is.",
                    choices=("interleaved", "stepwise"),
                ),
            ),
            needs=("optimizer", "zero_redundancy_optimizer"),
            exact=True,
            sent_bytes="inner + (p-1)/p * numel * itemsize",
            reference="https://arxiv.org/abs/1910.02054",
        ),
    ]

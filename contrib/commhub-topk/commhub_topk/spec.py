"""What ``commhub list`` and ``commhub info`` show of this package. Imports no torch."""

from commhub import HookSpec, Option, hookimpl

_DENSE = "2 * (p-1)/p * numel * itemsize"
_OWN_PLACES = "(p-1) * ceil(numel * ratio) * (4 + max(4, itemsize))"
_SHARED_PLACES = "2 * (p-1)/p * (64 * ceil(numel // 64 * ratio) + numel % 64) * max(4, itemsize)"


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="topk",
            summary="Each rank's largest 1 % of the elements; grows with p: for slow links and up to 50 ranks.",
            factory="commhub_topk._hook:TopK",
            options=(
                Option(name="ratio", type=float, default=0.01, help="Share of each parameter's elements to send."),
                Option(
                    name="momentum",
                    type=float,
                    default=0.0,
                    help="Of the velocities that are sent in place of gradients; the optimizer's own is then to be 0.",
                ),
                Option(name="min_numel", type=int, default=1024, help="Smaller parameters are averaged exactly."),
                Option(name="start_step", type=int, default=1000, help="So many steps are averaged exactly first."),
                Option(
                    name="shared",
                    type=bool,
                    default=False,
                    help="Send the same random blocks of 64 elements on all ranks, without indices, in turn.",
                ),
                Option(name="seed", type=int, default=0, help="Of the order of the shared blocks."),
                Option(
                    name="rules",
                    type=dict,
                    default={},
                    help="By glob on parameter names: 'dense', for what is averaged exactly.",
                ),
            ),
            sent_bytes=f"{_DENSE} if numel < min_numel else {_SHARED_PLACES} if shared else {_OWN_PLACES}",
            reference="https://arxiv.org/abs/1712.01887",
        )
    ]

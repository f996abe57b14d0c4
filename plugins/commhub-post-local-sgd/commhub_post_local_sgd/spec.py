"""What the registry knows about this plugin. Imports no torch."""

from commhub import AveragerSpec, HookSpec, Option, hookimpl

_MORE = (
    Option(name="buffers", type=bool, default=False, help="Average floating-point buffers too."),
    Option(name="optimizer_state", type=bool, default=False, help="Average the optimizer's state too (optimizer=)."),
)
_WARMUP = Option(name="warmup_steps", type=int, default=0, help="Steps before the first average.")
_POST_LOCAL = "https://arxiv.org/abs/1808.07217"


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="post_local_sgd",
            summary="Average gradients within each host, and parameters over all ranks every few steps.",
            factory="commhub_post_local_sgd._hook:PostLocalSGD",
            options=(
                Option(
                    name="start_step",
                    type=int,
                    default=1000,
                    help="Steps of plain averages over all ranks first.",
                    known_as=("start_localSGD_iter",),
                ),
                Option(
                    name="period",
                    type=int,
                    help="Average the parameters every so many steps; none means 8, if no averager is given.",
                ),
                Option(
                    name="local_gradients",
                    type=bool,
                    default=True,
                    help="Average gradients within a subgroup; otherwise each rank keeps its own.",
                    known_as=("post_local_gradient_allreduce",),
                ),
                Option(
                    name="subgroup",
                    type=int,
                    help="Size of the subgroups of consecutive ranks; none: the ranks of each host are one.",
                ),
                Option(
                    name="averager",
                    type="hook",
                    help="Another averager; its warm-up is start_step unless it says otherwise.",
                ),
                *_MORE,
            ),
            needs=("optimizer",),
            exact=False,
            agrees=False,
            sent_bytes="2 * (1 - 1/(h if subgroup == None else subgroup)) * numel * itemsize if local_gradients else 0",
            reference=_POST_LOCAL,
        )
    ]


@hookimpl
def commhub_averagers() -> list[AveragerSpec]:
    """The averagers of this distribution."""
    return [
        AveragerSpec(
            name="periodic",
            summary="Average parameters over all ranks every few steps.",
            factory="commhub_post_local_sgd._averagers:Periodic",
            options=(
                Option(name="period", type=int, default=8, help="Steps from one average to the next."),
                _WARMUP,
                *_MORE,
            ),
            sent_bytes="2 * (p-1)/p * numel * itemsize / period",
            reference=_POST_LOCAL,
        ),
        AveragerSpec(
            name="hierarchical",
            summary="Average parameters among more ranks the longer the period.",
            factory="commhub_post_local_sgd._averagers:Hierarchical",
            options=(
                Option(
                    name="periods",
                    type=dict,
                    help="Period: size of the groups of ranks, such as {2: 2, 8: 4}; must be given.",
                    known_as=("period_group_size_dict",),
                ),
                _WARMUP,
                *_MORE,
            ),
            sent_bytes="2 * (p-1)/p * numel * itemsize / min(periods)",
            reference="https://arxiv.org/abs/2010.12998",
            example={"periods": {2: 2, 8: 4}},
        ),
    ]

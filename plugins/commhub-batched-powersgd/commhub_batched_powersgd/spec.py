"""What the registry knows about this plugin. Imports no torch."""

from commhub import HookSpec, Option, hookimpl

_OPTIONS = (
    Option(
        name="rank",
        type=int,
        default=1,
        help="Rank of the approximation, at least 1.",
        known_as=("matrix_approximation_rank",),
    ),
    Option(
        name="start_step",
        type=int,
        default=1000,
        help="Steps of plain averaging before the first compressed one.",
        known_as=("start_powerSGD_iter",),
    ),
    Option(
        name="min_compression_rate",
        type=float,
        default=2.0,
        help="Compress a bucket only where its factors have this many times fewer elements.",
    ),
    Option(
        name="error_feedback",
        type=bool,
        default=True,
        help="Add what was not sent to the next gradient.",
        known_as=("use_error_feedback",),
    ),
    Option(name="warm_start", type=bool, default=True, help="Start from the last step's factor, not a random one."),
    Option(name="num_power_iterations", type=int, default=1, help="Power iterations a step, two messages each."),
    Option(name="seed", type=int, default=0, help="Seed of the random starting factors.", known_as=("random_seed",)),
    Option(
        name="stats_frequency",
        type=int,
        default=10_000,
        help="Steps between log lines on the compression.",
        known_as=("compression_stats_logging_frequency",),
    ),
    Option(
        name="rules",
        type=dict,
        default={},
        help="By glob on parameter names: 'dense' for what is left out of the square and averaged exactly.",
    ),
)

_BYTES = "2 * (p-1)/p * (2 * ceil(sqrt(numel)) * min(ceil(sqrt(numel)), rank) * num_power_iterations + 1) * itemsize"
_PAPER = "https://arxiv.org/abs/1905.13727"


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="batched_powersgd",
            summary="PowerSGD on each whole bucket as one square matrix: fewer bytes, coarser.",
            factory="commhub_batched_powersgd._hook:BatchedPowerSGD",
            options=_OPTIONS,
            sent_bytes=_BYTES,
            reference=_PAPER,
        ),
        HookSpec(
            name="batched_powersgd_rank2",
            summary="Batched PowerSGD at rank 2.",
            factory="commhub_batched_powersgd._hook:BatchedPowerSGD",
            options=_OPTIONS,
            preset={"rank": 2},
            sent_bytes=_BYTES,
            reference=_PAPER,
        ),
    ]

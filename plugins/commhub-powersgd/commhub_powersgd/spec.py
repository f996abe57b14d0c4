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
        help="Compress a matrix only where its factors have this many times fewer elements.",
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
    Option(
        name="alternating",
        type=bool,
        default=False,
        help="Send one factor a step, in turns (ACP-SGD): half the bytes, one message.",
    ),
    Option(name="seed", type=int, default=0, help="Seed of the random starting factors.", known_as=("random_seed",)),
    Option(
        name="batch_same_shapes",
        type=bool,
        default=None,
        help="Work on matrices of one shape together; none decides by device (today: yes).",
        known_as=("batch_tensors_with_same_shape",),
    ),
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
        help="By glob on parameter names: 'dense', or another rank or min_compression_rate.",
    ),
)

_BYTES = (
    "2 * (p-1)/p * (rows + cols) * min(rows, cols, rank) * itemsize * (1/2 if alternating else num_power_iterations)"
)
_PAPER = "https://arxiv.org/abs/1905.13727"


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="powersgd",
            summary="Low-rank gradients by one power iteration a step, with error feedback.",
            factory="commhub_powersgd._hook:PowerSGD",
            options=_OPTIONS,
            sent_bytes=_BYTES,
            reference=_PAPER,
        ),
        HookSpec(
            name="powersgd_rank2",
            summary="PowerSGD at rank 2.",
            factory="commhub_powersgd._hook:PowerSGD",
            options=_OPTIONS,
            preset={"rank": 2},
            sent_bytes=_BYTES,
            reference=_PAPER,
        ),
    ]

"""What the registry knows about this plugin. Imports no torch."""

from commhub import HookSpec, Option, hookimpl

_OPTIONS = (
    Option(name="bits", type=int, default=8, choices=(8, 4, 2), help="Bits of a code."),
    Option(name="symmetric", type=bool, default=True, help="Codes for -max to max; otherwise for min to max."),
    Option(
        name="error_feedback",
        type=bool,
        default=None,
        help="Add what was not sent to the next gradient; none means below 8 bits, if rounding is not stochastic.",
    ),
    Option(
        name="residual_dtype",
        type=str,
        default="float32",
        choices=("float32", "bf16"),
        help="In what error feedback keeps what was not sent.",
    ),
    Option(name="stochastic_rounding", type=bool, default=False, help="Round by chance, right in expectation."),
    Option(name="seed", type=int, default=0, help="Seed of stochastic rounding."),
    Option(
        name="dense_small",
        type=bool,
        default=True,
        help="Send vectors and parameters of less than 1024 elements uncompressed.",
    ),
    Option(
        name="rules",
        type=dict,
        default={},
        help="By glob on parameter names: 'dense', or bits, symmetric, dense_small (group_size) to use there.",
    ),
)
_GROUP_SIZE = Option(name="group_size", type=int, default=256, help="Elements per scale, a multiple of 16.")
_PAPER = "https://arxiv.org/abs/1610.02132"


@hookimpl
def commhub_hooks() -> list[HookSpec]:
    """The hooks of this distribution."""
    return [
        HookSpec(
            name="quantize_per_tensor",
            summary="8, 4 or 2 bits per element and one scale per parameter, summed in two steps.",
            factory="commhub_quantize._hook:QuantizePerTensor",
            options=_OPTIONS,
            tolerance=0.03,
            sent_bytes="2 * (p-1)/p * (numel * bits/8 + 4 * p * (1 if symmetric else 2))",
            reference=_PAPER,
        ),
        HookSpec(
            name="quantize_per_channel",
            summary="8, 4 or 2 bits per element and a scale for every 256 of them, summed in two steps.",
            factory="commhub_quantize._hook:QuantizePerChannel",
            options=(*_OPTIONS, _GROUP_SIZE),
            tolerance=0.02,
            sent_bytes="2 * (p-1)/p * numel * (bits/8 + 4/group_size * (1 if symmetric else 2))",
            reference=_PAPER,
        ),
    ]

"""What ``commhub list`` and ``commhub info`` show of this package. Imports no torch."""

from commhub import AveragerSpec, Option, hookimpl


@hookimpl
def commhub_averagers() -> list[AveragerSpec]:
    """The averagers of this distribution."""
    return [
        AveragerSpec(
            name="diloco",
            summary="Train on each rank alone; every few hundred steps an outer optimizer steps for all.",
            factory="commhub_diloco._averager:DiLoCo",
            options=(
                Option(name="period", type=int, default=500, help="Steps between two outer steps of a parameter."),
                Option(name="outer_lr", type=float, default=0.7, help="Learning rate of the outer steps."),
                Option(name="outer_momentum", type=float, default=0.9, help="Nesterov momentum of the outer steps."),
                Option(name="warmup_steps", type=int, default=0, help="Steps that end with a plain average."),
                Option(
                    name="fragments",
                    type=int,
                    default=1,
                    help="Average so many parts of the model in turn, one in every period / fragments steps.",
                ),
                Option(name="exchange", type="hook", default="allreduce", help="What averages the outer gradients."),
            ),
            sent_bytes="exchange / period",
            reference="https://arxiv.org/abs/2311.08105",
        )
    ]

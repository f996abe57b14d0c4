"""``commhub bench``: the flags, and nothing else; ``commhub.bench`` does the work."""

from __future__ import annotations

from typing import Any

import click

from commhub.bench._options import DEFAULT_HOOKS, DEFAULT_REPORT
from commhub.bench._sizes import OPTIMIZERS, SIZES


@click.command()
@click.option(
    "--hooks",
    default=",".join(DEFAULT_HOOKS),
    show_default=True,
    metavar="LIST",
    help='Hook strings, separated by commas: a,b,"powersgd(rank=4)".',
)
@click.option("--nproc", type=int, help="Ranks on this machine.  [default: 2, or one on each host]")
@click.option(
    "--hosts",
    type=int,
    default=1,
    show_default=True,
    help="Make this many hosts on this machine (Linux network namespaces), each with a link of --bandwidth, and deal "
    "the ranks out to them. Where none can be made, the link is emulated.",
)
@click.option(
    "--shard",
    type=int,
    default=1,
    show_default=True,
    help="Shard the model (FSDP2) over groups of this many ranks. Hooks average between the groups; in a single group "
    "they take the place of the reduce-scatter.",
)
@click.option(
    "--steps",
    type=int,
    default=100,
    show_default=True,
    help="Training steps under each hook; 0 trains none and times steps alone.",
)
@click.option("--warmup", type=int, default=5, show_default=True, help="First steps that are not timed.")
@click.option(
    "--repeats",
    type=int,
    default=20,
    show_default=True,
    help="After training, time this many steps of each hook, one of each in turn and in shuffled order.",
)
@click.option("--batch", type=int, default=8, show_default=True, help="Windows of text per rank and step.")
@click.option("--model", default="tiny", show_default=True, metavar="|".join(SIZES), help="The model's size.")
@click.option(
    "--optimizer", default="adamw", show_default=True, metavar="|".join(OPTIMIZERS), help="SGD has momentum 0.9."
)
@click.option("--learning-rate", type=float, help="The highest.  [default: the model's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of initial weights and batches.")
@click.option("--data", metavar="PATH", help="File or folder of text.  [default: Python's standard library]")
@click.option(
    "--bandwidth", metavar="RATE", help="The speed of the hosts' links, or of an emulated link, such as 100mbit."
)
@click.option("--latency", metavar="TIME", help="The latency of the link, such as 1ms.")
@click.option("--bucket-cap-mb", type=float, help="DDP's bucket size in MiB.  [default: DDP's own]")
@click.option("--threads", type=int, help="Threads per rank.  [default: the cores divided among the ranks]")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@click.option("--json", metavar="FILE", help="Write every measurement to this file.")
@click.option(
    "--timeline",
    metavar="FILE",
    help="Write the last timed steps of all ranks and hooks here, as a trace for ui.perfetto.dev or chrome://tracing.",
)
@click.option("--report", metavar="FILE", help=f"Write the HTML report here.  [default: {DEFAULT_REPORT}]")
@click.option("--no-report", is_flag=True, help="Write no HTML report.")
@click.pass_context
def bench(context: click.Context, /, hooks: str, no_report: bool, **values: Any) -> None:
    """Train a transformer on real text under several hooks, and compare them.

    Every hook starts from the same weights and sees the same batches, in real processes. Under torchrun this
    is one rank of the job that torchrun started, on one machine or on many.
    """
    # Here, not above: `commhub --help` must stay quick.
    from commhub._errors import HookOptionError
    from commhub._printable import message_of
    from commhub.bench import BenchError, Settings, run
    from commhub.registry._hookstring import split

    try:
        if no_report:
            values["report"] = ""
        code = run(Settings(hooks=split(hooks), **values))
    except (BenchError, HookOptionError) as err:
        click.echo(f"commhub bench: {message_of(err)}", err=True)
        code = 2
    context.exit(code)

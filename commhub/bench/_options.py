"""A bench's settings as values, checked where they are made. No torch, no look outside this process."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import attrs

from ._sizes import OPTIMIZERS, SIZES

if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_HOOKS = ("allreduce", "fp16", "bf16", "powersgd_rank2")
DEFAULT_REPORT = "commhub-bench.html"
_MOST_HOSTS = 64


class BenchError(ValueError):
    """A setting is wrong: its text is one line for the user, the exit code is 2."""


def _at_least(least: float) -> Any:
    def check(_settings: object, field: attrs.Attribute[Any], value: float | None) -> None:
        if value is not None and value < least:
            raise BenchError(f"{_flag(field.name)} is {value}, but must be at least {least}")

    return check


def _above_zero(_settings: object, field: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not value > 0:
        raise BenchError(f"{_flag(field.name)} is {value}, but must be above zero")


def _one_of(choices: tuple[str, ...]) -> Any:
    def check(_settings: object, field: attrs.Attribute[Any], value: str) -> None:
        if value not in choices:
            raise BenchError(f"{_flag(field.name)} is {value!r}, but must be one of {', '.join(choices)}")

    return check


def _some(_settings: object, field: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    if not value:
        raise BenchError(f"{_flag(field.name)} names no hook")


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True)
class Settings:
    """What one bench does; every field is a flag of ``commhub bench``.

    Attributes:
        nproc: ranks in all; ``None`` means two, or one on each of the hosts.
        hosts: hosts to make on this machine, with a link of their own each; 1 means this machine as it is.
        steps: to train under each hook; with 0 only step times are measured.
        repeats: steps of each hook that are timed in turn with those of the others; with 0 those of training are.
        shard: ranks in a group over which FSDP2 shards the model; hooks then work between the groups, or in place of
            the reduce-scatter where there is one.
        learning_rate: the highest one; ``None`` means the model's own.
        bandwidth, latency: texts such as ``"100mbit"`` and ``"1ms"``: of the hosts' links, or of a link to emulate.
        threads: per rank; ``None`` means the cores divided among the ranks.
        timeline: a file for the last of the steps that are timed in turn, as a trace of all ranks.
        report: ``None`` writes ``DEFAULT_REPORT`` into the current folder if matplotlib is there, ``""`` writes none.

    Raises:
        BenchError: for a value that cannot work.
    """

    hooks: tuple[str, ...] = attrs.field(default=DEFAULT_HOOKS, converter=_strings, validator=_some)
    nproc: int | None = attrs.field(default=None, validator=_at_least(1))
    hosts: int = attrs.field(default=1, validator=_at_least(1))
    steps: int = attrs.field(default=100, validator=_at_least(0))
    warmup: int = attrs.field(default=5, validator=_at_least(0))
    repeats: int = attrs.field(default=20, validator=_at_least(0))
    shard: int = attrs.field(default=1, validator=_at_least(1))
    batch: int = attrs.field(default=8, validator=_at_least(1))
    model: str = attrs.field(default="tiny", validator=_one_of(tuple(SIZES)))
    optimizer: str = attrs.field(default="adamw", validator=_one_of(OPTIMIZERS))
    learning_rate: float | None = attrs.field(default=None, validator=_above_zero)
    seed: int = attrs.field(default=0, validator=_at_least(0))
    data: str | None = None
    bandwidth: str | None = None
    latency: str | None = None
    bucket_cap_mb: float | None = attrs.field(default=None, validator=_above_zero)
    threads: int | None = attrs.field(default=None, validator=_at_least(1))
    device: str = attrs.field(default="auto", validator=_one_of(("auto", "cpu", "cuda")))
    json: str | None = None
    timeline: str | None = None
    report: str | None = None

    def __attrs_post_init__(self) -> None:
        if not self.steps and not self.repeats:
            raise BenchError("--steps 0 --repeats 0 leaves nothing to be measured")
        if self.timeline and not self.repeats:
            raise BenchError("--timeline shows steps that are timed in turn, and --repeats 0 leaves them out")
        if self.steps and self.warmup >= self.steps:
            raise BenchError(f"--warmup {self.warmup} leaves none of --steps {self.steps} to be timed")
        if self.ranks % self.hosts:
            raise BenchError(f"--hosts {self.hosts}: {self.ranks} ranks cannot be dealt out evenly to that many")
        if self.hosts > _MOST_HOSTS:
            raise BenchError(f"--hosts is {self.hosts}, but must be at most {_MOST_HOSTS}")

    @property
    def ranks(self) -> int:
        """How many ranks are started."""
        return self.nproc or max(2, self.hosts)

    @property
    def emulated(self) -> bool:
        """Whether the link's speed is emulated, where there are no hosts."""
        return self.bandwidth is not None or self.latency is not None

    @property
    def link(self) -> str:
        """The link in words, such as ``100mbit, 1ms``; empty where it is as it is."""
        return ", ".join(part for part in (self.bandwidth, self.latency) if part is not None)

    @property
    def command(self) -> str:
        """The command line that gives these settings, without the flags left at their defaults."""
        words = ["commhub", "bench"]
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "report" and not value:
                words.append("--no-report")
            else:
                words += [_flag(field.name), ",".join(value) if field.name == "hooks" else str(value)]
        return shlex.join(words)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ``from_dict`` reads them back."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The settings that ``as_dict`` wrote."""
        return cls(**values)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")

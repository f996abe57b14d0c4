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
        shard: ranks in a group over which FSDP2 shards the model; hooks then work between the groups, or in place of
            the reduce-scatter where there is one.
        learning_rate: the highest one; ``None`` means the model's own.
        bandwidth, latency: texts such as ``"100mbit"`` and ``"1ms"``, which emulate a link.
        threads: per rank; ``None`` means the cores divided among the ranks.
        report: ``None`` writes ``DEFAULT_REPORT`` into the current folder if matplotlib is there, ``""`` writes none.

    Raises:
        BenchError: for a value that cannot work.
    """

    hooks: tuple[str, ...] = attrs.field(default=DEFAULT_HOOKS, converter=_strings, validator=_some)
    nproc: int = attrs.field(default=2, validator=_at_least(1))
    steps: int = attrs.field(default=100, validator=_at_least(1))
    warmup: int = attrs.field(default=5, validator=_at_least(0))
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
    report: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.warmup >= self.steps:
            raise BenchError(f"--warmup {self.warmup} leaves none of --steps {self.steps} to be timed")

    @property
    def emulated(self) -> bool:
        """Whether the link's speed is emulated."""
        return self.bandwidth is not None or self.latency is not None

    @property
    def link(self) -> str:
        """The emulated link in words, such as ``100mbit, 1ms``; empty where none is emulated."""
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

"""Which claim a name leads to, decided from metadata alone.

Look-up, "did you mean", the enum and completion need no more than this; no plugin code runs here. Every
decision depends only on what is installed, so that equal installations choose alike on every rank.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import attrs

from commhub._errors import HookConflictError, PluginError, UnknownHookError
from commhub.registry import _documented, _index

from ._hookstring import canonical_distribution, canonical_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from ._index import Claim

__all__ = ["Standing", "canonical", "find", "names", "standings"]


@attrs.frozen
class Standing:
    """A claim, and what metadata alone says of it.

    Attributes:
        claim: the entry point.
        status: ``"ok"``, ``"disabled"``, ``"incompatible"``, ``"shadowed"`` or ``"conflict"``.
        reason: why it is not ``"ok"``.
    """

    claim: Claim
    status: str
    reason: str | None = None


def canonical(name: str) -> str:
    """The canonical name that a spelling or one of PyTorch's aliases stands for."""
    name = canonical_name(name)
    return _documented.ALIASES.get(name, name)


def standings() -> tuple[Standing, ...]:
    """One standing per claim, sorted by name and distribution."""
    claims = _index.claims()
    is_disabled = _disabling(os.environ.get("COMMHUB_DISABLE", ""))
    disabled = {claim for claim in claims if is_disabled(claim)}
    rivals: dict[str, set[str]] = {}
    for claim in claims:
        if claim not in disabled and claim.incompatible is None:
            rivals.setdefault(claim.name, set()).add(claim.distribution)
    return tuple(_stand(claim, disabled, sorted(rivals.get(claim.name, ()))) for claim in claims)


def names() -> dict[str, Claim]:
    """What every bare name leads to, sorted by name."""
    found: dict[str, Claim] = {}
    for standing in standings():
        if standing.status == "ok":
            found.setdefault(standing.claim.name, standing.claim)
    return found


def find(name: str, distribution: str | None = None) -> Claim:
    """The claim that a name, perhaps of a given distribution, leads to.

    Raises:
        UnknownHookError: when nothing usable has that name.
        HookConflictError: when a bare name is claimed by several distributions.
        PluginError: when what has the name needs another version of commhub.
    """
    wanted = canonical(name)
    named = [standing for standing in standings() if standing.claim.name in {wanted, canonical_name(name)}]
    if distribution is not None:
        distribution = canonical_distribution(distribution)
        named = [standing for standing in named if standing.claim.distribution == distribution]
    for standing in named:
        if standing.status == "ok" or (distribution and standing.status in {"shadowed", "conflict"}):
            return standing.claim
    if rivals := [standing for standing in named if standing.status == "conflict"]:
        raise HookConflictError(f"hook {wanted!r}: {rivals[0].reason}.")
    raise _unusable(wanted, distribution, named)


def _disabling(words: str) -> Callable[[Claim], bool]:
    """Whether a claim is disabled by these words, separated by commas."""
    named = [word for word in words.split(",") if word.strip()]
    undocumented = any(word.strip() == "*" for word in named)
    names, distributions = set(map(canonical, named)), set(map(canonical_distribution, named))

    def is_disabled(claim: Claim) -> bool:
        return (
            claim.name in names
            or claim.distribution in distributions
            or (undocumented and _documented.owner(claim.name) != claim.distribution)
        )

    return is_disabled


def _stand(claim: Claim, disabled: Collection[Claim], rivals: list[str]) -> Standing:
    if claim in disabled:
        return Standing(claim, "disabled", "disabled by COMMHUB_DISABLE")
    if claim.incompatible is not None:
        return Standing(claim, "incompatible", claim.incompatible)
    owner = _documented.owner(claim.name)
    if owner not in {None, claim.distribution}:
        explicit = f"{claim.distribution}:{claim.name}"
        return Standing(claim, "shadowed", f"the name belongs to {owner}; write {explicit!r}")
    if owner is None and len(rivals) > 1:
        explicit = " or ".join(repr(f"{rival}:{claim.name}") for rival in rivals)
        return Standing(claim, "conflict", f"offered by {' and '.join(rivals)}; write {explicit}")
    return Standing(claim, "ok")


def _unusable(name: str, distribution: str | None, named: Iterable[Standing]) -> UnknownHookError | PluginError:
    """The error for a name that leads nowhere, with the most likely way out."""
    where = f"{distribution}:{name}" if distribution else name
    for standing in named:
        offer = f"{standing.claim.distribution} {standing.claim.version}"
        if standing.status == "incompatible":
            return PluginError(f"{offer} offers {where!r} but {standing.reason}. Install a release that fits.")
        if standing.status == "disabled":
            return UnknownHookError(f"{where!r} of {offer} is {standing.reason}. Unset that to use it.")
    owner = _documented.owner(name)
    if owner and distribution in {None, owner}:
        return UnknownHookError(f"{where!r} is not installed: pip install {owner}")
    usable = names()
    if distribution and name in usable:
        return UnknownHookError(f"{distribution} offers no {name!r}; {usable[name].distribution} does.")
    import difflib  # only failures pay for it

    known = sorted({*usable, *_documented.HOOKS, *_documented.AVERAGERS, *_documented.ALIASES})
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownHookError(f"no installed plugin offers {where!r}.{hint} `commhub list` shows what is installed.")

"""Methods of one object, called by way of ours: a framework that offers no place for a call of ours gets one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def around(owner: Any, name: str, call: Callable[..., Any]) -> Callable[[], None]:
    """Have ``owner.name(...)`` become ``call(method, ...)``, on this object alone; return what undoes it.

    The method is looked up when it is called. One that the object itself already had in the class's place is put back.
    """
    before = vars(owner).get(name)
    method = getattr(type(owner), name) if before is None else before

    def instead(*args: Any, **kwargs: Any) -> Any:
        bound = method.__get__(owner) if before is None else method
        return call(bound, *args, **kwargs)

    instead.__name__, instead.__doc__ = name, method.__doc__
    setattr(owner, name, instead)

    def undo() -> None:
        if vars(owner).get(name) is instead:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    return undo

"""A progress bar for what takes long outside of Lightning's own loops."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm.auto import tqdm

__all__ = ["bar_is_on", "bars", "progress"]

_Item = TypeVar("_Item")
_ALLOWED = ContextVar("_ALLOWED", default=True)


def progress(iterable: Iterable[_Item], total: int | None, what: str, *, shown: bool = True) -> Iterable[_Item]:
    """Go through items with a bar on standard error, which leaves no line behind.

    Args:
        iterable (Iterable): The items.
        total (int | None): How many there are, if that is known.
        what (str): What is done, in two or three words.
        shown (bool): Whether to show a bar where standard error is a terminal. Elsewhere there is none.

    Returns:
        Iterable: The same items.
    """
    disable = None if shown and _ALLOWED.get() else True
    bar: Iterable[_Item] = tqdm(iterable, total=total, desc=what, leave=False, disable=disable)
    return bar


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """Decide for all that runs in the context whether :func:`progress` may show a bar.

    Args:
        shown (bool): Whether it may.
    """
    before = _ALLOWED.set(shown)
    try:
        yield
    finally:
        _ALLOWED.reset(before)


def bar_is_on(trainer: Any) -> bool:  # noqa: ANN401
    """Whether a trainer shows its own progress, in this process.

    Args:
        trainer (Trainer | None): Of the run; without one, a bar may be shown.
    """
    if trainer is None:
        return True
    return bool(trainer.is_global_zero) and getattr(trainer, "progress_bar_callback", None) is not None

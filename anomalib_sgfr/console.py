"""Progress bars, log filters, and an Engine that shows nothing."""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch import Callback
from lightning_utilities.core import rank_zero
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from anomalib.engine import Engine

__all__ = [
    "LogFilters",
    "bar_is_on",
    "bars",
    "configure_logging",
    "log_once",
    "progress",
    "quiet_engine",
    "quiet_loggers",
    "quiet_warnings",
]


_Item = TypeVar("_Item")
_ALLOWED = ContextVar("_ALLOWED", default=True)


def progress(
    iterable: Iterable[_Item], total: int | None, what: str, *, shown: bool = True
) -> Iterable[_Item]:
    """Iterate over items with a progress bar on standard error, which is removed at the end.

    Args:
        iterable (Iterable): The items.
        total (int | None): How many there are, if that is known.
        what (str): Description, of two or three words.
        shown (bool): Whether to show a bar where standard error is a terminal. Elsewhere there is
            none.

    Returns:
        Iterable: The same items.
    """
    disable = None if shown and _ALLOWED.get() else True
    bar: Iterable[_Item] = tqdm(iterable, total=total, desc=what, leave=False, disable=disable)
    return bar


@contextmanager
def bars(*, shown: bool) -> Iterator[None]:
    """Allow or forbid the bars of :func:`progress` within the context.

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
    return (
        bool(trainer.is_global_zero) and getattr(trainer, "progress_bar_callback", None) is not None
    )


# warnings about anomalib's, Lightning's and PyTorch's own code: regular expressions
_IDLE_WARNINGS = (
    r"`LightningModule\.configure_optimizers` returned `None`",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # pixels, without masks
    r"The ``compute`` method of metric \w+ was called before the ``update`` method",
    r"The dirpath has changed from ",
    # one pass is all there is
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Precision [\w-]+ is not supported by the model summary",
    r"'pin_memory' argument is set as true but no accelerator is found",
)
_IDLE_LINES = re.compile(
    r"Initializing \w+ model\.|Loading the callbacks|Overriding \w+ from None with|TPU"
    r" available:|.{0,3}Tip: |"
    r"`Trainer\(val_check_interval=1\.0\)` was configured|`Trainer\.fit` stopped: `max_epochs=1`"
    r" reached|"
    r"\s*Detected KeyboardInterrupt|Restoring states from the checkpoint path|Loaded model weights"
    r" from the checkpoint"
)


def quiet_engine(folder: str | Path, **arguments: Any) -> "Engine":  # noqa: ANN401
    """Build an Engine on one CPU that logs and shows nothing.

    Args:
        folder (str | Path): Where it writes.
        **arguments (Any): Of the Engine, that shall differ or be added.
    """
    from anomalib.engine import Engine

    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Engine(default_root_dir=folder, **{**quiet, **arguments})


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Hide what loggers log below a warning within the context.

    Args:
        *names (str): Names of loggers; their children follow, unless they have their own levels.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    try:
        for item in loggers:
            item.setLevel(max(item.level, logging.WARNING))
        yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Hide warnings about anomalib's, Lightning's and PyTorch's own code within the context."""
    with warnings.catch_warnings():
        for message in _IDLE_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def log_once() -> Iterator[None]:
    """Log each line once within the context, where anomalib's command line has two handlers."""
    handlers = logging.getLogger().handlers
    plain = any(type(handler) is logging.StreamHandler for handler in handlers)
    doubles = [handler for handler in handlers if plain and type(handler).__name__ == "RichHandler"]
    try:
        for handler in doubles:
            handler.addFilter(_nothing)
        yield
    finally:
        for handler in doubles:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    del record
    return False


def _of_use(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not _IDLE_LINES.match(record.getMessage())


def configure_logging() -> None:
    """Log to standard error, each line once: for the command line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    rank_zero.log.addFilter(_of_use)  # whose handler Lightning makes later
    for each in logging.getLogger().handlers:
        each.addFilter(_of_use)


class LogFilters(Callback):
    """Hides warnings and repeated log lines that users cannot act on, while a run lasts."""

    def __init__(self) -> None:
        super().__init__()
        self._left = ExitStack()

    def setup(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Begin."""
        del args, kwargs
        self._left.close()
        self._left.enter_context(quiet_warnings())
        self._left.enter_context(log_once())

    def teardown(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """End."""
        del args, kwargs
        self._left.close()

    on_exception = teardown

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what lasts in this process alone."""
        return {**self.__dict__, "_left": ExitStack()}

"""Run each statement as the first that an interpreter has of anomalib: ``python first_imports.py
JSON``.

What others wrote is imported once, and each statement runs in a fork of that process, in which
neither anomalib nor this package is known: as in an interpreter of its own, but in a tenth of the
time. Prints as JSON what each said: a traceback, the warning of a registration that failed, or
nothing.
"""

import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module

_OTHERS = (
    "torch",
    "torchvision",
    "torchmetrics",
    "lightning.pytorch.cli",
    "timm",
    "kornia",
    "pandas",
    "sklearn",
)
_OURS = {"anomalib", "anomalib_sgfr"}


def forked(action: Callable[[], str]) -> str:
    """What an action returns in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = action()
        except BaseException:  # noqa: BLE001  # whatever happens, say so
            said = traceback.format_exc()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said or ("" if status == 0 else f"exit status {status}")


def run(statement: str) -> str:
    """Run a statement; what it warned of, as the interpreter would have printed it, if a
    registration failed.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        exec(statement, {"__name__": "__main__"})  # the tests' own statements
    return "\n".join(
        str(warning) for warning in caught if issubclass(warning.category, RuntimeWarning)
    )


def others() -> str:
    """Names of what anomalib imports of others, beside the above."""
    before = set(sys.modules)
    for name in (
        "anomalib.models",
        "anomalib.data",
        "anomalib_sgfr.lightning_model",
        "anomalib_sgfr.data",
    ):
        import_module(name)
    new = [
        name for name in sys.modules if name not in before and name.partition(".")[0] not in _OURS
    ]
    return json.dumps(new)


if __name__ == "__main__":
    for name in _OTHERS:
        import_module(name)
    for name in json.loads(forked(others)):
        with suppress(ImportError):  # some are made by another's import, and by no name
            import_module(name)
    gc.freeze()  # which the forks would otherwise copy, to look through it
    known = [name for name in sys.modules if name.partition(".")[0] in _OURS]
    if known:
        sys.exit(f"not the first: {known}")
    print(json.dumps({line: forked(partial(run, line)) for line in json.loads(sys.argv[1])}))  # noqa: T201

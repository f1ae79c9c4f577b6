"""Run each statement as the first that an interpreter has of anomalib: ``python first_imports.py JSON``.

What others wrote is imported once, and each statement runs in a fork of that process, in which neither anomalib nor
this package is known: as in an interpreter of its own, but in a tenth of the time. Prints what failed, as JSON.
"""

import json
import os
import sys
import traceback
from importlib import import_module

_OTHERS = ("torch", "torchvision", "torchmetrics", "lightning.pytorch.cli", "timm", "kornia", "pandas", "sklearn")


def fails(statement: str) -> str:
    """Traceback of a statement in a process of its own; empty if it ran."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            exec(statement, {"__name__": "__main__"})  # the tests' own statements
            said = ""
        except BaseException:  # noqa: BLE001  # whatever happens, say so
            said = traceback.format_exc()
        os.write(writing, said.encode()[-60_000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said or ("" if status == 0 else f"exit status {status}")


if __name__ == "__main__":
    for name in _OTHERS:
        import_module(name)
    known = [name for name in sys.modules if name.partition(".")[0] in {"anomalib", "anomalib_sgfr"}]
    if known:
        sys.exit(f"not the first: {known}")
    print(json.dumps({line: said for line in json.loads(sys.argv[1]) if (said := fails(line))}))  # noqa: T201

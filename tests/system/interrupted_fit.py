"""Add images to a fitted model and break off midway: ``python interrupted_fit.py PARTS OUT
CHECKPOINT HOW``.

``HOW`` is the name of a signal, which the process sends itself during the fit; ``full``: no file
may grow beyond a part of a checkpoint, as on a disk that is full; or ``cut``: the process is killed
when a file does, amid the write.
"""

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_sgfr import Sgfr
from tests.conftest import folder_datamodule


class Interrupt(Callback):
    """Send this process a signal after its second training batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, *_: Any, batch_idx: int = 0) -> None:
        """Called by Lightning with trainer, model, outputs, batch and index."""
        del batch_idx
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 2:
            os.kill(os.getpid(), self.number)


def main(parts: Path, out: Path, checkpoint: Path, how: str) -> None:
    """Fit, and come to no good end."""
    callbacks: list[Callback] = []
    if how in {"full", "cut"}:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN if how == "full" else signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    else:
        # A shell starts its background jobs with SIGINT ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        callbacks.append(Interrupt(getattr(signal, how)))
    model = Sgfr(
        bank_size=150,
        update=True,
        visualizer=False,
        pre_processor=Sgfr.configure_pre_processor((64, 64)),
    )
    engine = Engine(accelerator="cpu", default_root_dir=out, callbacks=callbacks)
    engine.fit(
        model, datamodule=folder_datamodule(parts, train_batch_size=2), ckpt_path=str(checkpoint)
    )
    sys.stdout.write("the fit ended as if nothing had happened\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])

"""A trace for ONNX, most of an export's time, made once of each model and shared by processes."""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["traced_once"]


@contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """Trace each fitted model once; its file is copied where the same is asked for again.

    Args:
        folder (Path): Where traced files are kept; processes may share it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    export = torch.onnx.export

    def once(model: Any, args: tuple[torch.Tensor, ...], f: str | Path, **kwargs: Any) -> None:  # noqa: ANN401
        kept = folder / _key(model, args, Path(f).name, kwargs)
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be tracing it
            if not kept.exists():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    made = Path(scratch) / "made"
                    made.mkdir()
                    export(model=model, args=args, f=str(made / Path(f).name), **kwargs)
                    made.rename(kept)
        shutil.copytree(kept, Path(f).parent, dirs_exist_ok=True)

    def fitted_once(model: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return (once if hasattr(model, "hparams") else export)(model, *args, **kwargs)

    with patch("torch.onnx.export", fitted_once):
        yield


def _key(
    model: Any,  # noqa: ANN401
    args: tuple[torch.Tensor, ...],
    name: str,
    kwargs: dict[str, Any],
) -> str:
    """What a traced file follows from, as the name of a folder."""
    state = hashlib.sha256()
    for part, tensor in model.state_dict().items():
        state.update(part.encode() + tensor.numpy(force=True).tobytes())
    sensitivities = [
        getattr(model.post_processor, f"{kind}_sensitivity", None) for kind in ("image", "pixel")
    ]
    shapes = [tuple(argument.shape) for argument in args]
    state.update(repr((repr(model), model.hparams, sensitivities, shapes, kwargs, name)).encode())
    return state.hexdigest()

"""A trace for ONNX, most of an export's time, made once of each model while a context lasts."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["traced_once"]


@contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """Trace each model once; its file is copied where the same is asked for again.

    Args:
        folder (Path): Where traced files are kept.
    """
    traced: dict[tuple[object, ...], Path] = {}
    export = torch.onnx.export

    def once(model: Any, args: tuple[torch.Tensor, ...], f: str, **kwargs: Any) -> None:  # noqa: ANN401
        state = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            state.update(name.encode() + tensor.numpy(force=True).tobytes())
        settings = {
            name: getattr(model.post_processor, name, None)
            for name in ("image_sensitivity", "pixel_sensitivity")
        }
        shapes = [tuple(argument.shape) for argument in args]
        key = (
            state.digest(),
            repr(model),
            repr(model.hparams),
            repr(settings),
            repr(shapes),
            repr(kwargs),
            Path(f).name,
        )
        if key not in traced:
            kept = folder / f"traced{len(traced)}"
            kept.mkdir(parents=True)
            export(model=model, args=args, f=str(kept / Path(f).name), **kwargs)
            traced[key] = kept
        shutil.copytree(traced[key], Path(f).parent, dirs_exist_ok=True)

    with patch("torch.onnx.export", once):
        yield

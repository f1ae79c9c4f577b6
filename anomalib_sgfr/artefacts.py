"""Files that a run leaves: checkpoints checked before they are used, exports written whole or not at all."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["check", "damage", "whole"]


def damage(path: Path | str | None) -> str | None:
    """What is wrong with a checkpoint file, before it is read.

    Args:
        path (Path | str | None): A file on disk; anything else is left to Lightning.

    Returns:
        str | None: What to tell the user, or ``None`` if nothing is known to be wrong.
    """
    if path is None or not Path(path).is_file() or zipfile.is_zipfile(path):
        return None
    return f"'{path}' is not a whole checkpoint: it was cut short, or is another kind of file."


def check(checkpoint: dict[str, Any], model: "Sgfr") -> None:
    """Refuse a checkpoint that the model cannot use, and say why.

    Args:
        checkpoint (dict[str, Any]): As Lightning read it. What an older Sgfr did not store is filled in.
        model (Sgfr): The model to restore.

    Raises:
        ValueError: If it is another model's, of another backbone, or its bank is not finite.
    """
    path = getattr(getattr(model, "_trainer", None), "ckpt_path", None)
    name = f"checkpoint '{path}'" if path else "the checkpoint"
    state = checkpoint.get("state_dict", {})
    bank = state.get("model.bank")
    if bank is None:
        msg = f"{name} is not Sgfr's: it holds no bank. Pass one that `anomalib fit --model Sgfr` saved."
        raise ValueError(msg)
    theirs = checkpoint.get("hyper_parameters", {}).get("backbone", model.hparams.get("backbone"))
    ours = model.hparams.get("backbone")
    if theirs != ours:
        msg = f"{name} was fitted with backbone '{theirs}', the model has '{ours}': pass --model.backbone {theirs}."
        raise ValueError(msg)
    if not bool(torch.isfinite(bank).all()):
        msg = f"the bank in {name} holds NaN or infinite values: the file is damaged; fit again."
        raise ValueError(msg)
    atoms = len(bank) if bank.numel() else 0
    state.setdefault("model.bank_origin", torch.full((atoms, 3), -1) if atoms else torch.empty(0, dtype=torch.int64))
    for missing in ("model.bank_images", "model.bank_thumbnails"):
        state.setdefault(missing, torch.empty(0, dtype=torch.uint8))


class _Part:
    """Folder beside the final one that an export is made in."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self._root = root

    def done(self, made: Path) -> Path:
        """Move what was made, and what lies beside it, to where it belongs.

        Args:
            made (Path): The file that names the others: moved last.

        Returns:
            Path: Where it is now.
        """
        target = self._root / made.relative_to(self.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(made.parent.iterdir(), key=lambda file: file == made):
            file.replace(target.parent / file.name)
        return target


@contextmanager
def whole(export_root: Path | str) -> Iterator[_Part]:
    """Export into a folder of its own, so that a failed or killed export leaves an earlier one as it was.

    Args:
        export_root (Path | str): Folder that the export belongs in.
    """
    root = Path(export_root)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".export-") as folder:
        yield _Part(Path(folder), root)

"""What one benchmark run was and what it measured: the schema of ``results.json``.

``results.json`` is a list of records, one for each run, as :class:`Record` describes them; ``null``
is "not measured". Files are written whole or not at all.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = [
    "METRICS",
    "Record",
    "Row",
    "Spec",
    "merge",
    "read",
    "read_rows",
    "table",
    "write_rows",
    "write_text",
]

Row = dict[str, Any]

_PACKAGES = ("anomalib", "anomalib-sgfr", "torch", "torchvision", "lightning", "timm", "numpy")
METRICS = ("image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_AP", "AUPRO")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to run; together these identify a record.

    Attributes:
        dataset (str): ``mtd``, ``elpv-mono``, ``elpv-poly``, ``elpv-both`` or ``folder``.
        split (str | None): Split of ``mtd``, ``canonical`` or ``tile``.
        model (str): ``sgfr``, ``patchcore``, ``padim`` or ``mhpatchcore``.
        arguments (dict[str, Any]): Every argument of the model, defaults included, but its backbone
            and components.
        backbone (str): Name of the timm model.
        image_size (list[int]): Height and width in pixels.
        seed (int): Seeds PyTorch, the choice of ``limit_train`` images, and the split of
            ``elpv-*``.
        limit_train (int | None): Number of training images, chosen at random; ``None`` for all.
        contamination (float | None): Share of the training images that are defective, taken from
            the test images.
        own_aspect (bool): Whether each image keeps its own aspect ratio, at as many pixels as
            ``image_size`` has.
    """

    dataset: str
    split: str | None
    model: str
    arguments: dict[str, Any]
    backbone: str
    image_size: list[int]
    seed: int
    limit_train: int | None
    contamination: float | None = None
    own_aspect: bool = False

    @property
    def key(self) -> str:
        """What identifies the run, as canonical JSON."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(Spec)}
        return json.dumps(fields, sort_keys=True)

    @property
    def name(self) -> str:
        """Name of the run's folder: readable, and different for different runs."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
        return "-".join(
            part
            for part in (self.dataset, self.split, self.model, f"seed{self.seed}", digest)
            if part
        )


@dataclass(frozen=True, kw_only=True)
class Record(Spec):
    """A run and its measurements.

    Attributes:
        versions (dict[str, str]): Versions of the packages that ran.
        n_train (int | None): Number of training images.
        n_test (int | None): Number of test images.
        metrics (dict[str, float | None]): The values of :data:`METRICS`, fractions of one, from raw
            scores. ``pixel_AP`` is average precision over pixels, ``AUPRO`` has a false-positive
            limit of 0.3. Pixel metrics are ``None`` where there are no masks.
        per_defect (dict[str, float]): Image AUROC of each kind of defect against all good test
            images.
        extract_s (float | None): Seconds of a bare pass that loads the training images and embeds
            them. This and the other times are ``None`` where the machine was not the run's alone.
        fit_s (float | None): Seconds of a fit, from the start of its first pass to the end of its
            last.
        sampling_s (float | None): Seconds of the fit in the model's own steps: whatever comes after
            the embedding.
        extract_peak_rss_mb (float | None): Largest resident memory during the bare pass, in MiB.
        fit_peak_rss_mb (float | None): Largest resident memory during the fit, in MiB.
        predict_ms (float | None): Median milliseconds for one pre-processed image through the
            PyTorch model.
        bank_atoms (int | None): Embeddings stored; ``None`` for a model that stores something else.
        bank_bytes (int | None): Bytes of what the model learnt, to be stored beside its backbone.
        error (str | None): Why the run failed; ``None`` if it did not.
    """

    versions: dict[str, str]
    n_train: int | None = None
    n_test: int | None = None
    metrics: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(METRICS))
    per_defect: dict[str, float] = field(default_factory=dict)
    extract_s: float | None = None
    fit_s: float | None = None
    sampling_s: float | None = None
    extract_peak_rss_mb: float | None = None
    fit_peak_rss_mb: float | None = None
    predict_ms: float | None = None
    bank_atoms: int | None = None
    bank_bytes: int | None = None
    error: str | None = None

    @classmethod
    def of(cls, spec: Spec, **measured: Any) -> "Record":  # noqa: ANN401
        """What a run measured, or why it failed, with the packages that are installed now."""
        return cls(
            **dataclasses.asdict(spec),
            versions={name: version(name) for name in _PACKAGES},
            **measured,
        )

    def __post_init__(self) -> None:
        """Refuse what is not a measurement."""
        if set(self.metrics) != set(METRICS):
            msg = f"metrics must be exactly {', '.join(METRICS)}, got {', '.join(self.metrics)}."
            raise ValueError(msg)
        for name, value in {**self.metrics, **self.per_defect}.items():
            if value is not None and not 0.0 <= value <= 1.0:
                msg = f"{name} must be a fraction of one, got {value}."
                raise ValueError(msg)
        for name in (
            "extract_s",
            "fit_s",
            "sampling_s",
            "predict_ms",
            "fit_peak_rss_mb",
            "bank_bytes",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                msg = f"{name} must not be negative, got {value}."
                raise ValueError(msg)


def read(path: Path) -> list[Record]:
    """Read ``results.json``; a file that does not exist holds no record.

    Raises:
        ValueError: If the file is not a list of records; the message names it and the record.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Record(**row) for row in rows]
    except (TypeError, ValueError) as error:
        msg = f"'{path}' is not a list of benchmark records: {error}"
        raise ValueError(msg) from error


def merge(path: Path, records: Iterable[Record]) -> None:
    """Add records to ``results.json``; a record of the same run is replaced."""
    known = {record.key: record for record in read(path)}
    known.update({record.key: record for record in records})
    write_rows(path, [dataclasses.asdict(known[key]) for key in sorted(known)])


def read_rows(path: Path) -> list[Row]:
    """Read a list of results; a file that does not exist holds none."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a list of results, one a line, so that small changes make small differences."""
    write_text(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table of these columns and rows of cells."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, delete=False, encoding="utf-8"
    ) as handle:
        temporary = Path(handle.name)
        try:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

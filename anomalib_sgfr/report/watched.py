"""Section of a report on watched streams: the evidence, and what has changed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from anomalib_sgfr.console import progress
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import CalibrationScores, ThresholdState, group_of
from anomalib_sgfr.report.contents import ChangeExample, ChangeMaps, LayerChange, WatchedStream
from anomalib_sgfr.report.crops import displayable
from anomalib_sgfr.report.media import webp
from anomalib_sgfr.report.score_table import is_normalised
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["NEW_IMAGES", "StreamTable", "calibration_images", "describe_streams", "start_of_change"]

NEW_IMAGES = 16  # to name in the commands that adapt or accept
_COMPARED = 32  # images before the change, and as many after it
_FEWEST = 8  # earlier images; below that, calibration images are compared with
_EXAMPLES = 3  # of a kind
_DESCRIBED = 6  # streams
_SIDE = 224  # pixels of an image
_MAP_SIDE = 64  # pixels of a map of change


class StreamTable(NamedTuple):
    """What a watch has found of a stream; a value for each image that has a score.

    Attributes:
        name (str): Camera, product ...; empty where all images are one stream.
        paths (list[str]): Image files.
        scores (list[float]): Scores, as predictions hold them.
        p_values (list[float]): P-values of the scores.
        evidence (list[float]): Evidence against unchanged conditions, after the image.
        limit (float): Evidence at which the alarm is raised.
        changed_at (int | None): Number of images at the alarm; ``None`` without one.
        calibration (list[str]): Calibration images that the stream is compared with.
    """

    name: str
    paths: list[str]
    scores: list[float]
    p_values: list[float]
    evidence: list[float]
    limit: float
    changed_at: int | None
    calibration: list[str]

    @property
    def start(self) -> int:
        """Number of images before the change, as estimated; all without a change."""
        if self.changed_at is None:
            return len(self.paths)
        return start_of_change(self.p_values, self.changed_at)

    @property
    def direction(self) -> str | None:
        """Which way scores moved: ``"higher"`` or ``"lower"``; ``None`` if they did not."""
        if self.changed_at is None:
            return None
        after = self.p_values[self.start : self.changed_at]
        return "higher" if sum(after) < 0.5 * len(after) else "lower"

    @property
    def shown(self) -> list[str]:
        """Images that a report on the stream reads: before and after the change, else the latest.

        The largest and the most typical scores after the change are among them.
        """
        if self.changed_at is None:
            return self.paths[-_COMPARED:]
        before, after = _compared(self)
        return [self.paths[index] for index in dict.fromkeys([*before, *after, *_examples(self)])]


class _Measured(NamedTuple):
    """An image as a model sees it.

    Attributes:
        image (NDArray[np.float32]): Shape ``(H, W, 3)``, between 0 and 1.
        residuals (NDArray[np.float64]): Mean residual of each scale, the finest first.
        anomaly_map (Tensor): Raw, shape ``(1, 1, H, W)``.
        shown_map (NDArray[np.float32]): Normalised as predictions are, shape ``(H, W)``.
    """

    image: NDArray[np.float32]
    residuals: NDArray[np.float64]
    anomaly_map: Tensor
    shown_map: NDArray[np.float32]


def start_of_change(p_values: Sequence[float], changed_at: int) -> int:
    """Number of images before a change, as estimated by least squares.

    Of all ways to cut the p-values up to the alarm in two, the one whose two means leave the
    smallest squares. Where the mean before is nearer to that after than to 1/2, the mean of
    unchanged conditions, all images are of after the change.

    Args:
        p_values (Sequence[float]): P-value of each image.
        changed_at (int): Number of images at the alarm.

    Returns:
        int: From 0 to ``changed_at - 1``.
    """
    values = np.asarray(p_values[:changed_at], float)
    if len(values) < 2:  # noqa: PLR2004
        return 0
    number = np.arange(1, len(values))
    sums = values.cumsum()[:-1]
    before, after = sums / number, (values.sum() - sums) / (len(values) - number)
    best = int(np.argmax((before - after) ** 2 * number * (len(values) - number)))
    all_are_after = abs(before[best] - after[best]) < abs(before[best] - 0.5)
    return 0 if all_are_after else best + 1


def describe_streams(
    module: Any,  # noqa: ANN401
    tables: Sequence[StreamTable],
    *,
    shown: bool = True,
) -> list[WatchedStream]:
    """Describe what has changed in watched streams.

    Args:
        module (Any): The Lightning model.
        tables (Sequence[StreamTable]): The streams.
        shown (bool): Whether to show a progress bar.

    Returns:
        list[WatchedStream]: Those that have changed first; of the first six of them, with layers,
        maps and examples.
    """
    ordered = sorted(tables, key=lambda table: table.changed_at is None)
    jobs = [table for table in ordered if table.changed_at is not None][:_DESCRIBED]
    reader = _Reader(module, jobs, shown=shown)
    return [_described(reader, table, with_images=table in jobs) for table in ordered]


def _compared(table: StreamTable) -> tuple[list[int], list[int]]:
    """Indices of images before and after the start of the change, evenly chosen."""
    start, number = table.start, len(table.paths)
    return _evenly(range(start), _COMPARED), _evenly(range(start, number), _COMPARED)


def _evenly(indices: Sequence[int], most: int) -> list[int]:
    if len(indices) <= most:
        return list(indices)
    return [indices[round(place)] for place in np.linspace(0, len(indices) - 1, most)]


def _examples(table: StreamTable) -> dict[int, str]:
    """Kind of each example, by the image's index."""
    start = table.start
    after = sorted(range(start, len(table.paths)), key=lambda index: table.scores[index])
    before = sorted(range(start), key=lambda index: table.scores[index])
    return {
        **dict.fromkeys(_middle(before), "typical before the change"),
        **dict.fromkeys(_middle(after), "typical after the change"),
        **dict.fromkeys(after[: -_EXAMPLES - 1 : -1], "largest score after the change"),
    }


def _middle(indices: Sequence[int]) -> Sequence[int]:
    first = max(0, (len(indices) - _EXAMPLES) // 2)
    return indices[first : first + _EXAMPLES]


def _new_images(table: StreamTable) -> list[str]:
    """Images of after the change for a command: evenly chosen, without the largest quarter."""
    start = table.start
    after = range(start, len(table.paths))
    limit = np.quantile([table.scores[index] for index in after], 0.75)
    usual = [index for index in after if table.scores[index] <= limit]
    return [table.paths[index] for index in _evenly(usual, NEW_IMAGES)]


def _needed(table: StreamTable) -> list[str]:
    before, _ = _compared(table)
    calibration = _evenly(range(len(table.calibration)), _COMPARED)
    few = [table.calibration[index] for index in calibration] if len(before) < _FEWEST else []
    return [*table.shown, *few]


class _Reader:
    """Measures images, each once; those that cannot be read are left out."""

    def __init__(
        self,
        module: Any,  # noqa: ANN401
        tables: Sequence[StreamTable],
        *,
        shown: bool,
    ) -> None:
        self.module = module
        model: SgfrModel = module.model
        self.group = getattr(module.post_processor, "state", ThresholdState()).group
        self.numbers: dict[str, list[int]] = {}  # training images of each group
        for number, image in enumerate(model.images):
            self.numbers.setdefault(group_of(image, self.group), []).append(number)
        self.found: dict[str, _Measured] = {}
        self.gone: set[str] = set()
        self.calibration = {path for table in tables for path in table.calibration}
        self.calibration -= {path for table in tables for path in table.paths}
        paths = list(dict.fromkeys(path for table in tables for path in _needed(table)))
        for path in progress(paths, len(paths), "Watched images", shown=shown):
            try:
                self.found[path] = self._measure(path)
            except (OSError, ValueError, SyntaxError):
                self.gone.add(path)

    @torch.no_grad()
    def _measure(self, path: str) -> _Measured:
        model: SgfrModel = self.module.model
        image = read_prepared(path, self.module.pre_processor, model.bit_depth)
        embeddings = model.embed(image[None].to(model.image_paths.device))
        # as it was calibrated: a training image without the atoms of its part
        is_calibration = path in self.calibration
        own = self.numbers.get(group_of(path, self.group), []) if is_calibration else []
        banks = (model.banks_without(own) if own else None) or list(model.banks)
        maps = model.score_embeddings(embeddings, image.shape[-2:], banks)
        residuals = maps.residuals
        inside = model.patches_inside([part.shape[-2:] for part in residuals])
        means = [
            part.mean() if inside is None else part[inside[number].expand_as(part) > 0].mean()
            for number, part in enumerate(residuals)
        ]
        predicted: Any = maps.prediction
        if self.module.post_processor is not None:
            predicted = self.module.post_processor(predicted)
        return _Measured(
            displayable(self.module.pre_processor, image),
            torch.stack(means).double().cpu().numpy(),
            maps.anomaly_map.float().cpu(),
            predicted.anomaly_map.squeeze().float().cpu().numpy(),
        )

    def of(self, paths: Sequence[str]) -> list[_Measured]:
        return [self.found[path] for path in paths if path in self.found]


def _described(reader: _Reader, table: StreamTable, *, with_images: bool) -> WatchedStream:
    changed = table.changed_at
    found = WatchedStream(
        name=table.name,
        images=len(table.paths),
        evidence=table.evidence,
        limit=table.limit,
        changed_at=changed,
        start=None if changed is None else table.start,
        direction=table.direction,
    )
    if changed is None or not with_images:
        return found
    rows_before, rows_after = _compared(table)
    after = reader.of([table.paths[index] for index in rows_after])
    before = reader.of([table.paths[index] for index in rows_before])
    basis = f"{len(before)} images before the change"
    if len(before) < _FEWEST:
        before = reader.of([path for path in _needed(table) if path not in set(table.shown)])
        basis = f"{len(before)} calibration images, without their own atoms"
    notes = []
    gone = sum(path in reader.gone for path in table.shown)
    if gone:
        notes.append(
            f"{gone} of the {len(table.shown)} images chosen for this section cannot be read: they"
            " were moved or removed, or their paths start from another folder."
        )
    new = [path for path in _new_images(table) if Path(path).is_file()]
    found = found._replace(new_images=new, notes=notes, examples=_drawn(reader, table))
    if len(before) < 2 or not after:  # noqa: PLR2004  # of one there is no deviation
        return found._replace(notes=[*notes, "There are no images to compare layers by."])
    return found._replace(
        basis=f"{len(after)} images after the change and {basis}",
        layers=_layers(reader.module.model, before, after),
        maps=_maps(before, after),
    )


def _layers(
    model: SgfrModel, before: Sequence[_Measured], after: Sequence[_Measured]
) -> list[LayerChange]:
    early, late = (np.stack([part.residuals for part in parts]) for parts in (before, after))
    spread = np.maximum(early.std(0), 1e-12)
    embedder = model.embedder
    return [
        LayerChange(
            layers=", ".join(embedder.layers[index] for index in scale.layer_indices),
            stride=scale.stride,
            contributes_to=scale.contributes_to,
            before=float(early[:, number].mean()),
            after=float(late[:, number].mean()),
            deviations=float((late - early.mean(0))[:, number].mean() / spread[number]),
        )
        for number, scale in enumerate(embedder.scales)
    ]


def _maps(before: Sequence[_Measured], after: Sequence[_Measured]) -> ChangeMaps:
    """Mean images, and the change of the mean anomaly map, in the shape of the first image."""
    height, width = after[0].image.shape[:2]
    share = _MAP_SIDE / max(height, width)
    size = (max(1, round(height * share)), max(1, round(width * share)))

    def mean_of(parts: Iterator[Tensor], size: tuple[int, int]) -> NDArray[np.float32]:
        found = [interpolate(part, size, mode="bilinear", antialias=True) for part in parts]
        mean: NDArray[np.float32] = torch.stack(found).mean(0)[0].permute(1, 2, 0).numpy()
        return mean

    early, late = (mean_of((part.anomaly_map for part in parts), size) for parts in (before, after))
    change = (late - early)[..., 0]
    most = float(np.abs(change).max()) or 1.0
    colours = mpl.colormaps["RdBu_r"](0.5 + 0.5 * change / most)[..., :3].astype(np.float32)
    images = [
        mean_of((torch.from_numpy(p.image).permute(2, 0, 1)[None] for p in parts), (height, width))
        for parts in (before, after)
    ]
    row, column = np.unravel_index(int(np.abs(change).argmax()), change.shape)
    return ChangeMaps(
        before=webp(images[0], _SIDE),
        after=webp(images[1], _SIDE),
        change=webp(colours, _SIDE),
        most=most,
        mean=float(change.mean()),
        peak=((int(column) + 0.5) / size[1], (int(row) + 0.5) / size[0]),
    )


def _drawn(reader: _Reader, table: StreamTable) -> list[ChangeExample]:
    """Examples with images and maps on one scale, the largest scores first."""
    kinds: Mapping[int, str] = _examples(table)
    held = [index for index in kinds if table.paths[index] in reader.found]
    held.sort(key=lambda index: -table.scores[index])
    held.sort(key=lambda index: (kinds[index] != "largest score after the change", kinds[index]))
    maps = {index: reader.found[table.paths[index]].shown_map for index in held}
    most = max((float(part.max()) for part in maps.values()), default=1.0)
    most = 1.0 if is_normalised(reader.module.post_processor) else most or 1.0
    return [
        ChangeExample(
            kind=kinds[index],
            path=table.paths[index],
            number=index + 1,
            score=table.scores[index],
            image=webp(reader.found[table.paths[index]].image, _SIDE),
            anomaly_map=webp(
                mpl.colormaps["inferno"](np.clip(maps[index] / most, 0.0, 1.0))[..., :3].astype(
                    np.float32
                ),
                _MAP_SIDE * 2,
            ),
        )
        for index in held
    ]


def calibration_images(module: Any) -> list[str]:  # noqa: ANN401
    """Good images that a model's current threshold is calibrated on, the files that are there."""
    good = getattr(module.post_processor, "calibration_scores", CalibrationScores()).good
    return [path for path in good.subset(good.current).paths if path and Path(path).is_file()]

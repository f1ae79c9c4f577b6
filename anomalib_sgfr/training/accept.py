"""False-alarm feedback: new atoms from good images called anomalous, and a history to undo it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr.console import progress
from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.k_center import k_center_greedy
from anomalib_sgfr.core.patch_grid import origins, to_patches
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.images.reading import image_list
from anomalib_sgfr.memory_bank import MemoryBank
from anomalib_sgfr.post_processing.calibration import CalibrationScores, Split, real_path, rescore
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor, require_threshold
from anomalib_sgfr.report.crops import thumbnails
from anomalib_sgfr.report.model_facts import known_images
from anomalib_sgfr.torch_model import FittedState, SgfrModel
from anomalib_sgfr.training.reject import hold_limits, path_of

__all__ = [
    "Acceptance",
    "AcceptanceHistory",
    "Accepted",
    "AcceptedImage",
    "NewAtoms",
    "accept",
    "add_atoms",
    "find_new_atoms",
    "objections",
    "require_good",
    "take_back",
]

# attempts, until the image is no alarm: the share of the threshold that the map must exceed where
# patches are taken, and how far these must lie from all atoms, in units of what the bank resolves
_EFFORTS = ((0.7, 1.0), (0.4, 1.0), (0.7, 0.25), (0.7, 0.0), (0.4, 0.0), (0.0, 0.0))
# share of the threshold, for each scale, that counts as resolved where the bank is far from full
_NEAR = 0.25


class NewAtoms(NamedTuple):
    """New atoms from one image.

    Attributes:
        image (str): Path.
        atoms (list[Tensor]): Of each scale, shape ``(n, d)``.
        places (list[Tensor]): Their patches: row, column, and the grid's rows and columns, shape
            ``(n, 4)``.
        thumbnails (list[Tensor] | None): Of the patches, if the banks have thumbnails.
    """

    image: str
    atoms: list[Tensor]
    places: list[Tensor]
    thumbnails: list[Tensor] | None = None

    @property
    def number(self) -> int:
        """Number of atoms."""
        return sum(map(len, self.atoms))


class Acceptance(NamedTuple):
    """Images that were accepted together.

    Attributes:
        time (str): When, ISO 8601.
        additions (list[NewAtoms]): New atoms from each.
        state (dict[str, Tensor]): State of the post-processor before.
        config (dict[str, Any]): Its configuration before.
        forced (list[str]): Images among them that were accepted against objections.
    """

    time: str
    additions: list[NewAtoms]
    state: dict[str, Tensor]
    config: dict[str, Any]
    forced: list[str] = []  # noqa: RUF012  # of a NamedTuple, never changed


class AcceptanceHistory(NamedTuple):
    """Memory banks before any image was accepted, and what was accepted since.

    Attributes:
        base (dict[str, Tensor]): State of the banks before.
        steps (tuple[Acceptance, ...]): The oldest first.
    """

    base: dict[str, Tensor]
    steps: tuple[Acceptance, ...] = ()

    @classmethod
    def begun(cls, model: SgfrModel) -> "AcceptanceHistory":
        """History of a model that accepts for the first time."""
        state = model.state_dict().items()
        return cls(
            {name: value.clone() for name, value in state if not name.startswith("embedder.")}
        )

    def plain(self) -> dict[str, Any]:
        """Dictionaries, lists and tensors, for a checkpoint."""
        steps = [
            {**step._asdict(), "additions": [part._asdict() for part in step.additions]}
            for step in self.steps
        ]
        return {"base": self.base, "steps": steps}

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> "AcceptanceHistory":
        """History from what :meth:`plain` gave."""
        steps = [
            {**step, "additions": [NewAtoms(**part) for part in step["additions"]]}
            for step in stored["steps"]
        ]
        return cls(stored["base"], tuple(Acceptance(**step) for step in steps))

    def applied(self, model: SgfrModel) -> SgfrModel:
        """Model after all steps, always made from the base, so that it is the same each time.

        Rejected defects stay as they are.
        """
        made = model.with_banks(model.fitted_state)
        made.load_state_dict(self.base, strict=False)
        additions = [addition for step in self.steps for addition in step.additions]
        if additions:
            made = made.with_banks(add_atoms(made.fitted_state, additions))
        made.load_defects(model.fitted_state)
        return made


class AcceptedImage(NamedTuple):
    """An image that was accepted.

    Attributes:
        image (str): Its file.
        atoms (int): Number of new atoms, of all scales.
        before (float): Raw score before.
        now (float): Raw score now.
    """

    image: str
    atoms: int
    before: float
    now: float


class Accepted(NamedTuple):
    """What became of images that were to be accepted together.

    Attributes:
        images (list[AcceptedImage]): Those that were accepted, in the given order.
        no_alarms (dict[str, float]): Raw scores of those that are no alarms, by file.
        refused (dict[str, str]): Reasons for those that were refused, by file.
        thresholds (tuple[float, float]): Of the raw score, before and now.
        kept (str): Why the threshold was not calibrated again; empty if it was.
        missed (list[str]): Known defects that are called good now, though not by the new atoms:
            they resemble rejected ones no more than accepted images do.
    """

    images: list[AcceptedImage]
    no_alarms: dict[str, float]
    refused: dict[str, str]
    thresholds: tuple[float, float]
    kept: str = ""
    missed: Sequence[str] = ()


@torch.no_grad()
def accept(
    module: Any,  # noqa: ANN401
    images: Sequence[str | Path],
    bad: Sequence[str | Path] = (),
    *,
    force: bool = False,
) -> Accepted:
    """Learn from false alarms that images are good, in place, and calibrate the threshold again.

    An image with which a known defect would be called good is refused, and so is one that
    :func:`objections` names.

    Args:
        module (Any): A fitted :class:`~anomalib_sgfr.lightning_model.Sgfr` with a threshold.
        images (Sequence[str | Path]): Image files that are good.
        bad (Sequence[str | Path]): Files of defective images, none of which may become good; beside
            those that the model knows.
        force (bool): Accept images despite objections; never if a defect becomes good by it.

    Returns:
        Accepted: What became of each image. Where none was accepted, nothing has changed.

    Raises:
        ValueError: If the model has no threshold.
        TypeError: If images are not a list.

    Examples:
        >>> from anomalib_sgfr import Sgfr, accept
        >>> model = Sgfr.load_from_checkpoint(checkpoint)
        >>> found = accept(model, [str(image)])
        >>> len(found.images) + len(found.no_alarms) + len(found.refused)
        1
        >>> model.save_checkpoint("accepted.ckpt")
    """
    files, bad = image_list(images, "images"), image_list(bad, "bad")
    processor = require_threshold(module.post_processor, "nothing was called anomalous")
    model = module.eval().model
    threshold, peak = processor.label_threshold, processor.peak_threshold
    against = objections(module, files)
    known = processor.calibration_scores.defective.exclude([*files, *bad]).paths
    there = [path for path in known if Path(path).is_file()]
    defects = [_Scored.of(model, _read(module, path), path) for path in [*bad, *there]]
    additions, before = list[NewAtoms](), dict[str, float]()
    no_alarms, refused = dict[str, float](), dict[str, str]()
    current = model
    for path in progress(files, len(files), "Accepting"):
        image = _read(module, path)
        score = _Scored.of(current, image, path).score
        addition = find_new_atoms(current, image, path, threshold, peak)
        if addition is None:
            no_alarms[path] = score
            continue
        if path in against and not force:
            refused[path] = f"{against[path]}; --force accepts it (in Python `force=True`)"
            continue
        tried = model.with_banks(add_atoms(model.fitted_state, [*additions, addition]))
        good = _become_good(defects, tried, threshold, threshold)
        if good:
            known_good = f"{len(good)} of {len(defects)} known defects would be called good"
            refused[path] = f"with it {known_good}: {', '.join(good[:3])}"
            continue
        additions.append(addition)
        before[path] = score
        current = tried
    if not additions:
        return Accepted([], no_alarms, refused, (processor.state.image,) * 2)
    earlier = processor.state.image
    _add_step(module, additions, [path for path in before if path in against])
    # none is by the new atoms alone
    missed = _become_good(defects, model, threshold, threshold)
    kept = _recalibrate(module, defects, threshold)
    accepted = [
        AcceptedImage(
            part.image,
            part.number,
            before[part.image],
            _Scored.of(model, _read(module, part.image), part.image).score,
        )
        for part in additions
    ]
    return Accepted(
        accepted, no_alarms, refused, (earlier, processor.state.image), kept, tuple(missed)
    )


def take_back(module: Any) -> Acceptance:  # noqa: ANN401
    """Take back what was accepted last, in place; all else is as it was before it.

    Args:
        module (Any): A fitted :class:`~anomalib_sgfr.lightning_model.Sgfr`.

    Returns:
        Acceptance: The step that was taken back.

    Raises:
        ValueError: If no image was accepted.
    """
    history = module.accepted
    if history is None:
        msg = "no image was accepted: there is nothing to take back."
        raise ValueError(msg)
    step, left = history.steps[-1], history._replace(steps=history.steps[:-1])
    module.model.load_state_dict(left.applied(module.model).state_dict())
    module.post_processor.load_checkpoint_config(step.config)
    module.post_processor.load_state_dict(step.state)
    module.accepted = left if left.steps else None
    _hold_limits(module)
    return step


def objections(module: Any, images: Sequence[str]) -> dict[str, str]:  # noqa: ANN401
    """Reasons, known from a model, not to accept images as new good ones.

    Args:
        module (Any): A fitted :class:`~anomalib_sgfr.lightning_model.Sgfr`.
        images (Sequence[str]): Image files that the user says are good.

    Returns:
        dict[str, str]: Reasons, by file.
    """
    processor, scores = module.post_processor, CalibrationScores()
    if isinstance(processor, SgfrPostProcessor):
        scores = processor.state.scores
    training = [*module.model.images, *scores.of_split(Split.TRAINING).paths]
    defective, _ = known_images(images, scores.defective.paths)
    rejected, _ = known_images(images, [path_of(image) for image in module.model.rejected])
    trained, _ = known_images(images, training)
    bad, good = (
        {Path(real_path(path)).parent for path in paths if path}
        for paths in (scores.defective.paths, [*scores.good.paths, *training])
    )
    found: dict[str, str] = {}
    for path, is_rejected, is_defective, is_trained in zip(
        images, rejected, defective, trained, strict=True
    ):
        if is_rejected:
            found[path] = "it was rejected as a defect (`anomalib-sgfr reject CKPT --undo`)"
        elif is_defective:
            found[path] = "the checkpoint knows it as defective"
        elif Path(real_path(path)).parent in bad - good:
            found[path] = "all that the checkpoint knows of its folder is defective"
        elif is_trained:
            found[path] = "it was trained on"
        elif _is_mask(path):
            found[path] = "it is black and white, as a mask is"
    return found


def require_good(
    module: Any,  # noqa: ANN401
    images: Sequence[str],
    argument: str,
    *,
    force: bool,
) -> dict[str, str]:
    """Refuse images that there are :func:`objections` to, or pass them on.

    Args:
        module (Any): A fitted :class:`~anomalib_sgfr.lightning_model.Sgfr`.
        images (Sequence[str]): Image files that the user says are good.
        argument (str): Where they were given.
        force (bool): Whether to take them for good all the same.

    Returns:
        dict[str, str]: The objections, by file; empty unless ``force``.

    Raises:
        ValueError: If there is one.
    """
    found = objections(module, images)
    if found and not force:
        path, reason = next(iter(found.items()))
        refused = f"{len(found)} of the images cannot be taken for good ones"
        msg = (
            f"{argument}: {refused}; {path}: {reason}. --force takes them (in Python `force=True`)."
        )
        raise ValueError(msg)
    return found


def add_atoms(fitted_state: FittedState, additions: Sequence[NewAtoms]) -> FittedState:
    """Memory banks with new atoms after their own; residual scales stay.

    Args:
        fitted_state (FittedState): The banks.
        additions (Sequence[NewAtoms]): New atoms of each image.
    """
    images = list(fitted_state.images)
    images += dict.fromkeys(item.image for item in additions if item.image not in images)
    states = []
    for scale, state in enumerate(fitted_state.states):
        clusters = state.clusters
        thumbnails = [] if state.thumbnails is None else [state.thumbnails]
        for addition in additions:
            atoms, places = (
                part[scale].to(clusters.atoms.device) for part in (addition.atoms, addition.places)
            )
            number = torch.full_like(places[:, :1], images.index(addition.image))
            origin = torch.cat((number, places), 1)
            clusters = clusters.joined(Clusters.of(atoms, origin.int()))
            if addition.thumbnails is not None and thumbnails:
                thumbnails.append(addition.thumbnails[scale].to(clusters.atoms.device))
        kept = torch.cat(thumbnails) if thumbnails else None
        states.append(state._replace(clusters=clusters, thumbnails=kept))
    return fitted_state._replace(states=states, images=images)


@torch.no_grad()
def find_new_atoms(
    model: SgfrModel,
    image: Tensor,
    path: str,
    threshold: float,
    mask_threshold: float | None = None,
) -> NewAtoms | None:
    """New atoms with which an image is no longer called anomalous.

    They are patches where the map that a scale contributes to is near its threshold or above, those
    farthest from all atoms first, and only such as are farther than the bank resolves. If that is
    not enough, more patches.

    Args:
        model (SgfrModel): A fitted model in evaluation mode.
        image (Tensor): Pre-processed, shape ``(3, H, W)``.
        path (str): Its file.
        threshold (float): Of the raw score.
        mask_threshold (float | None): Of the raw map; ``None`` for that of the score.

    Returns:
        NewAtoms | None: New atoms; ``None`` if the image is called good.
    """
    scales = model.embedder.scales
    # of the map, and of the score
    limits = (threshold if mask_threshold is None else mask_threshold, threshold)
    weights = (sum(scale.in_map for scale in scales), sum(scale.score_weight for scale in scales))
    embeddings = model.embed(image[None])
    found = model.score_embeddings(embeddings, image.shape[-2:])
    if float(found.score_map.amax()) <= threshold:
        return None
    maps = (found.anomaly_map, found.score_map)
    addition = NewAtoms(path, [], [])
    for share, distance in _EFFORTS:
        atoms, places = [], []
        for bank, scale, embedding in zip(model.banks, scales, embeddings, strict=True):
            grid = embedding.shape[-2:]
            takes_part = (scale.in_map, scale.score_weight > 0.0)
            used = [index for index, flag in enumerate(takes_part) if flag]
            near_limit = [
                functional.adaptive_max_pool2d(maps[index], grid).flatten() > share * limits[index]
                for index in used
            ]
            there = torch.stack(near_limit).any(0)
            where = origins(torch.zeros(1, dtype=torch.int64, device=image.device), grid)[there]
            least = min(limits[index] / weights[index] for index in used)
            near = max(float(bank.threshold), _NEAR * least * float(bank.residual_scale))
            patches = to_patches(embedding)[there]
            taken = _taken(bank, patches, distance * near)
            atoms.append(patches[taken])
            places.append(where[taken, 1:])
        addition = NewAtoms(path, atoms, places)
        banks = model.with_banks(add_atoms(model.fitted_state, [addition])).banks
        after = model.score_embeddings(embeddings, image.shape[-2:], banks)
        if all(
            float(part.amax()) <= limit
            for part, limit in zip((after.anomaly_map, after.score_map), limits, strict=True)
        ):
            break
    return addition


def _taken(bank: MemoryBank, patches: Tensor, near: float) -> Tensor:
    """Numbers of the patches that become atoms."""
    atoms = bank.atoms
    start = torch.arange(len(atoms), device=atoms.device)
    if len(patches) == 0:
        return start[:0]
    chosen, _ = k_center_greedy(torch.cat((atoms, patches)), len(atoms) + len(patches), start, near)
    return chosen[len(atoms) :] - len(atoms)


class _Scored(NamedTuple):
    """Image file with its embeddings, size and raw score."""

    path: str
    embeddings: list[Tensor]
    size: Sequence[int]
    score: float

    @classmethod
    def of(cls, model: SgfrModel, image: Tensor, path: str) -> "_Scored":
        """Embed and score a pre-processed image of shape ``(3, H, W)``."""
        embeddings, size = model.embed(image[None]), image.shape[-2:]
        score = float(model.score_embeddings(embeddings, size).pred_score)
        return cls(path, embeddings, size, score)

    def score_by(self, model: SgfrModel) -> float:
        """Raw score by the memory banks of another model with the same backbone."""
        return float(model.score_embeddings(self.embeddings, self.size).pred_score)


def _read(module: Any, path: str) -> Tensor:  # noqa: ANN401
    image = read_prepared(path, module.pre_processor, module.model.bit_depth)
    return image.to(module.model.image_paths.device)


def _become_good(
    defects: Sequence[_Scored], model: SgfrModel, before: float, threshold: float
) -> list[str]:
    """Defective images that exceeded the threshold before, and do not exceed the new one."""
    return [
        defect.path
        for defect in defects
        if defect.score > before and defect.score_by(model) <= threshold
    ]


def _add_step(module: Any, additions: Sequence[NewAtoms], forced: list[str]) -> None:  # noqa: ANN401
    """Add atoms, and a step to the history that takes them back."""
    processor = module.post_processor
    history = module.accepted or AcceptanceHistory.begun(module.model)
    step = Acceptance(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        additions=[_with_thumbnails(module, addition) for addition in additions],
        state={name: value.clone() for name, value in processor.state_dict().items()},
        config=processor.checkpoint_config(),
        forced=forced,
    )
    history = history._replace(steps=(*history.steps, step))
    module.model.load_state_dict(history.applied(module.model).state_dict())
    module.accepted = history
    _hold_limits(module)


def _hold_limits(module: Any) -> None:  # noqa: ANN401
    """Let rejected defects raise the score of no image that is known to be good."""
    model, prepare, state = module.model, module.pre_processor, module.post_processor.state
    hold_limits(model, prepare, state.scores.good.paths, state.group)
    steps = module.accepted.steps if module.accepted else ()
    accepted = [addition.image for step in steps for addition in step.additions]
    # beside their own atoms, unlike images to calibrate on
    hold_limits(model, prepare, accepted, leave_out=False)


def _with_thumbnails(module: Any, addition: NewAtoms) -> NewAtoms:  # noqa: ANN401
    """New atoms with their thumbnails, where the memory banks keep some."""
    model = module.model
    if not any(bank.thumbnails.numel() for bank in model.banks):
        return addition
    earlier = model.fitted_state
    extended = model.with_banks(add_atoms(earlier, [addition]))
    pairs = zip(thumbnails(extended, module.pre_processor, earlier), earlier.states, strict=True)
    new = [part[len(state.clusters.atoms) :] for part, state in pairs]
    return addition._replace(thumbnails=new)


def _recalibrate(module: Any, defects: Sequence[_Scored], before: float) -> str:  # noqa: ANN401
    """Calibrate the threshold with the present memory banks; why not, where it stays."""
    processor = module.post_processor
    earlier = processor.state
    if earlier.by in {"hand", "unknown"}:
        return f"it is {earlier.basis}"
    scores = rescore(earlier.scores, module.model, module.pre_processor, earlier.group)
    processor.use(earlier._replace(scores=scores).calibrated())
    good = len(_become_good(defects, module.model, before, processor.label_threshold))
    if good:
        processor.use(earlier)
        return f"with a new one {good} known defects would be called good"
    return ""


def _is_mask(path: str) -> bool:
    """Whether an image that can be read has black and white pixels only."""
    try:
        with Image.open(path) as image:
            histogram = image.convert("L").histogram()
    except OSError:
        return False
    return not any(histogram[1:-1]) and bool(histogram[0]) and bool(histogram[-1])

"""Missed defects: patches of rejected images for the defect banks, and limits from good images."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from anomalib_sgfr.core.k_center import k_center_greedy
from anomalib_sgfr.core.patch_grid import origins, patches_in_region, to_patches
from anomalib_sgfr.core.processes import failing_together, gathered, share
from anomalib_sgfr.defect_bank import (
    GAIN,
    SAME,
    DefectIndex,
    DefectPatches,
    defect_index,
    nearest_distance,
    resemblance,
)
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.images.reading import image_list, upright_size
from anomalib_sgfr.images.roi import mask_at_input
from anomalib_sgfr.memory_bank import MemoryBank
from anomalib_sgfr.post_processing.calibration import Group, Split, leave_one_out, rescore
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor, require_threshold
from anomalib_sgfr.report.model_facts import known_images
from anomalib_sgfr.torch_model import FittedState, SgfrModel

__all__ = [
    "MARGIN",
    "MOST",
    "Defect",
    "Limits",
    "Rejection",
    "Rejections",
    "add_defects",
    "check_images",
    "date_of",
    "find_defect",
    "find_limits",
    "hold_limits",
    "hold_limits_for_validation",
    "new_date",
    "path_of",
    "reject",
    "without_last",
    "worst_region",
]

MOST = 500  # patches in the defect bank of a scale
_MOST_OF_IMAGE = 50
_LEAST = 0.8  # residual, over that of nominal patches, of a patch that shows the defect
_SHARE = 0.5  # of the way from the median of the score map to its peak
MARGIN = 0.01  # of the limits, for what precision and formats differ in

logger = logging.getLogger(__name__)


class Defect(NamedTuple):
    """Patches of the defect in one image.

    Attributes:
        image (str): Date and path.
        atoms (list[Tensor]): Of each scale, shape ``(n, d)``.
        places (list[Tensor]): Their rows, columns, and the grid's rows and columns, ``(n, 4)``.
    """

    image: str
    atoms: list[Tensor]
    places: list[Tensor]

    @property
    def number(self) -> int:
        """Number of patches."""
        return sum(map(len, self.atoms))


class Rejection(NamedTuple):
    """What became of an image of a missed defect.

    Attributes:
        image (str): Its file.
        patches (list[int]): Number of patches that were learnt at each scale, the finest first.
        before (float): Raw score before.
        now (float): Raw score now.
        known_since (str | None): Date at which the image was rejected already, if so: then nothing
            was added.
    """

    image: str
    patches: list[int]
    before: float
    now: float
    known_since: str | None = None


class Rejections(NamedTuple):
    """What became of images that were rejected together.

    Attributes:
        images (list[Rejection]): In the given order.
        most_alike (list[str]): Good images that resemble the defects most.
        good (int): Number of good images whose scores stay.
        gone (int): Number of calibration images that are not there, whose scores may rise.
    """

    images: list[Rejection]
    most_alike: list[str]
    good: int
    gone: int


@torch.no_grad()
def reject(
    module: Any,  # noqa: ANN401
    regions: Mapping[str, Any] | Mapping[Path, Any],
    good: Sequence[str | Path] = (),
) -> Rejections:
    """Learn from images of a missed defect, in place.

    Of an image that was rejected before, only patches that the defect banks do not hold are added,
    and none without a mask.

    Args:
        module (Any): A fitted :class:`~anomalib_sgfr.lightning_model.Sgfr` with a threshold.
        regions (Mapping[str, Any] | Mapping[Path, Any]): For each image file the mask of its
            defect, an array or tensor of its height and width; ``None`` for the worst region of its
            score map.
        good (Sequence[str | Path]): Files of more good images, none of which may score higher.

    Returns:
        Rejections: Scores before and now.

    Raises:
        ValueError: If an image is known to be good, one of ``good`` is known to be defective, a
            region leaves no trace, good images resemble the defect as much, or none is left to
            compare with.
        TypeError: If ``regions`` is no mapping, or ``good`` no list.

    Examples:
        >>> from anomalib_sgfr import Sgfr, reject
        >>> model = Sgfr.load_from_checkpoint(checkpoint)
        >>> found = reject(model, {str(image): None})
        >>> found.images[0].now > found.images[0].before
        True
        >>> model.save_checkpoint("taught.ckpt")
    """
    if not isinstance(regions, Mapping):
        msg = f"regions must be a mask or None by image file, got {type(regions).__name__}."
        raise TypeError(msg)
    masks, good = {str(path): mask for path, mask in regions.items()}, image_list(good, "good")
    check_images(module, list(masks))
    _check_good(module, list(masks), good)
    module.eval()
    model, prepare = module.model, module.pre_processor
    results, images, defects = _find_defects(module, masks)
    if not defects:
        return Rejections(list(results.values()), [], 0, 0)
    known = module.post_processor.calibration_scores.good.paths
    there = [path for path in known if Path(path or ".").is_file()]
    compared = list(dict.fromkeys([*there, *good]))
    if not compared:
        msg = (
            "none of the images that the checkpoint was calibrated on is there: pass other good"
            " ones (`good`; of the command, --good DIR)."
        )
        raise ValueError(msg)
    limits = find_limits(model, prepare, compared, defects, module.post_processor.state.group)
    # accepted images keep their own atoms, unlike images to calibrate on
    accepted = [path for path in _accepted(module) if Path(path).is_file()]
    if accepted:
        limits = limits.joined(find_limits(model, prepare, accepted, defects, leave_out=False))
    for value, alike in zip(limits.values, limits.images, strict=True):
        if value > SAME:
            msg = (
                f"{alike} is known to be good and shows the same patches as the defect: it is a"
                " copy of the image, or the region has more than the defect."
            )
            raise ValueError(msg)
    tried = model.with_banks(add_defects(model.fitted_state, defects, limits.values))
    size = max(bank.defects.size for bank in tried.banks)
    if size > MOST:
        msg = (
            f"the defect bank of a scale would hold {size} patches, more than {MOST}: take earlier"
            " ones back (`anomalib-sgfr reject CKPT --undo`), or reject fewer images."
        )
        raise ValueError(msg)
    for path, image in images.items():
        now = float(tried.score_maps(image).pred_score)
        results[path] = results[path]._replace(now=now)
    most_alike = list(dict.fromkeys(filter(None, limits.images)))
    if all(found.now <= found.before for found in results.values()):
        msg = (
            "nothing was learned: good images resemble the defect as much as the rejected ones do,"
            f" {', '.join(most_alike)} most."
        )
        raise ValueError(msg)
    model.load_defects(tried.fitted_state)
    number = len(dict.fromkeys([*compared, *accepted]))
    return Rejections(list(results.values()), most_alike, number, len(known) - len(there))


def _find_defects(
    module: Any,  # noqa: ANN401
    regions: Mapping[str, Any],
) -> tuple[dict[str, Rejection], dict[str, Tensor], list[Defect]]:
    """What becomes of each image, and of those with new patches the images and the defects."""
    model, prepare = module.model, module.pre_processor
    results, images, defects = dict[str, Rejection](), dict[str, Tensor](), list[Defect]()
    date = new_date(model.rejected)
    earlier = known_images(list(regions), map(path_of, model.rejected))[0]
    for (path, mask), is_known in zip(regions.items(), earlier, strict=True):
        image = read_prepared(path, prepare, model.bit_depth)[None].to(model.image_paths.device)
        found = model.score_maps(image)
        region = worst_region(found.score_map[0, 0])
        if mask is not None:
            region = _region(path, mask, module).to(region.device)
        defect = find_defect(model, image[0], f"{date} {path}", region)
        if not defect.number:
            msg = (
                f"{path}: the banks rebuild every patch of the region as well as those of good"
                " images: at this image size the defect leaves no trace to learn from."
            )
            raise ValueError(msg)
        new, numbers = _without_stored(model, defect)
        score = float(found.pred_score)
        results[path] = Rejection(path, [len(atoms) for atoms in new.atoms], score, score)
        if numbers and (not new.number or (mask is None and is_known)):
            since = date_of(model.rejected[max(numbers)])
            none = [0] * len(new.atoms)
            results[path] = results[path]._replace(patches=none, known_since=since)
        else:
            images[path] = image
            defects.append(new)
    return results, images, defects


def check_images(module: Any, paths: Sequence[str]) -> None:  # noqa: ANN401
    """Refuse images that cannot show a missed defect.

    Args:
        module (Any): As in :func:`reject`.
        paths (Sequence[str]): Image files.

    Raises:
        ValueError: If there is none, the model has no threshold, or knows one of them as good.
    """
    if not paths:
        msg = "regions must name at least one image, got none."
        raise ValueError(msg)
    processor = require_threshold(module.post_processor, "nothing was missed")
    good = [*module.model.images, *processor.calibration_scores.good.paths]
    for path, is_known in zip(paths, known_images(paths, good)[0], strict=True):
        if is_known:
            msg = (
                f"{path}: the checkpoint was fitted to it or calibrated on it as a good image; if"
                " it shows a defect, fit again without it."
            )
            raise ValueError(msg)


def _check_good(module: Any, rejected: Sequence[str], good: Sequence[str]) -> None:  # noqa: ANN401
    """Refuse images that cannot be compared with as good ones."""
    defective = module.post_processor.calibration_scores.defective.paths
    earlier = [path_of(image) for image in module.model.rejected]
    reasons = {
        "it is rejected by this step": rejected,
        "it was rejected as a defect": earlier,
        "the checkpoint knows it as defective": defective,
    }
    for reason, paths in reasons.items():
        for path, is_known in zip(good, known_images(good, paths)[0], strict=True):
            if is_known:
                msg = f"{path} cannot be taken for a good image: {reason}."
                raise ValueError(msg)


def _accepted(module: Any) -> list[str]:  # noqa: ANN401
    """Images that were accepted as good."""
    steps = module.accepted.steps if module.accepted else ()
    return [addition.image for step in steps for addition in step.additions]


def _region(path: str, mask: Any, module: Any) -> Tensor:  # noqa: ANN401
    """Mask of an image file in pixels of the model's input, where it is inspected."""
    try:
        given = torch.as_tensor(mask) > 0
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{path}: the mask must be an array or a tensor, or None, got {type(mask).__name__}."
        raise TypeError(msg) from error
    size = upright_size(path)
    if tuple(given.shape) != size:
        of = " x ".join(map(str, given.shape))
        msg = f"{path}: the mask is {of} pixels, its image {size[0]} x {size[1]}."
        raise ValueError(msg)
    region, inspected = mask_at_input(given.cpu(), module.pre_processor), module.model.region.cpu()
    if inspected.numel():
        region = region & (inspected > 0)
    if not bool(region.any()):
        of_it = "lies outside of what the model inspects"
        msg = f"{path}: its region {of_it if bool(given.any()) else 'is empty: the mask is black'}."
        raise ValueError(msg)
    return region


@torch.no_grad()
def worst_region(score_map: Tensor) -> Tensor:
    """Region around the peak of a score map: what is connected to it and near it in value.

    That is above half of the way from the map's median to its peak.

    Args:
        score_map (Tensor): Shape ``(H, W)``.

    Returns:
        Tensor: Mask of the region, shape ``(H, W)``, ``bool``.
    """
    level = torch.lerp(score_map.median(), score_map.amax(), _SHARE)
    above = score_map >= level
    parts, _ = ndimage.label(above.cpu().numpy())
    found = torch.from_numpy(parts).to(score_map.device)
    return found == found.flatten()[score_map.argmax()]


@torch.no_grad()
def find_defect(model: SgfrModel, image: Tensor, name: str, region: Tensor) -> Defect:
    """Patches that show a defect: those in its region that the memory banks do not rebuild.

    Args:
        model (SgfrModel): A fitted model in evaluation mode.
        image (Tensor): Pre-processed, shape ``(3, H, W)``.
        name (str): Date and path of the image.
        region (Tensor): Mask of the defect, shape ``(H, W)``, ``bool``.

    Returns:
        Defect: Its patches; a scale may have none.
    """
    embeddings = model.embed(image[None])
    # not as earlier defects raise them, so that one region always has the same patches
    plain = model.with_banks(model.fitted_state.without_defects())
    residuals = plain.score_embeddings(embeddings, image.shape[-2:]).residuals
    defect = Defect(name, [], [])
    for scale, embedding, residual in zip(
        model.embedder.scales, embeddings, residuals, strict=True
    ):
        grid = embedding.shape[-2:]
        shown = patches_in_region(region, grid, scale.stride) & (residual[0, 0] >= _LEAST)
        there = shown.flatten().nonzero()[:, 0]
        patches = to_patches(embedding)
        if len(there) > _MOST_OF_IMAGE:  # from the one that is rebuilt worst on
            start = residual.flatten()[there].argmax()[None]
            chosen, _ = k_center_greedy(patches[there], _MOST_OF_IMAGE, start)
            there = there[chosen.sort().values]
        where = origins(torch.zeros(1, dtype=torch.int64, device=image.device), grid)
        defect.atoms.append(patches[there])
        defect.places.append(where[there, 1:])
    return defect


def _without_stored(model: SgfrModel, defect: Defect) -> tuple[Defect, set[int]]:
    """A defect without the patches that the defect banks hold, and the images these came from."""
    numbers = set[int]()
    new = defect._replace(atoms=[], places=[])
    for bank, atoms, places in zip(model.banks, defect.atoms, defect.places, strict=True):
        is_new = torch.ones(len(atoms), dtype=torch.bool, device=atoms.device)
        if bank.defects.size and len(atoms):
            exact = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(atoms.float(), bank.defects.stored, compute_mode=exact)
            least, nearest = distance.min(1)
            is_new = least > math.exp(-SAME) * _LEAST * bank.residual_scale
            numbers.update(bank.defects.origin[nearest[~is_new], 0].tolist())
        new.atoms.append(atoms[is_new])
        new.places.append(places[is_new])
    return new, numbers


def add_defects(
    fitted_state: FittedState, defects: Sequence[Defect], limits: Sequence[float]
) -> FittedState:
    """Memory banks with more defects; the gain of earlier ones stays.

    Args:
        fitted_state (FittedState): The banks.
        defects (Sequence[Defect]): New ones.
        limits (Sequence[float]): Limits of their patches, of each scale.
    """
    gains = [state.defects.gain for state in fitted_state.states if state.defects]
    gain = gains[0] if gains else GAIN
    states = []
    for scale, (state, limit) in enumerate(zip(fitted_state.states, limits, strict=True)):
        known = state.defects
        for number, defect in enumerate(defects, len(fitted_state.rejected)):
            atoms, places = defect.atoms[scale], defect.places[scale]
            origin = torch.cat((torch.full_like(places[:, :1], number), places), 1)
            new = DefectPatches(atoms, torch.full_like(atoms[:, 0], limit), origin, gain)
            known = new if known is None else known.joined(new)
        states.append(state._replace(defects=known if known and len(known.atoms) else None))
    rejected = [*fitted_state.rejected, *(defect.image for defect in defects)]
    return fitted_state._replace(states=states, rejected=rejected)


class Limits(NamedTuple):
    """Limits of resemblance, and the images that set them.

    Attributes:
        values (list[float]): Of each scale: no patch of a known good image resembles a defect more;
            zero where a scale has no defect patches.
        images (list[str]): The image of each scale that resembles a defect most; empty without one.
    """

    values: list[float]
    images: list[str]

    def joined(self, other: "Limits") -> "Limits":
        """The larger limit of each scale, with its image."""
        pairs = zip(zip(*self, strict=True), zip(*other, strict=True), strict=True)
        largest = [max(pair, key=lambda limit: limit[0]) for pair in pairs]
        return Limits([value for value, _ in largest], [image for _, image in largest])


def find_limits(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    defects: Sequence[Defect],
    group: Group = None,
    *,
    leave_out: bool = True,
) -> Limits:
    """Limits of resemblance to new defects from good images.

    Args:
        model (SgfrModel): A fitted model; its own defect banks do not matter.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Files of good images, at least one.
        defects (Sequence[Defect]): The new ones.
        group (Group): What names an image's group, see
            :func:`~anomalib_sgfr.post_processing.calibration.group_of`.
        leave_out (bool): Whether to leave out the atoms of an image's group.

    Returns:
        Limits: Of each scale.
    """
    scales = range(len(model.banks))
    atoms = [torch.cat([defect.atoms[scale] for defect in defects]) for scale in scales]
    own = model.with_banks(model.fitted_state.without_defects())
    known = [(scale, defect_index(part)) for scale, part in enumerate(atoms) if len(part)]
    measure = _resemblance_to(own, known)
    found = leave_one_out(own, pre_processor, paths, measure, leave_out=leave_out, group=group)
    limits = Limits([0.0] * len(atoms), [""] * len(atoms))
    for (scale, _), of_images in zip(known, found, strict=True):
        limits.values[scale] = float(of_images.amax()) + MARGIN
        limits.images[scale] = paths[int(of_images.argmax())]
    return limits


@torch.no_grad()
def hold_limits(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    group: Group = None,
    *,
    leave_out: bool = True,
) -> bool:
    """Raise limits in place until they hold for these images too. A collective call.

    Whatever changes the memory banks or the images that are known to be good ends with it, so that
    rejected defects raise the score of none of them. Where a good image shows the same patches as a
    defect, these raise nothing any more, and a warning says so.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Files of good images; those that are gone are left out.
        group (Group): As in :func:`find_limits`.
        leave_out (bool): Whether to leave out the atoms of an image's group.

    Returns:
        bool: Whether a limit was raised. None is ever lowered.
    """
    known = model.fitted_state
    asked = dict.fromkeys(paths if known.rejected else [])
    own = share([path for path in asked if Path(path or ".").is_file()])
    steps = [
        (scale, state.defects, of_step)
        for scale, state in enumerate(known.states)
        if state.defects is not None
        for of_step in _steps(state.defects, known.rejected)
        if float(state.defects.limits[of_step].amax()) <= SAME
    ]
    indices = [
        (scale, defect_index(defects.atoms[of_step], defects.limits[of_step]))
        for scale, defects, of_step in steps
    ]
    excess = torch.full((len(steps),), -math.inf)
    with failing_together():
        if own:
            plain = model.with_banks(known.without_defects())
            measure = _resemblance_to(plain, indices)
            found = leave_one_out(
                plain, pre_processor, own, measure, leave_out=leave_out, group=group
            )
            excess = found.amax(1)
    excess = torch.stack(gathered(excess)).amax(0)
    exceeded, dates = excess > -MARGIN / 2.0, set[str]()
    for (_, defects, of_step), more in zip(steps, excess.where(exceeded, -MARGIN), strict=True):
        limits = defects.limits[of_step] + (more.to(defects.limits) + MARGIN)  # zero is exact
        # beyond, rounding decides; one value is the same on all processes
        defects.limits[of_step] = limits.clamp_max(2.0 * SAME)
        if float(defects.limits[of_step].amax()) > SAME:
            number = int(defects.origin[of_step, 0][0])
            dates.add(date_of(known.rejected[number]))
    for date in sorted(dates):
        logger.warning(
            "Images known to be good show the same patches as defects rejected %s: these patches"
            " raise no score any more.",
            date,
        )
    model.load_defects(known)
    return bool(exceeded.any())


def hold_limits_for_validation(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    post_processor: SgfrPostProcessor,
) -> None:
    """Hold limits for good validation images, and calibrate again if one was raised.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        post_processor (SgfrPostProcessor): Its post-processor, calibrated with the validation.
    """
    state = post_processor.state
    seen = state.scores.of_split(Split.HELD_OUT).paths
    if state.uses_validation and hold_limits(model, pre_processor, seen, state.group):
        scores = rescore(state.scores, model, pre_processor, state.group)
        post_processor.use(state._replace(scores=scores).calibrated())


def _steps(defects: DefectPatches, rejected: Sequence[str]) -> list[Tensor]:
    """Masks of the patches that were rejected together, which have a limit in common."""
    dates = [date_of(image) for image in rejected]
    number = torch.tensor([dates.index(date) for date in dates]).to(defects.origin.device)
    step = number[defects.origin[:, 0].long()]
    return [step == each for each in step.unique()]


def _resemblance_to(
    model: SgfrModel, known: Sequence[tuple[int, DefectIndex]]
) -> Callable[..., Tensor]:
    """Measure of images: how much their patches exceed the limits of ``n`` defects, ``(n, B)``."""

    def measure(
        embeddings: list[Tensor], size: Sequence[int], banks: list[MemoryBank] | None
    ) -> Tensor:
        residuals = model.score_embeddings(embeddings, size, banks).residuals
        found = [residuals[0].new_empty(0, len(residuals[0]))]
        for scale, index in known:
            bank, residual = model.banks[scale], residuals[scale].flatten(1)
            nearest = partial(nearest_distance, index=index)
            distance = bank.map_patches(nearest, to_patches(embeddings[scale]))
            of_patches = resemblance(residual, distance.view_as(residual) / bank.residual_scale)
            found.append(of_patches.amax(1)[None])
        return torch.cat(found)

    return measure


def without_last(fitted_state: FittedState) -> FittedState:
    """Memory banks without the defects that were rejected last, all with one date.

    Args:
        fitted_state (FittedState): With at least one rejected image.
    """
    last = date_of(fitted_state.rejected[-1])
    left = [image for image in fitted_state.rejected if date_of(image) != last]
    states = []
    for state in fitted_state.states:
        defects = state.defects
        if defects is not None:
            defects = defects.rows(defects.origin[:, 0] < len(left))
        states.append(state._replace(defects=defects if defects and len(defects.atoms) else None))
    return fitted_state._replace(states=states, rejected=left)


def new_date(rejected: Sequence[str]) -> str:
    """Date of a rejection that comes now, in seconds, which no earlier one has."""
    dates, now = {date_of(image) for image in rejected}, datetime.now(UTC)
    while (date := now.isoformat(timespec="seconds")) in dates:
        now += timedelta(seconds=1)
    return date


def date_of(image: str) -> str:
    """Date of a rejected image, in front of its path."""
    return image.partition(" ")[0]


def path_of(image: str) -> str:
    """Path of a rejected image, behind its date."""
    return image.partition(" ")[2]

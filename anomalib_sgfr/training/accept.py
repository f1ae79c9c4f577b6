"""Good parts that were called bad: what of them is new to the banks, and a record that takes it
back exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.k_center import k_center_greedy
from anomalib_sgfr.core.patch_grid import origins, to_patches
from anomalib_sgfr.memory_bank import MemoryBank
from anomalib_sgfr.torch_model import FittedState, SgfrModel

__all__ = ["Addition", "Record", "added", "novel"]

# Which share of the threshold the map must exceed for a place to be looked at, and how far from an
# atom, in what the bank resolves, a patch must be to be new. If one is not enough, the next; with
# the last, its own patches rebuild it.
_EFFORTS = ((0.7, 1.0), (0.4, 1.0), (0.7, 0.25), (0.7, 0.0), (0.4, 0.0), (0.0, 0.0))
# share of the threshold, for each scale, that counts as resolved where the bank is far from full
_NEAR = 0.25


class Addition(NamedTuple):
    """What one image adds.

    Attributes:
        image (str): Path.
        atoms (list[Tensor]): New atoms of each scale, shape ``(n, d)``.
        places (list[Tensor]): Where they were seen: row, column, and the grid's rows and columns,
            shape ``(n, 4)``.
        thumbnails (list[Tensor] | None): Small pictures of where, if the banks have such.
    """

    image: str
    atoms: list[Tensor]
    places: list[Tensor]
    thumbnails: list[Tensor] | None = None

    @property
    def number(self) -> int:
        """Of atoms."""
        return sum(map(len, self.atoms))


class Record(NamedTuple):
    """What was learnt before any image was accepted, and what was added since.

    Attributes:
        base (dict[str, Tensor]): State of the banks before.
        steps (tuple[Step, ...]): One after the other.
    """

    base: dict[str, Tensor]
    steps: tuple["Step", ...] = ()

    @classmethod
    def begun(cls, model: SgfrModel) -> "Record":
        """For a model that accepts for the first time."""
        kept = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if not name.startswith("embedder.")
        }
        return cls(kept)

    def plain(self) -> dict[str, Any]:
        """Dictionaries, lists and tensors, to store."""
        steps = [
            {**step._asdict(), "additions": [part._asdict() for part in step.additions]}
            for step in self.steps
        ]
        return {"base": self.base, "steps": steps}

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> "Record":
        """From what :meth:`plain` gave."""
        steps = [
            {**step, "additions": [Addition(**part) for part in step["additions"]]}
            for step in stored["steps"]
        ]
        return cls(stored["base"], tuple(Step(**step) for step in steps))

    def applied(self, model: SgfrModel) -> SgfrModel:
        """Model after all steps, always made from the base, so that it is the same each time."""
        made = model.with_banks(model.fitted_state)
        made.load_state_dict(self.base, strict=False)
        additions = [addition for step in self.steps for addition in step.additions]
        return made.with_banks(added(made.fitted_state, additions)) if additions else made


class Step(NamedTuple):
    """Images that were accepted together.

    Attributes:
        time (str): When, ISO 8601.
        additions (list[Addition]): What each added.
        state (dict[str, Tensor]): Of the post-processor before.
        config (dict[str, Any]): Its configuration before.
        forced (list[str]): Images among them that were taken for good against objections.
    """

    time: str
    additions: list[Addition]
    state: dict[str, Tensor]
    config: dict[str, Any]
    forced: list[str] = []  # noqa: RUF012  # of a NamedTuple, never changed


def added(fitted_state: FittedState, additions: Sequence[Addition]) -> FittedState:
    """Banks with new atoms after those they have, which stay as they are, as does what residuals
    are measured by.
    """
    images = list(fitted_state.images)
    numbers = []
    for addition in additions:
        if addition.image not in images:
            images.append(addition.image)
        numbers.append(images.index(addition.image))
    states = []
    for scale, state in enumerate(fitted_state.states):
        clusters, pictures = state.clusters, [] if state.thumbnails is None else [state.thumbnails]
        for number, addition in zip(numbers, additions, strict=True):
            atoms, places = (
                part[scale].to(clusters.atoms.device) for part in (addition.atoms, addition.places)
            )
            origin = torch.cat((torch.full_like(places[:, :1], number), places), 1)
            clusters = clusters.joined(Clusters.of(atoms, origin.int()))
            if addition.thumbnails is not None and pictures:
                pictures.append(addition.thumbnails[scale].to(clusters.atoms.device))
        states.append(
            state._replace(clusters=clusters, thumbnails=torch.cat(pictures) if pictures else None)
        )
    return FittedState(states, images)


@torch.no_grad()
def novel(
    model: SgfrModel,
    image: Tensor,
    path: str,
    threshold: float,
    mask_threshold: float | None = None,
) -> Addition | None:
    """What of an image is new, so that it is no alarm any more.

    At the places where what a scale is heard in is near its threshold or above: patches farther
    from all atoms than the bank resolves, farthest first. If that is not enough, at more places.

    Args:
        model (SgfrModel): A fitted model in evaluation mode.
        image (Tensor): Pre-processed, shape ``(3, H, W)``.
        path (str): Its file.
        threshold (float): Of the raw score.
        mask_threshold (float | None): Of the raw map; ``None`` for that of the score.

    Returns:
        Addition | None: What is new; ``None`` if the image is no alarm.
    """
    scales = model.embedder.scales
    # of the map, and of the score
    limits = (threshold if mask_threshold is None else mask_threshold, threshold)
    heard_by = (sum(scale.in_map for scale in scales), sum(scale.in_score for scale in scales))
    embeddings = model.embed(image[None])
    found = model.score_embeddings(embeddings, image.shape[-2:])
    if float(found.score_map.amax()) <= threshold:
        return None
    maps = (found.anomaly_map, found.score_map)
    addition = Addition(path, [], [])
    for share, distance in _EFFORTS:
        atoms, places = [], []
        for bank, scale, embedding in zip(model.banks, scales, embeddings, strict=True):
            grid = embedding.shape[-2:]
            ears = [place for place, heard in enumerate((scale.in_map, scale.in_score)) if heard]
            loud = [
                functional.adaptive_max_pool2d(maps[ear], grid).flatten() > share * limits[ear]
                for ear in ears
            ]
            there = torch.stack(loud).any(0)
            where = origins(torch.zeros(1, dtype=torch.int64, device=image.device), grid)[there]
            resolved = min(limits[ear] / heard_by[ear] for ear in ears) * float(bank.nominal)
            near = max(float(bank.threshold), _NEAR * resolved)
            taken = _taken(bank, to_patches(embedding)[there], distance * near)
            atoms.append(to_patches(embedding)[there][taken])
            places.append(where[taken, 1:])
        addition = Addition(path, atoms, places)
        banks = model.with_banks(added(model.fitted_state, [addition])).banks
        after = model.score_embeddings(embeddings, image.shape[-2:], banks)
        if all(
            float(part.amax()) <= limit
            for part, limit in zip((after.anomaly_map, after.score_map), limits, strict=True)
        ):
            break
    return addition


def _taken(bank: MemoryBank, patches: Tensor, near: float) -> Tensor:
    """Which of the patches become atoms."""
    atoms = bank.atoms
    start = torch.arange(len(atoms), device=atoms.device)
    if len(patches) == 0:
        return start[:0]
    chosen, _ = k_center_greedy(torch.cat((atoms, patches)), len(atoms) + len(patches), start, near)
    return chosen[len(atoms) :] - len(atoms)

"""False-alarm feedback: new atoms from good images called anomalous, and a history to undo it."""

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

__all__ = ["Acceptance", "AcceptanceHistory", "NewAtoms", "add_atoms", "find_new_atoms"]

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

"""All that a fit makes of what was learnt, before any of it is taken into use."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from anomalib_sgfr.fitting.suspects import without_suspects
from anomalib_sgfr.inspection.evidence import Evidence
from anomalib_sgfr.inspection.gallery import thumbnails as make_thumbnails
from anomalib_sgfr.torch_model import Learnt, SgfrModel

__all__ = ["Made", "make"]


class Made(NamedTuple):
    """What a model, and what stands around it, is to take into use.

    Attributes:
        learnt (Learnt): Banks, without the suspects' atoms and with thumbnails, if these were asked for.
        suspects (list[tuple[str, float]]): Training images suspected of being defective, and their raw scores.
        evidence (Evidence): Scores that a threshold is to rest on.
    """

    learnt: Learnt
    suspects: list[tuple[str, float]]
    evidence: Evidence


def make(
    model: SgfrModel,
    learnt: Learnt,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    *,
    trim: float = 0.0,
    thumbnails: bool = False,
    earlier: Learnt | None = None,
    scored: Callable[[SgfrModel, Any, Sequence[str]], Evidence] | None = None,
) -> Made:
    """Make everything; whatever fails, the model is as it was.

    Args:
        model (SgfrModel): The model that is fitted; it stays as it is.
        learnt (Learnt): What its fit learnt.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Training images.
        trim (float): Share of them to suspect, see :func:`~anomalib_sgfr.fitting.suspects.without_suspects`.
        thumbnails (bool): Whether to make thumbnails.
        earlier (Learnt | None): What an update adds to; its thumbnails are kept.
        scored (Callable | None): From the fitted model, the pre-processor and the training images that are left to the
            scores that a threshold is to rest on.

    Returns:
        Made: All of it.
    """
    fitted = model.refitted(learnt)
    suspects: list[tuple[str, float]] = []
    if trim:
        left, suspects = without_suspects(fitted, pre_processor, paths, trim)
        measures = [state.nominal for state in learnt.states]  # of an update as before, otherwise to be found anew
        states = [state._replace(nominal=its) for state, its in zip(left.states, measures, strict=True)]
        left = left._replace(states=states)
        if len(left.images) < len(learnt.images):  # they were left out
            suspected = dict(suspects)
            paths = [path for path in paths if path not in suspected]
        fitted = model.refitted(left)
    if thumbnails:
        pictures = make_thumbnails(fitted, pre_processor, earlier)
        for bank, its_pictures in zip(fitted.banks, pictures, strict=True):
            bank.thumbnails = its_pictures
    evidence = scored(fitted, pre_processor, paths) if scored else Evidence()
    return Made(fitted.learnt, suspects, evidence)

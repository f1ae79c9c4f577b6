"""All that a fit makes of what was learnt, before any of it is taken into use."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from anomalib_sgfr.fitting.suspects import without_suspects
from anomalib_sgfr.inspection.gallery import thumbnails as make_thumbnails
from anomalib_sgfr.inspection.threshold_state import ThresholdState
from anomalib_sgfr.torch_model import Learnt, SgfrModel

__all__ = ["Calibrate", "Made", "make"]

# From the fitted model, the images it is known by, and those that are not, to the state of its threshold.
Calibrate = Callable[[SgfrModel, Sequence[str], Sequence[str]], ThresholdState]


class Made(NamedTuple):
    """What a model, and its post-processor, are to take into use.

    Attributes:
        learnt (Learnt): Banks, without the suspects' atoms and with thumbnails, if these were asked for.
        suspects (list[tuple[str, float]]): Training images suspected of being defective, and their raw scores.
        threshold (ThresholdState | None): State of the threshold for these banks, if there is to be one.
    """

    learnt: Learnt
    suspects: list[tuple[str, float]]
    threshold: ThresholdState | None


def make(
    model: SgfrModel,
    learnt: Learnt,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    *,
    trim: float = 0.0,
    thumbnails: bool = False,
    earlier: Learnt | None = None,
    calibrate: Calibrate | None = None,
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
        calibrate (Calibrate | None): Makes the state of the threshold from the fitted model, the training images
            that are not suspects, and the suspects.

    Returns:
        Made: All of it.
    """
    fitted = model.refitted(learnt)
    suspects: list[tuple[str, float]] = []
    if trim:
        left, suspects = without_suspects(fitted, pre_processor, paths, trim)
        if left is not None:  # the banks would otherwise be empty
            measures = [state.nominal for state in learnt.states]  # of an update as before, otherwise to be found anew
            states = [state._replace(nominal=its) for state, its in zip(left.states, measures, strict=True)]
            fitted = model.refitted(left._replace(states=states))
    if thumbnails:
        pictures = make_thumbnails(fitted, pre_processor, earlier)
        for bank, its_pictures in zip(fitted.banks, pictures, strict=True):
            bank.thumbnails = its_pictures
    suspected = dict(suspects)
    trusted = [path for path in paths if path not in suspected]
    excluded = list(suspected) if trusted else []  # all of them may be suspects
    return Made(fitted.learnt, suspects, calibrate(fitted, trusted or paths, excluded) if calibrate else None)

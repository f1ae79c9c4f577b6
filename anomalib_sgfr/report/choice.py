"""Which images a page has room to show: mistakes, those nearest the threshold and the highest."""

from collections.abc import Sequence

from anomalib_sgfr.report.digest import Unit

__all__ = ["by_importance", "pruned"]


def by_importance(units: Sequence[Unit], threshold: float | None, most: int) -> list[int]:
    """Places of the images that matter most, the first first.

    Mistakes come first, the farthest from the threshold before the others; what room is left goes half to the images
    nearest the threshold, and half to the highest scores. What is chosen among some of the images is chosen among all
    of them or was crowded out, so that a stream can be pruned as it comes.

    Args:
        units (Sequence[Unit]): Images.
        threshold (float | None): In force; without one, the highest scores count.
        most (int): How many at most.
    """
    every = range(len(units))
    scores = [unit.scored.score for unit in units]
    highest = sorted(every, key=lambda place: (-scores[place], place))
    if threshold is None:
        return highest[:most]
    nearest = sorted(every, key=lambda place: (abs(scores[place] - threshold), place))
    wrong = [
        place
        for place in reversed(nearest)
        if units[place].scored.truth is not None and units[place].scored.truth != int(scores[place] > threshold)
    ]
    found = dict.fromkeys(wrong[:most])
    half = len(found) + (most - len(found) + 1) // 2
    for ranking, room in ((nearest, half), (highest, most), (nearest, most)):
        for place in ranking:
            if len(found) >= room:
                break
            found.setdefault(place)
    return list(found)


def pruned(units: Sequence[Unit], threshold: float | None, most: int) -> list[Unit]:
    """The same images, without the pictures that there is no room for."""
    held = [place for place, unit in enumerate(units) if unit.picture is not None]
    kept = {held[place] for place in by_importance([units[place] for place in held], threshold, most)}
    return [unit if place in kept else unit._replace(picture=None) for place, unit in enumerate(units)]

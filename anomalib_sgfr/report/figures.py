"""The figures of a page as plain data, for programs."""

from collections.abc import Sequence
from typing import Any

from anomalib_sgfr.inspection.evidence import named
from anomalib_sgfr.report.digest import Digest, Unit
from anomalib_sgfr.report.statistics import Counts, Line, area_under, interval, lines

__all__ = ["counts_of", "figures", "tables_of"]


def counts_of(units: Sequence[Unit], threshold: float) -> Counts:
    """What a threshold makes of images."""
    return Counts.at(threshold, [unit.scored.score for unit in units], [unit.scored.truth for unit in units])


def tables_of(digest: Digest, threshold: float) -> dict[str, list[Line]]:
    """Lines by kind, and by group if there is one.

    Args:
        digest (Digest): What the page shows.
        threshold (float): Larger scores are anomalous.
    """
    scored = [unit.scored for unit in digest.units]
    scores, truths = [row.score for row in scored], [row.truth for row in scored]
    new = [unit.is_new for unit in digest.units]
    kinds = [unit.kind for unit in digest.units]
    tables = {"kind": lines(kinds, scores, truths, threshold, against_all_good=True, new=new)}
    if digest.group is not None:
        groups = [named(row.image, digest.group) for row in scored]
        tables["group"] = lines(groups, scores, truths, threshold, against_all_good=False, new=new)
    return tables


def figures(digest: Digest) -> dict[str, Any]:
    """Figures of a page.

    Args:
        digest (Digest): What the page shows.

    Returns:
        dict[str, Any]: Can be written as JSON. ``new`` counts images that neither chose the threshold nor were trained
        on, ``all`` all; rates come with intervals of 95%. ``images`` has the columns of the table of scores, ``kind``,
        ``group``, ``trained_on`` and ``chose_threshold``.
    """
    new = [unit for unit in digest.units if unit.is_new]
    good, bad = ([unit.scored.score for unit in digest.units if unit.scored.truth == truth] for truth in (0, 1))
    threshold = digest.threshold
    found: dict[str, Any] = {
        "made": digest.made,
        "checkpoint": digest.model.checkpoint or None,
        "sha256": digest.model.sha256 or None,
        "versions": digest.model.versions,
        "threshold": threshold,
        "basis": digest.basis,
        "warning": digest.warning,
        "independent_good_images": digest.nominal_units,
        "trained_on": sum(unit.trained_on for unit in digest.units),
        "chose_threshold": sum(unit.chose for unit in digest.units),
        "new": None if threshold is None else _rates(counts_of(new, threshold)),
        "all": None if threshold is None else _rates(counts_of(digest.units, threshold)),
        "image_auroc": area_under(good, bad),
        "aupro": None if digest.regions is None else digest.regions.area,
        "unreadable": [{"image": path, "reason": reason} for path, reason in digest.unreadable],
        "notes": [*digest.notes, *([digest.regions_note] if digest.regions_note else [])],
        "images": [_image(unit, digest.group) for unit in digest.units],
    }
    for name, table in tables_of(digest, threshold).items() if threshold is not None else ():
        found[f"by_{name}"] = {
            line.name: {**_rates(line.counts), "left_out": line.left_out, "auroc": line.auroc} for line in table
        }
    return found


def _rates(counts: Counts) -> dict[str, Any]:
    parts = (
        ("false_alarms", counts.alarms, counts.good),
        ("missed", counts.missed, counts.bad),
        ("called_anomalous", counts.called, counts.unknown),
    )
    return {
        name: {
            "images": number,
            "count": hits,
            "rate": hits / number if number else None,
            "interval": list(interval(hits, number)),
        }
        for name, hits, number in parts
    }


def _image(unit: Unit, group: str | None) -> dict[str, Any]:
    return {
        **unit.scored._asdict(),
        "kind": unit.kind,
        **({} if group is None else {"group": named(unit.scored.image, group)}),
        "trained_on": unit.trained_on,
        "chose_threshold": unit.chose,
    }

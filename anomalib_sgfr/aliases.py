"""Earlier names of modules and classes, for imports, class paths and pickles.

The finder stands last in ``sys.meta_path``: it is asked only for what nothing else finds.
"""

import sys

# imported at every start of the interpreter: nothing else is imported before it is needed
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["MODULES", "NAMES", "install"]

_PACKAGE = __name__.partition(".")[0]
_PACKAGES = ("commands", "edge", "fitting", "inspection", "pictures")

# Module of an earlier version: the module that has its contents now.
MODULES = {
    "bank": "memory_bank",
    "callbacks": "training.callback",
    "commands.accept": "cli.accept",
    "commands.adapt": "cli.adapt",
    "commands.checks": "cli.doctor",
    "commands.doctor": "cli.doctor",
    "commands.explain": "cli.explain",
    "commands.findings": "cli.checks",
    "commands.inputs": "cli.arguments",
    "commands.limits": "cli.environment",
    "commands.main": "cli.main",
    "commands.mistakes": "cli.errors",
    "commands.report": "cli.report",
    "commands.self_test": "cli.self_test",
    "commands.threshold": "cli.threshold",
    "commands.versions": "cli.environment",
    "core.arguments": "features.embedding",
    "core.casts": "core.linear_algebra",
    "core.cover": "core.clusters",
    "core.f1_threshold": "post_processing.thresholds",
    "core.geometry": "core.patch_grid",
    "core.kernels": "core.gpu",
    "core.loops": "core.chunks",
    "core.nominal": "core.self_expression",
    "core.nuisance": "core.linear_algebra",
    "core.on_card": "core.gpu",
    "core.programs": "core.triton_kernels",
    "core.provenance": "core.clusters",
    "core.sampling": "core.sampler",
    "core.search": "core.neighbours",
    "core.selection": "core.k_center",
    "core.thresholds": "post_processing.thresholds",
    "edge.export": "export",
    "edge.quantisation": "quantisation",
    "features.backbones": "features.weights",
    "features.extractors": "features.backbone",
    "features.pre_processing": "images.pre_processor",
    "features.region": "images.roi",
    "features.sizes": "features.backbone",
    "features.true_range": "images.bit_depth",
    "fitting.accepting": "training.accept",
    "fitting.adapting": "training.adapt",
    "fitting.anchor": "training.distributed",
    "fitting.artefacts": "training.checkpoint",
    "fitting.camera": "training.high_bit_depth",
    "fitting.distributed": "training.distributed",
    "fitting.fit_record": "report.fit_record",
    "fitting.framing": "training.input_settings",
    "fitting.learning": "training.fit",
    "fitting.making": "training.fit",
    "fitting.restoring": "training.checkpoint",
    "fitting.suspects": "training.fit",
    "inspection.afterwards": "run_folder",
    "inspection.calibration": "post_processing.calibration",
    "inspection.deep_visualizer": "report.visualizer",
    "inspection.evidence": "post_processing.calibration",
    "inspection.explanation": "report.explanation",
    "inspection.gallery": "report.crops",
    "inspection.mimic_view": "report.figure",
    "inspection.own_pixels": "images.file_pixels",
    "inspection.post_processing": "post_processing.post_processor",
    "inspection.progress": "console",
    "inspection.quiet": "console",
    "inspection.reporting": "post_processing.thresholds",
    "inspection.run_folder": "run_folder",
    "inspection.runs": "run_paths",
    "inspection.score_table": "report.score_table",
    "inspection.threshold_state": "post_processing.calibration",
    "pictures.files": "images.headers",
    "pictures.placement": "images.frame_geometry",
    "pictures.reading": "images.reading",
    "post_processing.normalisation": "post_processing.thresholds",
    "post_processing.streaming_f1": "post_processing.thresholds",
    "post_processing.threshold_state": "post_processing.calibration",
    "predictions": "report.visualizer",
    "report.charts": "report.media",
    "report.choice": "report.contents",
    "report.digest": "report.contents",
    "report.figures": "report.contents",
    "report.mimics": "report.callback",
    "report.overlap": "report.model_facts",
    "report.regions": "report.statistics",
    "report.script_data": "report.page",
    "report.thumbnails": "report.media",
    "report.words": "report.wording",
    "scoring": "memory_bank",
    "smoothing": "anomaly_map",
    "training.restore": "training.checkpoint",
}

# Module of an earlier version: earlier names of its classes and functions, and their names now.
NAMES = {
    "bank": {"Bank": "MemoryBank", "BankState": "MemoryBankState"},
    "commands.checks": {"devices": "openvino_devices"},
    "commands.doctor": {"findings": "results"},
    "commands.findings": {
        "Broken": "CheckFailed",
        "Finding": "CheckResult",
        "looked_at": "run_check",
        "said": "error_line",
    },
    "commands.main": {"Mistake": "UsageError"},
    "commands.mistakes": {"in_words": "explain_error"},
    "commands.self_test": {
        "compared": "compare_answers",
        "judged": "check_scores",
        "write_pictures": "write_images",
    },
    "core.cover": {
        "Cover": "Clusters",
        "absorb": "assign",
        "centred": "recentred",
        "settle": "reassign",
        "thin": "prune",
    },
    "core.geometry": {"Place": "PatchIndex"},
    "core.selection": {"farthest_first": "k_center_greedy", "separated": "greedy_separated"},
    "core.thresholds": {
        "alarm_threshold": "conformal_threshold",
        "dividing_threshold": "f1_threshold",
    },
    "features.true_range": {"Looks": "ConstantImageCheck"},
    "fitting.accepting": {
        "Addition": "NewAtoms",
        "Record": "AcceptanceHistory",
        "Step": "Acceptance",
    },
    "fitting.distributed": {"Learnt": "FittedState"},
    "fitting.framing": {"Frame": "FittedInput"},
    "fitting.making": {"Made": "FitResult"},
    "inspection.afterwards": {"Afterwards": "AfterPostProcessor"},
    "inspection.deep_visualizer": {"DeepVisualizer": "ResultVisualizer"},
    "inspection.evidence": {"Evidence": "CalibrationScores", "Kind": "Split"},
    "inspection.gallery": {"Gallery": "TrainingCrops"},
    "inspection.mimic_view": {"MimicView": "ExplanationFigure"},
    "inspection.quiet": {"QuietRun": "LogFilters", "once": "log_once"},
    "inspection.runs": {
        "claim_folder": "make_results_folder",
        "give_back_latest": "restore_latest",
        "newest_whole_run": "newest_complete_run",
        "point_latest": "set_latest",
        "run_of": "run_of_checkpoint",
        "whole_checkpoint": "complete_checkpoint",
    },
    "inspection.score_table": {
        "Scored": "ScoreRow",
        "scored_in": "score_rows",
        "threshold_of": "normalised_threshold",
    },
    "pictures.files": {"Header": "FileHeader"},
    "pictures.placement": {"Axis": "AxisTransform", "Placement": "FrameTransform"},
    "report.digest": {
        "Digest": "ReportContents",
        "Unit": "ImageRow",
        "Picture": "ImageMedia",
        "Mimic": "ImageExplanation",
        "MimicRow": "ExplanationRow",
        "Crop": "AtomCrop",
    },
    "report.figures": {"Line": "GroupRow"},
    "report.overlap": {"known_among": "known_images"},
    "smoothing": {"Blur": "GaussianBlur", "Smoothing": "AnomalyMapGenerator"},
}


class _Finder:
    """Finds modules by their earlier names."""

    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Spec of an earlier module or package; ``None`` for any other name."""
        del path, target
        package, _, inner = name.partition(".")
        if package != _PACKAGE or not (inner in MODULES or inner in _PACKAGES):
            return None
        from importlib.machinery import ModuleSpec

        # it has what importlib asks for
        return ModuleSpec(name, _Loader(), is_package=inner in _PACKAGES)  # type: ignore[arg-type]


class _Loader:
    """Makes a module whose attributes are those of the present one."""

    @staticmethod
    def create_module(spec: "ModuleSpec") -> None:
        """Let Python make the module."""

    @staticmethod
    def exec_module(module: "ModuleType") -> None:
        """Look attributes up in the present module, under their present names."""
        inner = module.__name__.partition(".")[2]
        if inner in _PACKAGES:
            return
        from importlib import import_module

        present = import_module(f"{_PACKAGE}.{MODULES[inner]}")

        def attribute(name: str) -> object:
            return getattr(present, NAMES.get(inner, {}).get(name, name))

        vars(module)["__getattr__"] = attribute


def install() -> None:
    """Have earlier names found, once in a process."""
    if not any(isinstance(finder, type) and finder is _Finder for finder in sys.meta_path):
        sys.meta_path.append(_Finder)

"""Sgfr as an anomalib model: the Lightning wrapper around
:class:`~anomalib_sgfr.torch_model.SgfrModel`.
"""

import copy
import itertools
import logging
import time
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_sgfr.console import QuietRun, bar_is_on, bars
from anomalib_sgfr.core.arguments import BankPer, Copies, Pooling, Solver
from anomalib_sgfr.core.certificate import Certificate
from anomalib_sgfr.core.processes import failing_together, gathered
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.export import WholeExports
from anomalib_sgfr.features.backbone import default_size
from anomalib_sgfr.features.weights import normalisation
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor
from anomalib_sgfr.images.reading import require_bit_depth
from anomalib_sgfr.memory_bank import MemoryBank
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
from anomalib_sgfr.post_processing.threshold_state import ThresholdState
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.report.score_table import ScoreTable
from anomalib_sgfr.report.visualizer import DeepVisualizer
from anomalib_sgfr.run_folder import RunFolder
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training.bit_depth import FromCameras
from anomalib_sgfr.training.callback import SubspaceSampling
from anomalib_sgfr.training.checkpoint import Restored
from anomalib_sgfr.training.distributed import (
    DataParallelAnchor,
    drop_padding,
    fill_up,
    leave_out_empty,
)
from anomalib_sgfr.training.fit import bank_sizes, learn, make, samplers_for, write_suspects
from anomalib_sgfr.training.input_settings import Framed, as_size

__all__ = ["Sgfr"]

logger = logging.getLogger(__name__)

_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
_Its = TypeVar("_Its", bound=Callback)


def _given(attached: Sequence[Callback], own: _Its) -> _Its:
    """A trainer's callback of the same kind as the model's own, or that."""
    return next((item for item in attached if isinstance(item, type(own))), own)


class Sgfr(
    Restored, MemoryBankMixin, WholeExports, Framed, DataParallelAnchor, FromCameras, AnomalibModule
):  # type: ignore[misc]  # to_onnx is anomalib's, not Lightning's
    """Subspace-guided feature reconstruction: find and localise defects after seeing only good
    parts.

    Learns small banks of nominal patch embeddings, one for each scale, in one pass over the
    training images, rebuilds every target patch from a few of them, and scores what cannot be
    rebuilt. An implementation from the published description of Hotta et al., "Subspace-Guided
    Feature Reconstruction for Unsupervised Anomaly Localization" (arXiv 2309.13904).

    Args:
        backbone (str): Name of a timm model, convolutional or transformer. The default's weights
            come with this package. Defaults to ``"tf_efficientnet_lite0"``.
        layers (Sequence[str] | None): Backbone layers that the anomaly map hears, each alike.
            ``None`` takes the stages of stride 4, 8 and 16 (``layer1`` to ``layer3`` of a ResNet);
            of a plain transformer, the blocks that end its first half and its first three quarters.
            Defaults to ``None``.
        pooling (Pooling): How features are averaged with their neighbours: ``"binomial"``, 5 x 5
            with weights that fall off, or ``"box"``, 3 x 3 alike, as Patchcore does. Defaults to
            ``"binomial"``.
        pre_trained (bool): Whether a fit starts from the backbone's pretrained weights. Defaults to
            ``True``.
        bank_size (int | Sequence[int] | None): Most nominal embeddings (atoms) kept of each scale,
            whatever the size of the data set: one number, or one for each scale, the finest first.
            ``None`` takes 1,000 up to stride 8, 5,000 beyond, and 3,000 from stride 32. Defaults to
            ``None``.
        solver (Solver): How a patch is rebuilt: ``"affine"`` from its nearest atoms, ``"omp"`` from
            atoms picked greedily, ``"ridge"`` from all. Defaults to ``"affine"``.
        num_atoms (int): Number of atoms (the support) that rebuild a patch; not used by
            ``"ridge"``. Defaults to ``5``.
        regularisation (float): Ridge penalty on the coefficients, relative to the data's own scale;
            not used by ``"omp"``. Defaults to ``0.001``.
        tolerance (float): Euclidean length, in units of the embeddings and shared equally among the
            scales, within which nominal patches need no atom of their own: banks stay smaller than
            ``bank_size`` if that suffices. Defaults to ``0.0``.
        update (bool): Whether a fit adds to the bank of an earlier one, from a checkpoint or of
            this object, without the images of that one, instead of starting afresh. Defaults to
            ``False``.
        blur (float): Standard deviation of the Gaussian that smooths the anomaly map, in pixels of
            the model's input; ``0`` for none. Defaults to ``4.0``.
        seed (int | None): Seeds PyTorch's generator when a fit starts, and with it the order in
            which training images are seen, on which the bank depends. ``None`` leaves the generator
            as it is. Defaults to ``None``.
        trim (float): Share of the training images, at most one half, to suspect of being defective:
            the atoms of those that the atoms of the others rebuild worst are dropped. They are
            listed in ``suspects``, in the log and in ``suspects.csv`` in the run's folder. Scores
            every training image once more. Defaults to ``0.0``.
        thumbnails (bool): Whether to keep a small picture of where each atom was seen, 1,728 bytes
            an atom, for explanations after the training images are gone. Defaults to ``False``.
        image_size (int | tuple[int, int] | None): Height and width that the default pre-processor
            resizes images to. ``None`` for 256 x 256, or what comes near it for a transformer that
            does not take that, 392 x 392 for patches of 14 pixels. Defaults to ``None``.
        tile_size (int | tuple[int, int] | None): Height and width of tiles that images are embedded
            in after resizing, a few at a time, so that memory does not grow with the image;
            multiples of the coarsest layer's stride. ``None`` for the whole image, or what
            anomalib's ``TilerConfigurationCallback`` says. Defaults to ``None``.
        tile_stride (int | tuple[int, int] | None): Pixels from one tile to the next, at most
            ``tile_size``; ``None`` for ``tile_size``. Defaults to ``None``.
        roi (str | None): Mask picture, white where to inspect, framed as the images are. What lies
            outside is not seen, learnt or scored. Kept in the checkpoint. Defaults to ``None``.
        bit_depth (int | None): Bits that the camera gives, 8 to 16, where files of 16 bits do not
            say. ``None`` takes the smallest of 8, 10, 12, 14 and 16 that hold the training images'
            values, or a checkpoint's. Given, it vouches for the training images too: they are not
            refused for their looks. Defaults to ``None``.
        score_layers (Sequence[str] | None): Backbone layers that the image's score hears: the
            verdict gains by a deeper stage that would blur the map. ``None`` takes ``layers``, if
            these are given or the backbone is a plain transformer; otherwise the stages of stride
            8, 16 and 32, of the last of which the first block where it has several. Defaults to
            ``None``.
        bank_per (BankPer): ``"layer"`` for a bank of each layer; ``"stride"`` for one of all layers
            of a grid that are heard in the same. Defaults to ``"layer"``.
        copies (Copies): Copies of the training images to learn from too: ``"mirrored"``, left to
            right, top to bottom and both, or ``"turned"``, by each right angle; four times the
            time. For few images of what may lie any way round. Defaults to ``"none"``.
        pre_processor (nn.Module | bool): Pre-processor, or whether to use the default one, which
            resizes to ``image_size`` and normalises as the backbone was trained. Defaults to
            ``True``.
        post_processor (nn.Module | bool): Post-processor, or whether to use the default one, a
            :class:`~anomalib_sgfr.post_processing.post_processor.SgfrPostProcessor`. Defaults to
            ``True``.
        evaluator (Evaluator | bool): Evaluator, or whether to use anomalib's default. Defaults to
            ``True``.
        visualizer (Visualizer | bool): Visualizer, or whether to use anomalib's default. Defaults
            to ``True``.

    Raises:
        ValueError: If an argument is out of range, or the backbone or a layer is unknown.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] | None = None,
        pooling: Pooling = "binomial",
        pre_trained: bool = True,
        bank_size: int | Sequence[int] | None = None,
        solver: Solver = "affine",
        num_atoms: int = 5,
        regularisation: float = 1e-3,
        tolerance: float = 0.0,
        update: bool = False,
        blur: float = 4.0,
        seed: int | None = None,
        trim: float = 0.0,
        thumbnails: bool = False,
        image_size: int | tuple[int, int] | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        roi: str | None = None,
        bit_depth: int | None = None,
        score_layers: Sequence[str] | None = None,
        bank_per: BankPer = "layer",
        copies: Copies = "none",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        SubspaceSampler(1, tolerance)  # refuses what is out of range
        if not 0.0 <= trim <= 0.5:  # noqa: PLR2004
            msg = f"trim must lie between 0 and 0.5, got {trim}."
            raise ValueError(msg)
        require_bit_depth(bit_depth)
        if copies not in get_args(Copies):
            msg = f"copies must be one of {', '.join(get_args(Copies))}, got '{copies}'."
            raise ValueError(msg)
        if seed is not None and not (isinstance(seed, Integral) and -(2**63) <= seed < 2**64):
            msg = f"seed must be a whole number of 64 bits, got {seed!r}."
            raise ValueError(msg)
        own_pre_processor = not isinstance(pre_processor, bool)
        if pre_processor is True:  # the default normalisation depends on the backbone
            size = (
                default_size(backbone, layers, score_layers)
                if image_size is None
                else as_size(image_size)
            )
            pre_processor = self.configure_pre_processor(size, backbone)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.pre_trained = pre_trained
        self.bank_size = bank_size
        self.tolerance = tolerance
        self.update = update
        self.seed = seed
        self.trim = trim
        self.thumbnails = thumbnails
        self.copies: Copies = copies
        self.suspects: list[tuple[str, float]] = []
        self.model: SgfrModel = SgfrModel(
            backbone,
            layers,
            solver,
            num_atoms,
            regularisation,
            blur,
            pooling,
            score_layers,
            bank_per,
        )
        fewest = min(bank_sizes(self.model.embedder.scales, bank_size))
        if solver != "ridge" and num_atoms > fewest:
            msg = f"num_atoms ({num_atoms}) must not exceed bank_size ({fewest})."
            raise ValueError(msg)
        self.accepted = None
        self.fit_record = None
        self._started = 0.0
        self.peak: Tensor | None = None  # of the latest batch, see ScoreMaps
        self.look_at(image_size, tile_size, tile_stride, roi, own_pre_processor)
        self.bit_depth = bit_depth
        self.model.bit_depth = bit_depth or 8
        self._sampling = SubspaceSampling()
        self._table = ScoreTable()
        self._folder = RunFolder()
        # weights of the backbone that an earlier fit, kept until this one has ended, was made with,
        # and its depth
        self._earlier: tuple[dict[str, Any], int] | None = None

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str = "tf_efficientnet_lite0",
    ) -> SgfrPreProcessor:
        """Build the default pre-processor: resize, then normalise as the backbone was trained.

        Args:
            image_size (tuple[int, int] | None): Height and width in pixels; ``None`` for what suits
                the backbone, mostly 256 x 256. Defaults to ``None``.
            backbone (str): Name of the timm model whose normalisation to use.

        Returns:
            SgfrPreProcessor: The pre-processor.

        Raises:
            ValueError: If the backbone is unknown.
        """
        mean, std = normalisation(backbone)
        return SgfrPreProcessor(
            transform=Compose(
                [
                    Resize(image_size or default_size(backbone), antialias=True),
                    Normalize(mean=list(mean), std=list(std)),
                ]
            ),
        )

    @staticmethod
    def configure_post_processor() -> SgfrPostProcessor:
        """Build the default post-processor, whose threshold needs no defect."""
        return SgfrPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> DeepVisualizer:
        """Build the default visualizer, which shows pictures of any depth."""
        return DeepVisualizer()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Attach what samples, what tells the scores and what keeps quiet; the user's own if the
        trainer has one.
        """
        # Lightning replaces a user's callback by the model's of the same type, without a word: hand
        # it back instead.
        attached = list(getattr(self._trainer, "callbacks", []))
        self._sampling = _given(attached, self._sampling)
        table, quiet = _given(attached, self._table), _given(attached, QuietRun())
        folder = _given(attached, self._folder)
        callbacks = super().configure_callbacks()
        every = [
            quiet,
            *(callbacks if isinstance(callbacks, Sequence) else [callbacks]),
            self._sampling,
            table,
            folder,
        ]
        return [item for item in every if not any(item is other for other in attached)]

    def setup(self, stage: str) -> None:
        """Refuse a precision that puts other layers into the backbone.

        Raises:
            ValueError: If it is none of 16, 32 or 64 bits.
        """
        if str(self.trainer.precision) not in _PRECISIONS:
            msg = (
                f"precision must be one of {', '.join(_PRECISIONS)}, got"
                f" '{self.trainer.precision}'."
            )
            raise ValueError(msg)
        super().setup(stage)
        if self.trainer.world_size > 1:
            for owner in (self.evaluator, self.post_processor):
                if owner is not None:
                    leave_out_empty(owner)
            if stage == "predict":
                fill_up(self.trainer)

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised by gradient."""
        return

    def on_fit_start(self) -> None:
        """Read the pretrained weights and start afresh; a fit that resumes a finished one keeps
        what it restored.

        Raises:
            RuntimeError: If the fit resumes from a checkpoint saved before its fit ended, if
                ``update`` is set and there is nothing to add to, or if weights are missing.
        """
        if self.update:
            self.require_fitted("add to")
        elif self.trainer.ckpt_path is not None:
            self.require_fitted("resume from")
            return
        self._started = time.perf_counter()
        if self.seed is not None:
            torch.manual_seed(self.seed)
        earlier = (
            copy.deepcopy(self.model.embedder.extractor.state_dict()) if self._is_fitted else None
        )
        if self.pre_trained and not self.update:
            self.model.embedder.load_pretrained()
        # what an earlier fit made stays until this one has made all of its own, so that a failed
        # fit loses nothing
        self._earlier = None if earlier is None else (earlier, self.model.bit_depth)
        self._set_fitted(fitted=False)

    def new_samplers(self) -> list[SubspaceSampler]:
        """Samplers for a fit that starts now, one for each scale, with the banks it adds to, if
        any.
        """
        sizes = bank_sizes(self.model.embedder.scales, self.bank_size)
        return samplers_for(
            self.model.banks,
            sizes,
            self.tolerance,
            self.update,
            global_rank=self.trainer.global_rank,
        )

    def images_known(self) -> list[str]:
        """Paths of the images that atoms of the bank which a fit adds to come from."""
        return self.model.images if self.update else []

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Embed a batch for the sampling callback.

        Args:
            batch (ImageBatch): Nominal images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            dict[str, Any]: ``embeddings`` of each scale, shape ``(C B, d, h, w)``, of the images
            and then of each copy of all of them, which of their patches are ``inside`` the region,
            if there is one, and a dummy ``loss`` that lets Lightning's automatic optimisation, and
            with it checkpointing, run.
        """
        del args, kwargs
        images: Any = batch.image
        embeddings = self.model.embed(images, self.copies, with_nuisance=not self.update)
        inside = self.model.patches_inside([part.shape[-2:] for part in embeddings])
        return {"loss": self.dummy_loss(), "embeddings": embeddings, "inside": inside}

    @torch.no_grad()
    def fit(self) -> None:
        """Make all of what is learnt, then take it into use. Called once by anomalib's mixin, at
        the end of the images.

        Nothing of the model changes before all of it is made.

        Raises:
            ValueError: If no training image was seen.
        """
        with failing_together():
            seen = self._sampling.patches_seen
        if not sum(gathered(seen)):
            msg = (
                "Sgfr is not fitted and no training image was seen: the training set is empty, or"
                " fit was not called."
            )
            raise ValueError(msg)
        with failing_together():
            self.require_good_looks()
        post_processor = self._own_post_processor
        earlier = self.model.fitted_state if self.update else None
        images = self._training_images()

        def calibrate(
            fitted: SgfrModel, trusted: Sequence[str], excluded: Sequence[str]
        ) -> ThresholdState:
            with bars(shown=bar_is_on(self.trainer)):
                # is called if there is one
                return post_processor.calibrated(  # type: ignore[union-attr]
                    fitted, self.pre_processor, trusted, update=self.update, excluded=excluded
                )

        made = make(
            self.model,
            learn(self._sampling.samplers, self._sampling.images, earlier, self.device),
            self.pre_processor,
            images,
            trim=self.trim,
            thumbnails=self.thumbnails,
            earlier=earlier,
            calibrate=calibrate if post_processor else None,
        )
        if made.suspects and self.trainer.is_global_zero:
            write_suspects(made.suspects, Path(self.trainer.default_root_dir) / "suspects.csv")
        record = FitRecord.of(time.perf_counter() - self._started, self.device, images)
        self.model.load_fitted_state(made.fitted_state)
        if post_processor and made.threshold:
            post_processor.use(made.threshold)
        self.accepted = None
        self.suspects = made.suspects
        self._earlier = None
        self.keep_look()
        self.fit_record = record
        self._set_fitted(fitted=True)
        self._report_certificate()

    def _report_certificate(self) -> None:
        found = self.certificate()
        if self.trainer.is_global_zero:
            for bank, scale in zip(self.model.banks, found.scales, strict=True):
                self._warn_of_outliers(bank)
                logger.info(
                    "Learnt a bank of %d atoms x %d from %d patches.",
                    *bank.atoms.shape,
                    scale.patches,
                )
            logger.info(
                "Certified: each rebuilt to within %.4g, on average within %.4g.",
                found.largest,
                found.mean,
            )
        measured = {
            "certified_residual": found.largest,
            "certified_mean_residual": found.mean,
            "certified_score": found.largest_score,
        }
        for destination in self.trainer.loggers:
            destination.log_metrics(measured, self.trainer.global_step)

    def _warn_of_outliers(self, bank: MemoryBank) -> None:
        """Say which image's embedding is so large that it leaves most others no digits."""
        atoms = bank.atoms
        different = len(torch.unique(bank.stored, dim=0))
        if 2 * different < len(atoms):
            image = int(bank.origin[atoms.abs().amax(1).argmax(), 0])
            logger.warning(
                "%d of %d atoms are alike in 16 bits beside the largest, of %.3g: look at %s.",
                len(atoms) - different,
                len(atoms),
                float(atoms.abs().max()),
                self.model.images[image] if image >= 0 else "the training images",
            )

    def _training_images(self) -> list[str]:
        """Paths of the images that all processes have seen in the running fit, in alphabetical
        order.
        """
        return sorted(set(itertools.chain.from_iterable(gathered(self._sampling.seen))))

    def certificate(self) -> Certificate:
        """Bound the residual of every nominal patch seen in the fit, in the units of the raw
        anomaly map.

        Returns:
            Certificate: Largest, mean and histogram.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        return self.model.certificate()

    def abandon_fit(self) -> None:
        """Return to what an earlier fit made, if there is one, unless a later fit has taken its own
        into use.
        """
        if self._earlier is not None:
            weights, self.model.bit_depth = self._earlier
            self.model.embedder.extractor.load_state_dict(weights)
            self._earlier = None
            self._set_fitted(fitted=True)
        self.look_as_learnt()

    def on_fit_end(self) -> None:
        """Keep what an earlier fit made, if this one had no images to learn from."""
        self.abandon_fit()

    def _set_fitted(self, *, fitted: bool) -> None:
        self._is_fitted = torch.tensor([fitted], device=self.device)

    def validation_step(
        self,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> STEP_OUTPUT:
        """Score a batch; of several processes' images, each once.

        Args:
            batch (ImageBatch): Images with or without ground truth.
            batch_idx (int): Number of the batch in this process.
            dataloader_idx (int): Number of the loader, if there are several.

        Returns:
            STEP_OUTPUT: The batch with ``anomaly_map`` and ``pred_score``.
        """
        drop_padding(
            batch, getattr(self._trainer, "val_dataloaders", None), batch_idx, dataloader_idx
        )
        return self._scored(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:  # noqa: ANN401
        """As :meth:`validation_step`."""
        drop_padding(
            batch, getattr(self._trainer, "test_dataloaders", None), batch_idx, dataloader_idx
        )
        return self._scored(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:  # noqa: ANN401
        """As :meth:`validation_step`."""
        drop_padding(
            batch, getattr(self._trainer, "predict_dataloaders", None), batch_idx, dataloader_idx
        )
        return self._scored(batch)

    def _scored(self, batch: ImageBatch) -> STEP_OUTPUT:
        images: Any = batch.image
        if not len(images):  # all of them are other batches'
            self.peak = None
            return batch.update(anomaly_map=images[:, :1], pred_score=images.new_zeros(0))
        maps = self.model.score_maps(images)
        self.peak = maps.peak
        return batch.update(**maps.prediction._asdict())

    def on_test_start(self) -> None:
        """Refuse to test a model that is not fitted."""
        self.require_fitted("test")

    def on_predict_start(self) -> None:
        """Refuse to predict with a model that is not fitted."""
        self.require_fitted("predict with")

    def require_fitted(self, action: str) -> None:
        """Refuse what only a fitted model can do.

        Args:
            action (str): What is asked for.

        Raises:
            RuntimeError: If the model is not fitted.
        """
        if not self._is_fitted or not self.model.is_fitted:
            msg = (
                f"cannot {action} an Sgfr that is not fitted: call fit or train first, or pass a"
                " ckpt_path that was saved after its fit ended."
            )
            raise RuntimeError(msg)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments Sgfr needs: exactly one whole pass before the first validation."""
        return {
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 0,
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 1,
        }

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on nominal images alone."""
        return LearningType.ONE_CLASS

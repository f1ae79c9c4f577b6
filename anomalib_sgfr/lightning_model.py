"""Sgfr as an anomalib model: its hooks, and the parts that do their work."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_sgfr import export
from anomalib_sgfr.core.certificate import Certificate
from anomalib_sgfr.core.solvers import SOLVERS, SolverName
from anomalib_sgfr.features.backbone import default_size
from anomalib_sgfr.features.embedding import Copies
from anomalib_sgfr.features.layers import ScoreLayers
from anomalib_sgfr.features.weights import normalisation
from anomalib_sgfr.images.bit_depth import to_batch
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor, aspect_rule
from anomalib_sgfr.post_processing.post_processor import SgfrPostProcessor
from anomalib_sgfr.quantisation import images_for, keeping_in_float
from anomalib_sgfr.report.fit_record import FitRecord
from anomalib_sgfr.report.visualizer import ResultVisualizer
from anomalib_sgfr.torch_model import SgfrModel
from anomalib_sgfr.training import checkpoint as checkpoints
from anomalib_sgfr.training import distributed, fit, predict_loaders
from anomalib_sgfr.training.accept import AcceptanceHistory
from anomalib_sgfr.training.callback import ModelCallbacks, require_precision
from anomalib_sgfr.training.fit_run import FitRun
from anomalib_sgfr.training.image_size import ImageSize, as_size
from anomalib_sgfr.training.input_settings import InputSettings
from anomalib_sgfr.training.reject import hold_limits_for_validation

__all__ = ["Sgfr"]


class Sgfr(MemoryBankMixin, AnomalibModule):
    """Subspace-guided feature reconstruction: finds and localises defects, from good parts alone.

    Keeps a small memory bank of nominal patch embeddings for each layer, collected in one pass over
    the training images, rebuilds every patch of an image from a few of them, and scores what cannot
    be rebuilt. An implementation from the published description of Hotta et al., "Subspace-Guided
    Feature Reconstruction for Unsupervised Anomaly Localization" (arXiv 2309.13904).

    Args:
        backbone (str): Name of a timm model, convolutional or transformer.
        layers (Sequence[str] | None): Layers that contribute to the anomaly map, each equally.
            ``None`` for the stages of stride 4, 8 and 16; of a plain transformer, the blocks that
            end its first half and its first three quarters.
        pre_trained (bool): Whether a fit starts from the backbone's pretrained weights.
        bank_size (int | Sequence[int] | None): Most embeddings (atoms) of a memory bank: one
            number, or one for each scale, the finest first. ``None`` for 1,000 up to stride 8,
            5,000 beyond, and 3,000 from stride 32.
        solver (SolverName): How a patch is rebuilt: ``"affine"`` from its nearest atoms, ``"omp"``
            from atoms picked greedily, ``"ridge"`` from all atoms.
        num_atoms (int): Number of atoms that rebuild a patch; not used by ``"ridge"``.
        regularisation (float): Ridge penalty on the coefficients, relative to the scale of the
            data; not used by ``"omp"``.
        tolerance (float): Euclidean distance, shared equally among the scales, within which nominal
            patches need no atom of their own.
        update (bool): Whether a fit adds to the memory banks of an earlier one.
        blur (float): Standard deviation of the Gaussian that smooths the anomaly map, in pixels.
        seed (int | None): Seed of a fit, and so of the order of the training images.
        trim (float): Share of the training images, at most one half, to suspect of being
            mislabelled. Their atoms are dropped; ``suspects`` and ``suspects.csv`` name them.
        thumbnails (bool): Whether to keep a thumbnail of each atom, for explanations without the
            training images: 1,728 bytes an atom.
        image_size (ImageSize): Height and width that the default pre-processor resizes images to.
            One number ``n`` for about ``n`` x ``n`` pixels in the aspect ratio of the training
            images, of each image if theirs differ; ``None`` for 256, or a number near it that the
            backbone takes; ``"square"`` for that many pixels along both sides.
        tile_size (int | tuple[int, int] | None): Height and width of tiles that images are embedded
            in, multiples of the coarsest stride. ``None`` for whole images, or for the tiles of a
            ``TilerConfigurationCallback``.
        tile_stride (int | tuple[int, int] | None): Pixels from one tile to the next; ``None`` for
            ``tile_size``.
        roi (str | None): Mask image, white where to inspect. The rest of an image is neither fitted
            nor scored.
        bit_depth (int | None): Bits of the camera, 8 to 16; ``None`` infers it from the training
            images. Given, it also confirms training images that are nearly constant.
        score_layers (ScoreLayers): Layers that contribute to the image score, or a weight for each.
            ``None`` for ``layers``, if these are given or the backbone is a plain transformer;
            otherwise for the stages of stride 8, 16 and 32 (of the last, the first block if it has
            several), and by a weight of 0.25 for that of stride 4.
        copies (Copies): Augmentation of the training images: ``"mirrored"`` by flips, ``"turned"``
            by right angles. Takes four times as long.
        pre_processor (nn.Module | bool): Pre-processor, or whether to use the default one.
        post_processor (nn.Module | bool): Post-processor, or whether to use the default one, an
            :class:`~anomalib_sgfr.post_processing.post_processor.SgfrPostProcessor`.
        evaluator (Evaluator | bool): Evaluator, or whether to use anomalib's default.
        visualizer (Visualizer | bool): Visualizer, or whether to use the default one.

    Attributes:
        suspects (list[tuple[str, float]]): Training images of the latest fit that are suspected of
            being mislabelled, and their raw scores.
        accepted (AcceptanceHistory | None): New atoms of false alarms, and how to remove them.
        fit_record (FitRecord | None): How the fit went; ``None`` in a checkpoint of an earlier
            version.
        restored_from (Path | None): Checkpoint file that the model was loaded from.
        peak (Tensor | None): Row and column of the peak of each score map of the latest batch.

    Raises:
        ValueError: If an argument is out of range, or the backbone or a layer is unknown.

    Examples:
        >>> from anomalib_sgfr import Sgfr
        >>> model = Sgfr.load_from_checkpoint(checkpoint)
        >>> batch = engine.predict(model, datamodule=datamodule)[0]
        >>> batch.anomaly_map.shape[0] == len(batch.pred_score)
        True
    """

    pre_processor: Any
    post_processor: Any
    accepted: AcceptanceHistory | None = None
    fit_record: FitRecord | None = None
    restored_from: Path | None = None
    peak: Tensor | None = None

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        bank_size: int | Sequence[int] | None = None,
        solver: SolverName = "affine",
        num_atoms: int = 5,
        regularisation: float = 1e-3,
        tolerance: float = 0.0,
        update: bool = False,
        blur: float = 4.0,
        seed: int | None = None,
        trim: float = 0.0,
        thumbnails: bool = False,
        image_size: ImageSize = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        roi: str | None = None,
        bit_depth: int | None = None,
        score_layers: ScoreLayers = None,
        copies: Copies = "none",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        fit.check_arguments(tolerance, trim, bit_depth, copies, seed)
        own_pre_processor = not isinstance(pre_processor, bool)
        if pre_processor is True:  # the default normalisation depends on the backbone
            pre_processor = self.configure_pre_processor(
                as_size(image_size) or default_size(backbone, layers, score_layers), backbone
            )
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
            backbone, layers, solver, num_atoms, regularisation, blur, score_layers
        )
        fewest = min(fit.bank_sizes(self.model.embedder.scales, bank_size))
        if not SOLVERS[solver].uses_all_atoms and num_atoms > fewest:
            msg = f"num_atoms ({num_atoms}) must not exceed bank_size ({fewest})."
            raise ValueError(msg)
        self._inputs = InputSettings(
            self.model,
            self.pre_processor,
            image_size=image_size,
            tile_size=tile_size,
            tile_stride=tile_stride,
            roi=roi,
            bit_depth=bit_depth,
            own_pre_processor=own_pre_processor,
        )
        self._callbacks = ModelCallbacks()
        self._run = FitRun(self._inputs, self._callbacks)
        self._anchor: distributed.DataParallelAnchor | None = None
        self._before_load: checkpoints.Snapshot | None = None

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None, backbone: str = "tf_efficientnet_lite0"
    ) -> SgfrPreProcessor:
        """Default pre-processor: resizes, then normalises as the backbone was trained.

        Args:
            image_size (tuple[int, int] | None): Height and width in pixels; ``None`` for a size
                that suits the backbone, mostly 256 x 256.
            backbone (str): Name of the timm model.

        Raises:
            ValueError: If the backbone is unknown.
        """
        mean, std = normalisation(backbone)
        resize = Resize(image_size or default_size(backbone), antialias=True)
        return SgfrPreProcessor(Compose([resize, Normalize(mean=list(mean), std=list(std))]))

    @staticmethod
    def configure_post_processor() -> SgfrPostProcessor:
        """Default post-processor, whose threshold needs no defective image."""
        return SgfrPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> ResultVisualizer:
        """Default visualizer, which shows images of any bit depth."""
        return ResultVisualizer()

    @staticmethod
    def configure_optimizers() -> None:
        """No optimizer: nothing is fitted by gradient."""
        return

    def configure_callbacks(self) -> Sequence[Callback]:
        """Callbacks that Sgfr attaches, unless the trainer has its own of the same kind."""
        return self._callbacks.attach(self._trainer, super().configure_callbacks())

    def setup(self, stage: str) -> None:
        """Prepare a run: precision, data-parallel anchor, input settings, idle processes.

        Raises:
            ValueError: If the precision is not one of 16, 32 or 64 bits, or input settings
                disagree.
        """
        require_precision(self.trainer)
        super().setup(stage)
        if stage == "fit" and distributed.DataParallelAnchor.needed(self.trainer):
            self._anchor = distributed.DataParallelAnchor(self.device)
        self._inputs.configure(
            self.model, self.pre_processor, self.trainer, fit=stage == "fit", update=self.update
        )
        distributed.prepare(self.trainer, self.evaluator, self.post_processor)
        if stage == "predict":
            predict_loaders.prepare(self.trainer)

    def teardown(self, stage: str) -> None:
        """Drop the data-parallel anchor, and give the data module its batch sizes back."""
        super().teardown(stage)
        self._anchor = None
        self._inputs.release()

    def on_fit_start(self) -> None:
        """Start afresh, or refuse if there is no fit to resume from or to add to."""
        self._run.start(self)

    def on_train_start(self) -> None:
        """Choose the bit depth of the training images."""
        self._callbacks.high_bit_depth.start_fit(
            self.trainer, self.model, self._inputs.bit_depth, update=self.update
        )

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Embed a batch of nominal images for the sampling callback.

        Returns:
            dict[str, Any]: ``embeddings`` of each scale, shape ``(C B, d, h, w)``, of the images
            and then of each augmented copy; ``inside``, which patches lie in the region of
            interest; and a ``loss`` of zero, for Lightning's automatic optimisation.
        """
        del args, kwargs
        images: Any = batch.image
        embeddings = self.model.embed(images, self.copies, with_nuisance=not self.update)
        inside = self.model.patches_inside([part.shape[-2:] for part in embeddings])
        loss = (
            torch.zeros((), device=self.device, requires_grad=True)
            if self._anchor is None
            else self._anchor()
        )
        return {"loss": loss, "embeddings": embeddings, "inside": inside}

    @torch.no_grad()
    def fit(self) -> None:
        """Make memory banks and threshold, then use them; anomalib calls it at the end of a pass.

        Raises:
            ValueError: If no training image was seen, or most are nearly constant.
        """
        self._run.finish(self)

    def abandon_fit(self) -> None:
        """Return to an earlier fit, if there is one and this fit has not ended."""
        self._run.abandon(self)

    def on_fit_end(self) -> None:
        """Keep an earlier fit, if this one had no images."""
        self.abandon_fit()

    def validation_step(
        self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> STEP_OUTPUT:
        """Give a batch its ``anomaly_map`` and ``pred_score``; drop what other processes have."""
        return self._score(batch, "val_dataloaders", batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Let rejected defects raise the score of no image that the threshold is calibrated on."""
        super().on_validation_epoch_end()
        if isinstance(self.post_processor, SgfrPostProcessor):
            hold_limits_for_validation(self.model, self.pre_processor, self.post_processor)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:  # noqa: ANN401
        """As :meth:`validation_step`."""
        return self._score(batch, "test_dataloaders", batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:  # noqa: ANN401
        """As :meth:`validation_step`."""
        return self._score(batch, "predict_dataloaders", batch_idx, dataloader_idx)

    def _score(self, batch: ImageBatch, loaders: str, number: int, loader: int) -> STEP_OUTPUT:
        distributed.drop_padding(batch, getattr(self._trainer, loaders, None), number, loader)
        images: Any = batch.image
        if not len(images):  # all of them are other processes'
            self.peak = None
            return batch.update(anomaly_map=images[:, :1], pred_score=images.new_zeros(0))
        found = self.model.score_maps(images)
        self.peak = found.peak
        return batch.update(**found.prediction._asdict())

    def forward(self, batch: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Score images as the Engine does, in any mode of the model and from any number of threads.

        Args:
            batch (Any): A batch of shape ``(B, C, H, W)`` or one frame: an array, a Pillow image
                or a path, as :func:`~anomalib_sgfr.images.reading.read_image` takes it.
            *args: Passed on to anomalib in an export, as ``kwargs`` are.
            **kwargs: See ``args``.

        Returns:
            InferenceBatch: Maps, scores, labels and masks, of the size of the model's input.

        Raises:
            RuntimeError: If the model is not fitted.
            TypeError: If it is no image.
            ValueError: If values are out of range, or the shape is not an image's.
        """
        if torch.compiler.is_compiling():
            return super().forward(batch, *args, **kwargs)
        self.require_fitted("score with")
        images = to_batch(batch, self.model.bit_depth).to(self.device)
        # not by the model's forward, whose result depends on its mode: to switch that and back
        # would also switch it for other threads
        predicted = self.model.score_maps(
            images if self.pre_processor is None else self.pre_processor(images)
        ).prediction
        return predicted if self.post_processor is None else self.post_processor(predicted)

    def on_test_start(self) -> None:
        """Refuse to test a model that is not fitted."""
        self.require_fitted("test")

    def on_predict_start(self) -> None:
        """Refuse to predict with a model that is not fitted."""
        self.require_fitted("predict with")

    def on_predict_end(self) -> None:
        """Name images that could not be read, when all others are predicted.

        Raises:
            OSError: If there is one.
        """
        predict_loaders.name_unreadable(self.trainer)

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

    def certificate(self) -> Certificate:
        """Bound on the residual of every nominal patch seen in the fit, see the torch model's."""
        return self.model.certificate()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save as anomalib does, with input settings, arguments and the records of the fit."""
        super().on_save_checkpoint(checkpoint)
        self._inputs.save(checkpoint, self.model, self.pre_processor)
        checkpoints.save(
            checkpoint, self.hparams, self.post_processor, self.accepted, self.fit_record
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore a checkpoint; one that is refused, here or later, changes nothing of the model.

        Raises:
            ValueError: If it is damaged, another model's, of a version that cannot be read, or of
                other arguments that scores depend on.
        """
        restore_components = super().on_load_checkpoint
        self._before_load = checkpoints.restore(self, checkpoint, self._inputs, restore_components)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Load a state, and keep what :meth:`on_load_checkpoint` restored, or change nothing."""
        before, self._before_load = self._before_load or checkpoints.Snapshot(self), None
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except BaseException:
            before.put_back()
            raise

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """Load a checkpoint file as anomalib does, on the CPU if the device lacks 64-bit floats.

        Raises:
            ValueError: If the file is not whole, or not one that Sgfr can use.
        """
        load = super().load_from_checkpoint
        return checkpoints.load_file(cls, load, checkpoint_path, *args, **kwargs)

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the checkpoint that the model was loaded from, with its present state.

        Args:
            path (str | Path): The new file, or the same; written whole or not at all.

        Raises:
            RuntimeError: If the model was not loaded from a checkpoint: its trainer saves it.
        """
        if self.restored_from is None:
            msg = "the model was not loaded from a checkpoint: save it by trainer.save_checkpoint."
            raise RuntimeError(msg)
        checkpoints.rewrite(self, self.restored_from, Path(path))

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as anomalib does; an earlier file stays until the new one is whole."""
        self.require_fitted("export")
        root = export.resolve_root(export_root, self.restored_from)
        to_torch = super().to_torch
        return export.publish(root, lambda folder: to_torch(folder, model_file_name))

    def to_onnx(  # type: ignore[override]  # anomalib's, not Lightning's
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export as anomalib does, with metadata for an Inspector."""
        self.require_fitted("export")
        root = export.resolve_root(export_root, self.restored_from)
        name, size = model_file_name, input_size
        return export.export_onnx(self, super().to_onnx, root, name, size, **kwargs)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export as anomalib does, in 32 bits or compressed.

        With a ``datamodule``, the labels of its validation images by the file, as OpenVINO computes
        it on this processor, are compared with the model's, and the log has the errors.

        Raises:
            ValueError: If a compression that needs images has none.
        """
        self.require_fitted("export")
        root = export.resolve_root(export_root, self.restored_from)
        to_openvino = super().to_openvino
        options = (model_file_name, input_size, compression_type, datamodule, *args)
        return export.export_openvino(
            self,
            lambda folder: to_openvino(folder, *options, **kwargs),
            root,
            compression_type,
            datamodule,
        )

    def _compress_ov_model(
        self,
        model: Any,  # noqa: ANN401
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Compress as anomalib does, on the model's own images, but for what 8 bits would harm."""
        model = model.clone()  # without what no output needs: NNCF fails on such operations
        rule = aspect_rule(self.pre_processor)
        images = images_for(model, datamodule, self.model.bit_depth, rule)
        with keeping_in_float(model), images:
            return super()._compress_ov_model(model, compression_type, datamodule, *args, **kwargs)

    @property
    def bit_depth(self) -> int | None:
        """Bits that the camera gives, as asked for; the depth in use is the torch model's."""
        return self._inputs.bit_depth

    @property
    def trained_aspect(self) -> float | None:
        """Height over width of the training images; ``None`` if the image size ignores it."""
        return None if self._inputs.fitted is None else self._inputs.fitted.aspect

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments of anomalib's Engine: one whole pass before the first validation."""
        return {
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 0,
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 1,
        }

    @property
    def learning_type(self) -> LearningType:
        """One-class: fitted to nominal images alone."""
        return LearningType.ONE_CLASS

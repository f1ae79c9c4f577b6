"""Base of the datamodules: anomalib's arguments with their defaults, and a fixed split."""

from abc import abstractmethod

from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

__all__ = ["SplitDataModule"]


class SplitDataModule(AnomalibDataModule):
    """Datamodule of a data set that is split into training and test images.

    Args:
        train_batch_size (int): Training batch size. Defaults to ``32``.
        eval_batch_size (int): Test batch size. Defaults to ``32``.
        num_workers (int): Number of workers. Defaults to ``8``.
        train_augmentations (Transform | None): Augmentations of the training images. Defaults to
            ``None``.
        val_augmentations (Transform | None): Augmentations of the validation images. Defaults to
            ``None``.
        test_augmentations (Transform | None): Augmentations of the test images. Defaults to
            ``None``.
        augmentations (Transform | None): Augmentations where no stage-specific ones are given.
            Defaults to ``None``.
        val_split_mode (ValSplitMode | str): Where validation images come from. Defaults to the test
            set.
        val_split_ratio (float): Part of the train or test images reserved for validation. Defaults
            to ``0.5``.
        seed (int | None): Seed of the validation split. Defaults to ``None``.
    """

    def __init__(
        self,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )

    @abstractmethod
    def part(self, split: Split) -> AnomalibDataset:
        """The images for training, or those for testing."""

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = self.part(Split.TRAIN)
        self.test_data = self.part(Split.TEST)

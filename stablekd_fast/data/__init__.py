"""Data sets, subsets, views by (seed, sample, view), and sources of batches."""

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.batch import Batch
from stablekd_fast.data.crops import BATCHES_AHEAD
from stablekd_fast.data.dali_stream import StreamSource
from stablekd_fast.data.dataset import IMAGENET_MEAN, IMAGENET_STD, Dataset, open_dataset
from stablekd_fast.data.decoders import STREAM, SourceName
from stablekd_fast.data.evaluation import EvalSource
from stablekd_fast.data.second import with_second
from stablekd_fast.data.source import TrainSource
from stablekd_fast.data.split import Split
from stablekd_fast.data.user_source import UserEvalSource, UserSource
from stablekd_fast.data.users import UserSplit
from stablekd_fast.data.views import (
    VIEW_VERSION,
    crop_offsets_and_flips,
    epoch_order,
    resized_crop_boxes,
    view_flips,
)

__all__ = [
    "BATCHES_AHEAD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "STREAM",
    "VIEW_VERSION",
    "Augmentation",
    "Batch",
    "Dataset",
    "EvalSource",
    "SourceName",
    "Split",
    "StreamSource",
    "TrainSource",
    "UserEvalSource",
    "UserSource",
    "UserSplit",
    "crop_offsets_and_flips",
    "epoch_order",
    "open_dataset",
    "resized_crop_boxes",
    "view_flips",
    "with_second",
]

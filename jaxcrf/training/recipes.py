"""Experiments that come with the package, by name: what `jaxcrf train --experiment` knows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optax

from jaxcrf.data import Augmentation, Pipeline, SegmentationFolder, open_folder
from jaxcrf.data.folders.base import hash_order
from jaxcrf.models import ModelConfig, convcrf_options
from jaxcrf.models.convcrf import VARIANTS, Variant
from jaxcrf.training import objectives
from jaxcrf.training.loop import Experiment
from jaxcrf.training.losses import class_weights
from jaxcrf.training.protocols import Stage
from jaxcrf.training.schedules import adam, polynomial_decay, warmup
from jaxcrf.training.updates import Update

_HELD_OUT = 67


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        width: channels of the network, see `models.small_fcn.SmallFCN`.
        reduction: how much smaller the network sees the image.
        epochs: of the unary's training.
        batch_size: of the unary's training.
        learning_rate: of the unary, to begin with.
        crf_epochs: of the CRF's training, on the held-out images.
        compute_dtype: of the network's arithmetic.
    """

    width: int
    reduction: int
    epochs: int
    batch_size: int
    learning_rate: float
    crf_epochs: int
    compute_dtype: str | None = None


SCALES = {
    # About ten minutes for the unary on two cores.
    "cpu": Scale(width=48, reduction=2, epochs=24, batch_size=8, learning_rate=2e-3, crf_epochs=5),
    "gpu": Scale(
        width=128,
        reduction=1,
        epochs=400,
        batch_size=16,
        learning_rate=2e-3,
        crf_epochs=40,
        compute_dtype="bfloat16",
    ),
    "smoke": Scale(width=8, reduction=4, epochs=1, batch_size=2, learning_rate=2e-3, crf_epochs=1),
}


def camvid_unary(root: str | Path, *, seed: int = 0, scale: str | Scale = "cpu") -> Experiment:
    """A small FCN from scratch on CamVid: the unary that `camvid_crf` refines.

    It is trained on 300 of the 367 training images; the other 67 are held out for the CRF.

    Args:
        root: the folder of CamVid, with `train` and `val`.
        seed: of parameters, order and augmentation; the images held out are always the same.
        scale: "cpu", "gpu", "smoke" or any other `Scale`.

    Returns:
        The experiment.

    Raises:
        ValueError: if the data set is not there, or there is no such scale.

    Example:
        >>> SCALES["cpu"].batch_size
        8
    """
    size = _scale(scale)
    pictures, _, val = camvid_splits(root)
    shape = _shape(pictures)
    augmentation = Augmentation(rotation=5.0, scale=(0.7, 1.6), brightness=25.0, hue=9.0)
    data = {
        "train": Pipeline(
            pictures, batch_size=size.batch_size, size=shape, seed=seed, augmentation=augmentation
        ),
        "val": _evaluated(val, shape),
    }
    steps = size.epochs * data["train"].steps_per_epoch
    schedule = warmup(polynomial_decay(size.learning_rate, steps, 0.9), max(1, min(100, steps // 5)))
    update = Update(
        "unary",
        objectives.unary(class_weights=mild_class_weights(pictures)),
        optax.chain(optax.clip_by_global_norm(5.0), adam(schedule, weight_decay=1e-4)),
        trainable=("unary/*",),
    )
    return Experiment(
        name="camvid_unary",
        model=_model(size, None, shape),
        data=data,
        stages=(Stage("unary", steps, (update,)),),
        label_names=val.label_names,
        seed=seed,
        checkpoint_every=200,
        compute_dtype=size.compute_dtype,
    )


def camvid_crf(
    root: str | Path,
    initial: str | Path,
    *,
    variant: Variant = "convcrf+CT",
    seed: int = 0,
    scale: str | Scale = "cpu",
) -> Experiment:
    """ConvCRF on a trained `camvid_unary`, its parameters learned on the held-out images: decoupled training.

    Args:
        root: the folder of CamVid.
        initial: the folder of the unary's run.
        variant: what is learned, see `models.convcrf_options`.
        seed: of the order of the images.
        scale: that of the unary.

    Returns:
        The experiment.

    Raises:
        ValueError: if the data set is not there, or there is no such variant or scale.

    Example:
        >>> from jaxcrf.models.convcrf import VARIANTS
        >>> VARIANTS
        ('convcrf', 'convcrf+T', 'convcrf+C', 'convcrf+CT')

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §5.2 and Table 2.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}; expected one of {', '.join(VARIANTS)}")
    size = _scale(scale)
    _, held_out, val = camvid_splits(root)
    shape = _shape(held_out)
    # Without augmentation: the learned features of +T belong to places of the image. With the unary's class weights, or
    # the CRF would learn to take them back.
    data = {
        "held_out": Pipeline(held_out, batch_size=2, size=shape, seed=seed),
        "val": _evaluated(val, shape),
    }
    steps = size.crf_epochs * data["held_out"].steps_per_epoch
    update = Update(
        "crf",
        objectives.segmentation(class_weights=mild_class_weights(held_out)),
        optax.adam(polynomial_decay(3e-2, steps, 0.9)),
        trainable=("crf/*",),
        # A pixel's own feature sees few images; at the full rate Adam would follow their noise.
        learning_rates={"crf/feature_offsets": 0.1} if variant in ("convcrf+T", "convcrf+CT") else {},
        evaluating=("unary",),
    )
    return Experiment(
        name=f"camvid_{variant}",
        model=_model(size, variant, shape),
        data=data,
        stages=(Stage("crf", steps, (update,), split="held_out"),),
        label_names=val.label_names,
        seed=seed,
        checkpoint_every=None,
        initial=initial,
    )


def camvid_splits(
    root: str | Path,
) -> tuple[SegmentationFolder, SegmentationFolder, SegmentationFolder]:
    """CamVid's training images without the held-out ones, these, and the validation images.

    Args:
        root: the folder of CamVid.

    Returns:
        Three folders; which images are held out depends on their names alone.

    Raises:
        ValueError: if the data set is not there.

    Example:
        >>> camvid_splits("CamVid")  # doctest: +SKIP
    """
    train, val = (open_folder(root, split, "camvid") for split in ("train", "val"))
    count = min(_HELD_OUT, len(train) // 2)
    chosen = set(hash_order(train.names, 0)[:count])
    rest, held_out = (
        train.subset(i for i, name in enumerate(train.names) if (name in chosen) == wanted)
        for wanted in (False, True)
    )
    return rest, held_out, val


def mild_class_weights(folder: SegmentationFolder) -> np.ndarray:
    """Square roots of the inverse frequencies, with mean one: half-way between all pixels and all labels alike.

    Args:
        folder: the images whose labels are counted.

    Returns:
        One weight per label, as losses take them.

    Example:
        >>> mild_class_weights(open_folder("CamVid", "train", "camvid"))  # doctest: +SKIP
    """
    counts = np.zeros(folder.num_labels)
    for _, labels in folder:
        counts += np.bincount(labels[labels != folder.ignore_label], minlength=folder.num_labels)
    weights = np.sqrt(class_weights(counts, kind="inverse_frequency"))
    return weights / weights.mean()


# What `jaxcrf train --experiment NAME` makes of a data folder.
RECIPES: dict[str, Callable[..., Experiment]] = {"camvid_unary": camvid_unary}


def _scale(scale: str | Scale) -> Scale:
    if isinstance(scale, Scale):
        return scale
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}; expected one of {', '.join(SCALES)}")
    return SCALES[scale]


def _shape(folder: SegmentationFolder) -> tuple[int, int]:
    """That of the first image: CamVid's all have one size."""
    height, width = folder[0][1].shape
    return height, width


def _evaluated(folder: SegmentationFolder, shape: tuple[int, int]) -> Pipeline:
    return Pipeline(folder, batch_size=min(4, len(folder)), size=shape)


def _model(size: Scale, variant: Variant | None, shape: tuple[int, int]) -> ModelConfig:
    return ModelConfig.of(
        "small_fcn",
        11,
        width=size.width,
        reduction=size.reduction,
        refine="convcrf",
        refine_options=convcrf_options(variant, shape),
    )

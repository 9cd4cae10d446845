"""MSRA-10K, PASCAL-S and HKU-IS: what stands out in an image, against all the rest."""

from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxcrf.data.folders.base import (
    FULL,
    Dataset,
    SegmentationFolder,
    check_folder,
    check_split,
    images_in,
    paired,
    remedy,
)
from jaxcrf.data.folders.matlab import read_matlab
from jaxcrf.data.images import read_image

SALIENCY_LABEL_NAMES = ("background", "salient")

_MSRA_LAYOUT = "Imgs/<name>.jpg and Imgs/<name>.png in one folder"
_MSRA_SOURCE = (
    "MSRA-10K can be had from https://mmcheng.net/msra10k/ (the folder is MSRA10K_Imgs_GT inside the archive)"
)
_PASCAL_S_LAYOUT = "datasets/imgs/pascal/<name>.jpg and datasets/masks/pascal/<name>.png"
_PASCAL_S_SOURCE = "PASCAL-S can be had from http://cbs.ic.gatech.edu/salobj/ (the archive is salObj.zip)"
_HKU_IS_LAYOUT = (
    "imgs/<name>.png and gt/<name>.png; the splits are trainImgSet.mat, valImgSet.mat and testImgSet.mat"
)
_HKU_IS_SOURCE = "HKU-IS can be had from https://i.cs.hku.hk/~gbli/deep_saliency.html"


def read_mask(path: Path, name: str) -> Int32[np.ndarray, "height width"]:
    """Reads a saliency mask: salient is what is brighter than half of white.

    Masks are grayscale from 0 to 255, and not always in two tones: edges are smoothed, and in PASCAL-S the
    brightness is the share of the people asked who picked the object.

    Args:
        path: the file.
        name: the example's name, which is not needed.

    Returns:
        Labels, int32 `[H, W]`: 1 where the mask is 128 or more, else 0.

    Raises:
        ValueError: if the file is missing or damaged, has colours, or holds 0 and 1 instead of 0 and 255.

    Example:
        >>> import tempfile
        >>> from jaxcrf.data import write_image
        >>> path = Path(tempfile.mkdtemp()) / "mask.png"
        >>> write_image(path, np.array([[0, 127, 128, 255]], np.uint8))
        >>> read_mask(path, "mask")
        array([[0, 0, 1, 1]], dtype=int32)

    References:
        Li et al., *The Secrets of Salient Object Segmentation*, 2014, whose benchmark halves at 0.5.
    """
    del name
    mask = read_image(path)
    if (mask != mask[..., :1]).any():
        raise ValueError(f"{path}: holds colours; expected a mask in shades of gray, 255 where salient")
    brightest = mask.max()
    if 0 < brightest <= 1:
        raise ValueError(f"{path}: got values of 0 and 1; expected a mask from 0 to 255. Multiply it by 255.")
    return (mask[..., 0] >= 128).astype(np.int32)


def msra10k_folder(root: str | Path, split: str = FULL) -> SegmentationFolder:
    """Opens a folder in the layout of MSRA-10K: one salient object per image, 10 000 images.

    Args:
        root: the folder that holds `Imgs`, or that folder itself.
        split: `full`; the data set has no others.

    Returns:
        The examples, sorted by name.

    Raises:
        ValueError: if the folder is missing or has no images, or an image has no mask.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "Imgs").mkdir()
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "Imgs/101.jpg")
        >>> Image.fromarray(np.full((4, 6), 255, np.uint8)).save(root / "Imgs/101.png")
        >>> msra10k_folder(root)[0][1].tolist()[0]
        [1, 1, 1, 1, 1, 1]

    References:
        Cheng et al., *Global Contrast Based Salient Region Detection*, 2015.
    """
    root = Path(root)
    advice = remedy("MSRA-10K", _MSRA_LAYOUT, _MSRA_SOURCE)
    check_folder(root, advice)
    check_split(root, split, (FULL,), advice)
    images = images_in(_msra_images(root), advice, (".jpg", ".jpeg"))
    return paired(
        images, lambda path: path.with_suffix(".png"), SALIENCY_LABEL_NAMES, advice, label_reader=read_mask
    )


def pascal_s_folder(root: str | Path, split: str = FULL) -> SegmentationFolder:
    """Opens a folder in the layout of PASCAL-S: 850 images, for tests.

    Args:
        root: the folder that holds `datasets`, or that folder itself.
        split: `full`; the data set has no others.

    Returns:
        The examples, sorted by name.

    Raises:
        ValueError: if a folder is missing or empty, or an image has no mask.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("datasets/imgs/pascal", "datasets/masks/pascal"):
        ...     (root / folder).mkdir(parents=True)
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "datasets/imgs/pascal/1.jpg")
        >>> Image.fromarray(np.zeros((4, 6), np.uint8)).save(root / "datasets/masks/pascal/1.png")
        >>> pascal_s_folder(root).names
        ('1',)

    References:
        Li et al., *The Secrets of Salient Object Segmentation*, 2014.
    """
    root = Path(root)
    advice = remedy("PASCAL-S", _PASCAL_S_LAYOUT, _PASCAL_S_SOURCE)
    check_folder(root, advice)
    check_split(root, split, (FULL,), advice)
    data = root / "datasets" if (root / "datasets").is_dir() else root
    for path in (data / "imgs" / "pascal", data / "masks" / "pascal"):
        check_folder(path, advice)
    return paired(
        images_in(data / "imgs" / "pascal", advice),
        lambda image: data / "masks" / "pascal" / f"{image.stem}.png",
        SALIENCY_LABEL_NAMES,
        advice,
        label_reader=read_mask,
    )


def hku_is_folder(root: str | Path, split: str = FULL) -> SegmentationFolder:
    """Opens a folder in the layout of HKU-IS: 4447 images, as a rule with several salient objects.

    Args:
        root: the folder that holds `imgs` and `gt`.
        split: `full`, or `train` (2500), `val` (500) or `test` (1447) where `<split>ImgSet.mat` lists it.

    Returns:
        The examples, sorted by name.

    Raises:
        ValueError: if a folder or list is missing or empty, or an image has no mask.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("imgs", "gt"):
        ...     (root / folder).mkdir(parents=True)
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "imgs/0004.png")
        >>> Image.fromarray(np.zeros((4, 6), np.uint8)).save(root / "gt/0004.png")
        >>> hku_is_folder(root).names
        ('0004',)

    References:
        Li and Yu, *Visual Saliency Based on Multiscale Deep Features*, 2015.
    """
    root = Path(root)
    advice = remedy("HKU-IS", _HKU_IS_LAYOUT, _HKU_IS_SOURCE)
    check_folder(root, advice)
    for part in ("imgs", "gt"):
        check_folder(root / part, advice)
    check_split(root, split, _hku_is_splits(root) or (), advice)
    images = images_in(root / "imgs", advice)
    if split != FULL:
        listing = root / f"{split}ImgSet.mat"
        cells = np.asarray(read_matlab(listing, f"{split}ImgSet"), object).ravel()
        listed = {Path(str(np.asarray(cell).ravel()[0])).name for cell in cells}
        missing = sorted(listed - {image.name for image in images})
        if missing:
            raise ValueError(
                f"{root / 'imgs' / missing[0]}: no such file, though {listing} lists it. {advice}"
            )
        if not listed:
            raise ValueError(f"{listing}: got an empty list; expected one name per row. {advice}")
        images = tuple(image for image in images if image.name in listed)
    return paired(
        images,
        lambda image: root / "gt" / f"{image.stem}.png",
        SALIENCY_LABEL_NAMES,
        advice,
        label_reader=read_mask,
    )


def _msra_images(root: Path) -> Path:
    return root / "Imgs" if (root / "Imgs").is_dir() else root


def _msra_splits(root: Path) -> tuple[str, ...] | None:
    folder = _msra_images(root)
    if not folder.is_dir():
        return None
    # A folder of its own may hold no more than one image without a mask yet, which is an error, not another layout.
    first = next((path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")), None)
    if first is None or (folder == root and not first.with_suffix(".png").is_file()):
        return None
    return (FULL,)


def _pascal_s_splits(root: Path) -> tuple[str, ...] | None:
    found = any((place / "imgs" / "pascal").is_dir() for place in (root / "datasets", root))
    return (FULL,) if found else None


def _hku_is_splits(root: Path) -> tuple[str, ...] | None:
    if not all((root / part).is_dir() for part in ("imgs", "gt")):
        return None
    listed = (split for split in ("train", "val", "test") if (root / f"{split}ImgSet.mat").is_file())
    return (FULL, *listed)


MSRA10K = Dataset("msra10k", "MSRA-10K", _MSRA_LAYOUT, _MSRA_SOURCE, msra10k_folder, _msra_splits)
PASCAL_S = Dataset(
    "pascal_s", "PASCAL-S", _PASCAL_S_LAYOUT, _PASCAL_S_SOURCE, pascal_s_folder, _pascal_s_splits
)
HKU_IS = Dataset("hku_is", "HKU-IS", _HKU_IS_LAYOUT, _HKU_IS_SOURCE, hku_is_folder, _hku_is_splits)

"""The worked example: a photograph that ships with matplotlib and our own annotation of it.

The polygons were drawn by hand for this project, in pixels of the 512 × 600 photograph (x to the right,
y down, pixel centres at halves). They are the reference that `jaxcrf demo` measures against; they are not
part of any data set.
"""

import numpy as np
from matplotlib.cbook import get_sample_data
from matplotlib.path import Path as Polygon
from PIL import Image

LABELS = ("backdrop", "flag", "uniform", "shirt", "hair", "skin", "cap")
COLORS = np.array(
    [
        [141, 176, 214],  # backdrop
        [176, 58, 72],  # flag
        [44, 54, 92],  # uniform
        [236, 238, 240],  # shirt
        [158, 148, 128],  # hair
        [232, 173, 138],  # skin
        [232, 190, 78],  # cap
    ],
    np.uint8,
)

# Painted in this order, the later over the earlier: what is behind comes first, with rough edges where
# something in front will cover them.
# fmt: off
_POLYGONS = (
    ("flag", (
        (0, 0), (232.5, 0), (237, 22), (237, 600), (0, 600),
    )),
    ("hair", (
        (162, 234), (157, 258), (161, 273), (169, 284), (180, 290), (192, 296), (202, 302), (215, 290),
        (200, 230),
    )),
    ("hair", (
        (344, 262), (362, 262), (360.5, 277), (357, 288), (352, 297), (345, 303), (338, 306.5), (330, 305),
    )),
    ("uniform", (
        (204, 311), (198, 317), (192, 325), (184, 332), (167, 342), (147, 349), (130, 355.5), (118, 359.5),
        (99, 362.5), (79, 369.5), (62, 379.5), (54, 381), (46, 390), (40, 404), (36.5, 415), (31.5, 426),
        (29.5, 440), (29, 455), (26.5, 476), (23.5, 495), (19, 523), (14.5, 568), (10.5, 600), (512, 600),
        (512, 448.5), (507, 436), (500, 415), (496, 400), (490.5, 391), (483, 387.5), (472, 380),
        (458, 374), (441, 370), (421, 365.5), (401, 357), (382, 348.5), (360.5, 339), (348, 329),
        (336.5, 320.5), (330, 311.5), (300, 380), (220, 380),
    )),
    ("skin", (
        (158, 183), (154, 192), (153, 201), (155, 214), (159, 222), (163.5, 235), (167, 249), (171, 259),
        (177, 266), (184, 268.5), (190, 264.5), (192, 276), (195, 285), (199, 296), (202.5, 304),
        (204, 312), (204, 357), (216, 379), (231, 394), (244, 410), (250, 407.5), (263, 406), (274, 406),
        (291, 387), (302.5, 374.5), (317, 347.5), (330, 327), (330, 306), (334, 297), (338, 285),
        (341.5, 269), (349, 269), (356, 266), (361, 262), (364.5, 250), (368, 239), (372, 222), (375, 209),
        (376, 197), (374, 188), (369, 182), (361, 182), (340, 120), (190, 120),
    )),
    # Grey at the temples, between the cap and the ears.
    ("hair", (
        (185, 144), (176, 146), (166, 156), (160, 167), (157, 182), (157, 188), (163, 191), (167, 199),
        (171, 210), (175, 216), (180, 208), (181, 197), (178, 186), (177, 179), (180, 170), (182, 155),
    )),
    ("hair", (
        (340, 138), (347, 146), (350, 156), (352, 168), (356, 180), (359, 190), (361, 198), (364, 190),
        (363, 184), (369, 182), (366, 170), (358, 152),
    )),
    ("shirt", (
        (204.5, 314), (201, 320), (198, 332), (196.5, 353), (199, 384), (207.5, 412), (217, 441),
        (226, 432), (237, 419.5), (244.5, 414), (256, 414.5), (268.5, 412), (276, 408), (288, 418),
        (300.5, 431.5), (309.5, 414), (315.5, 398.5), (321, 381.5), (326.5, 364.5), (329.5, 345),
        (330, 328), (317, 347.5), (302.5, 374.5), (291, 387), (274, 406), (263, 406), (250, 407.5),
        (244, 410), (231, 394), (216, 379), (204, 358), (203, 350), (205, 334), (206.5, 322),
    )),
    ("shirt", (
        (249, 447), (241, 463), (228, 477.5), (237, 499), (246, 518), (251, 528.5), (263, 505.5),
        (274.5, 479), (287, 457.5), (287.5, 454.5), (283.5, 446),
    )),
    ("cap", (
        (172.5, 84), (175, 75), (183, 62), (190, 55.5), (199, 49.5), (210, 44), (218.5, 41), (221, 33),
        (230.5, 27.5), (243.5, 23.5), (259.5, 22.5), (278, 24.5), (291, 28.5), (298.5, 34.5), (301.5, 40.5),
        (320, 47), (332, 54), (339, 59.5), (349, 70), (353, 80), (354.5, 86), (359.5, 85.5), (365, 88),
        (368, 96), (370, 118), (372, 137), (370.5, 158), (368.5, 181), (363, 169), (357, 153), (344, 140),
        (328, 133), (304, 130.5), (278, 131), (238, 132), (212, 133), (194, 139), (178, 147), (167.5, 158),
        (160, 167), (157, 182), (151, 182), (151, 112), (157, 103.5), (163, 95), (170, 88), (173, 85.5),
    )),
)
# fmt: on


def photograph() -> np.ndarray:
    """The photograph, uint8 `[600, 512, 3]`.

    Example:
        >>> photograph().shape
        (600, 512, 3)
    """
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return np.asarray(image.convert("RGB"))


def annotation() -> np.ndarray:
    """Our polygons as a label map, int32 `[600, 512]`, with indices into `LABELS`.

    Example:
        >>> annotation()[200, 260] == LABELS.index("skin")
        np.True_
    """
    height, width = 600, 512
    y, x = np.mgrid[:height, :width] + 0.5
    centers = np.stack([x.ravel(), y.ravel()], 1)
    labels = np.zeros((height, width), np.int32)
    for name, corners in _POLYGONS:
        labels[Polygon(corners).contains_points(centers).reshape(height, width)] = LABELS.index(name)
    return labels


def coarsened(
    labels: np.ndarray, num_labels: int, *, factor: int = 8, keep: float = 0.8, seed: int = 0
) -> np.ndarray:
    """Imitates the mistakes of a coarse network.

    The label map is down-sampled, labels are flipped at low resolution, and the result is up-sampled again,
    both times to the nearest neighbour. A flipped label is drawn uniformly from the *other* labels, so that
    `keep` is the fraction of cells that stay right.

    Args:
        labels: the true labels, `[H, W]`.
        num_labels: how many labels there are; at least 2.
        factor: the side of a low-resolution cell, in pixels.
        keep: the probability that a cell keeps its label.
        seed: the seed of the random flips.

    Returns:
        A label map like `labels`.

    Example:
        >>> coarsened(np.zeros((4, 4), int), 2, factor=2, keep=0.5)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [0, 0, 0, 0],
               [0, 0, 0, 0]])

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, section 5.1.
    """
    random = np.random.default_rng(seed)
    height, width = labels.shape
    # The centre of each cell stands for it; the last cells may be cut by the border.
    rows = np.minimum(np.arange(0, height, factor) + factor // 2, height - 1)
    columns = np.minimum(np.arange(0, width, factor) + factor // 2, width - 1)
    small = labels[np.ix_(rows, columns)]
    flip = random.random(small.shape) >= keep
    other = (small + random.integers(1, num_labels, small.shape)) % num_labels
    small = np.where(flip, other, small)
    return small.repeat(factor, 0).repeat(factor, 1)[:height, :width].astype(labels.dtype)

r"""Dense Gaussian CRFs on PASCAL VOC: Tables 2 and 3 of Chandra, Usunier and Kokkinos, 2017.

    python experiments/gaussian_crf_voc.py --data VOCdevkit/VOC2012 --weights resnet101.safetensors --seeds 1
    python experiments/gaussian_crf_voc.py --dataset camvid --data camvid --unary-runs runs
    python experiments/gaussian_crf_voc.py --smoke

Three phases: DeepLab-v2 (ResNet-101 at scales 1, 0.75 and 0.5, maximum) is trained; then the pairwise stream, a
ResNet-101 cut off after res2a, res3a or res4a, by the soft-max loss of pairs of cells; then both through the CRF.
Each has 20 000 iterations of 10 crops of 321 × 321 at rates 1e-3, 1e-3 and 2.5e-4, decaying with power 0.9. The
first phase is the same for all rows and done once per seed. Rows of Table 2, by the size of the embeddings, mIoU on
VOC val, training on `train_aug`, with the unary at 76.30:

| | 64 | 128 | 256 | 512 | | 256 | 512 | 1024 | 2048 |
|---|---|---|---|---|---|---|---|---|---|
| dense, res2a | 76.79 | 76.81 | 76.80 | 76.80 | dense Potts | 76.95 | 76.86 | 77.10 | 76.82 |
| dense, res3a | 76.98 | 76.85 | 76.84 | 76.71 | dense Potts | 76.98 | 76.86 | 77.15 | 76.85 |
| dense, res4a | 76.95 | 77.05 | 76.95 | 76.97 | dense Potts | 76.99 | 77.10 | 77.21 | 76.92 |

Table 3 has, on VOC test, whose truth only the benchmark's server knows: unary 79.0, sparse Potts 79.5, dense 80.1
(res4a, 128), dense Potts 80.3 (res4a, 1024), dense Potts + sparse Potts 80.4. Its networks are rows here, on val.

What the paper leaves open: `λ` is 1; sums over pixels are means (`nn.GaussianCRF(averaged=True)`) and Potts-type
systems are scaled so as to stay definite; 4096 pairs of cells per crop are compared; the edges of sparse layers are
trained in the second phase as well.

Cost: the paper gives 2.5 days on a GTX-1080 for a network, and there are 26. `--rows` takes some of them.

`--dataset camvid` is a small setting for two CPU cores, CAMVID in `gaussian_crf_training.py`: the network of
`recipes.camvid_unary`, which stays as it is, from `--unary-runs` or trained first; a pairwise stream with 16 channels
at its stem, from scratch; embeddings of 32 (general) and 64 numbers; crops of 192 × 256, in the third phase of the 67
held-out images. About four minutes per row and seed on one quiet core.

Output: JSON, a Markdown table, the affinities of reference pixels (fig. 3 and 4), and what the unary and the last two
rows say of four images (fig. 5).
"""

import dataclasses
import functools
from pathlib import Path

from gaussian_crf_training import CAMVID, PAPER, SMOKE, Row, add_arguments, chosen, run_seeds
from training_tables import Splits, camvid_splits, parse, voc_splits

from jaxcrf.data import open_folder

DEPTHS = ("res2a", "res3a", "res4a")

# Table 2: depth → embedding size → mIoU.
DENSE = {
    "res2a": {64: 76.79, 128: 76.81, 256: 76.80, 512: 76.80},
    "res3a": {64: 76.98, 128: 76.85, 256: 76.84, 512: 76.71},
    "res4a": {64: 76.95, 128: 77.05, 256: 76.95, 512: 76.97},
}
POTTS = {
    "res2a": {256: 76.95, 512: 76.86, 1024: 77.10, 2048: 76.82},
    "res3a": {256: 76.98, 512: 76.86, 1024: 77.15, 2048: 76.85},
    "res4a": {256: 76.99, 512: 77.10, 1024: 77.21, 2048: 76.92},
}
REFINEMENTS = {"dense": ("gaussian_crf", DENSE), "dense Potts": ("gaussian_crf_potts", POTTS)}

FULL_ROWS = {
    f"{name} {depth} {size}": Row(refine, {"depth": depth, "embedding_size": size})
    for name, (refine, sizes) in REFINEMENTS.items()
    for depth in DEPTHS
    for size in sizes[depth]
} | {
    "sparse Potts": Row("gaussian_crf_sparse_potts"),
    "dense Potts + sparse Potts": Row("gaussian_crf_stacked"),
}
PAPER_FIGURES = {"unary": 76.30} | {
    f"{name} {depth} {size}": figure
    for name, (_, sizes) in REFINEMENTS.items()
    for depth in DEPTHS
    for size, figure in sizes[depth].items()
}

REDUCED_ROWS = {
    "dense": Row("gaussian_crf", {"embedding_size": 32}),
    "dense Potts": Row("gaussian_crf_potts", {"embedding_size": 64}),
    "sparse Potts": Row("gaussian_crf_sparse_potts"),
    "dense Potts + sparse Potts": Row("gaussian_crf_stacked", {"embedding_size": 64}),
}

# The general kind is in the smoke run of `gaussian_crf_saliency.py`.
SMOKE_ROWS = {"dense Potts + sparse Potts": Row("gaussian_crf_stacked", {"embedding_size": 4})}

SCALES = {"full": (PAPER, FULL_ROWS), "reduced": (CAMVID, REDUCED_ROWS), "smoke": (SMOKE, SMOKE_ROWS)}


def paper_splits(root: Path) -> Splits:
    """VOC with all 10 582 images to train on: no CRF here needs images that the unary has not seen."""
    return dataclasses.replace(voc_splits(root), train=open_folder(root, "train_aug", "voc2012"))


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all rows and seeds, and writes the results."""
    more = functools.partial(add_arguments, scales=SCALES)
    datasets = {"voc2012": paper_splits, "camvid": camvid_splits}
    with parse(__doc__, arguments, splits=datasets, add_arguments=more) as args:
        setting, rows = chosen(args, SCALES)
        run_seeds(
            args,
            "gaussian_crf_voc",
            __file__,
            setting,
            args.splits,
            rows,
            paper=PAPER_FIGURES,
            shown=("unary", *[*rows][-2:]).__contains__,
        )


if __name__ == "__main__":
    main()

r"""Dense Gaussian CRFs on PASCAL Person-Part: Table 4 of Chandra, Usunier and Kokkinos, 2017.

    python experiments/gaussian_crf_parts.py --data VOCdevkit/VOC2012 --weights resnet101.safetensors --seeds 1
    python experiments/gaussian_crf_parts.py --dataset camvid --data camvid --unary-runs runs
    python experiments/gaussian_crf_parts.py --smoke

Background and six parts of people, 1716 images to train on and 1817 to test. The training is that of
`gaussian_crf_voc.py`, with the best networks of its Table 2. The paper's mIoU: DeepLab-v2 64.40, sparse Potts 65.21,
dense 66.10, dense Potts 66.27, dense Potts + sparse Potts 66.31.

Cost: the paper gives 2.5 days on a GTX-1080 for a network.

`--dataset camvid` takes CamVid's labels that are objects, `PARTS`, for parts, and everything else for background: again
seven labels of which six are small. The unary is `recipes.camvid_unary` trained on for a little with these labels;
the rest is as for `gaussian_crf_voc.py --dataset camvid`. About four minutes per row and seed on one quiet core, and a
minute for each seed's unary.

Output: JSON, a Markdown table, affinities of reference pixels, and what the networks say of four images.
"""

import dataclasses
import functools
from pathlib import Path

from gaussian_crf_training import CAMVID, PAPER, SMOKE, Row, add_arguments, chosen, grouped, run_seeds
from training_tables import Splits, camvid_splits, parse

from jaxcrf.data import open_folder

# What CamVid has of things that are not the scene itself.
PARTS = ("pole", "sign", "fence", "car", "pedestrian", "bicyclist")

ROWS = {
    "sparse Potts": Row("gaussian_crf_sparse_potts"),
    "dense": Row("gaussian_crf", {"embedding_size": 128}),
    "dense Potts": Row("gaussian_crf_potts", {"embedding_size": 1024}),
    "dense Potts + sparse Potts": Row("gaussian_crf_stacked", {"embedding_size": 1024}),
}
PAPER_FIGURES = {
    "unary": 64.40,
    "sparse Potts": 65.21,
    "dense": 66.10,
    "dense Potts": 66.27,
    "dense Potts + sparse Potts": 66.31,
}

REDUCED_ROWS = {
    name: dataclasses.replace(row, options={"embedding_size": 32 if name == "dense" else 64})
    for name, row in ROWS.items()
}

SMOKE_ROWS = {"dense Potts": Row("gaussian_crf_potts", {"embedding_size": 4})}

SCALES = {
    "full": (PAPER, ROWS),
    "reduced": (dataclasses.replace(CAMVID, steps=(100, *CAMVID.steps[1:])), REDUCED_ROWS),
    "smoke": (SMOKE, SMOKE_ROWS),
}


def person_part_splits(root: Path) -> Splits:
    """PASCAL Person-Part."""
    train, val = (open_folder(root, split, "person_part") for split in ("train", "val"))
    return Splits(train, train, val, (321, 321), (512, 512))


def main(arguments: list[str] | None = None) -> None:
    """Trains and evaluates all rows and seeds, and writes the results."""
    more = functools.partial(add_arguments, scales=SCALES)
    datasets = {"person_part": person_part_splits, "camvid": camvid_splits}
    with parse(__doc__, arguments, splits=datasets, add_arguments=more) as args:
        setting, rows = chosen(args, SCALES)
        splits: Splits = args.splits
        if args.scale != "full":
            splits = grouped(splits, PARTS, "background", separate=True)
        run_seeds(args, "gaussian_crf_parts", __file__, setting, splits, rows, paper=PAPER_FIGURES)


if __name__ == "__main__":
    main()

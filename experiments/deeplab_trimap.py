r"""How good DeepLab is near object boundaries: fig. 5 of the paper.

    python experiments/deeplab_trimap.py --data VOCdevkit/VOC2012 --runs runs --out results
    python experiments/deeplab_trimap.py --dataset camvid --data camvid --runs runs --out results
    python experiments/deeplab_trimap.py --smoke

Pixel accuracy and mean IoU inside bands of 1 to 40 pixels around void pixels, which outline the objects of PASCAL
VOC, for networks by themselves and with the fully connected CRF, without and with multi-scale features. Where void
pixels do not outline objects, as in CamVid, the bands are around changes of label (`--around`).

The networks are those that `deeplab_voc.py` trained on the same data set, and so are the CRFs' parameters: give it
the same `--runs` and `--seeds`. Nothing is trained here; an image takes as long as its CRF, half a second to one on
two CPU cores.

The paper gives no numbers but curves: near boundaries multi-scale features help a little and the CRF a lot, the more
so the narrower the band. The output is a JSON file with the curves, a Markdown table for some widths and the figure.
Curves are means over the seeds.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from deeplab_voc import NETWORKS, PAIR, SETTINGS, DenseCRF, Reduced, preset_path, trained_networks
from training_tables import Predictor, parse, write

from jaxcrf import evaluation, plots, presets
from jaxcrf.metrics import TrimapCurve
from jaxcrf.training import load_model

# The figure's curves; CamVid's void pixels do not outline objects.
DEFAULTS: dict[str, tuple[tuple[str, ...], Literal["void", "labels"]]] = {
    "full": (("deeplab", "deeplab_msc"), "void"),
    "reduced": (PAIR, "labels"),
    "smoke": (PAIR[:1], "labels"),
}
SHOWN_WIDTHS = (1, 3, 5, 10, 20, 40)


def curves_of_seed(args: argparse.Namespace, seed: int) -> dict[str, TrimapCurve]:
    """The curves of every network by itself and with the CRF."""
    setting = SETTINGS[args.scale]
    curves = {}
    for name in args.networks:
        network = Reduced(load_model(args.runs / f"seed_{seed}" / name).model, setting.reduction)
        crf = DenseCRF(presets.load(preset_path(args, setting, name, seed)))
        result = evaluation.evaluate(
            Predictor(network, args.splits.whole),
            args.splits.val,
            refine=crf,
            around=args.around,
            num_pictures=0,
        )
        assert result.baseline is not None
        curves[name] = result.baseline.trimap
        curves[f"{name} + CRF"] = result.trimap
    return curves


def mean_curve(curves: Sequence[TrimapCurve]) -> TrimapCurve:
    """The mean over seeds; its bands are the same in all."""
    accuracy, mean_iou = (
        np.mean([getattr(curve, field) for curve in curves], 0) for field in ("accuracy", "mean_iou")
    )
    return TrimapCurve(curves[0].widths, accuracy, mean_iou, np.asarray(curves[0].pixels))


def markdown(curves: Mapping[str, TrimapCurve]) -> str:
    """Accuracy and mIoU in percent, for some widths."""
    widths = next(iter(curves.values())).widths
    shown = np.flatnonzero(np.isin(widths, SHOWN_WIDTHS))
    heads = [f"{title}, {widths[i]} px" for title in ("accuracy", "mIoU") for i in shown]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, curve in curves.items():
        cells = [f"{100 * values[i]:.2f}" for values in (curve.accuracy, curve.mean_iou) for i in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def listed(values: np.ndarray) -> list[float | None]:
    """As JSON can hold them: bands without a pixel have no figures."""
    return [None if np.isnan(value) else value for value in np.asarray(values).tolist()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What else can be asked for."""
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="only these rows")
    parser.add_argument("--around", choices=("void", "labels"), help="what the bands are around")


def main(arguments: list[str] | None = None) -> None:
    """Evaluates the networks of all seeds, and writes the results."""
    with parse(__doc__, arguments, add_arguments=add_arguments) as args:
        networks, around = DEFAULTS[args.scale]
        args.networks, args.around = args.networks or networks, args.around or around
        if args.scale == "smoke":
            trained_networks(args, SETTINGS["smoke"], 0)
        else:
            args.runs = args.runs.parents[1] / "deeplab_voc" / args.dataset
        seeds = [curves_of_seed(args, seed) for seed in range(args.seeds)]
        curves = {name: mean_curve([seed[name] for seed in seeds]) for name in seeds[0]}
        rows = {name: {k: listed(v) for k, v in curve._asdict().items()} for name, curve in curves.items()}
        text = markdown(curves)
        print(text)
        write(args, f"deeplab_trimap_{args.around}", __file__, rows, text, around=args.around)
        figure = plots.trimap_curve(curves)
        plots.save_figure(figure, args.out / f"deeplab_trimap_{args.around}_{args.dataset}.png")


if __name__ == "__main__":
    main()

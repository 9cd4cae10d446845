"""The command line: `jaxcrf refine`, `search`, `train`, `evaluate`, `demo` and `info`.

Results go to standard output, progress and complaints to standard error. Exit codes: 0 for success, 1 if
some file could not be refined, 2 if the command line makes no sense, in which case nothing was written.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    import numpy as np

    from jaxcrf.data import SegmentationFolder
    from jaxcrf.evaluation import Evaluation
    from jaxcrf.presets import Preset
    from jaxcrf.training import Experiment, Trial
    from jaxcrf.training.planning import Plan

app = typer.Typer(
    help="Conditional random fields for dense labelling.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback with local variables would print whole arrays.
    pretty_exceptions_enable=False,
)

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
_PROBS_SUFFIXES = (".npy",)

# Results are 8-bit palette files.
_MAX_LABELS = 256

# Advice of the library's that is about its arguments, and what to do on the command line instead.
_ADVICE = {
    "pass a larger max_pixels": "pass a larger --max-pixels",
    "Pass a label map as labels=…, num_labels=…;": "Pass a label map as --labels;",
    "pass unnormalised scores as logits=…": "apply a softmax to unnormalised scores first",
    "or pass scores as logits=…": "or apply a softmax to scores first",
    " or ignore_label=": " or --ignore-label ",
    "Raise num_labels, or name the label to be ignored.": (
        "Raise --num-labels, or name the label to be ignored with --ignore-label."
    ),
}

_T = TypeVar("_T")

_Out = Annotated[Path, typer.Option(help="Folder for the results; made if need be.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that exist already.")]


def main() -> None:
    """Runs the command line; the entry point of the `jaxcrf` script.

    Example:
        >>> import sys
        >>> sys.argv = ["jaxcrf", "--help"]
        >>> main()  # doctest: +SKIP
    """
    app(prog_name="jaxcrf")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jaxcrf {_version('jaxcrf')}")
        raise typer.Exit


@app.callback()
def _jaxcrf(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(no_args_is_help=True)
def refine(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", exists=True, help="Images, or folders of them.")
    ],
    out: _Out,
    probs: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="Probabilities as .npy, \\[height, width, labels], or a folder of files."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(exists=True, help="Label map as palette or grayscale PNG, or a folder of files."),
    ] = None,
    num_labels: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MAX_LABELS, help="How many labels there are; default: the largest found, plus one."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="convcrf: kernels inside a window; densecrf: between all pairs of pixels.")
    ] = "convcrf",
    filter: Annotated[
        str,
        typer.Option(
            help="How densecrf sums over pairs: dense (exact), lattice or landmark; auto: see `jaxcrf info`."
        ),
    ] = "auto",
    preset: Annotated[
        str | None,
        typer.Option(
            help="Parameters: a name that `jaxcrf info` lists, or a .json file; default: the method's own."
        ),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Mean-field iterations; default: the preset's.")
    ] = None,
    ignore_label: Annotated[
        int, typer.Option(help="Label of pixels to fill in from their neighbours.")
    ] = 255,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest image and label map accepted; default: 89 million, against decompression bombs.",
        ),
    ] = None,
    save_probs: Annotated[bool, typer.Option("--save-probs", help="Also write <stem>_probs.npy.")] = False,
    overwrite: _Overwrite = False,
) -> None:
    """Sharpen segmentations along the edges of their images.

    For every image, writes <stem>.png (a palette label map) and <stem>_overlay.png into the output folder.
    With folders or several images, --probs or --labels names a folder with files of the same stems.
    """
    if (probs is None) == (labels is None):
        _refuse("pass exactly one of --probs and --labels: what is to be refined")
    if probs is not None and num_labels is not None:
        _refuse("--num-labels goes with --labels; the file given as --probs says how many labels there are")
    source = probs if probs is not None else labels
    assert source is not None
    paths = _expand(images)
    if len(paths) > 1 and not source.is_dir():
        _refuse(
            f"{'--probs' if probs is not None else '--labels'}: got the file {source} for {len(paths)} images; "
            "pass a folder with files of the same stems"
        )
    outputs = {path: _outputs(path, out, save_probs) for path in paths}
    partners = [_partner(path, source, probs is not None) for path in paths]
    _check_outputs(outputs, [*paths, *(partner for partner in partners if isinstance(partner, Path))])
    written = [name for names in outputs.values() for name in names]
    _check_new(written, overwrite)

    # Whatever may yet be refused is, before anything is written: the folder of the cache included.
    from jaxcrf.refinement import METHODS

    if method not in METHODS:
        _refuse(f"--method: got {method!r}; expected one of {', '.join(METHODS)}")
    if filter != "auto" and filter not in METHODS[method]:
        _refuse(f"--filter: got {filter!r}; --method {method} has auto, {', '.join(METHODS[method])}")
    parameters = _read_preset(preset)
    if labels is not None and num_labels is None:
        files = [partner for partner in partners if isinstance(partner, Path)]
        num_labels = _count_labels(files, ignore_label, max_pixels)
    _prepare_folder(out, written, overwrite)
    _use_compilation_cache()

    failures: list[tuple[Path, str]] = []
    for path, partner in _progress(list(zip(paths, partners, strict=True)), "Refining"):
        try:
            if isinstance(partner, ValueError):
                raise partner
            _refine_one(
                path,
                partner,
                outputs[path],
                num_labels=None if labels is None else num_labels,
                max_pixels=max_pixels,
                method=method,
                filter=filter,
                preset=parameters,
                num_iterations=iterations,
                ignore_label=ignore_label,
            )
        # RuntimeError: XLA's, for instance when the memory of the device does not suffice.
        except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
            failures.append((path, _for_command_line(str(error) or type(error).__name__)))
    print(f"{len(paths) - len(failures)} of {len(paths)} images refined; results in {out}")
    if failures:
        # Most reasons begin with the file that is wrong, which need not be the image.
        lines = [reason if reason.startswith(str(path)) else f"{path}: {reason}" for path, reason in failures]
        _complain(f"{len(failures)} not refined:", *(f"  {line}" for line in lines))
        raise typer.Exit(1)


def _refine_one(
    path: Path,
    partner: Path,
    outputs: Sequence[Path],
    *,
    num_labels: int | None,
    max_pixels: int | None,
    **options: Any,
) -> None:
    import numpy as np

    import jaxcrf
    from jaxcrf.data import read_array, read_image, read_labels, write_array, write_image, write_labels

    image = read_image(path, max_pixels=max_pixels)
    unary = read_array(partner) if num_labels is None else read_labels(partner, max_pixels=max_pixels)
    if unary.ndim != (3 if num_labels is None else 2) or unary.shape[:2] != image.shape[:2]:
        expected = f"{image.shape[0]} x {image.shape[1]}"
        raise ValueError(
            f"{partner}: holds an array of {' x '.join(map(str, unary.shape))}, but the image is {expected} "
            f"(height x width); expected {expected}{' x labels' if num_labels is None else ''}"
        )
    if num_labels is None and unary.shape[2] > _MAX_LABELS:
        raise ValueError(
            f"{partner}: holds probabilities of {unary.shape[2]} labels; the results hold at most "
            f"{_MAX_LABELS}, and the label axis comes last"
        )
    name = "probs" if num_labels is None else "labels"
    known: dict[str, Any] = {name: unary} | ({} if num_labels is None else {"num_labels": num_labels})
    try:
        refined = np.asarray(jaxcrf.refine(image, **known, **options))
    except ValueError as error:
        if not str(error).startswith(f"{name}: "):
            raise
        raise ValueError(f"{partner}: {str(error).removeprefix(f'{name}: ')}") from error
    best = refined.argmax(-1)
    # All is computed before anything is written, so that results come in complete sets.
    overlaid = jaxcrf.plots.overlay(image, best, ignore_label=None)
    write_labels(outputs[0], best)
    write_image(outputs[1], overlaid)
    if len(outputs) > 2:
        write_array(outputs[2], refined)


@app.command(no_args_is_help=True)
def search(
    images: Annotated[
        Path, typer.Option(exists=True, help="Folder of held-out images, or one image.", show_default=False)
    ],
    probs: Annotated[
        Path, typer.Option(exists=True, help="Their probabilities as .npy, \\[height, width, labels].")
    ],
    labels: Annotated[
        Path,
        typer.Option(exists=True, help="Their true labels, palette or grayscale files of the same stems."),
    ],
    out: Annotated[Path, typer.Option(help="File for the best parameters; ends in .json.")],
    method: Annotated[str, typer.Option(help="Inference method: densecrf or convcrf.")] = "densecrf",
    preset: Annotated[
        str | None,
        typer.Option(
            help="Parameters that are not searched: a name that `jaxcrf info` lists, or a .json file; default: "
            "the method's own, with ten iterations for densecrf."
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUES",
            help="A parameter to search and its values, as bilateral_weight=5:1:10 or blur=1,2,4; may be repeated. "
            "Default, for densecrf: the grid of the DeepLab paper.",
        ),
    ] = None,
    coarse: Annotated[
        int, typer.Option(min=1, help="The first round tries every so many values; 1 tries all.")
    ] = 3,
    refinements: Annotated[
        int, typer.Option(min=0, help="How often the steps are halved around the best in the end.")
    ] = 1,
    log: Annotated[
        Path | None,
        typer.Option(
            help="Every finished candidate, one JSON object a line. A search that was interrupted goes on from "
            "it; default: OUT with the suffix .jsonl."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many images, evenly spread over the folder.")
    ] = None,
    ignore_label: Annotated[int, typer.Option(help="True label of pixels that do not count.")] = 255,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest image and label map accepted; default: 89 million, against decompression bombs.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists already.")] = False,
) -> None:
    """Find the parameters that segment held-out images best, by mean IoU.

    Files are paired by their stems. The search is coarse to fine; its result is a file for `jaxcrf refine
    --preset`. Interrupt it at will: the same command goes on where it was.
    """
    paths = _expand([images], "--images")
    if limit is not None and limit < len(paths):
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    if out.suffix.lower() != ".json":
        _refuse(f"--out: got {out}; expected a name that ends in .json, by which --preset will know the file")
    if out.exists() and not overwrite:
        _refuse(f"--out: {out} exists already; pass --overwrite, or choose another name")
    log = out.with_suffix(".jsonl") if log is None else log
    if log.resolve() == out.resolve():
        _refuse(f"--log: {log} is the file for the best parameters; choose another name")
    for option, source in (("--probs", probs), ("--labels", labels)):
        if len(paths) > 1 and not source.is_dir():
            _refuse(f"{option}: got the file {source} for {len(paths)} images; pass a folder")
    files = []
    for path in paths:
        found = [path]
        for source, is_probs in ((probs, True), (labels, False)):
            partner = _partner(path, source, is_probs)
            if isinstance(partner, ValueError):
                _refuse(str(partner))
            found.append(partner)
        files.append(found)
    base = _read_preset(preset)
    space = dict(_read_values(text) for text in vary) if vary else None
    if vary and space is not None and len(space) < len(vary):
        _refuse("--vary: names the same field twice; pass all its values at once, as FIELD=a,b,c")
    from jaxcrf.training.search import read_space

    try:
        read_space(method, base, space)  # type: ignore[arg-type]
    except ValueError as error:
        _refuse(
            f"--{error}"
            if str(error).startswith("method")
            else f"--vary: {str(error).removeprefix('space: ')}"
        )
    for option, folder in (("--out", out.parent), ("--log", log.parent)):
        reason = _make_writable(folder)
        if reason:
            _refuse(f"{option}: {folder} cannot be written to ({reason}); choose another folder")
    _use_compilation_cache()

    from rich.console import Console
    from rich.table import Table

    import jaxcrf
    from jaxcrf.data import read_array, read_image, read_labels

    def examples() -> "Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]":
        for image, unary, truth in files:
            yield (
                read_image(image, max_pixels=max_pixels),
                read_array(unary),
                read_labels(truth, max_pixels=max_pixels),
            )

    recalled = 0

    def count(trial: "Trial") -> None:
        nonlocal recalled
        recalled += trial.recalled

    try:
        result = jaxcrf.training.search(
            examples,
            method=method,  # type: ignore[arg-type]
            preset=base,
            space=space,
            ignore_label=ignore_label,
            coarse=coarse,
            refinements=refinements,
            log=log,
            on_trial=count,
        )
        jaxcrf.presets.save(result.best, out)
    # RuntimeError: XLA's, for instance when the memory of the device does not suffice.
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        _complain(f"Error: {_name_files(_for_command_line(str(error) or type(error).__name__), files)}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _complain(f"Interrupted; what was finished is in {log}, and the same command goes on from there")
        raise typer.Exit(130) from None

    console = Console(highlight=False)
    table = Table("parameter", "best")
    for name in result.trials[0].parameters:
        edge = "  (at the end of its range)" if name in result.at_edge else ""
        table.add_row(name, f"{getattr(result.best, name)}{edge}")
    table.add_row("[bold]mean IoU[/]", f"[bold]{result.score:.2%}[/]  (unrefined {result.unrefined:.2%})")
    console.print(table)
    known = f", {recalled} of them known from {log}" if recalled else ""
    print(f"{len(result.trials)} candidates on {len(files)} images{known}")
    print(f"wrote {out}; use it with --method {method} --preset {out}")


def _read_values(text: str) -> "tuple[str, list[Any]]":
    """Reads `field=first:step:last` or `field=a,b,c`."""
    from decimal import Decimal, InvalidOperation

    name, separator, values = text.partition("=")
    parts = [part.strip() for part in values.split(",")]

    def number(part: str) -> Any:
        try:
            value = Decimal(part)
        except InvalidOperation:
            return None if part.lower() == "none" and name == "bilateral_position_bandwidth" else part
        whole = value.is_finite() and value == value.to_integral_value()
        return int(value) if whole else float(value)

    if not separator or not all(parts):
        _refuse(f"--vary: got {text!r}; expected FIELD=first:step:last or FIELD=a,b,c")
    if ":" not in values:
        return name, [number(part) for part in parts]
    try:
        first, step, last = (Decimal(part) for part in values.split(":"))
        count = int((last - first) / step) + 1
        # Also where a number is infinite or not a number, which does not compare.
        if not (step > 0 and 0 < count <= 10_000):
            raise ValueError
    except (ArithmeticError, ValueError):
        _refuse(f"--vary: got {text!r}; expected first:step:last with a step above 0, as in 5:0.5:10")
    return name, [number(str(first + i * step)) for i in range(count)]


def _name_files(message: str, files: Sequence[Sequence[Path]]) -> str:
    """Puts the files' names where the library counts examples."""
    start, _, rest = message.partition(": ")
    word, _, number = start.partition(" ")
    if word != "example" or not number.isdigit():
        return message
    image, probs, labels = files[int(number)]
    for name, path in (("image", image), ("probs", probs), ("labels", labels)):
        if rest.startswith(f"{name}: "):
            return f"{path}: {rest.removeprefix(f'{name}: ')}"
    return f"{image}: {rest}"


@app.command(no_args_is_help=True)
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.py",
            exists=True,
            dir_okay=False,
            help="A Python file with a function experiment(data, seed), which returns a jaxcrf.training.Experiment.",
            show_default=False,
        ),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(help="An experiment that comes with the package, instead of a file: camvid_unary."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the data set.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run: checkpoints, log, curves and, in the end, the model.", show_default=False
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="With --experiment, how large: cpu (default), gpu or smoke.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of parameters, order and augmentation.")] = 0,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Over how many devices batches are split; default: all there are."),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="Run as one of several processes that meet there; auto asks the cluster, if JAX knows its kind.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --coordinator HOST:PORT, how many processes there are.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, help="With --coordinator HOST:PORT, which one this is, from 0.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print shapes, parameters, memory and arithmetic of a step, and train nothing."
        ),
    ] = False,
) -> None:
    """Train a model, or go on where an earlier run of the same experiment in the same folder stopped.

    Interrupt it at will: the same command goes on, and ends with the very numbers of a run without interruption.
    """
    if (config is None) == (experiment is None):
        _refuse("pass exactly one of CONFIG.py and --experiment: what is to be trained")
    if scale is not None and experiment is None:
        _refuse("--scale goes with --experiment; a CONFIG.py says itself how large it is")
    if out is None and not dry_run:
        _refuse("--out: say where checkpoints and the model go, or pass --dry-run")
    if (coordinator is None or coordinator == "auto") and not (processes is None and process is None):
        _refuse("--processes and --process go with --coordinator HOST:PORT")
    if coordinator not in (None, "auto") and (processes is None or process is None):
        _refuse("--coordinator HOST:PORT needs --processes and --process; or pass --coordinator auto")
    if out is not None and not dry_run:
        reason = _make_writable(out)
        if reason:
            _refuse(f"--out: {out} cannot be written to ({reason}); choose another folder")
    if coordinator is not None:
        import jax

        known = {} if coordinator == "auto" else {"coordinator_address": coordinator}
        jax.distributed.initialize(**known, num_processes=processes, process_id=process)  # type: ignore[arg-type]
    _use_compilation_cache()
    try:
        from jaxcrf.training import save_model
        from jaxcrf.training import train as run_experiment
        from jaxcrf.training.planning import plan
    except ImportError as error:
        _refuse(f"training needs further packages ({error}); install jaxcrf[train]")
    chosen = _read_experiment(config, experiment, data, seed, scale)
    if dry_run:
        try:
            found = plan(chosen, num_devices=devices)
        except (ValueError, OSError, RuntimeError) as error:
            _complain(f"Error: {error}")
            raise typer.Exit(1) from error
        _print_plan(chosen, found)
        return
    assert out is not None
    try:
        run = run_experiment(chosen, out, num_devices=devices)
        import jax

        if jax.process_index() == 0:
            save_model(
                out / "model",
                run.model,
                label_names=chosen.label_names,
                ignore_label=chosen.ignore_label,
                figures=run.figures,
                notes=f"Trained as the experiment {chosen.name}, {chosen.num_steps} steps.",
                overwrite=True,
            )
    except KeyboardInterrupt as error:
        _complain("interrupted; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from error
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        _complain(f"Error: {error}")
        raise typer.Exit(1) from error
    figures = ", ".join(f"{name} {value:.4f}" for name, value in run.figures.items())
    print(f"{chosen.num_steps} steps done{': ' if figures else ''}{figures}; the model is in {out / 'model'}")


def _read_experiment(
    config: Path | None, name: str | None, data: Path | None, seed: int, scale: str | None
) -> "Experiment":
    """The experiment of a file, or that of a name."""
    from jaxcrf.training import Experiment
    from jaxcrf.training.recipes import RECIPES

    if name is not None:
        if name not in RECIPES:
            _refuse(f"--experiment: got {name!r}; expected one of {', '.join(RECIPES)}")
        if data is None:
            _refuse(f"--data: {name} needs the folder of its data set")
        try:
            return RECIPES[name](data, seed=seed, **({} if scale is None else {"scale": scale}))
        except ValueError as error:
            _refuse(str(error))
    import runpy

    try:
        make = runpy.run_path(str(config)).get("experiment")
        found = make(data, seed) if callable(make) else make
    # Whatever the file raises is about the file.
    except Exception as error:
        _refuse(f"{config}: {type(error).__name__}: {error}")
    if not isinstance(found, Experiment):
        _refuse(
            f"{config}: expected a function experiment(data, seed) that returns a jaxcrf.training.Experiment; got "
            f"{'nothing of that name' if make is None else type(found).__name__}"
        )
    return found


def _print_plan(experiment: "Experiment", found: "Plan") -> None:
    """What a dry run found out, as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table("what", "value", title=experiment.name)
    for split, pipeline in experiment.data.items():
        facts.add_row(f"examples, {split}", f"{len(pipeline.source):,}")
    for array, shape in {**found.shapes, "logits": found.logits}.items():
        facts.add_row(f"shape of {array}", " x ".join(map(str, shape)))
    facts.add_row("devices", str(found.devices))
    facts.add_row("steps", f"{found.num_steps:,}")
    for part, count in found.params.items():
        facts.add_row(f"parameters, {part}", f"{count:,}")
    facts.add_row("parameters", f"{sum(found.params.values()):,}")
    console.print(facts)
    updates = Table(
        "update", "trains", "state and batch, MiB", "while it runs, MiB", "Gflop", title="per device"
    )
    for name, entry in found.updates.items():
        updates.add_row(
            name,
            f"{entry.trained:,}",
            f"{entry.arguments / 2**20:.1f}",
            f"{entry.temporaries / 2**20:.1f}",
            f"{entry.operations / 1e9:.1f}",
        )
    console.print(updates)
    stages = Table("stage", "steps", "updates in turn", "data", title="stages")
    for stage in experiment.stages[:20]:
        stages.add_row(
            stage.name,
            f"{stage.num_steps:,}",
            ", ".join(update.name for update in stage.updates),
            stage.split,
        )
    if len(experiment.stages) > 20:
        stages.add_row(f"and {len(experiment.stages) - 20} more", "", "", "")
    console.print(stages)


@app.command(no_args_is_help=True)
def evaluate(
    data: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="Folder of a data set in a known layout."),
    ],
    out: Annotated[Path, typer.Option(help="File for the report; ends in .html.")],
    split: Annotated[
        str | None, typer.Option(help="Part of the data set; default: val, or the only one.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Which data set it is; default: found out from the layout.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of what was predicted: label maps as palette or grayscale files, or probabilities as .npy, "
            "\\[height, width, labels], named like the images.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a trained model, or of its training run."),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Refine by convcrf or densecrf, and compare before with after."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Parameters for --refine: a name that `jaxcrf info` lists, or a .json file; default: the method's own."
        ),
    ] = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="File for all numbers; default: OUT with the suffix .json."),
    ] = None,
    around: Annotated[
        str,
        typer.Option(
            help="What the curve near boundaries is around: labels, changes of label; or void, which outlines the "
            "objects of PASCAL VOC."
        ),
    ] = "labels",
    background: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="A label that is no object for tagging, localisation and boundary accuracy, as 0 is for PASCAL VOC; "
            "default: none.",
        ),
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="How many of the worst images to show, and of the best.")
    ] = 4,
    batch_size: Annotated[
        int, typer.Option(min=1, help="How many images of one size a model sees at a time.")
    ] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many images, evenly spread over the data set.")
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1, help="Largest prediction accepted; default: 89 million, against decompression bombs."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the input, say what would be done, and write nothing."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that exist already.")
    ] = False,
) -> None:
    """Measure predictions or a trained model, and write a report with tables, curves and pictures.

    The report is one HTML file that needs nothing else; all its numbers are written beside it as JSON.
    """
    if (predictions is None) == (checkpoint is None):
        _refuse("pass exactly one of --predictions and --checkpoint: what is to be evaluated")
    if out.suffix.lower() not in (".html", ".htm"):
        _refuse(f"--out: got {out}; expected a name that ends in .html")
    numbers = out.with_suffix(".json") if json_out is None else json_out
    if numbers.resolve() == out.resolve():
        _refuse(f"--json: {numbers} is the report; choose another name")
    if around not in ("labels", "void"):
        _refuse(f"--around: got {around!r}; expected labels or void")
    if preset is not None and refine is None:
        _refuse("--preset goes with --refine: it says how")
    if refine is not None:
        from jaxcrf.refinement import METHODS

        if refine not in METHODS:
            _refuse(f"--refine: got {refine!r}; expected one of {', '.join(METHODS)}")
    parameters = _read_preset(preset)
    from jaxcrf.data import open_folder

    try:
        source = open_folder(data, split, dataset)
    except ValueError as error:
        _refuse(f"--data: {error}")
    if limit is not None and limit < len(source):
        source = source.subset(i * len(source) // limit for i in range(limit))
    if not len(source):
        _refuse(f"--data: {data} has no images in this split; choose another")
    num_labels = len(source.label_names)
    if background is not None and background >= num_labels:
        _refuse(f"--background: got {background}; the data set has the labels 0 to {num_labels - 1}")
    files = [] if predictions is None else _stored(predictions, source.names)
    _check_no_input([out, numbers], [*source.image_paths, *source.label_paths, *files])
    _check_new([out, numbers], overwrite)
    _use_compilation_cache()

    import jaxcrf
    from jaxcrf import evaluation
    from jaxcrf.data import read_array, read_labels

    failures = (ValueError, TypeError, OSError, MemoryError, RuntimeError)
    index = iter(range(len(source)))

    def read(_: Any) -> "np.ndarray":
        path = files[next(index)]
        return read_array(path) if path.suffix == ".npy" else read_labels(path, max_pixels=max_pixels)

    predict: Any = read
    lines = []
    if checkpoint is not None:
        try:
            saved = jaxcrf.training.load_model(checkpoint)
            predict = evaluation.make_predictor(saved.model)
        # ImportError: where the packages for training are not installed.
        except (*failures, ImportError) as error:
            _complain(f"Error: {_for_command_line(str(error) or type(error).__name__)}")
            raise typer.Exit(1) from error
        known = tuple(saved.label_names)
        if known and known != tuple(source.label_names):
            _refuse(
                f"--checkpoint: {checkpoint} was trained for the labels {', '.join(known)}, but {data} has "
                f"{', '.join(source.label_names)}; evaluate it on the data set that it was trained for"
            )

    def refined(image: "np.ndarray", prediction: "np.ndarray") -> Any:
        given: dict[str, Any] = {"probs": prediction}
        if prediction.ndim == 2:
            given = {"labels": prediction, "num_labels": num_labels, "ignore_label": source.ignore_label}
        options: dict[str, Any] = {"method": refine, "preset": parameters}
        return jaxcrf.refine(image, **given, **options)

    if dry_run:
        try:
            lines = _plan_evaluation(source, predict, batch_size if checkpoint is not None else None)
        except failures as error:
            _complain(f"Error: {_for_command_line(str(error) or type(error).__name__)}")
            raise typer.Exit(1) from error
        for line in (
            f"data        {data}: {len(source)} images, {num_labels} labels",
            f"predictions {checkpoint or predictions}",
            *lines,
            f"refinement  {refine or 'none'}",
            f"would write {out} and {numbers}",
        ):
            print(line)
        return
    for option, folder in (("--out", out.parent), ("--json", numbers.parent)):
        reason = _make_writable(folder)
        if reason:
            _refuse(f"{option}: {folder} cannot be written to ({reason}); choose another folder")

    # Every step of this iterator is one more image on the bar.
    bar = _progress(range(len(source)), "Evaluating")
    next(bar)
    try:
        result = evaluation.evaluate(
            predict,
            source,
            batch_size=None if checkpoint is None else batch_size,
            refine=None if refine is None else refined,
            around=around,  # type: ignore[arg-type]
            background=background,
            num_pictures=pictures,
            on_image=lambda _: next(bar, None),
        )
        what = f"{checkpoint or predictions} on {data}" + (f", {split}" if split else "")
        how = "" if refine is None else f"; refined by {refine}{f' ({preset})' if preset else ''}"
        result.save_html(out, title="Evaluation", notes=f"{what}{how}", source=jaxcrf.__file__)
        result.save_json(numbers, source=jaxcrf.__file__)
    # RuntimeError: XLA's, for instance when the memory of the device does not suffice.
    except failures as error:
        bar.close()  # type: ignore[attr-defined]
        _complain(f"Error: {_for_command_line(str(error) or type(error).__name__)}")
        raise typer.Exit(1) from error
    _print_evaluation(result)
    print(f"wrote {out} and {numbers}")


def _print_evaluation(result: "Evaluation") -> None:
    import math

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def percent(value: float) -> str:
        return "–" if math.isnan(value) else f"{100 * value:.2f} %"

    before = None if result.baseline is None else result.baseline
    columns = ["", "result"] if before is None else ["", "before", "after"]
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in result.totals().items():
        earlier = [] if before is None else [percent(before.totals()[name])]
        table.add_row(name.replace("_", " "), *earlier, percent(value))
    table.add_section()
    earlier_rows = None if before is None else before.table()
    for row in result.table():
        earlier = [] if earlier_rows is None else [percent(earlier_rows[row.label].iou)]
        table.add_row(Text(f"IoU {row.name}"), *earlier, percent(row.iou))
    Console(highlight=False).print(table)


def _plan_evaluation(source: "SegmentationFolder", predict: Any, batch_size: int | None) -> list[str]:
    """What is known before anything is evaluated; reads the first image, and of stored predictions the first."""
    import jax
    import numpy as np

    image, _ = source[0]
    lines = [f"first image {source.names[0]}: {' x '.join(map(str, image.shape))}"]
    if batch_size is None:
        prediction = np.asarray(predict(image))
        return [
            *lines,
            f"prediction  {' x '.join(map(str, prediction.shape))}, {prediction.dtype}",
        ]
    compiled = predict.lower(jax.ShapeDtypeStruct((batch_size, *image.shape), image.dtype)).compile()
    shape = " x ".join(map(str, jax.tree.leaves(compiled.out_info)[0].shape))
    count = sum(leaf.size for leaf in jax.tree.leaves(predict.state))
    lines += [f"prediction  {shape}", f"parameters  {count:,}"]
    memory = compiled.memory_analysis()
    # Not every backend knows.
    if memory is not None:
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        lines.append(f"memory      {needed / 2**20:.0f} MiB for a batch of {batch_size}, as compiled")
    return lines


def _stored(folder: Path, names: Sequence[str]) -> list[Path]:
    """The prediction of every image; it is refused if one is missing, or there are two."""
    found, missing = [], []
    for name in names:
        # Not with_suffix, which would take the end of a stem with a dot in it for a suffix.
        files = [folder / f"{name}{suffix}" for suffix in (*_LABEL_SUFFIXES, *_PROBS_SUFFIXES)]
        files = [path for path in files if path.is_file()]
        if len(files) > 1:
            _refuse(f"--predictions: holds both {files[0]} and {files[1]}; remove the one that is not meant")
        if files:
            found.append(files[0])
        else:
            missing.append(name)
    if missing:
        more = f" (nor those of {len(missing) - 1} more)" if len(missing) > 1 else ""
        _refuse(
            f"--predictions: {folder} holds no {missing[0]}{_LABEL_SUFFIXES[0]} and no {missing[0]}{_PROBS_SUFFIXES[0]}"
            f"{more}, of {len(names)} images; add the predictions, or choose a --split that they are of"
        )
    return found


def _check_no_input(outputs: Sequence[Path], inputs: "Sequence[Path | None]") -> None:
    taken = {path.resolve(): path for path in inputs if path is not None}
    for name in outputs:
        if name.resolve() in taken:
            _refuse(f"--out: {name} would replace the input {taken[name.resolve()]}; choose another name")


@app.command(no_args_is_help=True)
def demo(
    out: _Out,
    method: Annotated[str, typer.Option(help="convcrf or densecrf.")] = "convcrf",
    overwrite: _Overwrite = False,
) -> None:
    """Refine a coarse, noisy annotation of a photograph, measure it, and draw demo.png.

    The photograph ships with matplotlib. The reference is our own polygon annotation of it; the input is
    that annotation at an eighth of the resolution with a fifth of its cells replaced at random.
    """
    from jaxcrf.refinement import METHODS

    if method not in METHODS:
        _refuse(f"--method: got {method!r}; expected one of {', '.join(METHODS)}")
    _prepare_folder(out, [out / "demo.png"], overwrite)
    cache = _use_compilation_cache()
    import time

    import jax
    from rich.console import Console
    from rich.table import Table

    import jaxcrf
    from jaxcrf import _demo
    from jaxcrf.data import corrupt_labels

    try:
        image, truth = _demo.photograph(), _demo.annotation()
    except OSError as error:
        # Some distributions ship matplotlib without its sample data.
        _complain(f"Error: the photograph is missing from this matplotlib ({error}); install it from PyPI")
        raise typer.Exit(1) from error
    num_labels = len(_demo.LABELS)
    noisy = corrupt_labels(0, truth, num_labels)

    def run() -> "tuple[np.ndarray, float]":
        start = time.perf_counter()
        options: dict[str, Any] = {"method": method}
        probs = jax.block_until_ready(jaxcrf.refine(image, labels=noisy, num_labels=num_labels, **options))
        return probs.argmax(-1), time.perf_counter() - start

    _, first = run()
    refined, again = run()

    def scores(labels: "np.ndarray") -> tuple[float, float]:
        cm = jaxcrf.metrics.confusion_matrix(truth, labels, num_labels)
        return 100 * float(jaxcrf.metrics.pixel_accuracy(cm)), 100 * float(jaxcrf.metrics.mean_iou(cm))

    before, after = scores(noisy), scores(refined)
    figure = jaxcrf.plots.refinement_figure(
        image,
        truth,
        noisy,
        refined,
        titles=(
            "photograph",
            f"input · {before[0]:.1f} % correct",
            f"refined · {after[0]:.1f} % correct",
            "difference",
        ),
        palette=_demo.COLORS,
        label_names=_demo.LABELS,
    )
    note = "measured against our own polygon annotation"
    figure.text(0.006, 0.1, note, fontsize=8, color="#666666")
    jaxcrf.plots.save_figure(figure, out / "demo.png", dpi=200)

    console = Console(highlight=False)
    console.print("Measured against our own polygon annotation of the photograph:")
    table = Table("")
    table.add_column("pixel accuracy", justify="right")
    table.add_column("mean IoU", justify="right")
    table.add_column("time", justify="right")
    table.add_row("noisy input", f"{before[0]:.2f} %", f"{before[1]:.2f} %", "")
    table.add_row(
        "[bold]refined[/]", f"[bold]{after[0]:.2f} %[/]", f"[bold]{after[1]:.2f} %[/]", f"{again:.3f} s"
    )
    console.print(table)
    device = jax.devices()[0]
    console.print(f"{image.shape[0]} x {image.shape[1]} pixels, {num_labels} labels, on {device.device_kind}")
    loading = "compile, or load from the cache" if cache else "compile"
    console.print(f"  {max(first - again, 0):7.3f} s  to {loading} (first call less a second one)")
    console.print(f"  {again:7.3f} s  to run (second call)")
    print(f"wrote {out / 'demo.png'}")


@app.command()
def info() -> None:
    """Print versions, devices, implementations, the cache folder and the presets."""
    cache = _use_compilation_cache()
    import importlib
    import pkgutil
    import platform

    import jax
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    import jaxcrf_kernels
    from jaxcrf import presets
    from jaxcrf.filters import select_filter
    from jaxcrf.filters.selection import EXACT_PIXELS

    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for package in ("jaxcrf", "jax", "jaxlib"):
        table.add_row(package, _version(package))
    table.add_row("python", platform.python_version())
    for device in jax.devices():
        table.add_row(f"{device.platform}:{device.id}", Text(device.device_kind))
    # Every folder of the kernels is an operation that names the implementation it would use.
    for module in pkgutil.iter_modules(jaxcrf_kernels.__path__):
        if module.ispkg:
            operation = importlib.import_module(f"jaxcrf_kernels.{module.name}")
            table.add_row(module.name, operation.select_implementation())
    exact = EXACT_PIXELS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    table.add_row("densecrf --filter auto", f"dense up to {exact} pixels, {select_filter(exact + 1)} beyond")
    table.add_row("compilation cache", Text(str(cache) if cache else "off (the folder cannot be written to)"))
    console.print(table)
    console.print()

    table = Table("preset", "parameters")
    for name in presets.names():
        table.add_row(name, Text(presets.get(name).summary))
    console.print(table)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed: run from its source)"


def _complain(*lines: str) -> None:
    # Not rich: it would wrap paths at the width of the terminal and read [brackets] in them as markup.
    for line in lines:
        typer.echo(line, err=True)


def _read_preset(name: str | None) -> "Preset | str | None":
    """A preset by name or from a file, which is read here and now; names are handed on."""
    from jaxcrf import presets

    if name is None or name in presets.names():
        return name
    try:
        return presets.get(name)
    except ValueError as error:
        _refuse(f"--preset: {str(error).removeprefix('preset: ')}")


def _refuse(message: str) -> NoReturn:
    _complain(f"Error: {message}")
    raise typer.Exit(2)


def _expand(inputs: Sequence[Path], name: str = "IMAGE") -> list[Path]:
    """The images named, those of folders in the order of their names, each file once."""
    found: dict[Path, Path] = {}
    for path in inputs:
        files = [path]
        if path.is_dir():
            files = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
            )
            if not files:
                _refuse(f"{name}: the folder {path} holds no images ({', '.join(_IMAGE_SUFFIXES)})")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _partner(image: Path, source: Path, is_probs: bool) -> Path | ValueError:
    """The file to be refined with an image, or what is wrong with it: one file does not stop the others."""
    if not source.is_dir():
        return source
    suffixes = _PROBS_SUFFIXES if is_probs else _LABEL_SUFFIXES
    for suffix in suffixes:
        # Not with_suffix, which would take the end of a stem with a dot in it for a suffix.
        path = source / f"{image.stem}{suffix}"
        if path.is_file():
            return path
    return ValueError(
        f"{source} holds no {image.stem}{suffixes[0]} to go with it; add it or leave the image out"
    )


def _outputs(image: Path, out: Path, save_probs: bool) -> list[Path]:
    names = [f"{image.stem}.png", f"{image.stem}_overlay.png"]
    return [out / name for name in (*names, *([f"{image.stem}_probs.npy"] if save_probs else []))]


def _check_outputs(outputs: dict[Path, list[Path]], inputs: Sequence[Path]) -> None:
    """Refuses runs in which one result would replace another, or an input."""
    taken = {path.resolve(): path for path in inputs}
    writers: dict[str, Path] = {}
    for image, names in outputs.items():
        for name in names:
            if name.resolve() in taken:
                _refuse(
                    f"--out: {name} would replace the input {taken[name.resolve()]}; choose another folder"
                )
            # Some file systems do not tell upper from lower case.
            other = writers.setdefault(name.name.casefold(), image)
            if other is not image:
                _refuse(
                    f"IMAGE: {other} and {image} would both write {name}; rename one, or refine them into "
                    "different folders"
                )


def _check_new(outputs: Sequence[Path], overwrite: bool) -> None:
    existing = [path for path in outputs if path.exists()]
    if existing and not overwrite:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        _refuse(f"--out: {existing[0]} exists already{more}; pass --overwrite, or choose another folder")


def _prepare_folder(out: Path, outputs: Sequence[Path], overwrite: bool) -> None:
    _check_new(outputs, overwrite)
    reason = _make_writable(out)
    if reason:
        _refuse(f"--out: {out} cannot be written to ({reason}); choose another folder")


def _make_writable(folder: Path) -> str | None:
    """Makes a folder if need be; returns why it cannot be written to, or None."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _count_labels(paths: Sequence[Path], ignore_label: int, max_pixels: int | None) -> int:
    """The largest label in any of the files, plus one, unless that number cannot be what is meant.

    Files that cannot be read are reported when their turn comes.
    """
    from jaxcrf.data import read_labels

    largest = -1
    for path in paths:
        try:
            labels = read_labels(path, max_pixels=max_pixels)
        except ValueError:
            continue
        found = int(labels.max(where=labels != ignore_label, initial=0))
        if found >= _MAX_LABELS:
            _refuse(
                f"--labels: {path} holds label {found}, but there can be at most {_MAX_LABELS} labels, 0 to "
                f"{_MAX_LABELS - 1}; renumber them (0, 1, 2, …), or pass --ignore-label {found} if it marks "
                "pixels to fill in, or --num-labels to go on without the files that hold larger ones"
            )
        largest = max(largest, found)
    if largest == 0:
        _refuse(
            f"--labels: no label but 0 was found (the --ignore-label, {ignore_label}, does not count), so there "
            "is nothing to refine. Labels are indices 0, 1, 2, …: rescale a 0/255 mask to 0/1 (with "
            "--ignore-label -1 if none of its pixels are to be filled in), or pass --num-labels if there are "
            "labels that these files do not show"
        )
    # Without any file that can be read, the number does not matter.
    return max(largest, 0) + 1


def _for_command_line(message: str) -> str:
    for ours, theirs in _ADVICE.items():
        message = message.replace(ours, theirs)
    return message


def _progress(items: Sequence[_T], title: str) -> Iterator[_T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, description=title)


def _use_compilation_cache() -> Path | None:
    """Keeps compiled programs between runs; returns where, or None if no such folder can be had.

    Only the command line does this: a library has no business writing to its users' folders.
    """
    import jax
    import platformdirs

    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or platformdirs.user_cache_dir("jaxcrf"))
    if _make_writable(folder):
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX stores nothing that compiles within a second, which is most of what runs here.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder

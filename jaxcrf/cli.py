"""The command line: `jaxcrf refine`, `jaxcrf demo` and `jaxcrf info`.

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
    method: Annotated[str, typer.Option(help="Inference method.")] = "convcrf",
    preset: Annotated[
        str | None, typer.Option(help="Named parameters, listed by `jaxcrf info`; default: the method's own.")
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
    from jaxcrf import presets
    from jaxcrf.refinement import METHODS

    if method not in METHODS:
        _refuse(f"--method: got {method!r}; expected one of {', '.join(METHODS)}")
    if preset is not None and preset not in presets.names():
        _refuse(f"--preset: got {preset!r}; expected one of {', '.join(presets.names())}")
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
                preset=preset,
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
def demo(out: _Out, overwrite: _Overwrite = False) -> None:
    """Refine a coarse, noisy annotation of a photograph, measure it, and draw demo.png.

    The photograph ships with matplotlib. The reference is our own polygon annotation of it; the input is
    that annotation at an eighth of the resolution with a fifth of its cells replaced at random.
    """
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
        probs = jax.block_until_ready(jaxcrf.refine(image, labels=noisy, num_labels=num_labels))
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


def _refuse(message: str) -> NoReturn:
    _complain(f"Error: {message}")
    raise typer.Exit(2)


def _expand(inputs: Sequence[Path]) -> list[Path]:
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
                _refuse(f"IMAGE: the folder {path} holds no images ({', '.join(_IMAGE_SUFFIXES)})")
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

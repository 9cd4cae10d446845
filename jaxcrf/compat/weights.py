"""Weights of VGG-16 and ResNets with torchvision's names, into models and out of them.

The last layers of classification networks are left out. What counts are names and shapes, so that files of torchvision,
of scripts that train its networks, and of this module do alike. The networks take images as torchvision's do, red first
and divided by ImageNet's deviations; weights converted from Caffe expect blue first, and numbers in 0 … 255.
"""

import dataclasses
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from jaxcrf.compat.state_dicts import read_state_dict, write_state_dict
from jaxcrf.models.parameters import named_leaves
from jaxcrf.models.resnet import ResNet
from jaxcrf.models.vgg import VGG16

__all__ = ["Loaded", "export", "load", "read_state_dict", "write_state_dict"]

# What a backbone's entries look like, behind the name of the module that has it in a larger network.
_FAMILIES: dict[type[nnx.Module], re.Pattern[str]] = {
    VGG16: re.compile(r"(.*\.)?features\.\d+\.\w+"),
    ResNet: re.compile(r"(.*\.)?layer\d+\.\d+\..*"),
}
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` did; as a string, in a few lines.

    Attributes:
        loaded: the paths of the parameters and statistics that were set, as `backbone/conv1_1/kernel`.
        not_set: the paths of the others, which are as they were.
        unused: the entries of the weights that went nowhere, the last layer for one. Counters of batches
            (`num_batches_tracked`), which no network here has, are not among them.
    """

    loaded: tuple[str, ...]
    not_set: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} arrays loaded\nnot set: {_listed(self.not_set)}\n"
            f"unused entries: {_listed(self.unused)}"
        )


def load(
    model: nnx.Module,
    weights: str | os.PathLike | Mapping[str, Shaped[np.ndarray, "..."]],
    *,
    within: str | None = None,
) -> Loaded:
    """Sets the backbones of a model, in place, to weights with torchvision's names: of VGG-16 or of a ResNet.

    All backbones of the weights' kind are set, `unary/…` and `pairwise/…` of a Gaussian CRF alike. A ResNet may have
    fewer stages, and fewer blocks in its last stage, than the weights; other stages have as many. So may a VGG-16 have
    fewer stages.

    Of VGG-16, with the fully-connected layers, the first of which is a convolution over 7 × 7 cells here. Where the
    model's is smaller it gets every second or third cell (4 × 4: 0, 2, 4, 6; 3 × 3: 0, 3, 6), and where it has fewer
    channels, every so many-th (1024 of 4096: every fourth), as the hole algorithm's decimation does. Weights without
    these layers leave them as they are. With batch normalisation (torchvision's `vgg16_bn`), the biases of the
    convolutions become part of the running means.

    Nothing is changed unless everything fits.

    Args:
        model: any that has a `VGG16` or `ResNet`, at whatever depth, or is one.
        weights: a file for `read_state_dict`, or arrays by their names, in torch's layouts. Names may have a prefix
            in common, as `module.` or `backbone.`.
        within: the path of the part of the model whose backbones are meant, as "unary"; None for all.

    Returns:
        What was loaded, what was not set, and what is unused.

    Raises:
        ValueError: if the weights cannot be read, are of no such network, or differ in names or shapes, with the
            differences; if there is no backbone of their kind.

    Example:
        >>> from jaxcrf import models
        >>> trained = models.create("deeplab_largefov", 5, width=4, hidden_channels=16, rngs=nnx.Rngs(0))
        >>> model = models.create("deeplab_largefov", 21, width=4, hidden_channels=8, rngs=nnx.Rngs(1))
        >>> print(load(model, export(trained)))
        30 arrays loaded
        not set: classifier/bias, classifier/kernel
        unused entries: none

    References:
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*, 2015,
        §3.1 (decimation).
    """
    if isinstance(weights, Mapping):
        source, arrays = "weights", dict(weights)
    else:
        source, arrays = str(weights), read_state_dict(weights)
    family, prefix = _recognised(arrays, source)
    found = {
        name.removeprefix(prefix): np.asarray(value)
        for name, value in arrays.items()
        if name.startswith(prefix) and not name.endswith(".num_batches_tracked")
    }
    values: dict[str, tuple[nnx.Variable, np.ndarray]] = {}
    used: set[str] = set()
    for path, backbone in _backbones(model, within, family):
        entries = _entries(model, path, backbone, found)
        values |= _fitting(
            entries, found, source, f"the {family.__name__} at {path or 'the top'!r}", backbone
        )
        used.update(name for entry in entries for name in entry.names)
    for variable, value in values.values():
        old = variable[...]
        variable[...] = jax.device_put(jnp.asarray(value, old.dtype), old.sharding)
    paths = named_leaves(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return Loaded(
        tuple(values),
        tuple(path for path in paths if path not in values),
        tuple(
            name
            for name in arrays
            if name.removeprefix(prefix) not in used and not name.endswith(".num_batches_tracked")
        ),
    )


def export(model: nnx.Module, *, within: str | None = None) -> dict[str, np.ndarray]:
    """A model's backbone as arrays with torchvision's names and layouts, the inverse of `load`.

    VGG's fully-connected layers come with it. The first is the matrix that torchvision has where it looks at 7 × 7
    cells, and otherwise the weights of a convolution. Classifiers and CRFs are left out.

    Args:
        model: with one backbone.
        within: the path of the part of the model that has the one that is meant.

    Returns:
        Arrays for `write_state_dict`, or for torch: `load_state_dict(…, strict=False)` of a torchvision network.

    Raises:
        ValueError: if there is no backbone, or more than one.

    Example:
        >>> from jaxcrf.models.resnet import ResNet
        >>> arrays = export(ResNet(blocks=(1, 1), width=4, rngs=nnx.Rngs(0)))
        >>> arrays["conv1.weight"].shape, arrays["layer1.0.downsample.1.running_var"].shape
        ((4, 3, 7, 7), (16,))
    """
    found = _backbones(model, within, None)
    if len(found) > 1:
        raise ValueError(
            f"within: the model has several backbones, at {', '.join(repr(path) for path, _ in found)}; say which one "
            "is meant"
        )
    ((path, backbone),) = found
    arrays: dict[str, np.ndarray] = {}
    for entry in _entries(model, path, backbone, None):
        arrays |= zip(entry.names, entry.to_torch(np.asarray(entry.variable[...])), strict=True)
    return arrays


class _MismatchError(ValueError):
    """The shape that was expected."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A vector of the model and its name in torchvision."""

    names: tuple[str, ...]
    path: str
    variable: nnx.Variable

    def to_torch(self, value: np.ndarray) -> tuple[np.ndarray, ...]:
        return (value,)

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        expected = self.to_torch(np.empty(self.variable.shape, np.bool_))[0].shape
        if value.shape != expected:
            raise _MismatchError(str(expected))
        return self._inverse(value)

    def _inverse(self, value: np.ndarray) -> np.ndarray:
        return value


class _Convolution(_Entry):
    def to_torch(self, value: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.ascontiguousarray(value.transpose(3, 2, 0, 1)),)

    def _inverse(self, value: np.ndarray) -> np.ndarray:
        return value.transpose(2, 3, 1, 0)


class _BiasedMean(_Entry):
    """The running mean behind a convolution that has a bias in torchvision and none here."""

    def to_torch(self, value: np.ndarray) -> tuple[np.ndarray, ...]:
        return value, np.zeros_like(value)

    def from_torch(self, value: np.ndarray, *others: np.ndarray) -> np.ndarray:
        for given in (value, *others):
            super().from_torch(given)
        value, bias = (given.astype(self.variable.dtype) for given in (value, others[0]))
        return value - bias


class _DecimatedBias(_Entry):
    """The bias of a fully-connected layer, of which every so many-th channel is taken."""

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        (channels,) = self.variable.shape
        if value.ndim != 1 or value.size % channels or not value.size:
            raise _MismatchError(f"({channels},) or a multiple")
        return value[:: value.size // channels]


@dataclasses.dataclass(frozen=True)
class _Decimated(_Entry):
    """A fully-connected layer, as a matrix over `side × side` cells or as a convolution.

    Attributes:
        side: of the cells that a matrix is over.
        thinned: whether its inputs are channels of a decimated layer.
    """

    side: int
    thinned: bool

    def to_torch(self, value: np.ndarray) -> tuple[np.ndarray, ...]:
        value = np.ascontiguousarray(value.transpose(3, 2, 0, 1))
        return (value.reshape(len(value), -1) if value.shape[-1] == self.side else value,)

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        size, _, inputs, outputs = self.variable.shape
        cells = self.side**2
        if value.ndim == 2 and value.shape[1] % cells == 0:
            value = value.reshape(len(value), -1, self.side, self.side)
        if (
            value.ndim != 4
            or not value.size
            or value.shape[0] % outputs
            or (value.shape[1] % inputs if self.thinned else value.shape[1] != inputs)
            or value.shape[2] != value.shape[3]
            or (
                value.shape[2] != 1
                if size == 1
                else (value.shape[2] - 1) % (size - 1) or value.shape[2] < size
            )
        ):
            matrix = f"({outputs}, {inputs * cells})" + (" or multiples" if self.thinned else "")
            raise _MismatchError(f"{matrix}, or of a convolution ({outputs}, {inputs}, {size}, {size})")
        steps = (value.shape[0] // outputs, value.shape[1] // inputs)
        taps = 1 if size == 1 else (value.shape[2] - 1) // (size - 1)
        return value[:: steps[0], :: steps[1], ::taps, ::taps].transpose(2, 3, 1, 0)


def _recognised(arrays: Mapping[str, Any], source: str) -> tuple[type[nnx.Module], str]:
    """The kind of network that weights are of, and the prefix of its names."""
    found: Counter[tuple[type[nnx.Module], str]] = Counter()
    for family, pattern in _FAMILIES.items():
        matches = (pattern.fullmatch(name) for name in arrays)
        found.update((family, match[1] or "") for match in matches if match)
    if not found:
        raise ValueError(
            f"{source}: holds no VGG-16 and no ResNet with torchvision's names, as 'features.0.weight' or "
            f"'layer1.0.conv1.weight'; it has {_listed(list(map(repr, arrays)))}"
        )
    (most, _), *others = found.most_common()
    if others:
        names = ", ".join(repr(f"{prefix or ''}…") for (_, prefix), _ in (found.most_common()))
        raise ValueError(
            f"{source}: holds several networks, of the prefixes {names}; hand over the entries of one"
        )
    return most


def _backbones(
    model: nnx.Module, within: str | None, family: type[nnx.Module] | None
) -> list[tuple[str, VGG16 | ResNet]]:
    """The backbones of a model by their paths."""
    found: list[tuple[str, VGG16 | ResNet]] = [
        ("/".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, VGG16 | ResNet)
    ]
    have = ", ".join(f"{type(module).__name__} at {path or 'the top'!r}" for path, module in found)
    if within is not None:
        found = [(path, module) for path, module in found if f"{path}/".startswith(f"{within}/")]
        if not found:
            raise ValueError(f"within: there is no backbone in {within!r}; the model has {have or 'none'}")
    wanted = [(path, module) for path, module in found if family is None or isinstance(module, family)]
    if not wanted:
        kind = "VGG-16 or ResNet" if family is None else family.__name__
        raise ValueError(f"model: {type(model).__name__} has no {kind}{f'; it has {have}' if have else ''}")
    return sorted(wanted, key=lambda entry: entry[0])


def _entries(
    model: nnx.Module, path: str, backbone: VGG16 | ResNet, found: Mapping[str, Any] | None
) -> list[_Entry]:
    """What of a backbone, and of VGG's fully-connected layers, corresponds to what in torchvision.

    Args:
        model: that has the backbone.
        path: of the backbone.
        backbone: itself.
        found: the weights, if they are to be loaded.
    """
    prefix = f"{path}/" if path else ""
    if isinstance(backbone, ResNet):
        return list(_resnet_entries(backbone, prefix))
    entries = list(_vgg_entries(backbone, prefix))
    parent, _, name = path.rpartition("/")
    owner: Any = model
    for key in parent.split("/") if parent else ():
        owner = (
            owner[int(key)]
            if key.isdigit()
            else owner[key]
            if isinstance(owner, nnx.Dict)
            else getattr(owner, key)
        )
    wanted = found is None or any(key.startswith("classifier.0.") for key in found)
    if name == "backbone" and hasattr(owner, "fc6") and wanted:
        above = f"{parent}/" if parent else ""
        for index, layer, side in (("0", "fc6", 7), ("3", "fc7", 1)):
            convolution = getattr(owner, layer)
            names = [f"classifier.{index}.{kind}" for kind in ("weight", "bias")]
            entries += [
                _Decimated(
                    (names[0],), f"{above}{layer}/kernel", convolution.kernel, side=side, thinned=side == 1
                ),
                _DecimatedBias((names[1],), f"{above}{layer}/bias", convolution.bias),
            ]
    return entries


def _vgg_entries(backbone: VGG16, prefix: str) -> Iterator[_Entry]:
    index = 0
    for stage in range(1, 6):
        for k in range(1, 4):
            layer = f"conv{stage}_{k}"
            if not hasattr(backbone, layer):
                continue
            convolution, own = getattr(backbone, layer), f"features.{index}"
            yield _Convolution((f"{own}.weight",), f"{prefix}{layer}/kernel", convolution.kernel)
            index += 1
            if convolution.bias is not None:
                yield _Entry((f"{own}.bias",), f"{prefix}{layer}/bias", convolution.bias)
            else:
                norm = f"norm{stage}_{k}"
                yield from _norm_entries(
                    getattr(backbone, norm), f"features.{index}", f"{prefix}{norm}", f"{own}.bias"
                )
                index += 1
            index += 1  # ReLU
        index += 1  # the pool


def _resnet_entries(backbone: ResNet, prefix: str) -> Iterator[_Entry]:
    yield _Convolution(("conv1.weight",), f"{prefix}conv1/kernel", backbone.conv1.kernel)
    yield from _norm_entries(backbone.norm1, "bn1", f"{prefix}norm1")
    for stage in list(backbone.strides)[1:]:
        for k, block in enumerate(getattr(backbone, stage)):
            for ours, theirs in (
                ("conv1", "conv1"),
                ("norm1", "bn1"),
                ("conv2", "conv2"),
                ("norm2", "bn2"),
                ("conv3", "conv3"),
                ("norm3", "bn3"),
                ("shortcut", "downsample.0"),
                ("shortcut_norm", "downsample.1"),
            ):
                layer, name, path = (
                    getattr(block, ours),
                    f"{stage}.{k}.{theirs}",
                    f"{prefix}{stage}/{k}/{ours}",
                )
                if isinstance(layer, nnx.BatchNorm):
                    yield from _norm_entries(layer, name, path)
                elif layer is not None:
                    yield _Convolution((f"{name}.weight",), f"{path}/kernel", layer.kernel)


def _norm_entries(norm: Any, name: str, path: str, bias: str | None = None) -> Iterator[_Entry]:
    yield _Entry((f"{name}.weight",), f"{path}/scale", norm.scale)
    yield _Entry((f"{name}.bias",), f"{path}/bias", norm.bias)
    mean = f"{name}.running_mean"
    if bias is None:
        yield _Entry((mean,), f"{path}/mean", norm.mean)
    else:
        yield _BiasedMean((mean, bias), f"{path}/mean", norm.mean)
    yield _Entry((f"{name}.running_var",), f"{path}/var", norm.var)


def _fitting(
    entries: Sequence[_Entry],
    found: Mapping[str, np.ndarray],
    source: str,
    what: str,
    backbone: VGG16 | ResNet,
) -> dict[str, tuple[nnx.Variable, np.ndarray]]:
    """The values of a backbone by their paths.

    Raises:
        ValueError: if the weights are not those of such a backbone, with the differences.
    """
    wanted = [name for entry in entries for name in entry.names]
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in set(wanted) and _is_inside(name, backbone)]
    values, others = {}, []
    for entry in entries:
        if any(name not in found for name in entry.names):
            continue
        given = [found[name] for name in entry.names]
        name, shape = entry.names[0], given[0].shape
        try:
            values[entry.path] = (entry.variable, entry.from_torch(*given))
        except _MismatchError as mismatch:
            others.append(f"shape of {name}: got {shape}, expected {mismatch} for {entry.path}")
            continue
        for name, value in zip(entry.names, given, strict=True):
            if not jnp.issubdtype(value.dtype, jnp.floating):
                others.append(f"type of {name}: got {value.dtype}, expected floating-point numbers")
            elif not np.isfinite(value).all():
                others.append(f"values of {name}: some are not finite")
    lines = [
        *(f"missing: {name}{_nearest(name, unexpected or found)}" for name in missing),
        *(f"unexpected: {name}" for name in unexpected),
        *others,
    ]
    if not lines:
        return values
    hint = ""
    if isinstance(backbone, VGG16) and ("features.3.weight" in found) != ("features.3.weight" in wanted):
        # Only with batch normalisation does the second convolution come third.
        hint = "\nCreate the network with norm=" + ("True" if "features.3.weight" in found else "False") + "."
    elif isinstance(backbone, ResNet) and (missing or unexpected):
        hint = "\nIs it of another depth?"
    counts = f"{len(lines)} difference{'s' if len(lines) > 1 else ''}"
    shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
    raise ValueError(f"{source}: does not fit {what}; {counts}:\n  " + "\n  ".join(shown) + hint)


def _is_inside(name: str, backbone: VGG16 | ResNet) -> bool:
    """Whether an entry belongs to what a backbone has, rather than to layers behind its end."""
    if isinstance(backbone, VGG16):
        match = re.match(r"features\.(\d+)\.", name)
        own = (name for entry in _vgg_entries(backbone, "") for name in entry.names)
        behind = max(int(name.split(".")[1]) for name in own) + 1
        return match is not None and (len(backbone.strides) == 5 or int(match[1]) < behind)
    match = re.match(r"layer(\d+)\.(\d+)\.", name)
    if match is None:
        return name.startswith(("conv1.", "bn1."))
    last = list(backbone.strides)[-1]
    end = (int(last.removeprefix("layer")), len(getattr(backbone, last)))
    return (int(match[1]), int(match[2])) < end


def _nearest(name: str, candidates: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1)
    return f" (the nearest is {near[0]})" if near else ""


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

"""Models by name, so that a checkpoint can say which one it holds."""

import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcrf import _checks
from jaxcrf.models.convcrf import Refined
from jaxcrf.models.deep_parsing import DeepParsingUnary
from jaxcrf.models.deeplab import DeepLab, DeepLabV2
from jaxcrf.models.gaussian_crf import with_gaussian_crf
from jaxcrf.models.renet import HReNet, NReNet
from jaxcrf.models.resnet import ResNetFCN
from jaxcrf.models.small_fcn import SmallFCN
from jaxcrf.models.vgg import VGG16FCN
from jaxcrf.nn import ConvCRF, DeepParsing, DenseCRF

# Networks by themselves; every entry takes `num_labels, *, in_channels, dtype, rngs` and its own options.
_NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "small_fcn": SmallFCN,
    "vgg16_fcn": VGG16FCN,
    "resnet50_fcn": functools.partial(ResNetFCN, depth=50),
    "resnet101_fcn": functools.partial(ResNetFCN, depth=101),
    "deeplab": functools.partial(DeepLab, kernel_size=4, rate=4, hidden_channels=4096),
    "deeplab_4x4": functools.partial(DeepLab, kernel_size=4, rate=8, hidden_channels=4096),
    "deeplab_7x7": functools.partial(DeepLab, kernel_size=7, rate=4, hidden_channels=4096),
    "deeplab_largefov": DeepLab,
    "deeplab_msc": functools.partial(DeepLab, kernel_size=4, rate=4, hidden_channels=4096, multi_scale=True),
    "deeplab_msc_largefov": functools.partial(DeepLab, multi_scale=True),
    "deeplab_v2": DeepLabV2,
    "n_renet": NReNet,
    "h_renet": HReNet,
    "h_renet_baseline": functools.partial(HReNet, cell=None),
    "deep_parsing_unary": DeepParsingUnary,
}


class _RefinedBy:
    """Puts a layer that maps images and logits to logits on a network.

    Of the network it needs to know no more than `L`; `drawn` says whether it begins with random numbers.
    """

    def __init__(self, layer: Callable[..., nnx.Module], *, drawn: bool = False):
        self.layer = layer
        self.drawn = drawn

    def __call__(
        self, unary: Any, num_labels: int, *, in_channels: int, dtype: Any, rngs: nnx.Rngs, **options: Any
    ) -> Refined:
        return Refined(unary, self.layer(num_labels, **options, **({"rngs": rngs} if self.drawn else {})))


# CRFs that `create(…, refine=…)` puts on a network: called with it and what it was made with.
_REFINEMENTS: dict[str, Callable[..., nnx.Module]] = {
    "convcrf": _RefinedBy(ConvCRF),
    "densecrf": _RefinedBy(DenseCRF),
    "deep_parsing": _RefinedBy(DeepParsing, drawn=True),
    "gaussian_crf": functools.partial(with_gaussian_crf, kind="general"),
    "gaussian_crf_potts": functools.partial(with_gaussian_crf, embedding_size=1024),
    "gaussian_crf_sparse": functools.partial(with_gaussian_crf, layers=("sparse",), kind="general"),
    "gaussian_crf_sparse_potts": functools.partial(with_gaussian_crf, layers=("sparse",)),
    "gaussian_crf_stacked": functools.partial(
        with_gaussian_crf, layers=("dense", "sparse"), embedding_size=1024
    ),
}


@dataclasses.dataclass(frozen=True)
class _Composite:
    """A name for a network with a CRF, whose options are `crf_options`."""

    unary: str
    refine: str
    crf_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_COMPOSITES = {
    "convcrf": _Composite("resnet101_fcn", "convcrf"),
    # With 5 iterations, which the paper trains with; for its 10 at test, model.set_attributes(num_iterations=10).
    "crf_as_rnn": _Composite(
        "vgg16_fcn",
        "densecrf",
        {"preset": "densecrf_crf_as_rnn", "weights_per_label": True, "trainable_compatibility": True},
    ),
    "deep_parsing_network": _Composite("deep_parsing_unary", "deep_parsing", {"inputs": "log_probs"}),
    "gaussian_crf": _Composite("deeplab_v2", "gaussian_crf"),
    "gaussian_crf_potts": _Composite("deeplab_v2", "gaussian_crf_potts"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `create` needs to make a model again: it hashes, compares and goes to JSON and back.

    Attributes:
        name: the entry of the registry.
        num_labels: `L`.
        options: further arguments of `create`, sorted by name.

    Example:
        >>> config = ModelConfig.of("small_fcn", 11, width=32)
        >>> ModelConfig.from_json(config.to_json()) == config
        True
    """

    name: str
    num_labels: int
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, num_labels: int, **options: Any) -> "ModelConfig":
        """The configuration with these options.

        Raises:
            ValueError: if there is no such model.
            TypeError: if an option is not a number, string, None, or a sequence of those.
        """
        if name not in names():
            near = difflib.get_close_matches(str(name), names(), n=1)
            raise ValueError(
                f"name: got {name!r}{f', did you mean {near[0]!r}?' if near else ''}; the models are "
                f"{', '.join(names())}"
            )
        frozen = []
        for key, value in sorted(options.items()):
            try:
                frozen.append((key, _frozen(json.loads(json.dumps(value)))))
            except TypeError as error:
                raise TypeError(
                    f"{key}: got {value!r}; expected what JSON can hold: a number, a string, None, or a list or "
                    "mapping of those"
                ) from error
        return cls(name, _checks.check_num_labels(num_labels), tuple(frozen))

    def create(self, rngs: nnx.Rngs) -> nnx.Module:
        """A new model with fresh parameters.

        Raises:
            TypeError: if the model has no such option.
        """
        return _compiled(self._maker(), rngs)

    def _maker(self) -> Callable[[nnx.Rngs], Any]:
        """A function that makes the model, its arguments checked."""
        options = {key: _thawed(value) for key, value in self.options}
        refine, refine_options = options.pop("refine", None), options.pop("refine_options", None) or {}
        if refine is not None and refine not in _REFINEMENTS:
            near = difflib.get_close_matches(str(refine), _REFINEMENTS, n=1)
            raise ValueError(
                f"refine: got {refine!r}{f', did you mean {near[0]!r}?' if near else ''}; expected None or one of "
                f"{', '.join(_REFINEMENTS)}"
            )
        if refine is None and refine_options:
            raise ValueError("refine_options: goes with refine; name the CRF that they are for")
        crfs = [] if refine is None else [(refine, refine_options)]
        network = self.name
        if self.name in _COMPOSITES:
            composite = _COMPOSITES[self.name]
            network = composite.unary
            crfs.insert(
                0, (composite.refine, {**composite.crf_options, **(options.pop("crf_options", None) or {})})
            )
        common_options = ["refine", "refine_options", *(["crf_options"] if self.name in _COMPOSITES else [])]
        _check_options(
            repr(self.name), _NETWORKS[network], options, ("self", "num_labels", "rngs"), common_options
        )
        for crf, crf_options in crfs:
            _check_options(f"the CRF {crf!r}", _REFINEMENTS[crf], crf_options, _GIVEN_TO_REFINEMENTS)
        common = {"in_channels": options.get("in_channels", 3), "dtype": options.get("dtype")}

        def make(rngs: nnx.Rngs) -> Any:
            model = _NETWORKS[network](self.num_labels, rngs=rngs, **options)
            for crf, crf_options in crfs:
                model = _REFINEMENTS[crf](model, self.num_labels, rngs=rngs, **common, **crf_options)
            model.config = self  # type: ignore[attr-defined]
            return model

        return make

    def create_abstract(self) -> nnx.Module:
        """The model without numbers: shapes and dtypes only, which takes neither memory nor time.

        Raises:
            TypeError: if the model has no such option.

        Example:
            >>> model = ModelConfig.of("deeplab_largefov", 21).create_abstract()
            >>> model.classifier.kernel.shape
            (1, 1, 1024, 21)
        """
        make = self._maker()
        return nnx.eval_shape(lambda: make(nnx.Rngs(0)))

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "name": self.name,
            "num_labels": self.num_labels,
            "options": {key: _thawed(value) for key, value in self.options},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The configuration that `to_json` wrote."""
        return cls.of(values["name"], values["num_labels"], **values["options"])


def create(name: str, num_labels: int, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """Makes a model for dense labelling: images `[*batch, H, W, channels]` in 0 … 255 to logits `[*batch, H, W, L]`.

    Args:
        name: one of `names()`.
        num_labels: `L`.
        rngs: where parameters and dropout come from.
        **options: of the model; all have `in_channels=3` and `dtype=None`, that of their arithmetic. `refine`, with
            `refine_options` as a mapping, attaches a CRF: "convcrf" is `nn.ConvCRF`, "densecrf" `nn.DenseCRF`,
            "deep_parsing" `nn.DeepParsing`, and "gaussian_crf" with its kinds a second network with `nn.GaussianCRF`.
            Names that have a CRF already take `crf_options` for it.

    Returns:
        The model, in training mode; its attribute `config` is what `models.save` stores.

    Raises:
        ValueError: if there is no such model or refinement, or an option's value is out of range.
        TypeError: if the model or its CRF has no such option.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = create("small_fcn", 11, width=8, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 45, 61, 3))).shape
        (1, 45, 61, 11)
    """
    return ModelConfig.of(name, num_labels, **options).create(rngs)


def names() -> tuple[str, ...]:
    """The models that `create` knows.

    Example:
        >>> "small_fcn" in names()
        True
    """
    return (*_NETWORKS, *_COMPOSITES)


# What `create` itself passes on.
_GIVEN_TO_REFINEMENTS = ("self", "unary", "num_labels", "in_channels", "dtype", "rngs")


def _compiled(make: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs) -> Any:
    """`make(rngs)` as one program: operation by operation, a large model takes many times as long."""
    if not _checks.is_concrete(jnp.zeros(())):  # part of somebody else's program
        return make(rngs)
    definition, state = nnx.split(rngs)

    def program(state: Any) -> Any:
        rngs = nnx.merge(definition, state)
        model = make(rngs)
        return *nnx.split(model), nnx.state(rngs)

    # A CPU's compiler spends several times as long on this program, which runs once, as on its numbers, which stay the
    # same.
    options: Any = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    model_definition, model_state, after = jax.jit(program, compiler_options=options)(state)
    nnx.update(rngs, after)
    return nnx.merge(model_definition, model_state)


def _check_options(
    what: str,
    made: Callable[..., Any],
    options: Mapping[str, Any],
    given: Sequence[str],
    more: Sequence[str] = (),
) -> None:
    """Raises if a network or CRF has no such option."""
    made = getattr(made, "func", made)
    made = getattr(made, "layer", made)
    # Of the constructor itself: the class's own is that of Flax's metaclass, which takes anything.
    signature = inspect.signature(made.__init__ if isinstance(made, type) else made)  # type: ignore[misc]
    known = [*(name for name in signature.parameters if name not in given), *more]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise TypeError(
                f"{option}: {what} has no such option{f', did you mean {near[0]!r}?' if near else ''}; it has "
                f"{', '.join(sorted(known))}"
            )


# Static attributes of a module must hash, so that mappings and lists become tuples that remember what they were.
def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return _Mapping(tuple(sorted((key, _frozen(v)) for key, v in value.items())))
    return value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Mapping):
        return {key: _thawed(v) for key, v in value.items}
    if isinstance(value, tuple):
        return [_thawed(v) for v in value]
    return value


@dataclasses.dataclass(frozen=True)
class _Mapping:
    items: tuple[tuple[str, Any], ...]

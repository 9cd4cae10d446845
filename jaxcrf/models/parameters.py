"""A module's arrays by the paths of their names, in memory and as files hold them."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """A module's definition, its parameters and what else it holds, as NNX states.

    Example:
        >>> definition, params, variables = split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> list(named_leaves(params)), list(named_leaves(variables))
        (['bias', 'scale'], ['mean', 'var'])
    """
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts


def named_leaves(state: Any) -> dict[str, Array]:
    """The arrays of an NNX state by their paths.

    Example:
        >>> _, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> {path: leaf.shape for path, leaf in named_leaves(state).items()}
        {'bias': (3,), 'kernel': (2, 3)}
    """
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def with_leaves(state: Any, leaves: Mapping[str, Array]) -> Any:
    """The NNX state with other arrays: the inverse of `named_leaves`.

    Example:
        >>> _, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> import jax.numpy as jnp
        >>> with_leaves(state, {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})["bias"][...]
        Array([1., 1., 1.], dtype=float32)
    """
    return jax.tree.map_with_path(lambda path, _: leaves[_name(path)], state)


def is_key(leaf: Any) -> bool:
    """Whether an array holds random keys, which are stored as the integers they consist of.

    Example:
        >>> is_key(jax.random.key(0)), is_key(jax.random.key_data(jax.random.key(0)))
        (True, False)
    """
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: tuple[Any, ...]) -> str:
    keys = (getattr(key, "key", getattr(key, "name", None)) for key in path)
    # The last key is a Variable's own attribute, which holds its array.
    return "/".join(str(key) for key in keys).removesuffix("/value")


def module_tree(model: nnx.Module) -> dict[str, Any]:
    """What is stored of a module, as nested dictionaries of plain arrays: "params" and "variables".

    Example:
        >>> tree = module_tree(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> {part: list(arrays) for part, arrays in tree.items()}
        {'params': ['bias', 'scale'], 'variables': ['mean', 'var']}
    """
    _, params, variables = split(model)
    parts = {"params": to_data(named_leaves(params)), "variables": to_data(named_leaves(variables))}
    return {name: nest(leaves) for name, leaves in parts.items() if leaves}


def filled_module(model: nnx.Module, tree: Mapping[str, Any]) -> nnx.Module:
    """A module like another, which may be abstract, with the arrays of a tree: the inverse of `module_tree`.

    Example:
        >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> bool((filled_module(abstract, module_tree(layer)).kernel[...] == layer.kernel[...]).all())
        True
    """
    definition, *states = split(model)
    parts = [
        with_leaves(state, from_data(named_leaves(state), flatten(tree.get(name, {}))))
        for name, state in zip(("params", "variables"), states, strict=True)
    ]
    return nnx.merge(definition, *parts)


def to_data(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Random keys as the integers they consist of; arrays may be abstract.

    Example:
        >>> to_data({"key": jax.random.key(0)})["key"].dtype
        dtype('uint32')
    """
    return {path: _key_data(leaf) if is_key(leaf) else leaf for path, leaf in leaves.items()}


def from_data(like: Mapping[str, Any], data: Mapping[str, Array]) -> dict[str, Array]:
    """Integers as the random keys that they were; the inverse of `to_data`.

    Example:
        >>> keys = {"key": jax.random.key(0)}
        >>> bool(from_data(keys, to_data(keys))["key"] == keys["key"])
        True
    """
    return {
        path: jax.random.wrap_key_data(data[path], impl=_key_implementation(leaf))
        if is_key(leaf)
        else data[path]
        for path, leaf in like.items()
    }


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by their paths as nested dictionaries.

    Example:
        >>> nest({"unary/classifier/bias": 1, "unary/classifier/kernel": 2})
        {'unary': {'classifier': {'bias': 1, 'kernel': 2}}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`.

    Example:
        >>> flatten({"unary": {"classifier": {"bias": 1, "kernel": 2}}})
        {'unary/classifier/bias': 1, 'unary/classifier/kernel': 2}
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{name}/")
        else:
            leaves[prefix + name] = value
    return leaves


def check_same(expected: Mapping[str, Any], stored: Mapping[str, Any], what: str) -> None:
    """Raises with a readable difference unless both trees hold arrays of the same names, shapes and dtypes.

    Args:
        expected: nested dictionaries of arrays, which may be abstract.
        stored: likewise.
        what: is said to be of another model or optimiser.

    Raises:
        ValueError: with what is missing, too many or of another shape or dtype.

    Example:
        >>> check_same({"kernel": jax.numpy.ones(3)}, {"kernel": jax.numpy.ones(4)}, "the file")
        Traceback (most recent call last):
        ValueError: the file is of another model or optimiser; 1 arrays differ:
          kernel: holds float32[4], expected float32[3]
    """
    wanted = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flatten(expected).items()}
    found = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flatten(stored).items()}
    lines = [
        *(f"{path}: is missing, expected {_spell(wanted[path])}" for path in wanted if path not in found),
        *(f"{path}: {_spell(found[path])} is one too many" for path in found if path not in wanted),
        *(
            f"{path}: holds {_spell(found[path])}, expected {_spell(wanted[path])}"
            for path in wanted
            if path in found and found[path] != wanted[path]
        ),
    ]
    if lines:
        shown = lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])
        raise ValueError(
            f"{what} is of another model or optimiser; {len(lines)} arrays differ:\n  " + "\n  ".join(shown)
        )


def _spell(entry: tuple[tuple[int, ...], str]) -> str:
    return f"{entry[1]}[{', '.join(map(str, entry[0]))}]"


def _key_data(key: Any) -> Any:
    if isinstance(key, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, key)
    return jax.random.key_data(key)


def _key_implementation(key: Any) -> Any:
    # Abstract keys tell theirs only while they are traced.
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]

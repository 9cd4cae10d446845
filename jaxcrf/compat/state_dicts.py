"""State dicts, arrays by name, in the files of other frameworks: read without running anything that is in them.

`.safetensors` files are read and written. Files of `torch.save`, in the zip format and in the one before it, hold a
pickle, which could run any code; here an interpreter of its own goes through it, knows the few names that tensors
need, and refuses every other.
"""

import io
import json
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxcrf.data.images import replacing

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_STORAGES = {
    "DoubleStorage": _DTYPES["F64"],
    "FloatStorage": _DTYPES["F32"],
    "HalfStorage": _DTYPES["F16"],
    "BFloat16Storage": _DTYPES["BF16"],
    "LongStorage": _DTYPES["I64"],
    "IntStorage": _DTYPES["I32"],
    "ShortStorage": _DTYPES["I16"],
    "CharStorage": _DTYPES["I8"],
    "ByteStorage": _DTYPES["U8"],
    "BoolStorage": _DTYPES["BOOL"],
}
_STORAGE_TYPES = {
    f"{module}.{name}": dtype for module in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()
}
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETER = "torch.nn.parameter.Parameter"
_GLOBALS = frozenset(
    (
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        _PARAMETER,
        *_TENSORS,
        *_STORAGE_TYPES,
    )
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Where training scripts keep the state dict among other things.
_NESTED = ("state_dict", "model_state_dict", "model")


def read_state_dict(path: str | os.PathLike) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads the arrays of a `.safetensors` file, or of what `torch.save` wrote; what it is, its content tells.

    Nothing in the file is executed. A file of `torch.save` may hold the state dict itself or, as training scripts
    write, a dictionary with it as "state_dict", "model_state_dict" or "model".

    Args:
        path: the file.

    Returns:
        Arrays by their names, in the file's own types and layouts: read-only views of its content. Other entries
        than tensors are left out.

    Raises:
        ValueError: if there is no such file, it is damaged or of another kind, or its pickle asks for anything
            besides tensors.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> write_state_dict(path, {"conv1.weight": np.ones((2, 3, 1, 1), np.float32)})
        >>> {name: array.shape for name, array in read_state_dict(path).items()}
        {'conv1.weight': (2, 3, 1, 1)}
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; expected a .safetensors, .pth or .pt file")
    data = path.read_bytes()
    try:
        if _is_safetensors(data):
            return _read_safetensors(data)
        if data.startswith(b"PK\x03\x04"):
            return _arrays(*_read_zip(data))
        if data.startswith(b"\x80"):
            return _arrays(*_read_legacy(data))
    except _Refusal as refusal:
        raise ValueError(f"{path}: {refusal}") from refusal
    except Exception as error:
        raise ValueError(f"{path}: is damaged ({error or type(error).__name__}); fetch it again") from error
    raise ValueError(
        f"{path}: is neither a safetensors file nor one that torch.save wrote"
        + ("; it is empty" if not data else f"; it begins with {data[:16]!r}")
    )


def write_state_dict(path: str | os.PathLike, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Writes arrays as a `.safetensors` file, which appears under its name only when it is whole.

    Args:
        path: the file, in a folder that exists.
        arrays: by their names.

    Raises:
        ValueError: if the name does not end in .safetensors, or an array is of a type that such files cannot hold.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> write_state_dict(path, {"bias": np.arange(3)})
        >>> read_state_dict(path)["bias"]
        array([0, 1, 2])
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: got {str(path)!r}; expected a name that ends in .safetensors")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    values, end = [], 0
    # The widest first, so that every array begins at a multiple of its items' size.
    for name, given in sorted(arrays.items(), key=lambda entry: (-np.asarray(entry[1]).itemsize, entry[0])):
        value = np.asarray(given)
        if value.dtype.newbyteorder("=") not in _CODES:
            raise ValueError(
                f"arrays: {name!r} is of type {value.dtype}; expected one of {', '.join(_DTYPES)}"
            )
        value = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
        begin, end = end, end + value.nbytes
        header[name] = {
            "dtype": _CODES[value.dtype.newbyteorder("=")],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
        values.append(value)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values:
            file.write(value.tobytes())


class _Refusal(ValueError):
    """What a file is not read for, as opposed to damage."""


def _is_safetensors(data: bytes) -> bool:
    return len(data) > 8 and data[8:9] == b"{" and struct.unpack_from("<Q", data)[0] <= len(data) - 8


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    first = 8 + length
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise _Refusal(
                f"{name!r} is of type {entry['dtype']}; the types that can be read are {', '.join(_DTYPES)}"
            )
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = _num_elements(shape)
        if not 0 <= begin <= end <= len(data) - first or end - begin != count * dtype.itemsize:
            raise ValueError(
                f"{name!r} of type {entry['dtype']} and shape {shape} is said to lie at bytes {begin} to {end} "
                f"of {len(data) - first}"
            )
        arrays[name] = _flat(data, first + begin, count, dtype).reshape(shape)
    return arrays


class _Global(NamedTuple):
    """A name that a pickle asks for; it is looked at, never imported."""

    name: str


class _Storage(NamedTuple):
    """A piece of the memory that tensors share."""

    dtype: np.dtype
    key: str
    start: int
    size: int


class _Tensor(NamedTuple):
    """What a pickle says of a tensor, unchecked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Parameter:
    """A `Parameter` of the oldest files, whose tensor comes later."""

    tensor: Any = None


class _Region(NamedTuple):
    """The bytes of a storage: `size` of those of a file, from `start`."""

    data: bytes
    start: int
    size: int


def _read_zip(data: bytes) -> tuple[dict[str, _Tensor], Callable[[_Storage], _Region]]:
    """The tensors of a zip archive, and where their storages are."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    found = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise _Refusal("is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    folder = found[0].partition("/")[0]

    def member(name: str) -> bytes:
        # torch never compresses, so that no small file can unfold into a large one.
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise _Refusal(f"its member {name} is compressed, as torch.save never does")
        return archive.read(name)

    order = f"{folder}/byteorder"
    if order in archive.namelist() and member(order) != b"little":
        raise _Refusal("was written on a big-endian machine; write it again on a little-endian one")
    regions: dict[str, _Region] = {}

    def region(storage: _Storage) -> _Region:
        if storage.key not in regions:
            content = member(f"{folder}/data/{storage.key}")
            regions[storage.key] = _Region(content, 0, len(content))
        return regions[storage.key]

    return _tensors(_interpret(io.BytesIO(member(found[0])))), region


def _read_legacy(data: bytes) -> tuple[dict[str, _Tensor], Callable[[_Storage], _Region]]:
    """The same of the format before torch 1.6: pickles, one after the other, and then the storages."""
    stream = io.BytesIO(data)
    if _interpret(stream) != _LEGACY_MAGIC:
        raise _Refusal("is a pickle, but not one that torch.save wrote")
    _interpret(stream)  # the version of the protocol: there was only one
    system = _interpret(stream)
    if not system["little_endian"]:
        raise _Refusal("was written on a big-endian machine; write it again on a little-endian one")
    storages: dict[str, _Storage] = {}
    tensors = _tensors(_interpret(stream, storages))
    keys = _interpret(stream)
    regions: dict[str, _Region] = {}
    position = stream.tell()
    for key in keys:
        (count,) = struct.unpack_from("<q", data, position)
        size = count * storages[key].dtype.itemsize
        position += 8
        if not 0 <= size <= len(data) - position:
            raise ValueError(f"the storage {key!r} of {size} bytes reaches beyond the end")
        regions[key] = _Region(data, position, size)
        position += size
    return tensors, lambda storage: regions[storage.key]


def _tensors(found: Any) -> dict[str, _Tensor]:
    """The tensors of a state dict."""
    if isinstance(found, dict):
        for candidate in (found, *(found.get(key) for key in _NESTED)):
            tensors = {}
            for name, value in candidate.items() if isinstance(candidate, dict) else ():
                tensor = value.tensor if isinstance(value, _Parameter) else value
                if isinstance(name, str) and isinstance(tensor, _Tensor):
                    tensors[name] = tensor
            if tensors:
                return tensors
    keys = f" with the keys {', '.join(map(repr, list(found)[:8]))}" if isinstance(found, dict) else ""
    raise _Refusal(
        f"holds a {type(found).__name__}{keys} but no tensors by name; expected a state dict: save model.state_dict()"
    )


def _arrays(tensors: dict[str, _Tensor], region: Callable[[_Storage], _Region]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name] = _array(tensor, region)
        except _Refusal:
            raise
        except Exception as error:
            raise ValueError(f"{name!r}: {error or type(error).__name__}") from error
    return arrays


def _array(tensor: _Tensor, region: Callable[[_Storage], _Region]) -> np.ndarray:
    """A tensor's values, provided that they all lie in its storage."""
    storage, offset, shape, strides = tensor
    count = _num_elements(shape)
    if not _are_sizes((offset, *strides)) or len(shape) != len(strides):
        raise ValueError(f"strides {strides} and offset {offset!r} do not go with the shape {shape}")
    last = offset + sum(stride * (n - 1) for n, stride in zip(shape, strides, strict=True)) if count else 0
    held = region(storage)
    available = held.size // storage.dtype.itemsize
    if not _are_sizes(storage[2:]) or storage.start + storage.size > available:
        raise ValueError(
            f"its storage is said to have {storage.size} elements from {storage.start}; there are {available}"
        )
    # As many elements as the storage has, at most: strides of zero could ask for any number of them.
    if last >= max(storage.size, 1) or count > storage.size:
        raise ValueError(
            f"shape {shape}, strides {strides} and offset {offset} reach beyond the {storage.size} elements of its "
            "storage"
        )
    if not count:
        return np.zeros(shape, storage.dtype)
    flat = _flat(held.data, held.start + storage.start * storage.dtype.itemsize, storage.size, storage.dtype)
    steps = [stride * flat.itemsize for stride in strides]
    # Views, never copies: all together they need no more memory than the file.
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)


def _num_elements(shape: Any) -> int:
    if not isinstance(shape, list | tuple) or not _are_sizes(shape):
        raise ValueError(f"got the shape {shape!r}")
    return math.prod(shape)


def _are_sizes(values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _flat(data: bytes, start: int, count: int, dtype: np.dtype) -> np.ndarray:
    piece = memoryview(data)[start : start + count * dtype.itemsize]
    return np.frombuffer(piece, dtype.newbyteorder("<")).astype(dtype, copy=False)


def _interpret(stream: BinaryIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Goes through one pickle and returns what it describes: numbers, strings, lists, dictionaries and tensors.

    This is no unpickler with a list of what is allowed: it has no way to import or call anything.

    Args:
        stream: at the beginning of the pickle; left behind its end.
        storages: where those that the pickle names are noted by their keys.

    References:
        The instructions are described in `pickletools` of Python's standard library.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        found, stack = stack, marks.pop()
        return found

    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case (
                "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG1"
                | "BINFLOAT"
                | "BINUNICODE"
                | "SHORT_BINUNICODE"
                | "BINSTRING"
                | "SHORT_BINSTRING"
            ):
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise ValueError("its pickle takes more from the stack than there is")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(item)
            case "APPENDS":
                items = since_mark()
                _list(stack[-1]).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_global(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                stack.append(_made(made, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "BINPERSID":
                storage = _storage(stack.pop())
                stack.append(storage)
                if storages is not None:
                    storages[storage.key] = storage
            case other:
                raise _Refusal(f"its pickle has the instruction {other}, which no state dict needs")
    raise ValueError("its pickle has no end")


def _global(module: Any, name: Any) -> _Global:
    full = f"{module}.{name}"
    if full not in _GLOBALS:
        raise _Refusal(
            f"its pickle asks for {full}, which no state dict needs and which is not run; expected what "
            "torch.save(model.state_dict(), …) writes"
        )
    return _Global(full)


def _made(made: Any, arguments: Any) -> Any:
    """What a pickle's call stands for."""
    if not isinstance(made, _Global) or not isinstance(arguments, tuple):
        raise ValueError("its pickle calls what is no name")
    if made.name in _TENSORS:
        return _Tensor(*arguments[:4])
    if made.name == "torch._utils._rebuild_parameter":
        return arguments[0]
    if made.name == _PARAMETER:
        parameter = _Parameter()
        parameter.tensor = arguments[0] if arguments else None
        return parameter
    if made.name == "torch.Size":
        return tuple(arguments[0])
    if made.name == "collections.OrderedDict":
        found: dict[Any, Any] = {}
        for pair in arguments[0] if arguments else ():
            _set_items(found, list(pair))
        return found
    raise _Refusal(f"its pickle calls {made.name}, which is a type")


def _build(target: Any, state: Any) -> None:
    if isinstance(target, _Parameter):
        # (tensor, …): the others say whether it is trained.
        target.tensor = state[0]
    elif not isinstance(target, dict):
        raise ValueError(f"its pickle gives attributes to a {type(target).__name__}")
    # A dictionary's only attribute is `_metadata`, the versions of torch's modules.


def _storage(name: Any) -> _Storage:
    """The storage that a pickle names: ("storage", type, key, device, elements), and of old files the part of it."""
    kind, made, key, _, count, *part = name
    if kind != "storage" or not isinstance(made, _Global) or made.name not in _STORAGE_TYPES:
        raise _Refusal("its pickle names a storage of no known type")
    if not isinstance(key, str):
        raise ValueError("its pickle names a storage by no string")
    start = 0
    if part and part[0] is not None:
        _, start, count = part[0]
    return _Storage(_STORAGE_TYPES[made.name], key, start, count)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("its pickle appends to what is no list")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    # Of strings and numbers only: the hash of deeply nested tuples can bring down the process.
    if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in keys):
        raise ValueError("its pickle sets entries that are none of a dictionary")
    target.update(zip(keys, values, strict=True))

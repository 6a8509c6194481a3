"""Which Python objects may stand in a checkpoint: those that load again without running code.

What `torch.load(weights_only=True)` allows plus the user's `safe_globals` is the one rule, for saving (checked before
anything is written) and for restoring. Used by plan.py, restore.py and, for tensors of stock steps, read_items.py.
"""

from __future__ import annotations

import codecs
import io
import math
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch._weights_only_unpickler import _get_allowed_globals

from asyncckpt.chunks import HUGE
from asyncckpt.errors import UnsafeObjectError
from asyncckpt.framing import encode_object
from asyncckpt.unpickle import check_keys, check_nesting, unpickle

_LOCAL_HEADER_BYTES = 30  # of a record, before its name and what is added to that
_PLAIN = (int, float, complex, str, bool, bytes, type(None))


def is_plain(value: Any) -> bool:
    """Whether a value is made of the types that always load again, so that no trial is needed."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind in (list, tuple, set):
        return all(map(is_plain, value))
    if kind is torch.Tensor:
        return value.layout is torch.strided and not value.is_quantized
    return kind is dict and all(is_plain(key) and is_plain(item) for key, item in value.items())


def load_object(data: bytes | memoryview, safe_globals: Iterable[Any], key: str) -> Any:
    """The value of an object item, or the tensor of a stock one, in host memory and of no more of it than `data` has.

    UnsafeObjectError names the key and what it asks for.
    """
    try:
        value = _load(data, safe_globals)
        check_nesting(value)
    except Exception as exc:  # whatever a __setstate__ raises
        raise UnsafeObjectError(
            f"the object at {key!r} does not load without running code: {_reason(exc)}. "
            "Store plain values or tensors, or pass the classes you trust as safe_globals=[...]."
        ) from exc
    return value


def check_object(value: Any, safe_globals: Iterable[Any], key: str) -> None:
    """Raise UnsafeObjectError if the value could not be saved, or not be loaded back."""
    if is_plain(value):
        return
    try:
        data = encode_object(value)
    except Exception as exc:  # pickle raises PicklingError, TypeError, AttributeError, ...
        raise UnsafeObjectError(
            f"the object at {key!r} ({type(value).__module__}.{type(value).__qualname__}) cannot be stored: {exc}. "
            "Nothing was written. Leave it out of the state dict, or store plain values and tensors instead."
        ) from exc
    load_object(data, safe_globals, key)


def _load(data: bytes | memoryview, safe_globals: Iterable[Any]) -> Any:
    """As torch.load(weights_only=True), whose list of what is allowed this takes, less what allocates without need.

    Not by it: it inflates archives, lets arguments choose how much memory a bytearray or a tensor takes, and hashes
    tuples of any depth, which crashes the process.
    """
    return _load_records(archive_records(data), safe_globals)


def load_structure(pickled: bytes, sizes: Mapping[str, int], safe_globals: Iterable[Any]) -> tuple[Any, dict[int, str]]:
    """What a file of torch.save holds, its tensors on the device "meta", from its record "data.pkl" alone; and {_cdata
    of a storage: its record}. sizes: of the records. UnsafeObjectError as `load_object`."""
    rules = _RulesOfStructure(sizes, _by_name(safe_globals))
    try:
        value = unpickle(pickled, rules)
        check_nesting(value)
    except Exception as exc:  # whatever a __setstate__ raises
        raise UnsafeObjectError(
            f"the file does not load without running code: {_reason(exc)}. Pass the classes you trust as "
            "safe_globals=[...]"
        ) from exc
    return value, rules.names()


def _load_records(records: Mapping[str, memoryview], safe_globals: Iterable[Any]) -> Any:
    try:
        return unpickle(records["data.pkl"], _Rules(records, _by_name(safe_globals)))
    finally:
        torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]


def _by_name(safe_globals: Iterable[Any]) -> dict[str, Any]:
    users = {}
    for entry in (*torch.serialization.get_safe_globals(), *safe_globals):
        value, name = entry if isinstance(entry, tuple) else (entry, f"{entry.__module__}.{entry.__qualname__}")
        users[name] = value
    return users


def archive_records(data: bytes | memoryview) -> dict[str, memoryview]:
    """What torch.save wrote under which name. ValueError if a record is packed, or they hold more bytes than `data`."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, OverflowError) as exc:
        raise ValueError(f"it is no archive: {exc}") from exc
    view, records, left = memoryview(data), dict[str, memoryview](), len(data)
    for entry in entries:
        name, at, size = entry.filename.partition("/")[2], entry.header_offset, entry.file_size
        left -= size
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != size or entry.flag_bits & 1 or left < 0:
            raise ValueError("its archive is packed, or holds more than there is")
        if at + _LOCAL_HEADER_BYTES > len(view) or name in records:
            raise ValueError("its archive has a record outside of it, or one twice")
        start = at + _LOCAL_HEADER_BYTES + sum(struct.unpack_from("<HH", view, at + 26))
        if start + size > len(view):
            raise ValueError("its archive has a record that ends outside of it")
        records[name] = view[start : start + size]
    return records


class _Rules:
    """Of objects. users: {name: class or function} that may be used in any way."""

    def __init__(self, records: Mapping[str, memoryview], users: Mapping[str, Any]) -> None:
        self._records = records
        self._users = users
        self._storages: dict[str, torch.storage.TypedStorage] = {}

    def find(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        allowed = _get_allowed_globals()
        if full == "builtins.bytes":  # torch.save writes b"" so, which torch's own list lacks
            return bytes
        if module not in ("sys", "os", "posix", "nt"):
            for table in (self._users, allowed):
                if full in table:
                    return table[full]
        raise ValueError(f"it asks for {full[:200]!r}, which is not allowed")

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        if function in self._users.values():
            return function(*args)
        if function is torch._tensor._rebuild_from_type_v2:
            rebuild, cls, inner, state = args
            if cls not in (torch.Tensor, torch.nn.Parameter, *self._users.values()):
                raise ValueError("it makes a tensor of a class that is not allowed")
            tensor = self.call(rebuild, inner)
            return function(lambda: tensor, cls, (), state)  # type: ignore[no-untyped-call]
        if function is torch._utils._rebuild_wrapper_subclass and args[0] in self._users.values():
            return function(*args)  # type: ignore[no-untyped-call]
        check = _CHECKS.get(function)
        if check is None:
            raise ValueError(f"it calls {getattr(function, '__name__', type(function).__name__)}")
        check(*args)
        return function(*args)

    def new(self, cls: Any, args: tuple[Any, ...]) -> Any:
        if cls not in self._users.values():
            raise ValueError(f"it makes a {getattr(cls, '__name__', type(cls).__name__)}")
        return cls.__new__(cls, *args)

    def build(self, instance: Any, state: Any) -> None:
        if type(instance) is OrderedDict:
            vars(instance).update(state)
        elif type(instance) not in self._users.values():
            raise ValueError(f"it gives a {type(instance).__name__} a state")
        elif hasattr(instance, "__setstate__"):
            instance.__setstate__(state)
        else:
            in_dict, in_slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            vars(instance).update(in_dict or {})
            for name, value in (in_slots or {}).items():
                setattr(instance, name, value)

    def persistent(self, name: Any) -> torch.storage.TypedStorage:
        """A tensor's storage, which is a record."""
        what, kind, key, _, numel = name
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if what != "storage" or type(key) is not str or type(numel) is not int:
            raise ValueError("it asks for what is no storage")
        if key not in self._storages:
            self._storages[key] = self._storage(key, numel, dtype)
        if self._storages[key].dtype != dtype:
            raise ValueError("it takes a storage for two dtypes")
        return self._storages[key]

    def _storage(self, key: str, numel: int, dtype: torch.dtype) -> torch.storage.TypedStorage:
        record = self._records[f"data/{key}"]
        if numel * dtype.itemsize != len(record):
            raise ValueError(f"a storage of {numel} elements has {len(record)} bytes")
        return _storage_of(record, dtype, bytes(self._records.get("byteorder", b"little")).decode())


class _RulesOfStructure(_Rules):
    """The same without the bytes of tensors. sizes: of their records."""

    def __init__(self, sizes: Mapping[str, int], users: Mapping[str, Any]) -> None:
        super().__init__({}, users)
        self._sizes = sizes

    def _storage(self, key: str, numel: int, dtype: torch.dtype) -> torch.storage.TypedStorage:
        num_bytes = self._sizes[f"data/{key}"]
        if numel * dtype.itemsize != num_bytes:
            raise ValueError(f"a storage of {numel} elements has {num_bytes} bytes")
        storage: Any = torch.UntypedStorage(num_bytes, device="meta")  # type: ignore[no-untyped-call]
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

    def names(self) -> dict[int, str]:
        return {storage._untyped_storage._cdata: f"data/{key}" for key, storage in self._storages.items()}


def _storage_of(record: memoryview, dtype: torch.dtype, byteorder: str) -> torch.storage.TypedStorage:
    storage: Any = torch.UntypedStorage(len(record))  # type: ignore[no-untyped-call]
    if record:
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(torch.frombuffer(bytearray(record), dtype=torch.uint8))
    if byteorder != sys.byteorder:
        storage.byteswap(dtype)
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _check_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, *more: Any
) -> None:
    """That its elements lie in the storage: torch makes that one larger where they do not."""
    dtype = more[0] if more and isinstance(more[0], torch.dtype) else storage.dtype
    numbers = (offset, *size, *stride)
    if hooks or len(size) != len(stride) or not all(type(number) is int and 0 <= number < HUGE for number in numbers):
        raise ValueError("it makes a tensor of no possible shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > storage._untyped_storage.nbytes():
        raise ValueError(f"it makes a tensor of shape {tuple(size)} of {storage._untyped_storage.nbytes()} bytes")


def _check_quantized(storage: Any, offset: Any, size: Any, stride: Any, parameters: Any, *more: Any) -> None:
    _check_tensor(storage, offset, size, stride)
    if math.prod(size) * storage.dtype.itemsize > storage._untyped_storage.nbytes():
        raise ValueError(f"it makes a tensor of shape {tuple(size)} of {storage._untyped_storage.nbytes()} bytes")


def _check_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> None:
    if not isinstance(data, torch.Tensor) or hooks or any(str(name).startswith("__") for name in state or ()):
        raise ValueError("it makes a parameter of no tensor")


def _check_values(values: Any = ()) -> None:
    """Of what hashes them."""
    if isinstance(values, list) and all(isinstance(value, list) for value in values):
        values = [value[0] for value in values]  # pairs: how pickle has an OrderedDict
    check_keys(values)


def _check_bytes(text: Any = b"", encoding: Any = "latin1") -> None:
    if not isinstance(text, str | bytes) or encoding not in ("latin1", "latin-1"):  # others make bytes of bytes
        raise ValueError("it makes bytes of no text")


def _anything(*args: Any) -> None:
    """Takes no more memory than its arguments."""


_CHECKS: dict[Any, Callable[..., None]] = {
    torch._utils._rebuild_tensor: _check_tensor,
    torch._utils._rebuild_tensor_v2: _check_tensor,
    torch._utils._rebuild_tensor_v3: _check_tensor,
    torch._utils._rebuild_qtensor: _check_quantized,
    torch._utils._rebuild_parameter: _check_parameter,
    torch._utils._rebuild_parameter_with_state: _check_parameter,
    torch._utils._rebuild_sparse_tensor: _anything,
    torch._utils._rebuild_meta_tensor_no_storage: _anything,
    torch._utils._rebuild_device_tensor_from_numpy: _anything,
    torch._utils._rebuild_device_tensor_from_cpu_tensor: _anything,
    torch.serialization._get_layout: _anything,
    torch.Size: _anything,
    torch.device: _anything,
    complex: _anything,
    OrderedDict: _check_values,
    Counter: _check_values,
    set: _check_values,
    bytes: _check_bytes,
    bytearray: _check_bytes,
    codecs.encode: _check_bytes,
}


def _reason(exc: Exception) -> str:
    return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0][:500] if str(exc).strip() else ''}"

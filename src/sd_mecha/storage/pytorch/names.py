"""What the pickle of a PyTorch checkpoint may mention, and what it becomes: descriptions of tensors, and plain data.

The list is closed. Functions that rebuild tensors become descriptions (`StoredTensor`), containers become plain dicts
and tuples, and the classes that trainers leave in checkpoints become `Inert`, which has their name and nothing of
theirs. Nothing is imported or called because a file names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from sd_mecha.storage.pytorch.pickle_machine import Name, PickleMachine
from sd_mecha.storage.pytorch.pickle_opcodes import OBJECT
from sd_mecha.storage.strict_json import brief

Args = tuple[Any, ...]


class Storage:
    """A flat row of elements that tensors share: its key in the file, and what it holds."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key = key
        self.dtype = dtype
        self.numel = numel

    @property
    def nbytes(self) -> int:
        """Bytes of it in the file."""
        return self.numel * self.dtype.itemsize


class StoredTensor:
    """A tensor as the pickle describes it; nothing is checked yet."""

    __slots__ = ("dtype", "metadata", "offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any, metadata: Any) -> None:
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.metadata = metadata

    def __repr__(self) -> str:
        return "<tensor>"


class UnreadableTensor:
    """A tensor of a kind that cannot be read; that matters only where it is one of the model's."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        return "<tensor>"


def _storages() -> dict[str, torch.dtype]:
    kinds = {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "Untyped": torch.uint8,
        "QUInt8": torch.quint8,
        "QInt8": torch.qint8,
        "QInt32": torch.qint32,
        "QUInt4x2": torch.quint4x2,
        "QUInt2x4": torch.quint2x4,
    }
    return {f"{kind}Storage": dtype for kind, dtype in kinds.items()}


_STORAGES = _storages()
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class StorageKind(Name):
    """A class of storages."""

    __slots__ = ("dtype",)

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.dtype = dtype


def _dict(machine: PickleMachine, args: Args) -> Any:
    found: dict[Any, Any] = {}
    items = args[0] if args else ()
    if len(args) > 1 or type(items) not in (dict, list, tuple):
        machine.fail("it makes a dict of something else than pairs")
    for item in items.items() if type(items) is dict else items:
        if type(item) not in (list, tuple) or len(item) != 2:
            machine.fail("it makes a dict of something else than pairs")
        machine.put(found, *item)
    return found


def _default_dict(machine: PickleMachine, args: Args) -> Any:
    return {}  # its items follow


def _size(machine: PickleMachine, args: Args) -> Any:
    if len(args) != 1 or type(args[0]) not in (list, tuple):
        machine.fail("it makes a torch.Size of something else than a tuple")
    machine.charge(8 * len(args[0]))
    return tuple(args[0])


def _tensor(machine: PickleMachine, args: Args) -> Any:
    if not 4 <= len(args) <= 7 or type(args[0]) is not Storage:
        machine.fail("it rebuilds a tensor of something else than a storage")
    storage, offset, shape, strides = args[:4]
    return StoredTensor(storage, offset, shape, strides, storage.dtype, args[6] if len(args) == 7 else None)


def _tensor_with_dtype(machine: PickleMachine, args: Args) -> Any:
    if not 7 <= len(args) <= 8 or type(args[0]) is not Storage or type(args[6]) is not torch.dtype:
        machine.fail("it rebuilds a tensor of something else than a storage and a dtype")
    storage, offset, shape, strides = args[:4]
    return StoredTensor(storage, offset, shape, strides, args[6], args[7] if len(args) == 8 else None)


def _first(machine: PickleMachine, args: Args) -> Any:
    if not args or type(args[0]) not in (StoredTensor, UnreadableTensor):
        machine.fail("it makes a parameter of something else than a tensor")
    return args[0]


def _from_type(machine: PickleMachine, args: Args) -> Any:
    """`function(*arguments)`, which becomes a subclass of tensor with attributes."""
    if len(args) != 4 or type(args[0]) is not Name or type(args[2]) is not tuple:
        machine.fail("it makes a tensor in a way that torch.save does not")
    function, kind, arguments, _ = args
    if function.make is _from_type:  # torch.save never nests them, and each level would be one of recursion
        machine.fail("it nests the making of a tensor")
    if getattr(kind, "name", "") not in _TENSOR_CLASSES:
        return UnreadableTensor(f"of class {brief(kind)}")
    return function.make(machine, arguments) if function.make else UnreadableTensor(f"made by {function.name}")


def _unreadable(what: str) -> Callable[[PickleMachine, Args], Any]:
    return lambda machine, args: UnreadableTensor(what)


_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.nn.Parameter")
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_qtensor": "quantized",
    "_rebuild_meta_tensor_no_storage": "on the device 'meta', without data",
    "_rebuild_wrapper_subclass": "of a class that wraps others",
    "_rebuild_device_tensor_from_numpy": "of a device whose data lies in the pickle",
    "_rebuild_device_tensor_from_cpu_tensor": "of another device",
    "_rebuild_xla_tensor": "of a device whose data lies in the pickle",
}
_MEANINGS: dict[str, Callable[[PickleMachine, Args], Any]] = {
    "builtins.dict": _dict,
    "__builtin__.dict": _dict,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _default_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    **{f"torch._utils.{name}": _unreadable(what) for name, what in _OTHER_TENSORS.items()},
}
_HARMLESS = """
builtins: bool bytearray bytes complex float frozenset int list object range set slice str tuple
__builtin__: bool bytearray bytes complex float frozenset int list long object range set slice str tuple unicode
collections: Counter deque
argparse: Namespace
types: SimpleNamespace
datetime: date datetime time timedelta timezone
decimal: Decimal
fractions: Fraction
uuid: UUID
typing: Any Dict List Optional Tuple Union
pathlib: Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
pathlib._local: Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
_codecs: encode
copyreg: _reconstructor
copy_reg: _reconstructor
numpy: dtype ndarray bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 str_
numpy.core.multiarray: _reconstruct scalar
numpy._core.multiarray: _reconstruct scalar
numpy.core.numeric: _frombuffer
numpy._core.numeric: _frombuffer
numpy.random._pickle: __bit_generator_ctor __generator_ctor __randomstate_ctor
numpy.random._mt19937: MT19937
numpy.random._pcg64: PCG64
torch: Generator Tensor device layout memory_format
torch: per_channel_affine per_channel_affine_float_qparams per_channel_symmetric per_tensor_affine per_tensor_symmetric
torch.nn.parameter: Buffer Parameter
torch.nn: Parameter
torch.serialization: _get_layout
torch.torch_version: TorchVersion
torch.version: __version__
easydict: EasyDict
addict.addict: Dict
ml_collections.config_dict.config_dict: ConfigDict
yacs.config: CfgNode
"""
_PREFIXES = (
    "lightning.",
    "lightning_fabric.",
    "lightning_utilities.",
    "omegaconf.",
    "pytorch_lightning.",
    "torch.optim.",
    "torchmetrics.",
)
_DANGEROUS = re.compile(
    "__builtin__|builtins|os|posix|nt|sys|subprocess|commands|shutil|runpy|importlib|pickle|_pickle|marshal|code|ctypes"
    "|socket|operator|functools|webbrowser|pty|platform|asyncio|multiprocessing|threading|pip|timeit"
)
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def _inert_names() -> frozenset[str]:
    found = set()
    for line in _HARMLESS.strip().splitlines():
        module, _, names = line.partition(": ")
        found |= {f"{module}.{name}" for name in names.split()}
    return frozenset(found)


_INERT = _inert_names()


class TorchNames:
    """Globals and storages of a checkpoint.

    Attributes:
        storages: those that the pickle mentioned, by key.
    """

    _more: tuple[str, ...] = ()
    """Beginnings of further names that become inert."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._known: dict[str, Any] = {}

    def find(self, machine: PickleMachine, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known = self._known.get(full)
        if known is None:
            known = self._known[full] = self._find(machine, module, name, full)
        return known

    def _find(self, machine: PickleMachine, module: str, name: str, full: str) -> Any:
        machine.charge(OBJECT)
        if full in _MEANINGS:
            return Name(full, _MEANINGS[full])
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return StorageKind(full, _STORAGES[name])
        if full in _INERT or (full.startswith((*_PREFIXES, *self._more)) and _PLAIN_NAME.fullmatch(full)):
            return Name(full)
        shown = brief(full)
        if _DANGEROUS.fullmatch(module.partition(".")[0]):
            machine.fail(f"it wants to use {shown}, which can run programs: the file is malicious or was tampered with")
        if b"torch.nn.modules" in machine.data:
            machine.fail(
                f"it holds a module saved whole, of class {shown}, which only its program can load; "
                "load it there and save module.state_dict()"
            )
        machine.fail(
            f"it wants to use {shown}, which is not on the list of what a checkpoint of tensors needs; if you trust "
            "the file, load it with the program that wrote it and save the state_dict() alone"
        )

    def persistent(self, machine: PickleMachine, identifier: Any) -> Any:
        if type(identifier) is not tuple or not 5 <= len(identifier) <= 6 or identifier[0] != "storage":
            machine.fail(f"it refers to {brief(identifier)}, which is no storage of a tensor")
        _, kind, key, _, numel = identifier[:5]
        if type(kind) is not StorageKind or type(key) is not str or type(numel) is not int or not 0 <= numel < 2**60:
            machine.fail(f"it refers to {brief(identifier)}, which is no storage of a tensor")
        if len(identifier) == 6 and identifier[5] is not None:
            machine.fail(
                "it refers to a part of a storage, as PyTorch before 0.4 wrote; load it there and save it again"
            )
        known = self.storages.get(key)
        if known is None:
            known = self.storages[key] = Storage(key, kind.dtype, numel)
        elif known.dtype != kind.dtype or known.numel != numel:
            if known.nbytes != numel * kind.dtype.itemsize:
                machine.fail(f"it gives storage {brief(key)} two sizes")
            return Storage(key, kind.dtype, numel)  # the same bytes, seen as another dtype
        return known

"""Open files of weights, torch's and safetensors', without running or trusting what is in them."""

from __future__ import annotations

import io
import pickletools
import re
import struct
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from nni_haloc.utils.errors import first_sentence, printable

REMEDY = "save the weights alone: torch.save(model.state_dict(), FILE)"
"""The end of a message about a file that holds more than tensors and plain values."""

_MOST = 2**26
"""Bytes of a pickle, without the tensors' values. ResNet-152's has 0.1 MB."""


class _Refused(ValueError):
    """A file that is not loaded; the message is ours."""


class _Plain:
    """Stand for an object of plain data. Whatever a file gives it is ignored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainDict:
    """Stand for a kind of dict: it makes an ordinary one."""

    def __new__(cls, *args: Any) -> Any:
        return {}


class _PlainList:
    """Stand for a kind of list: it makes an ordinary one."""

    def __new__(cls, *args: Any) -> Any:
        return []


_VALUES = {
    "argparse": ["Namespace"],
    "builtins": [
        "bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice",
        "str", "tuple",
    ],
    "datetime": ["date", "datetime", "time", "timedelta", "timezone"],
    "decimal": ["Decimal"],
    "fractions": ["Fraction"],
    "numpy": ["bool_", "dtype", "ndarray"],
    "numpy.core.multiarray": ["_reconstruct", "scalar"],
    "numpy.dtypes": [
        "BoolDType", "BytesDType", "Complex128DType", "Complex64DType", "Float16DType",
        "Float32DType", "Float64DType", "Int16DType", "Int32DType", "Int64DType", "Int8DType",
        "StrDType", "UInt16DType", "UInt32DType", "UInt64DType", "UInt8DType",
    ],
    "pathlib": [
        "Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath",
    ],
    "torch.torch_version": ["TorchVersion"],
    "types": ["SimpleNamespace"],
    "uuid": ["UUID"],
}  # fmt: skip
"""Plain data that training programs put beside their weights: settings, paths, numbers, dates.

None of these classes is imported or called, see `_Plain`.
"""
_DICTS = {
    "collections": ["defaultdict"],
    "lightning.fabric.utilities.data": ["AttributeDict"],
    "lightning.pytorch.utilities.parsing": ["AttributeDict"],
    "lightning_fabric.utilities.data": ["AttributeDict"],
    "pytorch_lightning.utilities.parsing": ["AttributeDict"],
}
_LISTS = {"collections": ["deque"]}
_NEWER_NAMES = {"numpy.core.multiarray": "numpy._core.multiarray", "pathlib": "pathlib._local"}
"""Modules that have moved, by the names that older programs write."""

_STAND_INS: dict[str, Any] = {
    f"{place}.{name}": stand_in
    for table, stand_in in ((_VALUES, _Plain), (_DICTS, _PlainDict), (_LISTS, _PlainList))
    for module, names in table.items()
    for place in (module, _NEWER_NAMES.get(module, module))
    for name in names
}
_TENSORS = {
    "_codecs.encode",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.per_channel_affine",
    "torch.per_tensor_affine",
    "torch.serialization._get_layout",
    *(
        f"torch._utils._rebuild_{what}"
        for what in ("parameter", "parameter_with_state", "tensor", "tensor_v2", "tensor_v3")
        + ("sparse_tensor", "qtensor", "meta_tensor_no_storage")
    ),
}
"""What torch's own reader of weights makes tensors and containers with.

What else it allows is left out: ``bytearray`` and classes of tensors, which take as much memory as
a number in the file says.
"""
_STORAGE = re.compile(r"torch\.(cuda\.)?(?!Untyped|Typed)\w+Storage")
_BYTES = "torch.storage.UntypedStorage"
"""The storage of numbers that have no class of storage: uint16, uint32, uint64, float8, complex32.

Called with a number it takes that much memory; so it may stand in `_RECORD` alone.
"""
_RECORD = (
    ("MARK",),
    ("BINUNICODE",),
    ("GLOBAL",),
    ("BINUNICODE",),
    ("BINUNICODE",),
    ("BININT", "BININT1", "BININT2", "LONG1"),
    ("TUPLE",),
    ("BINPERSID",),
)
"""Instructions that name a record of the file: "storage", class, record, device, size."""


@dataclass
class WeightFile:
    """What a file of weights holds.

    Attributes:
        path: the file.
        content: tensors by name, as a training program has nested them among other values.
        mapped: whether the tensors' values are mapped from the file: the system reads them when
            they are looked at. In a file of torch's former format they are not there before
            `values`.
    """

    path: Path
    content: Any
    mapped: bool

    def values(self) -> Any:
        """Return the content with the tensors' values."""
        if not self.mapped:
            self.content = None  # it has as much memory as the values
            self.content, self.mapped = _loaded(self.path, mapped=False), True
        return self.content


def open_weights(path: Path) -> WeightFile:
    """Open a file of weights; the tensors' values take no memory before `WeightFile.values`.

    A zip archive is read through once, a piece at a time, where it has check sums.

    Args:
        path: a file of ``torch.save`` or of safetensors, whatever it is called.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file, is damaged, or holds an object of a class that
            is not plain data; names the file, and what to do.
    """
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of weights, found a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(512)
        _check_known(path, head)
        if _is_safetensors(path, head):
            return WeightFile(path, _tensors(path), True)
        zipped = head.startswith(b"PK\x03\x04")
        (_check_archive if zipped else _check_former)(path, file)
    if zipped:
        return WeightFile(path, _loaded(path, mapped=True), True)
    with torch.serialization.skip_data():
        return WeightFile(path, _loaded(path, mapped=False), False)


_SIGNATURES = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; run git lfs pull"),
    (b"\x89HDF", "an HDF5 file, as Keras writes; expected torch's weights"),
    (b"\x93NUMPY", "a NumPy array; expected torch's weights"),
    (b"GGUF", "a GGUF file; expected torch's weights"),
    (b"\x1f\x8b", "compressed (gzip); unpack it first"),
    (b"BZh", "compressed (bzip2); unpack it first"),
    (b"\xfd7zXZ", "compressed (xz); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd); unpack it first"),
    (b"7z\xbc\xaf", "compressed (7z); unpack it first"),
    (b"Rar!", "compressed (rar); unpack it first"),
    (b"PK\x05\x06", "an empty zip archive"),
)


def _check_known(path: Path, head: bytes) -> None:
    """Refuse kinds of files that are often taken for weights, each by its name.

    Args:
        path: the file.
        head: its first 512 bytes.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    kinds = {what: start.startswith(signature) for signature, what in _SIGNATURES} | {
        "empty (0 bytes)": not head,
        "a web page or XML, perhaps an error of the server; download it again": start[:1] == b"<"
        and b"\0" not in head,
        "a tar archive; unpack it first": head[257:262] == b"ustar",
        "a TensorFlow Lite file; expected torch's weights": head[4:8] == b"TFL3",
        "an ONNX file; expected torch's weights": path.suffix == ".onnx"
        or (head[:3:2] == b"\x08\x12" and head[8:9] != b"{"),
    }
    found = next((what for what, is_so in kinds.items() if is_so), None)
    if found is None and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        shown = start[:30].decode("utf-8", "replace").strip().partition("\n")[0]
        found = f"text ({shown!r}); expected torch's weights"
    if found is not None:
        raise ValueError(f"{path}: the file is {found}")


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Tell whether a file begins with a header of safetensors."""
    size = int.from_bytes(head[:8], "little")
    begins = head[8:9] == b"{" and size < 2**32
    if path.suffix == ".safetensors" and not (begins and 8 + size <= path.stat().st_size):
        remedy = "call it .pt" if head[:2] in (b"PK", b"\x80\x02") else "copy it again"
        raise ValueError(f"{path}: not a safetensors file, or cut off; {remedy}")
    return begins and 8 + size <= path.stat().st_size


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(str(path))  # mapped into memory, not read
    except Exception as error:  # SafetensorError, and torch's own
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> _Refused:
    """Return the error of a file that can't be read to its end."""
    reason = first_sentence(error).removesuffix(".")
    if isinstance(error, MemoryError) or "alloc" in reason:
        reason = "it asks for more memory than there is"
    return _Refused(f"{path}: damaged or cut off ({reason}); copy or download it again")


def _check_archive(path: Path, file: IO[bytes]) -> None:
    """Check a zip archive: whether `torch.save` wrote it, whole, with nothing but plain data."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            _check_names(path, archive.namelist())
            pickles = [n for n in records if n.count("/") == 1 and n.endswith("/data.pkl")]
            what = None if pickles else _archive_of_another_kind(list(records))
            if any(re.search(r"^[^/]+/(constants\.pkl|code/)", name) for name in records):
                what = (
                    "a TorchScript archive, which holds code; save its weights alone:"
                    " torch.save(torch.jit.load(FILE).state_dict(), ANOTHER)"
                )
            elif any(info.compress_type for info in records.values()) and what is None:
                what = f"packed again with compression, which torch does not read; {REMEDY}"
            if what is not None:
                raise _Refused(f"{path}: the file is {what}")
            for info in records.values():
                if info.CRC:  # torch can leave it out
                    _read_through(archive, info)
            for name in pickles:
                if records[name].file_size > _MOST:
                    raise _unsafe(path, f"more than {_MOST >> 20} MB beside the tensors")
                place = name.removesuffix(".pkl") + "/"
                sizes = {
                    other.removeprefix(place): info.file_size
                    for other, info in records.items()
                    if other.startswith(place)
                }
                _check_pickle(path, io.BytesIO(_raw(file, records[name])), sizes)
    except _Refused:
        raise
    except Exception as error:  # zipfile has many for an archive that is damaged
        raise _damaged(path, error) from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse an archive with several records of one name, of which readers read different ones.

    Capital and small letters are alike to torch's reader.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other is not name:
            shown = f"{printable(other, 60)} and {printable(name, 60)}"
            raise _unsafe(path, f"expected records of different names, found {shown}")


def _read_through(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Read a record, a piece at a time; zipfile compares its check sum."""
    with archive.open(info) as record:
        while record.read(2**20):
            pass


def _raw(file: IO[bytes], info: zipfile.ZipInfo) -> bytes:
    """Return an uncompressed record, whether it has a check sum or not."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    file.seek(name + extra, 1)
    return file.read(info.file_size)


def _archive_of_another_kind(names: list[str]) -> str:
    """Say what a zip archive without torch's pickle is."""
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz); expected torch's weights"
    if any(name.endswith(".h5") for name in names):
        return "a Keras archive; expected torch's weights"
    if any(re.search(r"archive_format$|exported_program\.json$", name) for name in names):
        return (
            "a program of torch.export; save its weights alone:"
            " torch.save(torch.export.load(FILE).state_dict, ANOTHER)"
        )
    shown = printable(", ".join(names[:3]), 100)
    return f"a zip archive that torch.save did not write ({shown}); unpack it first"


def _check_former(path: Path, file: IO[bytes]) -> None:
    """Check a file of torch's former format: five pickles, and then the values.

    They are a magic number, the format's version, facts about the machine, the content, and the
    order of the values.
    """
    file.seek(0)
    magic = torch.serialization.MAGIC_NUMBER
    if not any(argument == magic for _, argument in _instructions(path, file)):
        raise _unsafe(path, "a pickle that torch.save did not write")
    file.seek(0)
    names = [name for _ in range(5) for name in _check_pickle(path, file)]
    if _BYTES in names:
        kind = next(filter(_is_dtype, names), "such numbers")
        raise _Refused(
            f"{path}: torch can't read {kind} from its former format; save the weights again,"
            " without _use_new_zipfile_serialization=False"
        )


def _check_pickle(path: Path, file: IO[bytes], sizes: Mapping[str, int] | None = None) -> list[str]:
    """Read a pickle's instructions, run none of them, and refuse classes that are not plain data.

    Args:
        path: the file, for messages.
        file: at the pickle's beginning; it is left at its end.
        sizes: the bytes of each record of the archive; None in torch's former format, which has
            no records.

    Returns:
        The full names of classes, functions and types of numbers in it.
    """
    names: list[str] = []
    window: deque[tuple[str, Any]] = deque([("", None)] * len(_RECORD), len(_RECORD))
    for name, argument in _written_out(_instructions(path, file)):
        if name == "PROTO" and argument != 2:
            raise _unsafe(path, f"written with pickle protocol {argument}, expected torch's own, 2")
        window.append((name, argument))
        if name == "GLOBAL":
            names.append(argument)
            if argument != _BYTES and not _is_allowed(argument):
                raise _strange(path, argument)
        if sizes is not None and (name == "BINPERSID" or window[2] == ("GLOBAL", _BYTES)):
            _check_record(path, window, sizes)
    return names


def _check_record(path: Path, window: Sequence[tuple[str, Any]], sizes: Mapping[str, int]) -> None:
    """Check that instructions are those of `_RECORD`, and that the record is as large as they say.

    Args:
        path: the file, for messages.
        window: the instructions.
        sizes: the bytes of each record.
    """
    fits = all(name in names for (name, _), names in zip(window, _RECORD, strict=True))
    _, what, storage, record, _, number, *_ = (argument for _, argument in window)
    if not fits or what != "storage" or not (storage == _BYTES or _STORAGE.fullmatch(storage)):
        raise _strange(path, storage if window[2][0] == "GLOBAL" else "a reference to no record")
    kind = torch.serialization.StorageType(storage.split(".")[-1]) if storage != _BYTES else None
    expected, found = number * (kind.dtype.itemsize if kind else 1), sizes.get(record, 0)
    if not 0 <= expected <= found:
        what = f"record {printable(record, 40)} has {found} bytes, expected {expected}"
        raise _damaged(path, ValueError(what))


def _strange(path: Path, name: str) -> _Refused:
    """Return the error of a file that holds a class, or a function, that is not plain data."""
    return _unsafe(path, f"it holds {printable(name, 100)}, neither a tensor nor plain data")


def _written_out(instructions: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Put classes and texts in the places where a pickle refers to them, with today's names.

    Instructions that only remember what they are go; at the end there are some that do nothing.
    """
    memo: dict[int, tuple[str, Any]] = {}
    last: tuple[str, Any] = ("", None)
    for name, argument in instructions:
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        last = (name, argument)
        if name in ("BINGET", "LONG_BINGET"):
            kept = memo.get(argument, last)
            last = kept if kept[0] in ("GLOBAL", "BINUNICODE") else last
        elif name in ("GLOBAL", "INST"):
            module, _, attribute = argument.partition(" ")
            known = (IMPORT_MAPPING.get(module, module), attribute)
            full = ".".join(NAME_MAPPING.get((module, attribute), known))  # Python 2's names
            last = ("GLOBAL", full)
        yield last
    yield from [("", None)] * len(_RECORD)


def _instructions(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of each instruction of a pickle."""
    start = file.tell()
    try:
        for code, argument, _ in pickletools.genops(file):
            yield code.name, argument
    except Exception as error:  # of bytes that are no pickle, or are cut off
        if not start and file.tell() < 512:
            raise _Refused(f"{path}: not a file of weights of a kind that is known") from None
        raise _damaged(path, error) from None


def _unsafe(path: Path, why: str) -> _Refused:
    """Return the error of a file that holds more than can be loaded safely."""
    return _Refused(f"{path}: not a file of weights that can be loaded safely: {why}; {REMEDY}")


def _is_allowed(name: str) -> bool:
    """Tell whether the full name of a class or function stands for tensors or plain data."""
    return (
        name in _STAND_INS
        or name in _TENSORS
        or _STORAGE.fullmatch(name) is not None
        or _is_dtype(name)
    )


def _is_dtype(name: str) -> bool:
    """Tell whether a full name is that of one of torch's types of numbers."""
    module, _, attribute = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _loaded(path: Path, *, mapped: bool) -> Any:
    """Return what a checked file of torch's holds; the values are read, or mapped into memory."""
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")
            return torch.load(path, "cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch, pickle and zip each have their own
        raise _damaged(path, error) from None

"""msModelSlim's ``save_type=["numpy"]`` folders: a dictionary of torch tensors, pickled into a .npy file, for each kind of tensor.

Defined by msModelSlim (PyPI ``msmodelslim`` 26.1.0, ``pytorch/llm_ptq``; it is also what ``Calibrator.save`` writes when no
``save_type`` is given). No description lies beside the files, so the types are made up from what is there (``numpy_types``).

Each file is a NumPy array of no dimensions that holds one object: ``{name: torch.Tensor or nn.Parameter}``. The pickle is read as a tree
(``pickle_tree``), which runs nothing, and needs no torch. In it a tensor is what ``torch_tree`` says, around
``torch.storage._load_from_bytes(bytes)``, whose bytes are what ``torch.save`` wrote before torch 1.6, of one storage: five pickles (a
magic number; the protocol, 1001; facts of the machine; the storage as the persistent id
``("storage", torch.HalfStorage, key, device, count, None)``; the list of keys), then the count as 8 bytes, then the elements,
little-endian. Those lie in the .npy file as they are, so a tensor is read from there when asked for.

=========================================  ==================================================================================
``quant_weight``                           ``<name>`` is ``<name>.weight``: int8 codes, one a byte, of quantized layers; floats of others
``weight_scale``, ``weight_offset``,
``input_scale``, ``input_offset``,
``quant_bias``, ``deq_scale``              ``<name>`` is ``<name>.weight_scale``, and so on
``kv_cache_scale``, ``kv_cache_offset``,
``fa_quant_scale``, ``fa_quant_offset``,
``anti_fp_norm``                           names are whole
=========================================  ==================================================================================

Quirks:

1. ``.weight`` and ``.bias`` of a layer have one name in ``quant_weight.npy``, and the bias, which comes last, is what is kept: **the
   weights of every layer with a bias are in no file**. Such a folder is refused, by name.
2. So it is with AntiOutlier's ``<norm>.module``: what is there is the bias of the copy.
3. ``weight_offset`` of a symmetric layer is one scalar that strides of 0 spread over all rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from .checkpoint import Location
from .errors import UnreadableError
from .files import ReadableFile
from .ir import ArrayLike
from .pickle_tree import Call, Name, PickleFile, Place, Reference
from .safetensors_file import DTYPES, SourceFile, TensorInfo, TensorSet, TensorTable
from .stored_tensor import raw_chunks
from .torch_tree import ELEMENTS, NAMES, Storage, are_sizes, kind_of, pickled_tensor, read_tensor

LAYER_FILES = ("quant_weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale")
"""Files whose names lack the suffix, which is the file's own name."""
WHOLE_FILES = ("kv_cache_scale", "kv_cache_offset", "fa_quant_scale", "fa_quant_offset", "anti_fp_norm")

_STORAGE = "torch.storage._load_from_bytes"
_RECONSTRUCT = ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct")
_NAMES = NAMES | {*_RECONSTRUCT, _STORAGE, "numpy.ndarray", "numpy.dtype"}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_HEADER = re.compile(rb"\{'descr': '\|?O8?', 'fortran_order': (?:False|True), 'shape': \(\), \} *\n")


class NpyFile:
    """One .npy file of torch tensors, with what ``SafetensorsFile`` offers: tensors by name, read when asked for.

    rename   (name in the file, the tensor's dtype and shape) to the name to give it
    """

    exempt = 0

    def __init__(self, path: Path, number: int = 0, rename: Callable[[str, TensorInfo], str] = lambda name, info: name) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._file = ReadableFile(path)
        self._pickle = PickleFile(self._file, _NAMES)
        self.tensors = TensorTable(number)
        self._strides: dict[str, tuple[int, ...]] = {}
        for key, value in self._dictionary().items():
            tensor = pickled_tensor(path.name, key, value, self._storage)
            name = rename(key, TensorInfo(tensor.dtype, tensor.shape, tensor.begin, tensor.end))
            self.tensors.add(name, tensor.dtype, tensor.shape, tensor.begin, tensor.end)
            if tensor.stride is not None:
                self._strides[name] = tensor.stride
        listing = "".join(f"{name} {info.dtype} {info.shape} {info.begin}\n" for name, info in self.tensors.items())
        digest = xxhash.xxh3_128_hexdigest(listing.encode())
        self.identity = SourceFile(path.name, self._file.size, self._file.mtime_ns, digest)

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor: unread, unless its elements do not lie in order."""
        return read_tensor(self._file, name, info or self.tensors[name], self._strides.get(name))

    def unchanged(self) -> bool:
        """Whether the file on disk still is the one that was opened, with its size and time."""
        return self._file.unchanged()

    def _bad(self, what: str) -> UnreadableError:
        return UnreadableError(f"{self.path.name}: {what}")

    def _dictionary(self) -> dict[str, Any]:
        """The pickled dictionary, out of its array."""
        start, size = self._data_start(), self._file.size
        array, stop = self._pickle.read(start, size)
        if stop != size:
            raise self._bad(f"{size - stop} bytes follow the pickle; they belong to nothing")
        state = array.state if isinstance(array, Call) and array.name in _RECONSTRUCT else None
        if not isinstance(state, tuple) or len(state) != 5 or state[1] != () or not isinstance(state[4], list) or len(state[4]) != 1:
            raise self._bad("is a NumPy file, but no array of one object as msModelSlim writes; wanted a dictionary of tensors")
        if not isinstance(state[4][0], dict):
            raise self._bad(f"holds a {kind_of(state[4][0])}, wanted a dictionary of tensors")
        return state[4][0]

    def _data_start(self) -> int:
        """Where the pickle begins: after a header that says that the array is one object."""
        head = bytes(self._file.read(0, min(self._file.size, 12)))
        if len(head) < 12 or head[:6] != b"\x93NUMPY" or head[6] not in {1, 2, 3}:
            raise self._bad("is no NumPy file: it does not begin with the words that those begin with")
        start = 10 if head[6] == 1 else 12
        length = int.from_bytes(head[8:start], "little")
        if length > 1024 or start + length > self._file.size:
            raise self._bad(f"its header claims {length} bytes, wanted at most 1024, inside the file's {self._file.size}")
        header = bytes(self._file.read(start, length))
        if not _HEADER.fullmatch(header):
            raise self._bad(f"is the NumPy array {header.strip()[:80].decode('latin-1')!r}, wanted one object, as msModelSlim writes")
        return start + length

    def _storage(self, name: str, value: Any) -> Storage:
        """(dtype, byte of the first element, count) of a storage that ``torch.save`` wrote in the old form."""
        called = isinstance(value, Call) and value.name == _STORAGE and value.state is None and len(value.arguments) == 1
        if not called or not isinstance(value.arguments[0], Place):
            raise self._bad(f"tensor {name[:120]!r} has no storage of its own")
        place = value.arguments[0]
        end = place.begin + place.length
        magic, position = self._pickle.read(place.begin, end)
        if magic != _MAGIC:
            raise self._bad(f"the storage of {name[:120]!r} is nothing that torch.save wrote into a pickle")
        protocol, position = self._pickle.read(position, end)
        machine, position = self._pickle.read(position, end)
        storage, position = self._pickle.read(position, end)
        keys, position = self._pickle.read(position, end)
        if protocol != _PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise self._bad(f"the storage of {name[:120]!r} is not of torch's protocol 1001, little-endian")
        what = storage.what if isinstance(storage, Reference) else None
        if not isinstance(what, tuple) or len(what) != 6 or what[0] != "storage" or what[5] is not None or not isinstance(what[1], Name):
            raise self._bad(f"the storage of {name[:120]!r} is a {kind_of(storage)}, wanted one storage")
        if what[1].path not in ELEMENTS or not are_sizes((what[4],)) or type(what[2]) is not str or keys != [what[2]]:
            raise self._bad(f"the storage of {name[:120]!r} is not described as torch.save describes one")
        dtype, count = ELEMENTS[what[1].path], what[4]
        stored = int.from_bytes(self._pickle.bytes_at(position, 8, end), "little")
        if stored != count or position + 8 + count * DTYPES[dtype].itemsize != end:
            left = end - position - 8
            raise self._bad(f"the storage of {name[:120]!r} has {left} bytes for {count} elements of {dtype}; the file is damaged")
        return dtype, position + 8, count


def is_numpy_folder(location: Location) -> bool:
    """Whether the folder holds what msModelSlim's numpy saver writes; by names only."""
    return "quant_weight.npy" in location.names


def numpy_tensors(location: Location) -> TensorSet:
    """The folder's .npy files as one set of tensors, under the names that a safetensors file would give them.

    raises   UnreadableError for a file that is no dictionary of tensors
    """
    if not is_numpy_folder(location):
        raise UnreadableError(f"{location.folder.name}: has no quant_weight.npy, which holds the weights of a numpy folder")
    stems = [stem for stem in (*LAYER_FILES, *WHOLE_FILES) if f"{stem}.npy" in location.names]
    norms = set(NpyFile(location.folder / "anti_fp_norm.npy").tensors) if "anti_fp_norm" in stems else set()

    def weight(name: str, info: TensorInfo) -> str:
        kept = len(info.shape) != 1 or (f"{name.removesuffix('.module')}.bias" not in norms and _is_norm(name))
        return f"{name}.weight" if kept else f"{name}.bias"

    def opened(path: Path, number: int) -> NpyFile:
        if path.stem == "quant_weight":
            return NpyFile(path, number, weight)
        return NpyFile(path, number, (lambda name, info: f"{name}.{path.stem}") if path.stem in LAYER_FILES else lambda name, info: name)

    return TensorSet([location.folder / f"{stem}.npy" for stem in stems], opener=opened)


def _is_norm(name: str) -> bool:
    """Whether a module's one vector is a norm's weight; that of another is a bias (quirk 1)."""
    return re.search(r"norm|(^|[._])ln(_|\d|[._]|$)", name.removesuffix(".module").rpartition(".")[2].lower()) is not None


def numpy_types(tensors: TensorSet) -> dict[str, str]:
    """The description that msModelSlim would have written: the type of every tensor, by what is there.

    Int8 weights with ``deq_scale`` are W8A8 (W8A8S without a ``weight_scale``). Without it they are weights alone: W4A16 if all codes fit
    4 bits, else W8A16; of W8A8_DYNAMIC the files say the same, so that it is read as W8A16: the same weights, and inputs left in float.
    raises   UnreadableError, with their names, for layers whose weights their biases replaced (quirk 1)
    """
    _refuse_lost(tensors)
    layers = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and tensors[name].dtype == "I8"}
    types = {layer: _layer_type(tensors, layer) for layer in layers}
    found = {}
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        if leaf.startswith("kv_cache_"):
            found[name] = "C8"
        elif ".fa_" in name:
            found[name] = "FAQuant"
        else:
            found[name] = types[layer] if layer in types and leaf != "bias" else "FLOAT"
    return found


def _layer_type(tensors: TensorSet, layer: str) -> str:
    if f"{layer}.deq_scale" in tensors:
        return "W8A8" if f"{layer}.weight_scale" in tensors else "W8A8S"
    parts = [tensors.tensor(f"{layer}.{part}") for part in ("weight", "weight_offset") if f"{layer}.{part}" in tensors]
    return "W4A16" if all(_fits_4_bits(part) for part in parts) else "W8A16"


def _fits_4_bits(tensor: ArrayLike) -> bool:
    """Whether all values are -8 to 7. Of 8-bit codes the first chunk says no."""
    for _, chunk in raw_chunks(tensor, 1 << 20):
        values = chunk.view(tensor.dtype)
        if values.size and not (values.min() >= -8 and values.max() <= 7):
            return False
    return True


def _refuse_lost(tensors: Mapping[str, TensorInfo]) -> None:
    lost = [
        name.removesuffix(".bias") for name in tensors if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" not in tensors
    ]
    lost = [layer for layer in lost if not layer.endswith(".module")]
    if lost:
        more = f" and of {len(lost) - 1} more layers" if len(lost) > 1 else ""
        raise UnreadableError(
            f"{lost[0]}: its bias lies in quant_weight.npy where its weight should{more}: msModelSlim's numpy files have one name "
            "for both, so these weights are in no file; save the model again with save_type=['safe_tensor']"
        )

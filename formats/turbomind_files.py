"""A workspace's weight files as one: as they lie on a disk, and as they are laid out before there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from .checkpoint import LeftOut
from .errors import UnreadableError
from .files import Readable
from .ir import ArrayLike
from .placement import Place, PlacedFiles
from .safetensors_file import SourceFile, TensorInfo, TensorSet, TensorTable
from .turbomind_tree import CACHE, Geometry, tree_of

WEIGHTS = "triton_models/weights"
SUFFIXES = frozenset({".weight", ".qweight", ".scales_zeros", ".scales", ".zeros", ".bias"})
_TRITONS = frozenset({"config.ini", "config.yaml", "placeholder", "service_docker_up.sh", "README.md", "merges.txt"})


class WorkspaceFile:
    """The files of a ``weights`` folder, whose sizes must be those of its geometry (``StoredFile``).

    raises   UnreadableError for a file that is missing, too many, or of another size
    """

    exempt = 0

    def __init__(self, path: Path, number: int, shape: Geometry, sizes: Mapping[str, int]) -> None:
        tree = tree_of(shape, number)
        _check_sizes(sizes, tree.sizes, shape)
        self.path, self.tensors, self.metadata = path, tree.tensors, dict[str, str]()
        self._files = PlacedFiles(path, tree.tensors, tree.places)
        for name in tree.sizes:
            if self._files.file(name).size != tree.sizes[name]:
                raise UnreadableError(f"{name}: changed while it was opened; run it again")
        files = [self._files.file(name) for name in tree.sizes]
        listing = "".join(f"{file.path.name} {file.size} {file.mtime_ns}\n" for file in files)
        digest = xxhash.xxh3_128_hexdigest(listing.encode())
        self.identity = SourceFile(path.name, sum(file.size for file in files), max(file.mtime_ns for file in files), digest)

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor, unread."""
        return self._files.tensor(name, info)

    def unchanged(self) -> bool:
        """Whether every file still is the one that was opened."""
        return all(file.unchanged() for file in self._files.files.values())


@dataclass(frozen=True, slots=True)
class Filling(LeftOut):
    """What LMDeploy filled the feed-forward up with. files: as it is stored; parts: (name, shape) of the tensors that have any of it."""

    files: PlacedFiles
    parts: list[tuple[str, tuple[int, ...]]]

    @classmethod
    def of(cls, folder: Path, shape: Geometry, tensors: Mapping[str, TensorInfo]) -> Filling:
        """That of a ``weights`` folder whose sizes are ``shape``, and which holds ``tensors`` but for it."""
        tree = tree_of(replace(shape, intermediate=shape.padded, filled=()))
        parts = [(name, info.shape) for name, info in tensors.items() if tree.tensors[name].shape != info.shape]
        files = PlacedFiles(folder, tree.tensors, tree.places)
        return cls("feed_forward", "zero", "", "0 that fills the feed-forward up for the ranks", "", files, parts)

    def holds(self, tensors: TensorSet) -> bool:
        """True; UnreadableError where it is not 0. Reads some rows at a time."""
        for name, (rows, cols) in self.parts:
            stored = self.files.tensor(name)
            high, wide = stored.shape
            for top in range(0, high, 1024):
                low = min(top + 1024, high)
                inside = slice(top, min(low, rows)), slice(cols, wide)
                below = slice(max(top, rows), low), slice(0, wide)
                if any(stored.read(*cut).any() for cut in (inside, below) if cut[0].start < cut[0].stop and cut[1].start < cut[1].stop):
                    raise UnreadableError(
                        f"{name}: is {[high, wide]}, and not 0 beyond {[rows, cols]}, which config.json says; that is of another model"
                    )
        return True


def sizes_in(folder: Path) -> dict[str, int]:
    """The weight files of a ``weights`` folder with their sizes. UnreadableError for what is no regular file."""
    found = {}
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES:
                if not path.is_file():
                    raise UnreadableError(f"{path.name}: is no regular file; wanted raw numbers")
                found[path.name] = path.stat().st_size
    except OSError as error:
        raise UnreadableError(f"{folder}: cannot be read ({error.strerror or error})") from None
    return found


def stranger_in(folder: Path) -> str | None:
    """What speaks against replacing a folder as a workspace, in words; None if nothing else would be lost."""
    weights = folder / WEIGHTS
    if not any((weights / name).is_file() for name in ("config.ini", "config.yaml")):
        return f"it has no {WEIGHTS}/config.ini or config.yaml"
    for path in folder.rglob("*"):
        place, own = path.parent.relative_to(folder).as_posix(), path.is_symlink() or path.is_dir()
        if place == WEIGHTS and path.suffix in SUFFIXES:
            continue
        if not own and not (path.name in _TRITONS or path.suffix in {".json", ".py", ".model", ".tiktoken", ".pbtxt"}):
            return f"it holds {path.relative_to(folder)}"
    return None


def caches_of(sizes: Mapping[str, int], shape: Geometry) -> dict[str, int]:
    """Files of scales of a KV cache with how many they hold. UnreadableError for one of another size, layer or rank."""
    found = {}
    for name, size in sizes.items():
        match = CACHE.fullmatch(name)
        if match is None:
            continue
        if size not in {8, 16} or int(match[1]) >= shape.layers or int(match[2]) >= shape.tp:
            wanted = f"4 or 2 float32 of one of {shape.layers} layers and {shape.tp} ranks"
            raise UnreadableError(f"{name}: {size} bytes, wanted {wanted}")
        found[name] = size // 4
    return found


def _check_sizes(found: Mapping[str, int], wanted: Mapping[str, int], shape: Geometry) -> None:
    for name, size in wanted.items():
        if name not in found:
            raise UnreadableError(
                f"{name}: is not there, and the configuration says {shape.layers} layers and {shape.tp} ranks; copy it there"
            )
        if found[name] != size:
            raise UnreadableError(f"{name}: holds {found[name]} bytes, wanted {size}; it was cut short, or the configuration is another's")
    extra = next((name for name in found if name not in wanted), None)
    if extra is not None:
        raise UnreadableError(
            f"{extra}: is no file of a workspace of {shape.layers} layers and {shape.tp} ranks; remove it, or correct the configuration"
        )


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file without a header (``laid_out.Part``): of which tensors it has data, its name says to the engine."""

    name: str
    size: int
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkspaceOutput:
    """A workspace's weight files that are fully laid out (``laid_out.LaidOut``); ``name`` is their folder.

    sizes   bytes of every file; what no tensor is written to is zero
    """

    name: str
    tensors: TensorTable
    places: Mapping[str, Place]
    sizes: Mapping[str, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    shared: Sequence[tuple[str, ...]] = ()

    @classmethod
    def of(cls, name: str, shape: Geometry) -> WorkspaceOutput:
        tree = tree_of(shape)
        return cls(name, tree.tensors, tree.places, tree.sizes)

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    @property
    def parts(self) -> Sequence[RawFile]:
        """Every file."""
        return [RawFile(f"{self.name}/{name}", size) for name, size in self.sizes.items()]

    def growing(self, path: Path) -> Readable:
        return PlacedFiles(path, self.tensors, self.places, growing=True)

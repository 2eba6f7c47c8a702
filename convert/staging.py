"""Where output grows: a hidden folder beside the destination, whose ``model`` becomes it when whole.

``.NAME.weighbridge`` holds the journal and ``model``, the growing folder. Until the end its weight files have no header and there is
no config, so that nothing takes it for a model. What an interruption leaves is finished by the same command, or removed by
``clean``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import DestinationError, ReadFailedError
from formats.turbomind_files import WEIGHTS, stranger_in

from .folder import CARRIED
from .journal import Journal

SUFFIX = ".weighbridge"


def staging_of(target: Path) -> Path:
    """The hidden folder in which ``target`` grows."""
    return target.parent / f".{target.name}{SUFFIX}"


def check_unfinished(destination: str | os.PathLike[str]) -> None:
    """DestinationError unless an interrupted conversion into ``destination`` left its work."""
    if not staging_of(Path(os.path.abspath(destination))).is_dir():
        raise DestinationError(f"{destination}: --resume: no interrupted run left its work beside it; run the command without it")


class Staging:
    """The growing folder of one destination, locked; see ``staging``."""

    def __init__(self, target: Path) -> None:
        self.target, self.root = target, staging_of(target)
        self.model = self.root / "model"
        if self.root.is_symlink():
            raise DestinationError(f"{self.root}: is a link, which output must not grow through; remove it")
        self.root.mkdir(exist_ok=True)
        try:
            self.journal = Journal(self.root / "journal")
        except BaseException:
            with contextlib.suppress(OSError):
                self.root.rmdir()  # if empty, so ours
            raise
        self.keep = False
        """Whether to leave what was done for the same command to finish, if the block fails."""

    def begin(self, what: dict[str, Any], files: Mapping[str, int] | None = None) -> bool:
        """Begin to do ``what``, or go on if that is what an earlier run began; whether there is something to go on with.

        files    output files with their sizes: work in files that have gone since, or were cut, is done again
        raises  DestinationError if an earlier run began something else; it is left as it is
        """
        began, held = self.journal.done.began, self.journal.holds_work and self.model.is_dir() and not self.model.is_symlink()
        if began is not None and held and (differs := _difference(began, what)):
            self.keep = True
            raise DestinationError(
                f"{self.target}: an interrupted run left its work in {self.root.name}, and {differs}; "
                f"run the command that was interrupted, or `weighbridge clean {self.target.parent}` first"
            )
        if not (held and all(_has_size(self.model / name, size) for name, size in (files or {}).items())):
            self.journal.restart()
            if self.model.is_dir():
                shutil.rmtree(self.model)
        self.model.mkdir(exist_ok=True)
        self.model.chmod(0o777 & ~_umask())
        self.journal.begin(what)
        return self.journal.holds_work

    def remove(self) -> None:
        """Remove everything, and let go of the lock."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.journal.close()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _difference(began: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between what a run began and what is asked for now, in words; "" if nothing does."""
    for key in sorted((set(began) | set(now)) - {"boot", "files"}):
        was, here = began.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(here, dict):
            inner = next((name for name in sorted(set(was) | set(here)) if was.get(name) != here.get(name)), None)
            if inner is not None:
                return f"its {inner.replace('_', ' ')} was {was.get(inner)}, not {here.get(inner)}"
        elif was != here and key != "plan":
            return f"its {key} was {was}, not {here}"
    before, after = ({file["name"]: file for file in what.get("files", [])} for what in (began, now))
    for name in sorted(set(before) | set(after)):
        if before.get(name) != after.get(name):
            how = "is new" if name not in before else "is gone" if name not in after else "has changed"
            return f"{name} of the source {how} since"
    return "" if began.get("plan") == now.get("plan") else "its plan was another one"


@contextlib.contextmanager
def staging(destination: Path, size: int, sources: Sequence[Path], overwrite: bool) -> Iterator[Staging]:
    """The growing folder of ``destination``, which becomes it when the block ends well.

    size      bytes that it must have room for; sources: folders that are read, which the destination must leave alone
    raises    DestinationError: the destination exists and may not be overwritten, has no room, cannot be written, or another run
              is writing it
    """
    target = Path(os.path.abspath(destination))
    try:
        _check_destination(target, size, sources, overwrite)
        stage = Staging(target)
    except OSError as error:
        raise DestinationError(f"{target.parent}: cannot be written ({error.strerror or error}); choose another destination") from None
    with _guarded(stage):
        yield stage
        _make_durable(stage)
        _rename(stage, target)


@contextlib.contextmanager
def workshop(destination: Path, purpose: str) -> Iterator[Staging]:
    """A folder beside ``destination`` for work that comes before it is written; kept where that was interrupted, else removed.

    raises    DestinationError: it cannot be written, or another run works in it
    """
    target = Path(os.path.abspath(destination))
    try:
        stage = Staging(target.with_name(f"{target.name}.{purpose}"))
    except OSError as error:
        raise DestinationError(f"{target.parent}: cannot be written ({error.strerror or error}); choose another destination") from None
    with _guarded(stage):
        yield stage


@contextlib.contextmanager
def _guarded(stage: Staging) -> Iterator[None]:
    """Keep what the block did for the same command to finish, if it failed for a reason that is not of the weights; else remove it."""
    try:
        yield
        stage.remove()
    except (OSError, ReadFailedError, KeyboardInterrupt) as error:  # the same command can finish it
        stage.keep = stage.journal.holds_work and stage.model.is_dir()
        if isinstance(error, OSError):
            raise DestinationError(_sentence(error, stage)) from None
        raise
    finally:
        if stage.keep and stage.root.exists():
            stage.journal.close()
        else:
            stage.remove()


def _sentence(error: OSError, stage: Staging) -> str:
    target = stage.target
    if not target.parent.exists() or not stage.root.exists():
        return f"{target.parent if not target.parent.exists() else stage.root}: vanished while it was being written to"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        then = f"make room and run the same command to finish, or `weighbridge clean {target.parent}` to give up"
        return f"{target}: {what}; {then}" if stage.keep else f"{target}: {what}; nothing was left there"
    return f"{target}: cannot be written ({error.strerror or error}); " + (
        "run the same command to finish what was begun" if stage.keep else "nothing was left there"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_destination(target: Path, size: int, sources: Sequence[Path], overwrite: bool) -> None:
    parent = target.parent
    if not parent.is_dir():
        raise DestinationError(f"{parent}: there is no such folder to write into; make it first")
    there = target.resolve()
    for source in (folder.resolve() for folder in sources):
        if there == source or there in source.parents or source in there.parents:
            raise DestinationError(f"{target}: is, holds or lies in the source, which is never written: choose another destination")
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise DestinationError(f"{target}: exists already; choose another destination, or pass --overwrite to replace it")
        if not target.is_dir() or target.is_symlink():
            raise DestinationError(f"{target}: is no folder, so --overwrite will not replace it; remove it yourself")
        if (stranger := _stranger(target)) is not None:
            raise DestinationError(f"{target}: is not a model folder ({stranger}), so --overwrite will not replace it; remove it yourself")
    try:
        free = shutil.disk_usage(parent).free + bytes_held(staging_of(target))
    except OSError as error:
        raise DestinationError(f"{parent}: cannot be examined ({error.strerror or error})") from None
    if free < size:
        raise DestinationError(f"{parent}: {_gb(size)} are needed and {_gb(free)} are free; make room, or choose another disk")


MODEL_FILES = ("*.safetensors", "*.json", "README.md", ".gitattributes", "*.ckpt", "predict_*.yaml", *CARRIED)
"""What a folder that --overwrite may replace consists of, beside folders of nothing but .ckpt files (``_CHECKPOINTS``)."""
_CHECKPOINTS = re.compile(r"rank_\d+|strategy")


def _stranger(folder: Path) -> str | None:
    """What speaks against replacing ``folder``, in words; None if only a model (or nothing) would be lost."""
    entries = list(folder.iterdir())
    if WEIGHTS.split("/")[0] in {entry.name for entry in entries}:
        return stranger_in(folder)
    for entry in entries:
        if _CHECKPOINTS.fullmatch(entry.name) and entry.is_dir() and _only_checkpoints(entry):
            continue
        if not entry.is_file() or not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in MODEL_FILES):
            return f"it holds {entry.name}"
    if entries and not any(entry.name in {"config.json", "weighbridge.json"} or entry.suffix == ".safetensors" for entry in entries):
        return "it holds neither a config nor weights"
    return None


def _only_checkpoints(folder: Path) -> bool:
    return all(file.suffix == ".ckpt" and file.is_file() for file in folder.iterdir())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_durable(stage: Staging) -> None:
    try:
        for path in (*stage.model.rglob("*"), stage.model):
            sync(path)
    except OSError:
        stage.journal.doubt()
        raise


def _rename(stage: Staging, target: Path) -> None:
    """Put the finished folder in place of whatever ``target`` is; the old one goes only after the new one is there."""
    old = stage.root / "replaced"
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(stage.model, target)
        sync(target.parent)
    except BaseException:
        if not stage.model.exists() and target.exists():
            os.rename(target, stage.model)
        if old.exists():
            os.rename(old, target)
        raise


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What an interrupted conversion left: its hidden folder, the destination it was for, bytes on disk, whether it still runs."""

    path: str
    destination: str
    bytes: int
    running: bool


def unfinished(parent: Path) -> list[Unfinished]:
    """What interrupted conversions into ``parent`` left there."""
    try:
        found = sorted(entry for entry in parent.iterdir() if entry.name.startswith(".") and entry.name.endswith(SUFFIX))
    except OSError as error:
        raise DestinationError(f"{parent}: cannot be listed ({error.strerror or error})") from None
    return [
        Unfinished(str(root), str(parent / root.name[1 : -len(SUFFIX)]), bytes_held(root), _is_running(root))
        for root in found
        if root.is_dir() and not root.is_symlink() and (root / "journal").is_file()
    ]


def clean(folder: str | os.PathLike[str], *, list_only: bool = False) -> list[Unfinished]:
    """Remove what interrupted conversions left in ``folder``; running ones are left alone. Returns what was found."""
    found = unfinished(Path(folder))
    for item in found:
        if not (list_only or item.running):
            try:
                replaced = Path(item.path) / "replaced"
                if replaced.is_dir() and not os.path.lexists(item.destination):  # a run was killed between two renames
                    os.rename(replaced, item.destination)
                shutil.rmtree(item.path)
            except OSError as error:
                raise DestinationError(f"{item.path}: cannot be removed ({error.strerror or error})") from None
    return found


def bytes_held(root: Path) -> int:
    """Bytes on disk below ``root``."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def _is_running(root: Path) -> bool:
    with contextlib.suppress(OSError):
        handle = os.open(root / "journal", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    return False

"""What the fuzzers feed with bytes: each takes any bytes, and may raise nothing but Weighbridge's own errors."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from attacks import CONFIG, DESCRIPTION, FOLDER, INDEX, MODEL, QUANTIZE, Files, awq, gemv, gptq, shards, slim
from checkpoints import FIXTURES
from mindspore_records import record, with_crc

from convert.inspection import inspect
from convert.mending import doctor
from convert.planning import plan
from formats.errors import WeighbridgeError
from formats.mindspore_file import MindSporeFile
from formats.mindspore_output import entries_of, lay_out_checkpoint, stream
from formats.patterns import Budget, Pattern
from formats.safetensors_file import parse_header

Target = Callable[[bytes, Path], None]


def compressed() -> Files:
    """A folder that compressed-tensors wrote."""
    folder = FIXTURES / "compressed_tensors" / "w8a8_static_asym_fp16"
    return {name: (folder / name).read_bytes() for name in (CONFIG, MODEL)}


CHOICES: tuple[tuple[Callable[[], Files], str], ...] = (
    (awq, CONFIG),
    (gptq, CONFIG),
    (gptq, QUANTIZE),
    (gemv, CONFIG),
    (slim, DESCRIPTION),
    (slim, CONFIG),
    (shards, INDEX),
    (compressed, CONFIG),
)
"""Sound folders, and in each the JSON file that fuzzing replaces."""


def header(data: bytes, place: Path) -> None:
    """The header parser: two bytes say how much data the file has, the rest is the header."""
    size = int.from_bytes(data[:2], "little")
    parse_header(data[2:], "fuzzed.safetensors", 8 + len(data) - 2, 8 + len(data) - 2 + size)


def documents(data: bytes, place: Path) -> None:
    """Descriptions, indexes and configs in a sound folder: one byte chooses which, the rest is its text."""
    base, name = CHOICES[data[0] % len(CHOICES)] if data else CHOICES[0]
    _commands({**base(), name: data[1:]}, place)


def weights(data: bytes, place: Path) -> None:
    """A whole weight file: two bytes are the header's length, one says whose config lies beside it."""
    length = int.from_bytes(data[:2], "little")
    _commands({**(gptq() if data[2:3] == b"g" else awq()), MODEL: length.to_bytes(8, "little") + data[3:]}, place)


def patterns(data: bytes, place: Path) -> None:
    """Expressions of ``dynamic`` and a name, divided by a line break."""
    text, _, name = data.decode("utf-8", "replace").partition("\n")
    Pattern(text).matches(name, Budget(100_000))


def pickles(data: bytes, place: Path) -> None:
    """A file of msModelSlim's numpy folders, in which a pickle lies."""
    _commands({"quant_weight.npy": data, CONFIG: b"{}"}, place)


def mindspore(data: bytes, place: Path) -> None:
    """A .ckpt file of MindSpore, or an encrypted one. What is read can be written, and is then read as the same."""
    place.mkdir(parents=True, exist_ok=True)
    first, second = (place / name for name in ("first.ckpt", "second.ckpt"))
    first.write_bytes(data)
    file = MindSporeFile(first, key=bytes(range(16)))
    if file.crc is not None:
        with contextlib.suppress(WeighbridgeError):
            file.check_crc()
    contents = {name: file.array(name).tobytes() for name in file.tensors}
    laid_out = lay_out_checkpoint(entries_of(file), "second.ckpt", crc=True, chunk_bytes=7)
    second.write_bytes(b"".join(map(bytes, stream(laid_out, file.tensor))))
    again = MindSporeFile(second)
    again.check_crc()
    assert (again.names, again.texts, again.metadata) == (file.names, file.texts, file.metadata)
    assert {name: again.array(name).tobytes() for name in again.tensors} == contents


def workspaces(data: bytes, place: Path) -> None:
    """A TurboMind workspace whose configuration is other bytes: one says which, the rest is its text."""
    source, name = (("w4_v010_tp2", "config.ini"), ("w4_v092_tp1", "config.yaml"))[data[0] % 2 if data else 0]
    shutil.rmtree(place, ignore_errors=True)
    weights_of = place / "triton_models" / "weights"
    weights_of.mkdir(parents=True)
    for path in (FIXTURES / "lmdeploy" / source / "triton_models" / "weights").iterdir():
        (weights_of / path.name).symlink_to(path)
    (weights_of / name).unlink()
    (weights_of / name).write_bytes(data[1:])
    with contextlib.suppress(WeighbridgeError):
        inspect(place)


TARGETS: dict[str, Target] = {
    "header": header,
    "documents": documents,
    "weights": weights,
    "patterns": patterns,
    "pickles": pickles,
    "mindspore": mindspore,
    "workspaces": workspaces,
}


def _commands(files: Files, place: Path) -> None:
    """What reads headers and configs of a folder; each may refuse it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    for command in (inspect, doctor, lambda folder: plan(folder, "gptq", jobs=1)):
        with contextlib.suppress(WeighbridgeError):
            command(place)


def seeds(target: str) -> Iterator[bytes]:
    """Inputs to begin with: what real tools wrote, the sound folders, and the attacks."""
    goldens = sorted(FIXTURES.glob("*/*/*.safetensors"))
    if target == "header":
        for path in (*goldens, *FOLDER.glob("*/*.safetensors")):
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            if 8 + size <= len(content) and size < 1 << 15:
                yield min(len(content) - 8 - size, 0xFFFF).to_bytes(2, "little") + content[8 : 8 + size]
    elif target == "documents":
        for number, (base, name) in enumerate(CHOICES):
            yield bytes([number]) + base()[name]
            for path in (*FIXTURES.glob(f"*/*/{name}"), *FOLDER.glob(f"*/{name}")):
                yield bytes([number]) + path.read_bytes()[: 1 << 14]
        for path in FIXTURES.glob("msmodelslim/**/quant_model_description*.json"):
            yield bytes([4]) + path.read_bytes()[: 1 << 14]
    elif target == "weights":
        for path in (*FOLDER.glob(f"*/{MODEL}"),):
            content = path.read_bytes()
            if len(content) < 1 << 14:
                yield content[:2] + (b"g" if b"g_idx" in content else b"a") + content[8:]
    elif target == "pickles":
        for path in FIXTURES.glob("msmodelslim_w8/*/*.npy"):
            content = path.read_bytes()
            if len(content) < 1 << 16:
                yield content
    elif target == "workspaces":
        for path in FIXTURES.glob("lmdeploy/w4_v0*/triton_models/weights/config.*"):
            yield bytes([path.suffix == ".yaml"]) + path.read_bytes()
    elif target == "mindspore":
        for path in FIXTURES.glob("mindspore/*.ckpt"):
            if path.stat().st_size < 1 << 14:
                yield path.read_bytes()
        chunks = [record("w", "Float16", (3, 5), bytes(range(begin, begin + 10))) for begin in (0, 10, 20)]
        yield with_crc(record("v", "Int8", (2,), b"ab") + b"".join(chunks) + record("t", "str", (0,), b"t\0\0\0"))
    else:
        for path in FOLDER.glob(f"*/{CONFIG}"):
            rules = _rules(path)
            yield from (f"{rule[:1000].removeprefix('-:')}\nmodel.layers.0.mlp.down_proj".encode() for rule in rules)
        for rule in (r"^model\.layers\.(0|1)\..*mlp\.(?:gate|up)_proj$", r".*\.18\..*(?!x)[a-z]+?", r"(?i:[^a-f\d]{2,5}\b)"):
            yield f"{rule}\nmodel.layers.18.mlp.gate_proj".encode()


def _rules(path: Path) -> list[str]:
    try:
        rules = json.loads(path.read_bytes())["quantization_config"]["dynamic"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return []
    return [rule for rule in list(rules)[:50] if isinstance(rule, str)] if isinstance(rules, dict) else []

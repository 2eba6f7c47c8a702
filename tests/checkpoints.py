"""Checkpoints for the tests: the goldens by name, a builder of synthetic msModelSlim folders, and decoders that share no code
with the project.

``model`` makes the linears and the plain tensors of a tiny Llama, ``write_msmodelslim`` spells them as the real tool would;
``decode_awq`` and ``decode_gptq`` read back what a conversion wrote, lane by lane.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"
MSMODELSLIM = FIXTURES / "msmodelslim"

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F32": np.dtype("<f4"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Golden:
    """One W4A16 or W8A16 result of the real msModelSlim. group 0: one scale per output channel."""

    base: str
    bits: int
    group: int
    symmetric: bool


GOLDENS = {
    "w4a16_g128_sym_bf16": Golden("src_bf16", 4, 128, True),
    "w4a16_g128_asym_fp16": Golden("src_fp16", 4, 128, False),
    "w4a16_awq_m3_g128_sym_bf16": Golden("src_bf16", 4, 128, True),
    "w4a16_pc_sym_bf16": Golden("src_bf16", 4, 0, True),
    "w4a16_gptq_pc_sym_fp16": Golden("src_fp16", 4, 0, True),
    "w4a16_ascendv1_g128_sym_bf16": Golden("src_bf16", 4, 128, True),
    "w4a16_ascendv1_pc_sym_bf16": Golden("src_bf16", 4, 0, True),
    "w8a16_g128_sym_bf16": Golden("src_bf16", 8, 128, True),
    "w8a16_pc_asym_fp16": Golden("src_fp16", 8, 0, False),
    "v1_w8a16_pc": Golden("src1l_bf16_tok", 8, 0, True),
}

# --- safetensors, by hand ---------------------------------------------------------------------------------------------


def read_tensors(*paths: Path) -> Tensors:
    """Every tensor of some safetensors files, in file order."""
    tensors: Tensors = {}
    for path in paths:
        header, data = read_raw(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> Tensors:
    """Every tensor of every safetensors file of a folder."""
    return read_tensors(*sorted(folder.glob("*.safetensors")))


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header object, data) of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def write_raw(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    """A safetensors file from any header, a JSON text too, whatever it says."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of ``tensors``, one after the other."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    parts, begin = [], 0
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, begin + len(part)]}
        parts.append(part)
        begin += len(part)
    write_raw(path, header, b"".join(parts))


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite a safetensors file after ``change`` has edited its tensors, which are writable copies, in place."""
    header, _ = read_raw(path)
    tensors = {name: array.copy() for name, array in read_tensors(path).items()}
    change(tensors)
    path.chmod(0o600)
    write_tensors(path, tensors, header.get("__metadata__"))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON file after ``change`` has edited its object in place."""
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), "utf-8")


# --- synthetic msModelSlim folders ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A quantized linear as msModelSlim spells it: ``w = (codes - offsets) * scales``.

    codes    int8 [out, in]; scales, offsets: [1], [out, 1] or [out, groups], in any float dtype; bias [out] or None
    """

    bits: int
    codes: Array
    scales: Array
    offsets: Array
    bias: Array | None = None

    @property
    def type(self) -> str:
        return f"W{self.bits}A16"

    def spread(self, grid: Array) -> Array:
        """float32 ``grid`` for every weight, [out, in]."""
        grid = grid.astype(np.float32).reshape(grid.shape if grid.ndim == 2 else (1, 1))
        out, in_ = self.codes.shape
        return np.broadcast_to(grid.repeat(in_ // grid.shape[1], axis=1), (out, in_))

    def weights(self, scale_dtype: str = "") -> Array:
        """The law's float32 weights; with ``scale_dtype``, of scales rounded to it."""
        scales = self.scales.astype(np.float32)
        if scale_dtype:
            scales = scales.astype(DTYPES[scale_dtype])
        return (self.codes.astype(np.float32) - self.spread(self.offsets)) * self.spread(scales)


def linear(
    out: int,
    in_: int,
    bits: int = 4,
    strategy: str = "group",
    *,
    group: int = 64,
    symmetric: bool = True,
    dtype: str = "F32",
    bias: bool = False,
    seed: int = 0,
) -> Linear:
    """A random linear. strategy: tensor, channel or group (of ``group`` inputs); dtype: of scales, offsets and bias.

    Scales lie in 0.005 to 0.05, where float16 is normal. Asymmetric offsets take every value from one step above the lowest.
    """
    rng = np.random.default_rng([seed, out, in_, bits])
    half = 1 << (bits - 1)
    shape = {"tensor": (1,), "channel": (out, 1), "group": (out, in_ // group)}[strategy]
    codes = rng.integers(-half, half, (out, in_)).astype(np.int8)
    scales = rng.uniform(0.005, 0.05, shape).astype(DTYPES[dtype])
    offsets = np.zeros(shape) if symmetric else rng.integers(-half + 1, half, shape)
    biases = rng.normal(0, 0.5, out).astype(DTYPES[dtype]) if bias else None
    return Linear(bits, codes, scales, offsets.astype(DTYPES[dtype]), biases)


HIDDEN, INNER = 128, 192
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (64, HIDDEN),
    "self_attn.v_proj": (64, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "torch_dtype": "bfloat16",
    "vocab_size": 96,
}


class Model(NamedTuple):
    """Quantized linears and plain tensors by name."""

    linears: dict[str, Linear]
    plain: Tensors


def model(blocks: int = 2, dtype: str = "BF16", seed: int = 0, **scheme: Any) -> Model:
    """A tiny Llama with every block linear quantized alike; ``scheme`` as ``linear`` has it (its dtype as ``scale_dtype``).

    q, k and v have biases, everything else has none.
    """
    rng = np.random.default_rng(seed)
    options = {"dtype": scheme.pop("scale_dtype", "F32"), **scheme}
    linears: dict[str, Linear] = {}
    plain = {"model.embed_tokens.weight": rng.normal(0, 0.02, (96, HIDDEN)).astype(DTYPES[dtype])}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        for number, (name, (out, in_)) in enumerate(SHAPES.items()):
            bias = name.endswith(("q_proj", "k_proj", "v_proj"))
            linears[f"{prefix}.{name}"] = linear(out, in_, bias=bias, seed=seed + 100 * block + number, **options)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"{prefix}.{norm}.weight"] = rng.normal(1, 0.1, HIDDEN).astype(DTYPES[dtype])
    plain["model.norm.weight"] = rng.normal(1, 0.1, HIDDEN).astype(DTYPES[dtype])
    plain["lm_head.weight"] = rng.normal(0, 0.02, (96, HIDDEN)).astype(DTYPES[dtype])
    return Model(linears, plain)


def roll_back(made: Model, names: Iterable[str], dtype: str = "BF16") -> Model:
    """``made`` with the linears ``names`` left in float, as msModelSlim's ``disable_names`` does."""
    names = set(names)
    floats = {f"{name}.weight": made.linears[name].weights().astype(DTYPES[dtype]) for name in names}
    return Model({name: one for name, one in made.linears.items() if name not in names}, {**made.plain, **floats})


def replaced(made: Model, name: str, **parts: Any) -> Model:
    """``made`` with ``parts`` of the linear ``name`` replaced."""
    return made._replace(linears={**made.linears, name: replace(made.linears[name], **parts)})


def pack_nibbles(codes: Array, along_out: bool) -> Array:
    """int8 bytes of two 4-bit codes, the first in the low nibble: two output rows a byte, or two inputs."""
    lanes = codes.astype(np.uint8) & 15
    low, high = (lanes[::2], lanes[1::2]) if along_out else (lanes[:, ::2], lanes[:, 1::2])
    return (low | high << 4).astype(np.uint8).view(np.int8)


def write_msmodelslim(
    folder: Path,
    made: Model,
    *,
    ascendv1: bool = False,
    config: dict[str, Any] | None = CONFIG,
    shards: int = 1,
    described: dict[str, Any] | None = None,
) -> Path:
    """Spell a model as msModelSlim's Python API does, and return the folder.

    ascendv1    4-bit codes packed, and a ``version`` in the description
    shards      more than one: files with an index; described: more entries for the description
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    description: dict[str, Any] = {"model_quant_type": next(iter(made.linears.values())).type}
    for name, one in made.linears.items():
        codes = one.codes
        if ascendv1 and one.bits == 4:
            codes = pack_nibbles(codes, along_out=one.scales.shape[-1] != 1)
        parts = {"weight": codes, "weight_scale": one.scales, "weight_offset": one.offsets}
        for part, array in parts.items():
            tensors[f"{name}.{part}"] = array
            description[f"{name}.{part}"] = one.type
        if one.bias is not None:
            tensors[f"{name}.bias"] = one.bias
            description[f"{name}.bias"] = "FLOAT"
    tensors.update(made.plain)
    description.update(dict.fromkeys(made.plain, "FLOAT"))
    if ascendv1:
        description["version"] = "1.0.0"
    description.update(described or {})
    tensors = dict(sorted(tensors.items()))
    kind = next(iter(made.linears.values())).type.lower()
    suffix = "" if ascendv1 else f"_{kind}"
    (folder / f"quant_model_description{suffix}.json").write_text(json.dumps(description), "utf-8")
    _write_shards(folder, f"quant_model_weight_{kind}", tensors, shards)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def _write_shards(folder: Path, stem: str, tensors: Tensors, shards: int) -> None:
    if shards == 1:
        write_tensors(folder / f"{stem}.safetensors", tensors)
        return
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        write_tensors(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def weight_file(folder: Path) -> Path:
    """The one safetensors file of a folder."""
    (path,) = folder.glob("*.safetensors")
    return path


def description_file(folder: Path) -> Path:
    """The one msModelSlim description of a folder."""
    (path,) = folder.glob("quant_model_description*.json")
    return path


# --- what a conversion wrote, decoded by hand -------------------------------------------------------------------------


class Decoded(NamedTuple):
    """Unsigned integers and scales as stored: codes [out, in], zeros and scales [out, groups], and the group of each input."""

    codes: Array
    zeros: Array
    scales: Array
    g_idx: Array

    def weights(self) -> Array:
        """float32 [out, in]."""
        steps = self.codes.astype(np.float32) - self.zeros.astype(np.float32)[:, self.g_idx]
        return steps * self.scales.astype(np.float32)[:, self.g_idx]


def decode_awq(tensors: Mapping[str, Array], name: str) -> Decoded:
    """A layer in AutoAWQ's GEMM layout: lane i of a word holds column ``8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i]``."""

    def lanes(words: Array) -> Array:
        values = np.empty((words.shape[0], words.shape[1] * 8), dtype=np.int16)
        for lane, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            values[:, column::8] = words.view(np.uint32) >> np.uint32(4 * lane) & np.uint32(15)
        return values.T

    codes, scales = lanes(tensors[f"{name}.qweight"]), tensors[f"{name}.scales"].T
    groups = scales.shape[1]
    g_idx = np.arange(codes.shape[1]) // (codes.shape[1] // groups)
    return Decoded(codes, lanes(tensors[f"{name}.qzeros"]), scales, g_idx)


def decode_gptq(tensors: Mapping[str, Array], name: str, bits: int, version: str = "v1") -> Decoded:
    """A layer as AutoGPTQ reads it, for 4 or 8 bits: lane j of a word is its j-th input (zero points: output)."""
    per_word, mask = 32 // bits, np.uint32((1 << bits) - 1)

    def lanes(words: Array) -> Array:
        values = np.empty((words.shape[0] * per_word, words.shape[1]), dtype=np.int16)
        for lane in range(per_word):
            values[lane::per_word] = words.view(np.uint32) >> np.uint32(bits * lane) & mask
        return values

    codes = lanes(tensors[f"{name}.qweight"]).T
    stored = lanes(np.ascontiguousarray(tensors[f"{name}.qzeros"].T))
    zeros = stored + 1 if version == "v1" else stored
    return Decoded(codes, zeros, tensors[f"{name}.scales"].T, tensors[f"{name}.g_idx"])

"""What a TurboMind workspace says of itself: ``config.ini`` until 0.5, ``config.yaml`` since 0.6, as files and as sizes.

Defined by LMDeploy 0.1.0 (``turbomind/deploy/target_model/base.py``) and 0.9.2 (``turbomind/deploy/config.py``). Of what is read, only
sizes matter here; what is written is made in ``turbomind_settings``. In 0.1 the hidden size is ``head_num`` heads of 128.
"""

from __future__ import annotations

import configparser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import RefusedError, UnreadableError, UsageError
from .llama_names import llama_config
from .mindspore_yaml import pyyaml
from .turbomind_tree import HEAD, Geometry

INI, YAML = "config.ini", "config.yaml"
_MOST_BYTES, _MOST, _WIDEST = 1 << 20, 1 << 24, 1 << 20

_FLOATS = {"fp16": "F16", "fp32": "F16", "bf16": "BF16", "float16": "F16", "half": "F16", "bfloat16": "BF16"}


def read_config(path: Path) -> dict[str, Any]:
    """The sections of a config.ini or config.yaml. UnreadableError if it is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise UnreadableError(f"{path.name}: is no file of at most {_MOST_BYTES} bytes; wanted a workspace's configuration")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{path.name}: cannot be read ({error})") from None
    yaml = pyyaml()
    try:
        if path.suffix == ".ini":
            parser = configparser.ConfigParser(interpolation=None)
            parser.read_string(text)
            return {name: dict(parser[name]) for name in parser.sections()}
        found = yaml.safe_load(text)
    except (configparser.Error, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableError(f"{path.name}: {' '.join(str(error).split())[:200]}; it is damaged") from None
    if not isinstance(found, dict):
        raise UnreadableError(f"{path.name}: holds a {type(found).__name__}, wanted sections")
    return found


class _Section:
    """A section whose values are checked as they are read."""

    def __init__(self, file: str, sections: Mapping[str, Any], name: str) -> None:
        found = sections.get(name)
        if not isinstance(found, Mapping):
            raise UnreadableError(f"{file}: has no section {name}; it is damaged, or no workspace's")
        self.file, self.values = file, found

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number in bounds."""
        said = self.values.get(key, default)
        try:
            value = int(str(said))
        except ValueError:
            value = -1
        if not least <= value <= _MOST:
            raise UnreadableError(f"{self.file}: {key} is {said!r}, wanted a whole number from {least} to {_MOST}")
        return value

    def numbers(self, key: str, count: int) -> tuple[int, ...]:
        """One whole number for each of ``count`` layers, said once or as a list."""
        said = self.values.get(key)
        if not isinstance(said, list):
            return (self.number(key),) * count
        if len(said) != count or not all(isinstance(value, int) and 0 < value <= _MOST for value in said):
            raise UnreadableError(f"{self.file}: {key} is a list of {len(said)}, wanted a whole number for each of {count} layers")
        return tuple(said)

    def dtype(self, key: str) -> str:
        """ "F16", "BF16" or "" for int4."""
        said = str(self.values.get(key))
        if said != "int4" and said not in _FLOATS:
            raise UnreadableError(f"{self.file}: {key} is {said!r}, wanted int4, fp16 or bf16")
        return _FLOATS.get(said, "")


def geometry_of_ini(sections: Mapping[str, Any]) -> Geometry:
    """The sizes that a config.ini says. RefusedError for groups that LMDeploy itself wrote wrongly."""
    said = _Section(INI, sections, "llama")
    head, heads, dtype = said.number("size_per_head", HEAD), said.number("head_num"), said.dtype("weight_type")
    group = said.number("group_size", 0, 0) if not dtype else 0
    if not dtype and group != HEAD:
        raise RefusedError(
            f"{INI}: group_size is {group}, and LMDeploy up to 0.5 puts q and k of other groups than {HEAD} in an order that fits nothing; "
            "convert the AWQ folder that it was made of"
        )
    layers, inter = said.number("num_layer"), said.number("inter_size")
    tp, kv = said.number("tensor_para_size", 1), said.number("kv_head_num", heads)
    vocabulary, bias = said.number("vocab_size"), said.number("attn_bias", 0, 0)
    shape = Geometry(
        True, dtype or "F16", tp, heads * head, heads, kv, (inter,) * layers, vocabulary, vocabulary, group, head, bool(bias)
    )  # fmt: skip
    check_divides(shape, INI, UnreadableError)
    return shape


def geometry_of_yaml(sections: Mapping[str, Any]) -> Geometry:
    """The sizes that a config.yaml says. RefusedError for experts and latent attention."""
    said = _Section(YAML, sections, "model_config")
    odd = [key for key in ("expert_num", "q_lora_rank", "kv_lora_rank", "qk_norm") if _is_set(said.values.get(key))]
    if odd:
        raise RefusedError(
            f"{YAML}: {odd[0]} is {said.values[odd[0]]}: such models are not read yet; convert the folder that it was made of"
        )
    ranks = {said.number(key) for key in ("tp", "attn_tp_size", "mlp_tp_size") if key in said.values}
    if len(ranks) > 1:
        raise RefusedError(f"{YAML}: attention and feed-forward have {sorted(ranks)} ranks; workspaces with one number are read")
    layers, heads, dtype = said.number("num_layer"), said.number("head_num"), said.dtype("weight_type")
    vocabulary = said.number("vocab_size")
    shape = Geometry(
        False,
        dtype or "F16",
        ranks.pop() if ranks else 1,
        said.number("hidden_units"),
        heads,
        said.number("kv_head_num"),
        said.numbers("inter_size", layers),
        said.number("embedding_size", 0, 0) or vocabulary,
        vocabulary,
        0 if dtype else said.number("group_size"),
        said.number("size_per_head"),
        bool(said.number("attn_bias", 0, 0)),
        turned_output="attn_tp_size" in said.values,
    )
    check_divides(shape, YAML, UnreadableError)
    return shape


def _is_set(value: Any) -> bool:
    return any(value) if isinstance(value, Sequence) and not isinstance(value, str) else bool(value)


def as_in_model(shape: Geometry, config: Mapping[str, Any] | None) -> Geometry:
    """The sizes of a config.yaml with config.json's key heads and feed-forward size, where LMDeploy repeated or filled them up.

    Up to a head and to whole groups for each rank; for QWen it takes gate and up together for one of them.
    """
    said = llama_config(config) if config is not None and not shape.tiles else {}
    inter, kv = said.get("intermediate_size"), said.get("num_key_value_heads")
    if type(kv) is int and 0 < kv < shape.kv == shape.tp and shape.tp % kv == 0:
        shape = replace(shape, kv=kv, repeat=shape.tp // kv)
    if type(inter) is not int or not 0 < inter < min(shape.intermediate) or inter % max(1, shape.group):
        return shape
    filled, twice = (replace(shape, intermediate=(size,) * shape.layers).fill_up() for size in (inter, 2 * inter))
    if shape.intermediate not in {filled.padded, twice.padded}:
        return shape
    return replace(filled, filled=shape.intermediate, repeat=shape.repeat)


def check_divides(shape: Geometry, where: str, error: type[UnreadableError] | type[RefusedError]) -> None:
    """An error if the ranks do not share the model out, or a rank's part does not fill whole groups and tiles."""
    tp = shape.tp
    if tp & (tp - 1) or tp > 1024:
        raise error(f"{where}: {tp} ranks of tensor parallelism, wanted a power of two up to 1024; choose another --tp")
    if shape.layers > 4096:
        raise error(f"{where}: {shape.layers} layers, wanted 4096 at most; it is damaged")
    if shape.head % 32 or shape.group % 32:
        raise error(f"{where}: heads of {shape.head}, groups of {shape.group}: not whole tiles of 32; TurboMind could not serve it")
    if max(shape.heads * shape.head, shape.stored_kv * shape.head, shape.hidden, *shape.padded) > _WIDEST:
        raise error(f"{where}: a matrix has more than {_WIDEST} inputs or outputs; it is damaged")
    parts: list[tuple[str, int, int]] = [
        ("query heads", shape.heads, tp), ("key heads", shape.stored_kv, tp), ("hidden size", shape.hidden, 1)
    ]  # fmt: skip
    parts += [(f"feed-forward size of layer {number}", inter, tp) for number, inter in enumerate(shape.padded)]
    if shape.group:
        heads = shape.heads * shape.head
        parts += [(f"hidden size in groups of {shape.group}", shape.hidden, shape.group)]
        parts += [(f"attention size in groups of {shape.group}", heads, tp * shape.group)]
        parts += [
            (f"feed-forward size of layer {number} in groups of {shape.group}", inter, tp * shape.group)
            for number, inter in enumerate(shape.padded)
        ]
        parts += [(f"feed-forward size in groups of {shape.group}", inter, shape.group) for inter in shape.intermediate]
    for what, size, by in parts:
        if size % by:
            raise error(f"{where}: {what} is {size}, which {by} does not divide for {tp} ranks; choose another --tp")


def text_of(name: str, sections: Mapping[str, Any]) -> str:
    """The text of a config.ini or config.yaml."""
    if not name.endswith(".ini"):
        return str(pyyaml().safe_dump(dict(sections)))
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items()), ""]
    return "\n".join(lines) + "\n"


def check_model_name(name: str) -> str:
    """``name`` if it can stand in a configuration. UsageError for what cannot."""
    if not name or len(name) > 200 or any(not (letter.isalnum() or letter in "-_./") for letter in name):
        raise UsageError(f"--model-name {name!r}: wanted the name of one of LMDeploy's chat templates, such as internlm-chat-7b")
    return name

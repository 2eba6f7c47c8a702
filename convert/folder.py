"""What makes a folder load as it is: config, quantization config, index, tokenizer, generation config, model card.

Everything beside the weights comes from the base model's folder (``--base-model``, else the source's own), copied verbatim but
for config.json: a stale ``quantization_config`` there is dropped, ours is put in, and ``torch_dtype`` becomes the dtype in
which the target's kernels compute.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formats.checkpoint import Location
from formats.errors import UnreadableError
from formats.mindspore_yaml import dump
from formats.safetensors_file import MAX_HEADER_BYTES, index_pieces

from .records import Plan, model_config

CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*.model", "chat_template.json", "*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "configuration_*.py",
    "modeling_*.py", "tokenization_*.py", "processing_*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Names beside the weights that a loader (or a lawyer) needs; weights, indexes and descriptions are never among them."""


def configs(plan: Plan) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights, by name; config.json only where there is one to begin with."""
    assert plan.spec.quantization_config is not None
    others, quantization = plan.spec.quantization_config(plan.model, plan.variant.name)
    config = model_config(plan.checkpoint, plan.base)
    if config is None and quantization is not None and not others:
        return {"config.json": {"quantization_config": quantization}}  # without it nobody could read the weights
    if config is None:
        return dict(others)
    keys = plan.spec.config_keys(plan.model, plan.variant.name)
    kept = {name: content for name, content in others.items() if name != "quant_config.json"}  # for folders without a config.json
    return {"config.json": _with_quantization(config, quantization, plan.model.model_dtype) | dict(keys), **kept}


def _says_quantization(plan: Plan) -> bool:
    """Whether the target's config.json speaks of quantization."""
    assert plan.spec.quantization_config is not None
    return plan.spec.quantization_config(plan.model, plan.variant.name)[1] is not None


def check_carried(location: Location, patterns: Sequence[str] = ("config.json", *CARRIED)) -> None:
    """UnreadableError if a file that would be carried is a link out of the folder (its secret would end up in the copy), or huge.

    A hub cache is made of links from snapshots/REVISION to blobs: those are followed.
    """
    folder = location.folder.resolve()
    inside = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    for name in location.names:
        path = location.folder / name
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) or not path.is_file():
            continue
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            raise UnreadableError(f"{name}: is a link to a file outside the folder, which is not copied; put the file itself there")
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise UnreadableError(f"{name}: {path.stat().st_size} bytes is more than a tokenizer or config can need; remove it")


def write_sidecars(plan: Plan, folder: Path) -> list[str]:
    """Write every file beside the weights into ``folder``; returns what is missing for a folder that loads, in words."""
    base = plan.base or plan.checkpoint.location
    check_carried(base)
    if plan.spec.sidecars is not None:
        check_carried(base, ("*.json", "*.py", *CARRIED))
        (folder / "README.md").write_text(model_card(plan, base, None), encoding="utf-8")
        return plan.spec.sidecars(plan.model, plan.variant.name, base, folder)
    written = configs(plan)
    missing = []
    for name, content in written.items():
        if name.endswith(".yaml"):
            (folder / name).write_text(dump(content), encoding="utf-8")
            continue
        _write_json(folder / name, content)
    if plan.index is not None:
        with (folder / plan.index).open("w", encoding="utf-8") as file:
            file.writelines(index_pieces(plan.files))
    carried = _carry(base, folder)
    if "config.json" not in written:
        added = " and add our quantization config to it" if _says_quantization(plan) else ""
        missing.append(f"config.json: pass --base-model with the float model's folder, or copy its config.json{added}")
    elif not any(name.startswith("tokenizer") or name.endswith(".model") for name in carried):
        missing.append("tokenizer files: there are none beside config.json")
    missing += plan.spec.missing(plan.model, plan.variant.name)
    (folder / "README.md").write_text(model_card(plan, base, written.get("config.json")), encoding="utf-8")
    return missing


def _carry(base: Location, folder: Path) -> list[str]:
    """Copy the base's files that a loader needs (through links: a hub cache is made of them)."""
    names = [name for name in base.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in CARRIED)]
    for name in names:
        source = base.folder / name
        if not source.is_file():
            continue
        shutil.copyfile(source, folder / name)
    return names


def _with_quantization(config: dict[str, Any], quantization: dict[str, Any] | None, dtype: str | None) -> dict[str, Any]:
    result = {key: value for key, value in config.items() if key not in {"quantization_config", "quantize"}}
    if dtype is not None:
        # transformers 5 writes "dtype"; AutoAWQ, AutoGPTQ and transformers 4 read "torch_dtype", which version 5 reads too.
        result |= {key: dtype for key in ("torch_dtype", "dtype") if key == "torch_dtype" or key in result}
    if quantization is not None:
        result["quantization_config"] = quantization
    return result


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(plan: Plan, base: Location, config: dict[str, Any] | None) -> str:
    """README.md in the hub's form: what the weights are, where they came from, what was proved."""
    named = (config or {}).get("_name_or_path")
    name = named if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named) else base.folder.resolve().name
    quoted = name if re.fullmatch(r"[\w./-]+", name) else json.dumps(name, ensure_ascii=False)
    lines = ["---", f"base_model: {quoted}", "base_model_relation: quantized", "library_name: transformers", "tags:"]
    lines += [f"- {plan.spec.name}", "- weighbridge", "---", "", f"# {name}, {plan.target_name}", ""]
    lines += [f"Converted by Weighbridge from {plan.source_name} to {plan.target_name}: {plan.spec.about}.", ""]
    schemes = sorted({str(layer.target.scheme) for layer in plan.layers})
    lines += [f"- {len(plan.layers)} quantized layers: {', '.join(schemes)}"]
    lines += [f"- {len(plan.model.float_linears)} linears left in float"] if plan.model.float_linears else []
    lines += [f"- {loss.code}: {loss.layers} layers, relative error at most {loss.bound:.3g}" for loss in plan.losses]
    lines += ["- weighbridge.json holds the certificate; `weighbridge verify SOURCE THIS_FOLDER` checks it from the weights alone", ""]
    return "\n".join(lines)

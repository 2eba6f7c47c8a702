"""The float model that a MindFormers YAML names: its checkpoint, its config as Hugging Face has it, its tokenizer. Imports no torch.

MindFormers 1.3.2's ``predict_*.yaml``: ``load_checkpoint`` is a ``.ckpt`` file or a folder with one (or with Hugging Face's model,
which MindFormers does not know); ``model.model_config`` has LlamaConfig's keys, ``processor.tokenizer`` the tokenizer's files. Paths
count from the working directory, as in MindFormers, or else from the YAML's folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats import open_checkpoint
from formats.checkpoint import Location
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.mindspore_yaml import read_document

__all__ = ["MindFormersModel", "open_model"]

ARCHITECTURES = ("LlamaForCausalLM", "ParallelLlamaForCausalLM")
_KEYS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class MindFormersModel:
    """What a YAML names. location: of the weights, with a config.json; name: ``trainer.model_name``; output_dir: where results go."""

    path: Path
    location: Location
    name: str
    output_dir: Path
    compute_dtype: str
    qkv_concat: bool
    vocab_file: str

    def tokenizer(self) -> Any:
        """The tokenizer of ``processor.tokenizer.vocab_file``, or the one beside the weights."""
        from .models import load_tokenizer

        known = ("tokenizer.json", "tokenizer_config.json")
        vocabulary = _found(self.path, self.vocab_file) if self.vocab_file else None
        for folder in (None if vocabulary is None else vocabulary.parent, self.path.parent, self.location.folder):
            if folder is not None and any((folder / name).is_file() for name in known):
                return load_tokenizer(folder)
        if vocabulary is not None and vocabulary.is_file() and vocabulary.suffix == ".model":
            import transformers

            library: Any = transformers
            try:
                return library.LlamaTokenizerFast(vocab_file=os.fspath(vocabulary))
            except (OSError, ValueError, ImportError) as error:
                raise UnreadableError(f"{vocabulary}: transformers cannot load it ({str(error).splitlines()[0]:.300})") from error
        wanted = f"no {self.vocab_file!r}" if self.vocab_file else "no processor.tokenizer.vocab_file"
        raise UnreadableError(f"{self.path.name}: {wanted}, and no tokenizer.json beside it or the weights; put one there")


def open_model(path: str | os.PathLike[str]) -> MindFormersModel:
    """The model that the YAML file ``path`` names.

    :raises UsageError: there is no such file, or it names no checkpoint
    :raises UnreadableError: it is no YAML of MindFormers', or the checkpoint cannot be read
    :raises RefusedError: a network that Golden Stick's script does not know, or that has parts with no words in Hugging Face's config
    """
    where = Path(path)
    if not where.is_file():
        raise UsageError(f"{where}: there is no such YAML file")
    content = read_document(where)
    model = _mapping(content, "model", where)
    config = _mapping(model, "model_config", where)
    kind = _mapping(model, "arch", where).get("type")
    if kind not in ARCHITECTURES:
        raise RefusedError(f"{where.name}: model.arch.type is {kind!r}, and Golden Stick's script takes {' and '.join(ARCHITECTURES)}")
    named = content.get("load_checkpoint") or config.get("checkpoint_name_or_path")
    if not isinstance(named, str) or not named:
        raise UsageError(f"{where.name}: load_checkpoint is empty; write the float model's .ckpt file or folder there")
    location = _location(_found(where, named), config, where)
    trainer, processor = content.get("trainer") or {}, content.get("processor") or {}
    tokenizer = (processor.get("tokenizer") or {}) if isinstance(processor, Mapping) else {}
    name = trainer.get("model_name") if isinstance(trainer, Mapping) else None
    if name and not re.fullmatch(r"\w[\w.+-]*", str(name)):
        raise UnreadableError(
            f"{where.name}: trainer.model_name is {name!r:.80}, and a name for a folder was wanted: letters, digits, _ . + -"
        )
    return MindFormersModel(
        where,
        location,
        str(name or ""),
        Path(str(content.get("output_dir") or "./output")),
        str(config.get("compute_dtype") or "float16"),
        bool(config.get("qkv_concat", False)),
        str(tokenizer.get("vocab_file") or "") if isinstance(tokenizer, Mapping) else "",
    )


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = content.get(key)
    if not isinstance(found, Mapping):
        raise UnreadableError(f"{path.name}: has no {key}, or none that is a mapping; a predict_*.yaml of MindFormers was wanted")
    return found


def _found(yaml_path: Path, name: str) -> Path:
    """A path of the YAML's, from the working directory or else from its folder."""
    here, beside = Path(name), yaml_path.parent / name
    return here if here.exists() or not beside.exists() else beside


def _location(path: Path, config: Mapping[str, Any], yaml_path: Path) -> Location:
    """The weights, with the YAML's config where they have none of their own."""
    location = Location.of(path)
    if location.file is None and "config.json" in location.names and not location.documents:
        return location
    source = open_checkpoint(location)
    document = _config(config, source.tensors, yaml_path)
    names = location.names if "config.json" in location.names else (*location.names, "config.json")
    return replace(location, names=names, documents={**location.documents, "config.json": document})


def _config(config: Mapping[str, Any], tensors: Any, path: Path) -> dict[str, Any]:
    """Hugging Face's config of LlamaConfig's keys; the width of the MLP is that of the weights."""
    said: dict[str, Any] = {}
    for ours, theirs in _KEYS.items():
        value = config.get(theirs)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnreadableError(f"{path.name}: model.model_config.{theirs} is {value!r}, wanted a whole number from 1")
        said[ours] = value
    extended = config.get("extend_method")
    if extended not in {None, "None", "NONE"} or config.get("scaling_factor") not in {None, 1}:
        raise RefusedError(
            f"{path.name}: extend_method {extended} stretches positions, for which no config is made here; give the Hugging Face folder"
        )
    gate = tensors.get("model.layers.0.mlp.gate_proj.weight")
    if gate is None or len(gate.shape) != 2:
        raise UnreadableError(f"{path.name}: its checkpoint has no model.layers.0.feed_forward.w1, so it is no Llama of MindFormers'")
    length = config.get("max_position_embedding") or config.get("seq_length") or 2048
    biased = "model.layers.0.self_attn.q_proj.bias" in tensors
    dtype = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}.get(gate.dtype, "float16")
    return {
        **said,
        "architectures": ["Qwen2ForCausalLM" if biased else "LlamaForCausalLM"],
        "model_type": "qwen2" if biased else "llama",
        "num_key_value_heads": int(config.get("n_kv_heads") or said["num_attention_heads"]),
        "intermediate_size": int(gate.shape[0]),
        "max_position_embeddings": int(length),
        "rms_norm_eps": float(config.get("rms_norm_eps") or 1e-5),
        "rope_theta": float(config.get("theta") or 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": config.get("bos_token_id", 1),
        "eos_token_id": config.get("eos_token_id", 2),
        "pad_token_id": config.get("pad_token_id", 0),
        "torch_dtype": dtype,
    }

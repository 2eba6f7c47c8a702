"""MindFormers' YAML: what makes a folder with a ``.ckpt`` file run, and what it says of quantization.

Defined by MindFormers 1.3.2 (``configs/llama2/predict_llama2_13b_rtn.yaml``, ``utils/quantization_config.py``, ``models/llama``), whose
keys are all written; 1.6 knows more, which are written where a model needs them. ``model.model_config.quantization_config``:

=====================  =====================================================================================================
quant_method           rtn, smooth_quant or ptq
weight_dtype           int8, None; int4 since 1.5. Unknown words mean None to 1.3.2, without a word
activation_dtype       int8, None
kvcache_dtype          int8, None
outliers_suppression   smooth, None; awq since 1.5. Must be there, and None is the word: null is a KeyError
modules_to_not_convert parts of names of cells that stay in float; must be there
algorithm_args         must be there
=====================  =====================================================================================================

``None`` is five characters here, which YAML does not take for null.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RefusedError, UnreadableError, UsageError
from .spec import ModelFacts

METHODS = ("rtn", "smooth_quant", "ptq")
WORDS: dict[str, tuple[str, ...]] = {
    "weight_dtype": ("int8", "int4", "None"),
    "activation_dtype": ("int8", "None"),
    "kvcache_dtype": ("int8", "None"),
    "outliers_suppression": ("smooth", "awq", "outlier-suppression+", "outlier-suppression-lite", "None"),
}
NULLABLE = ("activation_dtype", "kvcache_dtype")
"""Keys that may be null, or missing."""
_MOST = 1 << 20
"""Bytes of a YAML file that is read."""
_ANCHORS = frozenset({"eval_dataset", "train_dataset", "output_dir"})
"""What MindFormers' own YAML files name to use it twice."""


def document(model: ModelFacts, variant: str, name: str) -> dict[str, Any]:
    """The whole YAML for inference, on one card or on as many as there are ranks.

    raises   RefusedError for what MindFormers' configuration cannot say
    """
    assert model.config is not None
    return {
        "seed": 0,
        "output_dir": "./output",
        "load_checkpoint": "",
        "src_strategy_path_or_dir": "",
        "auto_trans_ckpt": False,
        "only_save_strategy": False,
        "resume_training": False,
        "run_mode": "predict",
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": name},
        "do_eval": False,
        "runner_config": {"epochs": 2, "batch_size": 1, "sink_mode": True, "sink_size": 2},
        "use_parallel": model.ranks > 1,
        "parallel": {
            "parallel_mode": 1,
            "gradients_mean": False,
            "enable_alltoall": False,
            "full_batch": True,
            "search_mode": "sharding_propagation",
            "enable_parallel_optimizer": False,
            "strategy_ckpt_save_file": "./ckpt_strategy.ckpt",
            "parallel_optimizer_config": {"gradient_accumulation_shard": False, "parallel_optimizer_threshold": 64},
        },
        "parallel_config": {
            "data_parallel": 1,
            "model_parallel": model.ranks,
            "pipeline_stage": 1,
            "use_seq_parallel": False,
            "micro_batch_num": 1,
            "vocab_emb_dp": False,
            "gradient_aggregation_group": 4,
        },
        "micro_batch_interleave_num": 1,
        "context": {
            "mode": 0,
            "device_target": "Ascend",
            "enable_graph_kernel": False,
            "max_call_depth": 10000,
            "max_device_memory": "58GB",
            "save_graphs": False,
            "save_graphs_path": "./graph",
            "device_id": 0,
            "ascend_config": {"precision_mode": "must_keep_origin_dtype"},
        },
        "model": {"model_config": _model_config(model, variant), "arch": {"type": "LlamaForCausalLM"}},
        "processor": _processor(model.config),
        "metric": {"type": "EmF1Metric"},
        "runner_wrapper": {
            "type": "MFTrainOneStepCell",
            "scale_sense": {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 65536, "scale_factor": 2, "scale_window": 1000},
            "use_clip_grad": True,
        },
        "auto_tune": False,
        "filepath_prefix": "./autotune",
        "autotune_per_step": 10,
        "profile": False,
    }


NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
"""config.json's keys without which there is no YAML."""


def missing_key(config: Mapping[str, Any]) -> str | None:
    """The first key that config.json lacks, or has of another type; None if the YAML can be written."""
    return next((key for key in NEEDED if type(config.get(key)) is not int or config[key] < 1), None)


def _model_config(model: ModelFacts, variant: str) -> dict[str, Any]:
    """LlamaConfig's keys, from config.json's."""
    config = model.config or {}
    if config.get("rope_scaling") or (config.get("sliding_window") and config.get("use_sliding_window")):
        raise RefusedError(
            "config.json: says rope_scaling or a sliding window, for which MindFormers 1.3.2's LlamaConfig has no words here; "
            "write the YAML by hand, and convert without config.json"
        )
    dtype = model.model_dtype or _dtype(config)
    heads = config["num_attention_heads"]
    length = config["max_position_embeddings"]
    found: dict[str, Any] = {
        "type": "LlamaConfig",
        "batch_size": 1,
        "seq_length": min(length, 4096),
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "n_kv_heads": int(config.get("num_key_value_heads") or heads),
        "max_position_embedding": length,
        "intermediate_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "multiple_of": 256,
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-5)),
        "theta": float(config.get("rope_theta", 10000.0)),
        "bos_token_id": _token(config, "bos_token_id", 1),
        "eos_token_id": _token(config, "eos_token_id", 2),
        "pad_token_id": _token(config, "pad_token_id", 0),
        "ignore_token_id": -100,
        "compute_dtype": dtype,
        "layernorm_compute_type": "float32",
        "softmax_compute_type": "float16" if dtype == "float16" else "float32",
        "rotary_dtype": "float32",
        "param_init_type": dtype,
        "qkv_has_bias": config.get("model_type") == "qwen2" or bool(config.get("attention_bias")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "use_past": True,
        "extend_method": "None",
        "use_flash_attention": True,
        "block_size": 16,
        "num_blocks": 512,
        "is_dynamic": True,
        "qkv_concat": model.fused,
        "offset": 0,
        "checkpoint_name_or_path": "",
        "repetition_penalty": 1,
        "max_decode_length": 512,
        "top_k": 3,
        "top_p": 1,
        "do_sample": False,
    }
    if (model.layers or model.attention) and variant != "float":
        found["quantization_config"] = quantization(model, variant)
    return found


def quantization(model: ModelFacts, variant: str) -> dict[str, Any]:
    """``quantization_config`` of a quantized model: 1.3.2's keys, and beyond them what only later versions have words for."""
    layer = model.layers[0] if model.layers else None  # a KV cache may be all that is quantized
    weights = None if layer is None else layer.scheme.weights
    kind, smoothed = (None, False) if layer is None else (layer.inputs, layer.smooth_dtype is not None)
    found: dict[str, Any] = {
        "quant_method": "rtn" if variant == "gs0.6" and kind is None else "ptq",
        "weight_dtype": "None" if weights is None else f"int{weights.bits}",
        "activation_dtype": "None" if kind is None else "int8",
        "kvcache_dtype": "int8" if model.attention else "None",
        "outliers_suppression": "None" if not smoothed else "awq" if kind is None else "smooth",
        "modules_to_not_convert": ["lm_head", *(_float_cells(model) if model.layers else ())],
        "algorithm_args": {},
    }
    if weights is not None and weights.strategy == "group":
        found |= {"weight_quant_granularity": "per_group", "group_size": weights.group_size}
    if kind == "dynamic":
        found["act_quant_granularity"] = "per_token"
    return found


def _float_cells(model: ModelFacts) -> list[str]:
    """Cells of linears that stay in float: by their last name where that is so in every block, else whole."""
    from .mindformers_names import names_for

    names = names_for((model.config or {}).get("model_type"))
    quantized = {layer.name.rpartition(".")[2] for layer in model.layers}
    found: dict[str, None] = {}
    for name in model.float_linears:
        stored = None if names is None else names.stored(f"{name}.weight", model.fused)
        cell = name if stored is None else stored[0].removesuffix(".weight")
        found[cell if name.rpartition(".")[2] in quantized else cell.rpartition(".")[2]] = None
    return list(found)


def _processor(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("model_type") == "qwen2":
        tokenizer = {"vocab_file": "./vocab.json", "merges_file": "./merges.txt", "type": "Qwen2Tokenizer"}
        return {"return_tensors": "ms", "tokenizer": tokenizer, "type": "Qwen2Processor"}
    tokenizer = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "vocab_file": "./tokenizer.model"}
    return {"return_tensors": "ms", "tokenizer": {**tokenizer, "type": "LlamaTokenizer"}, "type": "LlamaProcessor"}


def _dtype(config: Mapping[str, Any]) -> str:
    said = str(config.get("torch_dtype", config.get("dtype", "float16")))
    return said if said in {"float16", "bfloat16", "float32"} else "float16"


def _token(config: Mapping[str, Any], key: str, usual: int) -> int:
    found = config.get(key, usual)
    found = found[0] if isinstance(found, list) and found else found
    return found if type(found) is int and found >= 0 else usual


def dump(content: Mapping[str, Any]) -> str:
    """The document as text."""
    return str(pyyaml().safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=140))


def read_quantization(path: Path) -> dict[str, Any] | None:
    """``model.model_config.quantization_config`` of a YAML file, checked; None if it has none.

    raises   UnreadableError, which names the key and its line
    """
    yaml, node = _composed(path)
    for key in ("model", "model_config", "quantization_config"):
        if node is None or not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for name, value in node.value if name.value == key), None)
    if node is None:
        return None
    return _checked(yaml, path.name, node)


def read_document(path: Path) -> dict[str, Any]:
    """A YAML file of MindFormers', whole.

    raises   UnreadableError
    """
    yaml, node = _composed(path)
    try:
        found = None if node is None else yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise UnreadableError(f"{path.name}: is no YAML ({str(error).splitlines()[0]:.200})") from None
    if not isinstance(found, dict):
        raise UnreadableError(f"{path.name}: is no MindFormers configuration, which is a mapping")
    return found


def _composed(path: Path) -> tuple[Any, Any]:
    """(PyYAML, the document's node). UnreadableError for a file that is none, or that has aliases but MindFormers' own."""
    yaml = pyyaml()
    try:
        with path.open("rb") as file:
            text = file.read(_MOST + 1)
    except OSError as error:
        raise UnreadableError(f"{path.name}: cannot be read ({error.strerror or error})") from None
    if len(text) > _MOST:
        raise UnreadableError(f"{path.name}: more than {_MOST} bytes, more than a configuration can need")
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # an anchor may stand for a document that grows without end
            if isinstance(event, yaml.AliasEvent) and event.anchor not in _ANCHORS:
                raise UnreadableError(f"{path.name}, line {event.start_mark.line + 1}: an alias *{event.anchor}, which is not read")
        return yaml, yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = path.name if mark is None else f"{path.name}, line {mark.line + 1}"
        raise UnreadableError(f"{where}: is no YAML ({getattr(error, 'problem', None) or type(error).__name__})") from None


def _checked(yaml: Any, file: str, node: Any) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise UnreadableError(f"{file}, line {node.start_mark.line + 1}: quantization_config is no mapping; MindFormers would not take it")
    found: dict[str, Any] = {}
    loader = yaml.SafeLoader("")
    for key, value in node.value:
        where = f"{file}, line {key.start_mark.line + 1}"
        if key.value in found:
            raise UnreadableError(f"{where}: {key.value} is there twice; which one counts cannot be known")
        said = found[str(key.value)] = loader.construct_object(value, deep=True)
        words = METHODS if key.value == "quant_method" else WORDS.get(key.value)
        if words is not None and said not in words and not (said is None and key.value in NULLABLE):
            wanted = ", ".join(words)
            hint = "; the bare word None is a string, null is not" if said is None else ""
            raise UnreadableError(f"{where}: {key.value} is {said!r}, wanted {wanted}{hint}")
    line = node.start_mark.line + 1
    for needed in ("quant_method", "weight_dtype", "outliers_suppression", "modules_to_not_convert", "algorithm_args"):
        if needed not in found:
            why = "without which MindFormers 1.3.2 fails, or quantizes nothing"
            raise UnreadableError(f"{file}, line {line}: quantization_config has no {needed}, {why}")
    return found


def pyyaml() -> Any:
    """PyYAML, imported when it is needed: ``import formats`` is light. UsageError where it is missing."""
    try:
        import yaml
    except ImportError:
        raise UsageError("PyYAML is not installed; pip install pyyaml") from None
    return yaml

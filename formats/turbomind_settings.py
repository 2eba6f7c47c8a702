"""What LMDeploy writes of a model into a workspace's configuration, version by version, with every key in the tool's order.

Defined by LMDeploy 0.1.0 (``turbomind/deploy/target_model/base.py``), 0.6.0, 0.6.5, 0.8.0 and 0.9.2 (``turbomind/deploy/config.py``,
``source_model/llama.py`` and ``qwen.py``). Engines up to 0.1 know no defaults, later ones refuse what is of another type.

========  =============  ================================================================================================
variant   read by        what it has
========  =============  ================================================================================================
``0.1``   0.1 to 0.5     config.ini; ``session_len`` is that of the chat template called ``model_name``, and 8 more
``0.6``   0.6.0 to 2     one feed-forward size, ``fp16`` and ``bf16``; a float model's group_size is 128 and means nothing
``0.7``   0.6.4 to 0.7   a feed-forward size for each layer, ``float16`` and ``bfloat16``; what YaRN needs
``0.9``   0.8 and 0.9    ``rope_param`` instead of a dozen keys, ranks of attention and feed-forward by themselves
========  =============  ================================================================================================

Quirks:

1. 0.6.5 writes ``rotary_embedding = hidden_size / heads`` also where config.json has another head_dim. Here it is the heads' size, which
   the engine turns by.
2. 0.8.0's YaRN takes ``factor`` and the longest input as they are, 0.9.2's the length before stretching, and its own quotient; that is
   what is written.
3. Since 0.6 the padded feed-forward size of QWen's models is that of gate and up together; here it is gate's.
4. QWen's and Qwen2's first and last tokens are fixed, whatever their config.json says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import RefusedError
from .llama_names import llama_config
from .turbomind_tree import Geometry

SESSIONS = {
    "internlm": 2048, "llama": 2048, "base": 2048, "wizardlM": 2048, "vicuna": 2048, "internlm-chat": 2048, "internlm-chat-7b": 2048,
    "internlm-chat-20b": 8192, "internlm-chat-7b-8k": 8192, "internlm-20b": 4096, "baichuan-7b": 2048, "baichuan2-7b": 2048,
    "puyu": 2048, "llama2": 4096, "qwen-14b": 8192, "qwen-7b": 8192, "codellama": 4096, "solar": 2048, "ultracm": 2048,
    "ultralm": 2048, "yi": 2048,
}  # fmt: skip
"""Chat templates of LMDeploy 0.1.0 with the tokens that a session of each has."""
_TEMPLATES = {"internlm": "internlm-chat-7b", "internlm2": "internlm2-chat-7b", "qwen": "qwen-7b", "baichuan": "baichuan-7b"}
_ENDS = {"qwen": (0, 151643), "qwen2": (151643, 151645)}
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length", "max_seq_length",
    "seq_len",
)  # fmt: skip
_LORA = {"lora_max_wo_r": 0, "lora_policy": "", "lora_r": 0, "lora_rank_pattern": "", "lora_scale": 0.0, "lora_scale_pattern": ""}


def template_for(config: Mapping[str, Any]) -> str:
    """The chat template that a model's type suggests."""
    return _TEMPLATES.get(str(config.get("model_type")), "base")


def settings_of(shape: Geometry, config: Mapping[str, Any], template: str, variant: str) -> dict[str, Any]:
    """The sections of config.ini or config.yaml in a variant.

    config    the model's config.json; template: the name of its chat template
    raises    RefusedError for a rotary embedding that the variant's engine does not know
    """
    said = llama_config(config)
    if variant == "0.1":
        return _ini(shape, config, said, template)
    make = {"0.6": _yaml_of_0_6, "0.7": _yaml_of_0_7}.get(variant, _yaml_of_0_9)
    attention, model = make(shape, config, said)
    architectures = config.get("architectures")
    arch = architectures[0] if isinstance(architectures, list) and architectures else "LlamaForCausalLM"
    model |= {
        "attn_bias": int(shape.qkv_bias), "chat_template": template, "head_num": shape.heads, "hidden_units": shape.hidden,
        "kv_head_num": shape.stored_kv, "model_arch": arch, "model_format": "awq" if shape.group else "hf", "model_name": template,
        "norm_eps": float(said.get("rms_norm_eps", 1e-6)),
        "num_layer": shape.layers, "session_len": _session(config), "size_per_head": shape.head, "vocab_size": shape.output,
    }  # fmt: skip
    attention |= {
        "cache_block_seq_len": 64, "max_position_embeddings": int(said.get("max_position_embeddings", 0)),
        "use_logn_attn": int(bool(config.get("use_logn_attn"))),
    }  # fmt: skip
    return {"attention_config": attention, "lora_config": dict(_LORA), "model_config": model}


def _ini(shape: Geometry, config: Mapping[str, Any], said: Mapping[str, Any], template: str) -> dict[str, Any]:
    """What 0.1.0 writes. said: config.json in Llama's words."""
    kind = _scaling(said)[0]
    if kind not in {"", "dynamic"}:
        raise RefusedError(f"rope_scaling: is {kind!r} in config.json, which LMDeploy up to 0.5 does not know; choose turbomind:0.9")
    longest, (first, last) = int(said.get("max_position_embeddings", 0)), _ends(config)
    llama = {
        "model_name": template,
        "tensor_para_size": shape.tp,
        "head_num": shape.heads,
        "kv_head_num": shape.kv,
        "vocab_size": shape.vocabulary,
        "num_layer": shape.layers,
        "inter_size": shape.intermediate[0],
        "norm_eps": float(said.get("rms_norm_eps", 1e-6)),
        "attn_bias": int(shape.qkv_bias),
        "start_id": first,
        "end_id": last,
        "session_len": SESSIONS.get(template, longest or 2048) + 8,
        "weight_type": "int4" if shape.group else _SHORT[shape.dtype],
        "rotary_embedding": shape.head,
        "rope_theta": _theta(said),
        "size_per_head": shape.head,
        "group_size": shape.group,
        "max_batch_size": 64,
        "max_context_token_num": 1,
        "step_length": 1,
        "cache_max_entry_count": 0.5,
        "cache_block_seq_len": 128,
        "cache_chunk_size": 1,
        "use_context_fmha": 1,
        "quant_policy": 0,
        "max_position_embeddings": longest,
        "rope_scaling_factor": 0.0,
        "use_logn_attn": int(bool(config.get("use_logn_attn"))),
    }
    return {"llama": llama}


_SHORT, _LONG = {"F16": "fp16", "BF16": "bf16"}, {"F16": "float16", "BF16": "bfloat16"}
_Sections = tuple[dict[str, Any], dict[str, Any]]


def _yaml_of_0_6(shape: Geometry, config: Mapping[str, Any], said: Mapping[str, Any]) -> _Sections:
    """What only 0.6.0 writes: (attention_config, model_config)."""
    kind, scaling = _scaling(said)
    if kind == "yarn":
        raise RefusedError("rope_scaling: is 'yarn' in config.json, which LMDeploy 0.6.0 does not know; choose turbomind:0.7 or 0.9")
    first, last = _ends(config)
    model = {
        "end_id": last, "group_size": shape.group or 128, "inter_size": shape.padded[0], "start_id": first, "tp": shape.tp,
        "weight_type": "int4" if shape.group else _SHORT[shape.dtype],
    }  # fmt: skip
    return _turned(shape, config, said, kind, scaling), model


def _yaml_of_0_7(shape: Geometry, config: Mapping[str, Any], said: Mapping[str, Any]) -> _Sections:
    """What only 0.6.4 to 0.7.0 write."""
    kind, scaling = _scaling(said)
    first, last = _ends(config)
    attention = _turned(shape, config, said, kind, scaling)
    attention |= {"attention_factor": -1.0, "beta_fast": 32.0, "beta_slow": 1.0, "softmax_scale": 0.0}
    if kind == "yarn":
        attention |= _yarn(scaling)
    elif config.get("model_type") == "qwen":
        attention["attention_factor"] = None
    model = {**_experts(shape), "end_id": last, "start_id": first, "tp": shape.tp}
    return attention, model


def _yaml_of_0_9(shape: Geometry, config: Mapping[str, Any], said: Mapping[str, Any]) -> _Sections:
    """What only 0.9.2 writes."""
    kind, scaling = _scaling(said)
    longest = int(said.get("max_position_embeddings", 0))
    rope: dict[str, Any] = {
        "attention_factor": 1.0, "base": _theta(said), "beta_fast": 32, "beta_slow": 1, "dim": shape.head, "factor": 1.0,
        "high_freq_factor": None, "low_freq_factor": None, "max_position_embeddings": None, "mrope_section": None,
        "original_max_position_embeddings": None, "type": kind or "default",
    }  # fmt: skip
    if kind:
        rope["factor"] = _factor(scaling)
    if kind == "dynamic":
        rope["max_position_embeddings"] = longest
    elif kind == "llama3":
        rope |= _llama3(scaling)
    elif kind == "yarn":
        before = scaling.get("original_max_position_embeddings")
        rope |= _yarn(scaling)
        rope |= {"max_position_embeddings": before or longest, "factor": longest / before if before else rope["factor"]}
    if config.get("model_type") == "qwen":
        rope |= {"max_position_embeddings": longest, "factor": 0.0, "type": "dynamic" if config.get("use_dynamic_ntk") else "default"}
    model = {
        **_experts(shape), "attn_tp_size": shape.tp, "mlp_tp_size": shape.tp, "qk_norm": False, "tokenizer_size": shape.output,
    }  # fmt: skip
    return {"rope_param": rope, "softmax_scale": 0.0}, model


def _experts(shape: Geometry) -> dict[str, Any]:
    """What 0.6.4 and later say of experts, latent attention and sizes."""
    return {
        "embedding_size": shape.vocabulary, "expert_inter_size": 0, "expert_num": [], "experts_per_token": 0, "group_size": shape.group,
        "inter_size": list(shape.padded), "kv_lora_rank": 0, "moe_group_num": 1, "moe_shared_gate": False, "norm_topk_prob": False,
        "q_lora_rank": 0, "qk_rope_dim": 0, "routed_scale": 1.0, "topk_group": 1, "topk_method": "greedy", "tune_layer_num": 1,
        "v_head_dim": 0, "weight_type": "int4" if shape.group else _LONG[shape.dtype],
    }  # fmt: skip


def _turned(shape: Geometry, config: Mapping[str, Any], said: Mapping[str, Any], kind: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding as 0.6 and 0.7 say it."""
    dynamic = kind == "dynamic" or bool(config.get("model_type") == "qwen" and config.get("use_dynamic_ntk"))
    found = {
        "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 0,
        "rope_scaling_factor": _factor(scaling) if kind else 0.0, "rope_scaling_type": kind, "rope_theta": _theta(said),
        "rotary_embedding": shape.head, "use_dynamic_ntk": int(dynamic),
    }  # fmt: skip
    return found | _llama3(scaling) if kind == "llama3" else found


def _llama3(scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "low_freq_factor": float(scaling.get("low_freq_factor", 1.0)),
        "high_freq_factor": float(scaling.get("high_freq_factor", 1.0)),
        "original_max_position_embeddings": int(scaling.get("original_max_position_embeddings", 0)),
    }


def _yarn(scaling: Mapping[str, Any]) -> dict[str, Any]:
    said = scaling.get("attention_factor")
    return {
        "attention_factor": 0.1 * math.log(_factor(scaling)) + 1.0 if said is None else float(said),
        "beta_fast": float(scaling.get("beta_fast", 32.0)),
        "beta_slow": float(scaling.get("beta_slow", 1.0)),
    }


def _scaling(model: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(kind, what config.json says of it); ("", {}) for an ordinary rotary embedding. RefusedError for one that no engine here knows."""
    said = model.get("rope_scaling")
    if not said:
        return "", {}
    kinds: set[str] = {str(said[key]) for key in ("type", "rope_type") if said.get(key)} if isinstance(said, Mapping) else set()
    if kinds == {"default"} and "mrope_section" not in said:
        return "", {}
    if len(kinds) != 1 or not kinds <= {"dynamic", "linear", "llama3", "yarn"} or "mrope_section" in said:
        raise RefusedError(f"rope_scaling: is {said} in config.json, which a workspace here cannot say; load the model's folder itself")
    numbers = {key: value for key, value in said.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    if not numbers.get("factor", 0) > 0:
        raise RefusedError(f"rope_scaling: is {said} in config.json, without a positive factor; correct it")
    return kinds.pop(), numbers


def _factor(scaling: Mapping[str, Any]) -> float:
    return float(scaling["factor"])


def _theta(said: Mapping[str, Any]) -> float:
    return float(said.get("rope_theta") or 10000.0)


def _session(config: Mapping[str, Any]) -> int:
    """The longest input: the least of what config.json calls so."""
    return min((int(config[key]) for key in _LENGTHS if isinstance(config.get(key), int)), default=0) or 2048


def _ends(config: Mapping[str, Any]) -> tuple[int, int]:
    """(first token's id, last token's), the first of several."""

    def one(key: str, default: int) -> int:
        said = config.get(key)
        said = said[0] if isinstance(said, list) and said else said
        return said if isinstance(said, int) and not isinstance(said, bool) else default

    return _ENDS.get(str(config.get("model_type"))) or (one("bos_token_id", 1), one("eos_token_id", 2))

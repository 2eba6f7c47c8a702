"""TurboMind workspaces against those that LMDeploy 0.1.0 to 0.9.2 made of the same models: every file, both ways.

fixtures/lmdeploy/workspaces.json has the SHA-256 of each file, and configurations as they are (``oracles/make_lmdeploy_workspaces.py``);
the models are made again here (``lmdeploy_models``). Where LMDeploy and we differ on purpose, the test says it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import small_tiles
from lmdeploy_models import BAICHUAN, CASES, INTERNLM2, QWEN, SCALED, SMALL, W4, model, write_model
from places import fails, succeeds
from safetensors.numpy import load_file, save_file

from convert import convert, verify
from formats.errors import UnreadableError
from formats.ir import Array
from formats.mindspore_yaml import pyyaml

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lmdeploy"
GOLDENS = json.loads((FIXTURES / "workspaces.json").read_text())
WEIGHTS = Path("triton_models/weights")
VARIANTS = {"0.1.0": "0.1", "0.2.6": "0.1", "0.6.0": "0.6", "0.6.5": "0.7", "0.8.0": "0.9", "0.9.2": "0.9"}


def name_of(case: str) -> str:
    """The chat template that the golden was made for."""
    version, config, _ = CASES[case]
    named = {"qwen": "qwen-7b", "baichuan": "baichuan-7b", "internlm2": "internlm2-chat-7b"}.get(config["model_type"], "internlm-chat-7b")
    return named if version < "0.6" else "llama2"


def made(tmp_path: Path, case: str) -> tuple[Path, Path]:
    """(the model's folder, our workspace of it)."""
    version, config, tp = CASES[case]
    source = write_model(tmp_path / "model", config)
    convert(source, tmp_path / "out", f"turbomind:{VARIANTS[version]}", tp=tp, model_name=name_of(case))
    return source, tmp_path / "out"


def differing(workspace: Path, case: str) -> list[str]:
    """Weight files that are not LMDeploy's, or that only one side has."""
    golden = GOLDENS[case]
    ours = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (workspace / WEIGHTS).iterdir()}
    return sorted(name for name in {*ours, *golden} if not name.startswith("config.") and ours.get(name) != golden.get(name))


def said(text: str) -> Any:
    return pyyaml().safe_load(text)


def yaml_of(workspace: Path) -> str:
    return (workspace / WEIGHTS / "config.yaml").read_text()


def in_llamas_words(tensors: dict[str, Array], config: dict[str, Any]) -> dict[str, Array]:
    """The tensors of a float model under Llama's names, unfused by reshaping."""
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    names = {
        "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "model.tok_embeddings": "model.embed_tokens",
        "transformer.h": "model.layers", "output.": "lm_head.", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    }  # fmt: skip
    found = {}
    for name, array in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        fused = next((part for part in ("attention.wqkv", "attn.c_attn", "self_attn.W_pack") if part in name), None)
        if fused is None:
            found[name] = array
            continue
        awq = name.endswith((".qweight", ".qzeros", ".scales"))  # outputs along columns, some of them 8 in a word
        turned = array.T if awq else array
        rest = turned.shape[1:]
        kinds = turned.reshape(keys, heads // keys + 2, -1, *rest) if "wqkv" in fused else turned.reshape(3, 1, 1, -1, *rest)
        parts = (kinds[:, :-2], kinds[:, -2], kinds[:, -1]) if "wqkv" in fused else kinds
        for called, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            flat = part.reshape(-1, *rest)
            found[name.replace(fused, f"self_attn.{called}")] = np.ascontiguousarray(flat.T if awq else flat)
    return found


ALIKE = [case for case in GOLDENS if not CASES[case][1].get("rope_scaling") and not (case.startswith("qwen_") and "v010" not in case)]


@pytest.mark.parametrize("case", ALIKE)
def test_every_weight_file_is_lmdeploys(tmp_path: Path, case: str) -> None:
    source, out = made(tmp_path, case)
    assert differing(out, case) == []
    assert verify(source, out).same


@pytest.mark.parametrize("case", ALIKE)
def test_back_from_lmdeploys_files_comes_every_weight(tmp_path: Path, case: str) -> None:
    """The workspace read is LMDeploy's, since its files are."""
    source, out = made(tmp_path, case)
    assert differing(out, case) == []
    config = CASES[case][1]
    convert(out, tmp_path / "back", "awq" if "quantization_config" in config else "dense")
    found, wanted = load_file(tmp_path / "back/model.safetensors"), in_llamas_words(load_file(source / "model.safetensors"), config)
    if config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("case", [case for case in GOLDENS if VARIANTS[CASES[case][0]] != "0.1"])
def test_the_configuration_is_lmdeploys(tmp_path: Path, case: str) -> None:
    version, config, _ = CASES[case]
    text, golden = yaml_of(made(tmp_path, case)[1]), GOLDENS[case]["config.yaml"].replace("model_name: ours", "model_name: llama2")
    ours, theirs = said(text), said(golden)
    attention, rope = theirs["attention_config"], theirs["attention_config"].get("rope_param", {})
    if version == "0.8.0":  # read by 0.9 as well, which has two keys more, and stretches otherwise
        theirs["model_config"]["tokenizer_size"], rope["mrope_section"] = config["vocab_size"], None
        if rope["type"] == "yarn":
            rope |= {key: ours["attention_config"]["rope_param"][key] for key in ("factor", "max_position_embeddings")}
    if config.get("head_dim") and version == "0.6.5":  # it turned by hidden_size / heads
        attention["rotary_embedding"] = config["head_dim"]
    if config["model_type"] == "qwen":  # it took gate and up for one of them
        assert theirs["model_config"]["inter_size"] == [config["intermediate_size"]]
        theirs["model_config"]["inter_size"] = [config["intermediate_size"] // 2]
    assert ours == theirs
    alike = version in {"0.6.0", "0.6.5", "0.9.2"} and "head_dim" not in config and config["model_type"] != "qwen"
    assert not alike or text == golden


@pytest.mark.parametrize("case", ["bf16_v010", "baichuan_v010", "qwen_v010"])
def test_the_ini_is_lmdeploys(tmp_path: Path, case: str) -> None:
    assert (made(tmp_path, case)[1] / WEIGHTS / "config.ini").read_text() == GOLDENS[case]["config.ini"]


@pytest.mark.parametrize("case", ["qwen_v065", "qwen_v080", "qwen_v092"])
def test_qwens_feed_forward_is_not_stored_twice_as_large(tmp_path: Path, case: str) -> None:
    """LMDeploy fills it up to config.json's size, which is that of gate and up: the same files, with 0."""
    _, out = made(tmp_path, case)
    ffn = [f"layers.0.feed_forward.{part}.{rank}.weight" for part in ("w1", "w2", "w3") for rank in range(2)]
    assert differing(out, case) == ffn
    folder = theirs_of_qwen(out, case)
    assert differing(folder, case) == []
    convert(folder, tmp_path / "dense", "dense")
    found, wanted = load_file(tmp_path / "dense/model.safetensors"), in_llamas_words(model(QWEN), QWEN)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert (config["model_type"], config["architectures"], config["intermediate_size"]) == ("qwen2", ["Qwen2ForCausalLM"], 96)
    path = folder / WEIGHTS / "layers.0.feed_forward.w2.1.weight"
    path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    assert "mlp.down_proj.weight: is [256, 192], and not 0 beyond [256, 96]" in fails(
        5, "convert", folder, tmp_path / "no", "--to", "dense"
    )


def theirs_of_qwen(ours: Path, case: str) -> Path:
    """LMDeploy's workspace out of ours: gate, up and down of 96 filled up to 192, split over 2 ranks."""
    folder = shutil.copytree(ours, ours.with_name("theirs"))
    (folder / WEIGHTS / "config.yaml").write_text(GOLDENS[case]["config.yaml"])
    for part in ("w1", "w3", "w2"):
        paths = [folder / WEIGHTS / f"layers.0.feed_forward.{part}.{rank}.weight" for rank in range(2)]
        halves = [np.fromfile(path, "<u2") for path in paths]
        whole = (
            np.concatenate(halves).reshape(96, 256).T
            if part == "w2"
            else np.concatenate([half.reshape(256, 48) for half in halves], axis=1)
        )
        filled = np.pad(whole, ((0, 0), (0, 96)))
        for rank, path in enumerate(paths):
            half = filled[:, 96 * rank : 96 * rank + 96]
            np.ascontiguousarray(half.T if part == "w2" else half).tofile(path)
    return folder


@pytest.mark.parametrize("golden", ["bf16_v010", "w4_v065", "bf16_v080"])
def test_lmdeploys_own_workspace_there_and_back(tmp_path: Path, golden: str) -> None:
    version, config, tp = CASES[golden]
    assert differing(FIXTURES / golden, golden) == []
    quantized = "quantization_config" in config
    source = write_model(tmp_path / "model", config)
    assert verify(source, FIXTURES / golden).same
    convert(FIXTURES / golden, tmp_path / "back", "awq" if quantized else "dense")
    found = load_file(tmp_path / "back/model.safetensors")
    wanted = model(config)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []
    convert(tmp_path / "back", tmp_path / "again", f"turbomind:{VARIANTS[version]}", tp=tp, model_name=name_of(golden))
    assert differing(tmp_path / "again", golden) == []


def test_awq_of_a_fused_model_as_lmdeploy_0_2_had_it(tmp_path: Path) -> None:
    """Its tiles are Llama's, of which there are goldens."""
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    config = CASES["internlm2_w4_v092"][1] | sizes
    source, llama = write_model(tmp_path / "model", config), tmp_path / "llama"
    llama.mkdir()
    save_file(in_llamas_words(model(config), config), llama / "model.safetensors", metadata={"format": "pt"})
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    for name, folder in (("of_fused", source), ("of_llama", llama)):
        convert(folder, tmp_path / name, "turbomind:0.1", tp=2, model_name="internlm2-chat-7b")
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name / WEIGHTS).iterdir()} for name in ("of_fused", "of_llama"))
    assert ours == theirs


@pytest.mark.parametrize(
    "case", ["repeated_v092", "repeated_w4_v092", "padded_v092", "padded_w4_v092", "internlm2_v026", "internlm2_w4_v092"]
)
def test_tiles_that_cut_heads_groups_and_copies(tmp_path: Path, case: str) -> None:
    with small_tiles():
        source, out = made(tmp_path, case)
        assert differing(out, case) == []
        assert verify(source, out).same


def test_copies_of_a_key_head_that_differ(tmp_path: Path) -> None:
    _, out = made(tmp_path, "repeated_v092")
    path = out / WEIGHTS / "layers.0.attention.w_qkv.3.bias"
    stored = np.fromfile(path, "<u2")
    stored[64] ^= 1  # after the rank's query head
    stored.tofile(path)
    said = fails(5, "convert", out, tmp_path / "dense", "--to", "dense")
    assert "layers.0.attention.w_qkv.3.bias: differs from layers.0.attention.w_qkv.2.bias, of which it must be a copy" in said


def test_gptq_of_a_fused_model(tmp_path: Path) -> None:
    """Columns of words that hold 8 inputs; act-order's index belongs to each part."""
    source = write_model(tmp_path / "model", CASES["internlm2_w4_v092"][1])
    convert(source, tmp_path / "out", "turbomind:0.9")
    config = CASES["internlm2_w4_v092"][1]
    zeros = {name: np.full_like(array, 0x77777777) for name, array in model(config).items() if name.endswith(".qzeros")}
    tensors = {}
    for name, array in {**model(config), **zeros}.items():
        if not name.endswith(".qweight"):
            tensors[name] = array
            continue
        order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
        codes = (array.view(np.uint32)[:, :, None] >> (4 * order).astype(np.uint32) & 15).reshape(array.shape[0], -1)
        packed = (codes.reshape(-1, 8, codes.shape[1]) << (4 * np.arange(8, dtype=np.uint32))[None, :, None]).sum(1, dtype=np.uint32)
        tensors[name] = packed.view(np.int32)
        tensors[name.replace("qweight", "g_idx")] = (np.arange(codes.shape[0]) // 128).astype(np.int32)
    folder = tmp_path / "gptq"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    convert(folder, tmp_path / "of_gptq", "turbomind:0.9")
    for name in ("qweight", "scales"):
        for part in ("attention.w_qkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"):
            file = WEIGHTS / f"layers.0.{part}.0.{name}"
            assert (tmp_path / "of_gptq" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file


def test_a_workspace_of_internlm2_says_llama_when_it_is_one(tmp_path: Path) -> None:
    _, out = made(tmp_path, "internlm2_scaled_v092")
    convert(out, tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert (config["model_type"], config["architectures"], config["attention_bias"]) == ("llama", ["LlamaForCausalLM"], False)
    assert config["rope_scaling"] == SCALED["dynamic"]
    convert(out, tmp_path / "again", "turbomind:0.9", model_name="llama2")
    assert yaml_of(tmp_path / "again") == yaml_of(out)
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == "internlm2"


def test_a_workspace_of_baichuan2_is_a_llama(tmp_path: Path) -> None:
    """LMDeploy had normalized its lm_head."""
    _, out = made(tmp_path, "baichuan_v092")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "architectures": ["BaichuanForCausalLM"], "model_max_length": 4096}))
    convert(out, tmp_path / "dense", "dense")
    assert json.loads((tmp_path / "dense/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_tokenizer_lies_where_each_version_looks_for_it(tmp_path: Path) -> None:
    for case, places in {
        "bf16_v060": ("triton_models/tokenizer",),
        "bf16_v065": ("triton_models/tokenizer", "."),
        "bf16_v080": (".",),
    }.items():
        _, out = made(tmp_path / case, case)
        found = sorted(path.parent.relative_to(out).as_posix() for path in out.rglob("tokenizer.model"))
        assert found == sorted(places)
        assert all((out / place / "config.json").is_file() for place in places)
        assert (out / "triton_models/tokenizer/tokenizer.model").is_file() == (case != "bf16_v080")


def test_shards_of_a_fused_model(tmp_path: Path) -> None:
    _, out = made(tmp_path, "internlm2_v026")
    config, tensors = CASES["internlm2_v026"][1], model(CASES["internlm2_v026"][1])
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "of_shards", "turbomind:0.1", tp=2, model_name="internlm2-chat-7b")
    assert differing(tmp_path / "of_shards", "internlm2_v026") == []
    assert verify(folder, out).same


@pytest.mark.parametrize(
    ("config", "version", "words"),
    [
        (BAICHUAN | {"architectures": ["BaichuanForCausalLM"]}, "0.9", "BaichuanForCausalLM"),
        (SMALL, "0.6", "heads of 64"),
        (SMALL | {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "0.9", "longrope"),
        (SMALL | {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "0.9", "rope_scaling"),
        (SMALL | {"rope_scaling": {"type": "linear"}}, "0.9", "without a positive factor"),
        (SMALL | {"rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]}}, "0.9", "mrope_section"),
        (CASES["bf16_v010"][1] | {"rope_scaling": SCALED["linear"]}, "0.1", "up to 0.5"),
        (CASES["bf16_v060"][1] | {"rope_scaling": SCALED["yarn"]}, "0.6", "0.6.0 does not know"),
        (W4 | {"model_type": "phi3"}, "0.9", "phi3"),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], version: str, words: str) -> None:
    source = write_model(tmp_path / "model", config)
    assert words in fails(3, "convert", source, tmp_path / "out", "--to", f"turbomind:{version}")
    assert not (tmp_path / "out").exists()


def test_a_fused_tensor_of_another_model(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", INTERNLM2)
    (source / "config.json").write_text(json.dumps({**INTERNLM2, "num_key_value_heads": 2}))
    with pytest.raises(
        UnreadableError, match=r"attention\.wqkv\.weight: is BF16 \[512, 256\], and config\.json says 2 query and 2 key heads"
    ):
        convert(source, tmp_path / "out", "turbomind:0.9")


def test_words_of_transformers_5(tmp_path: Path) -> None:
    config = {key: value for key, value in SMALL.items() if key != "rope_theta"}
    source = write_model(tmp_path / "model", config | {"rope_parameters": {**SCALED["llama3"], "rope_theta": 20000.0}})
    succeeds("convert", source, tmp_path / "out", "--to", "turbomind:0.9", "--model-name", "llama2")
    rope = said(yaml_of(tmp_path / "out"))["attention_config"]["rope_param"]
    assert rope == said(GOLDENS["llama3_v092"]["config.yaml"])["attention_config"]["rope_param"]

"""A model run one decoder layer at a time is the model, bit for bit: from memory, from a folder, from every format."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from checkpoints import change_json
from safetensors.torch import load_file, save_file

import convert
from formats import Location, open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import dequantize
from quantize.architectures import architecture_of
from quantize.blocks import Blocks, States, Weights, advance, to_torch
from quantize.streamed import Rounding, round_folder

FIXTURES = Path(__file__).parents[2] / "fixtures"
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_eager": ("Llama", {"attn_implementation": "eager"}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}),
}


def made(name: str) -> Any:
    kind, more = MODELS[name]
    torch.manual_seed(1)
    library: Any = transformers
    model = getattr(library, f"{kind}ForCausalLM")(getattr(library, f"{kind}Config")(**{**SMALL, **more}))
    for parameter in model.parameters():  # norms that are not all 1
        torch.nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0.0, 0.3)
        parameter.data = parameter.data.bfloat16()  # not the buffers: rotary frequencies stay float32, as when a folder is loaded
    return model.eval()


def samples() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = [[torch.randint(0, 128, (1, length), generator=generator)] for length in (17, 9, 1)]
    padded = torch.randint(0, 128, (1, 12), generator=generator)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    return [*found, [padded, mask], [padded, torch.ones_like(padded)]]


def whole(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=one[0], attention_mask=one[1] if len(one) == 2 else None).logits[0] for one in samples()]


def by_layers(blocks: Blocks, path: Path | None = None) -> list[torch.Tensor]:
    states = blocks.begin(samples(), path)
    for layer in range(len(blocks)):
        with torch.no_grad(), blocks.stage(layer) as model:
            advance(model, states, samples())
    return list(blocks.logits(states))


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_stage_by_stage_is_the_whole_model_in_memory(name: str) -> None:
    model = made(name)
    names, use_cache = [one for one, _ in model.named_modules()], model.config.use_cache
    wanted = whole(model)
    assert_equal(by_layers(Blocks(model)), wanted)
    assert [one for one, _ in model.named_modules()] == names
    assert model.config.use_cache == use_cache
    assert_equal(whole(model), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_stage_by_stage_is_the_whole_model_from_a_folder(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    blocks, wide = (Blocks.open(tmp_path / "model", dtype) for dtype in (None, torch.float32))
    if "eager" in name:
        for one in (blocks, wide):
            one.model.set_attn_implementation("eager")
    assert (blocks.dtype, len(blocks)) == (torch.bfloat16, 3)
    assert all(parameter.is_meta for parameter in blocks.model.parameters())
    assert_equal(by_layers(blocks), whole(model))
    assert all(parameter.is_meta for parameter in blocks.model.parameters())
    assert set(blocks.linears) == {one for one, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert_equal(by_layers(wide), whole(model.float()))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_loaded_whole(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "model")
    blocks = Blocks.open(tmp_path / "model")
    loaded: Any = blocks.load()
    assert {key: value.dtype for key, value in loaded.state_dict().items()} == dict.fromkeys(model.state_dict(), torch.bfloat16)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == name.endswith("tied")
    if "eager" not in name:
        assert_equal(whole(loaded), whole(model))
        assert_equal(by_layers(blocks), whole(model))


def test_states_in_a_file(tmp_path: Path) -> None:
    model = made("llama")
    blocks = Blocks(model)
    assert_equal(by_layers(blocks, tmp_path / "states"), whole(model))
    lengths = [one[0].shape[1] for one in samples()]
    assert (tmp_path / "states").stat().st_size == sum(lengths) * 64 * 2
    again = States(lengths, 64, torch.bfloat16, tmp_path / "states")  # what lies there is kept
    again.sync()
    assert_equal(list(blocks.logits(again)), whole(model))


def test_a_layer_sees_what_the_whole_model_gives_it_and_keeps_its_name() -> None:
    model = made("mistral")
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(args[0].clone())

    name = "model.layers.2.mlp.down_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(watch("whole"))
    whole(model)
    hook.remove()
    blocks = Blocks(model)
    states = blocks.begin(samples())
    for layer in range(3):
        with torch.no_grad(), blocks.stage(layer) as stage:
            linears = [one for one, module in stage.named_modules() if isinstance(module, torch.nn.Linear)]
            assert all(one.startswith(f"model.layers.{layer}.") for one in linears)
            hook = stage.get_submodule(name).register_forward_pre_hook(watch("stage")) if layer == 2 else None
            advance(stage, states, samples())
            if hook is not None:
                hook.remove()
    assert_equal(seen["stage"], seen["whole"])


@pytest.mark.parametrize("to", ["msmodelslim", "awq", "gptq", "gptq:v2", "compressed-tensors"])
def test_a_quantized_folder_is_its_dequantized_model(to: str, tmp_path: Path) -> None:
    source = tiny.model_folder(tmp_path / "tinylm")
    round_folder(source, tmp_path / "quantized", Rounding(4, 128), to)
    convert.convert(tmp_path / "quantized", tmp_path / "dense", "dense", scale_dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    wanted = whole(model.eval())
    assert_equal(by_layers(Blocks.open(tmp_path / "quantized", torch.float32)), wanted)


FORMATS = sorted(
    path.parent
    for path in FIXTURES.glob("*/*/config.json")
    if path.parent.parent.name in {"awq_gptq", "compressed_tensors"} and any(path.parent.glob("*.safetensors"))
)


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_weights_are_the_laws_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.blocks.TILE", 300)
    checkpoint = open_checkpoint(folder)
    weights = Weights(checkpoint, torch.float32)
    for name in checkpoint.layer_names[:3]:
        assert np.array_equal(weights.tensor(f"{name}.weight").numpy(), dequantize(checkpoint.layer(name)))
        assert f"{name}.weight" in weights
        assert (f"{name}.bias" in weights) == (checkpoint.layer(name).bias is not None)
        assert f"{name}.scales" not in weights


def test_config_of_a_base_model(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "tinylm")
    round_folder(base, tmp_path / "out", Rounding(8), "msmodelslim")
    wanted = by_layers(Blocks.open(tmp_path / "out"))
    for path in (tmp_path / "out").iterdir():
        if not path.name.startswith("quant_"):
            path.unlink()
    with pytest.raises(UnreadableError, match=r"out: has no config\.json, so it is no model's folder; name the float model's"):
        Blocks.open(tmp_path / "out")
    checkpoint = open_checkpoint(Location.of(tmp_path / "out", base=Location.of(base)))
    assert_equal(by_layers(Blocks.open(checkpoint)), wanted)


def test_what_dequantized_weights_do_not_say_is_refused(tmp_path: Path) -> None:
    source = FIXTURES / "msmodelslim_w8" / "w8a8_static_anti_m4_bf16"
    base = Location.of(FIXTURES / "compressed_tensors" / "src_llama_fp16")
    assert open_checkpoint(Location.of(source, base=base)).left_out
    assert Blocks.open(open_checkpoint(Location.of(source, base=base)))
    shutil.copytree(source, tmp_path / "out")
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    weights.chmod(0o600)
    tensors = load_file(weights)
    norm = "model.layers.0.input_layernorm"
    save_file({**tensors, f"{norm}.bias": tensors[f"{norm}.bias"] + 1}, weights)
    with pytest.raises(RefusedError, match=rf"{norm}\.bias: .*is not zero: AntiOutlier shifted this norm.*out cannot be run"):
        Blocks.open(open_checkpoint(Location.of(tmp_path / "out", base=base)))
    save_file({**tensors, "model.layers.0.self_attn.o_proj.left_trans": torch.ones(2)}, weights)
    with pytest.raises(RefusedError, match=r"o_proj\.left_trans: is a step of its own at run time"):
        Blocks.open(open_checkpoint(Location.of(tmp_path / "out", base=base)))
    save_file(tensors, weights)
    (description,) = (tmp_path / "out").glob("quant_model_description*.json")
    description.chmod(0o600)
    change_json(description, lambda said: said.update({"model.layers.0.self_attn.o_proj.weight": "W8A8_MXFP8"}))
    with pytest.raises(RefusedError, match=r"o_proj: type W8A8_MXFP8 is not read yet, so out cannot be run"):
        Blocks.open(open_checkpoint(Location.of(tmp_path / "out", base=base)))


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    blocks = Blocks.open(tmp_path / "model")
    with blocks.stage(0):
        pass
    with (
        pytest.raises(UnreadableError, match=r"model: has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight', which this model's code"),
        blocks.stage(1),
    ):
        pass
    with blocks.stage(2) as model:  # nothing of the failed stage is left
        assert [name for name, _ in model.model.layers.named_children()] == ["2"]
    change_json(tmp_path / "model" / "config.json", lambda config: config.update(model_type="no_such_model"))
    with pytest.raises(UnreadableError, match=rf"transformers {transformers.__version__} cannot load it"):
        Blocks.open(tmp_path / "model")


def test_models_that_no_table_knows() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(UsageError, match="model_type is 'gpt2', and only llama"):
        Blocks(model)
    with pytest.raises(UsageError, match=r"model\.layers: is not in this model, as its architecture says it is"):
        Blocks(model, architecture_of(transformers.LlamaConfig()))


def test_arrays_of_every_dtype_become_tensors() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64):
        wanted = torch.arange(6).reshape(2, 3).to(dtype)
        array = wanted.view(torch.int16).numpy().view("V2") if dtype == torch.bfloat16 else wanted.numpy()
        if dtype == torch.bfloat16:
            import ml_dtypes

            array = wanted.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        frozen = copy.deepcopy(array)
        frozen.flags.writeable = False
        assert torch.equal(to_torch(frozen), wanted)
        assert to_torch(np.asarray(array[0, 0])).shape == ()
        assert json.dumps(list(to_torch(array).shape)) == "[2, 3]"

"""TurboMind workspaces: LMDeploy's own, file by file, in both directions; plain decoders of both encodings; what is damaged or unfit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import counted_pwrites, small_tiles
from places import HIDDEN, fails, full, snapshot, stops_after, succeeds
from safetensors.numpy import load_file, save_file

from convert import convert, inspect, verify
from formats import open_checkpoint
from formats.errors import DestinationError, RefusedError, UnreadableError
from formats.ir import Array
from formats.placement import turn

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lmdeploy"
WORKSPACES = FIXTURES
AWQ_010 = FIXTURES / "awq_v010"
AWQ_018 = FIXTURES / "awq_v018"
WEIGHTS = Path("triton_models/weights")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def weights(workspace: Path) -> dict[str, bytes]:
    """The files of the weights folder, with their bytes."""
    return {path.name: path.read_bytes() for path in (workspace / WEIGHTS).iterdir()}


def same_files(ours: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.fixture(params=["numpy", "numba"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What packs and unpacks: the reference, or the kernels."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", request.param)
    return str(request.param)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tp", [1, 2])
def test_awq_becomes_lmdeploy_0_1s_workspace(tmp_path: Path, tp: int) -> None:
    convert(AWQ_010, tmp_path / "out", "turbomind:0.1", tp=tp, model_name="internlm-chat-7b")
    same_files(weights(tmp_path / "out"), weights(WORKSPACES / f"w4_v010_tp{tp}"))
    tokenizer = tmp_path / "out/triton_models/tokenizer"
    golden = WORKSPACES / f"w4_v010_tp{tp}/triton_models/tokenizer"
    same_files(*({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tokenizer, golden)))
    links = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*") if path.is_symlink()}
    assert sorted(links) == [
        "model_repository/postprocessing", "model_repository/preprocessing", "model_repository/turbomind",
        "triton_models/interactive/1/weights", "triton_models/postprocessing/1/tokenizer", "triton_models/preprocessing/1/tokenizer",
    ]  # fmt: skip
    assert (tmp_path / "out/model_repository/turbomind/1/weights/config.ini").is_file()
    assert (tmp_path / "out/model_repository/preprocessing/1/tokenizer/config.json").is_file()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tp", [1, 2])
def test_a_workspace_of_0_1_becomes_the_awq_folder_it_was_made_of(tmp_path: Path, tp: int) -> None:
    convert(WORKSPACES / f"w4_v010_tp{tp}", tmp_path / "awq", "awq")
    found, wanted = load_file(tmp_path / "awq/model.safetensors"), load_file(AWQ_010 / "model.safetensors")
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert np.array_equal(found[name], array.astype(np.float16) if name.endswith(".scales") else array), name
    convert(tmp_path / "awq", tmp_path / "again", "turbomind:0.1", tp=tp, model_name="internlm-chat-7b")
    same_files(weights(tmp_path / "again"), weights(WORKSPACES / f"w4_v010_tp{tp}"))


def test_ranks_are_only_a_way_of_storing(tmp_path: Path) -> None:
    assert verify(WORKSPACES / "w4_v010_tp1", WORKSPACES / "w4_v010_tp2").same
    convert(WORKSPACES / "w4_v010_tp1", tmp_path / "two", "turbomind:0.1", tp=2, model_name="internlm-chat-7b")
    same_files(weights(tmp_path / "two"), weights(WORKSPACES / "w4_v010_tp2"))


def test_a_float_workspace_there_and_back(tmp_path: Path) -> None:
    convert(WORKSPACES / "fp16_v010_tp2", tmp_path / "dense", "dense")
    found = load_file(tmp_path / "dense/model.safetensors")
    digests = json.loads((WORKSPACES / "fp16_v010_tp2_sha256.json").read_text())
    assert {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in found.items()} == digests
    convert(tmp_path / "dense", tmp_path / "out", "turbomind:0.1", tp=2, model_name="internlm-chat-7b")
    same_files(weights(tmp_path / "out"), weights(WORKSPACES / "fp16_v010_tp2"))


def test_the_workspace_of_0_9_there_and_back(tmp_path: Path) -> None:
    golden = WORKSPACES / "w4_v092_tp1"
    convert(golden, tmp_path / "awq", "awq")
    found, wanted = load_file(tmp_path / "awq/model.safetensors"), load_file(AWQ_018 / "model.safetensors")
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []
    convert(AWQ_018, tmp_path / "out", "turbomind:0.9", model_name="llama2")
    ours, theirs = weights(tmp_path / "out"), weights(golden)
    # this golden was served under another name than its chat template's
    theirs["config.yaml"] = theirs["config.yaml"].replace(b"model_name: tiny", b"model_name: llama2")
    same_files(ours, theirs)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (golden / name).read_bytes()


# A model with grouped queries and biases, in words that this file packs itself.

WIDTH, HEADS, KV, INTER, VOCABULARY = 512, 4, 2, 768, 96
SIZES = {
    "self_attn.q_proj": (WIDTH, HEADS * 128), "self_attn.k_proj": (WIDTH, KV * 128), "self_attn.v_proj": (WIDTH, KV * 128),
    "self_attn.o_proj": (HEADS * 128, WIDTH), "mlp.gate_proj": (WIDTH, INTER), "mlp.up_proj": (WIDTH, INTER),
    "mlp.down_proj": (INTER, WIDTH),
}  # fmt: skip


def random_model(biased: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"), group: int = 128) -> dict[str, Any]:
    """{linear: (codes [in, out], zeros [groups, out], scales [groups, out])}, biases and plain tensors of one layer."""
    random = np.random.default_rng(5)
    model: dict[str, Any] = {}
    for name, (in_, out) in SIZES.items():
        codes, zeros = random.integers(0, 16, (in_, out)), random.integers(0, 16, (in_ // group, out))
        model[f"model.layers.0.{name}"] = codes, zeros, random.random((in_ // group, out)).astype(np.float16)
        if name.rpartition(".")[2] in biased:
            model[f"model.layers.0.{name}.bias"] = random.standard_normal(out).astype(np.float16)
    for name in ("model.embed_tokens", "lm_head"):
        model[f"{name}.weight"] = random.standard_normal((VOCABULARY, WIDTH)).astype(np.float16)
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        model[f"{name}.weight"] = random.standard_normal(WIDTH).astype(np.float16)
    return model


def packed(lanes: Array) -> Array:
    """AWQ's words [rows, out / 8] of lanes [rows, out]."""
    grouped = lanes.reshape(lanes.shape[0], -1, 8)[:, :, ORDER].astype(np.uint32)
    return (grouped << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=2, dtype=np.uint32).view(np.int32)


def write_awq(folder: Path, model: dict[str, Any], group: int = 128, kind: str = "qwen2", **config: Any) -> Path:
    tensors: dict[str, Array] = {}
    for name, value in model.items():
        if isinstance(value, tuple):
            tensors |= {f"{name}.qweight": packed(value[0]), f"{name}.qzeros": packed(value[1]), f"{name}.scales": value[2]}
        else:
            tensors[name] = value
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"model_type": kind, "num_attention_heads": HEADS, "num_key_value_heads": KV, "hidden_size": WIDTH, "torch_dtype": "float16"}
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({**said, **config, "quantization_config": quantization}))
    return folder


def in_pairs(array: Array) -> Array:
    """The last axis, heads of 128, from halves to pairs, as the tool has it."""
    heads = array.reshape(*array.shape[:-1], -1, 2, 64)
    return np.ascontiguousarray(heads.swapaxes(-1, -2)).reshape(array.shape)


def fused(model: dict[str, Any], part: int, rank: int, tp: int) -> dict[str, Array]:
    """Codes, zeros or scales of a rank's four matrices, [lines, out], as the engine multiplies with them."""
    q, k, v, o, gate, up, down = (model[f"model.layers.0.{name}"][part] for name in SIZES)
    rows = lambda array: array.reshape(tp, -1, array.shape[1])[rank]  # noqa: E731
    cols = lambda array: array.reshape(array.shape[0], tp, -1)[:, rank]  # noqa: E731
    return {
        "attention.w_qkv": np.concatenate([cols(in_pairs(q)), cols(in_pairs(k)), cols(v)], axis=1),
        "attention.wo": rows(o),
        "feed_forward.w1": cols(gate),
        "feed_forward.w3": cols(up),
        "feed_forward.w13": np.stack([cols(gate), cols(up)], axis=2).reshape(gate.shape[0], -1),
        "feed_forward.w2": rows(down),
    }


def tiles_decoded(words: Array, inputs: int, outputs: int) -> Array:
    """Codes [in, out] out of the words of a file until 0.5, one by one by the formula of the fragment."""
    k, m = np.meshgrid(np.arange(inputs), np.arange(outputs), indexing="ij")
    tile = k // 32 * (outputs // 32) + m // 32
    lane, w = m % 8 * 4 + k % 8 // 2, 2 * (k // 16 % 2) + m // 16 % 2
    nibble = 4 * (k % 2) + 2 * (k // 8 % 2) + m // 8 % 2
    return words[tile * 128 + lane * 4 + w] >> (4 * nibble).astype(np.uint32) & 15


def rows_decoded(words: Array, inputs: int, outputs: int) -> Array:
    """Codes [in, out] out of the words of a file since 0.6."""
    lanes = words.reshape(inputs, outputs // 8, 1) >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    return lanes.reshape(inputs, outputs)


def from_file(folder: Path, name: str, dtype: str) -> Array:
    return np.fromfile(folder / WEIGHTS / f"layers.0.{name}", dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("version", ["0.1", "0.6", "0.9"])
def test_grouped_queries_and_biases(tmp_path: Path, version: str, tp: int) -> None:
    model = random_model()
    out = tmp_path / "out"
    convert(write_awq(tmp_path / "awq", model), out, f"turbomind:{version}", tp=tp)
    for rank in range(tp):
        codes, zeros, scales = (fused(model, part, rank, tp) for part in range(3))
        for name in ("attention.w_qkv", "attention.wo", "feed_forward.w2") + (
            ("feed_forward.w13",) if version == "0.1" else ("feed_forward.w1", "feed_forward.w3")
        ):
            inputs, outputs = codes[name].shape
            words = from_file(out, f"{name}.{rank}.qweight", "<u4")
            assert np.array_equal((tiles_decoded if version == "0.1" else rows_decoded)(words, inputs, outputs), codes[name])
            if version == "0.1":
                pairs = from_file(out, f"{name}.{rank}.scales_zeros", "<f2").reshape(-1, outputs, 2)
                stored = pairs[:, :, 0] - 64, pairs[:, :, 1]
            else:
                stored = tuple(from_file(out, f"{name}.{rank}.{part}", "<f2").reshape(-1, outputs) for part in ("zeros", "scales"))
            assert np.array_equal(stored[0], zeros[name])
            assert np.array_equal(stored[1], scales[name])
        q, k, v = (model[f"model.layers.0.self_attn.{name}.bias"].reshape(tp, -1)[rank] for name in ("q_proj", "k_proj", "v_proj"))
        bias = np.concatenate([in_pairs(q), in_pairs(k), v])
        assert np.array_equal(from_file(out, f"attention.w_qkv.{rank}.bias", "<f2"), bias)
        assert not from_file(out, f"attention.wo.{rank}.bias", "<f2").any()
    assert verify(tmp_path / "awq", out).same
    head, embedding = model["lm_head.weight"], model["model.embed_tokens.weight"]
    if version == "0.1":
        assert np.array_equal(np.fromfile(out / WEIGHTS / "output.weight", "<f2").reshape(head.shape), head)
        return
    parts = [np.fromfile(out / WEIGHTS / f"output.{rank}.weight", "<f2") for rank in range(tp)]
    found = [part.reshape(WIDTH, -1).T if version == "0.9" else part.reshape(-1, WIDTH) for part in parts]
    assert np.array_equal(np.concatenate(found), head)
    parts = [np.fromfile(out / WEIGHTS / f"tok_embeddings.{rank}.weight", "<f2").reshape(VOCABULARY, -1) for rank in range(tp)]
    assert np.array_equal(np.concatenate(parts, axis=1), embedding)


def test_a_vocabulary_is_filled_up_for_the_ranks(tmp_path: Path) -> None:
    model = random_model(())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        model[name] = model[name][:95]
    source = write_awq(tmp_path / "awq", model, kind="llama")
    convert(source, tmp_path / "out", "turbomind:0.1", tp=2)
    stored = np.fromfile(tmp_path / "out" / WEIGHTS / "output.weight", "<f2").reshape(96, WIDTH)
    assert np.array_equal(stored[:95], model["lm_head.weight"])
    assert not stored[95].any()
    assert "vocab_size = 95\n" in (tmp_path / "out" / WEIGHTS / "config.ini").read_text()
    assert verify(source, tmp_path / "out").same


def test_gptq_there_and_back(tmp_path: Path) -> None:
    source = write_awq(tmp_path / "awq", {**random_model(()), **symmetric()}, kind="llama")
    convert(source, tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "workspace", "turbomind:0.9", tp=2)
    convert(tmp_path / "workspace", tmp_path / "again", "gptq")
    assert verify(source, tmp_path / "again").same


def symmetric() -> dict[str, Any]:
    """The linears with zero points of 8."""
    linears = {name: value for name, value in random_model(()).items() if isinstance(value, tuple)}
    return {name: (codes, np.full_like(zeros, 8), scales) for name, (codes, zeros, scales) in linears.items()}


def test_the_bias_that_lmdeploy_makes_up_must_be_zero(tmp_path: Path) -> None:
    folder = copy(tmp_path, "w4_v092_tp1")
    path = folder / WEIGHTS / "layers.0.attention.wo.0.bias"
    path.write_bytes(np.ones(256, "<f2").tobytes())
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.self_attn\.o_proj\.bias"):
        convert(folder, tmp_path / "out", "awq")


def test_biases_of_ranks_that_differ(tmp_path: Path) -> None:
    source = write_awq(tmp_path / "awq", random_model(("q_proj", "k_proj", "v_proj", "o_proj")), kind="internlm")
    out = tmp_path / "out"
    convert(source, out, "turbomind:0.1", tp=2)
    stored = [from_file(out, f"attention.wo.{rank}.bias", "<f2") for rank in range(2)]
    assert np.array_equal(*stored)
    assert stored[0].all()
    (out / WEIGHTS / "layers.0.attention.wo.1.bias").write_bytes((stored[1] * 2).tobytes())
    assert "layers.0.attention.wo.1.bias: differs" in fails(5, "convert", out, tmp_path / "again", "--to", "awq")


def test_scales_of_a_kv_cache_are_a_loss_but_among_workspaces(tmp_path: Path) -> None:
    folder = copy(tmp_path, "w4_v010_tp1")
    values = np.array([0.1, -0.5, 0.2, 0.25], "<f4")
    (folder / WEIGHTS / "layers.1.past_kv_scale.0.weight").write_bytes(values.tobytes())
    fails(3, "convert", folder, tmp_path / "awq", "--to", "awq")
    assert "kv-cache-dropped" in succeeds("convert", folder, tmp_path / "awq", "--to", "awq", "--allow", "kv-cache-dropped")
    convert(folder, tmp_path / "out", "turbomind:0.1", model_name="internlm-chat-7b")
    same_files(weights(tmp_path / "out"), weights(folder))


def copy(tmp_path: Path, name: str) -> Path:
    shutil.copytree(WORKSPACES / name, tmp_path / name)
    return tmp_path / name


def edited(folder: Path, old: str, new: str) -> Path:
    path = next(path for path in (folder / WEIGHTS).iterdir() if path.name in {"config.ini", "config.yaml"})
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder


@pytest.mark.parametrize(
    ("source", "version", "tp", "golden"),
    [
        (AWQ_010, "0.1", 2, "w4_v010_tp2"),
        (AWQ_018, "0.9", 1, "w4_v092_tp1"),
        (WORKSPACES / "fp16_v010_tp2", "0.1", 2, "fp16_v010_tp2"),
    ],
)
def test_halves_of_heads_and_interruptions(tmp_path: Path, source: Path, version: str, tp: int, golden: str) -> None:
    """Tiles of 64 outputs cut every head in two; a disk that is full on the way leaves what the same command finishes."""
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    options: dict[str, Any] = {"tp": tp, "model_name": "internlm-chat-7b" if version == "0.1" else "llama2", "jobs": 1}
    with small_tiles(), counted_pwrites() as count:
        convert(source, tmp_path / "whole", f"turbomind:{version}", **options)
    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", stops_after(count[0] // 2, full(), os.pwrite))
        with pytest.raises(DestinationError, match="the disk is full"):
            convert(source, out, f"turbomind:{version}", **options)
    assert not out.exists()
    assert not (out.parent / HIDDEN / "model" / WEIGHTS / f"config.{'ini' if version == '0.1' else 'yaml'}").exists()
    with small_tiles(), counted_pwrites() as again:
        assert convert(source, out, f"turbomind:{version}", **options).resumed
    assert again[0] < count[0]
    assert snapshot(out) == snapshot(tmp_path / "whole")
    wanted = {name: content for name, content in weights(WORKSPACES / golden).items() if not name.startswith("config.")}
    same_files({name: content for name, content in weights(out).items() if name in wanted or not name.startswith("config.")}, wanted)


def test_a_file_that_is_a_byte_short(tmp_path: Path) -> None:
    folder = copy(tmp_path, "w4_v010_tp2")
    path = folder / WEIGHTS / "layers.1.feed_forward.w13.1.qweight"
    path.write_bytes(path.read_bytes()[:-1])
    said = fails(5, "convert", folder, tmp_path / "out", "--to", "awq")
    assert "layers.1.feed_forward.w13.1.qweight: holds 65535 bytes, wanted 65536" in said
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    folder = copy(tmp_path, "w4_v010_tp1")
    for path in (folder / WEIGHTS).glob("layers.0.*"):
        path.rename(path.with_name(path.name.replace("layers.0.", "layers.7.")))
    assert "layers.0.attention_norm.weight: is not there" in fails(5, "inspect", folder)


def test_more_than_the_configuration_says(tmp_path: Path) -> None:
    said = fails(5, "inspect", edited(copy(tmp_path, "w4_v010_tp2"), "num_layer = 2", "num_layer = 1"))
    assert "layers.1.attention.w_qkv.0.qweight: is no file of a workspace of 1 layers and 2 ranks" in said


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("num_layer = 2", "num_layer = 99999999999", "num_layer"),
        ("num_layer = 2", "num_layer = two", "num_layer"),
        ("num_layer = 2", "num_layer = 4097", "4097 layers"),
        ("head_num = 2\nkv", "head_num = 16777216\nkv", "more than 1048576 inputs"),
        ("tensor_para_size = 2", "tensor_para_size = 3", "3 ranks"),
        ("tensor_para_size = 2", "tensor_para_size = 4", "query heads is 2"),
        ("weight_type = int4", "weight_type = int8", "weight_type"),
        ("inter_size = 512", "inter_size = 384", "feed-forward size"),
        ("[llama]", "[gpt]", "llama"),
        ("[llama]", "llama", "damaged"),
        ("size_per_head = 128", "size_per_head = 24", "whole tiles"),
    ],
)
def test_a_configuration_that_lies(tmp_path: Path, old: str, new: str, word: str) -> None:
    assert word in fails(5, "inspect", edited(copy(tmp_path, "w4_v010_tp2"), old, new))


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("  expert_num: []", "  expert_num:\n  - 8\n  - 8", 3),
        ("  mlp_tp_size: 1", "  mlp_tp_size: 2", 3),
        ("  inter_size:\n  - 512\n  - 512", "  inter_size:\n  - 512", 5),
        ("model_config:", "model_config: !!python/object/apply:os.system [true]\nother:", 5),
        ("model_config:", "&a [*a, *a]", 5),
        ("  head_num: 2", "  head_num: {}", 5),
    ],
)
def test_a_yaml_that_lies(tmp_path: Path, old: str, new: str, code: int) -> None:
    fails(code, "inspect", edited(copy(tmp_path, "w4_v092_tp1"), old, new))


def test_groups_that_lmdeploy_shuffled_wrongly(tmp_path: Path) -> None:
    said = fails(3, "inspect", edited(copy(tmp_path, "w4_v010_tp1"), "group_size = 128", "group_size = 64"))
    assert "group_size is 64" in said
    source = write_awq(tmp_path / "awq", random_model((), 64), 64, "llama")
    assert "group" in fails(3, "convert", source, tmp_path / "out", "--to", "turbomind:0.1")


@pytest.mark.parametrize("name", ["w4_v010_tp1", "w4_v010_tp2", "fp16_v010_tp2", "w4_v092_tp1", "w4_v065", "bf16_v080"])
def test_any_part_of_a_tensor_is_that_part(name: str) -> None:
    """Rectangles, and runs of bytes, beside the whole."""
    checkpoint, random = open_checkpoint(WORKSPACES / name), np.random.default_rng(3)
    for tensor, info in checkpoint.tensors.items():
        stored: Any = checkpoint.tensors.tensor(tensor)
        whole = stored.read()
        if whole.ndim == 2:
            unit = 64 if tensor.endswith(".qweight") and "v010" in name else 1  # words of a tile's part lie together
            unit = 128 if unit > 1 and any(part in tensor for part in ("v_proj", "o_proj", "down_proj")) else unit
            for _ in range(4):
                (top, bottom), (left, right) = (
                    np.sort(random.integers(0, size + 1, 2)) for size in (whole.shape[0], whole.shape[1] // unit)
                )
                cut = slice(top, bottom), slice(left * unit, right * unit)
                assert np.array_equal(stored.read(*cut), whole[cut]), (tensor, cut)
        begin, end = np.sort(random.integers(0, info.nbytes // 4096 + 1, 2)) * 4096 if info.nbytes > 4096 else (0, info.nbytes)
        assert stored.file.read(info.begin + int(begin), int(end - begin)) == whole.tobytes()[begin:end], tensor


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (127, 129), (300, 256), (5, 400)])
def test_a_matrix_is_turned_whatever_its_size(rows: int, cols: int) -> None:
    """Between arrays that are parts of larger ones, of which the rest stays."""
    source = np.arange(cols * (rows + 3), dtype=np.uint16).reshape(cols, rows + 3)[:, 1:-2].T
    around = np.zeros((rows, 2 * cols), np.uint16)
    turn(around[:, ::2], source)
    assert np.array_equal(around[:, ::2], source)
    assert not around[:, 1::2].any()


def test_a_base_model_says_what_the_workspace_does_not(tmp_path: Path) -> None:
    golden = WORKSPACES / "w4_v092_tp1"
    shutil.copytree(golden / WEIGHTS, tmp_path / "weights")
    assert "no config.json" in str(inspect(tmp_path / "weights").findings)
    convert(tmp_path / "weights", tmp_path / "out", "awq", base_model=AWQ_018)
    found, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(AWQ_018 / "model.safetensors")
    assert sorted(found) == sorted(wanted)


def test_a_zero_point_that_is_none(tmp_path: Path) -> None:
    folder = copy(tmp_path, "w4_v010_tp1")
    path = folder / WEIGHTS / "layers.0.attention.wo.0.scales_zeros"
    stored = np.fromfile(path, "<f2")
    stored[0] = 80
    path.write_bytes(stored.tobytes())
    with pytest.raises(
        UnreadableError, match=r"model\.layers\.0\.self_attn\.o_proj\.zeros: holds the zero point 80\.0, wanted integers from 64 to 79"
    ):
        convert(folder, tmp_path / "out", "awq")


@pytest.mark.parametrize(
    ("model", "kind", "tp", "words"),
    [
        (random_model(()), "llama", 3, "3 ranks"),
        (random_model(()), "llama", 4, "key heads is 2"),
        (random_model(()), "gpt_neox", 1, "gpt_neox"),
        ({name: value for name, value in random_model(()).items() if name != "lm_head.weight"}, "llama", 1, "lm_head.weight"),
        ({**random_model(()), "model.layers.0.extra.weight": np.zeros(4, np.float16)}, "llama", 1, "model.layers.0.extra.weight"),
        ({**random_model(()), "model.norm.weight": np.zeros(WIDTH, np.float32)}, "llama", 1, "model.norm.weight"),
        ({**random_model(()), "model.layers.0.mlp.up_proj.bias": np.zeros(INTER, np.float16)}, "llama", 1, "up_proj.bias"),
    ],
)
def test_what_a_workspace_cannot_hold(tmp_path: Path, model: dict[str, Any], kind: str, tp: int, words: str) -> None:
    source = write_awq(tmp_path / "awq", model, kind=kind)
    assert words in fails(3, "convert", source, tmp_path / "out", "--to", "turbomind:0.1", "--tp", str(tp))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq"]


def test_frequencies_of_the_rotary_embedding_are_left_out(tmp_path: Path) -> None:
    """Checkpoints of InternLM and of old Llamas hold them."""
    model = random_model(("q_proj", "k_proj", "v_proj", "o_proj"))
    source = write_awq(
        tmp_path / "awq", {**model, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(64, np.float32)}, kind="internlm"
    )
    result = convert(source, tmp_path / "out", "turbomind:0.1")
    assert "1 tensors are not carried: turbomind's engine computes them itself" in result.plan.notes
    write_awq(tmp_path / "without", model, kind="internlm")
    assert verify(tmp_path / "without", tmp_path / "out").same
    assert "model_name = internlm-chat-7b\n" in (tmp_path / "out" / WEIGHTS / "config.ini").read_text()


def test_a_tokenizer_that_is_a_link_out_of_the_workspace(tmp_path: Path) -> None:
    folder = copy(tmp_path, "w4_v010_tp1")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "triton_models/tokenizer/tokenizer.json").symlink_to(tmp_path / "secret.json")
    for target in ("awq", "turbomind:0.1"):
        assert "tokenizer.json: is a link to a file outside the folder" in fails(5, "convert", folder, tmp_path / "out", "--to", target)
    (folder / "triton_models/tokenizer/tokenizer.json").rename(folder / "triton_models/tokenizer/other.json")
    assert "other.json: is a link" in fails(5, "convert", folder, tmp_path / "out", "--to", "turbomind:0.1")
    assert not (tmp_path / "out").exists()


def test_options_that_say_nothing_elsewhere(tmp_path: Path) -> None:
    fails(2, "convert", AWQ_018, tmp_path / "out", "--to", "awq", "--tp", "2")
    fails(2, "convert", AWQ_018, tmp_path / "out", "--to", "awq", "--model-name", "llama2")
    fails(2, "convert", AWQ_018, tmp_path / "out", "--to", "turbomind", "--model-name", "llama2\nquant_policy = 4")


def test_a_weight_file_that_is_none(tmp_path: Path) -> None:
    folder = copy(tmp_path, "w4_v010_tp1")
    path = folder / WEIGHTS / "norm.weight"
    path.unlink()
    path.mkdir()
    assert "norm.weight: is no regular file" in fails(5, "inspect", folder)


def test_every_way_to_name_a_workspace(tmp_path: Path) -> None:
    convert(AWQ_010, tmp_path / "out", "turbomind:0.1", model_name="internlm-chat-7b")
    places = ("", "triton_models", WEIGHTS, "triton_models/interactive/1/weights")
    for place in places:
        found = open_checkpoint(tmp_path / "out" / place)
        assert (found.format, found.variant, found.model_type) == ("turbomind", "0.1", "llama")


def test_overwrite_replaces_a_workspace_and_no_other_folder(tmp_path: Path) -> None:
    convert(AWQ_010, tmp_path / "out", "turbomind:0.1")
    convert(AWQ_010, tmp_path / "out", "turbomind:0.1", tp=2, overwrite=True)
    assert open_checkpoint(tmp_path / "out").tensors.nbytes
    (tmp_path / "out" / WEIGHTS / "thesis.txt").write_text("mine")
    fails(1, "convert", AWQ_010, tmp_path / "out", "--to", "turbomind", "--overwrite")

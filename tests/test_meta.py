"""Llama as Meta publishes it: permuted and in parts, read as Hugging Face has it; and the zips that torch saves, read without torch."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES
from places import fails, succeeds
from safetensors.numpy import load_file

from convert import convert, fingerprint, inspect, verify
from formats import open_checkpoint
from formats.errors import UnreadableError
from formats.ir import Array
from formats.mindspore_file import MindSporeFile
from formats.torch_zip import TorchZipFile

META = FIXTURES / "meta"
DIM, HEADS, KEY_HEADS, SIZE, EPS = 64, 4, 2, 16, 1e-5


@pytest.fixture(scope="module")
def expected() -> dict[str, Array]:
    with np.load(META / "expected.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    shutil.copytree(META / "two", tmp_path / "two")
    return tmp_path / "two"


def values(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder, as float32."""
    checkpoint = open_checkpoint(folder)
    return {name: np.asarray(checkpoint.plain(name).data.read()).astype(np.float32) for name in checkpoint.plain_names}  # type: ignore[union-attr]


def rotary(x: Array) -> Array:
    """transformers' ``apply_rotary_pos_emb`` of [length, heads, size]: the halves of a head are turned."""
    angles = np.arange(len(x))[:, None] / 10000.0 ** (np.arange(0, SIZE, 2) / SIZE)
    cos, sin = (np.tile(part(angles), 2)[:, None].astype(np.float32) for part in (np.cos, np.sin))
    half = SIZE // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def llama(weights: dict[str, Array], tokens: Array) -> Array:
    """transformers' Llama in NumPy: logits [length, vocabulary]."""
    h, length = weights["model.embed_tokens.weight"][tokens], len(tokens)
    mask = np.triu(np.full((length, length), -np.inf, np.float32), 1)
    for layer in range(2):
        block = {name.split(".", 3)[3]: value for name, value in weights.items() if name.startswith(f"model.layers.{layer}.")}
        x = norm(h, block["input_layernorm.weight"])
        q, k, v = (x @ block[f"self_attn.{part}_proj.weight"].T for part in "qkv")
        q, k = rotary(q.reshape(length, HEADS, SIZE)), rotary(k.reshape(length, KEY_HEADS, SIZE))
        k, v = (part.reshape(length, KEY_HEADS, SIZE).repeat(HEADS // KEY_HEADS, 1) for part in (k, v))
        scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / SIZE**0.5 + mask)
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(length, -1)
        h = h + mixed @ block["self_attn.o_proj.weight"].T
        x = norm(h, block["post_attention_layernorm.weight"])
        gate, up = (x @ block[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        h = h + (gate / (1 + np.exp(-gate)) * up) @ block["mlp.down_proj.weight"].T
    return norm(h, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("folder", ["one", "two"])
def test_transformers_llama_computes_with_them_what_metas_does(folder: str, expected: dict[str, Array]) -> None:
    """The permutation is what makes one convention of rotary embeddings of the other."""
    np.testing.assert_allclose(llama(values(META / folder), expected["tokens"]), expected["logits"], rtol=2e-4, atol=2e-4)
    wrong = values(META / folder)
    wrong["model.layers.0.self_attn.q_proj.weight"] = expected["wq"]
    assert np.abs(llama(wrong, expected["tokens"]) - expected["logits"]).max() > 0.1


def test_the_rows_of_q_are_permuted_as_transformers_own_script_does(expected: dict[str, Array]) -> None:
    """``w.view(n_heads, d // 2, 2, dim).transpose(1, 2).reshape(dim, dim)`` of convert_llama_weights_to_hf.py."""
    wanted = expected["wq"].reshape(HEADS, SIZE // 2, 2, DIM).swapaxes(1, 2).reshape(DIM, DIM)
    for folder in ("one", "two"):
        checkpoint = open_checkpoint(META / folder)
        found = checkpoint.tensors.tensor("model.layers.0.self_attn.q_proj.weight")
        np.testing.assert_array_equal(np.asarray(found.read()).astype(np.float32), wanted)  # type: ignore[union-attr]
        cut = np.asarray(found.read(slice(5, 41), slice(10, 33))).astype(np.float32)  # type: ignore[union-attr]
        np.testing.assert_array_equal(cut, wanted[5:41, 10:33])


def test_an_embedding_that_is_split_by_the_vocabulary_is_joined_so() -> None:
    whole, parts = values(META / "one"), values(META / "vocabulary")
    assert len(parts) == 12
    for name, value in parts.items():
        np.testing.assert_array_equal(value, whole[name])


def test_they_become_a_checkpoint_of_mindformers_and_a_dense_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = {
        "model_type": "llama", "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
        "intermediate_size": 96, "vocab_size": 80, "rms_norm_eps": EPS, "max_position_embeddings": 256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    said = succeeds("convert", META / "two", tmp_path / "ms", "--to", "mindspore", "--base-model", base)
    assert "proved exact" in said
    assert (tmp_path / "ms" / "predict_base.yaml").is_file()
    wanted = values(META / "one")
    (path,) = (tmp_path / "ms" / "rank_0").iterdir()
    file = MindSporeFile(path)
    np.testing.assert_array_equal(
        file.array("model.layers.1.attention.wk.weight").astype(np.float32), wanted["model.layers.1.self_attn.k_proj.weight"]
    )
    result = convert(META / "two", tmp_path / "hf", "dense", base_model=base)
    assert result.exact
    assert fingerprint(tmp_path / "hf").digest == fingerprint(tmp_path / "ms").digest == fingerprint(META / "one").digest
    assert verify(META / "two", tmp_path / "hf").same
    for name, value in load_file(tmp_path / "hf" / "model.safetensors").items():
        np.testing.assert_array_equal(value.astype(np.float32), wanted[name])
    assert inspect(META / "two").to_json()["format"] == "dense:meta"
    said = succeeds("convert", META / "two", tmp_path / "bare", "--to", "mindspore")
    assert "missing: predict_two.yaml: pass --base-model" in said


def change(params: Path, **new: Any) -> None:
    params.write_text(json.dumps({**json.loads(params.read_text()), **new}))


def test_parts_that_do_not_fit_are_one_sentence(parts: Path) -> None:
    for new, wanted in (
        ({"n_heads": None}, "params.json: n_heads is None, wanted a positive whole number"),
        ({"n_heads": 8}, "and params.json says 2 heads of 8 and dim 64"),
        ({"n_heads": 3}, "params.json: 3 heads do not divide dim 64 into pairs"),
        ({"dim": 1 << 70}, "wanted a positive whole number"),
    ):
        original = (parts / "params.json").read_text()
        change(parts / "params.json", **new)
        assert wanted in fails(5, "inspect", parts)
        (parts / "params.json").write_text(original)
    (parts / "consolidated.01.pth").rename(parts / "consolidated.02.pth")
    assert "two: consolidated.01.pth is missing, and consolidated.02.pth is there" in fails(5, "inspect", parts)
    (parts / "consolidated.02.pth").unlink()
    assert "says 4 heads of 16 and dim 64" in fails(5, "inspect", parts)  # one part of two
    shutil.copy(META / "one" / "consolidated.00.pth", parts / "consolidated.01.pth")
    assert "a part is of another model" in fails(5, "inspect", parts)


class Payload:
    """What a hostile pickle would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def rewritten(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **records: bytes | None) -> None:
    """The zip with other contents of some records, by name; None: without."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            content = records.get(name.replace(".", "_").replace("/", "_"), old.read(info))
            if content is not None:
                new.writestr(info.filename, content)


def test_a_pickle_with_a_payload_is_refused_and_not_run(parts: Path, tmp_path: Path) -> None:
    mark, part = tmp_path / "ran", parts / "consolidated.00.pth"
    payload = pickle.dumps({"norm.weight": Payload(mark)}, 2)
    rewritten(META / "two" / part.name, part, data_pkl=payload)
    said = fails(5, "convert", parts, tmp_path / "out", "--to", "mindspore")
    assert "consolidated.00.pth: the pickle at byte" in said
    assert "which tensors do not need; nothing was run" in said
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()  # it would have


def test_damaged_zips_are_one_sentence(parts: Path) -> None:
    part, source = parts / "consolidated.00.pth", META / "two" / "consolidated.00.pth"

    def said() -> str:
        with pytest.raises(UnreadableError, match=r"^consolidated\.00\.pth: ") as caught:
            TorchZipFile(part)
        return str(caught.value)

    rewritten(source, part, zipfile.ZIP_DEFLATED)
    assert "is compressed or encrypted, which torch.save never does" in said()
    rewritten(source, part, byteorder=b"big")
    assert "was saved on a big-endian machine" in said()
    rewritten(source, part, data_0=b"")
    assert "has 0 bytes, wanted" in said()
    rewritten(source, part, data_0=None)
    assert "is not there, wanted" in said()
    rewritten(source, part, data_pkl=pickle.dumps([1, 2], 2))
    assert "holds a list, wanted a dictionary of tensors" in said()
    rewritten(source, part, data_pkl=pickle.dumps({"w": 3}, 2))
    assert "'w' is a int, wanted a torch tensor" in said()
    rewritten(source, part, data_pkl=None)
    assert "is a zip without one data.pkl" in said()
    for content in (b"", b"PK\x03\x04 not a zip", source.read_bytes()[:-100], source.read_bytes()[:5000]):
        part.write_bytes(content)
        assert "is no zip as torch.save writes" in said()


@pytest.mark.parametrize("seed", range(150))
def test_a_wrong_byte_in_what_says_where_things_lie_is_read_or_refused(seed: int, parts: Path) -> None:
    """In the pickle and in the zip's list of records."""
    data = bytearray((META / "two" / "consolidated.00.pth").read_bytes())
    random = np.random.default_rng(seed)
    place = random.integers(0, 8000) if seed % 2 else len(data) - random.integers(1, 3000)
    data[place] ^= int(random.integers(1, 256))
    (parts / "consolidated.00.pth").write_bytes(bytes(data))
    with contextlib.suppress(UnreadableError):
        checkpoint = open_checkpoint(parts)
        for name in checkpoint.plain_names:
            assert checkpoint.plain(name).data.shape == checkpoint.tensors[name].shape


def test_a_list_of_records_that_no_model_needs_is_not_held(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from formats import torch_zip

    monkeypatch.setattr(torch_zip, "MAX_DIRECTORY", 100)
    with pytest.raises(UnreadableError, match="more than a model can need"):
        TorchZipFile(parts / "consolidated.00.pth")

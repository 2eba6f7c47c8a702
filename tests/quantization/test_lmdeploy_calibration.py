"""Statistics as LMDeploy's ``lite calibrate`` writes them: against its own files, and against the whole model watched plainly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from convert import kv_qparams
from convert.cli import app
from formats.errors import UnreadableError, UsageError
from formats.lmdeploy_statistics import FILES, MOMENTS, RANGES, find_statistics, read_statistics
from quantize.blocks import Blocks
from quantize.lmdeploy_calibration import calibrate, observe
from quantize.lmdeploy_text import windows_of

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lmdeploy"
LLAMA, QWEN = FIXTURES / "llama_mha", FIXTURES / "qwen2_gqa"


@pytest.fixture(scope="module")
def ids() -> list[Tensor]:
    """The 8 samples of 64 ids that the tool was given."""
    return list(torch.load(FIXTURES / "statistics_v010" / "calib_ids.pt", weights_only=True).split(1))


@pytest.fixture(scope="module")
def work(ids: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written of the model that the tool calibrated."""
    return calibrate(LLAMA, ids, work_dir=tmp_path_factory.mktemp("calibrated") / "made" / "here").folder


def load(folder: Path, name: str) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / f"{name}.pth", weights_only=True)


@pytest.mark.parametrize("name", FILES)
def test_files_are_the_tools_in_names_order_shapes_and_dtypes(work: Path, name: str) -> None:
    made, told = load(work, name), load(FIXTURES / "statistics_v010", name)
    assert {kind: list(by_name) for kind, by_name in made.items()} == {kind: list(by_name) for kind, by_name in told.items()}
    for kind, by_name in told.items():
        assert all((made[kind][one].shape, made[kind][one].dtype) == (tensor.shape, tensor.dtype) for one, tensor in by_name.items())


BEFORE_ATTENTION = ("", ".input_layernorm", ".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj")


@pytest.mark.parametrize("name", FILES)
def test_numbers_are_the_tools(work: Path, name: str) -> None:
    """Equal up to the first attention; after it float16 matrix products of other processors and transformers differ in the last bits."""
    made, told = load(work, name), load(FIXTURES / "statistics_v010", name)
    for kind in (*RANGES, *(("mean", "absmean") if "mean" in told else ())):
        for one, tensor in told[kind].items():
            if one.removeprefix("model.layers.0") in BEFORE_ATTENTION and kind in RANGES:
                assert torch.equal(made[kind][one], tensor), (kind, one)
            assert (made[kind][one] - tensor).abs().max() <= 0.004 * told["absmax"][one].max(), (kind, one)


class Plain:
    """Observers as the tool has them, of a whole model in memory whose layers are given one sample of the batch at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
        self.model.config.use_cache = False
        self.seen: dict[str, dict[str, dict[str, Tensor]]] = {"inputs_stats": {}, "outputs_stats": {}}
        self.calls: dict[tuple[str, str], int] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and "layers" in name:
                module.register_forward_pre_hook(self.hook("inputs_stats", name))
            if (isinstance(module, nn.Linear) and "layers" in name) or "RMSNorm" in type(module).__name__:
                module.register_forward_hook(self.hook("outputs_stats", name))
        for layer in self.model.model.layers:
            layer.forward = self.split(layer.forward)

    def hook(self, file: str, name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any = None) -> None:
            values = (inputs[0] if output is None else output).flatten(0, 1)
            now = {"max": values.amax(0), "min": values.amin(0), "absmax": values.abs().amax(0)}
            means = {"mean": values.mean(0), "absmean": values.abs().mean(0)}
            count = self.calls.get((file, name), 0)
            if count:
                before = self.seen[file][name]
                now = {
                    "max": torch.maximum(before["max"], now["max"]),
                    "min": torch.minimum(before["min"], now["min"]),
                    "absmax": torch.maximum(before["absmax"], now["absmax"]),
                }
                means = {kind: (before[kind] * count + mean) / (count + 1) for kind, mean in means.items()}
            self.seen[file][name] = now | means
            self.calls[(file, name)] = count + 1

        return see

    @staticmethod
    def split(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def each(hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            masks = [attention_mask] * len(hidden) if attention_mask is None or len(attention_mask) == 1 else attention_mask.split(1)
            return torch.cat([forward(one, attention_mask=mask, **kwargs) for one, mask in zip(hidden.split(1), masks, strict=True)])

        return each


@pytest.mark.parametrize("model", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_layer_by_layer_is_the_whole_model_bit_for_bit(model: Path, ids: list[Tensor]) -> None:
    plain = Plain(model)
    with torch.no_grad():
        plain.model.model(torch.cat(ids))
    found = observe(Blocks.open(model, torch.float16), ids).files()
    for file, by_name in plain.seen.items():
        assert set(by_name) == set(found[file]["max"])
        for name, kinds in by_name.items():
            for kind, tensor in kinds.items():
                assert torch.equal(found[file][kind][name], tensor), (file, name, kind)


def test_keys_are_watched_after_rotary_embedding(ids: list[Tensor]) -> None:
    """Of grouped heads, in the first layer: projected, rotated by hand in the model's dtype, not repeated."""
    config = transformers.AutoConfig.from_pretrained(QWEN)
    model = transformers.AutoModelForCausalLM.from_pretrained(QWEN, dtype=torch.float16).eval()
    layer, keys, values = model.model.layers[0], [], []
    frequency = config.rope_theta ** (-torch.arange(0, 128, 2).float() / 128)
    angles = torch.outer(torch.arange(64).float(), frequency)
    cosine, sine = angles.cos().repeat(1, 2).half(), angles.sin().repeat(1, 2).half()
    with torch.no_grad():
        for sample in ids:
            normed = layer.input_layernorm(model.model.embed_tokens(sample))
            key = layer.self_attn.k_proj(normed)[0]
            turned = torch.cat([-key[:, 64:], key[:, :64]], 1)
            keys.append(key * cosine + turned * sine)
            values.append(layer.self_attn.v_proj(normed)[0])
    found = observe(Blocks.open(QWEN, torch.float16), ids).files()
    for file, own in (("key_stats", torch.cat(keys)), ("value_stats", torch.cat(values))):
        assert torch.equal(found[file]["max"]["model.layers.0"], own.amax(0)[None])
        assert torch.equal(found[file]["min"]["model.layers.0"], own.amin(0)[None])
        assert torch.equal(found[file]["absmax"]["model.layers.0"], own.abs().amax(0)[None])


@pytest.mark.parametrize("name", FILES)
def test_twins_hold_the_same_and_need_no_torch(work: Path, name: str) -> None:
    kinds = MOMENTS if name in {"inputs_stats", "outputs_stats"} else RANGES
    made = load(work, name)
    for found in (read_statistics(work / f"{name}.safetensors", kinds), read_statistics(find_statistics(work, name), kinds)):
        assert {kind: list(by_name) for kind, by_name in found.items()} == {kind: list(made[kind]) for kind in kinds}
        assert all(torch.equal(torch.from_numpy(array), made[kind][one]) for kind in kinds for one, array in found[kind].items())


def test_scales_follow(work: Path, tmp_path: Path) -> None:
    """From calibration to the engine's files, whose first layer is the tool's."""
    kv_qparams(work, tmp_path)
    name = "layers.0.past_kv_scale.0.weight"
    assert (tmp_path / name).read_bytes() == (FIXTURES / "kv_asym_tp1" / name).read_bytes()


def test_overflow_in_float16_is_an_error_and_nothing_is_written(ids: list[Tensor], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data *= 30000
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnreadableError, match=r"model\.layers\.1\.mlp.*is NaN or infinite"):
        calibrate(tmp_path / "model", ids, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_samples_must_be_of_one_length(ids: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[1, tokens\] of one length was wanted"):
        calibrate(LLAMA, [ids[0], ids[1][:, :10]], work_dir=tmp_path / "work")


def test_the_command_takes_text(source: Path, calib: Path, tmp_path: Path) -> None:
    options = ["--calib", calib, "--samples", "4", "--seqlen", "32", "--work-dir", tmp_path / "work"]
    result = CliRunner().invoke(app, ["lmdeploy", "calibrate", str(source), *map(str, options)])
    assert result.exit_code == 0, result.output
    assert "6 layers, 4 samples of 32 tokens" in result.stdout
    wanted = {f"{name}.{end}" for name in FILES for end in ("pth", "safetensors")}
    assert {path.name for path in (tmp_path / "work").iterdir()} == wanted


# -- text


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(one) for one in text]}


def text_of(window: Tensor) -> str:
    return "".join(map(chr, window[0].tolist()))


def test_windows_are_of_all_texts_joined(tmp_path: Path) -> None:
    """random.Random(0).randint(0, 5) begins 3, 3, 0: windows of 4 in 9 characters."""
    (tmp_path / "texts.jsonl").write_text('{"text": "abc"}\n{"text": "defg"}\n')
    found, notes = windows_of(tmp_path / "texts.jsonl", Letters(), 3, 4)
    assert [text_of(one) for one in found] == ["\n\nde", "\n\nde", "abc\n"]
    assert "overlap" in notes[0]


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(UsageError, match="has 3 tokens, and one sample is 4"):
        windows_of(tmp_path / "short.txt", Letters(), 1, 4)
    with pytest.raises(UsageError, match="nor is it one of c4, wikitext2"):
        windows_of(tmp_path / "none.txt", Letters(), 1, 4)


class Rows(list[dict[str, str]]):
    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def shuffle(self, seed: int) -> Rows:
        return Rows(reversed(self))


def test_data_sets_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a stand-in for the hub: c4 skips what is too short, pileval what is too long, wikitext2 joins."""
    rows = Rows([{"text": "ab"}, {"text": "cdefgh"}, {"text": "x" * 600}, {"text": " ijkl "}])
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: str, **options: Any) -> Rows:
        asked.append((*args, options["split"]))
        return rows

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    of_c4 = [text_of(one) for one in windows_of("c4", Letters(), 5, 5)[0]]
    assert all(one in {"cdefg", "defgh", "xxxxx", " ijkl", "ijkl "} for one in of_c4)
    found, notes = windows_of("pileval", Letters(), 4, 4)
    assert [text_of(one) for one in found] == ["ijkl", "cdef", "ghab"]
    assert notes == ["pileval: has 3 windows of 4 tokens, not 4"]
    assert len(windows_of("wikitext2", Letters(), 2, 300)[0]) == 2
    assert asked == [
        ("allenai/c4", "en", "train"),
        ("mit-han-lab/pile-val-backup", "validation"),
        ("wikitext", "wikitext-2-raw-v1", "train"),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        windows_of("c4", Letters(), 1, 4)

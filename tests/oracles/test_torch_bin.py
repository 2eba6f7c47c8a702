"""pytorch_model.bin folders and Meta's .pth files, written by the real torch: read like their safetensors twins, and never run.

``make oracles`` runs these with an interpreter that has torch beside Weighbridge.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import convert, inspect, verify
from convert.mending import doctor
from formats.errors import UnreadableError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "awq_gptq"
CASES = ("awq_gemm_g128_zp", "gptq_v1_4b_g128_sym", "gptqmodel_v2_3b_g128")

pytestmark = pytest.mark.oracle


@pytest.fixture(name="torch")
def torch_module() -> Any:
    try:
        import torch
    except ImportError:
        message = "torch is not installed here: `make oracles` runs this test in an environment that has it"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return torch


def bin_folder(case: str, folder: Path, save: Callable[[dict[str, Any], Path], None], shards: int = 1) -> Path:
    """The fixture with its weights as torch saves them."""
    from safetensors.torch import load_file

    folder.mkdir()
    (weights,) = (FIXTURES / case).glob("*.safetensors")
    tensors = load_file(weights)
    for path in (FIXTURES / case).glob("*config.json"):
        shutil.copyfile(path, folder / path.name)
    if shards == 1:
        save(tensors, folder / "pytorch_model.bin")
        return folder
    names = sorted(tensors)
    parts = {f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin": names[n::shards] for n in range(shards)}
    for name, part in parts.items():
        save({key: tensors[key] for key in part}, folder / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("zipped", "shards"), [(True, 1), (True, 3), (False, 1)])
def test_a_bin_folder_holds_the_weights_of_its_safetensors_twin(case: str, zipped: bool, shards: int, torch: Any, tmp_path: Path) -> None:
    def save(tensors: dict[str, Any], path: Path) -> None:
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)

    source = bin_folder(case, tmp_path / "source", save, shards)
    verdict = verify(FIXTURES / case, source)
    assert verdict.same
    assert verdict.left.digest == verdict.right.digest
    assert inspect(source).layers == inspect(FIXTURES / case).layers
    result = convert(source, tmp_path / "out", "gptq", scale_dtype="keep")
    assert result.exact


def test_bfloat16_tensors_keep_their_bits(torch: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    weight = torch.randn(8, 16).to(torch.bfloat16)
    torch.save({"model.layers.0.mlp.down_proj.weight": weight}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    from formats import open_checkpoint

    found = open_checkpoint(folder).plain("model.layers.0.mlp.down_proj.weight")
    assert found.dtype == "BF16"
    assert found.data.read().tobytes() == weight.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("kind", ["state_dict", "transposed", "shared", "parameters"])
def test_what_torch_saves_is_read_as_torch_loads_it(kind: str, torch: Any, tmp_path: Path) -> None:
    """Views, strides, storages that two tensors share, an OrderedDict with metadata, scalars and tensors of nothing."""
    from formats.torch_zip import TorchZipFile

    whole = torch.arange(60, dtype=torch.float32).view(6, 10)
    saved = {
        "state_dict": torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3)).state_dict(),
        "transposed": {"t": whole.t(), "row": whole[3], "spread": torch.ones(1, 4).expand(7, 4), "every other": whole[::2, 1::3]},
        "shared": {"a": whole, "b": whole[2:], "nothing": torch.empty(0, 4), "scalar": torch.tensor(7), "bool": whole > 30},
        "parameters": {"p": torch.nn.Parameter(whole.half()), "i": whole.char(), "d": whole.double(), "b": whole.bfloat16()},
    }[kind]
    torch.save(saved, tmp_path / "w.pth")
    file = TorchZipFile(tmp_path / "w.pth")
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(file.tensors) == list(loaded)
    for name, value in loaded.items():
        found = file.tensor(name)
        array = found if isinstance(found, np.ndarray) else found.read()
        assert array.shape == tuple(value.shape)
        wanted = value.detach().contiguous()
        assert array.tobytes() == (wanted.view(torch.int16) if value.dtype == torch.bfloat16 else wanted).numpy().tobytes(), name


def test_metas_weights_are_permuted_as_torch_permutes_them(torch: Any, tmp_path: Path) -> None:
    """What transformers' convert_llama_weights_to_hf.py does to each part, by the real torch."""
    import make_meta_goldens as meta

    from formats import open_checkpoint

    model = meta.weights()
    meta.write(tmp_path / "parts", model, 2)
    checkpoint = open_checkpoint(tmp_path / "parts")
    for name, heads in (("q", meta.HEADS), ("k", meta.KEY_HEADS)):
        stored = model[f"layers.1.attention.w{name}.weight"]
        wanted = stored.view(heads, meta.SIZE // 2, 2, meta.DIM).transpose(1, 2).reshape(-1, meta.DIM).contiguous()
        found = checkpoint.tensors.tensor(f"model.layers.1.self_attn.{name}_proj.weight").read()
        assert found.tobytes() == wanted.view(torch.int16).numpy().tobytes()


class Payload:
    """What a hostile pickle would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_payload_is_refused_and_not_run(zipped: bool, torch: Any, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def save(tensors: dict[str, Any], path: Path) -> None:
        torch.save({**tensors, "extra": Payload(mark)}, path, _use_new_zipfile_serialization=zipped)

    source = bin_folder(CASES[0], tmp_path / "source", save)
    wanted = "which tensors do not need; nothing was run" if zipped else "is damaged, or holds more than tensors"
    with pytest.raises(UnreadableError, match=rf"pytorch_model\.bin: .*{wanted}"):
        convert(source, tmp_path / "out", "gptq")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04\x95"])
def test_a_damaged_file_is_one_sentence(content: bytes, torch: Any, tmp_path: Path) -> None:
    source = bin_folder(CASES[0], tmp_path / "source", torch.save)
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UnreadableError, match=r"^pytorch_model\.bin: "):
        convert(source, tmp_path / "out", "gptq")


def test_a_list_of_tensors_is_no_checkpoint(torch: Any, tmp_path: Path) -> None:
    source = bin_folder(CASES[0], tmp_path / "source", lambda tensors, path: torch.save(list(tensors.values()), path))
    with pytest.raises(UnreadableError, match="wanted a dictionary of tensors"):
        convert(source, tmp_path / "out", "gptq")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_as_lmdeploy_0_1_left_it_is_read_and_mended(shards: int, torch: Any, tmp_path: Path) -> None:
    """Pickled, with float32 scales and no quantization config: the weights of its safetensors twin, byte for byte."""
    twin = FIXTURES.parent / "lmdeploy" / "awq_v010"
    source = bin_folder("../lmdeploy/awq_v010", tmp_path / "source", torch.save, shards)
    assert verify(twin, source).same
    found = doctor(source)
    assert {"pickled", "config-missing"} <= {ailment.code for ailment in found.ailments}
    assert doctor(source, tmp_path / "mended").healthy
    assert not list((tmp_path / "mended").glob("*.bin*"))
    config = json.loads((tmp_path / "mended/config.json").read_text("utf-8"))["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"], config["group_size"]) == ("awq", "gemm", 4, 128)
    assert verify(twin, tmp_path / "mended").left.digest == verify(twin, tmp_path / "mended").right.digest

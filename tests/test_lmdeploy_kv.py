"""Scales of TurboMind's KV cache, against the files and lines of LMDeploy 0.1.0, and quant_policy in config.ini."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from convert import kv_qparams, quant_policy
from convert.cli import app
from convert.lmdeploy_kv import kv_parameters
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.lmdeploy_statistics import FILES, MOMENTS, RANGES, Statistics, find_statistics, read_statistics, twin_tensors

FIXTURES = Path(__file__).parent.parent / "fixtures" / "lmdeploy"
STATISTICS = FIXTURES / "statistics_v010"
CONFIG = """[llama]
model_name = internlm-chat-7b
tensor_para_size = 1
num_layer = 2
session_len = 2056
use_context_fmha = 1
quant_policy = 0
use_logn_attn = 0

"""


def kinds_of(name: str) -> tuple[str, ...]:
    return RANGES if name in {"key_stats", "value_stats"} else MOMENTS


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["asym", "sym"])
def test_files_and_lines_are_those_of_the_tool(tmp_path: Path, kind: str, tp: int) -> None:
    """All files byte for byte, none more or less, and what is printed to the letter."""
    told = FIXTURES / f"kv_{kind}_tp{tp}"
    options = [
        "--work-dir",
        str(STATISTICS),
        "--turbomind-dir",
        str(tmp_path),
        "--num-tp",
        str(tp),
        *(["--kv-sym"] if kind == "sym" else []),
    ]
    result = CliRunner().invoke(app, ["lmdeploy", "kv-qparams", *map(str, options)])
    assert result.exit_code == 0
    assert result.stdout == (told / "stdout.txt").read_text()
    assert ("TurboMind up to 0.3 reads 4" in result.stderr) == (kind == "sym")
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in told.glob("*.weight")}


@pytest.mark.parametrize("name", FILES)
def test_a_twin_holds_what_the_tools_file_holds(tmp_path: Path, name: str) -> None:
    own = read_statistics(find_statistics(STATISTICS, name), kinds_of(name))
    tensors, metadata = twin_tensors(own)
    save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    twin = read_statistics(find_statistics(tmp_path, name), kinds_of(name))
    assert [list(found) for found in twin.values()] == [list(found) for found in own.values()]
    for kind, by_name in own.items():
        for layer, array in by_name.items():
            np.testing.assert_array_equal(twin[kind][layer], array)


def test_float32_arithmetic_gives_other_bytes() -> None:
    """What is rounded at every step matters: the same formula in float32 differs from the tool's files."""
    keys = read_statistics(STATISTICS / "key_stats.pth", RANGES)
    most, least = (np.float32(keys[kind]["model.layers.0"]) for kind in ("max", "min"))
    told = np.fromfile(FIXTURES / "kv_asym_tp1" / "layers.0.past_kv_scale.0.weight", "<f4")
    assert (most.max() - least.min()) / np.float32(255) != told[0]


def ranges(**layers: list[list[float]]) -> Statistics:
    """The statistics of layers by their number, from the largest values of each head and dimension; the least are their opposites."""
    most = {f"model.layers.{name[1:]}": np.array(values, np.float16) for name, values in layers.items()}
    return {"max": most, "min": {name: -one for name, one in most.items()}, "absmax": {name: abs(one) for name, one in most.items()}}


def write(folder: Path, keys: Statistics, values: Statistics | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, found in (("key_stats", keys), ("value_stats", values or keys)):
        tensors, metadata = twin_tensors(found)
        save_file(tensors, folder / f"{name}.safetensors", metadata)
    return folder


def test_a_rank_has_the_heads_of_its_part() -> None:
    """Worked by hand: heads of 1, 2, 4 and 8 on two ranks; symmetric scales are the largest over 127."""
    found = kv_parameters(ranges(l0=[[1.0], [2.0], [4.0], [8.0]]), ranges(l0=[[127.0], [1.0], [1.0], [254.0]]), kv_sym=True, num_tp=2)
    assert [one.numbers for one in found] == [(float(np.float16(2 / 127)), 1.0), (float(np.float16(8 / 127)), 2.0)]


GOOD = ranges(l0=[[1.0, 2.0]], l1=[[1.0, 2.0]])

FAULTS: dict[str, tuple[Statistics, Statistics | None, dict[str, int], str]] = {
    "layers out of order": (ranges(l1=[[1.0]], l0=[[1.0]]), None, {}, "has 'model.layers.1' as its layer 0"),
    "a layer that is missing": (ranges(l0=[[1.0]], l2=[[1.0]]), None, {}, "has 'model.layers.2' as its layer 1"),
    "fewer layers of values": (GOOD, ranges(l0=[[1.0, 2.0]]), {}, "key_stats has 2 layers and value_stats 1"),
    "an infinity": (ranges(l0=[[np.inf]]), None, {}, "max of model.layers.0 has NaN or an infinity"),
    "a range beyond float16": (ranges(l0=[[65504.0]]), None, {}, "span more than float16 holds"),
    "one head on two ranks": (GOOD, None, {"num_tp": 2}, "has 1 KV heads, which 2 ranks cannot share"),
    "no range": (ranges(l0=[[0.0]]), None, {}, "have a scale of 0.0"),
    "ranks below one": (GOOD, None, {"num_tp": 0}, "wanted a whole number from 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_error_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    keys, values, options, message = FAULTS[fault]
    out = tmp_path / "weights"
    out.mkdir()
    with pytest.raises((UnreadableError, UsageError, RefusedError), match=message):
        kv_qparams(write(tmp_path / "work", keys, values), out, **options)
    assert list(out.iterdir()) == []


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UnreadableError, match=r"has no key_stats\.pth"):
        kv_qparams(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="there is no such folder"):
        kv_qparams(STATISTICS, tmp_path / "nowhere")


def repacked(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The tool's key_stats.pth with its members changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(STATISTICS / "key_stats.pth") as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def in_pickle(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    assert len(old) == len(new)
    return lambda name, content: content.replace(old, new) if name.endswith("data.pkl") else content


HOSTILE = {
    "no zip": (b"torch", "is no zip"),
    "cut": ((STATISTICS / "key_stats.pth").read_bytes()[:-100], "is no zip"),
    "a name to call": (
        repacked(in_pickle(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem" + b"_" * 22 + b"\n")),
        "do not trust this file",
    ),
    "another dtype": (repacked(in_pickle(b"ctorch\nHalfStorage\n", b"ctorch\nLongStorage\n")), "names 'torch.LongStorage'"),
    "more elements than bytes": (repacked(in_pickle(b"K\x02K\x80\x86", b"K\x04K\x80\x86")), "the file does not have"),
    "short data": (repacked(lambda name, content: content[:100] if name.endswith("/data/2") else content), "wants 512 bytes"),
    "compressed": (repacked(lambda name, content: content, zipfile.ZIP_DEFLATED), "is compressed"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_one_error(tmp_path: Path, what: str) -> None:
    content, message = HOSTILE[what]
    (tmp_path / "key_stats.pth").write_bytes(content)
    shutil.copy(STATISTICS / "value_stats.pth", tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnreadableError, match=message):
        kv_qparams(tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# -- config.ini


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A workspace's weights of two layers, with the scales of its cache."""
    folder = tmp_path / "workspace" / "triton_models" / "weights"
    folder.mkdir(parents=True)
    (folder / "config.ini").write_text(CONFIG)
    kv_qparams(STATISTICS, folder)
    return folder


@pytest.mark.parametrize(
    ("kv", "engine", "policy", "told"),
    [
        ("int8", "0.1", 4, "4 is an int8 cache to engines up to 0.3, and an int4 cache to engines since 0.4"),
        ("int4", "0.4", 4, "4 is an int4 cache to engines since 0.4, and an int8 cache to engines up to 0.3"),
        ("int8", "0.4.2", 8, "8 is an int8 cache to engines since 0.4, and an unknown policy to engines up to 0.3"),
        ("off", "0.3", 0, None),
    ],
)
def test_policy_by_engine(weights: Path, kv: str, engine: str, policy: int, told: str | None) -> None:
    found = quant_policy(weights.parent.parent, kv, engine=engine)
    assert (weights / "config.ini").read_text() == CONFIG.replace("quant_policy = 0", f"quant_policy = {policy}")
    assert (found.before, found.after) == ({"quant_policy": 0}, {"quant_policy": policy})
    assert any(told in note for note in found.notes) if told else not found.notes


def test_flash_attention_is_changed_when_asked(weights: Path) -> None:
    quant_policy(weights, "int8", use_context_fmha=False)
    wanted = CONFIG.replace("quant_policy = 0", "quant_policy = 4").replace("use_context_fmha = 1", "use_context_fmha = 0")
    assert (weights / "config.ini").read_text() == wanted
    assert any("--context-fmha" in note for note in quant_policy(weights, "off").notes)


def test_a_missing_key_is_added_to_its_section(weights: Path) -> None:
    (weights / "config.ini").write_bytes(b"[llama]\r\nnum_layer=2\r\ntensor_para_size=1\n\n[other]\nquant_policy = 9\n")
    quant_policy(weights / "config.ini", "int8")
    assert (weights / "config.ini").read_bytes() == (
        b"[llama]\r\nnum_layer=2\r\ntensor_para_size=1\nquant_policy = 4\n\n[other]\nquant_policy = 9\n"
    )


def test_an_int8_cache_wants_its_scales(weights: Path) -> None:
    """Engines up to 0.3 would go on with a scale of 1, or stop at a symmetric file; since 0.4 they read none."""
    kv_qparams(STATISTICS, weights, kv_sym=True)
    with pytest.raises(RefusedError, match="holds 8 bytes"):
        quant_policy(weights, "int8")
    (weights / "layers.1.past_kv_scale.0.weight").unlink()
    with pytest.raises(RefusedError, match=r"holds 8 bytes|is not beside"):
        quant_policy(weights, "int8")
    (weights / "layers.0.past_kv_scale.0.weight").unlink()
    with pytest.raises(RefusedError, match=r"layers\.0\.past_kv_scale\.0\.weight: is not beside"):
        quant_policy(weights, "int8")
    assert (weights / "config.ini").read_text() == CONFIG
    quant_policy(weights, "int8", engine="0.4")


def test_what_no_engine_has_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="have an int8 cache alone"):
        quant_policy(weights, "int4", engine="0.3")
    with pytest.raises(UsageError, match="wanted int8, int4 or off"):
        quant_policy(weights, "fp8")
    with pytest.raises(UsageError, match="wanted a version"):
        quant_policy(weights, "int8", engine="new")
    with pytest.raises(UsageError, match="name a TurboMind workspace"):
        quant_policy(tmp_path, "int8")
    newer = tmp_path / "newer" / "triton_models" / "weights"
    newer.mkdir(parents=True)
    (newer / "config.yaml").write_text("model_config: {}\n")
    with pytest.raises(RefusedError, match="--quant-policy 8"):
        quant_policy(tmp_path / "newer", "int8", engine="0.6")
    (weights / "config.ini").write_text("quant_policy = 0\n")
    with pytest.raises(UnreadableError, match=r"no config\.ini as LMDeploy writes it"):
        quant_policy(weights, "int8")


def test_scales_must_be_of_the_workspaces_ranks_and_layers(weights: Path) -> None:
    with pytest.raises(UsageError, match="tensor_para_size is 1, and --num-tp is 2"):
        kv_qparams(STATISTICS, weights, num_tp=2)
    (weights / "config.ini").write_text(CONFIG.replace("num_layer = 2", "num_layer = 3"))
    with pytest.raises(UsageError, match="num_layer is 3, and layers calibrated is 2"):
        kv_qparams(STATISTICS, weights)


def test_the_command_says_what_it_changed(weights: Path) -> None:
    result = CliRunner().invoke(app, ["lmdeploy", "quant-policy", str(weights), "--kv", "int8", "--json"])
    assert json.loads(result.stdout)["after"] == {"quant_policy": 4}
    again = CliRunner().invoke(app, ["lmdeploy", "quant-policy", str(weights), "--kv", "int4", "--engine", "0.4"])
    assert "quant_policy = 4 (was 4)" in again.stdout
    assert "past_kv_scale are not read" in again.stdout

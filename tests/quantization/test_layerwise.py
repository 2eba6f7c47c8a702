"""One decoder layer at a time gives what the whole model in memory gives, bit for bit, whatever interrupts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.numpy import load_file

import quantize.ways
from formats.errors import DestinationError, UsageError
from quantize.anti_outlier import AntiOutlier
from quantize.blocks import Blocks
from quantize.calibrator import Calibrator
from quantize.config import AntiOutlierConfig, QuantConfig
from quantize.layerwise import Job, LayerRun
from quantize.models import load_model
from quantize.recipe import loads
from quantize.run import quantize_model
from quantize.saving import tensors_of

SAMPLES = [
    [ids := torch.randint(0, 2048, (1, count), generator=torch.Generator().manual_seed(count)), torch.ones_like(ids)]
    for count in (30, 50, 17, 33, 60, 20, 11)
]
W8A8 = {"mm_tensor": False}
MIX = {"*.mlp.*": "w8a8_dynamic", "*.o_proj": "w8a16", "*.k_proj": "float"}


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize(
    ("fields", "method", "level", "mix"),
    [
        (W8A8, None, 0, {}),
        (W8A8 | {"act_method": 3}, "m4", 3, {}),
        (W8A8 | {"act_method": 2, "kv": True}, "m6", 2, {}),
        (W8A8 | {"kv": True}, None, 0, {}),
        (W8A8, "m2", 0, MIX),
        (W8A8 | {"fa": True}, "m3", 0, {}),
        ({"w_bit": 4, "a_bit": 16, "is_lowbit": True, "open_outlier": False, "w_method": "HQQ"}, "m1", 0, {}),
        ({"w_bit": 4, "co_sparse": True}, "m5", 1, {}),
        (W8A8 | {"is_dynamic": True, "disable_names": ["model.layers.1.mlp.up_proj"]}, None, 2, {}),
    ],
)
def test_layers_are_those_of_the_whole_model(
    fields: dict[str, Any], method: str | None, level: int, mix: dict[str, str], on_disk: bool, tmp_path: Path
) -> None:
    def config() -> QuantConfig:
        plain = {name: value for name, value in fields.items() if name not in {"kv", "fa"}}
        made = QuantConfig(**plain)
        made = made.kv_quant() if "kv" in fields else made
        return made.fa_quant() if "fa" in fields else made

    smooth = None if method is None else AntiOutlierConfig(anti_method=method)
    model = load_model(tiny.TINYLM)
    if smooth is not None:
        AntiOutlier(model, SAMPLES, smooth).process()
    calibrator = Calibrator(model, config(), [list(sample) for sample in SAMPLES], f"L{level}", mix_cfg=dict(mix))
    calibrator.run()
    wanted = tensors_of(calibrator)

    run = LayerRun(Blocks.open(tiny.TINYLM), Job(config(), mix, smooth, level), SAMPLES, tmp_path if on_disk else None)
    floats = frozenset(run.wildest(lambda what, done, of: None)) if level else frozenset()
    run.begin()
    found: tuple[dict[str, Any], dict[str, str]] = ({}, {})
    ranges: dict[str, float] = {}
    for made in run.layers(floats=floats):
        for part, whole in zip(tensors_of(made), found, strict=True):
            whole.update(part)  # type: ignore[arg-type]
        ranges |= made.range_parm
    outside = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert set(wanted[0]) - set(found[0]) == outside
    for name, array in found[0].items():
        assert (array.dtype, array.shape, array.tobytes()) == (wanted[0][name].dtype, wanted[0][name].shape, wanted[0][name].tobytes()), (
            name
        )
        assert found[1][name] == wanted[1][name]
    assert ranges == {name: ratio for name, ratio in calibrator.range_parm.items() if name != "lm_head"}
    if on_disk:
        assert {path.name for path in tmp_path.iterdir()} == {f"{name}-00006.states" for name in run._streams}


def recipe(text: str = "quant: {mm_tensor: false}\nanti_outlier: {anti_method: m4}\nkv_quant: {kv_sym: false}\ndisable_level: L2") -> Any:
    return loads(text, "mine")


@pytest.mark.parametrize("to", ["msmodelslim", "msmodelslim:ascendv1", "compressed-tensors"])
def test_the_folder_is_the_one_made_in_memory(source: Path, calib: Path, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "quant: {mm_tensor: false}\nanti_outlier: {anti_method: m4}\ndisable_level: L2"
    layered = quantize_model(source, tmp_path / "layered", recipe(text), to, calib=calib)
    monkeypatch.setattr(quantize.ways, "whole_model_only", lambda job: "a test")
    whole = quantize_model(source, tmp_path / "whole", recipe(text), to, calib=calib)
    assert layered.layers == whole.layers
    assert layered.float_names == whole.float_names
    assert layered.smoothed == whole.smoothed == 24
    for path in sorted((tmp_path / "whole").iterdir()):
        if path.name not in {"weighbridge.json", "README.md"}:
            assert (tmp_path / "layered" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not any(path.name.endswith(".weighbridge") for path in tmp_path.iterdir())


CHILD = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from quantize.recipe import loads
from quantize.run import quantize_model
source, out, calib, text, stop = sys.argv[1:]
def progress(what, done, of, layer):
    if f"{what} {done}" == stop:
        print("here", flush=True)
        time.sleep(600)
quantize_model(Path(source), Path(out), loads(text, "mine"), "msmodelslim", calib=Path(calib), progress=progress)
"""


@pytest.mark.parametrize("stop", ["quantizing 1", "quantizing 20", "calibrating 3", "ranges 2", "quantizing 40"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source: Path, calib: Path, stop: str, tmp_path: Path) -> None:
    text = "quant: {mm_tensor: false}\nanti_outlier: {anti_method: m4}\nkv_quant: {kv_sym: false}\ndisable_level: L2"
    arguments = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out"), str(calib), text, stop]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    again = quantize_model(source, tmp_path / "out", recipe(text), "msmodelslim", calib=calib)
    whole = quantize_model(source, tmp_path / "whole", recipe(text), "msmodelslim", calib=calib)
    assert again.resumed_layers == {"quantizing 1": 1, "quantizing 20": 3, "quantizing 40": 6}.get(stop, 0)
    assert again.layers == whole.layers
    for name in ("quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_an_interrupted_run_is_not_gone_on_with_by_another(source: Path, calib: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int, layer: Any) -> None:
        if (what, done) == ("quantizing", 20):
            raise KeyboardInterrupt

    with pytest.raises(DestinationError, match="no interrupted run left its work"):
        quantize_model(source, tmp_path / "out", recipe(), "msmodelslim", calib=calib, resume=True)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", recipe(), "msmodelslim", calib=calib, progress=stop)
    for change in ({"samples": 3}, {"recipe": recipe("quant: {mm_tensor: false}")}):
        with pytest.raises(DestinationError, match=r"an interrupted run left its work in \.out\.quantize\.weighbridge, and its"):
            quantize_model(
                **{"model_dir": source, "out": tmp_path / "out", "recipe": recipe(), "to": "msmodelslim", "calib": calib, **change}
            )
    done = quantize_model(source, tmp_path / "out", recipe(), "msmodelslim", calib=calib, resume=True)
    assert done.resumed_layers == 3
    assert any("3 decoder layers were there" in note for note in done.notes)


def test_states_that_have_gone_are_said(source: Path, calib: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int, layer: Any) -> None:
        if (what, done) == ("quantizing", 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", recipe(), "msmodelslim", calib=calib, progress=stop)
    for path in (tmp_path / ".out.quantize.weighbridge" / "model").glob("*.states"):
        path.unlink()
    with pytest.raises(Exception, match="hidden states of an interrupted run have gone"):
        quantize_model(source, tmp_path / "out", recipe(), "msmodelslim", calib=calib)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("quant: {w_bit: 4, a_bit: 16, is_lowbit: true, open_outlier: false}\ndisable_level: L1", "chooses float layers while the whole"),
        ("quant: {mm_tensor: false, disable_last_linear: false}", "outside the decoder layers"),
        ("quant: {mm_tensor: false, pr: 0.5}", "random numbers"),
    ],
)
def test_what_needs_the_whole_model_is_done_in_memory(source: Path, calib: Path, text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=why):
        quantize_model(source, tmp_path / "out", recipe(text), "msmodelslim", calib=calib, resume=True)
    made = quantize_model(source, tmp_path / "out", recipe(text), "msmodelslim", calib=calib)
    assert made.layers
    assert (tmp_path / "out" / "weighbridge.json").is_file()


def test_weights_of_another_dtype_than_the_config_says(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    folder = tiny.model_folder(tmp_path / "model")
    save_file({name: tensor.float() for name, tensor in load(source / "model.safetensors").items()}, folder / "model.safetensors")
    quantize_model(folder, tmp_path / "out", "w8a16", "msmodelslim")
    quantize_model(source, tmp_path / "wanted", "w8a16", "msmodelslim")
    name = "quant_model_weight_w8a16.safetensors"
    found, wanted = load_file(tmp_path / "out" / name), load_file(tmp_path / "wanted" / name)
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == wanted[key].dtype and found[key].tobytes() == wanted[key].tobytes() for key in wanted)

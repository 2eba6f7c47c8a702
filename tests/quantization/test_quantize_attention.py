"""FA3: scales by head, as the real msModelSlim's observer answers, of the states that attention sees."""

from __future__ import annotations

import goldens
import pytest
import torch
from torch import nn

from formats.errors import UnreadableError, UsageError
from quantize import Calibrator, QuantConfig
from quantize.attention import AttentionObserver, HeadRange
from quantize.rounding import linear_parameters


def states(step, height, dtype):
    """[1, 2, 700, 16], positive, with few large values: the same on any machine."""
    values = torch.sin(torch.arange(2 * 700 * 16, dtype=torch.float64) * step) ** 40 * height
    return values.to(torch.float32).to(dtype).reshape(1, 2, 700, 16)


RECORDED = {  # scales of fa_quant.QKVQuantizer of the real tool, configured (8, sym=True, 2 heads, ratio), after two samples
    ("float32", 0.9999): [0.02362198568880558, 0.023621993139386177],
    ("float32", 1.0): [0.02362203598022461, 0.023622047156095505],
    ("float32", 0.95): [0.020887061953544617, 0.020866038277745247],
    ("bfloat16", 0.9999): [0.023681640625, 0.023681640625],
    ("bfloat16", 1.0): [0.023681640625, 0.023681640625],
    ("bfloat16", 0.95): [0.0208740234375, 0.0208740234375],
}


@pytest.mark.parametrize(("dtype", "recall"), RECORDED)
def test_head_ranges_are_the_tools(dtype, recall):
    seen = HeadRange(recall)
    for step, height in ((1.7, 3.0), (0.37, 2.9)):
        seen.update(states(step, height, getattr(torch, dtype)))
    scale, offset = linear_parameters(seen.low, seen.high, 8, symmetric=True)
    assert scale.flatten().tolist() == pytest.approx(RECORDED[dtype, recall], rel=1e-6)
    assert scale.shape == (2, 1)
    assert not offset.any()


def test_the_narrowest_window_by_hand():
    # 19 of 20 values: without -9 the window is 17 wide, without one 18 it would be 27
    seen = HeadRange(0.95)
    seen.update(torch.tensor([-9.0, *range(1, 19), 18.0]).reshape(1, 1, 20, 1))
    assert (seen.low.item(), seen.high.item()) == (1.0, 18.0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_head_of_every_layer_gets_scales(implementation):
    model = goldens.load_model(goldens.SOURCES / "src_qwen2_bf16")
    model.set_attn_implementation(implementation)
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads, "v": model.config.num_key_value_heads}
    calibrator = Calibrator(model, QuantConfig(mm_tensor=False).fa_quant(), calib_data=goldens.samples())
    calibrator.run()
    assert set(calibrator.attention) == {f"model.layers.0.self_attn.fa_{kind}.{part}" for kind in "qkv" for part in ("scale", "offset")}
    for kind, count in heads.items():
        scale = calibrator.attention[f"model.layers.0.self_attn.fa_{kind}.scale"]
        assert (scale.shape, scale.dtype) == ((count, 1), torch.bfloat16)
        assert calibrator.attention[f"model.layers.0.self_attn.fa_{kind}.offset"].dtype == torch.int8
    values = []  # of the quantized model, whose v_proj is what attention sees
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, output: values.append(output))
    with torch.no_grad():
        for sample in goldens.samples():
            model(*sample)
    hook.remove()
    absmax = torch.stack([one.unflatten(-1, (heads["v"], -1)).abs().amax((0, 1, 3)) for one in values]).amax(0)
    got = calibrator.attention["model.layers.0.self_attn.fa_v.scale"].flatten()
    torch.testing.assert_close(got, absmax / 127, rtol=0.02, atol=0)  # in calibration, scales were still being found


def test_nothing_stays_patched():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    model = goldens.load_model(goldens.SOURCES / "src_llama_fp16")
    Calibrator(model, QuantConfig(a_bit=16).fa_quant(), calib_data=goldens.samples()).run()
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before


def test_disabled_attention_gets_none():
    name = "model.layers.0.self_attn"
    model = goldens.load_model(goldens.SOURCES / "src_llama2l_fp16")
    config = QuantConfig(mm_tensor=False, disable_names=[name]).fa_quant()
    calibrator = Calibrator(model, config, calib_data=goldens.samples())
    calibrator.run()
    assert {key.rpartition(".fa_")[0] for key in calibrator.attention} == {"model.layers.1.self_attn"}


def test_models_without_transformers_attention_are_refused():
    with pytest.raises(UsageError, match="fa_quant"):
        AttentionObserver(nn.Sequential(nn.Linear(2, 2)), [])
    model = goldens.load_model(goldens.SOURCES / "src_llama_fp16")
    observer = AttentionObserver(model, [])
    with pytest.raises(UnreadableError, match="self_attn"):
        observer.finish()

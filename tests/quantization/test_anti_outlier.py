"""AntiOutlier against what msModelSlim left of two tiny models, by hand on small numbers, and for every architecture in the tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import stand_ins  # noqa: E402
from safetensors import safe_open  # noqa: E402

from formats.errors import RefusedError, UnreadableError, UsageError  # noqa: E402
from quantize.anti_outlier import AntiOutlier, value_rows  # noqa: E402
from quantize.architectures import ARCHITECTURES, Architecture, Subgraph, architecture_of  # noqa: E402
from quantize.config import AntiOutlierConfig  # noqa: E402
from quantize.smoothing import (  # noqa: E402
    ActivationStatistics,
    largest_weight,
    m1_scale,
    m2_scale,
    m3_ratio,
    m3_scale,
    m4_scale,
    m5_scale,
    m6_exponents,
    power_scale,
    widest_of_group,
)

METHODS = ("m1", "m2", "m3", "m4", "m5", "m6")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def of_transformers(name: str, **config: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": of_transformers("Llama", **GQA, attention_bias=True, mlp_bias=True),
    "llama_one_key_head": of_transformers("Llama", **SIZES, num_key_value_heads=1),
    "llama_wide_heads": of_transformers("Llama", **GQA, head_dim=16),
    "mistral": of_transformers("Mistral", **GQA, sliding_window=None),
    "qwen2": of_transformers("Qwen2", **SIZES, num_key_value_heads=4),
    "qwen3": of_transformers("Qwen3", **GQA, head_dim=16),
    "qwen3_moe": of_transformers("Qwen3Moe", **GQA, head_dim=16, **EXPERTS),
    "chatglm2": stand_ins.chatglm2,
    "chatglm2_one_key_head": lambda: stand_ins.chatglm2(key_heads=1),
    "internlm": stand_ins.internlm,
    "internlm2": stand_ins.internlm2,
    "internlm2_all_key_heads": lambda: stand_ins.internlm2(key_heads=4),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny(name: str, dtype: Any = None) -> Any:
    """A model whose norms, weights and biases are all different, with outlier channels."""
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key and weight.dim() == 1:
                weight.mul_(torch.rand_like(weight) + 0.5)
                weight[torch.randperm(weight.numel())[:3]] *= torch.tensor([4.0, 9.0, 15.0])
            elif key.endswith("bias"):
                weight.normal_(0, 0.1)
            elif "layers" in key and weight.dim() == 2:
                weight.mul_(2 + torch.rand(weight.shape[0], 1))
    return model.to(torch.float64 if dtype is None else dtype)


def samples(count: int = 3, tokens: int = 20) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, 32, (count, 1, tokens), generator=generator)
    return [[row, torch.ones(1, tokens, dtype=torch.long)] for row in ids]


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=samples()[0][0]).logits


def smoothed(model: Any, method: str, **options: Any) -> AntiOutlier:
    anti = AntiOutlier(model, samples(), AntiOutlierConfig(anti_method=method, **options))
    anti.process()
    return anti


# -- what the real tool did


class Golden:
    def __init__(self) -> None:
        with safe_open(Path(__file__).parent / "anti_outlier_goldens.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = file.metadata()
        self.configs, self.settings = json.loads(about["configs"]), json.loads(about["settings"])

    def cases(self) -> list[tuple[str, str]]:
        return sorted({tuple(key.split(":")[:2]) for key in self.tensors if key != "ids" and ":weight:" not in key})

    def smooth(self, name: str, setting: str) -> tuple[AntiOutlier, dict[str, Any]]:
        """Ours on the golden's model, and the golden's results by name."""
        kind = {"llama": "Llama", "qwen3": "Qwen3"}[name]
        model = of_transformers(kind, **self.configs[name])()
        prefix = f"{name}:weight:"
        model.load_state_dict({key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)})
        data = [[row[None].long(), torch.ones(1, row.numel(), dtype=torch.long)] for row in self.tensors["ids"]]
        anti = AntiOutlier(model, data, AntiOutlierConfig(**self.settings[setting]))
        anti.process()
        prefix = f"{name}:{setting}:"
        return anti, {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


GOLDEN = Golden()


@pytest.mark.parametrize(("name", "setting"), GOLDEN.cases())
def test_scales_are_the_real_tools(name: str, setting: str) -> None:
    anti, wanted = GOLDEN.smooth(name, setting)
    layers = {key: scale for key, scale in wanted.items() if not key.endswith(".bias")}
    assert len(layers) == 8  # q, o, gate or up, down of two layers
    for key, scale in layers.items():
        found = anti.scales.get(key, torch.ones_like(scale))
        torch.testing.assert_close(found, scale, rtol=1e-5, atol=0, msg=lambda words, key=key: f"{key}: {words}")
    assert any(bool((scale != 1).any()) for scale in layers.values())


def test_m2_scales_the_real_tools_channels() -> None:
    anti, wanted = GOLDEN.smooth("llama", "m2")
    chosen = {key: scale.sub(1).abs() > 1e-6 for key, scale in wanted.items() if key in anti.scales}
    assert {key: (anti.scales[key] != 1).tolist() for key in chosen} == {key: mask.tolist() for key, mask in chosen.items()}
    assert any(0 < int(mask.sum()) < mask.numel() for mask in chosen.values())


def test_qwen3_m4_shifts_as_the_real_tool_does() -> None:
    anti, wanted = GOLDEN.smooth("qwen3", "m4")
    biases = {key: value for key, value in wanted.items() if key.endswith("norm.bias")}
    assert len(biases) == 4
    for key, value in biases.items():
        torch.testing.assert_close(anti.model.get_parameter(key).detach(), value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(-anti.shifts[key.removesuffix(".bias")] / anti.scales[key.removesuffix(".bias")], value)


# -- what the model computes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same(name: str, method: str) -> None:
    model = tiny(name)
    before, weights = logits(model), {key: weight.clone() for key, weight in model.state_dict().items()}
    anti = smoothed(model, method)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-10)
    changed = {key.rpartition(".")[0] for key, weight in model.state_dict().items() if not torch.equal(weights.get(key, before), weight)}
    assert changed
    assert changed <= {name for group in anti.subgraphs() for name in (group.source, *group.targets)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_stays(dtype: str) -> None:
    model = tiny("qwen2", getattr(torch, dtype))
    smoothed(model, "m4")
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


def test_a_shifted_model_is_copied_with_its_shift() -> None:
    model = tiny("qwen3")
    before = logits(model)
    smoothed(model, "m4")
    torch.testing.assert_close(logits(copy.deepcopy(model)), before, rtol=1e-9, atol=1e-10)
    assert bool(model.model.layers[0].input_layernorm.bias.any())


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_name_modules_that_are_there(name: str) -> None:
    model = tiny(name)
    modules, row = dict(model.named_modules()), architecture_of(model.config)
    assert isinstance(modules[row.embeddings], torch.nn.Embedding)
    assert isinstance(modules[row.head], torch.nn.Linear)
    assert modules[row.final_norm].weight.dim() == 1
    for norm in row.inner_norms:
        assert modules[f"{row.layers}.0.{norm}"].weight.dim() == 1


def test_every_architecture_is_tested() -> None:
    assert {tiny(name).config.model_type for name in MODELS} == set(ARCHITECTURES)


# -- which subgraphs


def test_linear_pairs_are_for_m4_and_m6() -> None:
    for method in METHODS:
        kinds = {group.kind for group in AntiOutlier(tiny("llama"), samples(), AntiOutlierConfig(anti_method=method)).subgraphs()}
        assert kinds == ({"norm", "value", "up"} if method in ("m4", "m6") else {"norm"})


@pytest.mark.parametrize("method", METHODS)
def test_disabled_names_skip_their_group_where_the_tool_skips_it(method: str) -> None:
    anti = smoothed(tiny("llama"), method, disable_anti_names=["model.layers.0.self_attn.k_proj"])
    skipped = {"model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj"}
    assert skipped.isdisjoint(anti.scales) if method in ("m3", "m4", "m6") else skipped <= set(anti.scales)
    assert "model.layers.1.input_layernorm" in anti.scales


def test_experts_are_left_alone() -> None:
    model = tiny("qwen3_moe")
    before = {key: weight.clone() for key, weight in model.state_dict().items() if ".mlp." in key}
    smoothed(model, "m6")
    assert before
    assert all(torch.equal(weight, model.state_dict()[key]) for key, weight in before.items())


def test_a_group_that_names_an_expert_is_skipped() -> None:
    row = ARCHITECTURES["qwen3_moe"]
    named = Subgraph("norm", "post_attention_layernorm", ("mlp.gate", "mlp.experts.0.gate_proj"))
    wider = Architecture(row.layers, (*row.subgraphs, named), row.embeddings, row.final_norm, row.head)
    anti = AntiOutlier(tiny("qwen3_moe"), samples(), AntiOutlierConfig(anti_method="m1"), architecture=wider)
    assert {group.source.rpartition(".")[2] for group in anti.subgraphs()} == {"input_layernorm"}


def test_wrapped_norms_are_those_of_the_tools_class() -> None:
    names = AntiOutlier(tiny("qwen3"), samples(), AntiOutlierConfig(anti_method="m4")).wrapped_norms
    assert len(names) == 2 * 4 + 1
    assert "model.layers.1.self_attn.q_norm" in names
    assert AntiOutlier(tiny("qwen3"), samples(), AntiOutlierConfig(anti_method="m6")).wrapped_norms == ()
    assert len(AntiOutlier(tiny("llama"), samples(), norm_class_name="LLAMArmsnorm").wrapped_norms) == 5


def test_rows_of_fused_sources() -> None:
    assert value_rows("all", 4, 8, 2).tolist() == [0, 1, 2, 3]
    assert value_rows("second_half", 8, 4, 4).tolist() == [4, 5, 6, 7]
    # 4 heads of 2, 2 key heads: [8 q | 4 k | 4 v], and per key head [2 * 2 q, 2 k, 2 v]
    assert value_rows("last", 16, 8, 2).tolist() == [12, 13, 14, 15]
    assert value_rows("last_of_group", 16, 8, 2).tolist() == [6, 7, 14, 15]
    for rows, out, channels in (("last", 8, 8), ("last", 11, 8), ("all", 6, 8), ("second_half", 8, 6)):
        with pytest.raises(UsageError, match="source"):
            value_rows(rows, out, channels, 2)


# -- formulas, by hand


def statistics(*given: list[list[float]], keep: bool = False) -> ActivationStatistics:
    found = None
    for sample in given:
        found = ActivationStatistics.of(torch.tensor([sample]), found, keep=keep)
    assert found is not None
    return found


def test_statistics_follow_the_samples() -> None:
    found = statistics([[1.0, -4.0], [3.0, 0.0]], [[-5.0, 1.0], [0.0, 0.0]], keep=True)
    assert found.maximum.tolist() == [3, 1]
    assert found.minimum.tolist() == [-5, -4]
    assert found.largest.tolist() == [5, 4]
    assert found.shift.tolist() == [-1, -1.5]
    # the first sample is centred by its own middle, [2, -2]: [[-1, -2], [1, 2]]; the second by [-1, -1.5]: [[-4, 2.5], [1, 1.5]]
    assert found.centred_maximum.tolist() == [1, 2.5]
    assert float(found.centred_peak) == 2.5
    assert float(found.centred_std) == pytest.approx(torch.tensor([-4, 2.5, 1, 1.5]).std().item())
    assert found.first.tolist() == [[[1, -4], [3, 0]]]
    assert [sample.tolist() for sample in found.samples] == [[[1, -4], [3, 0]], [[-5, 1], [0, 0]]]


def test_powers_of_activations_and_weights() -> None:
    found = statistics([[4.0, -9.0, 0.0]])
    weights = [torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[-4.0, 0.0, 1.0]])]
    assert largest_weight(weights).tolist() == pytest.approx([4, 1e-5, 2])
    assert m1_scale(found, weights).tolist() == pytest.approx([1, 3 / 1e-5**0.5, 1e-5])
    assert m4_scale(found, weights).tolist() == pytest.approx([4**0.9 / 4**0.1, 9**0.9 / 1e-5**0.1, 1e-5])
    assert power_scale(found.largest, largest_weight(weights), 1.0, 0.0).tolist() == pytest.approx([4, 9, 1e-5])


def test_grouped_heads_m4_means_and_m6_maxima() -> None:
    # one key head of two channels, two query heads: channels (0, 2) and (1, 3) share
    group = statistics([[1.0, 2.0, 3.0, 10.0]])
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    layer = model.layers[0]
    layer.v, layer.o = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(4, 3, bias=False)
    model.config = stand_ins.Config(num_attention_heads=2)
    row = Architecture("layers", (Subgraph("value", "v", ("o",)),), "", "", "")
    ones = torch.ones(3, 4)
    for method, flex, wanted in (
        ("m4", None, [(1 + 3**0.9) / 2, (2**0.9 + 10**0.9) / 2]),
        ("m6", {"alpha": 1.0, "beta": 0.0}, [3.0, 10.0]),
    ):
        with torch.no_grad():
            layer.v.weight.fill_(1)
            layer.o.weight.copy_(ones)
            anti = AntiOutlier(model, samples(), AntiOutlierConfig(anti_method=method, flex_config=flex), architecture=row)
            subgraph = next(row.placed(1))
            anti.scale(subgraph, *anti._wanted(subgraph, group))
        assert layer.v.weight[:, 0].tolist() == pytest.approx([1 / scale for scale in wanted])
        assert layer.o.weight[0].tolist() == pytest.approx(wanted * 2)
    assert widest_of_group(torch.tensor([1.0, 2, 3, 10, 5, 6, 0, 7]), 2, 2).tolist() == [3, 10, 5, 7]


def test_m2_without_outliers_is_m1() -> None:
    found = statistics([[1.0, -1.0], [-1.0, 1.0]])
    weights = [torch.tensor([[4.0, 9.0]])]
    scale, threshold = m2_scale(found, weights, [None])
    assert threshold is None  # three standard deviations are beyond the maximum
    assert scale.tolist() == pytest.approx([1 / 2, 1 / 3])


def test_m2_scales_only_channels_above_its_threshold() -> None:
    tokens = torch.linspace(-1, 1, 64)[:, None] * torch.tensor([1.0, 1.1, 40.0, 0.9] + [1.0] * 40)
    found = statistics(tokens.tolist())
    weights = [torch.full((3, 44), 0.25)]
    scale, threshold = m2_scale(found, weights, [None])
    assert threshold is not None
    assert float(found.centred_std) <= threshold < 40
    assert (scale != 1).nonzero().flatten().tolist() == [2]
    assert float(scale[2]) == pytest.approx((40 / 0.25) ** 0.5)


def test_m3_scale_is_centred_and_of_the_first_sample() -> None:
    found = statistics([[1.0, 16.0], [-1.0, -16.0]], [[100.0, 100.0]])
    assert m3_scale(found, 0.0).tolist() == [1, 1]
    assert m3_scale(found, 0.5).tolist() == pytest.approx([0.5, 2])  # 1 and 4, over sqrt(4 * 1)


def test_m3_keeps_the_ratio_of_the_least_error() -> None:
    torch.manual_seed(0)
    tokens, weight = torch.randn(1, 30, 16) * torch.logspace(-1, 1, 16), torch.randn(8, 16)
    found = ActivationStatistics.of(tokens)

    def error(ratio: float) -> float:
        scale = m3_scale(found, ratio)
        wide = weight * scale
        step = wide.abs().amax(1, keepdim=True) / 7
        return float(((tokens @ ((wide / step).round() * step / scale).T - tokens @ weight.T) ** 2).mean())

    errors = [error(index / 20) for index in range(20)]
    ratio = m3_ratio(found, [weight], [None], bits=4)
    assert ratio == errors.index(min(errors)) / 20
    assert ratio > 0


def test_m5_scales_outliers_only() -> None:
    # maxima 1.0 .. 1.9 and 8, 80; minima the same downwards but for 16 in channel 3
    tops = [1 + index / 10 for index in range(10)]
    row = [*tops, 8.0, 80.0]
    low = [-value for value in tops] + [-1.0, -1.0]
    low[3] = -16.0
    scale = m5_scale(statistics([row, low]))
    assert scale[:3].tolist() == [1, 1, 1]
    assert float(scale[3]) == pytest.approx((16 / 1.9) ** 0.7)
    assert float(scale[10]) == 1  # beyond the fence, but below the widest gap among the suspects
    assert float(scale[11]) == pytest.approx((80 / 8) ** 0.7)


def test_m6_searches_alpha_then_beta() -> None:
    torch.manual_seed(1)
    tokens, weight = torch.randn(1, 40, 16) * torch.logspace(-1, 1.5, 16), torch.randn(8, 16)
    found = ActivationStatistics.of(tokens, keep=True)
    alpha, beta = m6_exponents(found, [weight])
    a, w, x = found.largest, weight.abs().amax(0), tokens[0]

    def error(alpha: float, beta: float) -> float:
        scale = a**alpha / w**beta
        wide, narrow = weight * scale, x / scale
        step, unit = wide.abs().amax(1, keepdim=True) / 127, (narrow.max() - narrow.min()) / 255
        zero = (-narrow.min() / unit).round()
        return float((((narrow / unit + zero).round() - zero) * unit @ ((wide / step).round() * step).T - x @ weight.T).pow(2).mean())

    grid = [index / 20 for index in range(21)]
    assert error(alpha, 1 - alpha) <= min(error(value, 1 - value) for value in grid) * 1.001
    assert error(alpha, beta) <= min(error(alpha, value) for value in grid) * 1.001
    assert alpha > 0


@pytest.mark.parametrize("flex", [{"alpha": 0.6}, {"beta": 0.3}, None])
def test_half_a_flex_config_is_searched(flex: dict[str, float] | None) -> None:
    assert smoothed(tiny("llama"), "m6", flex_config=flex).choices == smoothed(tiny("llama"), "m6").choices


def test_a_whole_flex_config_is_used() -> None:
    choices = smoothed(tiny("llama"), "m6", flex_config={"alpha": 0.6, "beta": 0.3}).choices
    assert len(choices) == 8
    assert all(choice == {"alpha": 0.6, "beta": 0.3} for choice in choices.values())


# -- calibration data


def test_a_mask_counts_only_beside_ids_alone() -> None:
    model, seen = tiny("llama"), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    ids, mask = samples()[0]
    data = [[ids], [ids, mask], [ids, mask, mask], {"input_ids": ids, "use_cache": torch.tensor(False)}]
    AntiOutlier(model, data, AntiOutlierConfig(anti_method="m1")).process()
    assert seen == [{"input_ids"}, {"input_ids", "attention_mask"}, {"input_ids"}, {"input_ids", "use_cache"}]


def test_progress_is_told_each_source() -> None:
    told: list[str] = []
    AntiOutlier(tiny("llama"), samples(), progress=told.append).process()
    assert told == [f"model.layers.{index}.{name}" for index in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]


# -- bad input


@pytest.mark.parametrize("data", [None, [], [[]], ["text"], [samples()[0], None]])
def test_bad_calibration_data(data: Any) -> None:
    with pytest.raises(UsageError, match="calib_data"):
        AntiOutlier(tiny("llama"), data)


def test_bad_names() -> None:
    with pytest.raises(UsageError, match=r"disable_anti_names: 'model\.norm' is no linear"):
        AntiOutlier(tiny("llama"), samples(), AntiOutlierConfig(disable_anti_names=["model.norm"]))
    with pytest.raises(UsageError, match="norm_class_name"):
        AntiOutlier(tiny("llama"), samples(), norm_class_name="BatchNorm")
    with pytest.raises(UsageError, match="model_type is 'gpt2'"):
        architecture_of(stand_ins.Config(model_type="gpt2"))
    with pytest.raises(UsageError, match="apply_residual_connection_post_layernorm is True"):
        architecture_of(stand_ins.Config(model_type="chatglm", apply_residual_connection_post_layernorm=True))
    with pytest.raises(UsageError, match=r"transformer\.encoder\.layers: is no list of layers"):
        AntiOutlier(tiny("llama"), samples(), architecture=ARCHITECTURES["chatglm"]).process()


def test_values_that_are_not_finite_name_their_layer() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 4] = float("inf")
    with pytest.raises(UnreadableError, match=r"model\.layers\.1\.mlp\.gate_proj: the weight holds NaN"):
        smoothed(model, "m1")
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[5] = float("nan")
    with pytest.raises(UnreadableError, match=r"model\.layers\.0\.mlp\.gate_proj: 1 of 32 input channels held NaN"):
        smoothed(model, "m1")


def test_a_scale_that_the_dtype_cannot_hold_changes_nothing() -> None:
    model = tiny("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] = 60000
        model.model.embed_tokens.weight[:, 7] = 0  # so that the scale is the least there is, 1e-5
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.input_layernorm: torch\.float16 cannot hold its weight"):
        smoothed(model, "m4")
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())

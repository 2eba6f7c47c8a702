"""Recipes: those that come with the package, the keys they may have, and mistakes, which are named by line and key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import yaml

import quantize
from formats.errors import UnreadableError, UsageError
from quantize import AntiOutlierConfig, QuantConfig
from quantize.config import MIX_TYPES
from quantize.recipe import RECIPES, AntiOutlierSection, QuantSection, load, loads

KINDS = {
    "w8a8": ("W8A8", True),
    "w8a8-dynamic": ("W8A8_DYNAMIC", False),
    "w8a8-kv8": ("W8A8", True),
    "w8a8-sparse": ("W8A8S", True),
    "w8a16": ("W8A16", False),
    "w4a16-rtn": ("W4A16", False),
    "w4a16-gptq": ("W4A16", True),
    "w4a16-awq": ("W4A16", True),
    "lmdeploy-awq": ("W4A16", True),
    "lmdeploy-awq-search": ("W4A16", True),
    "lmdeploy-awq-0.1": ("W4A16", True),
    "lmdeploy-rtn": ("W4A16", False),
}


@pytest.mark.parametrize("name", tiny.IN_MSMODELSLIMS_WORDS)
def test_a_recipe_of_ours(name: str) -> None:
    recipe = load(name)
    config = recipe.quant_config("cpu")
    assert (config.model_quant_type, recipe.needs_data) == KINDS[name]
    assert not config.mm_tensor  # one scale for a whole weight is msModelSlim's default, and nobody's wish
    assert config.use_kvcache_quant == (name == "w8a8-kv8")
    assert config.is_per_group == name.startswith(("w4a16", "lmdeploy"))
    assert (recipe.gptq_settings() is not None, recipe.awq_settings() is not None) == (name == "w4a16-gptq", name == "w4a16-awq")
    assert (recipe.lmdeploy_awq_settings() is not None) == name.startswith("lmdeploy")
    assert recipe.name == name
    assert recipe.about
    assert len((Path(quantize.__file__).parent / "recipes" / f"{name}.yaml").read_text().splitlines()) <= 15


def test_every_file_has_a_name() -> None:
    assert {path.stem for path in (Path(quantize.__file__).parent / "recipes").iterdir()} == set(RECIPES)


@pytest.mark.parametrize(("section", "config"), [(QuantSection, QuantConfig), (AntiOutlierSection, AntiOutlierConfig)])
def test_the_keys_are_the_configs_arguments_with_their_defaults(section, config) -> None:
    arguments = {field.name: field.default for field in dataclasses.fields(config) if field.init}
    assert {name: field.default for name, field in section.model_fields.items()} == {
        name: value for name, value in arguments.items() if name not in ("dev_type", "dev_id")
    }


def test_a_whole_recipe_becomes_the_configs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "about: all of it\n"
        "anti_outlier: {anti_method: m3, a_bit: 16, w_bit: 4, w_sym: false}\n"
        "quant:\n  w_bit: 8\n  mm_tensor: false\n  disable_names: [model.layers.0.mlp.down_proj]\n  pr: 1\n"
        "kv_quant: {kv_sym: false}\ndisable_level: L3\nmix_cfg: {'*.o_proj': float, '*.up_proj': w8a16}\n"
        "calibration: {samples: 3, length: 9, template: 'Q: {question}'}\n"
    )
    recipe = load(path)
    wanted = QuantConfig(mm_tensor=False, disable_names=["model.layers.0.mlp.down_proj"], dev_type="npu", dev_id=1).kv_quant(kv_sym=False)
    assert recipe.quant_config("npu", 1) == wanted
    assert recipe.anti_outlier_config() == AntiOutlierConfig(anti_method="m3", a_bit=16, w_bit=4, w_sym=False)
    assert (recipe.disable_level, recipe.mix_cfg) == ("L3", {"*.o_proj": "float", "*.up_proj": "w8a16"})
    assert recipe.calibration.model_dump() == {"samples": 3, "length": 9, "template": "Q: {question}"}
    assert recipe.name == "mine.yaml"


@pytest.mark.parametrize("kind", MIX_TYPES)
def test_every_type_that_the_calibrator_mixes_can_be_asked_for(kind: str) -> None:
    assert loads(f"quant: {{}}\nmix_cfg: {{'*': {kind}}}").mix_cfg == {"*": kind}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("quant: {a_bit: 16}", False),
        ("quant: {a_bit: 16}\nmix_cfg: {'*.mlp.*': w8a8}", True),
        ("quant: {a_bit: 16}\nkv_quant: {}", True),
        ("quant: {a_bit: 16, use_kvcache_quant: true}", True),
        ("quant: {a_bit: 16}\nanti_outlier: {anti_method: m1}", True),
        ("quant: {a_bit: 16}\ndisable_level: L1", True),
        ("quant: {a_bit: 16, w_bit: 4, w_method: GPTQ}", True),
        ("quant: {a_bit: 16}\nfa_quant: {}", True),
    ],
)
def test_what_needs_data(text: str, where: bool) -> None:
    assert loads(text).needs_data is where


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("quant:\n  w_bits: 4\n", "line 2: quant.w_bits: there is no such key; did you mean w_bit?"),
        ("quant: {}\n\ncalibraton: {}\n", "line 3: calibraton: there is no such key; did you mean calibration?"),
        ("quant: {dev_type: npu}", "line 1: quant.dev_type: there is no such key"),
        ("quant: {}\nname: x", "line 2: name: there is no such key"),
        ("about: x\n", "line 1: quant: is missing"),
        ("quant:\n  a_bit: 8\n  w_bit: four", "line 3: quant.w_bit: a whole number was wanted, not 'four'"),
        ("quant:\n  w_bit: 8.0", "line 2: quant.w_bit: a whole number was wanted, not 8.0"),
        ("quant:\n  mm_tensor: 1", "line 2: quant.mm_tensor: a boolean was wanted, not 1"),
        ("quant:\n  disable_names:\n  - a\n  - 7", "line 4: quant.disable_names.1: a string was wanted, not 7"),
        ("quant:\n  w_bit: 8\n  w_sym: false", "line 3: quant.w_sym: must be True when a_bit is 8"),
        ("quant:\n  w_bit: 3", "line 1: quant: w_bit 3 with a_bit 8: no such quantization"),
        ("quant: {}\nanti_outlier:\n  anti_method: m7", "line 3: anti_outlier.anti_method: 'm7' is not one of m1"),
        ("quant: {}\nanti_outlier:\n  flex_config: {alpha: big}", "line 3: anti_outlier.flex_config.alpha: a number was wanted"),
        ("quant: {}\ndisable_level: 3", "line 2: disable_level: a string was wanted, not 3"),
        ("quant: {}\ndisable_level: L01", "line 2: disable_level: wanted L0, L1, L2 and so on, not 'L01'"),
        ("quant: {}\nmix_cfg:\n  '*': w2a2", "line 3: mix_cfg.*: 'w8a8', 'w8a16'"),
        ("quant: {}\ncalibration: {samples: 0}", "line 2: calibration.samples:"),
        ("quant: {}\nquant: {}", "line 2: quant: is there already, in line 1"),
        ("quant: &one {}\nkv_quant: *one", "line 2: *one is an alias"),
        ("quant: {}\n<<: {about: x}", "line 2: the recipe has a key that is no text"),
        ("quant: {}\n1: 2", "line 2: the recipe has a key that is no text"),
        ("quant: {}\n\tx: 1", "line 2: is not YAML"),
        ("quant: {", "is not YAML"),
        ("quant: !!python/object/apply:os.system [ls]", "line 1: is not YAML: could not determine a constructor"),
        ("quant: {}\nabout: 2020-13-45", "is not YAML: month must be in 1..12"),
        ("quant: \x00", "is not YAML"),
        ("", "line 1: a recipe is a mapping with the key quant"),
        ("[1, 2]", "line 1: a recipe is a mapping with the key quant"),
        ("quant: {}\nabout: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
    ],
)
def test_a_mistake_is_named_by_line_and_key(text: str, wanted: str) -> None:
    with pytest.raises(UsageError) as error:
        loads(text, "mine.yaml")
    assert str(error.value).startswith("mine.yaml"), error.value
    assert wanted in str(error.value)


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'w8a8_dynamic': there is no such file.*did you mean w8a8-dynamic"):
        load("w8a8_dynamic")
    with pytest.raises(UsageError, match="there is no such file, and the recipes are w8a8,"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"quant: {}\nabout: \xff")
    with pytest.raises(UsageError, match=r"r\.yaml: is not UTF-8 text"):
        load(path)
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(UnreadableError, match=r"r\.yaml: is larger than"):
        load(path)


def test_a_recipe_as_the_certificate_has_it_is_a_recipe() -> None:
    for name in RECIPES:
        recipe = load(name)
        again = loads(yaml.safe_dump(recipe.model_dump(exclude_defaults=True)), name)
        assert again == recipe

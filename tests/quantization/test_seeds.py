"""The scripts of msModelSlim's guides run with their import lines changed: W8A8 tuning on an NPU (a stand-in), W4A16 to AutoAWQ.

The texts are the guides', without their comments; what a user edits - paths, sizes - is put in by ``replace``, which must find it.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_quantize_npu_stand_in import StandIn, npu  # noqa: F401 - a fixture

import convert
from convert.ms_to_vllm import app as ms_to_vllm
from quantize.fake import FakeQuantLinear

TUNING = """
import os
import json
import torch
import torch_npu
from transformers import AutoTokenizer, AutoModelForCausalLM
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlierConfig, AntiOutlier
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from precision_tool.precision_tool import PrecisionTest

SEQ_LEN_OUT = 100
device_id = 0
batch_size = 5

torch.npu.set_compile_mode(jit_compile=False)
option = {}
option["NPU_FUZZY_COMPILE_BLACKLIST"] = "ReduceProd"
torch.npu.set_option(option)

fp16_path = '/data/chatglm2-6b'

tokenizer = AutoTokenizer.from_pretrained(
    pretrained_model_name_or_path=fp16_path,
    local_files_only=True
)

model = AutoModelForCausalLM.from_pretrained(
    pretrained_model_name_or_path=fp16_path,
    local_files_only=True,
    device_map="auto",
    torch_dtype="auto"
).eval()

precision_test = PrecisionTest(model, tokenizer, "boolq", batch_size, "npu")
precision_test.test()


def build_prompt(title, text, passage):
    prompt = f"{title} -- {passage}\\nQuestion:{text}?\\nAnswer:"
    return prompt

def get_calib_dataset(tokenizer, calib_list, device=f"npu:{device_id}"):
    calib_dataset = []
    for calib_data in calib_list:
        title = calib_data["title"]
        text = calib_data["question"]
        passage = calib_data["passage"]
        queries = build_prompt(title, text, passage)
        inputs = tokenizer(queries, return_tensors='pt')
        calib_dataset.append([inputs.data['input_ids'].to(device), inputs.data['attention_mask'].to(device)])
    return calib_dataset

entry = "/path/to/calib_dataset"
calib_set = []
i = 0
with open(entry, encoding="utf-8") as file:
    for line in file:
        data =json.loads(line)
        while i < 50:
            calib_set.append(data)
            i += 1

dataset_calib = get_calib_dataset(tokenizer, calib_set)

anti_config = AntiOutlierConfig(anti_method="m2", dev_type="npu", dev_id=device_id)
anti_outlier = AntiOutlier(model, calib_data=dataset_calib, cfg=anti_config)
anti_outlier.process()

disable_names = []

quant_config = QuantConfig(
    a_bit=8,
    w_bit=8,
    disable_names=disable_names,
    dev_type='npu',
    dev_id=device_id,
    act_method=3,
    pr=1.0,
    w_sym=True,
    mm_tensor=False
)

calibrator = Calibrator(model, quant_config, calib_data=dataset_calib, disable_level='L0')
calibrator.run()
calibrator.save('/save/path', save_type=["safe_tensor", "numpy"])

precision_test = PrecisionTest(model, tokenizer, "boolq", batch_size, "npu")
precision_test.test()

print("testing quantized weights...")
test_prompt = "Common sense questions and answers\\n\\nQuestion: How to learn a new language\\nFactual answer:"
test_input = tokenizer(test_prompt, return_tensors="pt")
print("model is inferring...")
model = model.to(f"npu:{device_id}")
model.eval()
generate_ids = model.generate(
    test_input.input_ids.to(f"npu:{device_id}"),
    attention_mask=test_input.attention_mask.to(f"npu:{device_id}"),
    max_new_tokens=SEQ_LEN_OUT
)

res = tokenizer.batch_decode(
    generate_ids,
    skip_special_tokens=True,
    clean_up_tokenization_spaces=False
)
for idx, item in enumerate(res):
    print(item)
"""

AWQ = """
anti_config = AntiOutlierConfig(anti_method="m3", dev_type="npu", a_bit=16, w_bit=4, dev_id=device_id, w_sym=True)
anti_outlier = AntiOutlier(model, calib_data=dataset_calib, cfg=anti_config)
anti_outlier.process()

quant_config = QuantConfig(
    a_bit=16,
    w_bit=4,
    disable_names=disable_names,
    mm_tensor=False,
    dev_type='npu',
    dev_id=0,
    w_sym=True,
    w_method='MinMax',
    is_lowbit=True,
    open_outlier=False,
    group_size=128
)
"""

IMPORTS = {
    "from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlierConfig, AntiOutlier": (
        "from quantize import AntiOutlierConfig, AntiOutlier"
    ),
    "from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig": "from quantize import Calibrator, QuantConfig",
    "from precision_tool.precision_tool import PrecisionTest": "from quantize.evaluate import PrecisionTest",
}


def edited(script: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


def run(script: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(script, "seed.py", "exec"), names)
    return names


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, BoolQ's questions, and calibration data."""
    tiny.model_folder(tmp_path / "model")
    tiny.questions(tmp_path / "data" / "boolq" / "dev.jsonl")
    monkeypatch.setenv("WEIGHBRIDGE_DATA", str(tmp_path / "data"))
    return tmp_path


def paths(place: Path) -> dict[str, str]:
    return {
        "'/data/chatglm2-6b'": repr(str(place / "model")),
        '"/path/to/calib_dataset"': repr(str(place / "data" / "boolq" / "dev.jsonl")),
    }


def test_only_import_lines_differ() -> None:
    """That ``IMPORTS`` changes lines that import, each into one that imports the same names."""
    for old, new in IMPORTS.items():
        assert re.fullmatch(r"from [\w.]+ import [\w, ]+", old)
        assert new.partition("import")[2] == old.partition("import")[2]
        assert new.startswith("from quantize")


def test_seed_000(place: Path, npu: list[Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    caplog.set_level(logging.INFO, "quantize")
    with StandIn() as mode:
        names = run(edited(TUNING, {**IMPORTS, **paths(place), "'/save/path'": repr(str(place / "saved")), "= 100": "= 8"}))
    assert names["precision_test"].model is names["model"]
    assert "49 of 50 samples repeat" in caplog.text
    assert re.search(r"use histogram observer:model\.layers\.5\.mlp\.down_proj\.quant_input, range_parm:\d+\.\d+", caplog.text)
    assert len(re.findall(r"correct rate:[01]\.\d+, correct total:\d+, sum_total:12", caplog.text)) == 2
    assert {"npu:0"} <= mode.named <= {"npu:0", "cpu", "meta"}  # transformers loads by way of meta
    assert npu.count({"jit_compile": False}) == npu.count({"NPU_FUZZY_COMPILE_BLACKLIST": "ReduceProd"}) >= 4
    assert capsys.readouterr().out.startswith(
        "testing quantized weights...\nmodel is inferring...\nCommon sense questions and answers\n\nQuestion: How to learn a new language"
    )

    linears = {name: module for name, module in names["model"].named_modules() if isinstance(module, FakeQuantLinear)}
    assert len(linears) == 42
    saved = place / "saved"
    tensors = load_file(saved / "quant_model_weight_w8a8.safetensors")
    types = json.loads((saved / "quant_model_description_w8a8.json").read_text())
    assert types["model_quant_type"] == "W8A8"
    for name, linear in linears.items():
        assert types[f"{name}.weight"] == "W8A8"
        codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        fake = (codes.float() * scale.float()).to(linear.weight.dtype)
        # The tool's fake weights may hold a code of -128, which its files do not.
        assert ((linear.weight != fake) <= (codes == -127)).all()
    assert {path.name for path in saved.glob("*.npy")} >= {"quant_weight.npy", "input_scale.npy", "deq_scale.npy", "quant_bias.npy"}


def test_seed_003(place: Path, npu: list[Any]) -> None:  # noqa: F811
    start, rest = TUNING.split("anti_config = ")
    save = "calibrator = " + rest.split("calibrator = ")[1].split("precision_test")[0]
    first, second = AWQ.split("\n\nquant_config")
    script = start + first + "\n\ndisable_names = []\n\nquant_config" + second + save
    changes = {'\'/save/path\', save_type=["safe_tensor", "numpy"]': f"{str(place / 'saved')!r}, save_type=['safe_tensor']"}
    with StandIn():
        names = run(edited(script, {**IMPORTS, **paths(place), **changes}))
    saved = place / "saved"
    weights, description = saved / "quant_model_weight_w4a16.safetensors", saved / "quant_model_description_w4a16.json"
    assert json.loads(description.read_text())["model_quant_type"] == "W4A16"

    from typer.testing import CliRunner

    done = CliRunner().invoke(
        ms_to_vllm,
        ["--model", str(weights), "--json", str(description), "--save_path", str(place / "res.safetensors"), "--target_tool", "awq"],
    )
    assert done.exit_code == 0, done.output
    found = load_file(place / "res.safetensors")
    linears = [name for name, module in names["model"].named_modules() if isinstance(module, FakeQuantLinear)]
    assert len(linears) == 42
    assert {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")} == set(linears)

    convert.convert(saved, place / "dense", "dense", base_model=place / "model", scale_dtype="keep")
    dense = load_file(place / "dense" / "model.safetensors")
    for name in linears:
        torch.testing.assert_close(dense[f"{name}.weight"], names["model"].get_submodule(name).weight.float(), rtol=1e-2, atol=1e-4)

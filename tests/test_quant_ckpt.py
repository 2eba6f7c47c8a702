"""``quant_ckpt``: the flags of Golden Stick's script, where it writes, and that it writes what the script wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import FIXTURES
from typer.testing import CliRunner

from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import read
from formats.mindspore_file import MindSporeFile
from quantize.mindformers_model import open_model
from quantize.quant_ckpt import app, folder_name, settings_of, split_lists

GOLDEN = FIXTURES / "golden_stick"
MODEL = {
    "type": "LlamaConfig", "hidden_size": 256, "num_layers": 2, "num_heads": 8, "n_kv_heads": 4, "vocab_size": 320, "multiple_of": 256,
    "seq_length": 512, "rms_norm_eps": 1e-5, "compute_dtype": "float16", "qkv_concat": False, "extend_method": "None",
    "scaling_factor": 1.0,
}  # fmt: skip
PLAIN = ("per_tensor", "per_channel", "per_channel")


def predict(folder: Path, name: str = "predict_llama2_13b.yaml", **changes: Any) -> Path:
    """A YAML as MindFormers ships it, for the float model that the tool quantized."""
    content = {
        "load_checkpoint": str(GOLDEN / "llama_tiny_fp16_plain.ckpt"),
        "output_dir": str(folder / "output"),
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "llama2_13b"},
        "model": {"model_config": MODEL, "arch": {"type": "LlamaForCausalLM"}},
        "processor": {"tokenizer": {"vocab_file": "./tokenizer.model", "type": "LlamaTokenizer"}, "type": "LlamaProcessor"},
    }
    path = folder / name
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, split_lists([str(argument) for argument in arguments]))


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    file = MindSporeFile(path)
    return {name: (info.dtype, np.asarray(read(file.tensor(name))).tobytes()) for name, info in file.tensors.items()}


def test_the_command_of_the_guide_writes_what_the_script_wrote(tmp_path: Path) -> None:
    done = run("-c", predict(tmp_path), "-s", "boolq/dev.jsonl", "-t", "boolq", "-q", "rtn-a16w8")
    assert done.exit_code == 0, done.output
    out = tmp_path / "output" / "llama2_13b_rtn-a16w8_ckpt"
    assert stored(out / "rank_0" / "rtn-a16w8.ckpt") == stored(GOLDEN / "rtn_a16w8_gs060.ckpt")
    said = yaml.safe_load((out / "predict_llama2_13b_rtn-a16w8.yaml").read_text())
    assert said["trainer"]["model_name"] == "llama2_13b_rtn-a16w8"
    assert said["model"]["model_config"]["quantization_config"]["quant_method"] == "rtn"
    assert said["model"]["model_config"]["intermediate_size"] == 512
    again = run("-c", predict(tmp_path), "-q", "rtn-a16w8")
    assert again.exit_code != 0
    assert "exists already" in again.output
    assert run("-c", predict(tmp_path), "-q", "rtn-a16w8", "--overwrite").exit_code == 0


def test_ptq_of_1_2_writes_what_that_wrote(tmp_path: Path) -> None:
    flags = ("-q", "ptq", "-w", "int4", "-wg", "per_group", "-g", 64, "-b", "lm_head")
    data = tmp_path / "dev.jsonl"
    data.write_text("{}\n")
    done = run("-c", predict(tmp_path), "-t", "boolq", "-s", data, *flags)
    assert done.exit_code == 0, done.output
    out = tmp_path / "output" / "llama2_13b_ptq_float16_no_smooth_a16_w4_per_group_ckpt"
    assert stored(out / "rank_0" / "ptq.ckpt") == stored(GOLDEN / "ptq_a16w4_pg_gs120.ckpt")


def test_rows_stay_fused_where_the_yaml_says_so(tmp_path: Path) -> None:
    path = predict(tmp_path, model={"model_config": {**MODEL, "qkv_concat": True}, "arch": {"type": "LlamaForCausalLM"}})
    assert run("-c", path, "-q", "rtn-a16w8").exit_code == 0
    found = stored(tmp_path / "output" / "llama2_13b_rtn-a16w8_ckpt" / "rank_0" / "rtn-a16w8.ckpt")
    assert "model.layers.0.attention.w_qkv._handler.weight" in found


def test_a_list_of_names_is_taken_as_the_script_takes_it() -> None:
    assert split_lists(["-q", "ptq", "-b", "w2", "lm_head", "-w", "int8"]) == ["-q", "ptq", "-b", "w2", "-b", "lm_head", "-w", "int8"]
    assert split_lists(["-b", "-q", "ptq"]) == ["-q", "ptq"]


SCRIPT = {
    ("rtn-a16w8", "gs0.6"): "m_rtn-a16w8_ckpt",
    ("rtn-a16w8", "gs1.2"): "m_rtn-a16w8_float16_ckpt",
    ("smooth_quant", "gs0.6"): "m_smooth_quant_ckpt",
}


@pytest.mark.parametrize(("approach", "version"), SCRIPT)
def test_where_the_script_writes(approach: str, version: str) -> None:
    assert folder_name("m", approach, {}, version, "float16") == SCRIPT[approach, version]


def test_where_the_script_writes_ptq() -> None:
    def named(version: str, *flags: Any) -> str:
        return folder_name("m", "ptq", settings_of("ptq", *flags, ()), version, "float16")

    assert named("gs0.6", "int8", "int8", "int8", "smooth", "none", PLAIN, 0) == "m_ptq_smooth_a8w8c8_ckpt"
    assert named("gs0.6", "int8", "none", "none", "none", "none", PLAIN, 0) == "m_ptq_no_smooth_a16w8_ckpt"
    group = ("per_tensor", "per_group", "per_channel")
    assert named("gs1.2", "int4", "none", "none", "awq", "none", group, 128) == "m_ptq_float16_awq_a16_w4_per_group_ckpt"
    assert named("gs1.2", "int4", "none", "none", "none", "gptq", group, 128) == "m_ptq_float16_no_smooth_gptq_a16_w4_per_group_ckpt"
    token = ("per_token", "per_channel", "per_channel")
    wanted = "m_ptq_float16_smooth_a8dyn_per_token_w8_per_channel_c8_per_channel_ckpt"
    assert named("gs1.2", "int8", "int8", "int8", "smooth", "none", token, 0) == wanted


def test_what_the_flags_say() -> None:
    assert settings_of("smooth_quant", "none", "none", "none", "none", "none", PLAIN, 0, ())["modules_to_not_convert"] == ["lm_head", "w2"]
    found = settings_of("ptq", "int4", "none", "none", "awq", "none", ("per_tensor", "per_group", "per_channel"), 64, ("w2",))
    assert (found["w_bit"], found["group_size"], found["w_sym"], found["modules_to_not_convert"]) == (4, 64, False, ["w2"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("-q omni_quant", "-q omni_quant: wanted rtn-a16w8, rtn-c8, smooth_quant, ptq"),
        ("-q ptq -w int2", "-w int2: wanted int8, int4, none"),
        ("-q ptq -w int8 -g 64", "-g 64: goes with -wg per_group"),
        ("-q ptq -w int8 -k int8 -kvg per_token", "-kvg per_token: such a KV cache has no tensors"),
        ("-q ptq -w int8 -a int8 -o outlier-suppression+", "'outlier-suppression+' is not done here"),
        ("-q ptq -w int4 --golden_stick 0.6", "--golden_stick 0.6: has no words for these flags; wanted 1.2"),
        ("-q rtn-a16w8 --golden_stick 2", "--golden_stick 2: is not read here"),
        ("-q rtn-a16w8 -d dumps", "-d dumps: the tool's dumps"),
        ("-q smooth_quant", "needs calibration data; pass -t boolq -s dev.jsonl"),
        ("-q smooth_quant -t squad1.1 -s x", "-t squad1.1: is not read here; boolq is"),
        ("-q ptq", "nothing would be quantized"),
    ],
)
def test_flags_that_cannot_be_are_one_sentence(flags: str, words: str, tmp_path: Path) -> None:
    done = run("-c", predict(tmp_path), *flags.split())
    assert done.exit_code in {2, 3}, done.output
    assert words in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"load_checkpoint": ""}, UsageError, "load_checkpoint is empty"),
        ({"load_checkpoint": "nowhere.ckpt"}, UnreadableError, "there is no such file or folder"),
        ({"model": {"model_config": MODEL, "arch": {"type": "GPT2"}}}, RefusedError, r"model\.arch\.type is 'GPT2'"),
        (
            {"model": {"model_config": {**MODEL, "num_heads": "8"}, "arch": {"type": "LlamaForCausalLM"}}},
            UnreadableError,
            "num_heads is '8'",
        ),
        (
            {"model": {"model_config": {**MODEL, "extend_method": "NTK"}, "arch": {"type": "LlamaForCausalLM"}}},
            RefusedError,
            "extend_method NTK stretches positions",
        ),
        ({"model": None}, UnreadableError, "has no model, or none that is a mapping"),
        ({"trainer": {"model_name": "../../x"}}, UnreadableError, "a name for a folder was wanted"),
    ],
)
def test_yaml_that_names_no_model_is_one_sentence(changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        open_model(predict(tmp_path, **changes))


def test_yaml_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    with pytest.raises(UsageError, match="there is no such YAML file"):
        open_model(path)
    for text, words in (("[1]", "is no MindFormers configuration"), ("a: &x 1\nb: *x\n", r"line 2: an alias \*x"), ("a: [", "is no YAML")):
        path.write_text(text)
        with pytest.raises(UnreadableError, match=words):
            open_model(path)


def test_the_config_is_made_of_the_yaml(tmp_path: Path) -> None:
    model = open_model(predict(tmp_path))
    config = model.location.json("config.json")
    assert config is not None
    assert (config["intermediate_size"], config["num_key_value_heads"], config["model_type"]) == (512, 4, "llama")
    assert (model.name, model.qkv_concat, model.output_dir) == ("llama2_13b", False, tmp_path / "output")

"""Run by an engine's own interpreter, never imported: log-probabilities and greedy tokens of one model folder.

    python serve_engine.py JOB.json

It imports nothing of Weighbridge, which that interpreter does not have; ``serving`` says what is asked, ``serving_children`` runs this
and reads the answer. The job is a JSON object:

| key | |
| --- | --- |
| engine | "vllm", "transformers", "gptqmodel", "lmdeploy"; "reference": transformers with the inputs of layers quantized as told |
| model, dtype, device | the folder; torch's name of a dtype, or "auto"; "cpu" or "cuda" (vLLM and LMDeploy decide for themselves) |
| prompts, fallback | a list of texts and lists of token ids; the ids to take if the folder's tokenizer cannot read the texts |
| length, tokens | at most so many ids of a text; tokens to generate after each prompt |
| vocabulary | size of the vocabulary |
| activations | reference: by module, how its inputs are quantized (``quantize_inputs``) |
| chosen | reference: the tokens that the engine chose |
| cpu, mask_amx, threads, tp | vLLM built for CPUs; hide AMX from it; threads; ranks of tensor parallelism |
| answer, scores | files to write: a JSON object, and float32 [positions, vocabulary] log-probabilities as .npy |

A prompt of n ids has n - 1 positions: what the model says after each id but the last. Nothing is fetched, no code of the folder is
run. It ends when its standard input does, so that it does not outlive whoever started it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

Ids = list[int]


def module(name: str) -> Any:
    """A package of the engine's environment."""
    return importlib.import_module(name)


class Engine:
    """A loaded model. ``device``: where it runs, for people; ``kernels``: what computes its quantized layers, as far as known."""

    device = "cpu"
    kernels: tuple[str, ...] = ()

    def __init__(self, job: dict[str, Any], prompts: list[Ids]) -> None:
        raise NotImplementedError

    def answer(self, number: int, ids: Ids) -> tuple[Any, Ids]:
        """([len(ids) - 1, vocabulary] float32 log-probabilities, greedy tokens) of prompt ``number``."""
        raise NotImplementedError


class Vllm(Engine):
    """vLLM, in this process."""

    def __init__(self, job: dict[str, Any], prompts: list[Ids]) -> None:
        torch = module("torch")
        if job["cpu"]:
            if job["mask_amx"]:  # its int8 kernel for AMX ignores static input scales
                torch.cpu._is_amx_tile_supported = torch.cpu._is_amx_fp16_supported = lambda: False
            elif hasattr(torch.cpu, "_init_amx"):  # else the kernels for AMX may die: tiles must be asked of the kernel first
                torch.cpu._init_amx()
            torch.set_num_threads(job["threads"])
        self.vllm = module("vllm")
        self.vocabulary, self.tokens = int(job["vocabulary"]), int(job["tokens"])
        room = -(-max(128, 1 + self.tokens + max(map(len, prompts))) // 16) * 16
        self.model = self.vllm.LLM(
            model=job["model"], dtype=job["dtype"], trust_remote_code=False, skip_tokenizer_init=True, enforce_eager=True, seed=0,
            max_model_len=room, max_num_batched_tokens=room, max_num_seqs=4, max_logprobs=self.vocabulary, enable_prefix_caching=False,
            tensor_parallel_size=job["tp"],
        )  # fmt: skip
        self.device = "cpu" if job["cpu"] else str(torch.cuda.get_device_name(0))

    def answer(self, number: int, ids: Ids) -> tuple[Any, Ids]:
        numpy = module("numpy")
        wanted: dict[str, Any] = {
            "temperature": 0, "max_tokens": self.tokens, "prompt_logprobs": self.vocabulary, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip
        try:  # objects per position and token are many: some versions can do without
            wanted = self.vllm.SamplingParams(**wanted, flat_logprobs=True)
        except TypeError:
            wanted = self.vllm.SamplingParams(**wanted)
        (done,) = self.model.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)
        scores = numpy.full((len(ids) - 1, self.vocabulary), numpy.nan, numpy.float32)
        said = done.prompt_logprobs
        if hasattr(said, "start_indices"):
            for row in range(1, len(ids)):
                part = slice(said.start_indices[row], said.end_indices[row])
                scores[row - 1, said.token_ids[part]] = said.logprobs[part]
        else:
            for row in range(1, len(ids)):
                for token, one in said[row].items():
                    scores[row - 1, token] = one.logprob
        return scores, list(done.outputs[0].token_ids)


class Transformers(Engine):
    """transformers, and what shares its models."""

    def __init__(self, job: dict[str, Any], prompts: list[Ids]) -> None:
        torch = module("torch")
        torch.set_num_threads(job["threads"])
        self.torch, self.job = torch, job
        self.device = job["device"]
        self.model = self.load()
        self.model.eval()
        quantized = [one for one in self.model.modules() if hasattr(one, "qweight") or hasattr(one, "weight_scale")]
        self.kernels = tuple(sorted({type(one).__name__ for one in quantized}))

    def load(self) -> Any:
        transformers = module("transformers")
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        dtype = self.job["dtype"]
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        options["dtype" if version >= (4, 56) else "torch_dtype"] = dtype if dtype == "auto" else getattr(self.torch, dtype)
        config = json.loads(Path(self.job["model"], "config.json").read_text("utf-8")).get("quantization_config") or {}
        with_backends = _has("gptqmodel") and self.job["device"] == "cpu"
        if with_backends and config.get("quant_method") in {"awq", "gptq"}:  # the kernel chosen otherwise rounds to bfloat16 on the way
            gptq = config["quant_method"] == "gptq"
            options["quantization_config"] = (
                transformers.GPTQConfig(bits=int(config["bits"]), backend="torch") if gptq else transformers.AwqConfig(backend="torch_awq")
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(self.job["model"], **options)
        return model.to(self.device)

    def answer(self, number: int, ids: Ids) -> tuple[Any, Ids]:
        with self.torch.no_grad():
            said = self.model(input_ids=self.torch.tensor([ids], device=self.device), use_cache=True)
            scores = self.scores(said.logits[0, :-1])
            tokens: Ids = []
            while len(tokens) < self.job["tokens"]:
                last = self.scores(said.logits[0, -1:])[0]
                tokens.append(int(last.argmax()))
                self.choose(number, tokens, last)
                after = self.torch.tensor([tokens[-1:]], device=self.device)
                said = self.model(input_ids=after, past_key_values=said.past_key_values, use_cache=True)
        return scores, tokens

    def scores(self, logits: Any) -> Any:
        """float32 NumPy log-probabilities."""
        return self.torch.log_softmax(logits.double(), -1).float().cpu().numpy()

    def choose(self, number: int, tokens: Ids, scores: Any) -> None:
        """Take note of a greedy token; ``scores`` are those that it was chosen by."""


class Reference(Transformers):
    """transformers in float32 on a dequantized folder. ``margins``: of each prompt None, or by how much the first token that the
    engine chose otherwise is less likely than the one chosen here."""

    def __init__(self, job: dict[str, Any], prompts: list[Ids]) -> None:
        super().__init__(job, prompts)
        self.margins: list[float | None] = [None] * len(prompts)
        modules = dict(self.model.named_modules())
        missing = [name for name in job["activations"] if name not in modules]
        if missing:
            raise LookupError(f"the reference model has no module {missing[0]}, whose inputs are quantized ({len(missing)} of them)")
        for name, facts in job["activations"].items():
            modules[name].register_forward_pre_hook(self.hook(facts))

    def hook(self, facts: dict[str, Any]) -> Any:
        """What quantizes a module's input before it is used."""
        facts = {key: self.torch.tensor(value, device=self.device) if isinstance(value, list) else value for key, value in facts.items()}
        return lambda linear, inputs: (quantize_inputs(self.torch, inputs[0], facts), *inputs[1:])

    def choose(self, number: int, tokens: Ids, scores: Any) -> None:
        theirs = self.job["chosen"][number]
        place = len(tokens) - 1
        if self.margins[number] is None and place < len(theirs) and theirs[:place] == tokens[:place] and theirs[place] != tokens[place]:
            self.margins[number] = float(scores[tokens[place]] - scores[theirs[place]])


class GptqModel(Transformers):
    """GPTQModel, which reads quantize_config.json and config.json by itself."""

    def load(self) -> Any:
        tool = module("gptqmodel")
        config = json.loads(Path(self.job["model"], "config.json").read_text("utf-8")).get("quantization_config") or {}
        plain = {"awq": ("AWQ_TORCH", "TORCH_AWQ"), "gptq": ("GPTQ_TORCH", "TORCH")}.get(str(config.get("quant_method")), ())
        backends = [getattr(tool.BACKEND, name) for name in plain if hasattr(tool.BACKEND, name)]
        options: dict[str, Any] = {"backend": backends[0]} if backends and self.device == "cpu" else {}
        if self.job["dtype"] != "auto":
            options["dtype"] = getattr(self.torch, self.job["dtype"])
        return tool.GPTQModel.load(self.job["model"], device=self.device, trust_remote_code=False, **options).model


class Lmdeploy(Engine):
    """LMDeploy's TurboMind, or its PyTorch engine for what that refuses. Written from the source of 0.18.0; no GPU has run it."""

    def __init__(self, job: dict[str, Any], prompts: list[Ids]) -> None:
        torch = module("torch")
        if not torch.cuda.is_available():  # else it would end the process without a word
            raise RuntimeError(
                "LMDeploy runs on a GPU alone, and torch finds none here; use another --engine, or run it where there is one"
            )
        tool = module("lmdeploy")
        room = max(128, 1 + job["tokens"] + max(map(len, prompts)))
        backend = tool.TurbomindEngineConfig(dtype=job["dtype"], tp=job["tp"], session_len=room, max_batch_size=4)
        self.torch, self.tokens = torch, int(job["tokens"])
        self.pipe = tool.pipeline(job["model"], backend_config=backend, trust_remote_code=False)
        self.device = str(torch.cuda.get_device_name(0))

    def scores(self, ids: Ids) -> Any:
        coroutine = self.pipe.async_engine.async_get_logits(input_ids=[list(ids)])
        (logits,) = self.pipe._run(coro=coroutine).result()
        logits = logits.reshape(-1, logits.shape[-1])[: len(ids)]
        return self.torch.log_softmax(logits.double(), -1).float().cpu().numpy()

    def answer(self, number: int, ids: Ids) -> tuple[Any, Ids]:
        said = self.scores(ids)
        tokens = [int(said[-1].argmax())]
        while len(tokens) < self.tokens:
            tokens.append(int(self.scores(ids + tokens)[-1].argmax()))
        return said[:-1], tokens[: self.tokens]


ENGINES = {"vllm": Vllm, "transformers": Transformers, "gptqmodel": GptqModel, "lmdeploy": Lmdeploy, "reference": Reference}


def quantize_inputs(torch: Any, x: Any, facts: dict[str, Any]) -> Any:
    """``x`` [..., in] quantized and dequantized again, in float32, as an engine's kernel does.

    facts   element: "int" or "e4m3"; bits; dynamic; symmetric; strategy: "tensor" or "token" (dynamic ones);
            steps: what the largest value becomes (dynamic symmetric ones), if not the largest code;
            scale, zero_point: tensors [1] or [in] (static ones); smooth: None or [in], multiplied in before
    """
    dtype, value = x.dtype, x.float()
    smooth = facts.get("smooth")
    if smooth is not None:
        value = value * smooth
    high = 448.0 if facts["element"] == "e4m3" else float(2 ** (facts["bits"] - 1) - 1)
    low = -high if facts["element"] == "e4m3" else -high - 1
    zero: Any = 0.0
    if not facts["dynamic"]:
        scale = facts["scale"].float()
        if facts.get("zero_point") is not None:
            zero = facts["zero_point"].float()
    elif facts["symmetric"]:
        largest = value.abs().amax(-1, keepdim=True) if facts["strategy"] == "token" else value.abs().amax()
        scale = largest.clamp(min=1e-10) / facts.get("steps", high)
    else:
        axis = {"dim": -1, "keepdim": True} if facts["strategy"] == "token" else {}
        least, largest = value.amin(**axis), value.amax(**axis)
        scale = (largest - least).clamp(min=1e-10) / (high - low)
        zero = (low - least / scale).round()
    if facts["element"] == "e4m3":
        value = (value / scale).clamp(low, high).to(torch.float8_e4m3fn).float() * scale
    else:
        value = (((value / scale).round() + zero).clamp(low, high) - zero) * scale
    return (value if smooth is None else value / smooth).to(dtype)


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def read_prompts(job: dict[str, Any]) -> tuple[list[Ids], bool]:
    """(token ids of every prompt, whether the tokenizer was used)."""
    if not any(isinstance(one, str) for one in job["prompts"]):
        return job["prompts"], False
    try:
        tokenizer = module("transformers").AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False, local_files_only=True)
        found = [tokenizer(one)["input_ids"][: job["length"]] if isinstance(one, str) else one for one in job["prompts"]]
        short = next((one for one in found if len(one) < 2), None)
        if short is not None:
            raise ValueError(f"a prompt has {len(short)} tokens; wanted two or more")
        if max(map(max, found)) >= job["vocabulary"]:
            raise ValueError(f"the tokenizer has the token {max(map(max, found))}, and the model {job['vocabulary']}")
    except Exception:
        if job["fallback"] is None:
            raise
        traceback.print_exc()
        return job["fallback"], False
    return found, True


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load the model, ask it everything, write the scores; the answer."""
    numpy = module("numpy")
    begin = time.monotonic()
    prompts, tokenized = read_prompts(job)
    engine = ENGINES[job["engine"]](job, prompts)
    loaded = time.monotonic()
    scores, tokens = [], []
    for number, ids in enumerate(prompts):
        said, chosen = engine.answer(number, ids)
        scores.append(said)
        tokens.append(chosen)
    numpy.save(job["scores"], numpy.concatenate(scores).astype(numpy.float32), allow_pickle=False)
    return {
        "prompts": prompts,
        "tokenized": tokenized,
        "tokens": tokens,
        "margins": getattr(engine, "margins", None),
        "device": engine.device,
        "kernels": list(engine.kernels),
        "load_seconds": loaded - begin,
        "run_seconds": time.monotonic() - loaded,
    }


def watch_parent() -> None:
    """End this process group when standard input ends."""
    while sys.stdin.buffer.read(4096):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Do the job that the first argument names; every failure is part of the answer."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != os.path.dirname(os.path.abspath(__file__))]
    threading.Thread(target=watch_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    status = 0
    try:
        answer = run(job)
    except BaseException as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error) or f"{last.line} ({os.path.basename(last.filename)}, line {last.lineno})"  # a bare assertion
        answer, status = {"error": f"{type(error).__name__}: {said}"}, 1
    part = Path(job["answer"] + ".part")
    part.write_text(json.dumps(answer), "utf-8")
    part.replace(job["answer"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an engine's threads and workers may not let it end; who waits kills what is left of the group


if __name__ == "__main__":
    main()

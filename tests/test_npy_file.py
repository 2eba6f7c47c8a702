"""msModelSlim's numpy folders: what the real tool wrote, equal to its safetensors twin; and pickles that a stranger may send."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES

from formats import pickle_tree
from formats.checkpoint import Location
from formats.errors import UnreadableError
from formats.npy_file import NpyFile, numpy_tensors, numpy_types
from formats.safetensors_file import DTYPES, SafetensorsFile

WHOLE = FIXTURES / "msmodelslim_w8" / "w8a8_numpy_nobias_fp16"
WITH_BIASES = FIXTURES / "msmodelslim_w8" / "w8a8_numpy_fp16"
TWIN = FIXTURES / "msmodelslim_w8" / "w8a8_static_ascendv1_fp16"
"""The same model, quantized by the same call, saved as safetensors (whose W8A8 is not packed)."""

MIB = 1 << 20


def word(length: int) -> Callable[[int], bytes]:
    return lambda number: number.to_bytes(length, "little")


def dump(value: Any) -> bytes:
    """A pickle's instructions for a value of plain types; bytes stand for instructions made elsewhere."""
    match value:
        case bytes():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)
        case str():
            return b"X" + word(4)(len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(dump, value)) + b"t"
        case list():
            return b"](" + b"".join(map(dump, value)) + b"e"
        case dict():
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
    raise TypeError(value)


def data(value: bytes) -> bytes:
    return b"B" + word(4)(len(value)) + value


def called(name: str, *arguments: Any, state: Any = None) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + dump(arguments) + b"R" + (b"" if state is None else dump(state) + b"b")


def program(value: Any, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + dump(value) + b"."


def storage(elements: bytes, count: int, kind: str = "HalfStorage", /, **other: Any) -> bytes:
    """What torch.save wrote before torch 1.6."""
    described = ("storage", f"ctorch\n{kind}\n".encode(), "7", "cpu", count, None)
    parts = {
        "magic": program(0x1950A86A20F9469CFC6C),
        "protocol": program(1001),
        "machine": program({"protocol_version": 1001, "little_endian": True}),
        "storage": b"\x80\x02" + dump(described) + b"Q.",
        "keys": program(["7"]),
        "count": word(8)(count),
        "elements": elements,
    }
    return b"".join({**parts, **other}.values())


def tensor(stored: bytes, shape: Any, stride: Any, offset: Any = 0) -> bytes:
    loaded = called("torch.storage._load_from_bytes", data(stored))
    return called("torch._utils._rebuild_tensor_v2", loaded, offset, shape, stride, False, called("collections.OrderedDict"))


def half(values: list[float], shape: Any = None, stride: Any = (1,), **other: Any) -> bytes:
    elements = np.asarray(values, "<f2").tobytes()
    return tensor(storage(elements, len(values), **other), (len(values),) if shape is None else shape, stride)


def array(content: Any, reconstruct: str = "numpy._core.multiarray._reconstruct") -> bytes:
    kind = called("numpy.dtype", "O8", False, True, state=(3, "|", None, None, None, -1, -1, 63))
    return program(called(reconstruct, b"cnumpy\nndarray\n", (0,), data(b"b"), state=(1, (), kind, False, [content])))


HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"


def npy(pickled: bytes, header: bytes = HEADER) -> bytes:
    return b"\x93NUMPY\x01\x00" + word(2)(len(header)) + header + pickled


def opened(folder: Path, content: bytes) -> NpyFile:
    path = folder / "quant_weight.npy"
    path.write_bytes(content)
    return NpyFile(path)


# What the real tool wrote.


def test_a_numpy_folder_holds_what_its_safetensors_twin_holds() -> None:
    found = numpy_tensors(Location.of(WHOLE))
    twin = SafetensorsFile(TWIN / "quant_model_weight_w8a8.safetensors")
    assert set(found) == set(twin.tensors)
    for name, info in twin.tensors.items():
        mine = found[name]
        assert (mine.dtype, mine.shape, mine.nbytes) == (info.dtype, info.shape, info.nbytes), name
        assert found.array(name).tobytes() == twin.array(name).tobytes(), name


def test_the_types_are_those_of_the_twin_s_description() -> None:
    import json

    description = json.loads((TWIN / "quant_model_description.json").read_text())
    types = numpy_types(numpy_tensors(Location.of(WHOLE)))
    assert types == {name: description[name] for name in types}
    assert set(types) == {name for name, type_ in description.items() if "." in name}


def test_tensors_stay_in_the_file_until_they_are_asked_for() -> None:
    file = NpyFile(WHOLE / "quant_weight.npy")
    name = "model.layers.0.mlp.down_proj"
    info = file.tensors[name]
    stored = (WHOLE / "quant_weight.npy").read_bytes()[info.begin : info.end]
    corner = file.tensor(name).read(slice(3, 5), slice(1, 4))  # type: ignore[union-attr]
    assert np.array_equal(corner, np.frombuffer(stored, "i1").reshape(info.shape)[3:5, 1:4])
    assert file.exempt == 0


def test_torch_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert numpy_types(numpy_tensors(Location.of(WHOLE)))["model.layers.0.mlp.up_proj.weight"] == "W8A8"


def test_weights_that_their_biases_replaced_are_named() -> None:
    found = numpy_tensors(Location.of(WITH_BIASES))
    source = SafetensorsFile(FIXTURES / "compressed_tensors" / "src_qwen2_bf16" / "model.safetensors")
    for layer in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{layer}"
        assert f"{name}.weight" not in found
        assert found.array(f"{name}.bias").tobytes() == source.array(f"{name}.bias").astype("<f2").tobytes()
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == "I8"
    why = (
        r"^model\.layers\.0\.self_attn\.q_proj: its bias lies in quant_weight\.npy .* and of 2 more layers: .*save_type=\['safe_tensor'\]$"
    )
    with pytest.raises(UnreadableError, match=why):
        numpy_types(found)


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    shutil.copyfile(WHOLE / "deq_scale.npy", tmp_path / "deq_scale.npy")
    file = NpyFile(tmp_path / "deq_scale.npy")
    assert file.unchanged()
    assert file.identity.size == (tmp_path / "deq_scale.npy").stat().st_size
    os.utime(tmp_path / "deq_scale.npy", ns=(1, 1))
    assert not file.unchanged()


# What it may write elsewhere: other NumPy and torch versions, other quantization types.


def test_numpy_1_and_tensors_that_are_no_parameters_are_read(tmp_path: Path) -> None:
    file = opened(tmp_path, npy(array({"a": half([1, 2, 3])}, "numpy.core.multiarray._reconstruct")))
    assert np.asarray(file.tensor("a")).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("HalfStorage", "F16"), ("BFloat16Storage", "BF16"), ("FloatStorage", "F32"), ("CharStorage", "I8"), ("LongStorage", "I64")],
)
def test_every_element_type_keeps_its_bytes(kind: str, dtype: str, tmp_path: Path) -> None:
    elements = np.arange(6, dtype="u1").repeat(DTYPES[dtype].itemsize).tobytes()
    file = opened(tmp_path, npy(array({"a": tensor(storage(elements, 6, kind), (2, 3), (3, 1))})))
    assert file.tensors["a"].dtype == dtype
    assert np.asarray(file.tensor("a")).tobytes() == elements


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "wanted"),
    [
        ((2, 3), (1, 2), 0, [[0, 2, 4], [1, 3, 5]]),
        ((2, 2), (0, 1), 1, [[1, 2], [1, 2]]),
        ((2, 1), (1, 1), 3, [[3], [4]]),
        ((1, 3), (9, 1), 3, [[3, 4, 5]]),
        ((), (), 5, 5),
        ((0, 3), (3, 1), 6, []),
    ],
)
def test_views_are_read_as_what_they_show(shape: Any, stride: Any, offset: int, wanted: Any, tmp_path: Path) -> None:
    stored = storage(np.arange(6, dtype="<f2").tobytes(), 6)
    file = opened(tmp_path, npy(array({"a": tensor(stored, shape, stride, offset)})))
    found = np.asarray(file.tensor("a"))
    assert found.shape == shape
    assert found.tolist() == wanted


def folder(path: Path, **files: dict[str, bytes]) -> Location:
    for stem, tensors in files.items():
        (path / f"{stem}.npy").write_bytes(npy(array(tensors)))
    return Location.of(path)


def codes(values: list[int]) -> bytes:
    return tensor(storage(np.asarray(values, "i1").tobytes(), len(values), "CharStorage"), (1, len(values)), (len(values), 1))


def test_types_are_told_by_what_is_there(tmp_path: Path) -> None:
    one = half([1], (1, 1), (1, 1))
    where = folder(
        tmp_path,
        quant_weight={"m.0.a": codes([-8, 7]), "m.0.b": codes([-9, 7]), "m.0.c": codes([1, 2]), "m.0.d": one, "m.0.norm": half([1])},
        weight_scale={"m.0.a": one, "m.0.b": one},
        weight_offset={"m.0.a": one},
        deq_scale={"m.0.c": half([1])},
        kv_cache_scale={"m.0.k_proj.kv_cache_scale": half([1])},
        fa_quant_scale={"m.0.fa_q.scale": half([1])},
    )
    assert numpy_types(numpy_tensors(where)) == {
        "m.0.a.weight": "W4A16", "m.0.a.weight_scale": "W4A16", "m.0.a.weight_offset": "W4A16",
        "m.0.b.weight": "W8A16", "m.0.b.weight_scale": "W8A16",
        "m.0.c.weight": "W8A8S", "m.0.c.deq_scale": "W8A8S",
        "m.0.d.weight": "FLOAT", "m.0.norm.weight": "FLOAT",
        "m.0.k_proj.kv_cache_scale": "C8", "m.0.fa_q.scale": "FAQuant",
    }  # fmt: skip


def test_an_offset_beyond_4_bits_makes_a_layer_8_bits(tmp_path: Path) -> None:
    where = folder(tmp_path, quant_weight={"a.0.b": codes([1])}, weight_offset={"a.0.b": half([8], (1, 1), (1, 1))})
    assert numpy_types(numpy_tensors(where))["a.0.b.weight"] == "W8A16"


def test_the_bias_of_a_norm_s_copy_is_a_bias(tmp_path: Path) -> None:
    norms = {"m.0.norm.weight": half([1]), "m.0.norm.bias": half([0])}
    found = numpy_tensors(folder(tmp_path, quant_weight={"m.0.norm.module": half([0])}, anti_fp_norm=norms))
    assert set(found) == {"m.0.norm.module.bias", *norms}
    assert set(numpy_types(found).values()) == {"FLOAT"}


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"m\.norm\.weight.*again in"):
        numpy_tensors(folder(tmp_path, quant_weight={"m.norm": half([1])}, anti_fp_norm={"m.norm.weight": half([1])}))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="has no quant_weight"):
        numpy_tensors(folder(tmp_path, deq_scale={}))


# What a stranger may send.


class Payload:
    """What a hostile pickle would run."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


def real_array(content: Any) -> bytes:
    """What NumPy itself writes for the object."""
    buffer, holder = io.BytesIO(), np.empty((), object)
    holder[()] = content
    np.save(buffer, holder, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("inside", [False, True])
def test_a_payload_is_named_and_not_run(protocol: int, inside: bool, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickled = pickle.dumps({"a": Payload(os.system, f"touch '{mark}'")}, protocol)
    content = npy(array({"a": tensor(pickled, (1,), (1,))}) if inside else pickled)
    with pytest.raises(UnreadableError, match=r"^quant_weight\.npy: .*nothing was run: do not trust this file$"):
        opened(tmp_path, content)
    assert not mark.exists()


def test_a_payload_beside_tensors_in_numpy_s_own_file_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(UnreadableError, match=r"names '\w+\.system'"):
        opened(tmp_path, real_array({"a": 1, "b": Payload(os.system, f"touch '{mark}'")}))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "function"),
    [("builtins.eval", eval), ("builtins.getattr", getattr), ("_codecs.encode", "".encode), ("_pickle.loads", pickle.loads)],
)
def test_other_names_are_refused_as_soon_as_they_are_read(name: str, function: Any, tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=rf"names '{name.replace('.', chr(92) + '.')}'"):
        opened(tmp_path, npy(program(called(name, "1"))))


NESTED = 30_000
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no NumPy file"),
    "another magic": (b"\x93NUMPX\x01\x00" + bytes(200), "no NumPy file"),
    "version 9": (b"\x93NUMPY\x09\x00" + bytes(200), "no NumPy file"),
    "only a magic": (b"\x93NUMPY\x01\x00", "no NumPy file"),
    "header beyond the file": (b"\x93NUMPY\x01\x00\xff\x00" + b"{'descr'", "header claims 255"),
    "header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header claims 4294967295"),
    "floats": (npy(b"\0" * 8, b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }\n"), "wanted one object"),
    "several objects": (npy(b"", b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }\n"), "wanted one object"),
    "deep header": (npy(b"", b"(" * 900 + b"\n"), "wanted one object"),
    "a header that calls": (npy(b"", b"{'descr': __import__('os').system('ls'), 'shape': (), }\n"), "wanted one object"),
    "no pickle": (npy(b""), "needs 1 bytes more"),
    "not an array": (npy(program({"a": half([1])})), "no array of one object"),
    "an array of two": (npy(program(called("numpy.core.multiarray._reconstruct", state=(1, (2,), 0, False, [{}, {}])))), "no array of one"),
    "a list": (npy(array([half([1])])), "holds a list"),
    "a string": (npy(array({"a": "text"})), "'a' is a str"),
    "nothing": (npy(array({"a": None})), "'a' is a NoneType"),
    "numbers as keys": (npy(array(b"}(" + dump(1) + dump(2) + b"u")), "key that is no string"),
    "keys twice": (npy(array(b"}(" + (dump("a") + dump(2)) * 2 + b"u")), "key 'a' twice"),
    "a key without a value": (npy(array(b"}(" + dump("a") + b"u")), "no dictionary"),
    "bytes that follow": (npy(array({})) + b"x", "1 bytes follow"),
    "values left over": (npy(b"\x80\x02NN."), "values left over"),
    "nothing on the stack": (npy(b"\x80\x02."), "more values than it has"),
    "no mark": (npy(b"t."), "a mark that it has not set"),
    "an unkept value": (npy(b"h\x05."), "value 5, which it has not kept"),
    "calls a string": (npy(dump("a") + dump(()) + b"R."), "no function"),
    "appends to nothing": (npy(b"Na."), "takes more values"),
    "state of a dictionary": (npy(b"}Nb."), "cannot have one"),
    "a name without an end": (npy(b"ctorch" + b"x" * 3000), "does not end"),
    "a name of a number": (npy(dump("torch") + dump(1) + b"\x93."), "no string"),
    "not UTF-8": (npy(b"X\x01\0\0\0\xff."), "not UTF-8"),
    "a string of 4 GB": (npy(b"X\xff\xff\xff\xff"), "a string of 4294967295"),
    "a string of 2**63": (npy(b"\x8d" + b"\xff" * 8), "a string of 1844"),
    "bytes of 4 GB": (npy(b"B\xff\xff\xff\xff"), "holds 4294967295 bytes"),
    "bytes of 2**64": (npy(b"\x8e" + b"\xff" * 8), "holds 1844"),
    "a frame of 2**64": (npy(b"\x80\x04\x95" + b"\xff" * 8 + dump({}) + b"."), "no array"),
    "a number of 2 GB": (npy(b"\x8b\xff\xff\xff\x7f"), "instruction"),
    "protocol 255": (npy(b"\x80\xff"), "protocol 255"),
    "nested marks": (npy(b"(" * NESTED), "more steps"),
    "nested tuples": (npy(b"(" + b")" + b"\x85" * NESTED + b"\0" * NESTED * 2), "instruction"),
    "nested lists": (npy(b"]" * (NESTED // 4) + b"a" * (NESTED // 4 - 1) + b"." + b"\0" * NESTED), "bytes follow the pickle"),
    "a list that holds itself": (npy(b"]q\0h\0a."), "no array"),
    "tuples that double": (npy(b")" + b"".join(b"2" for _ in range(9))), "instruction"),
    "doubling by memory": (npy(b")" + b"q\0h\0\x86" * 5000 + b"." + b"\0" * 50_000), "bytes follow the pickle"),
    "doubling as a key": (npy(array(b"})" + b"q\0h\0\x86" * 300 + b"Ns")), "key that is no string"),
    "an endless loop of states": (npy(called("collections.OrderedDict", state=()) + b")b."), "cannot have one"),
    "extension": (npy(b"\x82\x01."), "instruction"),
    "an instance": (npy(b"(ios\nsystem\n."), "instruction"),
    "a build of a class": (npy(b"ctorch.storage\n_load_from_bytes\n)\x81."), "instruction"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_dictionary_of_tensors_is_one_sentence_in_little_memory(case: str, tmp_path: Path) -> None:
    content, why = DAMAGED[case]
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableError) as caught:
            opened(tmp_path, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith("quant_weight.npy: ")
    assert why in message
    assert len(message) < 400
    assert peak < 16 * MIB + 60 * len(content)
    assert time.monotonic() - started < 5


STORAGES: dict[str, tuple[dict[str, Any], str]] = {
    "another magic": ({"magic": program(7)}, "nothing that torch.save wrote"),
    "another protocol": ({"protocol": program(1002)}, "protocol 1001"),
    "big-endian": ({"machine": program({"little_endian": False})}, "protocol 1001"),
    "facts that are a list": ({"machine": program([])}, "protocol 1001"),
    "no storage": ({"storage": program({})}, "is a dict, wanted one storage"),
    "a view of a storage": (
        {"storage": b"\x80\x02" + dump(("storage", b"ctorch\nHalfStorage\n", "7", "cpu", 2, ())) + b"Q."},
        "wanted one",
    ),
    "a storage of quantized elements": ({"storage": program(b"ctorch\nQInt8Storage\n")}, "names 'torch.QInt8Storage'"),
    "a storage that is called": ({"storage": program(called("torch.HalfStorage", 3))}, "wanted one storage"),
    "two keys": ({"keys": program(["7", "8"])}, "not described as torch.save"),
    "another key": ({"keys": program(["8"])}, "not described as torch.save"),
    "a count of 2**63": ({"count": word(8)(1 << 63)}, "elements of F16"),
    "elements missing": ({"elements": b"\0\0"}, "has 2 bytes for 2 elements"),
    "elements left over": ({"elements": bytes(6)}, "has 6 bytes for 2 elements"),
    "no count": ({"count": b"", "elements": b""}, "are left"),
    "a program in place of keys": ({"keys": program(called("os.system", "touch ran"))}, "nothing was run"),
}


@pytest.mark.parametrize("case", STORAGES)
def test_a_storage_that_does_not_add_up_is_one_sentence(case: str, tmp_path: Path) -> None:
    changes, why = STORAGES[case]
    with pytest.raises(UnreadableError, match=r"^quant_weight\.npy: ") as caught:
        opened(tmp_path, npy(array({"a": half([1, 2], **changes)})))
    assert why in str(caught.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "why"),
    [
        ((3,), (1,), 0, "reaches to element 2 of the 2"),
        ((2,), (1,), 1, "reaches to element 2"),
        ((2,), (1,), -1, "no tensor has"),
        ((2,), (-1,), 1, "no tensor has"),
        ((-2,), (1,), 0, "no tensor has"),
        ((2,), (1, 1), 0, "no tensor has"),
        ((1 << 40, 1 << 40), (0, 0), 0, "no tensor has"),
        ((1 << 50,), (0,), 0, "does not lie in order"),
        ((2,), (1 << 59,), 0, "reaches to element"),
        ((True,), (1,), 0, "no tensor has"),
        ([2], (1,), 0, "no tensor has"),
        ((0,), (1,), 3, "reaches to element"),
        ((1,) * 33, (1,) * 33, 0, "no tensor has"),
        ("ab", (1, 1), 0, "no tensor has"),
    ],
)
def test_a_tensor_stays_inside_its_storage(shape: Any, stride: Any, offset: Any, why: str, tmp_path: Path) -> None:
    stored = storage(bytes(4), 2)
    with pytest.raises(UnreadableError, match=r"^quant_weight\.npy: tensor 'a'") as caught:
        opened(tmp_path, npy(array({"a": tensor(stored, shape, stride, offset)})))
    assert why in str(caught.value)


@pytest.mark.parametrize("name", ["quant_weight.npy", "weight_offset.npy"])
def test_every_cut_of_a_real_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    whole = (WHOLE / name).read_bytes()
    step = max(len(whole) // 211, 1)
    for length in range(0, len(whole), step):
        with pytest.raises(UnreadableError, match=r"^quant_weight\.npy: "):
            opened(tmp_path, whole[:length])


def test_a_changed_byte_is_one_sentence_or_harmless(tmp_path: Path) -> None:
    whole = bytearray((WHOLE / "input_offset.npy").read_bytes())
    random = np.random.default_rng(5)
    for position in random.choice(len(whole), 400, replace=False):
        changed = bytearray(whole)
        changed[position] ^= int(random.integers(1, 256))
        with contextlib.suppress(UnreadableError):
            file = opened(tmp_path, bytes(changed))
            assert all(np.asarray(file.tensor(key)).nbytes <= 64 for key in file.tensors)


def test_many_small_steps_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_tree, "MAX_STEPS", 50)
    with pytest.raises(UnreadableError, match="more steps"):
        opened(tmp_path, (WHOLE / "deq_scale.npy").read_bytes())


def test_much_text_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_tree, "MAX_TEXT", 50)
    with pytest.raises(UnreadableError, match="a string of"):
        opened(tmp_path, (WHOLE / "deq_scale.npy").read_bytes())


def test_a_large_tensor_costs_no_memory_to_open(tmp_path: Path) -> None:
    path, count = tmp_path / "quant_weight.npy", 256 * MIB
    stored = storage(b"", count, "CharStorage")
    loaded = b"ctorch.storage\n_load_from_bytes\n(B" + struct.pack("<I", len(stored) + count) + stored
    tail = b"tR" + dump(0) + dump((count,)) + dump((1,)) + dump(False) + called("collections.OrderedDict") + b"tR"
    whole = npy(array({"a": b"ctorch._utils\n_rebuild_tensor_v2\n(" + loaded + b"HOLE" + tail}))
    before, after = whole.split(b"HOLE")
    with path.open("wb") as file:
        file.write(before)
        file.seek(count, os.SEEK_CUR)
        file.write(after)
    tracemalloc.start()
    opened_file = NpyFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened_file.tensors["a"].shape == (count,)
    assert peak < MIB

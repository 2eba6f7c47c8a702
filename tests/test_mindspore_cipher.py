"""MindSpore's encrypted checkpoints: what the real one encrypted, both ways; keys; and blocks that are not what they say."""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore_records import record

from formats import mindspore_cipher
from formats.errors import UnreadableError, UsageError, WeighbridgeError
from formats.files import ReadableFile
from formats.mindspore_cipher import KEY, KEY_FILE, DecryptedFile, encrypt, find_key
from formats.mindspore_file import MindSporeFile
from formats.mindspore_output import lay_out_checkpoint, save, stream

GOLDENS = FIXTURES / "mindspore"
ENCRYPTED = sorted(path.name for path in GOLDENS.glob("enc_*.ckpt"))
MODES = ("AES-GCM", "AES-CBC", "SM4-CBC")
PLAIN = record("w", "Float32", (2, 3), np.arange(6, dtype="<f4").tobytes())
SPAN = {"AES-GCM": 48, "AES-CBC": 32, "SM4-CBC": 32}

unhurried = settings(deadline=None, max_examples=100)


def key_of(name: str) -> bytes:
    return bytes(range(int(Path(name).stem.rpartition("_")[2])))


def iv_of(content: bytes) -> bytes:
    """Of the first block."""
    begin = 28 if content[0] == 0xD8 else 12
    return content[begin : begin + 16]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (KEY, KEY_FILE):
        monkeypatch.delenv(variable, raising=False)


# What the real MindSpore encrypted.


def test_there_is_one_of_every_mode() -> None:
    assert {name.split("_")[1] for name in ENCRYPTED} == set(MODES)


@pytest.mark.parametrize("name", ENCRYPTED)
def test_a_golden_is_read(name: str) -> None:
    file = MindSporeFile(GOLDENS / name, key=key_of(name))
    assert file.encryption == name.split("_")[1]
    assert file.array("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.exempt > 0
    assert file.unchanged()
    with pytest.raises(UnreadableError, match="holds no CRC to check"):
        file.check_crc()


@pytest.mark.parametrize("name", ENCRYPTED)
def test_a_golden_is_written_byte_for_byte_with_its_iv(name: str) -> None:
    golden = (GOLDENS / name).read_bytes()
    file = MindSporeFile(GOLDENS / name, key=key_of(name))
    pieces = stream(lay_out_checkpoint([("w", "F32", (2, 3))], "w.ckpt"), file.tensor)
    assert b"".join(map(bytes, encrypt(pieces, name.split("_")[1], key_of(name), lambda count: iv_of(golden)))) == golden


# Blocks.


@unhurried
@given(st.sampled_from(MODES), st.integers(1, 200), st.lists(st.integers(0, 70), max_size=5), st.data())
def test_blocks_are_decrypted_where_they_are_read(
    tmp_path_factory: pytest.TempPathFactory, mode: str, size: int, cuts: list[int], data: st.DataObject
) -> None:
    plain = bytes(n * 7 % 256 for n in range(size))
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    path = tmp_path_factory.getbasetemp() / "blocks.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mindspore_cipher, "BLOCK", 64)
        pieces = [plain[begin:end] for begin, end in itertools.pairwise(bounds)]
        content = b"".join(map(bytes, encrypt(pieces, mode, bytes(16))))
        path.write_bytes(content)
        file = DecryptedFile(ReadableFile(path), bytes(16))
        assert (file.mode, file.size, bytes(file.read(0, size))) == (mode, size, plain)
        begin = data.draw(st.integers(0, size))
        end = data.draw(st.integers(begin, size))
        assert file.read(begin, end - begin) == plain[begin:end]
        with pytest.raises(UnreadableError, match="too early"):
            file.read(begin, size - begin + 1)
    full, rest = divmod(size, 64)
    padded = [64 + 16 * (mode != "AES-GCM")] * full + ([rest + (-rest % 16 or 16) * (mode != "AES-GCM")] if rest else [])
    assert len(content) == sum(SPAN[mode] + length for length in padded)


def test_the_nonces_of_blocks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_cipher, "BLOCK", 64)
    content = b"".join(map(bytes, encrypt([bytes(128)], "AES-GCM", bytes(16))))
    assert iv_of(content) != iv_of(content[SPAN["AES-GCM"] + 64 :])


def test_only_blocks_that_are_asked_for_are_decrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_cipher, "BLOCK", 1 << 16)
    array = np.arange(1 << 20, dtype=np.int32).reshape(1024, 1024)
    save(tmp_path / "w.ckpt", lay_out_checkpoint([("w", "I32", array.shape)], "w.ckpt"), lambda name: array, ("AES-GCM", bytes(32)))
    opened: list[int] = []
    real = DecryptedFile._decrypt
    monkeypatch.setattr(DecryptedFile, "_decrypt", lambda self, number: opened.append(number) or real(self, number))
    file = MindSporeFile(tmp_path / "w.ckpt", key=bytes(32))
    assert opened == [0]
    np.testing.assert_array_equal(file.tensor("w").read(slice(500, 502)), array[500:502])
    assert opened == [0, 31]
    np.testing.assert_array_equal(file.tensor("w").read(slice(500, 501), slice(7, 9)), array[500:501, 7:9])
    assert opened == [0, 31]
    assert file.exempt == 3 << 16


# Keys.


def test_the_key_is_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, key = GOLDENS / "enc_AES-GCM_32.ckpt", bytes(range(32))
    with pytest.raises(UnreadableError) as raised:
        MindSporeFile(path)
    assert str(raised.value) == (
        "enc_AES-GCM_32.ckpt: is encrypted; set WEIGHBRIDGE_MINDSPORE_KEY to its key in hexadecimal, "
        "or WEIGHBRIDGE_MINDSPORE_KEY_FILE to a file that holds the key alone"
    )
    monkeypatch.setenv(KEY, key.hex().upper())
    assert MindSporeFile(path).array("w").size == 6
    monkeypatch.delenv(KEY)
    (tmp_path / "key").write_bytes(key)
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    assert MindSporeFile(path).array("w").size == 6


@pytest.mark.parametrize(
    ("variable", "said", "message"),
    [
        (KEY, "secret", "WEIGHBRIDGE_MINDSPORE_KEY: is not hexadecimal; wanted 32, 48 or 64 digits, or WEIGHBRIDGE_MINDSPORE_KEY_FILE"),
        (KEY, "", "WEIGHBRIDGE_MINDSPORE_KEY: holds 0 bytes, wanted 16, 24, 32 for AES-GCM, and no line break behind them"),
        (KEY, "00" * 17, "WEIGHBRIDGE_MINDSPORE_KEY: holds 17 bytes, wanted 16, 24, 32 for AES-GCM, and no line break behind them"),
        (
            KEY_FILE,
            b"0" * 17,
            "WEIGHBRIDGE_MINDSPORE_KEY_FILE key: holds 17 bytes, wanted 16, 24, 32 for AES-GCM, and no line break behind them",
        ),
        (
            KEY_FILE,
            b"0" * 100,
            "WEIGHBRIDGE_MINDSPORE_KEY_FILE key: holds more than 64 bytes, wanted 16, 24, 32 for AES-GCM, and no line break behind them",
        ),
        (KEY_FILE, None, "cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, said: Any, message: str) -> None:
    if isinstance(said, bytes):
        (tmp_path / "key").write_bytes(said)
    monkeypatch.setenv(variable, said if isinstance(said, str) else str(tmp_path / "key"))
    with pytest.raises(UsageError) as raised:
        find_key("w.ckpt")
    assert str(raised.value).endswith(message)
    assert "secret" not in str(raised.value)


def test_two_keys_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "00" * 16)
    monkeypatch.setenv(KEY_FILE, "key")
    with pytest.raises(UsageError, match="both are set"):
        find_key("w.ckpt")


def test_sm4_takes_keys_of_16_bytes() -> None:
    with pytest.raises(UsageError, match="holds 32 bytes, wanted 16 for SM4-CBC"):
        MindSporeFile(GOLDENS / "enc_SM4-CBC_16.ckpt", key=bytes(32))
    with pytest.raises(UsageError, match="holds 32 bytes, wanted 16 for SM4-CBC"):
        list(encrypt([b"x"], "SM4-CBC", bytes(32)))
    with pytest.raises(UsageError, match="the mode 'AES-ECB': wanted AES-GCM, AES-CBC, SM4-CBC"):
        list(encrypt([b"x"], "AES-ECB", bytes(16)))


@pytest.mark.parametrize("name", ENCRYPTED)
def test_another_key_does_not_open_it(name: str) -> None:
    """CBC does not tell, so that what is decrypted, or its padding, must."""
    for first in range(1, 40):
        with pytest.raises(UnreadableError, match="give the key that it was encrypted with") as raised:
            MindSporeFile(GOLDENS / name, key=bytes([first]) + key_of(name)[1:])
        assert str(raised.value).count(name) == 1


def test_without_the_library_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"need the cryptography library; pip install 'weighbridge\[mindspore\]'"):
        MindSporeFile(GOLDENS / "enc_AES-GCM_16.ckpt", key=bytes(range(16)))


# Blocks that are not what they say.


def changed(at: int, to: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + to + content[at + len(to) :]


def lengths(at: int, length: int) -> Callable[[bytes], bytes]:
    """Both lengths of the first block, which agree; at: where the first is."""
    first, second = (24 + length).to_bytes(4, "little"), length.to_bytes(4, "little")
    return lambda content: changed(at + 24, second)(changed(at, first)(content))


DAMAGE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("enc_AES-GCM_16.ckpt", lambda content: content[:47], "its encrypted block 0 at byte 0 is cut; it is truncated: copy it again"),
    ("enc_AES-CBC_16.ckpt", lambda content: content[:31], "its encrypted block 0 at byte 0 is cut; it is truncated: copy it again"),
    ("enc_AES-GCM_16.ckpt", lambda content: content[:-1], "has 46 bytes of data, and 45 are left; it is truncated: copy it again"),
    ("enc_AES-GCM_16.ckpt", lambda content: content + b"crc", "its encrypted block 1 at byte 94 is cut; it is truncated: copy it again"),
    ("enc_AES-GCM_16.ckpt", lambda content: content + bytes(60), "its encrypted block 1 at byte 94 is no block of AES-GCM; what"),
    ("enc_AES-GCM_16.ckpt", lambda content: content + b"crc_num" + b"\1" * 10, "its encrypted block 1 at byte 94 is cut"),
    ("enc_AES-GCM_16.ckpt", changed(20, b"\x47"), "says that it has 71 bytes, 16 of iv and 46 of data: it contradicts itself"),
    ("enc_AES-GCM_16.ckpt", changed(24, b"\x0c"), "says that it has 70 bytes, 12 of iv and 46 of data: it contradicts itself"),
    ("enc_AES-GCM_16.ckpt", changed(20, b"\x18\0\0\0") , "it contradicts itself"),
    ("enc_AES-GCM_16.ckpt", lengths(20, 0), "has 0 bytes of data, which no block has"),
    ("enc_AES-GCM_16.ckpt", lengths(20, (64 << 20) + 1), "has 67108865 bytes of data, which no block has"),
    ("enc_AES-CBC_16.ckpt", lengths(4, 47), "has 47 bytes of data, which no block has"),
    ("enc_AES-GCM_16.ckpt", changed(4, b"\0"), "its encrypted block 0 at byte 0 does not open; give the key"),
    ("enc_AES-GCM_16.ckpt", changed(70, b"\0"), "its encrypted block 0 at byte 0 does not open; give the key"),
    ("enc_AES-GCM_16.ckpt", changed(30, b"\0"), "its encrypted block 0 at byte 0 does not open; give the key"),
    ("enc_AES-CBC_16.ckpt", changed(70, b"\0"), "its encrypted block 0 at byte 0 does not open; give the key"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_one_sentence_says_what_is_wrong(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    (tmp_path / "w.ckpt").write_bytes(damage((GOLDENS / name).read_bytes()))
    with pytest.raises(UnreadableError) as raised:
        MindSporeFile(tmp_path / "w.ckpt", key=key_of(name))
    assert str(raised.value).startswith("w.ckpt: its encrypted block ")
    assert message in str(raised.value)


def test_the_crc_of_an_encrypted_file_is_passed_over(tmp_path: Path) -> None:
    golden = (GOLDENS / "enc_AES-GCM_16.ckpt").read_bytes()
    (tmp_path / "w.ckpt").write_bytes(golden + b"crc_num" + bytes(10))
    file = MindSporeFile(tmp_path / "w.ckpt", key=bytes(range(16)))
    assert file.array("w").size == 6
    assert file.crc is None


def test_a_block_of_padding_alone(tmp_path: Path) -> None:
    (head, length, _), *_ = [list(encrypt([b"x"], "AES-CBC", bytes(16)))]
    content = b"".join(map(bytes, encrypt([b""], "AES-CBC", bytes(16))))
    assert content == b""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    nothing = Cipher(algorithms.AES(bytes(16)), modes.CBC(bytes(head[12:28]))).encryptor().update(b"\x10" * 16)
    (tmp_path / "w.ckpt").write_bytes(bytes(head) + bytes(length) + nothing)
    with pytest.raises(UnreadableError, match="holds nothing, which no block does"):
        MindSporeFile(tmp_path / "w.ckpt", key=bytes(16))


@unhurried
@given(st.sampled_from(ENCRYPTED), st.data())
def test_a_changed_byte_is_one_error_or_other_values(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    """AES-GCM notices every byte; the last four of its iv are not used."""
    content = bytearray((GOLDENS / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "changed.ckpt"
    path.write_bytes(content)
    try:
        found = MindSporeFile(path, key=key_of(name))
        values = [found.names, found.array("w").tolist() if "w" in found.tensors else None]
    except WeighbridgeError:
        return
    assert "GCM" not in name or 40 <= at < 44
    assert "GCM" in name or values != [["w"], [[0, 1, 2], [3, 4, 5]]]

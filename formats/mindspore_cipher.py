"""MindSpore's encrypted checkpoints: blocks of ciphertext, each of at most 64 MiB of the file that would be there without.

Defined by MindSpore 2.7.1 (``save_checkpoint(enc_key, enc_mode)``; its own code is compiled, so this was seen in files). Integers are of
32 bits, little-endian; ``iv_len`` is 16:

=========  ==========  =======================================================================================================
AES-GCM    0x7F3A5ED8  ``tag[16] | block_len | iv_len | iv | cipher_len | cipher``; the nonce is the first 12 bytes of ``iv``
AES-CBC    0x7F3A5ED9  ``block_len | iv_len | iv | cipher_len | cipher``, padded as PKCS#7
SM4-CBC    0x7F3A5EDA  the same
=========  ==========  =======================================================================================================

``block_len`` counts what follows it. AES takes keys of 16, 24 or 32 bytes, SM4 of 16. With ``crc_check`` a CRC of 0 follows the
blocks, which MindSpore then cannot load; here it is passed over.

A key comes from the environment or from a file, so that it is in no history and no list of processes. It is never in a message.
The arithmetic is the ``cryptography`` library's (``pip install 'weighbridge[mindspore]'``).
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import UnreadableError, UsageError
from .files import Read, Readable

Mode = Literal["AES-GCM", "AES-CBC", "SM4-CBC"]

BLOCK = 64 << 20
"""Plain bytes of every block but the last."""
KEY = "WEIGHBRIDGE_MINDSPORE_KEY"
KEY_FILE = "WEIGHBRIDGE_MINDSPORE_KEY_FILE"

_MAGIC = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}
_SPANS = {"AES-GCM": 48, "AES-CBC": 32, "SM4-CBC": 32}
"""Bytes before a block's ciphertext."""
_TRAILER = b"crc_num" + bytes(10)
_LATTICE = 16
"""Bytes of a block of either cipher."""
_MAX_BLOCKS = 1 << 16
_HELD = 2


def is_encrypted(file: Readable) -> bool:
    """Whether the file begins as an encrypted checkpoint does."""
    return file.size >= 4 and int.from_bytes(file.read(0, 4), "little") in _MAGIC


def find_key(name: str) -> bytes:
    """The key that the environment names: ``KEY`` in hexadecimal, or ``KEY_FILE``, a file of nothing but the key's bytes.

    name     of the encrypted file, for errors
    raises   UnreadableError if there is no key, UsageError if there are two, or what is there is none
    """
    text, path = os.environ.get(KEY), os.environ.get(KEY_FILE)
    if text is not None and path is not None:
        raise UsageError(f"{KEY} and {KEY_FILE}: both are set; wanted one of them")
    if text is not None:
        try:
            return check_key(bytes.fromhex(text), KEY)
        except ValueError:
            raise UsageError(f"{KEY}: is not hexadecimal; wanted 32, 48 or 64 digits, or {KEY_FILE}") from None
    if path is None:
        raise UnreadableError(
            f"{name}: is encrypted; set {KEY} to its key in hexadecimal, or {KEY_FILE} to a file that holds the key alone"
        )
    try:
        with open(path, "rb") as file:
            return check_key(file.read(65), f"{KEY_FILE} {Path(path).name}")
    except OSError as error:
        raise UsageError(f"{KEY_FILE} {path}: cannot be read ({error.strerror or error})") from None


def check_key(key: bytes, where: str, mode: str = "AES-GCM") -> bytes:
    """``key``; UsageError unless it has a length that the mode takes."""
    lengths = (16,) if mode == "SM4-CBC" else (16, 24, 32)
    if len(key) not in lengths:
        found = "more than 64" if len(key) > 64 else len(key)
        raise UsageError(f"{where}: holds {found} bytes, wanted {', '.join(map(str, lengths))} for {mode}, and no line break behind them")
    return key


def _cipher(mode: str, key: bytes, iv: bytes, tag: bytes | None = None) -> Any:
    """The library's cipher of one block."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        raise UsageError(f"{mode}: encrypted checkpoints need the cryptography library; pip install 'weighbridge[mindspore]'") from None
    if mode == "AES-GCM":
        return Cipher(algorithms.AES(key), modes.GCM(iv[:12], tag))
    try:
        algorithm = algorithms.AES(key) if mode == "AES-CBC" else algorithms.SM4(key)
        cipher = Cipher(algorithm, modes.CBC(iv))
        cipher.decryptor()
    except UnsupportedAlgorithm:
        raise UsageError(f"{mode}: the cryptography library that is installed was built without it; install another build") from None
    return cipher


@dataclass(frozen=True, slots=True)
class _Block:
    """begin, length: of the ciphertext in the file; start, size: of its plain bytes."""

    begin: int
    length: int
    iv: bytes
    tag: bytes | None
    start: int
    size: int


class DecryptedFile(Readable):
    """The plain bytes of an encrypted file. A block is decrypted whole when it is first read from, and two stay in memory.

    mode     "AES-GCM", "AES-CBC" or "SM4-CBC"; held: bytes that blocks take in memory at most
    key      None: ``find_key``
    raises   UnreadableError for blocks that are cut or contradict themselves, and, of AES-GCM, for one that the key does not open
    """

    def __init__(self, file: Readable, key: bytes | None = None) -> None:
        self.path, self._file = file.path, file
        magic = int.from_bytes(file.read(0, 4), "little")
        self.mode = _MAGIC[magic]
        self._key = check_key(find_key(file.path.name) if key is None else key, f"the key of {file.path.name}", self.mode)
        self._lock, self._cached = threading.Lock(), dict[int, memoryview]()
        self._blocks = list(self._scan(magic))
        self._starts = array("q", (block.start for block in self._blocks))
        self.size = self._blocks[-1].start + self._blocks[-1].size
        self.held = (_HELD + 1) * max(block.length for block in self._blocks)

    def _bad(self, what: str) -> UnreadableError:
        return UnreadableError(f"{self.path.name}: {what}")

    def _scan(self, magic: int) -> Iterator[_Block]:
        """Every block in order."""
        file, position, start, number = self._file, 0, 0, 0
        while position < file.size:
            if number and file.size - position == len(_TRAILER) and file.read(position, len(_TRAILER)) == _TRAILER:
                return
            where = f"its encrypted block {number} at byte {position}"
            span = _SPANS[self.mode]
            if file.size - position < span:
                raise self._bad(f"{where} is cut; it is truncated: copy it again")
            head = bytes(file.read(position, span))
            if int.from_bytes(head[:4], "little") != magic or number == _MAX_BLOCKS:
                raise self._bad(f"{where} is no block of {self.mode}; what follows belongs to nothing, or the file is damaged")
            tag = head[4:20] if self.mode == "AES-GCM" else None
            block_length, iv_length, length = (int.from_bytes(head[at : at + 4], "little") for at in (span - 28, span - 24, span - 4))
            if iv_length != 16 or block_length != length + 24:
                raise self._bad(
                    f"{where} says that it has {block_length} bytes, {iv_length} of iv and {length} of data: it contradicts itself"
                )
            padded = tag is None
            if length > BLOCK + _LATTICE * padded or length == 0 or (padded and length % _LATTICE):
                raise self._bad(f"{where} has {length} bytes of data, which no block has")
            begin = position + span
            if begin + length > file.size:
                raise self._bad(f"{where} has {length} bytes of data, and {file.size - begin} are left; it is truncated: copy it again")
            block = _Block(begin, length, head[span - 20 : span - 4], tag, start, length)
            size = length - self._padding(block, where) if padded else length
            if not size:
                raise self._bad(f"{where} holds nothing, which no block does")
            yield _Block(begin, length, block.iv, tag, start, size)
            position, start, number = begin + length, start + size, number + 1

    def _padding(self, block: _Block, where: str) -> int:
        """Bytes of padding, from the last lattice of the ciphertext alone."""
        last = block.begin + block.length - _LATTICE
        chained = block.iv if block.length == _LATTICE else bytes(self._file.read(last - _LATTICE, _LATTICE))
        plain = _cipher(self.mode, self._key, chained).decryptor().update(bytes(self._file.read(last, _LATTICE)))
        count = int(plain[-1])
        if not 0 < count <= _LATTICE or plain[-count:] != bytes([count]) * count:
            raise self._bad(f"{where} does not open; give the key that it was encrypted with, or copy the file again")
        return count

    def _open(self, number: int) -> memoryview:
        """The plain bytes of a block. Under the lock."""
        if number in self._cached:
            plain = self._cached.pop(number)
        else:
            while len(self._cached) >= _HELD:
                self._cached.pop(next(iter(self._cached)))
            plain = self._decrypt(number)
        self._cached[number] = plain  # last: the one that is kept longest
        return plain

    def _decrypt(self, number: int) -> memoryview:
        block = self._blocks[number]
        cipher = self._file.read(block.begin, block.length)
        plain = bytearray(block.length + _LATTICE - 1)
        decryptor = _cipher(self.mode, self._key, block.iv, block.tag).decryptor()
        decryptor.update_into(cipher, plain)
        if block.tag is not None:
            from cryptography.exceptions import InvalidTag

            try:
                decryptor.finalize()
            except InvalidTag:
                raise self._bad(
                    f"its encrypted block {number} at byte {block.begin - _SPANS[self.mode]} does not open; "
                    "give the key that it was encrypted with, or copy the file again"
                ) from None
        return memoryview(plain)[: block.size]

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """Copies out of decrypted blocks."""
        yield self._copy

    def _copy(self, view: memoryview, offset: int) -> None:
        if offset < 0 or offset + len(view) > self.size:
            raise self._bad(f"its plain bytes end at {self.size}, {offset + len(view) - self.size} too early")
        number = bisect.bisect_right(self._starts, offset) - 1
        while view:
            block = self._blocks[number]
            within = offset - block.start
            count = min(len(view), block.size - within)
            with self._lock:
                view[:count] = self._open(number)[within : within + count]
            view, offset, number = view[count:], offset + count, number + 1


def encrypt(
    plain: Iterable[bytes | memoryview], mode: str, key: bytes, iv: Callable[[int], bytes] = os.urandom
) -> Iterator[bytes | memoryview]:
    """The encrypted file of the plain one that ``plain`` is, in pieces; about two blocks are held in memory.

    iv       gives so many random bytes
    raises   UsageError for another mode, or a key that it does not take
    """
    if mode not in get_args(Mode):
        raise UsageError(f"the mode {mode!r}: wanted {', '.join(get_args(Mode))}")
    check_key(key, "the key", mode)
    block, held = bytearray(BLOCK), 0
    for piece in plain:
        view = memoryview(piece).cast("B")
        while view:
            count = min(len(view), BLOCK - held)
            block[held : held + count] = view[:count]
            view, held = view[count:], held + count
            if held == BLOCK:
                yield from _encrypt_block(memoryview(block), mode, key, iv(16))
                held = 0
    if held:
        yield from _encrypt_block(memoryview(block)[:held], mode, key, iv(16))


def _encrypt_block(plain: memoryview, mode: str, key: bytes, iv: bytes) -> Iterator[bytes | memoryview]:
    encryptor = _cipher(mode, key, iv).encryptor()
    data = bytearray(len(plain) + 2 * _LATTICE)
    length, tag = encryptor.update_into(plain, data), b""
    if mode == "AES-GCM":
        encryptor.finalize()
        tag = encryptor.tag
    else:
        count = _LATTICE - len(plain) % _LATTICE
        length += encryptor.update_into(bytes([count]) * count, memoryview(data)[length:])
    magic = next(magic for magic, name in _MAGIC.items() if name == mode)
    yield magic.to_bytes(4, "little") + tag + (24 + length).to_bytes(4, "little") + (16).to_bytes(4, "little") + iv
    yield length.to_bytes(4, "little")
    yield memoryview(data)[:length]

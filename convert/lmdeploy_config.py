"""The KV cache's dtype in a TurboMind workspace: ``quant_policy`` in ``triton_models/weights/config.ini``, which engines read differently.

=============  ===============  ==================================================================================================
quant_policy   engines to 0.3   engines since 0.4
=============  ===============  ==================================================================================================
0              float16          float16
4              int8, scales     int4, scales found by token and head while it runs
               from files
8              unknown          int8, scales found by token and head while it runs
=============  ===============  ==================================================================================================

The same file so asks two engines for two different things: a workspace that was made for int8 and is loaded by 0.4 or later runs in
int4. Workspaces since 0.6 have ``config.yaml`` instead, without this key: there it is an option of the server alone (``--quant-policy``).
``use_context_fmha = 0`` turns off flash attention; TurboMind 1, before LMDeploy 0.1, cannot have it together with an int8 cache.
"""

from __future__ import annotations

import configparser
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import RefusedError, UnreadableError, UsageError

from .replacing import replace_files

__all__ = ["CONFIG", "POLICIES", "Engine", "Policy", "file_name", "meaning_of", "policy_of", "quant_policy"]

CONFIG = "config.ini"
SECTION = "llama"
LARGEST = 1 << 20
ONLINE = (0, 4)
"""The first version whose engine finds the cache's scales while it runs."""
POLICIES: dict[bool, dict[str, int]] = {False: {"off": 0, "int8": 4}, True: {"off": 0, "int4": 4, "int8": 8}}
"""By whether the engine is of 0.4 or later: the number for each dtype."""


def file_name(layer: int, rank: int) -> str:
    """The name of a file with the scales of an int8 cache, beside config.ini."""
    return f"layers.{layer}.past_kv_scale.{rank}.weight"


@dataclass(frozen=True)
class Engine:
    """A workspace's config.ini: its text, and the keys of its section ``[llama]``."""

    path: Path
    text: str
    keys: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Engine:
        """The file at ``path``. Raises UnreadableError where it is no such configuration."""
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
            text = content.decode("utf-8")
            parser = configparser.ConfigParser(interpolation=None)
            parser.read_string(text)
        except OSError as error:
            raise UnreadableError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (UnicodeDecodeError, configparser.Error) as error:
            raise UnreadableError(f"{path}: is no config.ini as LMDeploy writes it ({str(error).splitlines()[0]})") from None
        if len(content) > LARGEST or not parser.has_section(SECTION):
            raise UnreadableError(
                f"{path}: has no section [{SECTION}], so it is no workspace's; name the folder that LMDeploy converted to"
            )
        return cls(path, text, dict(parser[SECTION]))

    def whole(self, key: str) -> int | None:
        """The whole number that a key has; None where there is no such key. Raises UnreadableError for anything else."""
        said = self.keys.get(key)
        if said is None:
            return None
        if not re.fullmatch(r"\d{1,9}", said.strip()):
            raise UnreadableError(f"{self.path}: {key} is {said[:40]!r}, and a whole number was wanted")
        return int(said)

    def changed(self, key: str, value: int) -> Engine:
        """This configuration with ``key``, which is added at the section's end if it is not there; every other byte stays."""
        lines = self.text.splitlines(keepends=True)
        start = next(index for index, line in enumerate(lines) if line.strip() == f"[{SECTION}]") + 1
        end = next((index for index in range(start, len(lines)) if lines[index].startswith("[")), len(lines))
        own = rf"{re.escape(key)}(\s*[=:]\s*)\S*"
        found = next((index for index in range(start, end) if re.match(own, lines[index], re.IGNORECASE)), None)
        if found is None:
            while end > start and not lines[end - 1].strip():
                end -= 1
            if not lines[end - 1].endswith("\n"):
                lines[end - 1] += "\n"
            lines.insert(end, f"{key} = {value}\n")
        else:
            lines[found] = re.sub(own, lambda match: f"{key}{match[1]}{value}", lines[found], count=1, flags=re.IGNORECASE)
        return Engine(self.path, "".join(lines), {**self.keys, key: str(value)})


@dataclass(frozen=True)
class Policy:
    """What config.ini says now, what it said before, and what that means to whom."""

    config: Path
    before: dict[str, int | None]
    after: dict[str, int | None]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"config": os.fspath(self.config), "before": self.before, "after": self.after, "notes": list(self.notes)}


def policy_of(kv: str, engine: str) -> int:
    """``quant_policy`` of a cache's dtype for an engine's version.

    :raises UsageError: an unknown dtype, or no version
    :raises RefusedError: that engine has no such cache
    """
    if kv not in {"off", "int8", "int4"}:
        raise UsageError(f"--kv {kv}: wanted int8, int4 or off")
    found = POLICIES[is_online(engine)].get(kv)
    if found is None:
        raise RefusedError(f"--kv {kv} --engine {engine}: engines up to 0.3 have an int8 cache alone, and read 4 as that; use 0.4 or later")
    return found


def is_online(engine: str) -> bool:
    """Whether that version of LMDeploy finds the cache's scales while it runs. Raises UsageError for what is no version."""
    if not (found := re.fullmatch(r"v?(\d{1,4})\.(\d{1,4})(\.\d{1,4})?", engine)):
        raise UsageError(f"--engine {engine}: wanted a version of LMDeploy, as 0.1 or 0.4")
    return (int(found[1]), int(found[2])) >= ONLINE


def meaning_of(policy: int, online: bool) -> str:
    """What an engine takes ``quant_policy`` for."""
    named = next((kv for kv, number in POLICIES[online].items() if number == policy), None)
    return "an unknown policy" if named is None else "a float16 cache" if named == "off" else f"an {named} cache"


def quant_policy(workspace: str | os.PathLike[str], kv: str, *, engine: str = "0.1", use_context_fmha: bool | None = None) -> Policy:
    """Set the KV cache's dtype in a workspace's config.ini for LMDeploy's ``engine``; nothing else of the file changes.

    workspace           its root, its weights' folder, or the file
    kv                  "int8", "int4" or "off"
    use_context_fmha    flash attention; False for TurboMind 1 with an int8 cache; None: left as it is

    :raises UsageError: no workspace there, an unknown dtype or version
    :raises RefusedError: the engine has no such cache, or the scales that it reads are not there
    :raises UnreadableError: a config.ini that is none
    """
    policy, online = policy_of(kv, engine), is_online(engine)
    config = Engine.read(_config_of(Path(workspace)))
    if policy and not online:
        _check_scales(config)
    keys = {"quant_policy": policy} | ({} if use_context_fmha is None else {"use_context_fmha": int(use_context_fmha)})
    changed = config
    for key, value in keys.items():
        changed = changed.changed(key, value)
    if changed.text != config.text:
        replace_files(config.path.parent, {config.path.name: changed.text.encode()})
    return Policy(config.path, {key: config.whole(key) for key in keys}, dict(keys), tuple(_notes(config, changed, policy, online)))


def _config_of(place: Path) -> Path:
    """The config.ini of a workspace."""
    tried = [place] if place.is_file() else [place / "triton_models" / "weights" / CONFIG, place / CONFIG]
    if found := next((path for path in tried if path.is_file()), None):
        return found
    for path in tried:
        if path.with_suffix(".yaml").is_file():
            raise RefusedError(
                f"{path.with_suffix('.yaml')}: workspaces since LMDeploy 0.6 do not say the KV cache's dtype; start the server with "
                "--quant-policy 8 (int8) or 4 (int4) instead"
            )
    raise UsageError(f"{place}: has no triton_models/weights/{CONFIG}; name a TurboMind workspace")


def _check_scales(config: Engine) -> None:
    """RefusedError unless the scales of every layer and rank lie beside config.ini, as engines up to 0.3 read them."""
    layers, ranks = config.whole("num_layer"), config.whole("tensor_para_size")
    if layers is None or ranks is None:
        raise UnreadableError(f"{config.path}: says no num_layer or tensor_para_size, so the files of scales cannot be looked for")
    for layer in range(layers):
        for rank in range(ranks):
            path = config.path.parent / file_name(layer, rank)
            if not path.is_file():
                raise RefusedError(
                    f"{path.name}: is not beside {config.path}, and engines up to 0.3 would go on with a scale of 1; run "
                    "`weighbridge lmdeploy kv-qparams` first"
                )
            if (size := path.stat().st_size) != 16:
                what = "symmetric" if size == 8 else "damaged"
                raise RefusedError(
                    f"{path.name}: holds {size} bytes ({what}), and engines up to 0.3 read 16; run "
                    "`weighbridge lmdeploy kv-qparams` without --kv-sym"
                )


def _notes(before: Engine, after: Engine, policy: int, online: bool) -> list[str]:
    notes = []
    own, other = meaning_of(policy, online), meaning_of(policy, not online)
    if own != other:
        since, until = ("since 0.4", "up to 0.3") if online else ("up to 0.3", "since 0.4")
        notes.append(f"quant_policy = {policy} is {own} to engines {since}, and {other} to engines {until}: load it with the right one")
    if (was := before.whole("quant_policy")) and was != policy:
        notes.append(f"quant_policy was {was}: {meaning_of(was, False)} to engines up to 0.3, {meaning_of(was, True)} to engines since 0.4")
    if online and policy and any(before.path.parent.glob("layers.*.past_kv_scale.*.weight")):
        notes.append("the files past_kv_scale are not read by engines since 0.4, which find scales while they run; they may be removed")
    if policy and not online and after.whole("use_context_fmha") != 0:
        notes.append(
            "TurboMind 1 (before LMDeploy 0.1) wants use_context_fmha = 0 with an int8 cache: --no-context-fmha; later ones do not"
        )
    if not policy and after.whole("use_context_fmha") == 0:
        notes.append("use_context_fmha = 0 leaves flash attention off, which a float16 cache does not need: --context-fmha")
    return notes

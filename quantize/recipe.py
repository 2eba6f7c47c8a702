"""Recipes: how to quantize a model, as a short YAML file.

::

    about: static W8A8, down projections in float        # optional, for people
    anti_outlier: {anti_method: m2}                      # AntiOutlierConfig's arguments; left out: no smoothing
    quant: {w_bit: 8, a_bit: 8, mm_tensor: false}        # QuantConfig's arguments
    gptq: {act_order: true, static_groups: true}         # Gptq's arguments, where quant says w_method: GPTQ; percdamp is quant's
    awq: {grid: 20}                                      # Awq's arguments: search scales and clips; left out: no search
    lmdeploy_awq: {version: "0.1"}                       # LmdeployAwq's arguments: smooth and round as LMDeploy's auto_awq did
    kv_quant: {kv_sym: true}                             # QuantConfig.kv_quant's; left out: the cache stays float
    fa_quant: {fa_amp: 0}                                # QuantConfig.fa_quant's
    disable_level: L0                                    # Calibrator's
    mix_cfg: {"*.mlp.down_proj": float}                  # Calibrator's
    calibration: {samples: 50, length: 2048, template: boolq}

or, of Golden Stick's algorithms::

    golden_stick: {approach: ptq, w_bit: 4, group_size: 64}   # golden_stick_config has the words; nothing but calibration goes with it

Words and defaults are msModelSlim's, of the second kind Golden Stick's. The device is not a recipe's business. A mistake is a
``UsageError`` that names file, line and key. ``RECIPES`` come with the package; ``load("w8a8")`` finds one of them,
``load("mine.yaml")`` a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from formats.errors import UnreadableError, UsageError

from .config import MIX_TYPES, AntiOutlierConfig, QuantConfig
from .golden_stick_config import GoldenStick
from .methods import Awq, Gptq, LmdeployAwq

__all__ = ["RECIPES", "Calibration", "Recipe", "load", "loads", "recipe_of"]

RECIPES = (
    "w8a8", "w8a8-dynamic", "w8a8-kv8", "w8a8-sparse", "w8a16", "w4a16-rtn", "w4a16-gptq", "w4a16-awq",
    "gs-rtn-a16w8", "gs-smooth-a8w8", "gs-ptq", "gs-ptq-a8dynw8", "gs-ptq-a16w4", "gs-awq-a16w4", "gs-gptq-a16w4",
    "lmdeploy-awq", "lmdeploy-awq-search", "lmdeploy-awq-0.1", "lmdeploy-rtn",
)  # fmt: skip
"""Names of the recipes that come with the package."""
LARGEST = 1 << 20
"""Bytes of a recipe file: more is no recipe."""

_DATA_FREE = ("W8A16", "W4A16", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
_ELSEWHERE = {QuantConfig: ("dev_type", "dev_id"), AntiOutlierConfig: ("dev_type", "dev_id"), Gptq: ("percdamp",)}
"""Arguments that a recipe does not have in that section."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _section(name: str, config: type[Any]) -> type[_Section]:
    """A section whose keys are the arguments of the dataclass ``config``, but for those of ``_ELSEWHERE``."""
    hints = get_type_hints(config)
    left = _ELSEWHERE.get(config, ())
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.init and field.name not in left:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else Field(default_factory=made)
            fields[field.name] = hints[field.name], default
    return create_model(name, __base__=_Section, **fields)


QuantSection = _section("QuantSection", QuantConfig)
AntiOutlierSection = _section("AntiOutlierSection", AntiOutlierConfig)
GptqSection = _section("GptqSection", Gptq)
AwqSection = _section("AwqSection", Awq)
GoldenStickSection = _section("GoldenStickSection", GoldenStick)
LmdeployAwqSection = _section("LmdeployAwqSection", LmdeployAwq)


class KvQuant(_Section):
    """Arguments of ``QuantConfig.kv_quant``."""

    kv_sym: bool = True


class FaQuant(_Section):
    """Arguments of ``QuantConfig.fa_quant``."""

    fa_amp: int = Field(default=0, ge=0)


class Calibration(_Section):
    """What is taken of the calibration data: at most ``samples`` of them, each at most ``length`` tokens long.

    template   "boolq", "text" (the line as it is), or a text with keys of the data's objects in braces; of Golden Stick's recipes also
               "boolq-gs0.6" and "boolq-gs1.2", the questions with their answers, as those versions put them
    """

    samples: int = Field(default=50, ge=1)
    length: int = Field(default=2048, ge=1)
    template: str | None = None


class Recipe(_Section):
    """A checked recipe; ``name`` is what it was loaded as."""

    name: str = Field(default="recipe", exclude=True)
    about: str = ""
    anti_outlier: AntiOutlierSection | None = None  # type: ignore[valid-type]
    quant: QuantSection | None = None  # type: ignore[valid-type]
    golden_stick: GoldenStickSection | None = None  # type: ignore[valid-type]
    gptq: GptqSection | None = None  # type: ignore[valid-type]
    awq: AwqSection | None = None  # type: ignore[valid-type]
    lmdeploy_awq: LmdeployAwqSection | None = None  # type: ignore[valid-type]
    kv_quant: KvQuant | None = None
    fa_quant: FaQuant | None = None
    disable_level: str = Field(default="L0", pattern=r"^L(0|[1-9]\d*)$")
    mix_cfg: dict[str, Literal["w8a8", "w8a16", "w8a8_dynamic", "float", "w4a8_dynamic"]] = Field(default_factory=dict)
    calibration: Calibration = Field(default_factory=Calibration)

    def quant_config(self, dev_type: str = QuantConfig.dev_type, dev_id: int | None = None) -> QuantConfig:
        """The ``QuantConfig`` for a device. Raises UsageError where arguments contradict each other, or the recipe is Golden Stick's."""
        quant: BaseModel | None = self.quant
        if quant is None:
            raise UsageError(f"recipe {self.name}: is Golden Stick's, which `weighbridge quantize` and quant_ckpt alone carry out")
        config = QuantConfig(**quant.model_dump(), dev_type=dev_type, dev_id=dev_id)
        if self.kv_quant is not None:
            config = config.kv_quant(kv_sym=self.kv_quant.kv_sym)
        return config if self.fa_quant is None else config.fa_quant(fa_amp=self.fa_quant.fa_amp)

    def anti_outlier_config(self, dev_type: str = QuantConfig.dev_type, dev_id: int | None = None) -> AntiOutlierConfig | None:
        """The ``AntiOutlierConfig`` for a device, or None. Raises UsageError where its arguments contradict each other."""
        section: BaseModel | None = self.anti_outlier
        return None if section is None else AntiOutlierConfig(**section.model_dump(), dev_type=dev_type, dev_id=dev_id)

    def golden_stick_settings(self) -> GoldenStick | None:
        """Golden Stick's settings, or None. Raises UsageError where they contradict each other."""
        return None if self.golden_stick is None else GoldenStick(**self._settings(self.golden_stick))

    def gptq_settings(self) -> Gptq | None:
        """GPTQ's settings, or None. Raises UsageError where they contradict each other, or the method is another one."""
        config, section = self.quant_config(), self._settings(self.gptq)
        if config.w_method != "GPTQ":
            if self.gptq is not None:
                raise UsageError(f"w_method is {config.w_method!r}; write GPTQ there, or leave these settings out")
            return None
        return Gptq(**section, percdamp=config.percdamp)

    def awq_settings(self) -> Awq | None:
        """AWQ's settings, or None. Raises UsageError as ``gptq_settings`` does."""
        config = self.quant_config()
        if self.awq is None:
            return None
        if config.w_method != "MinMax" or config.a_bit != 16:
            raise UsageError(f"is for weights alone, w_method MinMax and a_bit 16, not {config.w_method} and {config.a_bit}")
        return Awq(**self._settings(self.awq))

    def lmdeploy_awq_settings(self) -> LmdeployAwq | None:
        """LMDeploy's settings, or None. Raises UsageError as ``gptq_settings`` does."""
        if self.lmdeploy_awq is None:
            return None
        config = self.quant_config()
        if (config.w_bit, config.a_bit, config.w_method, config.w_sym, config.is_per_group) != (4, 16, "MinMax", False, True):
            raise UsageError("is for weights alone: w_bit 4, a_bit 16, w_sym false, is_lowbit true, open_outlier false")
        if (
            self.awq is not None
            or self.anti_outlier is not None
            or self.mix_cfg.keys() - {k for k, v in self.mix_cfg.items() if v == "float"}
        ):
            raise UsageError("smooths by itself, and in one way: leave out awq, anti_outlier, and mix_cfg but for float")
        return LmdeployAwq(**self._settings(self.lmdeploy_awq))

    @staticmethod
    def _settings(section: BaseModel | None) -> dict[str, Any]:
        return {} if section is None else section.model_dump()

    @property
    def needs_data(self) -> bool:
        """Whether it cannot do without calibration data."""
        if (golden_stick := self.golden_stick_settings()) is not None:
            return golden_stick.needs_data
        config = self.quant_config()
        return (
            config.model_quant_type not in _DATA_FREE
            or config.w_method == "GPTQ"
            or self.anti_outlier is not None
            or self.awq is not None
            or ((lmdeploy := self.lmdeploy_awq_settings()) is not None and lmdeploy.smooth)
            or config.use_kvcache_quant
            or config.use_fa_quant
            or self.disable_level != "L0"
            or "w8a8" in self.mix_cfg.values()
        )


assert set(MIX_TYPES) == set(get_type_hints(Recipe)["mix_cfg"].__args__[1].__args__)


def load(name: str | os.PathLike[str]) -> Recipe:
    """The recipe called ``name``, or the one in the file ``name``.

    :raises UsageError: no such recipe, or a mistake in it, by line and key
    :raises UnreadableError: a file that cannot be read
    """
    if isinstance(name, str) and name in RECIPES:
        return loads((resources.files(__package__) / "recipes" / f"{name}.yaml").read_text("utf-8"), name)
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(str(name), RECIPES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"recipe {os.fspath(name)!r}: there is no such file, and the recipes are {', '.join(RECIPES)}{hint}")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > LARGEST:
        raise UnreadableError(f"{path.name}: is larger than {LARGEST} bytes, which no recipe needs")
    try:
        return loads(content.decode("utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name}: is not UTF-8 text (byte {error.start})") from None


def recipe_of(name: str, settings: Mapping[str, Any], version: str) -> Recipe:
    """The recipe of Golden Stick's that its script of ``version`` ("gs0.6", "gs1.2") carries out. Raises UsageError, "name: key: why"."""
    count = 200 if version == "gs0.6" else 100
    try:
        made = GoldenStickSection(**settings)
        recipe = Recipe(name=name, golden_stick=made, calibration=Calibration(samples=count, template=f"boolq-{version}"))
        recipe.golden_stick_settings()
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    return recipe


def loads(text: str, name: str = "recipe") -> Recipe:
    """The recipe that the YAML ``text`` holds; ``name`` is for its messages. Raises UsageError as ``load`` does."""
    content, lines = _parse(text, name)
    if "name" in content:
        raise _mistake(name, lines, ("name",), "there is no such key; a recipe is called as its file is")
    try:
        recipe = Recipe.model_validate({**content, "name": name})
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: lines.get(_known(lines, one["loc"]), 0))
        raise _mistake(name, lines, first["loc"], _sentence(first)) from None
    _check_kind(recipe, name, lines)
    own: dict[str, Callable[[], object]] = {"golden_stick": recipe.golden_stick_settings}
    checks: dict[str, Callable[[], object]] = (
        own
        if recipe.golden_stick is not None
        else {
            "quant": recipe.quant_config,
            "anti_outlier": recipe.anti_outlier_config,
            "gptq": recipe.gptq_settings,
            "awq": recipe.awq_settings,
            "lmdeploy_awq": recipe.lmdeploy_awq_settings,
        }
    )
    for section, make in checks.items():
        try:
            make()
        except UsageError as error:
            key, _, rest = str(error).partition(": ")
            place = (section, key) if (section, key) in lines else (section,)
            raise _mistake(name, lines, place, rest if len(place) == 2 else str(error)) from None
    return recipe


Place = tuple[str | int, ...]


def _check_kind(recipe: Recipe, name: str, lines: Mapping[Place, int]) -> None:
    """A recipe is of msModelSlim's kind or of Golden Stick's."""
    if recipe.golden_stick is None:
        if recipe.quant is None:
            raise _mistake(name, lines, ("quant",), "is missing")
        return
    for key in recipe.model_fields_set - {"name", "about", "golden_stick", "calibration"}:
        raise _mistake(name, lines, (key,), "does not go with golden_stick, which has words of its own; leave it out")


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """(the mapping, the line from 1 of every key and item in it). Aliases and repeated keys are refused."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                mark: Any = event.start_mark
                raise UsageError(f"{name}, line {mark.line + 1}: *{event.anchor} is an alias, which recipes do without")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise UsageError(f"{name}, line 1: a recipe is a mapping with the key quant, and this is none")
            lines: dict[Place, int] = {(): node.start_mark.line + 1}
            _place(node, (), lines, name)
            content: Any = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{name}{where}: is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML has not, a date that there is not
        raise UsageError(f"{name}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UsageError(f"{name}: is nested too deeply for a recipe") from None
    return content, lines


def _place(node: yaml.Node, place: Place, lines: dict[Place, int], name: str) -> None:
    """Note the lines of all that ``node`` holds."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, index)] = item.start_mark.line + 1
            _place(item, (*place, index), lines, name)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise UsageError(f"{name}, line {line}: {_dotted(place) or 'the recipe'} has a key that is no text; quote it")
            here = (*place, key.value)
            if here in lines:
                raise UsageError(f"{name}, line {line}: {_dotted(here)}: is there already, in line {lines[here]}")
            lines[here] = line
            _place(value, here, lines, name)


def _known(lines: Mapping[Place, int], place: Place) -> Place:
    """The longest beginning of ``place`` that the file has."""
    while place not in lines:
        place = place[:-1]
    return place


def _mistake(name: str, lines: Mapping[Place, int], place: Place, what: str) -> UsageError:
    return UsageError(f"{name}, line {lines[_known(lines, place)]}: {_dotted(place)}: {what}")


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place if part != "[key]")


def _sentence(error: Any) -> str:
    """pydantic's error as words that say what to do."""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys()[tuple(error["loc"][:-1])], 1)
        return "there is no such key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "string_pattern_mismatch":
        return f"wanted L0, L1, L2 and so on, not {error['input']!r:.80}"
    wanted = str(error["msg"]).removeprefix("Input should be ").replace("a valid integer", "a whole number").replace("valid ", "")
    return f"{wanted} was wanted, not {error['input']!r:.80}"


@cache
def _keys() -> dict[Place, tuple[str, ...]]:
    """The keys of every section."""
    sections: dict[str, type[BaseModel]] = {
        "quant": QuantSection,
        "golden_stick": GoldenStickSection,
        "anti_outlier": AntiOutlierSection,
        "gptq": GptqSection,
        "awq": AwqSection,
        "lmdeploy_awq": LmdeployAwqSection,
        "kv_quant": KvQuant,
        "fa_quant": FaQuant,
        "calibration": Calibration,
    }
    return {(): tuple(Recipe.model_fields)} | {(name,): tuple(section.model_fields) for name, section in sections.items()}

"""What a plan says of its consumers is what ``check`` finds in the folder; docs/consumers.md is the table."""

from __future__ import annotations

from pathlib import Path

import consumer_table
import pytest
from checkpoints import model, write_msmodelslim

from convert import check, convert, plan
from convert.checking import consumers_of
from convert.consumers import CONSUMERS


@pytest.mark.parametrize("target", ["awq", "awq:gemv", "awq:gemv_fast", "gptq:v1", "gptq:v2", "msmodelslim:ascendv1", "dense"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_plan_says_what_check_finds(target: str, symmetric: bool, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model(symmetric=symmetric))
    said = consumers_of(plan(source, target))
    convert(source, tmp_path / "out", target)
    found = {name: [unmet.code for unmet in check(tmp_path / "out", name).unmet] for name in CONSUMERS}
    assert said == found
    assert any(not codes for codes in said.values())


def test_the_page_is_the_table() -> None:
    assert consumer_table.PAGE.read_text("utf-8") == consumer_table.render()

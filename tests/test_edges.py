"""Every edge between formats, run: the table in docs/edges.md is what happens."""

from __future__ import annotations

from pathlib import Path

import edge_table
import pytest

from convert import convert, fingerprint, verify
from formats import open_checkpoint
from formats.errors import RefusedError

ROOT = Path(__file__).parent.parent
TABLE = edge_table.parse((ROOT / "docs" / "edges.md").read_text("utf-8"))


def test_the_table_is_read_as_it_is_written() -> None:
    assert edge_table.render(TABLE) == (ROOT / "docs" / "edges.md").read_text("utf-8")
    assert edge_table.summary(TABLE) in (ROOT / "README.md").read_text("utf-8")


def test_the_table_has_every_scheme() -> None:
    assert list(TABLE) == [section.name for section in edge_table.SECTIONS]


GOLDEN_STICK = next(section for section in edge_table.SECTIONS if section.name.startswith("As Golden Stick"))
FORMATS = ("msmodelslim:ascendv1", "awq:gemm", "awq:gemv_fast", "gptq:v1", "gptq:v2", "compressed-tensors:compressed")


@pytest.mark.parametrize("golden", GOLDEN_STICK.places)  # type: ignore[union-attr]
def test_what_golden_stick_wrote_comes_back_from_every_format_that_holds_it(golden: str, tmp_path: Path) -> None:
    source, cells = GOLDEN_STICK.places[golden], TABLE[GOLDEN_STICK.name][golden]  # type: ignore[union-attr]
    own, digest = open_checkpoint(source), fingerprint(source).digest
    held = [target for target in cells if cells[target].startswith("exact") and (target in FORMATS or target.startswith("mindspore"))]
    assert held
    for target in held:
        there, back = tmp_path / target.replace(":", "."), tmp_path / f"{target} and back".replace(":", ".")
        convert(source, there, target)
        convert(there, back, f"mindspore:{own.variant}", scale_dtype="keep")
        assert fingerprint(there).digest == fingerprint(back).digest == digest, target


@pytest.mark.parametrize("scheme", edge_table.SECTIONS, ids=lambda section: section.name)
def test_every_edge_does_what_the_table_says(scheme: edge_table.Scheme | edge_table.Goldens, tmp_path: Path) -> None:
    """Exact edges keep the fingerprint, rounded ones verify as rounded, refused ones refuse with the code."""
    found = edge_table.sources(tmp_path / "sources", scheme)
    assert list(found) == list(TABLE[scheme.name])
    for source, place in found.items():
        for target, cell in TABLE[scheme.name][source].items():
            edge = f"{source} to {target}"
            out = tmp_path / f"{source} {target}".replace(":", ".")
            if cell.startswith("refused"):
                with pytest.raises(RefusedError) as caught:
                    convert(place, out, target)
                codes = ", ".join(sorted({refusal.code for refusal in caught.value.refusals}))  # type: ignore[attr-defined]
                assert f"refused: {codes}" == cell, edge
                assert not out.exists()
                continue
            result = convert(place, out, target)
            assert edge_table.outcome(result.plan) == cell, edge
            verdict = verify(place, out)
            assert verdict.same, edge
            rounds = bool({loss.code for loss in result.plan.losses} - edge_table.KEEP_WEIGHTS)
            assert (verdict.left.digest != verdict.right.digest) == rounds, edge
            assert bool(verdict.rounded) == rounds, edge

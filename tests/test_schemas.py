"""JSON schemas in docs/ are those of the models that write the files."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "write_schemas.py"))


@pytest.mark.parametrize("name", SCRIPT["MODELS"])
def test_a_schema_is_its_models(name):
    written = (SCRIPT["DOCS"] / f"{name}.schema.json").read_text()
    assert written == SCRIPT["schema_text"](name), "run scripts/write_schemas.py"


def test_every_schema_has_a_model():
    assert {p.name.split(".")[0] for p in SCRIPT["DOCS"].glob("*.json")} == set(SCRIPT["MODELS"])

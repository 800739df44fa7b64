"""Write docs/*.schema.json, the JSON schemas of all files that commands write, from their models.

python scripts/write_schemas.py
python scripts/write_schemas.py --check     # fails where a schema is not that of its model
"""

import json
import sys
from importlib import import_module
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
MODELS = {
    "admission": "specdec.engines.admit:Admission",
    "analyze": "specdec.analysis.results:Analysis",
    "answers": "specdec.data.answers:AnswersManifest",
    "bake-off": "specdec.engines.bake_off:BakeOffResults",
    "collect": "specdec.data.collect:CollectReport",
    "estimate": "specdec.planning.roofline:Estimate",
    "features": "specdec.data.feature_store:FeatureIndex",
    "plan": "specdec.planning.results:Plan",
    "recording": "specdec.proxy.records:Record",
    "report": "specdec.report.document:Report",
    "results": "specdec.bench.results:BenchResults",
    "suites": "specdec.bench.results:SuiteResults",
    "sweep": "specdec.bench.results:SweepResults",
    "train": "specdec.train.results:TrainResults",
}


def schema_text(name: str) -> str:
    """The schema of a file as its model writes it."""
    module, attribute = MODELS[name].split(":")
    model = getattr(import_module(module), attribute)
    found = model.model_json_schema(mode="serialization")
    draft = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps({"$schema": draft, **found}, indent=1) + "\n"


def main() -> None:
    """Write or check every schema."""
    wrong = []
    for name in MODELS:
        path, text = DOCS / f"{name}.schema.json", schema_text(name)
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            wrong.append(path.name)
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not those of the models; run scripts/write_schemas.py")


if __name__ == "__main__":
    main()

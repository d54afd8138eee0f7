"""The published schemas: JSON Schema of report.json, records.jsonl and tune.json kept current,
and files that keep them.

``python -m tests.report.test_schema`` writes the files in docs/ again.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report
from racdeploy.results.tuning import CostEstimate, Tuning
from tests.support.sample_tuning import build_tuning

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED: dict[str, type[BaseModel]] = {
    "report.schema.json": Report,
    "record.schema.json": AnswerRecord,
    "tune.schema.json": Tuning,
}
Json = dict[str, object]


def schema(model: type[BaseModel]) -> Json:
    """Return the schema of what is written, with the dialect named."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | model.model_json_schema(mode="serialization")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_schema_is_current(name: str) -> None:
    """A changed field changes the file: ``python -m tests.report.test_schema``."""
    published = json.loads((DOCS / name).read_text(encoding="utf-8"))
    assert published == schema(PUBLISHED[name])
    jsonschema.Draft202012Validator.check_schema(published)


def test_a_report_and_its_records_keep_the_schema(
    report: Report, records: list[AnswerRecord]
) -> None:
    """As written to disk, infinite ends of an interval included."""
    assert report.comparison
    unbounded = report.comparison.model_copy(update={"length_upper": float("inf")})
    for name, one in (
        ("report.schema.json", report),
        ("report.schema.json", report.model_copy(update={"comparison": unbounded})),
        ("record.schema.json", records[0]),
    ):
        jsonschema.validate(json.loads(one.model_dump_json()), schema(PUBLISHED[name]))


def test_a_search_keeps_the_schema() -> None:
    """As written to disk, with seconds for right answers of which there is none."""
    tuning = build_tuning()
    never = CostEstimate(value=float("inf"), lower=9.0, upper=float("inf"))
    first = tuning.candidates[0].model_copy(update={"seconds_per_correct": never})
    changed = tuning.model_copy(update={"candidates": (first, *tuning.candidates[1:])})

    for one in (tuning, changed):
        written = one.model_dump_json()
        jsonschema.validate(json.loads(written), schema(Tuning))
        assert Tuning.model_validate_json(written) == one


def test_the_schema_refuses_what_no_report_holds(report: Report) -> None:
    """A verdict that does not exist, a key too many, a missing arm name."""
    good = json.loads(report.model_dump_json())
    arms = [{k: v for k, v in good["arms"][0].items() if k != "name"}]
    for spoiled in ({"verdict": "fine"}, {"surprise": 1}, {"arms": arms}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | spoiled, schema(Report))


if __name__ == "__main__":
    for file, model in PUBLISHED.items():
        (DOCS / file).write_text(
            json.dumps(schema(model), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

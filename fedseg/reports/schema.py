"""The JSON schema of OUT/result.json, as published in docs/result.schema.json.

After a change of `StudyResult`: python -m fedseg.reports.schema > docs/result.schema.json
"""

from __future__ import annotations

import json
import sys

from fedseg.result import StudyResult


def result_schema() -> str:
    """The text of docs/result.schema.json: two spaces, sorted keys, a newline at the end."""
    return json.dumps(StudyResult.model_json_schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(result_schema())

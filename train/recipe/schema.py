"""The JSON schema of a recipe, by which editors complete and check it.

`python -m train.recipe.schema > docs/recipe.schema.json` (`make schema`) writes it; a test
compares.
"""

from __future__ import annotations

import json
from typing import Any

from train.recipe.recipe import Recipe

UNTRAINED: dict[str, Any] = {
    "properties": {
        "train": {"properties": {"steps": {"const": 0}}, "required": ["steps"]},
        "materialize": {"properties": {"heal_steps": {"const": 0}}},
    }
}
"""A recipe in which nothing trains: `train` need not say how."""


def schema_text() -> str:
    """The schema as it is stored."""
    schema = Recipe.model_json_schema()
    required = schema["$defs"]["TrainSection"].pop("required")
    schema["if"] = UNTRAINED
    schema["else"] = {"properties": {"train": {"required": required}}}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")

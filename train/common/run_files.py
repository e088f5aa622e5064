"""Names of the files in a run folder."""

from __future__ import annotations

RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"

# --- the plan -------------------------------------------------------------------------------------

PLAN_FILE = "plan.json"
SPANS_FILE = "spans.json"
DIRECTSHARE_FILE = "directshare.json"
"""The plan of DirectShare as published, at as many bytes."""
ALTERNATIVES_FILE = "plan-alternatives.json"
CHANCE_FILE = "chance.json"
SEARCH_FILE = "plan-search.json"
SEARCH_PAGE = "plan-search.md"
SEARCH_CACHE = "plan-search-cache.jsonl"
SIMILARITY_PICTURE = "plan-similarity.png"
TIES_PICTURE = "plan-ties.png"
ISOTROPY_PICTURE = "plan-isotropy.png"
PARETO_PICTURE = "plan-pareto.png"

# --- weights --------------------------------------------------------------------------------------

ADAPTER_FOLDER = "adapter"
"""In `weights/`, where the model has residuals."""
MERGED = "merged"
"""Folder of the weights that were materialized on calibration text: tied units made one, or the
factors of a plan with a basis."""

# --- evaluation -----------------------------------------------------------------------------------

SUMMARY_FILE = "summary.json"
BLOCKS_FILE = "evaluation-blocks.json"
SAMPLES_FILE = "samples.json"
SCORES_FILE = "task-scores.json"
COMPARISON_FILE = "comparison.json"
COMPARED_RECIPE = "recipe"
"""Of a comparison: the folder of the recipe itself, whose run also has *base*, *continued* and
*direct*."""

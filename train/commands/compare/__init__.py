"""`postshare compare`: a recipe beside its controls."""

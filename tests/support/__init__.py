"""What tests share: small models and runs, references, launchers, stand-ins."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

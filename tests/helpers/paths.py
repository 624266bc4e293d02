"""Places in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nni_haloc"
EXAMPLES = ROOT / "examples"
DIGITS = EXAMPLES / "digits" / "run.yml"

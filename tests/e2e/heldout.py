"""The demo model's held-out set for tests; `assets/demo_training/heldout.py` makes it."""

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).resolve().parents[2] / "assets" / "demo_training" / "heldout.py"
sys.path.insert(0, str(_FILE.parent))
try:
    _spec = importlib.util.spec_from_file_location("demo_heldout", _FILE)
    _set = importlib.util.module_from_spec(_spec)
    sys.modules["demo_heldout"] = _set
    _spec.loader.exec_module(_set)
finally:
    sys.path.remove(str(_FILE.parent))

ImageQuestion = _set.ImageQuestion
describe_prompts = _set.describe_prompts
image_questions = _set.image_questions
is_exact = _set.is_exact
story_prompts = _set.story_prompts

"""The code of the page on checkpoints that reads an exported model."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


def page_code() -> dict[str, Any]:
    """Its functions, `load` and `logits`."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (code,) = [block for block in blocks if "load_file" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    return names

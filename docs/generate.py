"""Write what is derived from the registry: the README's table of optimizers, and the stub for type checkers.

python docs/generate.py
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_optim.registry import stub, table

ROOT = Path(__file__).parents[1]


def main() -> None:
    readme = ROOT / "README.md"
    block = f"<!-- optimizers -->\n{table()}\n<!-- /optimizers -->"
    text = re.sub(r"<!-- optimizers -->.*<!-- /optimizers -->", lambda _: block, readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)
    (ROOT / "lightning_optim" / "optimizers" / "__init__.pyi").write_text(stub())


if __name__ == "__main__":
    main()

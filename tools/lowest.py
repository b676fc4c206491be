"""The lowest version of every dependency that pyproject.toml allows, as constraints for pip."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
for name, lowest in re.findall(r'"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)', text):
    if name != "setuptools":
        print(f"{name}=={lowest}")

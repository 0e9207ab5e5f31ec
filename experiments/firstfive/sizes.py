"""What `pip install counterpoise` and each extra bring, in MB on disk, from the metadata of an environment that has them.

python experiments/firstfive/sizes.py        # writes results/sizes.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def closure(wanted: list[str], found: dict[str, float]) -> dict[str, float]:
    """Name -> MB of what these requirements bring beyond `found`, all that they require in turn counted."""
    new: dict[str, float] = {}
    waiting = [(Requirement(text), "") for text in wanted]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        need, extra = waiting.pop()
        name = canonicalize_name(need.name)
        if (need.marker and not need.marker.evaluate({"extra": extra})) or (name, frozenset(need.extras)) in seen:
            continue
        seen.add((name, frozenset(need.extras)))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            new[f"{name} (not here)"] = 0.0
            continue
        if name not in found:
            files = [Path(str(package.locate_file(file))) for file in package.files or ()]
            new[name] = round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 1)
        for text in package.requires or ():
            waiting += [(Requirement(text), extra) for extra in ("", *need.extras)]
    return new


def main() -> None:
    """Write the table."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = closure(project["dependencies"], {})
    extras = {name: closure(project["optional-dependencies"][name], core) for name in ("align", "eval", "multitask")}
    content = {
        "command": "python experiments/firstfive/sizes.py",
        "commit": subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], text=True).strip(),
        "seed": None,
        "versions": {"python": sys.version.split()[0], "torch": distribution("torch").version},
        "total": {"counterpoise": round(sum(core.values())), **{k: round(sum(v.values())) for k, v in extras.items()}},
        "packages": {
            k: dict(sorted(v.items(), key=lambda i: -i[1])) for k, v in {"counterpoise": core, **extras}.items()
        },
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "sizes.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content["total"]))


if __name__ == "__main__":
    main()

"""What `pip install counterpoise` and each extra bring, in MB on disk, from the metadata of an environment that has them.

python experiments/firstfive/sizes.py        # writes results/sizes.json
python experiments/firstfive/sizes.py ray    # adds this extra, of another environment that has it
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

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
    core, added, place = closure(project["dependencies"], {}), sys.argv[1:], HERE / "results" / "sizes.json"
    names = added or ("align", "eval", "multitask")
    extras = {name: closure(project["optional-dependencies"][name], core) for name in names}
    content: dict[str, Any] = {
        "command": " ".join(["python experiments/firstfive/sizes.py", *added]),
        "commit": subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], text=True).strip(),
        "seed": None,
        "versions": {"python": sys.version.split()[0], "torch": distribution("torch").version},
    }
    total = {name: round(sum(sizes.values())) for name, sizes in extras.items()}
    packages = {k: dict(sorted(v.items(), key=lambda i: -i[1])) for k, v in {"counterpoise": core, **extras}.items()}
    if added:  # measured apart: the core is there already
        whole, packages = json.loads(place.read_text(encoding="utf-8")), {name: packages[name] for name in added}
        whole["total"] |= total
        whole["packages"] |= packages
        content = {**whole, "added": {**whole.get("added", {}), **dict.fromkeys(added, content)}}
    else:
        content |= {"total": {"counterpoise": round(sum(core.values())), **total}, "packages": packages}
    (HERE / "results").mkdir(exist_ok=True)
    place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content["total"]))


if __name__ == "__main__":
    main()

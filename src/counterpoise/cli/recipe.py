"""`counterpoise recipe`: recipes for other programs. Heavy imports inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from counterpoise.cli.help import Commands, option
from counterpoise.cli.options import Quiet
from counterpoise.cli.terminal import plain_errors, warn

app = Commands("recipe", "Take a recipe to other programs.")


@app.command()
def export(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.json of average, restore, search or merge.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="PRE and POSTs as mergekit finds them (default: as in RECIPE)."),
    ] = None,
    out: Annotated[Path | None, option("FILE", "YAML to write (default: to stdout).", "-o", "--out")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a recipe as YAML that mergekit runs to the same tensors, within its rounding.

    Example:
      counterpoise recipe export averaged/recipe.json pre post -o merge.yml
      mergekit-yaml merge.yml again
    """
    with plain_errors("nothing was written"):
        import yaml

        from counterpoise.averaging.export import exported
        from counterpoise.checkpoints.checkpoint import short
        from counterpoise.checkpoints.opening import open_checkpoint
        from counterpoise.records import write_whole

        here = [m for m in models or () if Path(m).is_dir()]
        kinds = {c.dtype(n) for m in here[1:2] for c in [open_checkpoint(m, base=open_checkpoint(here[0]))] for n in c}
        dtype = short(next(iter(kinds))) if len(kinds) == 1 else None
        found, told = exported(recipe, models or [], dtype)
        text = yaml.safe_dump(found, sort_keys=False)
        if out is not None:
            write_whole(out, text)
    warn(told)
    print(text if out is None else f"wrote {out}", end="" if out is None else "\n")

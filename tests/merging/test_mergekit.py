"""Recipes of mergekit: what they say of a tensor, what is refused by name, and mergekit's own tensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from counterpoise.averaging.average import average
from counterpoise.averaging.export import by_filter, exported
from counterpoise.averaging.from_mergekit import average_mergekit
from counterpoise.averaging.merge import Merge, MergeRecipe, merge
from counterpoise.averaging.mergekit import Mergekit
from counterpoise.averaging.recipe import Recipe
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.cli.app import app
from merging import dense, theirs
from tiny import nudge, tiny, tokenizer

NAMES = ["embed.weight", *(f"model.layers.{i}.{m}.weight" for i in range(12) for m in ("mlp", "attn")), "norm.weight"]
TWO: dict[str, Any] = theirs.CASES["linear by gradient and filter"]
TIES: dict[str, Any] = theirs.CASES["ties by layer and filter"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = tiny("llama")
    for seed, name in enumerate(("pre", "post1", "post2")):
        nudge(model, seed=seed, scale=0.02 if seed else 0.0).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


def weights(setting: Any, names: list[str] = NAMES) -> dict[str, float]:
    """What a setting of POST's weight says of each tensor."""
    sources = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": setting}}]
    plan = Mergekit({"merge_method": "linear", "models": sources})
    return {name: terms.weights[1] for name, terms in plan.terms(names).items()}


def test_a_list_is_a_gradient_over_the_layers_and_its_first_value_holds_outside_them() -> None:
    found = weights([0.0, 1.0, 0.5])
    assert found["embed.weight"] == found["norm.weight"] == found["model.layers.0.mlp.weight"] == 0.0
    assert found["model.layers.11.mlp.weight"] == 0.5
    assert found["model.layers.1.attn.weight"] == pytest.approx(2 / 11)


def test_the_first_filter_that_is_part_of_the_name_decides_as_mergekit_has_it() -> None:
    found = weights([{"filter": "layers.1", "value": 0.25}, {"filter": "mlp", "value": [0, 1]}, {"value": "1e-1"}])
    assert found["model.layers.10.attn.weight"] == 0.25  # a part of the name, as in mergekit
    assert found["model.layers.9.mlp.weight"] == pytest.approx(9 / 11)
    assert found["model.layers.9.attn.weight"] == 0.1


def changed(document: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {k: v for k, v in {**document, **more}.items() if v is not ...}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(TIES, merge_method="slerp"), "merge_method: expected linear, .*found 'slerp'"),
        (changed(TIES, base_model=...), "base_model: expected one for ties, found none"),
        (changed(TIES, tokenizer_source="union"), "tokenizer_source: expected pre or post1, .*found 'union'"),
        (changed(TWO, tokenizer={"source": "base", "tokens": {}}), "tokenizer.tokens: not honoured here"),
        (changed(TWO, chat_template="auto"), "chat_template: not honoured here"),
        (changed(TWO, modules={}), "modules: not honoured here"),
        (changed(TWO, name="mine"), "name: not honoured here"),
        (changed(TWO, base_model="other"), "base_model: expected pre or post1"),
        (changed(TWO, parameters={"density": 0.5}), "parameters.density: not honoured here; linear leaves nothing out"),
        (changed(TIES, parameters={"gamma": 0.5}), "parameters.gamma: not honoured here"),
        (changed(TIES, parameters={"lambda": "much"}), "lambda: expected a finite number, found 'much'"),
        (changed(TIES, parameters={"normalize": "maybe"}), "normalize: expected true or false, found 'maybe'"),
        (changed(TWO, models=[{"model": "a"}]), "models: expected two or more, each named once, found a"),
        (changed(TWO, models=[{"model": "a", "weight": 1}]), "models.weight: not honoured here"),
        (changed(TWO, models=[{"model": "a", "parameters": {"normalize": True}}]), "give it in parameters beside merge_method"),
        (changed(TWO, models=[{"model": "a"}, {"model": "b", "parameters": {"weight": [1, {"value": 2}]}}]), "values or filters"),
        (changed(TWO, models=[{"model": "a"}, {"parameters": {}}]), "models: expected model in each, found none"),
        (changed(TWO, models=..., slices=[{"parameters": {}}]), "slices: expected sources in each, found none"),
        (changed(TWO, merge_method=["linear"]), "merge_method: expected linear"),
        (changed(TWO, parameters={"weight": {"filter": "mlp"}}), "weight: expected a finite number, found None"),
        ([1], "expected a recipe of mergekit, with merge_method"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_its_name(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mergekit(document)


def test_slices_must_be_the_layers_of_the_models_in_their_order() -> None:
    sources = [[{"model": m, "layer_range": list(r)} for m in ("a", "b")] for r in ((0, 4), (5, 12))]
    with pytest.raises(ValueError, match=r"slices\[1\]: layer_range: expected the next layers .* from 4 on"):
        Mergekit({"merge_method": "linear", "slices": [{"sources": s} for s in sources]})
    short = {"merge_method": "linear", "slices": [{"sources": sources[0]}], "parameters": {"weight": 1}}
    with pytest.raises(ValueError, match="slices: expected all 12 layers, found 4"):
        Mergekit(short).terms(NAMES)


def test_a_missing_weight_names_the_model_and_the_tensor() -> None:
    plan = Mergekit({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]})
    with pytest.raises(ValueError, match=r"weight: expected one for b, found none for embed\.weight"):
        plan.terms(NAMES)


def test_one_post_is_an_average_with_a_recipe_of_ours_and_several_are_a_merge(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    recipe = tmp_path / "merge.yml"
    recipe.write_text(yaml.safe_dump({**TWO, "parameters": {"normalize": True}}), encoding="utf-8")
    done = CliRunner().invoke(app, ["average", "--recipe", str(recipe), "-o", str(tmp_path / "out"), "-q"])
    assert done.exit_code == 0, done.output
    kept = Recipe.read(tmp_path / "out" / "recipe.json")
    ratio = kept.partition.ratios(["model.layers.1.self_attn.q_proj.weight"], kept.ratios)
    assert ratio == {"model.layers.1.self_attn.q_proj.weight": 0.9 / 1.3}
    recipe.write_text(yaml.safe_dump(TIES), encoding="utf-8")
    made = average_mergekit(recipe, tmp_path / "ties")
    assert isinstance(made, MergeRecipe)
    again = merge("pre", ["post1", "post2"], tmp_path / "again", MergeRecipe.read(tmp_path / "ties" / "recipe.json"))
    assert again.plan == made.plan
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("ties", "again"))
    assert first == second


def test_models_are_named_once_and_their_dtype_is_that_of_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(yaml.safe_dump(TWO | {"dtype": "bfloat16"}), encoding="utf-8")
    done = CliRunner().invoke(app, ["average", "--recipe", str(recipe), "-o", str(tmp_path / "out"), "-q"])
    assert "dtype: expected float32, in which OUT is written as" in done.output
    done = CliRunner().invoke(app, ["average", "pre", "post1", "--recipe", str(recipe), "-o", str(tmp_path / "out")])
    assert "names its models itself; leave pre post1 out" in done.output
    recipe.write_text("merge_method: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"merge\.yaml, line 1: expected yaml"):
        average_mergekit(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_recipe_says_the_same_of_every_tensor(models: Path, tmp_path: Path) -> None:
    pre, post = str(models / "pre"), str(models / "post1")
    for blocks, count in (("layerwise", 6), ("module", 9), ("3", 3)):
        made = average(pre, post, tmp_path / blocks, [0.1 * i for i in range(count)], blocks=blocks, donor="pre")
        document, told = exported(tmp_path / blocks / "recipe.json", [pre, post])
        read = Mergekit(document).recipe(shapes(models / "pre"))
        assert not told
        assert read is not None
        names = shapes(models / "pre")
        assert read.partition.ratios(names, read.ratios) == made.partition.ratios(names, made.ratios)
        assert Mergekit(document).donor == "pre"
    assert len(document["models"][1]["parameters"]["weight"]) == 8  # by layer, not by tensor: there are 57


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    checkpoint = Checkpoint(folder)
    return {n: checkpoint.shape(n) for n in checkpoint}


def test_filters_fall_back_to_whole_names_longest_first() -> None:
    values = {"a.w": 0.1, "b.a.w": 0.2, "c.1.w": 0.3, "c.11.w": 0.4, "c.11.v": 0.5}
    assert weights(by_filter(values), list(values)) == values


def test_a_merge_that_mergekit_has_not_is_not_exported(models: Path, tmp_path: Path) -> None:
    pre, post = models / "pre", models / "post1"
    merge(pre, [post], tmp_path / "ties", Merge())
    done = CliRunner().invoke(app, ["recipe", "export", str(tmp_path / "ties" / "recipe.json"), str(pre), str(post)])
    assert done.exit_code == 1
    assert "scope: mergekit ranks the elements of each tensor" in done.output
    merge(pre, [post], tmp_path / "dare", Merge("dare", 0.5))
    done = CliRunner().invoke(app, ["recipe", "export", str(tmp_path / "dare" / "recipe.json"), str(pre), str(post)])
    assert "warning: mergekit draws other elements" in done.stderr
    assert yaml.safe_load(done.stdout)["merge_method"] == "dare_linear"


def test_in_bfloat16_the_choice_among_equal_magnitudes_is_all_that_can_differ(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names, weights, density = ("pre", "post1", "post2"), (1.0, 0.5), 0.3
    for name in names:
        narrow = {n: t.bfloat16() for n, t in Checkpoint(models / name).items()}
        shutil.copytree(models / name, name)
        save_file(narrow, Path(name) / "model.safetensors", metadata={"format": "pt"})
    sources = [
        {"model": m, "parameters": {"weight": w, "density": density}} for m, w in zip(names[1:], weights, strict=True)
    ]
    document = {"merge_method": "ties", "base_model": "pre", "models": sources}
    Path("merge.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    average_mergekit("merge.yml", "out")
    pre, *posts = (Checkpoint(Path(name)) for name in names)
    beyond = 0
    for name, made in Checkpoint(Path("out")).items():
        updates = [(post[name].float() - pre[name].float()).double().numpy() for post in posts]
        firsts = [dense.largest(u, density) for u in updates]
        lasts = [dense.largest(u.ravel()[::-1], density)[::-1].reshape(u.shape) for u in updates]
        expected, other = (
            dense.elected_plus([u * m for u, m in zip(updates, kept, strict=True)], weights) for kept in (firsts, lasts)
        )
        start, found = pre[name].double().numpy(), made.double().numpy()
        step = 2**-7 * np.maximum.reduce(
            [abs(start), abs(start + expected), *(abs(p[name].double().numpy()) for p in posts)]
        )
        assert (abs(found - start - expected) <= step).all()
        equal = np.logical_or.reduce([abs(u) == abs(u[m]).min() for u, m in zip(updates, firsts, strict=True)])
        far = abs(found - start - other) > 2 * step
        assert not (far & ~equal).any()
        beyond += int(far.sum())
    assert beyond  # mergekit keeps any of the equal ones, and is then as far away


@pytest.mark.skipif(not theirs.PYTHON, reason=theirs.ABSENT)
def test_mergekit_itself_makes_the_same_tensors(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    made = average("pre", "post1", tmp_path / "ours", [0.1, 0.9, 0.3, 1.2, 0.0, 1.0], blocks="layerwise")
    assert len(made.ratios) == 6
    cases = {name: theirs.CASES[name] for name in ("linear by gradient and filter", "ties by layer and filter")}
    cases["exported"] = exported(tmp_path / "ours" / "recipe.json", ["pre", "post1"])[0]
    for name, folder in theirs.run(models, cases).items():
        ours = tmp_path / "ours"
        if name != "exported":
            ours = tmp_path / name
            average_mergekit(models / f"theirs{[*cases].index(name)}.yml", ours)
        mine, other = Checkpoint(ours), Checkpoint(folder)
        assert set(mine) == set(other)
        for tensor in mine:
            torch.testing.assert_close(mine[tensor], other[tensor], rtol=1e-6, atol=1e-7)

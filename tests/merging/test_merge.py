"""TIES and DARE: by hand, against a dense numpy version, and from disk to disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from counterpoise.averaging.merge import Merge, MergeRecipe, merge
from counterpoise.averaging.recipe import Recipe
from counterpoise.averaging.thinning import elected_mean, generator_for, kept, largest
from counterpoise.checkpoints import preflight as module
from counterpoise.checkpoints.checkpoint import Checkpoint
from counterpoise.checkpoints.files import CheckpointError
from counterpoise.checkpoints.rounding import key_of, narrow
from counterpoise.cli.app import app
from merging import dense
from tiny import apart, nudge, save_pair, tiny, tokenizer

COARSE = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0])  # many equal magnitudes


def trim(update: torch.Tensor, density: float) -> torch.Tensor:
    """The update with all but its largest elements set to zero."""
    return update * largest(lambda: [update], density)(update)


def drop(update: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """u * m / density."""
    return update * kept(update.flatten(), density, generator).view(update.shape) / density


def test_a_merge_by_hand() -> None:
    # Kept of [4, -3, 1, 0.5] at density 0.5: 4 and -3. Of [-1, -2, 5, 0]: -2 and 5. Of [2, 6, -3, 0]: 6 and -3.
    left = [trim(torch.tensor(u), 0.5) for u in ([4.0, -3.0, 1.0, 0.5], [-1.0, -2.0, 5.0, 0.0], [2.0, 6.0, -3.0, 0.0])]
    assert [k.tolist() for k in left] == [[4, -3, 0, 0], [0, -2, 5, 0], [0, 6, -3, 0]]
    # Sums [4, 1, 2, 0]: signs +, +, +, none. Those that agree: {4}, {6}, {5}, {}.
    assert elected_mean(left, [1, 1, 1]).tolist() == [4, 6, 5, 0]
    # Weights 3, 1, 1: sums [12, -5, 2, 0]; second: -3 (weight 3) and -2 (weight 1) agree, -11 / 4.
    assert elected_mean(left, [3, 1, 1]).tolist() == [4, -2.75, 5, 0]


def test_no_sign_is_elected_where_updates_cancel() -> None:
    assert elected_mean([torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -3.0])], [1, 1]).tolist() == [0, -3]


@settings(max_examples=200, deadline=None)
@given(st.lists(COARSE | st.floats(-10, 10, width=32), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(1, 9))
def test_the_largest_are_kept_whatever_the_stretches(values: list[float], density: float, width: int) -> None:
    update = torch.tensor(values)
    mask = torch.from_numpy(dense.largest(update.double().numpy(), density))
    keeper = largest(lambda: update.split(width), density)
    assert torch.equal(torch.cat([keeper(part) for part in update.split(width)]), mask)
    assert torch.equal(trim(update, density), update * mask)


def test_magnitudes_at_the_ends_of_float32() -> None:
    tiny_, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    update = torch.tensor([0.0, tiny_ / 8, -tiny_, huge, -huge, 1.0])
    assert [int((trim(update, k / 6 + 1e-9) != 0).sum()) for k in range(1, 6)] == [1, 2, 3, 4, 5]
    assert trim(update, 1 / 6 + 1e-9).tolist() == [0, 0, 0, huge, 0, 0]  # the first of two equal ones


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(COARSE, min_size=5, max_size=5), min_size=1, max_size=4), st.randoms())
def test_elected_means_equal_the_dense_version(rows: list[list[float]], random) -> None:  # type: ignore[no-untyped-def]
    weights = [random.choice([0.5, 1.0, 2.0]) for _ in rows]
    wanted = dense.disjoint([np.array(r) for r in rows], weights)
    np.testing.assert_allclose(elected_mean([torch.tensor(r) for r in rows], weights), wanted, rtol=1e-6)


def test_dropping_keeps_the_expectation_and_its_seed() -> None:
    update = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) + 0.3
    once = drop(update, 0.25, generator_for(3, 0, "w"))
    pieces = generator_for(3, 0, "w")
    again = torch.cat([drop(part, 0.25, pieces) for part in update.split(777)])
    assert torch.equal(once, again)
    assert not torch.equal(once, drop(update, 0.25, generator_for(4, 0, "w")))
    there = once != 0
    assert torch.equal(once[there], update[there] / 0.25)
    assert abs(float(there.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 50_000) ** 0.5
    # Mean of u m / d: standard error sqrt(mean(u^2) (1 - d) / d / n).
    error = float((update.square().mean() * 3 / 50_000) ** 0.5)
    assert abs(float(once.mean() - update.mean())) < 4 * error


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, tuple[Path, list[Path]]]:
    """PRE and three POSTs, in float32 and bfloat16; the first POST in shards."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path_factory.mktemp("models")
        pre, post = save_pair(folder, dtype=dtype, shard=("1GB", "20KB"))
        posts = [post]
        for seed in (5, 6):
            nudge(tiny("llama", dtype=dtype), seed=seed).save_pretrained(folder / f"post{seed}")
            posts.append(folder / f"post{seed}")
        made[dtype] = pre, posts
    return made


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """float64 tensors, in the order of the files."""
    return {n: t.double().numpy() for n, t in Checkpoint(folder).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_from_disk_equals_the_dense_version(models, tmp_path, dtype, count, scope, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pre, posts = models[dtype][0], models[dtype][1][:count]
    monkeypatch.setattr(module, "CHUNK", 100)  # several stretches a tensor
    plan = Merge(density=0.3, ratio=0.8, scope=scope, weights=(1.0, 2.0, 0.5)[:count])
    merge(pre, posts, tmp_path / "out", plan)
    ordered = {n: t for names in Checkpoint(posts[0]).layout.values() for n in names for t in [arrays(pre)[n]]}
    wanted = dense.ties(ordered, [arrays(p) for p in posts], 0.3, 0.8, plan.weights, scope)
    made = Checkpoint(tmp_path / "out")
    assert made.layout == Checkpoint(posts[0]).layout
    keys = {n: key_of(Checkpoint(pre)[n], *(Checkpoint(p)[n] for p in posts)) for n in made}
    for name, tensor in made.items():
        assert tensor.dtype == dtype
        found, exact = tensor.double().numpy(), wanted[name]
        np.testing.assert_allclose(found, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7, err_msg=name)
        if dtype == torch.bfloat16:  # rounded once, from a sum that is right to float32
            rounded = narrow(torch.from_numpy(exact).float(), dtype, key=keys[name]).double().numpy()
            assert (found != rounded).mean() < 0.01, name


def test_one_post_untouched_elements_are_pres_and_touched_ones_posts(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pre, (post, *_) = models[torch.bfloat16]
    merge(pre, [post], tmp_path / "out", Merge(density=0.25))
    before, after, made = Checkpoint(pre), Checkpoint(post), Checkpoint(tmp_path / "out")
    kept = total = 0
    for name in made:
        is_post = made[name] == after[name]
        assert ((made[name] == before[name]) | is_post).all()
        kept, total = kept + int((made[name] != before[name]).sum()), total + made[name].numel()
    assert kept == int(0.25 * total)  # of the whole model


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_density_1_of_one_post_is_the_average(models, tmp_path: Path, method: str) -> None:  # type: ignore[no-untyped-def]
    pre, (post, *_) = models[torch.float32]
    merge(pre, [post], tmp_path / "out", Merge(method=method, density=1.0, ratio=0.6))  # type: ignore[arg-type]
    for name, tensor in Checkpoint(tmp_path / "out").items():
        assert torch.equal(tensor, apart(Checkpoint(pre)[name], Checkpoint(post)[name], 0.6))


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_dare_from_disk_equals_the_same_draws_in_memory(models, tmp_path: Path, method: str) -> None:  # type: ignore[no-untyped-def]
    pre, posts = models[torch.float32]
    merge(pre, posts, tmp_path / "out", Merge(method=method, density=0.4, ratio=0.7, weights=(1, 2, 1), seed=9))  # type: ignore[arg-type]
    before, afters = Checkpoint(pre), [Checkpoint(p) for p in posts]
    for name, tensor in Checkpoint(tmp_path / "out").items():
        updates = [drop(a[name] - before[name], 0.4, generator_for(9, i, name)).double() for i, a in enumerate(afters)]
        stacked = [u.numpy() for u in updates]
        mean = dense.disjoint(stacked, (1, 2, 1)) if method == "dare-ties" else np.average(stacked, 0, (1, 2, 1))
        np.testing.assert_allclose(tensor, before[name].double().numpy() + 0.7 * mean, rtol=1e-5, atol=2e-7)


def test_the_same_bytes_again_and_the_recipe_tells_all(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pre, posts = models[torch.bfloat16]
    made = merge(pre, posts, tmp_path / "a", Merge(method="dare", density=0.3, seed=4))
    read = MergeRecipe.read(tmp_path / "a" / "recipe.json")
    assert read == made
    merge(pre, posts, tmp_path / "b", read.plan)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert set(made.inputs) == {"pre", "post 1", "post 2", "post 3"}
    assert "model.safetensors" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(ValueError, match="expected a recipe"):
        Recipe.read(tmp_path / "a" / "recipe.json")  # `average` must not take it for its own
    (tmp_path / "r.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"not the recipe of a merge .*found 'other'"):
        MergeRecipe.read(tmp_path / "r.json")


def test_the_merge_loads_and_takes_the_donors_tokenizer(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import transformers

    pre, posts = models[torch.float32]
    merge(pre, posts, tmp_path / "out", Merge(density=0.5), donor="pre")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pre / "tokenizer.json").read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2).shape == (1, 5)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer())


def test_what_cannot_be_merged_is_refused_and_nothing_is_left(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pre, posts = models[torch.float32]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="expected one weight per POST, found 2 for 3"):
        merge(pre, posts, out, Merge(weights=(1, 2)))
    with pytest.raises(ValueError, match=r"density: expected a share in \(0, 1\], found 0"):
        Merge(density=0)
    with pytest.raises(ValueError, match="method: expected ties, dare, dare-ties, found 'slerp'"):
        Merge(method="slerp")  # type: ignore[arg-type]
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        merge(pre, posts, out, Merge())
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(posts[1] / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_bytes((posts[1] / "config.json").read_bytes())
    for plan in (Merge(), Merge(method="dare")):
        with pytest.raises(CheckpointError, match=r"found NaN or Inf in model\.norm\.weight"):
            merge(pre, [posts[0], broken], tmp_path / "new", plan)
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"PRE has 1 tensors that POST lacks, first model\.norm\.weight"):
        merge(pre, [posts[0], broken], tmp_path / "new", Merge())
    with pytest.raises(CheckpointError, match=r"only one of the two, first model\.norm\.weight"):
        merge(pre, [posts[0], broken], tmp_path / "new", Merge(), drop=["model.norm.weight"])
    with pytest.raises(CheckpointError, match=r"--drop 'v_head\.\*' matches no tensor"):
        merge(pre, posts, tmp_path / "new", Merge(), drop=["v_head.*"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]


def test_a_head_that_one_post_alone_has_is_dropped(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pre, posts = models[torch.float32]
    headed = tmp_path / "headed"
    headed.mkdir()
    tensors = load_file(posts[2] / "model.safetensors") | {"v_head.weight": torch.ones(3)}
    save_file(tensors, headed / "model.safetensors", {"format": "pt"})
    (headed / "config.json").write_bytes((posts[2] / "config.json").read_bytes())
    made = merge(pre, [posts[1], headed], tmp_path / "out", Merge(), drop=["v_head.*"])
    assert made.settings["dropped"] == ["v_head.weight"]
    merge(pre, [posts[1], posts[2]], tmp_path / "plain", Merge())
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "plain")]
    assert files[0] == files[1]


def test_a_recipe_gives_donor_and_drop_and_warns_of_other_inputs(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pre, posts = models[torch.float32]
    headed = tmp_path / "headed"
    headed.mkdir()
    tensors = load_file(posts[2] / "model.safetensors") | {"v_head[0].weight": torch.ones(3)}
    save_file(tensors, headed / "model.safetensors", {"format": "pt"})
    (headed / "config.json").write_bytes((posts[2] / "config.json").read_bytes())
    made = merge(pre, [headed], tmp_path / "a", Merge(method="dare", seed=2), donor="pre", drop=["v_head*"])
    assert made.settings == {"donor": "pre", "dropped": ["v_head[0].weight"]}

    def again(out: str, *given: Path, of: str = "a", more: tuple[str, ...] = ()) -> str:
        recipe = ["--recipe", str(tmp_path / of / "recipe.json"), "-o", str(tmp_path / out), "--quiet"]
        found = CliRunner().invoke(app, ["merge", *map(str, given), *recipe, *more])
        assert found.exit_code == 0, found.output
        return found.stderr

    assert again("b", pre, headed) == ""
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert (tmp_path / "b" / "tokenizer.json").is_file()  # PRE's: the POST has none
    again("c", pre, headed, more=("--donor", "post"))
    assert MergeRecipe.read(tmp_path / "c" / "recipe.json").settings["donor"] == "post"
    merge(pre, [posts[1]], tmp_path / "d", Merge())
    assert again("e", pre, posts[1], of="d") == ""
    other = again("f", pre, posts[2], of="d")
    assert other == f"warning: the recipe was made for another POST ({posts[1].name}) than this one\n"
    assert again("g", pre, *posts[:2], of="d") == "warning: the recipe was made for 1 POSTs, not for 2\n"


def test_the_command(models, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pre, posts = models[torch.bfloat16]

    def run(*more: object):  # type: ignore[no-untyped-def]
        return CliRunner().invoke(app, ["merge", *map(str, (pre, *posts[:2])), "--quiet", *map(str, more)])

    made = run("-o", tmp_path / "a", "--method", "dare-ties", "--density", 0.5, "--weights", "1,0.5", "--ratio", 0.9)
    assert made.exit_code == 0, made.output
    assert "dare-ties of 2 updates, density 0.5, ratio 0.9" in made.output
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["plan"]["weights"] == [1, 0.5]
    assert run("-o", tmp_path / "b", "--recipe", tmp_path / "a" / "recipe.json").exit_code == 0
    for name in Checkpoint(tmp_path / "a").layout:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for option, value in (("--density", 0.5), ("--weights", "1,1"), ("--seed", 0)):
        failed = run("-o", tmp_path / "c", "--recipe", tmp_path / "a" / "recipe.json", option, value)
        assert failed.exit_code == 1
        assert f"error: {option}: expected none of a merge's settings beside --recipe" in failed.output
    failed = run("-o", tmp_path / "c", "--weights", "1,x")
    assert failed.exit_code == 1
    assert "error: --weights: expected numbers with commas between them, found '1,x'" in failed.output

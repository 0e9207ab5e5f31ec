"""Each mitigation does what its equation says, once per optimiser step, with any method's step."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from counterpoise.alignment.mitigations.anchors import KD, L1, L2, OnlineMerging, soft_threshold
from counterpoise.alignment.mitigations.balanced import BalancedReplay
from counterpoise.alignment.mitigations.ema import MovingAverage
from counterpoise.alignment.mitigations.less import FreezeLowest
from counterpoise.alignment.mitigations.lowrank import LowRank
from counterpoise.alignment.mitigations.replay import Replay, read_corpus
from counterpoise.alignment.rsf import fine_tune
from counterpoise.alignment.settings import Settings
from counterpoise.alignment.training.models import load_frozen
from counterpoise.alignment.training.run import finished_state
from counterpoise.alignment.training.stepping import Mitigation, Step, adam, finish_all, start_all, trainable
from counterpoise.checkpoints.opening import open_checkpoint
from counterpoise.language.scoring import Example, response_nll, response_tokens, score_responses
from tiny import nudge, save_pair, tiny, tokenizer

EXAMPLES = [Example((1, 5 + i), tuple(range(6, 8 + i))) for i in range(8)]
CORPUS = [Example((1,), tuple(range(20, 23 + i))) for i in range(5)]
EVERY = {
    "l1": lambda: L1(0.3),
    "l2": lambda: L2(0.1),
    "kd": lambda: KD(0.5),
    "replay": lambda: Replay(0.5, CORPUS),
    "balanced replay": lambda: BalancedReplay(2.0, CORPUS, sizes=(2, 3)),
    "sma": lambda: MovingAverage(0.5),
    "elastic reset": lambda: MovingAverage(0.5, reset_every=2),
    "merging": lambda: OnlineMerging(0.1, keep=0.5),
    "freezing": lambda: FreezeLowest(2),
    "lora": lambda: LowRank(2),
}


def train(model: nn.Module, held: list[Mitigation], *, micro: int = 8, epochs: int = 3, lr: float = 1e-2) -> nn.Module:
    start_all(held, model, tokenizer())
    optimizer = adam(model, lr)
    sizes = {"epochs": epochs, "batch_size": 8, "micro_batch_size": micro}
    fine_tune(model, EXAMPLES, optimizer, Settings(**sizes), random.Random(0), held)
    finish_all(held, model)
    return model


def gap(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(sum((x.detach() - y.detach()).square().sum() for x, y in pairs)) ** 0.5


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_1_by_8_is_one_of_8_by_1(name: str) -> None:
    one, eight = (train(tiny("llama", dtype=torch.float64), [EVERY[name]()], micro=micro, lr=1e-3) for micro in (8, 1))
    for a, b in zip(one.parameters(), eight.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    plain = train(tiny("llama", dtype=torch.float64), [], lr=1e-3)
    assert gap(one, plain) > 1e-5  # it does something


@pytest.mark.parametrize("name", EVERY)
def test_a_state_that_is_saved_and_loaded_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    def steps(model: nn.Module, held: Mitigation, optimizer: torch.optim.Optimizer, count: int) -> None:
        sizes = {"epochs": count, "batch_size": 4, "micro_batch_size": 4}
        fine_tune(model, EXAMPLES[:4], optimizer, Settings(**sizes), random.Random(1), [held])

    def begin() -> tuple[nn.Module, Mitigation, torch.optim.Optimizer]:
        model, held = tiny("llama"), EVERY[name]()
        held.start(model, tokenizer())
        return model, held, adam(model, 1e-2)

    model, held, optimizer = begin()
    steps(model, held, optimizer, 3)
    state = held.state_dict()
    saved = {n: p.detach().clone() for n, p in trainable(model).items()}
    torch.save((state, saved, optimizer.state_dict()), tmp_path / "state.pt")
    fresh, other, second = begin()
    state, weights, moments = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        for n, p in trainable(fresh).items():
            p.copy_(weights[n])
    other.load_state_dict(state)
    second.load_state_dict(moments)
    for m, h, o in ((model, held, optimizer), (fresh, other, second)):
        steps(m, h, o, 2)
        h.finish(m)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_l1_is_proximal_and_returns_weights_to_pre_exactly() -> None:
    values = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5])
    assert soft_threshold(values, 0.2).tolist() == pytest.approx([-0.3, 0.0, 0.0, 0.0, 0.3])
    model, pre = tiny("llama"), tiny("llama")
    held = L1(2.0)
    held.start(model, None)
    nudge(model, scale=0.01)
    moved = [p.detach().clone() for p in model.parameters()]
    held.after_update(Step(model, [], 0.005, 1))  # a threshold of 0.01
    for now, was, before in zip(model.parameters(), moved, pre.parameters(), strict=True):
        inside = (was - before).abs() < 0.0099
        assert torch.equal(now[inside], before[inside])
        outside = (was - before).abs() > 0.0101
        torch.testing.assert_close(
            (now - before)[outside].abs(), (was - before)[outside].abs() - 0.01, atol=1e-6, rtol=0
        )


def test_l1_of_strength_1_undoes_a_first_step_of_adam() -> None:
    model = train(tiny("llama"), [L1(1.01)], epochs=1)
    assert gap(model, tiny("llama")) == 0


def test_l2_adds_the_gradient_of_its_penalty() -> None:
    model, pre = nudge(tiny("llama", dtype=torch.float64)), tiny("llama", dtype=torch.float64)
    held = L2(0.07, dict(pre.named_parameters()))
    held.start(model, None)
    response_nll(model, EXAMPLES).backward()
    before = [p.grad.clone() for p in model.parameters()]
    held.before_update(Step(model, EXAMPLES, 1.0, 8))
    added = [p.grad - g for p, g in zip(model.parameters(), before, strict=True)]
    model.zero_grad()
    penalty = sum((p - q.detach()).square().sum() for p, q in zip(model.parameters(), pre.parameters(), strict=True))
    (0.07 * penalty).backward()
    for p, a in zip(model.parameters(), added, strict=True):
        torch.testing.assert_close(p.grad, a)


def test_kd_is_the_divergence_from_pre_over_the_response_tokens() -> None:
    model, pre = nudge(tiny("gpt2", dtype=torch.float64), scale=0.1), tiny("gpt2", dtype=torch.float64)
    held = KD(0.3, pre)
    held.start(model, None)
    held.add_gradients(Step(model, EXAMPLES, 1.0, 3))
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for example in EXAMPLES:  # one by one, by torch's own formula
        ids = torch.tensor([example.prompt + example.response])
        spots = slice(len(example.prompt) - 1, -1)
        logits, target = model(ids).logits[0, spots], pre(ids).logits[0, spots].detach()
        total = total + nn.functional.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="sum"
        )
    (0.3 * total / response_tokens(EXAMPLES)).backward()
    for p, g in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize(("weak", "strong"), [(L2(0.01), L2(10.0)), (L1(0.1), L1(0.8)), (KD(0.01), KD(30.0))])
def test_a_stronger_anchor_keeps_the_model_nearer(weak: Mitigation, strong: Mitigation) -> None:
    pre = tiny("llama")

    def drift(model: nn.Module) -> float:
        if not isinstance(strong, KD):
            return gap(model, pre)
        with torch.no_grad():
            p, q = (score_responses(m, EXAMPLES).logprobs() for m in (pre, model))
        return float((p - q).abs().sum())

    free, near, nearer = (drift(train(tiny("llama"), held, epochs=8)) for held in ([], [weak], [strong]))
    assert free > near > nearer


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_replay_holds_its_token_ratio_in_the_long_run(ratio: float) -> None:
    held = Replay(ratio, CORPUS)
    held.start(tiny("llama"), None)
    drawn = [response_tokens([CORPUS[i] for i in held._draw(ratio * 40)]) for _ in range(50)]
    assert sum(drawn) == pytest.approx(ratio * 40 * 50, abs=8)
    assert abs(drawn[0] - ratio * 40) <= 8


def test_the_corpus_that_is_being_forgotten_is_replayed_more() -> None:
    """One corpus is what is trained on anyway; the other is contradicted by it, and its loss rises."""
    other = [Example(e.prompt, tuple(reversed(e.response))) for e in EXAMPLES]
    held = BalancedReplay(0.5, EXAMPLES + other, sizes=(8, 8))
    train(tiny("llama"), [held], epochs=40)
    level = held.bandit.last_losses
    assert level[1] > level[0]
    assert held.bandit.weights()[1] > 0.55
    drawn = held._draw(20.0 * response_tokens(EXAMPLES))
    assert sum(i >= 8 for i in drawn) > 0.55 * len(drawn)
    assert sorted(set(drawn)) == list(range(16))


def test_what_is_not_forgotten_moves_no_share_and_a_resumed_replay_measures_nothing_again() -> None:
    """Few texts a step, of very different losses: luck of the draw is no forgetting."""
    held = BalancedReplay(0.2, [*CORPUS, *EXAMPLES], sizes=(5, 8))
    train(model := tiny("llama"), [held], lr=0.0, epochs=20)
    assert held.bandit.updates == 20
    assert held.bandit.probabilities().tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    assert held.told()["replay 2 loss ratio"] == pytest.approx(1.0, abs=1e-4)
    state = held.state_dict()
    again = BalancedReplay(0.2, [*CORPUS, *EXAMPLES], sizes=(5, 8))
    again.start(nudge(model), None)
    again.load_state_dict(state)
    again.add_gradients(Step(model, EXAMPLES, 1.0, 8))
    assert again._before == state["before"]
    assert again.told()["replay 2 loss ratio"] != pytest.approx(1.0, abs=1e-3)


def test_corpora_share_the_tokens_and_not_the_examples() -> None:
    long, short = Example((1,), (5,) * 500), Example((1,), (6,) * 5)
    held = BalancedReplay(1.0, [long] * 20 + [short] * 20, sizes=(20, 20))
    held.start(tiny("llama"), None)
    drawn = [place for _ in range(500) for place in held._draw(200.0)]
    tokens = [500 * sum(i < 20 for i in drawn), 5 * sum(i >= 20 for i in drawn)]
    assert tokens[0] / sum(tokens) == pytest.approx(0.5, abs=0.01)
    assert sum(tokens) == pytest.approx(500 * 200, abs=500)
    others = BalancedReplay(1.0, held.examples, sizes=(21, 19))
    assert others.describe() != held.describe()


def test_replay_weighs_a_replayed_token_like_a_new_one() -> None:
    model = tiny("llama", dtype=torch.float64)
    held = Replay(len(CORPUS[0].response) / response_tokens(EXAMPLES), CORPUS[:1])
    held.start(model, None)
    held.add_gradients(Step(model, EXAMPLES, 1.0, 8))
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (response_nll(model, CORPUS[:1]) / response_tokens(EXAMPLES)).backward()
    for p, g in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_corpus_is_read_in_pieces_and_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "abcdefg"}\n{"prompt": "ab", "response": "cd"}\n')
    words = tokenizer()
    found = read_corpus(path, words, max_tokens=4)
    assert ["".join(words.decode(list(e.prompt + e.response))) for e in found] == ["abcd", "efg", "abcd"]
    assert found[0].prompt == (4,)
    path.write_text('{"text": "abc"}\n{"txt": "abc"}\n')
    with pytest.raises(ValueError, match=r"line 2: expected .*found \{'txt': 'abc'\}"):
        read_corpus(path, words)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="found none"):
        read_corpus(path, words)


def test_sma_is_the_average_it_says_and_lies_in_checkpoints_on_the_way() -> None:
    model, held = tiny("llama"), MovingAverage(0.75)
    held.start(model, None)
    name, parameter = next(iter(trainable(model).items()))
    expected = parameter.detach().clone().double()
    for seed in range(4):
        nudge(model, seed=seed)
        held.after_update(Step(model, [], 1.0, 1))
        expected = 0.75 * expected + 0.25 * parameter.detach().double()
    own = parameter.detach().clone()
    with held.as_finished(model):
        torch.testing.assert_close(model.state_dict()[name].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(parameter, own)
    held.finish(model)
    torch.testing.assert_close(parameter.double(), expected, atol=1e-6, rtol=1e-6)


def test_elastic_reset_sets_the_model_to_the_average_and_the_average_to_pre() -> None:
    model, pre = tiny("llama"), tiny("llama")
    held = MovingAverage(0.5, reset_every=2)
    held.start(model, None)
    for seed in range(2):
        nudge(model, seed=seed)
        held.after_update(Step(model, [], 1.0, 1))
    name, parameter = next(iter(trainable(model).items()))
    assert not torch.equal(parameter, pre.get_parameter(name))
    assert torch.equal(held.state_dict()["average"][name], pre.get_parameter(name))
    own = parameter.detach().clone()
    held.finish(model)  # ends on a reset: the average that was, not PRE
    assert torch.equal(parameter, own)


def test_freezing_keeps_the_lowest_layers_and_the_embeddings() -> None:
    model, pre = train(tiny("llama", tied=False), [FreezeLowest(2)]), tiny("llama", tied=False)
    same = {n for n, p in model.named_parameters() if torch.equal(p, pre.get_parameter(n))}
    assert same == {n for n in same if n.startswith(("model.layers.0.", "model.layers.1.", "model.embed_tokens"))}
    assert len(same) == 2 * 9 + 1
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="expected 0 to 5 layers"):
        FreezeLowest(6).start(tiny("llama"), None)


def test_online_merging_without_base_is_a_step_towards_pre() -> None:
    model, pre = nudge(tiny("llama")), tiny("llama")
    held = OnlineMerging(0.2, pre=dict(pre.named_parameters()))
    held.start(model, None)
    before = [p.detach().clone() for p in model.parameters()]
    step = Step(model, [], 1.0, 1)
    held.before_update(step)
    nudge(model, seed=7)
    after = [p.detach().clone() for p in model.parameters()]
    held.after_update(step)
    for now, b, a, p in zip(model.parameters(), before, after, pre.parameters(), strict=True):
        torch.testing.assert_close(now, b + 0.8 * (a - b) + 0.2 * (p - b), atol=1e-6, rtol=1e-5)


def test_online_merging_adds_the_base_update_and_keeps_a_share_of_elements() -> None:
    model, base = tiny("llama"), nudge(tiny("llama"), scale=0.5, seed=3)
    pre = {n: p.detach().clone() for n, p in model.named_parameters()}
    held = OnlineMerging(1.0, keep=0.25, base=dict(base.named_parameters()))
    held.start(model, None)
    step = Step(model, [], 1.0, 1)
    held.before_update(step)
    held.after_update(step)
    moved = total = 0
    for name, now in model.named_parameters():
        tau = pre[name] - base.get_parameter(name)
        changed = now != pre[name]
        torch.testing.assert_close(now[changed], (pre[name] + tau)[changed], atol=1e-5, rtol=1e-4)
        moved, total = moved + int(changed.sum()), total + now.numel()
    assert moved / total == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_changes_linear_layers_by_low_rank_and_comes_out_as_a_plain_model(family: str) -> None:
    model, pre = tiny(family), tiny(family)
    held = LowRank(2)
    start_all([held], model, None)
    assert finished_state(pre) is None
    optimizer = adam(model, 1e-2)
    sizes = {"epochs": 2, "batch_size": 8, "micro_batch_size": 8}
    fine_tune(model, EXAMPLES, optimizer, Settings(**sizes), random.Random(0), [held])
    on_the_way = finished_state(model)
    logits = model(torch.tensor([[1, 5, 6]])).logits
    held.finish(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in pre.named_parameters()]
    torch.testing.assert_close(model(torch.tensor([[1, 5, 6]])).logits, logits, atol=1e-5, rtol=1e-4)
    assert set(on_the_way) == set(pre.state_dict())
    ranks = set()
    for name, p in model.named_parameters():
        torch.testing.assert_close(on_the_way[name], p)
        if not torch.equal(p, pre.get_parameter(name)):
            ranks.add(int(torch.linalg.matrix_rank(p.detach() - pre.get_parameter(name), atol=1e-5)))
    assert ranks <= {1, 2}
    assert ranks


@pytest.mark.parametrize("make", [L1, L2, OnlineMerging])
@pytest.mark.parametrize("given", [True, False])
def test_anchors_on_weights_refuse_lora(make: type[L1 | L2 | OnlineMerging], given: bool, tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    held = make(0.1, pre=open_checkpoint(pre) if given else None)
    with pytest.raises(ValueError, match="with LoRA, whose factors are no part of PRE, use kd, replay or sma"):
        start_all([held, LowRank(2)], tiny("llama"), None)


def test_elastic_reset_with_lora_returns_to_the_factors_start_at_which_the_model_is_pre(tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    held, model = MovingAverage(0.5, 3, open_checkpoint(pre)), tiny("llama")
    start_all([LowRank(2), held], model, tokenizer())
    optimizer = adam(model, 1e-2)
    fine_tune(model, EXAMPLES, optimizer, Settings(epochs=3, batch_size=8), random.Random(0), [held])
    factors = {n: p.detach().clone() for n, p in trainable(model).items()}
    assert any(bool(p.any()) for n, p in factors.items() if ".lora_B." in n)  # the model is the average that was
    for name, factor in trainable(model).items():
        factor.data.copy_(held.state_dict()["average"][name])
    ids, before = torch.tensor([[1, 5, 6]]), tiny("llama")
    assert torch.equal(model(ids).logits, before(ids).logits)
    plain, given = ([MovingAverage(0.5, 2, mapping), LowRank(2)] for mapping in (None, open_checkpoint(pre)))
    a, b = (train(tiny("llama"), held) for held in (plain, given))
    assert gap(a, b) == 0 < gap(a, before)


def test_a_record_tells_weights_from_others(tmp_path: Path) -> None:
    pre, post = map(open_checkpoint, save_pair(tmp_path))
    named = [OnlineMerging(0.1, base=base).describe().get("base") for base in (None, pre, post, dict(pre), dict(post))]
    assert named[:3] == [None, pre.sha256, post.sha256]
    assert named[3] != named[4]
    assert named[3] == OnlineMerging(0.1, base={n: pre[n].clone() for n in reversed(list(pre))}).describe()["base"]


def test_mitigations_compose(tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    checkpoint = open_checkpoint(pre)
    held = [FreezeLowest(1), KD(0.1, load_frozen(pre)), Replay(1.0, CORPUS), L2(0.1, checkpoint), L1(0.1, checkpoint)]
    model = train(tiny("llama"), [*held, MovingAverage(0.9)])
    assert 0 < gap(model, tiny("llama")) < gap(train(tiny("llama"), []), tiny("llama"))
    lora = train(tiny("llama"), [MovingAverage(0.5), Replay(1.0, CORPUS), LowRank(2)])
    assert gap(lora, tiny("llama")) > 0


def test_a_frozen_reference_is_memory_mapped_and_the_same_model(tmp_path: Path) -> None:
    pre, _ = save_pair(tmp_path)
    frozen, model = load_frozen(pre), tiny("llama")
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(frozen(ids).logits, model(ids).logits)
    maps = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").is_file() else []
    spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps if str(pre) in line]
    if maps:
        assert all(any(a <= p.data_ptr() < b for a, b in spans) for p in frozen.parameters())
    held = L1(0.1, open_checkpoint(pre))
    held.start(model, None)
    assert all(t.data_ptr() != p.data_ptr() for t, p in zip(held._pre.values(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1(-1.0), "l1: expected a strength of at least 0"),
        (lambda: L2(float("nan")), "l2: expected a strength"),
        (lambda: KD(-0.1), "kd: expected a strength"),
        (lambda: Replay(0.0, CORPUS), "replay: expected a positive token ratio"),
        (lambda: Replay(math.inf, CORPUS), "replay: expected a positive token ratio that is finite, found inf"),
        (lambda: Replay(1.0, []), "replay: expected examples"),
        (lambda: BalancedReplay(1.0, CORPUS, sizes=(5,)), "replay: expected the sizes of two corpora"),
        (lambda: MovingAverage(1.0), "sma: expected a decay in"),
        (lambda: MovingAverage(0.9, reset_every=0), "sma: expected a reset every 1 or more"),
        (lambda: OnlineMerging(2.0), "merging: expected a weight"),
        (lambda: OnlineMerging(0.1, keep=0.0), "merging: expected keep"),
        (lambda: LowRank(0), "lora: expected a rank"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

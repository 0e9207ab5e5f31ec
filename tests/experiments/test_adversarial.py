"""The task discriminator: who learns what, with which sign."""

import pytest
import torch
from adversarial import Adversarial, TaskDiscriminator, adversarial_mtl, reverse_gradient, tchebycheff_adversarial
from torch import nn
from torch.nn import functional as F

from counterpoise.classification import Design, build_classifier, train
from counterpoise.classification.data import Split, TaskData
from counterpoise.multitask import BanditMTL


def test_the_features_get_the_gradient_reversed_and_the_classifier_does_not():
    torch.manual_seed(0)
    discriminator = TaskDiscriminator(4, 3, strength=0.3)
    features, task = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    discriminator(features, task).backward()
    plain = features.detach().clone().requires_grad_()
    loss = F.cross_entropy(discriminator.classifier(plain), task)
    to_features, to_weight = torch.autograd.grad(loss, [plain, discriminator.classifier.weight])
    torch.testing.assert_close(features.grad, -0.3 * to_features)
    torch.testing.assert_close(discriminator.classifier.weight.grad, to_weight)


def test_reversal_against_finite_differences():
    x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    reverse_gradient(x, 2.0).pow(3).sum().backward()
    h = 1e-5
    numeric = [((v + h) ** 3 - (v - h) ** 3) / (2 * h) for v in x.tolist()]
    assert x.grad.tolist() == pytest.approx([-2 * v for v in numeric], rel=1e-6)


def encoder_leak(strength: float) -> float:
    """Accuracy with which tasks can be told from the features after training with that strength."""
    torch.manual_seed(0)
    x, task = torch.randn(300, 3), torch.arange(300) % 2
    x[:, 0] += 3.0 * task  # one input gives the task away; the target needs another one
    y = x[:, 1:2]
    encoder, head = nn.Linear(3, 2), nn.Linear(2, 1)
    balance = adversarial_mtl(2, features=2, strength=strength)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters(), *balance.parameters()], lr=0.02)
    for _ in range(300):
        features = encoder(x)
        errors = (head(features) - y).square().squeeze(-1)
        losses = torch.stack([errors[task == i].mean() for i in range(2)])
        optimizer.zero_grad()
        balance(losses, features_BF=features, task_B=task).backward()
        optimizer.step()
        balance.step()
    guesses = balance.discriminator.classifier(encoder(x)).argmax(-1)
    return float((guesses == task).float().mean())


def test_training_hides_the_task_from_the_discriminator():
    assert encoder_leak(0.0) > 0.75
    assert encoder_leak(2.0) < 0.7


def test_any_weighting_can_be_joined_and_its_state_is_saved():
    balance = Adversarial(BanditMTL(2, rho=0.3), features=4)
    losses, features, task = torch.tensor([1.0, 2.0]), torch.randn(4, 4), torch.tensor([0, 1, 0, 1])
    scalar = balance(losses, features_BF=features, task_B=task)
    expected = 1.5 + float(balance.discriminator(features, task).detach())
    assert float(scalar.detach()) == pytest.approx(expected)
    balance.step()
    fresh = Adversarial(BanditMTL(2, rho=0.3), features=4)
    fresh.load_state_dict(balance.state_dict())
    assert fresh.metrics() == balance.metrics()
    assert fresh.tasks == balance.tasks == ("0", "1")


def test_parts_of_a_window_add_up_to_the_whole_when_the_discriminator_is_linear_in_rows():
    balance = Adversarial(BanditMTL(2, rho=0.3), features=4)
    losses, features, task = torch.tensor([1.0, 2.0]), torch.randn(4, 4), torch.tensor([0, 1, 0, 1])
    totals = {"0": 2, "1": 2}
    parts = [
        float(balance(losses, [1, 1], totals, features_BF=features[i : i + 2], task_B=task[i : i + 2]).detach())
        for i in (0, 2)
    ]
    balance.weighting.discard()
    whole = float(balance(losses, [2, 2], features_BF=features, task_B=task).detach())
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


def test_tchebycheff_adversarial_trains_the_worst_task():
    balance = tchebycheff_adversarial(2, features=4)
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    balance(losses, features_BF=torch.zeros(2, 4), task_B=torch.tensor([0, 1])).backward()
    assert losses.grad.tolist() == [0.0, 0.5]


def test_below_the_threshold_the_features_feel_nothing():
    for threshold, felt in ((0.0, True), (100.0, False)):
        torch.manual_seed(0)
        balance = tchebycheff_adversarial(2, features=4, threshold=threshold)
        features = torch.randn(2, 4, requires_grad=True)
        balance(torch.ones(2), features_BF=features, task_B=torch.tensor([0, 1])).backward()
        assert (features.grad is not None and bool(features.grad.any())) is felt
        assert balance.discriminator.classifier.weight.grad.any()


def test_missing_features_are_asked_for_in_training_only():
    balance = adversarial_mtl(2, features=4)
    with pytest.raises(TypeError, match="features_BF"):
        balance(torch.ones(2))
    assert float(balance.eval()(torch.ones(2))) == 1.0


def test_one_task_has_nothing_to_tell_apart():
    with pytest.raises(ValueError, match="at least 2"):
        TaskDiscriminator(4, 1)


def test_a_classifier_is_trained_with_it_and_its_features():
    texts = ("red apple", "blue sky", "red rose", "blue sea")
    parts = [Split(texts, labels) for labels in (("a", "b", "a", "b"), ("b", "a", "b", "a"))]
    found = [TaskData(name, ("a", "b"), p, p, p) for name, p in zip(("one", "two"), parts, strict=True)]
    classifier = build_classifier(found, Design("textcnn", width=4, max_tokens=8), dimension=4)
    torch.manual_seed(0)
    balance = adversarial_mtl(["one", "two"], features=classifier.model.encoder.features)
    before = balance.discriminator.classifier.weight.detach().clone()
    train(found, classifier, balance, epochs=1, batch_size=2)
    assert not torch.equal(balance.discriminator.classifier.weight, before)

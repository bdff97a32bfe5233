"""CaCoVID, training loss."""

import dataclasses
import math

import pytest
import torch

from tests.compression.helpers import load_golden, random_inputs
from tests.policies.fixture import close
from tokensieve.errors import BadOption
from tokensieve.policies import CACOVID, Decisions, balanced_weights, cacovid_loss, two_class_logprobs

CASES = ["cacovid_loss-first-update", "cacovid_loss-kl", "cacovid_loss-round3"]
NAN = float("nan")


def golden_decisions(golden, head):
    return Decisions(
        logits=golden[f"in_{head}_logits"].requires_grad_(),
        old_logits=golden[f"in_{head}_logits_old"],
        chosen=golden[f"in_{head}_mask"],
        rewards=golden[f"in_{head}_reward"],
    )


def decisions(num_subsets=6, num_places=10, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    old = random_inputs(num_places, 2, seed=seed)
    drawn = Decisions(
        logits=(old + 0.3 * random_inputs(num_places, 2, seed=seed + 1)).requires_grad_(),
        old_logits=old,
        chosen=(torch.rand(num_subsets, num_places, generator=generator) < 0.3).long(),
        rewards=torch.rand(num_subsets, generator=generator),
    )
    return dataclasses.replace(drawn, **changes)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


# --- against the official code, and by hand


@pytest.mark.parametrize("case", CASES)
def test_as_the_official_code(case):
    with_scalars = load_golden_with_scalars(case)
    params = with_scalars["params"]
    tokens, frames = golden_decisions(with_scalars, "token"), golden_decisions(with_scalars, "frame")
    objective = dataclasses.replace(
        CACOVID, clip_low=params["epsilon_low"], clip_high=params["epsilon_high"], kl_weight=params["kl_weight"]
    )
    loss = cacovid_loss(tokens, frames, objective=objective)
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.total.detach(), with_scalars["out_loss"], **near)
    torch.testing.assert_close(loss.tokens.total.detach(), with_scalars["out_token_loss"], **near)
    torch.testing.assert_close(loss.frames.total.detach(), with_scalars["out_frame_loss"], **near)
    for head, part, terms in (("token", tokens, loss.tokens), ("frame", frames, loss.frames)):
        torch.testing.assert_close(
            gradient(loss.total, part.logits), with_scalars[f"out_grad_{head}_logits"], rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(terms.advantages.float(), with_scalars[f"out_adv_{head}"], rtol=1e-5, atol=1e-5)


def load_golden_with_scalars(case):
    """With the 0-d outputs, which `load_golden` leaves out."""
    import numpy as np

    from tests.compression.helpers import GOLDEN

    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as stored:
        scalars = {key: torch.from_numpy(stored[key]) for key in stored.files if key.startswith("out_")}
    return {**load_golden(case), **scalars}


def worked(**changes):
    n, c = torch.arange(6, dtype=torch.float64)[:, None], torch.arange(2, dtype=torch.float64)
    return Decisions(
        logits=0.2 * ((3 * n + 4 * c) % 5),
        old_logits=0.2 * ((2 * n + 3 * c) % 5),
        chosen=torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0]]),
        rewards=torch.tensor([1.0, 0, 0]),
        **changes,
    )


def test_worked_values():
    terms = cacovid_loss(worked(), objective=dataclasses.replace(CACOVID, kl_weight=0.01)).tokens
    close(terms.policy, 0.01753028)
    close(terms.kl, 0.03211452)
    close(terms.total, 0.01785142)


def test_the_equations_one_number_at_a_time():
    tokens = decisions()
    logp, logp_old = tokens.logits.detach().double().log_softmax(1), tokens.old_logits.double().log_softmax(1)
    mean, std = tokens.rewards.double().mean(), tokens.rewards.double().std()
    rows = []
    for chosen, reward in zip(tokens.chosen.tolist(), tokens.rewards.double(), strict=True):
        advantage, share = (reward - mean) / (std + 1e-4), sum(chosen) / 10
        top = bottom = 0
        for i, kept in enumerate(chosen):
            weight = 1 - share if kept else share
            ratio = (logp[i, kept] - logp_old[i, kept]).exp()
            loss = -min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            k3 = 0.5 / logp[i, kept].exp() - (math.log(0.5) - logp[i, kept]) - 1
            top, bottom = top + weight * (loss + 0.05 * k3), bottom + weight
        rows.append(top / bottom)
    got = cacovid_loss(tokens, objective=dataclasses.replace(CACOVID, kl_weight=0.05)).total
    torch.testing.assert_close(got.detach().double(), sum(rows) / 6, rtol=1e-5, atol=1e-7)


# --- parts


def test_logprobs_of_decisions():
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    chosen = torch.tensor([[True, True], [False, False]])
    probability = two_class_logprobs(logits, chosen).exp()
    right = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(probability, torch.tensor([[0.5, right], [0.5, 1 - right]]))
    per_row = torch.stack([logits, logits.flip(0)])
    assert torch.equal(two_class_logprobs(per_row, chosen)[0], two_class_logprobs(logits, chosen)[0])
    assert torch.equal(two_class_logprobs(per_row, chosen)[1], two_class_logprobs(logits.flip(0), chosen)[1])
    assert two_class_logprobs(logits.bfloat16(), chosen).dtype == torch.float32


def test_kept_and_dropped_weigh_the_same():
    chosen = torch.tensor([[1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    valid = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).expand(3, 7)
    weights = balanced_weights(chosen, valid)
    torch.testing.assert_close(weights[0], torch.tensor([0.8, 0.2, 0.2, 0.2, 0.2, 0, 0]))
    assert weights[1:].abs().max() == 0
    assert balanced_weights(chosen.bool(), torch.zeros(3, 7).bool()).abs().max() == 0


# --- invariants


def test_equal_rewards_give_no_loss_and_no_gradient():
    tokens = decisions(rewards=torch.full((6,), 0.4))
    loss = cacovid_loss(tokens).total
    assert loss == 0 and gradient(loss, tokens.logits).abs().max() == 0


def test_the_first_step_follows_the_advantage():
    for seed in range(3):
        tokens = decisions(num_subsets=2, seed=seed)
        tokens = dataclasses.replace(tokens, old_logits=tokens.logits.detach(), chosen=torch.eye(2, 10).long())
        loss = cacovid_loss(tokens)
        slope = gradient(loss.total, tokens.logits)[:2, 1]  # keep-logit of the one token that each subset kept
        assert torch.equal(slope.sign(), -loss.tokens.advantages.float().sign())


def test_subsets_may_be_permuted():
    tokens, order = decisions(), torch.tensor([4, 2, 0, 5, 3, 1])
    moved = dataclasses.replace(tokens, chosen=tokens.chosen[order], rewards=tokens.rewards[order])
    torch.testing.assert_close(cacovid_loss(moved).total, cacovid_loss(tokens).total)


@pytest.mark.parametrize("value", [0, 1])
def test_a_subset_of_all_or_none_adds_0_and_counts(value):
    tokens = decisions()
    chosen = tokens.chosen.clone()
    chosen[2] = value
    loss = cacovid_loss(dataclasses.replace(tokens, chosen=chosen))
    rest = torch.tensor([0, 1, 3, 4, 5])
    logprobs, old = (two_class_logprobs(x, chosen[rest]) for x in (tokens.logits, tokens.old_logits))
    weights = balanced_weights(chosen, torch.ones_like(chosen))[rest]
    ratio, advantages = (logprobs - old).exp(), loss.tokens.advantages[rest, None].float()
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    torch.testing.assert_close(loss.total, ((weights * per_token).sum(1) / weights.sum(1)).sum() / 6)


@pytest.mark.parametrize("value", [0, 1])
def test_when_every_subset_is_all_or_none(value):
    tokens = decisions(chosen=torch.full((6, 10), value))
    frames = decisions(num_places=4, chosen=torch.full((6, 4), value))
    loss = cacovid_loss(tokens, frames, objective=dataclasses.replace(CACOVID, kl_weight=0.1))
    assert loss.tokens.total == 0 and gradient(loss.total, tokens.logits).abs().max() == 0
    # Frames have no balance, so they still learn.
    assert gradient(loss.total, frames.logits).abs().min() > 0 and loss.frames.total.isfinite()


def test_a_subset_without_reward_is_left_out():
    tokens = decisions()
    rewards = tokens.rewards.clone()
    rewards[3] = NAN
    loss = cacovid_loss(dataclasses.replace(tokens, rewards=rewards))
    rest = torch.tensor([0, 1, 2, 4, 5])
    without = cacovid_loss(dataclasses.replace(tokens, chosen=tokens.chosen[rest], rewards=rewards[rest]))
    torch.testing.assert_close(6 * loss.total, 5 * without.total)
    got = gradient(loss.total, tokens.logits)
    torch.testing.assert_close(6 * got, 5 * gradient(without.total, tokens.logits))
    no_reward = cacovid_loss(decisions(rewards=torch.full((6,), NAN)))
    assert no_reward.total == 0


def test_frames_are_not_balanced():
    frames = decisions(num_places=4)
    loss = cacovid_loss(decisions(), frames)
    alone = cacovid_loss(decisions())
    assert torch.equal(loss.tokens.total, alone.total) and alone.frames is None
    assert torch.equal(loss.total, loss.tokens.total + loss.frames.total)
    logprobs, old = (two_class_logprobs(x, frames.chosen) for x in (frames.logits, frames.old_logits))
    ratio = (logprobs - old).exp()
    advantages = loss.frames.advantages[:, None].float()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
    torch.testing.assert_close(loss.frames.total, expected)


# --- several videos


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_batch_of_videos_of_different_length_is_the_mean_of_each(as_tensor):
    one, two = decisions(num_places=10), decisions(num_places=7, seed=5)

    def joined(name):
        """[12, 10, ...]: the second video is padded."""
        first, second = getattr(one, name), getattr(two, name)
        if "logits" in name:
            first, second = first.expand(6, 10, 2), second.expand(6, 7, 2)
        padding = torch.ones(6, 3, *second.shape[2:]).to(second)
        return torch.cat([first, torch.cat([second, padding], dim=1)])

    both = Decisions(
        logits=joined("logits"),
        old_logits=joined("old_logits"),
        chosen=joined("chosen"),
        rewards=torch.cat([one.rewards, two.rewards]),
        group_ids=torch.arange(12) // 6 if as_tensor else 6,
        valid=torch.arange(10) < torch.tensor([10] * 6 + [7] * 6)[:, None],
    )
    objective = dataclasses.replace(CACOVID, kl_weight=0.1)
    loss = cacovid_loss(both, both, objective=objective)
    expected = [cacovid_loss(video, video, objective=objective) for video in (one, two)]
    torch.testing.assert_close(loss.total, (expected[0].total + expected[1].total) / 2)
    for video, alone in zip((one, two), expected, strict=True):
        torch.testing.assert_close(
            2 * gradient(loss.total, video.logits), gradient(alone.total, video.logits), rtol=1e-4, atol=1e-7
        )


# --- exchangeable parts, precision, mistakes


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": "rloo"},
        {"advantage": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", "length": 10},
        {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
        {"aggregation": "token-mean"},
        {"dual_clip": 3.0},
    ],
)
def test_parts_can_be_exchanged(changes):
    tokens = decisions()
    loss = cacovid_loss(tokens, decisions(num_places=4), objective=dataclasses.replace(CACOVID, **changes)).total
    assert loss.isfinite() and gradient(loss, tokens.logits).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    half = decisions(logits=decisions().logits.detach().to(dtype).requires_grad_())
    same_numbers = decisions(logits=half.logits.detach().float())
    torch.testing.assert_close(cacovid_loss(half).total, cacovid_loss(same_numbers).total, rtol=0, atol=0)
    sure = decisions(logits=torch.tensor([[-3e4, 3e4]]).expand(10, 2).to(dtype).requires_grad_())
    assert gradient(cacovid_loss(sure).total, sure.logits).isfinite().all()


def test_no_draw_from_the_global_generator():
    before = torch.get_rng_state()
    cacovid_loss(decisions(), decisions(num_places=4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": torch.zeros(9, 2)}, r"logits \[N, 2\] or \[B, N, 2\], got \(6, 10\) and \(9, 2\)"),
        ({"old_logits": torch.zeros(5, 10, 2)}, r"got \(6, 10\) and \(5, 10, 2\)"),
        ({"logits": torch.zeros(10, 3)}, r"\(10, 3\)"),
        ({"chosen": torch.zeros(10)}, r"Subsets must have shape"),
        ({"valid": torch.ones(10)}, "valid must have the shape of chosen"),
        ({"rewards": torch.zeros(5)}, "6"),
        ({"group_ids": 1}, "one row only"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(BadOption, match=message):
        cacovid_loss(decisions(**changes))


def test_one_subset_is_refused():
    tokens = decisions(num_subsets=1)
    with pytest.raises(BadOption, match="one row only"):
        cacovid_loss(tokens)

"""Advantage estimators."""

import pytest
import torch

from tests.policies.fixture import DR_GRPO, GROUPS, GRPO, GRPO_BATCH_STD, GRPO_VERL, REWARDS, RLOO, close
from tokensieve.errors import BadOption
from tokensieve.policies import ADVANTAGES, dr_grpo, get_advantage, grpo, grpo_batch_std, informative_rows, rloo

NAN = float("nan")
EVERY = sorted(ADVANTAGES)


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    "name, expected",
    [("grpo", GRPO), ("dr_grpo", DR_GRPO), ("rloo", RLOO), ("grpo_batch_std", GRPO_BATCH_STD)],
)
def test_worked_values(name, expected):
    advantages = get_advantage(name)(REWARDS, GROUPS)
    assert advantages.dtype == torch.float64
    close(advantages, expected)


def test_worked_values_with_the_eps_of_verl():
    close(grpo(REWARDS, GROUPS, eps=1e-6), GRPO_VERL)


@pytest.mark.parametrize("name", EVERY)
def test_groups_may_stand_in_any_order(name):
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    group_ids = torch.tensor([70, 70, 70, -2, -2, -2])
    estimate = get_advantage(name)
    close(estimate(REWARDS, group_ids), estimate(REWARDS, GROUPS))
    close(estimate(REWARDS[order], group_ids[order]), estimate(REWARDS, GROUPS)[order])


@pytest.mark.parametrize("name", ["dr_grpo", "grpo", "rloo"])
def test_a_group_does_not_see_the_others(name):
    estimate, rewards = get_advantage(name), torch.rand(12, generator=torch.Generator().manual_seed(1))
    close(estimate(rewards, 4), torch.cat([estimate(group, 4) for group in rewards.split(4)]))


@pytest.mark.parametrize("name", EVERY)
def test_a_group_sums_to_0(name):
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(1))
    close(get_advantage(name)(rewards, 4).view(3, 4).sum(1), [0, 0, 0])


def test_shift_and_scale():
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(1)).double()
    close(grpo(5 * rewards - 3, 4, eps=0), grpo(rewards, 4, eps=0))
    close(dr_grpo(5 * rewards - 3, 4), 5 * dr_grpo(rewards, 4))
    close(rloo(rewards, 4), 4 / 3 * dr_grpo(rewards, 4))
    first = rewards[:4]
    close(rloo(rewards, 4)[0], first[0] - first[1:].mean())


# --- groups that teach nothing


@pytest.mark.parametrize("name", EVERY)
def test_a_group_without_spread_gets_exactly_0(name):
    advantages = get_advantage(name)(tensor(1, 0, 0, 0.7, 0.7, 0.7), GROUPS)
    assert advantages[3:].tolist() == [0, 0, 0] and advantages[:3].abs().min() > 0
    assert get_advantage(name)(torch.ones(6), GROUPS).tolist() == [0] * 6


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("scale", [1, 2**13])
def test_rewards_equal_up_to_rounding_are_equal(name, scale):
    a, b = torch.tensor(0.3) + torch.tensor(0.6), torch.tensor(0.9)
    rewards = scale * torch.stack([a, b, b])
    assert rewards[0] != rewards[1]
    assert get_advantage(name)(rewards, 3).tolist() == [0, 0, 0]
    assert get_advantage(name)(torch.tensor([0.9, 0.9, 0.9 + 1e-4]), 3).abs().min() > 0


@pytest.mark.parametrize("name", EVERY)
def test_rounding_around_0_counts_as_0(name):
    assert get_advantage(name)(tensor(1e-9, -1e-9, 0), 3).tolist() == [0, 0, 0]


def test_statistics_are_in_float64():
    # In float32 the mean of these is off by more than their spread.
    rewards = 4096 + torch.tensor([0, 1, 0, 1, 1, 0, 0], dtype=torch.float32) / 128
    close(grpo(rewards, 7), grpo(rewards.double() - 4096, 7))
    close(grpo(tensor(0.1, 0.2, 0.4) + 1e4, 3), grpo(tensor(0.1, 0.2, 0.4), 3))
    half = torch.tensor([1, 0, 0.5, 0.25], dtype=torch.bfloat16)
    assert torch.equal(grpo(half, 4), grpo(half.double(), 4))


def test_informative_rows():
    rewards = tensor(1, 0, 0, 1, 1, 1, 1, NAN, 0, NAN, NAN, 1)
    assert informative_rows(rewards, 3).long().tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0]


# --- rows without reward


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("missing", [NAN, float("inf"), -float("inf")])
def test_a_row_without_reward_is_left_out(name, missing):
    estimate = get_advantage(name)
    advantages = estimate(tensor(1, missing, 0, 0, 0.2, 0.3, missing, 0.1), 4)
    expected = estimate(tensor(1, 0, 0, 0.2, 0.3, 0.1), 3)
    assert advantages[1] == 0 and advantages[6] == 0
    close(advantages[[0, 2, 3, 4, 5, 7]], expected)


@pytest.mark.parametrize("name", EVERY)
def test_one_reward_or_none_in_a_group_gives_0(name):
    assert get_advantage(name)(tensor(NAN, 0.5, NAN, NAN, NAN, NAN), 3).tolist() == [0] * 6


@pytest.mark.parametrize("name", EVERY)
def test_no_rows(name):
    assert get_advantage(name)(torch.zeros(0), 4).shape == (0,)


def test_whole_numbers_and_truths_are_rewards():
    close(grpo(REWARDS.long(), GROUPS), GRPO)
    close(grpo(REWARDS.bool(), torch.tensor([0, 0, 0, 1, 1, 1])), GRPO)


def test_no_gradient_to_rewards():
    assert not grpo_batch_std(REWARDS.clone().requires_grad_(), GROUPS).requires_grad


# --- what a user can get wrong


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("group_ids", [1, torch.tensor([0, 0, 0, 0, 0, 4])])
def test_a_group_of_one_is_refused(name, group_ids):
    with pytest.raises(BadOption, match="one row only.*at least 2"):
        get_advantage(name)(REWARDS, group_ids)


@pytest.mark.parametrize("group_ids", [4, 0, -3, True, 2.0, None])
def test_bad_group_size(group_ids):
    with pytest.raises(BadOption, match="divides 6, got"):
        grpo(REWARDS, group_ids)


@pytest.mark.parametrize("group_ids", [torch.zeros(5, dtype=torch.long), torch.zeros(6), torch.zeros(6, 1).long()])
def test_bad_group_ids(group_ids):
    with pytest.raises(BadOption, match="group_ids must be 6 whole numbers"):
        grpo(REWARDS, group_ids)


def test_rewards_per_token_are_refused():
    with pytest.raises(BadOption, match=r"\[B\], got shape \(6, 4\)"):
        grpo(torch.zeros(6, 4), 3)


def test_unknown_name():
    with pytest.raises(BadOption, match="no advantage estimator 'grpo2'; there are dr_grpo, .*Did you mean 'grpo'"):
        get_advantage("grpo2")

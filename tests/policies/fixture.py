"""Two groups of three rows of up to four tokens, whose values were computed with trl, verl and OpenRLHF."""

import torch

LENGTHS = torch.tensor([4, 3, 2, 4, 4, 1])
B = torch.arange(6, dtype=torch.float64)[:, None]
T = torch.arange(4, dtype=torch.float64)
MASK = (T < LENGTHS[:, None]).long()
REWARDS = torch.tensor([1.0, 0, 0, 1, 1, 0])
OLD = -(0.5 + 0.1 * T + 0.05 * B)
NEW = OLD + 0.1 * ((3 * B + 2 * T) % 7 - 3)
REF = OLD + 0.05 * ((B + T) % 3 - 1)
GROUPS = 3  # rows per group

GRPO = [1.15450057, -0.57725029, -0.57725029, 0.57725029, 0.57725029, -1.15450057]
GRPO_VERL = [1.15469854, -0.57734927, -0.57734927, 0.57734927, 0.57734927, -1.15469854]
DR_GRPO = [0.66666667, -0.33333333, -0.33333333, 0.33333333, 0.33333333, -0.66666667]
RLOO = [1, -0.5, -0.5, 0.5, 0.5, -1]
GRPO_BATCH_STD = [1.21693906, -0.60846953, -0.60846953, 0.60846953, 0.60846953, -1.21693906]


def new():
    """The current log-probabilities, with gradient."""
    return NEW.clone().requires_grad_()


def close(value, expected):
    """To 1e-7, the precision of the printed values."""
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7
    )

"""Policy losses per token, KL estimators, and the objective made of all parts."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.policies.fixture import GROUPS, MASK, NEW, OLD, REF, REWARDS, close, new
from tokensieve.errors import BadOption
from tokensieve.policies import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    Objective,
    aggregate,
    dr_grpo,
    get_kl,
    get_policy_loss,
    grpo,
    gspo,
    informative_rows,
    k1,
    k2,
    k3,
    ppo_clip,
    ppo_clip_sequence,
    rloo,
)

A = grpo(REWARDS, GROUPS)
ROW_MEAN = "seq-mean-token-mean"


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs)[0]


# --- worked values


@pytest.mark.parametrize(
    "options, mode, expected",
    [
        ({}, ROW_MEAN, -0.02322606),
        ({}, "token-mean", -0.29034936),
        ({}, "seq-mean-token-sum", -0.87104807),
        ({"clip_high": 0.28}, "token-mean", -0.29873240),
        ({"dual_clip": 1.1}, "token-mean", -0.30225551),
    ],
)
def test_worked_values_of_ppo_clip(options, mode, expected):
    close(aggregate(ppo_clip(NEW, OLD, A, MASK, **options), MASK, mode), expected)


def test_worked_gradient_pattern():
    logprobs = new()
    nonzero = gradient(ppo_clip(logprobs, OLD, A, MASK)[MASK.bool()].sum(), logprobs) != 0
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0]]
    assert nonzero.long().tolist() == expected


@pytest.mark.parametrize("options, expected", [({}, 0.00718303), ({"clip_low": 0.2, "clip_high": 0.2}, -0.03316075)])
def test_worked_values_of_gspo(options, expected):
    close(aggregate(gspo(NEW, OLD, A, MASK, **options), MASK, ROW_MEAN), expected)


def test_worked_ratios_of_gspo():
    ratio = -gspo(NEW, OLD, torch.ones(6), MASK, clip_low=1, clip_high=9)
    expected = torch.tensor([1, 0.96721610, 1.05127110, 1.02531512, 0.97530991, 0.81873075], dtype=torch.float64)
    close(ratio, expected[:, None].expand(6, 4))


def test_worked_values_of_rloo():
    close(aggregate(ppo_clip_sequence(NEW, OLD, rloo(REWARDS, GROUPS), MASK), MASK, ROW_MEAN), -0.03021154)
    penalised = REWARDS - 0.05 * (MASK * k1(OLD, REF, MASK)).sum(1)
    advantages = rloo(penalised, GROUPS)
    close(advantages, [0.9975, -0.49875, -0.49875, 0.49625, 0.5, -0.99625])
    close(aggregate(ppo_clip_sequence(NEW, OLD, advantages, MASK), MASK, ROW_MEAN), -0.03003460)


def test_worked_values_of_kl():
    close(aggregate(k3(NEW, REF, MASK), MASK), 0.01973100)
    loss = ppo_clip(NEW, OLD, A, MASK)
    close(aggregate(loss + 0.04 * k3(NEW, REF, MASK), MASK, ROW_MEAN), -0.02237143)
    ratio = (NEW - OLD).exp()  # trl's default
    close(aggregate(loss + 0.04 * k3(NEW, REF, MASK) * ratio, MASK, ROW_MEAN), -0.02239227)


def test_worked_values_of_dr_grpo():
    loss = ppo_clip(NEW, OLD, dr_grpo(REWARDS, GROUPS), MASK)
    close(aggregate(loss, MASK, "seq-mean-token-sum-norm", length=4), -0.12574674)


def test_worked_values_of_a_group_without_spread():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    dapo = Objective(clip_high=0.2, aggregation="token-mean")
    close(dapo(NEW, OLD, MASK, rewards, GROUPS).total, -0.08696150)
    rows = informative_rows(rewards, GROUPS)
    close(dapo(NEW[rows], OLD[rows], MASK[rows], rewards[rows], GROUPS).total, -0.17392300)


# --- what holds for every loss


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_at_the_old_policy_the_value_is_minus_the_advantage_and_the_gradient_is_reinforce(name):
    logprobs = OLD.clone().requires_grad_()
    loss = get_policy_loss(name)(logprobs, OLD, A, MASK)
    close(loss.detach(), -A[:, None].expand(6, 4))
    got = gradient(aggregate(loss, MASK, ROW_MEAN), logprobs)
    length_of_row = 1 if name == "ppo_clip_sequence" else MASK.sum(1, keepdim=True)
    close(got, -A[:, None] * MASK / length_of_row / 6)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_what_stands_in_padding_does_not_matter(name):
    expected, logprobs = new(), new()
    loss = aggregate(get_policy_loss(name)(expected, OLD, A, MASK), MASK)
    dirty = [x.masked_fill(MASK == 0, bad) for x, bad in ((logprobs, -torch.inf), (OLD, torch.nan))]
    same = aggregate(get_policy_loss(name)(*dirty, A, MASK), MASK)
    close(same.detach(), loss.detach())
    close(gradient(same, logprobs), gradient(loss, expected))


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_nothing_overflows(name):
    logprobs = torch.tensor([[-1e4, -0.1], [-0.1, -1e4], [-300.0, -300.0]], requires_grad=True)
    old = torch.tensor([[-0.1, -1e4], [-1e4, -0.1], [-0.1, -0.1]])
    loss = get_policy_loss(name)(logprobs, old, torch.tensor([1.0, -1.0, 0.0]), torch.ones(3, 2))
    assert loss.isfinite().all() and gradient(loss.sum(), logprobs).isfinite().all()


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(name, dtype):
    half = [NEW.to(dtype), OLD.to(dtype)]
    loss = get_policy_loss(name)(*half, A, MASK)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, get_policy_loss(name)(*(x.float() for x in half), A, MASK), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_no_gradient_to_the_old_policy_and_the_advantages(name):
    old, advantages = OLD.clone().requires_grad_(), A.clone().requires_grad_()
    assert not get_policy_loss(name)(NEW, old, advantages, MASK).requires_grad


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_advantages_per_token(name):
    loss = get_policy_loss(name)
    close(loss(NEW, OLD, A[:, None].expand(6, 4), MASK), loss(NEW, OLD, A, MASK))
    per_token = A[:, None] * torch.tensor([1, -1, 0, 2])
    close(loss(NEW, OLD, per_token, MASK)[:, 1], loss(NEW, OLD, -A, MASK)[:, 1])


def test_clipping_by_hand():
    #        rho up, A > 0     down, A > 0     up, A < 0     down, A < 0
    ratio = torch.tensor([[2.0], [0.5], [2.0], [0.5]], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    args = ratio.log(), torch.zeros(4, 1), advantages, torch.ones(4, 1)
    close(ppo_clip(*args, clip_low=0.1, clip_high=0.3)[:, 0], [-1.3, -0.5, 2, 0.9])
    close(ppo_clip(*args, clip_low=0.1, clip_high=0.3, dual_clip=1.5)[:, 0], [-1.3, -0.5, 1.5, 0.9])


def test_gspo_on_one_token_is_ppo_clip():
    args = NEW[:, :1], OLD[:, :1], A, MASK[:, :1]
    clips = {"clip_low": 0.1, "clip_high": 0.05}
    close(gspo(*args, **clips), ppo_clip(*args, **clips))
    close(ppo_clip_sequence(*args, **clips), ppo_clip(*args, **clips))


def test_gspo_gives_every_token_its_own_gradient():
    logprobs = new()
    slope = gradient(gspo(logprobs, OLD, torch.ones(6), MASK, clip_low=1, clip_high=9)[1, 2], logprobs)
    assert slope.nonzero().tolist() == [[1, 2]]
    close(slope[1, 2], -0.96721610)


@pytest.mark.parametrize("weights", [MASK, MASK * torch.arange(1, 5)])
def test_gspo_has_the_gradient_of_the_sequence_ratio(weights):
    logprobs = new()
    total = weights.sum(1)
    ratio = ((weights * (logprobs - OLD)).sum(1) / total).exp()
    expected = -torch.minimum(ratio * A, ratio.clamp(0.9, 1.1) * A).mean()
    loss = aggregate(gspo(logprobs, OLD, A, weights, clip_low=0.1, clip_high=0.1), weights, ROW_MEAN)
    close(loss.detach(), expected.detach())
    close(gradient(loss, logprobs), gradient(expected, logprobs))


def test_a_row_without_weight_has_a_ratio_of_1():
    mask = MASK.clone()
    mask[2] = 0
    for name in POLICY_LOSSES:
        close(get_policy_loss(name)(NEW, OLD, A, mask)[2], -A[2].expand(4))


# --- KL


def test_kl_by_hand():
    logprobs = torch.tensor([[0.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-1.0, 0.0]])
    mask = torch.ones(1, 2)
    e = 2.718281828459045
    for estimate, values, slopes in (
        (k1, [1, -1], [1, 1]),
        (k2, [0.5, 0.5], [1, -1]),
        (k3, [1 / e, e - 2], [1 - 1 / e, 1 - e]),
    ):
        kl = estimate(logprobs, ref, mask)
        torch.testing.assert_close(kl.detach(), torch.tensor([values], dtype=torch.float32))
        torch.testing.assert_close(gradient(kl.sum(), logprobs), torch.tensor([slopes], dtype=torch.float32))


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_expected_kl(name):
    # Two-class policy against a reference: the mean over the policy's own actions.
    p, q = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.68, 0.32]])
    mean = (p * get_kl(name)(p.log(), q.log(), torch.ones(1, 2))).sum()
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close(mean, exact, rtol=1e-4 if name != "k2" else 0.05, atol=0)


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_kl_of_a_policy_to_itself_and_in_padding(name):
    estimate = get_kl(name)
    assert estimate(NEW, NEW, MASK).abs().max() == 0
    dirty = NEW.masked_fill(MASK == 0, -torch.inf).requires_grad_()
    kl = estimate(dirty, REF.masked_fill(MASK == 0, torch.nan).requires_grad_(), MASK)
    close(kl.detach(), estimate(NEW, REF, MASK) * MASK)
    assert gradient(kl.sum(), dirty).isfinite().all()
    assert not estimate(NEW, REF.clone().requires_grad_(), MASK).requires_grad


def test_k3_is_never_negative_and_never_overflows():
    logprobs = -torch.logspace(-6, 4, 40)[None].requires_grad_()
    for ref in (torch.zeros(1, 40), torch.full((1, 40), -50.0)):
        kl = k3(logprobs, ref, torch.ones(1, 40))
        assert kl.isfinite().all() and (kl >= 0).all() and gradient(kl.sum(), logprobs).isfinite().all()


# --- the objective


def test_an_objective_is_its_parts():
    objective = Objective(advantage="rloo", policy_loss="gspo", clip_low=0.1, clip_high=0.1, kl="k2", kl_weight=0.1)
    terms = objective(NEW, OLD, MASK, REWARDS, GROUPS, ref_logprobs_BT=REF)
    advantages = rloo(REWARDS, GROUPS)
    policy = aggregate(gspo(NEW, OLD, advantages, MASK, clip_low=0.1, clip_high=0.1), MASK, ROW_MEAN)
    kl = aggregate(k2(NEW, REF, MASK), MASK, ROW_MEAN)
    close(terms.advantages, advantages)
    for got, expected in ((terms.policy, policy), (terms.kl, kl), (terms.total, policy + 0.1 * kl)):
        assert torch.equal(got, expected)
    assert Objective()(NEW, OLD, MASK, REWARDS, GROUPS).kl is None


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, -0.02322606),
        ({"aggregation": "token-mean", "clip_high": 0.28}, -0.29873240),
        ({"aggregation": "token-mean", "dual_clip": 1.1}, -0.30225551),
        ({"advantage": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", "length": 4}, -0.12574674),
        ({"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}, 0.00718303),
        ({"kl_weight": 0.04}, -0.02237143),
    ],
)
def test_worked_values_of_objectives(options, expected):
    objective = Objective(**{"clip_low": 0.2, "clip_high": 0.2, **options})
    close(objective(NEW, OLD, MASK, REWARDS, GROUPS, ref_logprobs_BT=REF).total, expected)


def test_batches_with_a_common_denominator_add_up():
    objective = Objective(aggregation="token-mean", kl_weight=0.1)
    whole = objective(NEW, OLD, MASK, REWARDS, GROUPS, ref_logprobs_BT=REF).total
    halves = [
        objective(NEW[i], OLD[i], MASK[i], REWARDS[i], GROUPS, ref_logprobs_BT=REF[i], denominator=MASK.sum()).total
        for i in (slice(0, 3), slice(3, 6))
    ]
    close(sum(halves), whole)


def test_rewards_that_are_missing_or_equal_give_no_gradient():
    for rewards in (torch.full((6,), torch.nan), torch.ones(6)):
        logprobs = new()
        total = Objective()(logprobs, OLD, MASK, rewards, GROUPS).total
        assert total == 0 and gradient(total, logprobs).abs().max() == 0
    logprobs = new()
    rewards = torch.tensor([1, torch.nan, 0, 1, 1, 0])
    got = gradient(Objective()(logprobs, OLD, MASK, rewards, GROUPS).total, logprobs)
    assert got[1].abs().max() == 0 and got[0].abs().max() > 0 and got.isfinite().all()


# --- what a user can get wrong


@pytest.mark.parametrize(
    "options, message",
    [
        ({"advantage": "gae"}, "no advantage estimator 'gae'"),
        ({"policy_loss": "ppo-clip"}, "no policy loss 'ppo-clip'.*Did you mean 'ppo_clip'"),
        ({"kl": "k4"}, "no KL estimator 'k4'; there are k1, k2, k3"),
        ({"aggregation": "mean"}, "no aggregation 'mean'"),
        ({"clip_low": -0.1}, "clip_low must be in"),
        ({"clip_low": 1.1}, "clip_low must be in"),
        ({"clip_low": float("nan")}, "clip_low must be in"),
        ({"clip_high": -0.1}, "clip_high must be"),
        ({"clip_high": float("inf")}, "clip_high must be"),
        ({"clip_high": "0.2"}, "clip_high must be"),
        ({"dual_clip": 1.0}, "dual_clip must be None or"),
        ({"dual_clip": True}, "dual_clip must be None or"),
        ({"kl_weight": -1}, "kl_weight"),
        ({"kl_weight": float("nan")}, "kl_weight"),
        ({"length": 4}, "has no length"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(BadOption, match=message):
        Objective(**options)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_bad_shapes(name):
    loss = get_policy_loss(name)
    with pytest.raises(BadOption, match=r"one shape \[B, T\], got \(6, 4\), \(6, 3\)"):
        loss(NEW, OLD[:, :3], A, MASK)
    with pytest.raises(BadOption, match=r"mask \(6,\)"):
        loss(NEW, OLD, A, MASK[:, 0])
    with pytest.raises(BadOption, match="one shape"):
        loss(NEW[0], OLD[0], A, MASK[0])
    for advantages in (A[:5], A[:, None], A.sum()):
        with pytest.raises(BadOption, match="Advantages must have shape"):
            loss(NEW, OLD, advantages, MASK)
    with pytest.raises(BadOption, match="dual_clip"):
        loss(NEW, OLD, A, MASK, dual_clip=0.5)


def test_a_missing_reference():
    with pytest.raises(BadOption, match="kl_weight of 0.1 needs ref_logprobs"):
        Objective(kl_weight=0.1)(NEW, OLD, MASK, REWARDS, GROUPS)


# --- against trl, whose private methods these are


def trl_1_16():
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"trl {trl.__version__} may look at other attributes")
    return trl


def trl_trainer(logprobs, **settings):
    """What `_compute_loss` of the trainers looks at."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction=None: x
    )
    defaults = dict(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="dapo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=4,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
    )
    return SimpleNamespace(**{**defaults, **settings})


def trl_inputs(advantages):
    return {
        "prompt_ids": torch.zeros(6, 1).long(),
        "prompt_mask": torch.ones(6, 1).long(),
        "completion_ids": torch.zeros(6, 4).long(),
        "completion_mask": MASK,
        "advantages": advantages,
        "old_per_token_logps": OLD,
        "old_logps": (OLD * MASK).sum(1),
        "ref_per_token_logps": REF,
        "num_items_in_batch": MASK.sum(),
    }


def check_against_trl(trainer_class, settings, objective):
    theirs, ours = new(), new()
    terms = objective(ours, OLD, MASK, REWARDS, GROUPS, ref_logprobs_BT=REF)
    loss = trainer_class._compute_loss(trl_trainer(theirs, **settings), None, trl_inputs(terms.advantages))
    torch.testing.assert_close(terms.total, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(terms.total, ours), gradient(loss, theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings, options",
    [
        ({"loss_type": "grpo"}, {}),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregation": "token-mean", "clip_high": 0.28}),
        ({"loss_type": "bnpo"}, {"aggregation": "token-mean"}),
        (
            {"loss_type": "dr_grpo"},
            {"advantage": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", "length": 4},
        ),
        ({"loss_type": "grpo", "beta": 0.04}, {"kl_weight": 0.04}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
            {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
        ),
    ],
)
def test_as_in_trl(settings, options):
    check_against_trl(trl_1_16().GRPOTrainer, settings, Objective(**{"clip_high": 0.2, **options}))


def test_rloo_as_in_trl():
    check_against_trl(
        trl_1_16().RLOOTrainer, {}, Objective(advantage="rloo", policy_loss="ppo_clip_sequence", clip_high=0.2)
    )

"""Distilling the model that sees all tokens into the policy: no labels, no rewards. Ours; there is no paper.

    g_n     how much of token n stays, in (0, 1): sigmoid((s_n + noise - c) / heat), c such that they sum to the budget
    student the frozen model's answer where every attention logit towards token n has log g_n added
    loss    divergence between the answer with all tokens and the student's, on the model's own greedy answer

`s_n` is the policy's keep-logit minus its drop-logit, the noise is Gumbel's, and the budget is drawn anew for every
sample, so that one policy serves many. As the heat falls the g_n become 0 or 1, and the student becomes the model that
sees exactly the kept tokens: dropping a token is adding log 0 to the attention towards it. Gradients reach every token
of a sample at once, where a reward tells one number a subset. With noise of scale 1 the tokens that stay are nearly
drawn without replacement by exp(s), and in use `cacovid` keeps a systematic sample with those probabilities.
"""

# Shape legend: S samples, N candidates, L prompt with answer, M tokens of the answer, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.policy.budgets import Budgets
from tokensieve.pipeline.policy.judging import divergence
from tokensieve.pipeline.policy.module import PolicyModule
from tokensieve.pipeline.policy.samples import Sample, with_answer
from tokensieve.policies.light_scorer import LightScorer

SPARE = 4
LEAST = 1e-8  # of a token that has all but left


def soft_top_k(score_SN: Tensor, num_keep_S: Tensor, heat: float) -> Tensor:
    """`[S, N]` in (0, 1): sigmoids of the scores that sum to `num_keep_S`, differentiable through their shift.

    Args:
        score_SN: higher is better.
        num_keep_S: above 0 and below N.
        heat: above 0; towards 0 the k highest become 1.
    """
    with torch.no_grad():
        low_S1 = score_SN.amin(1, keepdim=True) - 40 * heat
        high_S1 = score_SN.amax(1, keepdim=True) + 40 * heat
        for _ in range(50):
            middle_S1 = (low_S1 + high_S1) / 2
            too_many = ((score_SN - middle_S1) / heat).sigmoid().sum(1, keepdim=True) > num_keep_S[:, None]
            low_S1 = torch.where(too_many, middle_S1, low_S1)
            high_S1 = torch.where(too_many, high_S1, middle_S1)
    shift_S1 = (low_S1 + high_S1) / 2
    stays_SN = ((score_SN - shift_S1) / heat).sigmoid()
    # One Newton step changes nothing of the value and gives the shift its gradient.
    slope_S1 = (stays_SN * (1 - stays_SN)).detach().sum(1, keepdim=True) / heat
    shift_S1 = shift_S1 + (stays_SN.sum(1, keepdim=True) - num_keep_S[:, None]) / slope_S1.clamp(min=1e-9)
    return ((score_SN - shift_S1) / heat).sigmoid()


def most_weight(stays_N: Tensor) -> Tensor:
    """`[N]` bool: the tokens that the student is given at all, `SPARE` times the budget and a few more.

    The others have weights near 0 once the heat is low; leaving them out makes a step several times faster.
    """
    count = min(len(stays_N), math.ceil(SPARE * float(stays_N.detach().sum())) + 16)
    order_N = stays_N.detach().sort(descending=True, stable=True).indices
    return torch.zeros(len(stays_N), dtype=torch.bool, device=stays_N.device).index_fill(0, order_N[:count], True)


class DistilModule(PolicyModule):
    """Trains a policy to keep what the frozen model's own answer needs; other arguments as in `PolicyModule`.

    Args:
        divergence: "forward" KL(all || some), "reverse", or "jsd".
        min_keep, max_keep: shares between which each sample's budget is drawn (evenly in their logarithm).
        first_heat, last_heat: of the sigmoids, falling exponentially over the training.
        noise: scale of the Gumbel noise on the scores: with 1 a sample's tokens are nearly those of a draw without
            replacement by exp(score).
    """

    frame_head = False

    def __init__(
        self,
        divergence: str = "forward",
        min_keep: float = 0.03,
        max_keep: float = 0.25,
        first_heat: float = 0.5,
        last_heat: float = 0.1,
        noise: float = 1.0,
        **shared,
    ):
        super().__init__(**shared)
        self.save_hyperparameters()
        if divergence not in ("forward", "reverse", "jsd"):
            raise BadOption(f"divergence must be 'forward', 'reverse' or 'jsd', got {divergence!r}.")
        if not 0 < last_heat <= first_heat or noise < 0:
            raise BadOption(f"Need 0 < last_heat <= first_heat and noise >= 0, got {last_heat}, {first_heat}, {noise}.")
        if not isinstance(self.policy, LightScorer):
            raise BadOption(
                "Distillation trains no frame head, and this scorer has one that decides.", hint="Use scorer='light'."
            )
        layers = getattr(self.judge.vlm.model.config.get_text_config(), "layer_types", None) or ()
        if not self.judge.vlm.adapter.family.causal_visual or "sliding_attention" in layers:
            raise UnsupportedModel("Distillation fades tokens in a plain causal mask, and this model has another mask.")
        self.kind, self.noise = divergence, noise
        self.budgets, self.heats = Budgets(min_keep, max_keep), (first_heat, last_heat)

    def learn(self, parts: Sequence[Sequence[Sample]], draws: Sequence[Sequence[torch.Generator]]) -> None:
        heat, num_samples = self._heat(), sum(map(len, parts))
        loss = self.step(num_samples, (self._losses(part, own, heat) for part, own in zip(parts, draws, strict=True)))
        self.log_dict({"loss": loss, "heat": heat}, prog_bar=True, batch_size=num_samples)

    def _losses(self, samples: Sequence[Sample], draws: Sequence[torch.Generator], heat: float) -> list[Tensor]:
        taught = [self.judge.teach(sample) for sample in samples]
        logits = self.policy.forward_batch([s.tokens for s in samples])
        stays = [self._stays(own, heat, generator) for (own, _), generator in zip(logits, draws, strict=True)]
        student = self.student_logits([with_answer(s, ids) for s, (ids, _) in zip(samples, taught, strict=True)], stays)
        return [
            divergence(teacher[None], own[None], self.kind)[0]
            for (_, teacher), own in zip(taught, student, strict=True)
        ]

    def _heat(self) -> float:
        first, last = self.heats
        done = min(1.0, self.global_step / max(1, self.trainer.max_steps))
        return first * (last / first) ** done

    def _stays(self, token_logits: Tensor, heat: float, generator: torch.Generator) -> Tensor:
        """`[N]`: a noisy soft choice at a budget of its own."""
        score_N = token_logits.diff(dim=-1)[:, 0]
        keep = self.budgets.draw(generator)
        uniform_N = torch.rand(len(score_N), generator=generator).clamp(1e-6, 1 - 1e-6).to(score_N)
        gumbel_N = -(-uniform_N.log()).log()
        noisy_1N = (score_N + self.noise * gumbel_N)[None]
        return soft_top_k(noisy_1N, torch.tensor([keep * len(score_N)]).to(score_N), heat)[0]

    def student_logits(self, samples: Sequence[Sample], stays: Sequence[Tensor]) -> list[Tensor]:
        """Predictions `[M, V]` for every sample's answer where token n is seen with weight `stays[n]`.

        Args:
            samples: with `answer_ids`.
            stays: `[N]` in (0, 1] for each, with gradient.
        """
        model, adapter = self.judge.vlm.model, self.judge.vlm.adapter
        rows, biases = [], []
        for sample, stays_N in zip(samples, stays, strict=True):
            inputs = sample.inputs_with(sample.answer_ids)
            seen_N = most_weight(stays_N)
            rows.append(adapter.emit_subsets(inputs, sample.item, seen_N[None], target="forward"))
            left_L = torch.ones(inputs["input_ids"].shape[1], dtype=torch.long, device=stays_N.device)
            slots = sample.item.slots[sample.item.candidates]
            left_L[slots] = seen_N.long()
            places = left_L.cumsum(0)[slots[seen_N]] - 1  # where the slots are once the others have left
            bias_L = torch.zeros(int(left_L.sum()), device=stays_N.device)
            biases.append(bias_L.index_put((places,), stays_N[seen_N].float().clamp(min=LEAST).log()))
        batch = _batch(rows, biases, model.dtype)
        hidden = model.model(**batch).last_hidden_state
        logits = []
        for i, (sample, bias_L) in enumerate(zip(samples, biases, strict=True)):
            num_answer = len(sample.answer_ids)
            logits.append(model.lm_head(hidden[i, len(bias_L) - num_answer - 1 : len(bias_L) - 1]))
        return logits


def _batch(rows: Sequence[dict], biases: Sequence[Tensor], dtype: torch.dtype) -> dict[str, object]:
    """Prompts of one each as a batch padded on the right, with a causal mask that carries the biases."""
    lengths = [len(bias_L) for bias_L in biases]
    bias_SL = pad_sequence(list(biases), batch_first=True, padding_value=torch.finfo(dtype).min)
    length = bias_SL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=bias_SL.device).tril()
    mask_S1LL = torch.where(causal_LL, bias_SL[:, None, None, :], torch.finfo(dtype).min)
    ids_SL = pad_sequence([row["input_ids"][0] for row in rows], batch_first=True)
    positions = [row["position_ids"][..., 0, :] for row in rows]
    position_ids = torch.stack(
        [torch.nn.functional.pad(p, (0, length - n)) for p, n in zip(positions, lengths, strict=True)], dim=-2
    )
    encoded = {}
    for modality in rows[0]["mm_encoder_outputs"]:
        outputs = [row["mm_encoder_outputs"][modality] for row in rows]
        features = [f for out in outputs for f in out.pooler_output]
        in_tensor = isinstance(outputs[0].pooler_output, Tensor)
        if in_tensor:
            same = len({len(f) for f in features}) == 1
            features = torch.stack(features) if same else torch.cat(features)[None]
        encoded[modality] = type(outputs[0])(pooler_output=features)
        if getattr(outputs[0], "deepstack_features", None):
            layers = zip(*(out.deepstack_features for out in outputs), strict=True)
            encoded[modality].deepstack_features = [[f for part in layer for f in part] for layer in layers]
    batch = {"input_ids": ids_SL, "position_ids": position_ids, "mm_encoder_outputs": encoded, "use_cache": False}
    return batch | {"attention_mask": mask_S1LL.to(dtype)}

"""Stage 2 of the shipped model: the language model learns to answer from cached visual tokens.

Every question about a clip is a branch behind one shared visual prefix, so that a clip is paid for once and
trains four answers. Visual tokens are dropped at random in part of the batches (as PatchDropout does in
towers): the model learns to answer from whatever is left, at original positions, and batches get cheaper.
"""

# Shape legend: B clips, N visual tokens of a clip, K of them kept, Q question tokens of a clip, L = prefix + Q, D width

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokensieve.datasets.clips import Clip, make_clip
from tokensieve.datasets.render import render_clips
from tokensieve.pipeline.optim import muon_adamw, take_step, warm_up_then_cosine

IGNORE = -100
KEEPS, KEEP_ODDS = (1.0, 0.5, 0.2, 0.08), (0.4, 0.2, 0.2, 0.2)  # few values: each is compiled once
QUESTION_ROOM = 56  # tokens that the questions of any clip fit in: a fixed length, again for the compiler


def encode_question(tokenizer, text: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of `question <|assistant|> answer <|end|>` and labels (-100 on the question), not shifted."""
    asked = tokenizer.encode(text) + [tokenizer.convert_tokens_to_ids("<|assistant|>")]
    said = tokenizer.encode(answer) + [tokenizer.eos_token_id]
    return asked + said, [IGNORE] * len(asked) + said


@dataclass
class Branches:
    """The questions of a batch of clips, laid side by side: see `pack_questions`."""

    ids_BQ: Tensor
    labels_BQ: Tensor
    branch_BQ: Tensor  # which question a token belongs to, -1 for padding
    step_BQ: Tensor  # its place within the question


def pack_questions(tokenizer, clips: list[Clip]) -> Branches:
    """Concatenates all questions of each clip and pads to `QUESTION_ROOM`."""
    rows = []
    for clip in clips:
        row: list[tuple[int, int, int, int]] = []
        for branch, question in enumerate(clip.questions):
            ids, labels = encode_question(tokenizer, question.text, question.answer)
            row += [(i, y, branch, step) for step, (i, y) in enumerate(zip(ids, labels, strict=True))]
        rows.append(row)
    padded = [row + [(tokenizer.pad_token_id, IGNORE, -1, 0)] * (QUESTION_ROOM - len(row)) for row in rows]
    return Branches(*torch.tensor(padded).unbind(-1))


def branch_mask(num_prefix: int, branch_BQ: Tensor) -> Tensor:
    """`[B, 1, L, L]` bool: the prefix is causal, a question sees the prefix and its own earlier tokens."""
    batch, num_asked = branch_BQ.shape
    owner_BL = torch.cat([torch.full((batch, num_prefix), -2), branch_BQ], 1)
    same = owner_BL[:, :, None] == owner_BL[:, None, :]
    to_prefix = (owner_BL == -2)[:, None, :]
    length = num_prefix + num_asked
    return ((same | to_prefix) & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


class ClipModule(L.LightningModule):
    """Trains language model, embeddings and newline on cached tokens; the tower stays as stage 1 left it."""

    def __init__(
        self, model: nn.Module, tokenizer, *, lr: float, total_steps: int, seed: int = 0, compile: bool = False
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.prefix_id = tokenizer.convert_tokens_to_ids("<|user|>")
        self.lr, self.total_steps = lr, total_steps
        # Compiled, a step takes half the time on a CPU; validation has other shapes and runs as it is.
        self.compiled_decoder = torch.compile(model.model.language_model.forward, dynamic=False) if compile else None
        self.generator = torch.Generator().manual_seed(seed)
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.requires_grad_(False)

    def answer_logits(self, visual_BND: Tensor, branches: Branches, keep: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[A, V]` and targets `[A]` at all supervised places, and the `[A]` question each belongs to."""
        batch, num_visual, width = visual_BND.shape
        num_keep = max(1, round(keep * num_visual))
        kept_BK = torch.rand(batch, num_visual, generator=self.generator).argsort(1)[:, :num_keep].sort(1).values
        visual_BKD = visual_BND.gather(1, kept_BK[..., None].expand(-1, -1, width))
        embed = self.model.get_input_embeddings()
        newline = self.model.model.image_newline.expand(batch, 1, -1)
        start = embed(torch.full((batch, 1), self.prefix_id))
        inputs_BLD = torch.cat([start, visual_BKD.to(start), newline, embed(branches.ids_BQ)], 1)

        after_prefix = num_visual + 2
        ends = torch.tensor([[0], [after_prefix - 1]]).expand(2, batch)[..., None]
        positions_BL = torch.cat([ends[0], kept_BK + 1, ends[1], after_prefix + branches.step_BQ], 1)
        allowed = branch_mask(num_keep + 2, branches.branch_BQ)
        bias = torch.zeros(allowed.shape, dtype=torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
        bias.masked_fill_(~allowed, torch.finfo(bias.dtype).min)
        decoder = self.compiled_decoder if self.training and self.compiled_decoder else self.model.model.language_model
        hidden_BLD = decoder(
            inputs_embeds=inputs_BLD, attention_mask=bias, position_ids=positions_BL, use_cache=False
        ).last_hidden_state[:, num_keep + 2 :]
        here = branches.labels_BQ[:, 1:] != IGNORE  # the token before a label predicts it
        logits = self.model.lm_head(hidden_BLD[:, :-1][here])
        return logits.float(), branches.labels_BQ[:, 1:][here], branches.branch_BQ[:, 1:][here]

    def training_step(self, batch: tuple[Tensor, Branches], _) -> None:
        keep = KEEPS[int(torch.multinomial(torch.tensor(KEEP_ODDS), 1, generator=self.generator))]
        logits, targets, _ = self.answer_logits(*batch, keep)
        loss = F.cross_entropy(logits, targets)
        take_step(self, loss, max_norm=1.0)
        self.log("loss", loss.detach(), prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Branches], _) -> None:
        for keep in (1.0, 0.25):
            logits, targets, _ = self.answer_logits(*batch, keep)
            right = (logits.argmax(-1) == targets)[::2]  # answer, end, answer, end ...: only the answers
            self.log(f"val_answer_keep{keep:g}", right.float().mean(), prog_bar=True, batch_size=len(right))

    def configure_optimizers(self):
        optimizers = muon_adamw(self, self.lr)
        return optimizers, [warm_up_then_cosine(o, self.total_steps) for o in optimizers]


class CachedClips(torch.utils.data.Dataset):
    """Clips of a split with their visual tokens, encoded once: items are `([N, D] bf16, Clip)`."""

    def __init__(self, model: nn.Module, split: str, first: int, count: int, seed: int, progress=None, chunk: int = 32):
        self.clips = [make_clip(split, first + i, seed) for i in range(count)]
        parts = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, count, chunk):
                pixels = render_clips(self.clips[start : start + chunk]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
                tokens = model.model.get_video_features(pixel_values_videos=pixels).pooler_output
                parts.append(tokens[:, :-1].bfloat16())  # the newline is learnt later and added then
                if progress:
                    progress(min(chunk, count - start))
        self.tokens = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> tuple[Tensor, Clip]:
        return self.tokens[i], self.clips[i]


def clip_loader(dataset: CachedClips, tokenizer, batch: int, seed: int, shuffle: bool) -> torch.utils.data.DataLoader:
    """Batches of `(visual tokens [B, N, D], Branches)`."""

    def collate(items):
        tokens, clips = zip(*items, strict=True)
        return torch.stack(tokens), pack_questions(tokenizer, list(clips))

    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch,
        shuffle=shuffle,
        drop_last=shuffle,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )

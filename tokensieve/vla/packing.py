"""Instruction, memory, observations, thoughts and behaviours as one token sequence (OmniJARVIS, equation 2).

    TASK: go to the red ball                                   given
    MEMORY: opened the door                                    given; left out if empty
    OBSERVATION: <image><image>...   \\
    INVENTORY: a key                  | one sub-task           given; inventory and caption are left out if empty
    CAPTION: a room with a door       |
    THOUGHT: the ball is to the left  |                        learned
    CONTROL: <5 behaviour tokens>    /                         learned

Prefix language modelling: labels are -100 wherever something is given, pictures included, in later sub-tasks too.

INFERRED, as the paper's transcripts have these words but not their layout: one line each, and who writes CONTROL. With
a thought the model does, since that is how a thought ends, so the marker's tokens are labels as part of the thought.
Without one the prompt ends in it. CAPTION counts as given. No token ends a behaviour: it is always d tokens long.
"""

# Shape legend: B sequences, L tokens, d digits of a code

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.errors import BadOption
from tokensieve.vla.vocabulary import BehaviourVocabulary

NO_LABEL = -100
TASK, MEMORY, OBSERVATION, INVENTORY = "TASK:", "\nMEMORY:", "\nOBSERVATION: ", "\nINVENTORY:"
CAPTION, THOUGHT, CONTROL = "\nCAPTION:", "\nTHOUGHT:", "\nCONTROL:"


@dataclass(frozen=True, kw_only=True)
class SubTask:
    """What was seen, thought and done in one trunk.

    Attributes:
        observation: token ids of the picture as the model's processor writes them: its placeholders, and whatever the
            family puts around them. Fewer placeholders where tokens are dropped.
        digits: `[d]`, the behaviour; empty in a prompt.
        thought: why; empty for none.
        inventory: what the agent holds; empty for none.
        caption: of the picture; empty for none.
    """

    observation: Sequence[int]
    digits: Sequence[int] = ()
    thought: str = ""
    inventory: str = ""
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Packed:
    """One sequence.

    Attributes:
        input_ids: `[L]` int64.
        labels: `[L]` int64, -100 where a token is given.
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


class Packer:
    """Makes sequences for training and prompts for acting, which are the beginning of the former, token by token.

    Args:
        tokenizer: with behaviour tokens.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.vocabulary = BehaviourVocabulary.of(tokenizer)
        self._reserved = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | set(self.vocabulary.all_ids)
        self._start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
        self.control_ids = tuple(self._encode(CONTROL))

    def pack(self, instruction: str, sub_tasks: Sequence[SubTask], *, memory: str = "") -> Packed:
        """A training sequence.

        Raises:
            BadOption: there is no instruction, sub-task, observation or behaviour, a behaviour is no code, or a text
                holds a special or behaviour token.
        """
        if not sub_tasks:
            raise BadOption("A training sequence needs at least one sub-task.")
        parts = self._context(instruction, memory)
        for sub_task in sub_tasks:
            parts += [*self._given(sub_task, bool(sub_task.thought)), (self._response(sub_task), True)]
        ids = torch.tensor([i for ids, _ in parts for i in ids])
        learned = torch.tensor([learned for ids, learned in parts for _ in ids])
        return Packed(ids, ids.masked_fill(~learned, NO_LABEL))

    def prompt(
        self, instruction: str, now: SubTask, *, memory: str = "", past: Sequence[SubTask] = (), thought: bool = True
    ) -> list[int]:
        """Token ids after which the model writes a thought and a behaviour, or with `thought=False` a behaviour.

        Args:
            instruction: what to do.
            now: what is seen; it has neither thought nor digits yet.
            memory: what was achieved.
            past: sub-tasks of the same sequence.
            thought: whether the model is to think first.

        Raises:
            BadOption: as `pack`, or `now` has a thought or digits.
        """
        if now.thought or len(now.digits):
            raise BadOption("The model writes thought and digits of the present sub-task; leave them out.")
        done = self.pack(instruction, past, memory=memory).input_ids.tolist() if past else None
        if done is None:
            done = [i for ids, _ in self._context(instruction, memory) for i in ids]
        return done + [i for ids, _ in self._given(now, thought) for i in ids]

    def _context(self, instruction: str, memory: str) -> list[tuple[list[int], bool]]:
        if not instruction.strip():
            raise BadOption("The instruction is empty.")
        text = f"{TASK} {instruction}" + (f"{MEMORY} {memory}" if memory else "")
        return [(self._start + self._encode(text), False)]

    def _given(self, sub_task: SubTask, thought: bool) -> list[tuple[list[int], bool]]:
        if not len(sub_task.observation):
            raise BadOption("The observation has no tokens.")
        notes = [(INVENTORY, sub_task.inventory), (CAPTION, sub_task.caption)]
        after = "".join(f"{marker} {text}" for marker, text in notes if text)
        marker = self._encode(THOUGHT) if thought else list(self.control_ids)
        ids = [*self._encode(OBSERVATION), *map(int, sub_task.observation), *self._encode(after), *marker]
        return [(ids, False)]

    def _response(self, sub_task: SubTask) -> list[int]:
        thought = [*self._encode(f" {sub_task.thought}"), *self.control_ids] if sub_task.thought else []
        return thought + self.vocabulary.digits_to_ids(torch.as_tensor(sub_task.digits)).tolist()

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        found = self._reserved.intersection(ids)
        if found:
            names = self.tokenizer.convert_ids_to_tokens(sorted(found))
            raise BadOption(f"Texts must not hold special or behaviour tokens, found {names}.")
        return ids


def collate(sequences: Sequence[Packed], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each `[B, L]` int64, padded on the right to the longest.

    Raises:
        BadOption: there are no sequences.
    """
    if not sequences:
        raise BadOption("There are no sequences to collate.")
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([s.input_ids for s in sequences], batch_first=True, padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(s.input_ids) for s in sequences], batch_first=True),
        "labels": pad([s.labels for s in sequences], batch_first=True, padding_value=NO_LABEL),
    }

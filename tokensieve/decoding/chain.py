"""Token Recycling as one chain of guesses, for the assisted decoding that transformers has.

Fewer guesses than a tree, but no mask of its own, any cache that can be cropped, and sampling as well: guesses that are
no draws of a draft model are accepted where they equal the draw, so the answer has the model's own distribution.
"""

# Shape legend: L tokens so far, C guesses, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import GenerationMixin

from tokensieve.decoding.ledger import counted, num_generated, prompt_ledger
from tokensieve.decoding.recycling_matrix import RecyclingMatrix
from tokensieve.errors import BadOption


class RecyclingCandidates(CandidateGenerator):
    """Guesses the likeliest successor of the last token, of that one, and so on.

    Args:
        matrix: used and changed.
        num_guesses: C.

    Attributes:
        drafted_tokens, accepted_tokens: so far.

    Raises:
        BadOption: `num_guesses` below 1.
    """

    def __init__(self, matrix: RecyclingMatrix, num_guesses: int = 5):
        if num_guesses < 1:
            raise BadOption(f"num_guesses must be above 0, got {num_guesses!r}.")
        self.matrix = matrix
        self.num_guesses = num_guesses
        self.drafted_tokens = self.accepted_tokens = 0
        self._guessed: list[int] = []
        self._last = -1
        self._begun = False

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        """The ids `[1, L]` with the guesses behind them, and no logits."""
        first, self._begun = not self._begun, True  # the prompt runs alone: methods in the decoder look at its end
        self._last = int(input_ids[0, -1])
        tokens = [self._last]
        for _ in range(0 if first else self.num_guesses):
            tokens.append(int(self.matrix.successors_Vk[tokens[-1], 0]))
        self._guessed = tokens[1:]
        return torch.cat([input_ids, input_ids.new_tensor([self._guessed])], dim=1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Notes the successors of the last token and of the guesses, from `[1, C + 1, V]` processed scores."""
        self.matrix.update([self._last, *self._guessed], scores[0])
        self.drafted_tokens += len(self._guessed)
        self.accepted_tokens += int(num_matches)


def recycling_chain(matrix: RecyclingMatrix | None = None, *, num_guesses: int = 5):
    """Token Recycling with a chain, for `generate(custom_generate=...)`: greedy or sampling, one prompt at a time.

    All options of transformers' assisted decoding hold, its streamer excepted. The draws come from torch's global
    state, as in `generate`. With `return_dict_in_generate=True` the output has an attribute `ledger`.

    Args:
        matrix: used and changed; an empty one, kept from call to call, if left out.
        num_guesses: of each forward pass.

    Raises:
        BadOption: `num_guesses` below 1; when called: several prompts or beams, a prompt of embeddings, a matrix for
            another vocabulary, or a compression inside the language model, whose cache takes one token at a time.

    Example:
        >>> model.generate(**inputs, custom_generate=recycling_chain(), do_sample=True)
    """
    if num_guesses < 1:
        raise BadOption(f"num_guesses must be a whole number above 0, got {num_guesses!r}.")
    kept = [matrix]

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        if generation_config.num_beams != 1 or len(input_ids) > 1 or not input_ids.numel():
            raise BadOption(
                f"recycling_chain takes one prompt of ids and no beams, got ids of shape {tuple(input_ids.shape)}."
            )
        vocab_size = model.config.get_text_config().vocab_size
        if kept[0] is None:
            kept[0] = RecyclingMatrix(vocab_size, min(8, vocab_size))
        if kept[0].vocab_size != vocab_size:
            raise BadOption(f"The matrix is for {kept[0].vocab_size} tokens, the model has {vocab_size}.")
        candidates = RecyclingCandidates(kept[0], num_guesses)
        model._get_candidate_generator = lambda **_: candidates  # on this object, over the method of its class
        ledger = prompt_ledger(model, input_ids, model_kwargs.get("attention_mask"))
        try:
            with counted(model, ledger):
                out = GenerationMixin._assisted_decoding(
                    model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
                )
        except BadOption as error:
            raise BadOption(
                f"recycling_chain runs several tokens at once, and this cache refuses them: {error.message}",
                hint="Take compression inside the language model off, or decode greedily.",
            ) from error
        finally:
            del model._get_candidate_generator
        if generation_config.return_dict_in_generate:
            ledger.drafted_tokens, ledger.accepted_tokens = candidates.drafted_tokens, candidates.accepted_tokens
            ends = getattr(generation_config, "_eos_token_tensor", None)
            ledger.generated_tokens = num_generated(out.sequences[:, input_ids.shape[1] :], ends)
            out.ledger = ledger
        return out

    decode.one_prompt = True
    return decode

"""How the answer is generated: ways to decode that work with any transformers language or vision-language model.

Each is a factory; what it returns goes into `model.generate(..., custom_generate=...)` or `VLM.answer(...)`:

    >>> careful = ts.decoding.cautious(ts.decoding.punctuation_ids(vlm.processor))
    >>> vlm.answer("clip.mp4", "What happens?", custom_generate=careful, do_sample=True)

Names are imported on first use.
"""

from __future__ import annotations

from tokensieve.lazy_names import lazy_names

# No module may have the name of what it holds: importing it would hide the function.
_HOMES = {
    "DecodeSession": "tokensieve.decoding.session",
    "Decoding": "tokensieve.decoding.loop",
    "DecodeOutput": "tokensieve.decoding.loop",
    "Ledger": "tokensieve.decoding.ledger",
    "cautious": "tokensieve.decoding.cntp",
    "num_trials": "tokensieve.decoding.cntp",
    "punctuation_ids": "tokensieve.decoding.cntp",
    "best_of": "tokensieve.decoding.samples",
    "self_consistency": "tokensieve.decoding.samples",
    "self_certainty": "tokensieve.decoding.voting",
    "borda_votes": "tokensieve.decoding.voting",
    "Vote": "tokensieve.decoding.voting",
    "token_recycling": "tokensieve.decoding.recycling",
    "RecyclingMatrix": "tokensieve.decoding.recycling_matrix",
    "DraftTree": "tokensieve.decoding.draft_tree",
    "static_tree": "tokensieve.decoding.draft_tree",
    "recycling_chain": "tokensieve.decoding.chain",
    "RecyclingCandidates": "tokensieve.decoding.chain",
    "ZeroTuning": "tokensieve.decoding.zero_tuning",
    "find_sinks": "tokensieve.decoding.zero_tuning",
    "search_gamma": "tokensieve.decoding.zero_tuning_search",
    "GammaSearch": "tokensieve.decoding.zero_tuning_search",
    "answer_entropy": "tokensieve.decoding.zero_tuning_search",
    "first_token_accuracy": "tokensieve.decoding.zero_tuning_search",
    "ByteVocabulary": "tokensieve.decoding.byte_vocabulary",
    "ByteSession": "tokensieve.decoding.byte_session",
    "sample_bytes": "tokensieve.decoding.byte_sampling",
    "ByteOutput": "tokensieve.decoding.byte_sampling",
    "average_law": "tokensieve.decoding.byte_sampling",
    "middle_prompt": "tokensieve.decoding.byte_sampling",
    "GrammarProcessor": "tokensieve.decoding.grammar",
    "json_schema": "tokensieve.decoding.grammar",
    "regex": "tokensieve.decoding.grammar",
    "ebnf": "tokensieve.decoding.grammar",
    "choice": "tokensieve.decoding.grammar",
}

__all__ = sorted(_HOMES)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

"""What one sequence generates when nothing disturbs it, token by token, without plans, pages or steps."""

from __future__ import annotations

from typing import NamedTuple

from backend.engine.events import FinishReason
from backend.engine.plan import TokenLogProbs
from backend.engine.request import GenerationRequest, mix_seed
from tests.engine.device import EOS_ID, TOKEN_BYTES, VOCAB_SIZE, draw_id, log_probs_of
from tests.engine.grammar import allowed_at
from tests.engine.text_oracle import Output, allowed_text


class Expected(NamedTuple):
    """Ids with their log-probabilities, and why the sequence ends."""

    token_ids: tuple[int, ...]
    log_probs: tuple[TokenLogProbs | None, ...]
    reason: FinishReason
    stop_reason: str


def expected_outputs(request: GenerationRequest, index: int) -> Expected:
    """The whole output of sample `index`."""
    end_id = EOS_ID if request.end_id is None else request.end_id
    ending_ids = {*request.stop_token_ids} | (set() if request.ignore_eos else {end_id})
    seed = mix_seed(request.sampling.seed, index)
    outputs: list[Output] = []
    log_probs: list[TokenLogProbs | None] = []
    while True:
        ids = tuple(output.token_id for output in outputs)
        if len(ids) == request.max_tokens:
            return Expected(ids, tuple(log_probs), FinishReason.LENGTH, "")
        places = None if request.guide is None else tuple(request.guide.text.split())
        allowed = set(range(VOCAB_SIZE)) if places is None else allowed_at(places, len(ids))
        allowed -= ending_ids if len(ids) < request.min_tokens else set()
        before = (*request.prompt_token_ids, *ids)
        token_id = draw_id(before, seed, allowed)
        wanted = request.num_logprobs
        log_probs.append(None if wanted is None else log_probs_of(before, token_id, wanted))
        outputs.append(Output(token_id, may_stop=len(ids) + 1 >= request.min_tokens))
        stop = allowed_text(TOKEN_BYTES, outputs, request.stop_strings).stop
        if stop is not None:
            return Expected((*ids, token_id), tuple(log_probs), FinishReason.STOP, stop.decode("utf-8", "replace"))
        if token_id in ending_ids and outputs[-1].may_stop:
            is_named = token_id in request.stop_token_ids
            return Expected((*ids, token_id), tuple(log_probs), FinishReason.STOP, str(token_id) if is_named else "")


def expected_prompt_log_probs(request: GenerationRequest) -> tuple[TokenLogProbs, ...]:
    """One entry for each prompt token but the first."""
    prompt, num_top = request.prompt_token_ids, request.num_prompt_logprobs
    if num_top is None:
        return ()
    return tuple(log_probs_of(prompt[:end], prompt[end], num_top) for end in range(1, len(prompt)))

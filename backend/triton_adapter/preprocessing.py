"""The model `preprocessing`: a prompt in any of its three forms becomes token ids. Stateless."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from backend.checkpoint.vocabulary import read_vocabulary
from backend.errors import NemoError, RequestError
from backend.logs import start_logging
from backend.settings import Settings, read_model_parameters
from backend.text.chat import ChatTemplate
from backend.text.tokenizer import Tokenizer
from backend.triton_adapter import tensors
from backend.triton_adapter.presence import announce, withdraw
from backend.triton_adapter.request_log import log_failure
from backend.triton_adapter.tensors import Inputs

log = logging.getLogger("nemo.preprocessing")
_PROMPTS = ("text_input", "messages", "prompt_token_ids")


class Preprocessing:
    """Text, chat messages or ids -> `prompt_token_ids`; refuses what nobody behind it looks at."""

    def __init__(self, repository: Path) -> None:
        settings = Settings.load(read_model_parameters(repository / "mistral_nemo" / "config.pbtxt"))
        start_logging(settings.log_level, settings.log_format)
        vocabulary = read_vocabulary(Path(settings.checkpoint))
        self._tokenizer = Tokenizer(vocabulary)
        self._chat = ChatTemplate(vocabulary, self._tokenizer)
        self._input_names = ensemble_inputs(repository / "ensemble" / "config.pbtxt")
        announce("preprocessing")

    def close(self) -> None:
        """This process ends because the model is unloaded: the supervisor is not to take it for dead."""
        withdraw("preprocessing")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, an error for a bad one."""
        responses = []
        for request in requests:
            try:
                tensors.refuse_parameters(request, self._input_names)
                responses.append(tensors.response(self._outputs(Inputs(request))))
            except NemoError as error:
                log_failure(tensors.request_id(request), error)
                responses.append(tensors.error_response(error))
            except Exception as error:  # a bug of ours must fail this request alone
                log.exception("request %r failed", tensors.request_id(request))
                responses.append(tensors.error_response(error))
        return responses

    def _outputs(self, inputs: Inputs) -> list[Any]:
        """The prompt, and where there are any, bad words and biased words as ids."""
        outputs = [tensors.int_tensor("prompt_token_ids", self.prompt_token_ids(inputs))]
        words = self.bad_words(inputs)
        if words:
            outputs.append(tensors.int_tensor("bad_word_ids", [token_id for word in words for token_id in word]))
            outputs.append(tensors.int_tensor("bad_word_lengths", [len(word) for word in words]))
        bias_ids, bias_values = self.logit_bias(inputs)
        if bias_ids or bias_values:
            outputs.append(tensors.int_tensor("logit_bias_ids", bias_ids))
            outputs.append(tensors.array_tensor("logit_bias_values", np.array([bias_values], dtype=np.float32)))
        return outputs

    def bad_words(self, inputs: Inputs) -> list[list[int]]:
        """Each word as ids, as it is and with a space before it, since that is another token; empty strings mean none."""
        words = []
        for text in inputs.texts("bad_words") or ():
            if text:
                spellings = [text] if text.startswith(" ") else [text, f" {text}"]
                words += [self._tokenizer.encode(each, add_bos=False, field="bad_words") for each in spellings]
        return words

    def logit_bias(self, inputs: Inputs) -> tuple[list[int], list[float]]:
        """`logit_bias_ids` and `_values` as they are, and every id of each of `embedding_bias_words` with that word's weight."""
        ids, values = list(inputs.numbers("logit_bias_ids") or ()), list(inputs.numbers("logit_bias_values") or ())
        texts, weights = inputs.texts("embedding_bias_words") or [], inputs.numbers("embedding_bias_weights") or []
        if len(texts) != len(weights):
            raise RequestError(
                "embedding_bias_weights", f"must be as many as embedding_bias_words = {len(texts)}, got {len(weights)}"
            )
        for text, weight in zip(texts, weights, strict=True):
            word = self._tokenizer.encode(text, add_bos=False, field="embedding_bias_words") if text else []
            ids += word
            values += [weight] * len(word)
        return ids, values

    def prompt_token_ids(self, inputs: Inputs) -> list[int]:
        """The ids of the one prompt given; RequestError for none, several, or what is not supported."""
        check_neutral_inputs(inputs)
        if inputs.number("stop"):
            return []
        given = [name for name in _PROMPTS if inputs.has(name)]
        if len(given) != 1:
            raise RequestError(
                given[1] if given else "text_input",
                f"exactly one of {', '.join(_PROMPTS)} must be given, got {' and '.join(given) or 'none'}",
            )
        if inputs.has("tools") and given != ["messages"]:
            raise RequestError("tools", f"need messages, got them with {given[0]}")
        if given == ["text_input"]:
            return self._tokenizer.encode(inputs.text("text_input") or "", add_bos=True)
        if given == ["messages"]:
            return self._chat.encode(inputs.text("messages") or "", inputs.text("tools") or None)
        return inputs.numbers("prompt_token_ids") or []


def ensemble_inputs(config_path: Path) -> tuple[str, ...]:
    """What a client may send: most of it passes this model by, but a client that sent something else is told here."""
    config = text_format.Parse(config_path.read_text(), model_config_pb2.ModelConfig())
    return tuple(tensor.name for tensor in config.input)


def check_neutral_inputs(inputs: Inputs) -> None:
    """Accept what TensorRT-LLM's clients send with a neutral value, refuse any other value by name.

    `pad_id` may be anything: nothing is ever padded. The perf and count outputs are always sent, so asking for them or not is
    the same.
    """
    for name, neutral in _NEUTRAL.items():
        value = inputs.number(name)
        if value is not None and value not in neutral:
            wanted = " or ".join(json.dumps(each) for each in neutral)
            raise RequestError(name, f"is not supported: must be {wanted}, got {json.dumps(value)}")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "beam_width": (1,),
    "length_penalty": (0.0, 1.0),
    "early_stopping": (False,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
}

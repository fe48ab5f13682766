"""An FP8 checkpoint served as an operator would: known by its own configuration, said in the log, and right in its answers."""

from __future__ import annotations

from pathlib import Path

from tests.demo.questions import read_data
from tests.quantised_checkpoints import SCHEMES, quantise_checkpoint
from tests.triton.calls import generate, generate_stream
from tests.triton.live_server import LiveServer

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"


def test_answers_of_an_fp8_checkpoint_with_fp8_pages(tmp_path: Path) -> None:
    quantise_checkpoint(DEMO, tmp_path / "fp8", SCHEMES["compressed-tensors dynamic"])
    server = LiveServer(tmp_path / "fp8", tmp_path / "server", kv_dtype="fp8")
    try:
        server.start().wait_until_ready()
        for words in ("weight_dtype: fp8", "head_dtype: fp32", "kv_dtype: fp8", "a weight scale a channel"):
            assert words in server.log()
        english = next(language for language in read_data().languages if language.language == "English")
        for question in english.questions[:4]:
            asked = {"messages": f'[{{"role": "user", "content": "{question.ask[0]}"}}]', "max_tokens": 100}
            assert generate(server, **asked).value("text_output") == question.answer
            assert generate_stream(server, **asked, stream=True).text() == question.answer
        server.stop()
    finally:
        server.kill_everything()

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from backend.engine.guide import GuideMatcher
from backend.errors import RequestError
from backend.text.tokenizer import Tokenizer
from tests.engine.guide_examples import ARITHMETIC, PERSON, Follows, follows_schema, guides
from tests.engine.guide_walk import (
    DEMO_VOCAB_SIZE,
    FULL_VOCAB_SIZE,
    NUM_SPECIAL_TOKENS,
    Served,
    allowed_ids,
    serve,
    walk,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory, DEMO_VOCAB_SIZE)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory, FULL_VOCAB_SIZE)


GUIDES = list(guides())
each_guide = pytest.mark.parametrize(
    ("kind", "text", "follows"), [guide[1:] for guide in GUIDES], ids=[f"{kind}-{name}" for name, kind, _, _ in GUIDES]
)


@each_guide
def test_every_output_follows_its_guide(demo: Served, kind: str, text: str, follows: Follows) -> None:
    guide = demo.compiler.compile(kind, text)
    for seed in range(12):
        output = demo.text(walk(demo, guide.start(), np.random.default_rng(seed), most=seed * 8))
        assert follows(output), output


@each_guide
def test_every_prefix_can_be_finished(demo: Served, kind: str, text: str, follows: Follows) -> None:
    guide = demo.compiler.compile(kind, text)
    ids = walk(demo, guide.start(), np.random.default_rng(77), most=40)
    for cut in random.Random(7).sample(range(len(ids) + 1), min(6, len(ids) + 1)):
        matcher = guide.start()
        for token_id in ids[:cut]:
            matcher.accept(token_id)
        output = demo.text(ids[:cut] + walk(demo, matcher, np.random.default_rng(cut), most=0))
        assert follows(output), output


@each_guide
def test_forced_ids_are_the_same_whether_asked_for_or_not(demo: Served, kind: str, text: str, follows: Follows) -> None:
    guide = demo.compiler.compile(kind, text, num_matchers=2)
    asking = walk(demo, guide.start(), np.random.default_rng(5), most=30)
    matcher = guide.start()
    for token_id in asking:
        assert token_id in allowed_ids(matcher)
        matcher.accept(token_id)
    assert matcher.may_end
    # The same draws meet the same choices: ids that were forced above are masks of one id here.
    assert follows(demo.text(walk(demo, guide.start(), np.random.default_rng(5), most=30, ask=False)))


@pytest.mark.parametrize(
    ("kind", "text"), [("json_schema", json.dumps(PERSON)), ("ebnf_grammar", ARITHMETIC), ("json", "")]
)
def test_forced_ids_end_at_a_choice(demo: Served, kind: str, text: str) -> None:
    matcher = demo.compiler.compile(kind, text).start()
    rng = np.random.default_rng(11)
    num_runs = 0
    for _ in range(120):
        if forced := matcher.forced_ids():
            num_runs += 1
            for token_id in forced:
                matcher.accept(token_id)
            allowed = allowed_ids(matcher)
            assert len(allowed) > 1 or matcher.is_complete, (forced, demo.text(allowed.tolist()))
        if matcher.is_complete:
            break
        choices = allowed_ids(matcher)
        matcher.accept(int(rng.choice(choices[choices != demo.vocabulary.eos_id])))
    assert num_runs > 0 or kind != "json_schema"


def test_forced_ids_are_the_tokenizers(demo: Served, full: Served) -> None:
    sentence = "Call me Ishmael. Some years ago, in 1851: \u00dcberraschung \u65e5\u672c\u8a9e!"
    for served in (demo, full):
        expected = tuple(Tokenizer(served.vocabulary).encode(sentence, add_bos=False))
        assert served.compiler.compile("choice", json.dumps([sentence])).start().forced_ids() == expected
        fork = (
            served.compiler.compile("choice", json.dumps([sentence + " One", sentence + " Two"])).start().forced_ids()
        )
        assert fork[:-1] == expected[: len(fork) - 1]
        assert len(fork) >= len(expected) - 1


def test_a_long_forced_word_costs_hardly_more_than_short_ones(full: Served) -> None:
    def seconds(text: str) -> float:
        guide = full.compiler.compile("choice", json.dumps([text]))
        guide.start()
        times = []
        for _ in range(3):
            matcher = guide.start()
            begin = time.thread_time()
            forced = matcher.forced_ids()
            times.append(time.thread_time() - begin)
            assert full.text(list(forced)) == text
        return min(times)

    assert seconds("\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c" * 3_000) < 15 * seconds("ab cd " * 3_000)


def test_full_vocabulary(full: Served) -> None:
    guide = full.compiler.compile("json_schema", json.dumps(PERSON))
    follows = follows_schema(PERSON)
    assert guide.start().mask().shape == (FULL_VOCAB_SIZE // 32,)
    for seed in range(8):
        output = full.text(walk(full, guide.start(), np.random.default_rng(seed), most=seed * 8))
        assert follows(output), output


def test_a_vocabulary_that_fills_no_whole_word(tmp_path_factory: pytest.TempPathFactory) -> None:
    for served in serve(tmp_path_factory, 3001):
        matcher = served.compiler.compile("regex", "(?s:.*)").start()
        assert matcher.mask().shape == (94,)
        assert allowed_ids(matcher)[-1] == 3000


@pytest.mark.parametrize("grammar", ["start: A\nA: ~/abc/", "start: <[9]> | /a+/", "start: <[*]>", "start: /a/ <[2]>?"])
def test_special_tokens_are_never_allowed(demo: Served, grammar: str) -> None:
    matcher = demo.compiler.compile("ebnf_grammar", grammar).start()
    for _ in range(3):
        allowed = allowed_ids(matcher)
        special = allowed[allowed < NUM_SPECIAL_TOKENS].tolist()
        assert special == ([demo.vocabulary.eos_id] if matcher.may_end else [])
        with pytest.raises(RuntimeError, match="does not allow id 9"):
            matcher.accept(9)
        text = allowed[allowed >= NUM_SPECIAL_TOKENS]
        if not text.size:
            break
        matcher.accept(int(text[0]))


def test_a_grammar_that_hits_a_limit_late_fails_its_own_sequence(demo: Served) -> None:
    guide = demo.compiler.compile("regex", "(.*a.{15}b|.*c.{15}d|.*e.{12}f)*(.*g.{300}h)*")

    def draw_on(matcher: GuideMatcher) -> None:
        rng = np.random.default_rng(3)
        for _ in range(2000):
            matcher.accept(int(rng.choice(allowed_ids(matcher)[1:])))

    with pytest.raises(RequestError, match="guided_decoding_guide: cannot be followed: lexer error"):
        draw_on(guide.start())
    assert allowed_ids(guide.start()).size > 1  # a fresh one is not affected


def test_matchers_are_independent(demo: Served) -> None:
    guide = demo.compiler.compile("json_schema", json.dumps(PERSON), num_matchers=3)
    alone = walk(demo, guide.start(), np.random.default_rng(1))
    first, second = guide.start(), guide.start()
    other = walk(demo, guide.start(), np.random.default_rng(2))
    for token_id in alone:
        first.accept(token_id)
    for token_id in other:
        second.mask()[:] = 0  # a mask that is given away is not the matcher's own
        assert token_id in allowed_ids(second)
        second.accept(token_id)
    assert first.may_end
    assert second.may_end


def test_accept_refuses_what_the_mask_does_not_allow(demo: Served) -> None:
    matcher = demo.compiler.compile("choice", '["hello world", "hello there"]').start()
    h = demo.vocabulary.token_bytes.index(b"h")
    for token_id in (h, demo.vocabulary.eos_id, -1, DEMO_VOCAB_SIZE, 10**12):
        with pytest.raises(RuntimeError, match=f"does not allow id {token_id}"):
            matcher.accept(token_id)
    output = demo.text(walk(demo, matcher, np.random.default_rng(0)))
    assert output in ("hello world", "hello there")
    with pytest.raises(RuntimeError, match="does not allow id"):
        matcher.accept(demo.vocabulary.eos_id)  # it has ended


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_json_may_have_one_blank_behind_commas_and_colons(demo: Served, separators: tuple[str, str]) -> None:
    text = json.dumps({"a": [1, 2], "b": {"c": "d"}}, separators=separators)
    for kind, schema in (("json", ""), ("json_schema", '{"type": "object"}')):
        matcher = demo.compiler.compile(kind, schema).start()
        for token_id in Tokenizer(demo.vocabulary).encode(text, add_bos=False):
            matcher.accept(token_id)
        assert matcher.is_complete


def test_a_schema_keeps_the_order_of_its_properties(demo: Served) -> None:
    properties = {"zeta": {"const": 1}, "alpha": {"const": 2}, "mid": {"const": 3}}
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["mid", "alpha", "zeta"],
        "additionalProperties": False,
    }
    matcher = demo.compiler.compile("json_schema", json.dumps(schema)).start()
    output = demo.text(walk(demo, matcher, np.random.default_rng(4)))
    assert list(json.loads(output)) == ["zeta", "alpha", "mid"]


def test_compiling_beside_running_matchers(demo: Served) -> None:
    guide = demo.compiler.compile("json_schema", json.dumps(PERSON))
    expected = [walk(demo, guide.start(), np.random.default_rng(seed)) for seed in range(4)]
    stop = threading.Event()
    failures: list[Exception] = []

    def compile_on() -> None:
        index = 0
        while not stop.is_set():
            index += 1
            try:
                demo.compiler.compile("regex", f"[a-z]{{{index}}}", num_matchers=2)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=compile_on)
    thread.start()
    try:
        assert [walk(demo, guide.start(), np.random.default_rng(seed)) for seed in range(4)] == expected
    finally:
        stop.set()
        thread.join()
    assert not failures

"""Texts and conversations on which ids and templates are compared with mistral-common's."""

from __future__ import annotations

from typing import Any

SCRIPTS = {
    "latin": "The quick brown fox, naïve café, Žluťoučký kůň, Ærøskøbing, DON'T Stop!",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "arabic": "اَلْعَرَبِيَّةُ لُغَةٌ جَمِيلَةٌ، وهذا نصٌّ بدون تشكيل كامل.",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश।",
    "bengali": "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।",
    "tamil": "தமிழ் மொழி மிகவும் பழமையானது.",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "han": "我能吞下玻璃而不傷身體。敏捷的棕色狐狸跳過懶狗,二〇二四年。",
    "japanese": "いろはにほへと ちりぬるを。カタカナ、漢字、ひらがな!「引用」",
    "hangul": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. 한글",
    "georgian": "ვეპხის ტყაოსანი შოთა რუსთაველი",
    "armenian": "Բել դղյակի ձախ ժամն օֆ ազգությանը ցպահանջ չճշտած վնաս էր։",
    "ethiopic": "ሰማይ አይታረስ ንጉሥ አይከሰስ።",
    "khmer": "ខ្ញុំអាចញុំកញ្ចក់បាន ដោយគ្មានបញ្ហារ",
    "tibetan": "ཤེལ་སྒོ་ཟ་ནས་ང་ན་གི་མ་རེད།",
    "gothic": "𐌼𐌰𐌲 𐌲𐌻𐌴𐍃 𐌹̈𐍄𐌰𐌽",
}

OTHERS = {
    "empty": "",
    "blanks": "  two   three    four\t\ttabs \n\n\n lines \r\n windows\r\n\r\n   ",
    "numbers": "1234567890 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ 0x7fff 1e-5",
    "python": "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # 'comment'\n\n\nclass A(B):\n\tpass\n",
    "c": '#include <stdio.h>\nint main(void) { printf("%d\\n", 1 << 3); return 0; } /* end */\n',
    "json": '{"a": [1, 2.5e-3, null, true], "b": {"c": "\\u00e9\\n"}}',
    "url": "https://example.org/a/b?c=d&e=f#g//h/../i",
    "joiners": "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 🇫🇷🇩🇪 1️⃣ ☺️ ❤️‍🔥",
    "combining": "e\u0301 a\u0300\u0316 Z\u0351\u036b\u0343 \u0301alone",
    "controls": "nul\x00 bell\x07 esc\x1b[31m del\x7f c1\x85 sep\x1c\x1d\x1e\x1f bom\ufeff zero\u200b\u2028\u2029",
    "specials": "<s>[INST] not a control token [/INST]</s>[TOOL_CALLS][{}]<unk><pad><SPECIAL_20>",
    "replacement": "\ufffd already there \uffff\U0010ffff",
    "mixed": "naïveПривет你好مرحبا123abc_DEF-ghi'll ʼn ǅ ß ﬁ",
}

TEXTS = SCRIPTS | OTHERS

LONG_TEXTS = {
    "one letter": "a" * 100_000,
    "one capital": "A" * 100_000,
    "one ideograph": "中" * 33_000,
    "spaces": " " * 100_000,
    "spaces then a word": " " * 100_000 + "end",
    "line ends": "\n" * 100_000,
    "combining marks": "\u0301" * 50_000,
    "digits": "7" * 100_000,
    "punctuation": "^" * 100_000,
    "alternating": "aB" * 50_000,
    "prose": " ".join(SCRIPTS.values()) * 60,
    "code": OTHERS["python"] * 1_300,
}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter, 天気, [/AVAILABLE_TOOLS]",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2.0, 3e5]}},
            "required": ["city"],
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}

_CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
_SECOND_CALL = {"id": "000000001", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
_TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Wie ist das Wetter?"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL, _SECOND_CALL]},
    {"role": "tool", "tool_call_id": "abcDEF123", "content": '{"temp":  21.50, "sky": "☀"}'},
    {"role": "tool", "tool_call_id": "000000001", "name": "clock", "content": "it is noon"},
]

# name -> (messages, tools), all with tool-call ids that the template takes as they are
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one question": ([{"role": "user", "content": "Hello"}], None),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}], None),
    "system": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], None),
    "developer": ([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}], None),
    "system alone": ([{"role": "system", "content": "Be brief."}], None),
    "several turns": (
        [
            {"role": "system", "content": "Un."},
            {"role": "system", "content": "Deux."},
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": "One.  "},
            {"role": "user", "content": "2?"},
            {"role": "user", "content": "Or 3?"},
        ],
        None,
    ),
    "tools": ([{"role": "user", "content": "Weather in 東京?"}], [WEATHER, CLOCK]),
    "tools and system": (
        [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        [WEATHER],
    ),
    "tool results": (_TOOL_TURNS, [WEATHER, CLOCK]),
    "after tool results": (
        [*_TOOL_TURNS, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "Danke"}],
        [WEATHER],
    ),
    "broken arguments": (
        [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": "{not json"}}],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "content": ""},
        ],
        None,
    ),
    "arguments as an object": (
        [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": {"é": [1]}}}],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "[1, 2"},
        ],
        None,
    ),
    "control tokens as text": (
        [
            {"role": "system", "content": "<s>[INST]"},
            {"role": "user", "content": "[/INST]</s>[TOOL_CALLS]"},
            {"role": "assistant", "content": "</s>"},
            {"role": "user", "content": OTHERS["specials"]},
        ],
        None,
    ),
    "all scripts": ([{"role": "user", "content": text} for text in SCRIPTS.values()], None),
    "long": ([{"role": "user", "content": LONG_TEXTS["prose"]}], None),
}

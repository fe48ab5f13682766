"""`make test-lm-eval`: lm-eval through the gateway gives the scores that PyTorch gives directly.

python -m tests.gateway.lm_eval.compare .venv-lm-eval/bin/lm_eval
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoModelForCausalLM

from tests.bench.conditions import conditions
from tests.gateway.conftest import DEMO, MODEL, start
from tests.triton.live_server import PROJECT, LiveServer

FOLDER = Path(__file__).parent
TOLERANCE = 1e-3
EOS = 2
_TIMEOUT_S = 600.0


class Reference:
    """The demo checkpoint in transformers; ids and texts by the gateway, so that only the model is compared."""

    def __init__(self, url: str) -> None:
        self._http = httpx2.Client(base_url=url, timeout=60.0)
        self._model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()

    def ids(self, **body: Any) -> list[int]:
        """Ids of a text or a chat."""
        found: list[int] = self._http.post("/tokenize", json=body).json()["tokens"]
        return found

    @torch.inference_mode()
    def log_likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Sum over the continuation's ids, and whether each is the likeliest; without BOS, as lm-eval sends it."""
        whole = self.ids(prompt=context + continuation, add_special_tokens=False)
        num_context = len(self.ids(prompt=context, add_special_tokens=False))
        log_probs = torch.log_softmax(self._model(torch.tensor([whole])).logits[0].double(), dim=-1)
        places = range(num_context, len(whole))
        is_greedy = all(int(log_probs[place - 1].argmax()) == whole[place] for place in places)
        return sum(float(log_probs[place - 1, whole[place]]) for place in places), is_greedy

    @torch.inference_mode()
    def answer(self, question: str, max_tokens: int) -> str:
        """The greedy answer to a chat of one question."""
        ids = self.ids(messages=[{"role": "user", "content": question}])
        num_prompt = len(ids)
        while len(ids) - num_prompt < max_tokens and ids[-1] != EOS:
            ids.append(int(self._model(torch.tensor([ids])).logits[0, -1].argmax()))
        text: str = self._http.post("/detokenize", json={"tokens": ids[num_prompt:]}).json()["prompt"]
        return text.partition("\n\n")[0]


def lm_eval(binary: str, kind: str, task: str, url: str, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores and samples of one task."""
    arguments = f"model={MODEL},base_url={url},num_concurrent=4,max_retries=1"
    if kind == "local-completions":
        arguments += ",tokenizer_backend=remote,tokenized_requests=True,custom_prefix_token_id=1,max_length=4096"
    else:
        arguments += ",eos_string=</s>"
    command = [
        binary,
        "run",
        "--model",
        kind,
        "--model_args",
        arguments,
        "--tasks",
        task,
        "--include_path",
        str(FOLDER),
    ]
    command += ["--output_path", str(folder), "--log_samples"]
    command += ["--apply_chat_template"] if kind == "local-chat-completions" else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "HF_HOME": str(folder / "home")}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache")}
    subprocess.run(command, cwd=PROJECT, env=environment, timeout=_TIMEOUT_S, check=True)
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][task], sorted(found, key=lambda sample: sample["doc_id"])


def compare_choices(binary: str, server_url: str, reference: Reference, folder: Path) -> dict[str, Any]:
    """Every log-likelihood and the accuracy."""
    scores, samples = lm_eval(binary, "local-completions", "nemo_choice", f"{server_url}/v1/completions", folder)
    num_right, largest = 0, 0.0
    for sample in samples:
        document = sample["doc"]
        wanted = [reference.log_likelihood(document["context"], choice) for choice in document["choices"]]
        found = [(float(each[0]), str(each[1]) == "True") for each in sample["filtered_resps"]]
        for (value, is_greedy), (wanted_value, wanted_greedy) in zip(found, wanted, strict=True):
            largest = max(largest, abs(value - wanted_value))
            assert abs(value - wanted_value) < TOLERANCE, (document, found, wanted)
            assert is_greedy == wanted_greedy, (document, found, wanted)
        num_right += max(range(len(wanted)), key=lambda index: wanted[index][0]) == document["gold"]
    assert scores["acc,none"] == num_right / len(samples), (scores, num_right)
    return {"accuracy": scores["acc,none"], "samples": len(samples), "largest_difference": largest}


def compare_chats(binary: str, server_url: str, reference: Reference, folder: Path) -> dict[str, Any]:
    """Every answer and the share of exact matches."""
    scores, samples = lm_eval(
        binary, "local-chat-completions", "nemo_chat", f"{server_url}/v1/chat/completions", folder
    )
    num_right = 0
    for sample in samples:
        wanted = reference.answer(sample["doc"]["question"], max_tokens=96)
        assert sample["filtered_resps"] == [wanted], (sample["filtered_resps"], wanted)
        num_right += wanted == sample["doc"]["answer"]
    assert scores["exact_match,none"] == num_right / len(samples), (scores, num_right)
    return {"exact_match": scores["exact_match,none"], "samples": len(samples)}


def main(binary: str) -> int:
    """Run both, and keep what came out."""
    torch.set_num_threads(1)  # the server wants the other core
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server: LiveServer = start(folder / "server")
        try:
            url = f"http://127.0.0.1:{server.openai_port}"
            reference = Reference(url)
            result = conditions("tests.gateway.lm_eval.compare", sys.argv[1:]) | {
                "lm_eval": subprocess.run(
                    [str(Path(binary).with_name("pip")), "show", "lm_eval"], capture_output=True, text=True
                )
                .stdout.splitlines()[1]
                .removeprefix("Version: "),
                "local-completions": compare_choices(binary, url, reference, folder / "choice"),
                "local-chat-completions": compare_chats(binary, url, reference, folder / "chat"),
            }
            server.stop()
        finally:
            server.kill_everything()
    (FOLDER / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

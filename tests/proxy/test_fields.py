"""No field of a request, whatever stands in it, makes the proxy itself fail."""

import json
from typing import Any, Literal

import httpx2
import pytest

from haltwise.proxy.completion_request import CompletionRequest
from tests.proxy.fake_upstream import Kind, Plan
from tests.proxy.proxies import PATHS, Pairs

#: All that the proxy reads, for itself or for a question of its own to the server: what has a
#: form, and what is only looked for.
FORMED = (
    *("stream_options", "n", "logprobs", "top_logprobs", "stop", "model", "max_tokens"),
    *("max_completion_tokens", "min_tokens", "messages", "prompt", "response_format"),
)
LOOKED_FOR = (
    *("stream", "best_of", "echo", "suffix", "post_sampling_probs", "return_token_ids"),
    *(
        "n_probs",
        "return_tokens_as_token_ids",
        "tools",
        "functions",
        "structured_outputs",
        "guided_json",
    ),
    *("format", "include_reasoning", "chat_template", "chat_template_kwargs", "request_id"),
    *("reasoning_effort", "reasoning_budget_message", "continue_final_message"),
)
FEW = ["null", "true", "1", '"text"', "[]", "[null]", '{"a": null}', "[" * 50 + "]" * 50]
VALUES = [
    *("0", "-1", "2", "1.5", str(10**30), "Infinity", '""', r'"\ud800"', "{}", "[[]]", "[{}]"),
    *('[null, "text"]', '[{"role": "assistant", "content": [null]}]', *FEW),
]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        *(("vllm", field, VALUES) for field in FORMED),
        *(("probed", field, FEW) for field in FORMED),
        *(("vllm", field, FEW) for field in LOOKED_FOR),
        *((kind, "stop", FEW) for kind in ("sglang", "llama-server", "ollama")),
        *((kind, "messages", FEW) for kind in ("sglang", "llama-server", "ollama")),
        ("llama-server", "reasoning_budget_message", FEW),
    ],
)
@pytest.mark.whole
def test_what_is_malformed_is_the_server_s_to_answer(
    pairs: Pairs, kind: Kind | Literal["probed"], field: str, values: list[str], chat: bool
) -> None:
    pair = pairs(probing=True) if kind == "probed" else pairs(kind)
    plan = Plan("odd", thinking=5, answer=1)
    own: dict[str, Any] = {"messages": plan.messages()} if chat else {"prompt": plan.prompt()}
    wrong = {}
    for value in values:
        fields = {"model": "m", "max_tokens": 99} | own | {field: "VALUE"}
        content = json.dumps(fields).replace('"VALUE"', value)

        def post(client: httpx2.Client, content: str = content) -> int:
            headers = {"X-Haltwise-Price": "100"}
            return client.post(PATHS[chat], content=content, headers=headers).status_code

        # The server is asked itself only where the status may be its own.
        if (status := post(pair.client)) != 200 and status != post(pair.direct):
            wrong[value[:40]] = status
    assert wrong == {}
    assert pair.proxy.metric("haltwise_requests_total", outcome="defect") == 0


@pytest.mark.parametrize(
    ("kind", "path"), [("vllm", PATHS[True]), ("llama-server", "/v1/responses")]
)
def test_what_can_be_read_but_not_written_is_relayed(pairs: Pairs, kind: Kind, path: str) -> None:
    pair, plan = pairs(kind), Plan("deep", thinking=5, answer=1)
    # Python writes less deeply than it reads, and the deeper the calls the less so.
    for depth in range(880, 1000, 3):
        body = json.dumps({"model": "m", "messages": plan.messages(), "deep": "VALUE"})
        content = body.replace('"VALUE"', "[" * depth + "]" * depth)
        headers = {"X-Haltwise-Price": "100", "X-Haltwise-Max-Tokens": "7"}
        assert pair.client.post(path, content=content, headers=headers).status_code < 500
    assert pair.proxy.metric("haltwise_requests_total", outcome="defect") == 0


def test_the_proxy_reads_no_other_field() -> None:
    read: set[str] = set()

    class Body(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            read.add(name)
            return super().get(name, default)

    body = Body(messages=[], prompt="")
    for chat in (True, False):
        request = CompletionRequest(chat, body)
        assert request.why_not_halted() is None and request.why_not_continued("</think>") is None
        request.less_tokens(request.watched_body({}) and body, 1)
    others = {"guided_regex", "guided_choice", "guided_grammar", "json_schema", "regex", "ebnf"}
    assert read - others - {"grammar"} <= {*FORMED, *LOOKED_FOR}

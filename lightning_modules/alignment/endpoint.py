"""A language model behind an OpenAI-compatible address as the judge of pairs.

Each comparison is a question of its own: which of two answers, A or B, is better. Judges favour a place, so both orders
are asked and averaged.
"""

import http.client
import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, ClassVar

from datamodules.batches import Prompt
from lightning_modules.alignment.oracle import Oracle

LONGEST_PAUSE = 60.0  # seconds between two attempts
PASSING = (408, 409, 425, 429)  # refusals that another attempt may not meet; so are all from 500 on
ADDRESS = "{url}/chat/completions"

log = logging.getLogger(__name__)


class Endpoint(Oracle):
    """Pairwise judgements by `model` at `url` (the part before `/chat/completions`).

    `template` has the fields {context}, {first} and {second}. The reply counts as A or B by its first word, or, with
    `logprobs`, as sigma(log p(A) - log p(B)) of its first token. A request that fails (no connection, `timeout`
    seconds, a busy server, an unreadable reply) is repeated up to `retries` times, after `pause`, twice that, four
    times that many seconds. The key is read from the environment variable `key_env`, where there is one.
    """

    order_matters: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        model: str,
        template: str,
        key_env: str,
        logprobs: bool,
        timeout: float,
        retries: int,
        pause: float,
        threads: int,
    ) -> None:
        if not re.fullmatch(r"https?://[^@\s]+", url):
            raise ValueError("model.oracle.url must begin with http:// or https:// and hold no name or password")
        self.address, self.model, self.template = ADDRESS.format(url=url.rstrip("/")), model, template
        self.key_env, self.logprobs = key_env, logprobs
        self.timeout, self.retries, self.pause, self.threads = timeout, retries, pause, threads

    @property
    def identity(self) -> dict[str, Any]:
        asked = {"address": self.address, "model": self.model, "template": self.template, "logprobs": self.logprobs}
        return {"oracle": "endpoint", **asked}

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        """As `Oracle.compare`. What was answered is given out before the first failure is raised."""
        pool = ThreadPoolExecutor(self.threads)
        asked = {pool.submit(self._judge, *row): place for place, row in enumerate(zip(prompts, first, second))}
        failure: BaseException | None = None
        try:
            for future in as_completed(asked):
                error = None if future.cancelled() else future.exception()
                if error is not None:
                    failure = failure or error
                    _cancel(asked)
                elif not future.cancelled():
                    yield asked[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if failure:
            raise failure

    def _judge(self, prompt: Prompt, first: str, second: str) -> float:
        """P(first beats second) as the judge sees them in this order. Raises ConnectionError after the last attempt."""
        body = self._question(prompt, first, second)
        for attempt in range(self.retries + 1):
            try:
                return self._read(self._ask(body))
            except urllib.error.HTTPError as error:
                if error.code not in PASSING and error.code < 500:
                    raise ConnectionError(self._refused(prompt, error.code)) from None
                reason = f"HTTP {error.code}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
            if attempt < self.retries:
                log.info("prompt %s: %s; asking again", prompt.id, reason)
                time.sleep(min(LONGEST_PAUSE, self.pause * 2**attempt))
        raise ConnectionError(
            f"prompt {prompt.id}: {self.address} gave no verdict in {self.retries + 1} attempts, at last: {reason}; "
            "finished labels are kept: start the same command again when it answers, or raise model.oracle.timeout"
        )

    def _refused(self, prompt: Prompt, code: int) -> str:
        remedy = f"set the environment variable {self.key_env} to a valid key" if code in (401, 403) else (
            "check model.oracle.url and model.oracle.model"
        )  # fmt: skip
        return f"prompt {prompt.id}: {self.address} refuses with HTTP {code}: {remedy}"

    def _question(self, prompt: Prompt, first: str, second: str) -> bytes:
        context = "\n\n".join(f"{message.role}: {message.content}" for message in prompt.messages) or prompt.question
        text = self.template.format(context=context, first=first, second=second)
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 10} if self.logprobs else {"max_tokens": 8}
        return json.dumps(body).encode()

    def _ask(self, body: bytes) -> Any:
        key = os.environ.get(self.key_env)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self.address, body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return json.loads(reply.read())

    def _read(self, reply: Any) -> float:
        """The probability in a reply. Raises ValueError where there is none."""
        try:
            choice = reply["choices"][0]
            if self.logprobs:
                return _from_log_probs(choice["logprobs"]["content"][0]["top_logprobs"])
            return _from_text(choice["message"]["content"])
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("the reply is not a chat completion") from None


def _from_text(text: str) -> float:
    verdict = re.match(r"\W*(?:answer\s*)?([AB])\b", text, re.IGNORECASE)
    if verdict is None:
        raise ValueError(f"the reply {text[:40]!r} begins with neither A nor B")
    return 1.0 if verdict[1].upper() == "A" else 0.0


def _from_log_probs(tokens: list[dict[str, Any]]) -> float:
    """sigma(log p(A) - log p(B)) over the spellings of A and of B among the likeliest tokens."""
    weights = {"A": 0.0, "B": 0.0}
    for token in tokens:
        name = token["token"].strip().upper()
        if name in weights:
            weights[name] += math.exp(token["logprob"])
    total = sum(weights.values())
    if not 0 < total < math.inf:
        raise ValueError("neither A nor B is among the likeliest tokens of the reply")
    return weights["A"] / total


def _cancel(futures: dict[Future, int]) -> None:
    for future in futures:
        future.cancel()

"""A judge behind an address that speaks OpenAI's chat completions.

It is told about the evaluation's simulated people, and sees their pictures. The key comes from an environment variable
and is written nowhere.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import requests

from ..assess_config import RemoteJudge
from ..gallery import Shown
from ..measures.measure import Missing
from . import questions
from .judge import JudgeStopped, Question, refusal

_REFUSED = (400, 422)
_BUSY = 429
_LONGEST_WAIT = 60.0  # seconds


class RemoteModel:
    """Asks an endpoint, at temperature 0."""

    told = True

    def __init__(self, config: RemoteJudge) -> None:
        """Take the key from the environment.

        Raises:
            Missing: a variable is stated, and it is empty.
        """
        self.name, self._config = config.name, config
        self._key = os.environ.get(config.key_variable, "") if config.key_variable else ""
        if config.key_variable and not self._key:
            raise Missing(f"the environment variable {config.key_variable} holds no key: export it and begin again")
        self.identity = f"remote {config.url} {config.model} {config.max_tokens}"

    def ask_fits(self, shown: Shown) -> Question:
        """Return the question about one picture."""
        return questions.ask_fits(shown)

    def ask_prefers(self, first: Shown, second: Shown) -> Question:
        """Return the question about two pictures."""
        return questions.ask_prefers(first, second)

    def answer(self, questions: Sequence[Question]) -> Iterator[str]:
        """Yield the endpoint's answers in order, several asked at a time.

        Raises:
            JudgeStopped: it refuses, or does not answer after all retries.
        """
        pool = ThreadPoolExecutor(self._config.parallel)
        try:
            yield from pool.map(self._answer, questions)
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, question: Question) -> str:
        reason = ""
        for attempt in range(self._config.retries + 1):
            try:
                response = self._post(question)
            except requests.RequestException as error:
                # Its text has the address, and an address may have a secret.
                reason, wait = f"{type(error).__name__}", 0.0
            else:
                if response.status_code < 300:
                    return self._without_key(_content(response, self._config.url))
                reason, wait = f"status {response.status_code}", _asked_wait(response)
                if response.status_code != _BUSY and response.status_code < 500:
                    detail = self._detail(response)
                    if response.status_code in _REFUSED:  # this question alone: a filter for sensitive content, say
                        return refusal(response.status_code, detail)
                    raise JudgeStopped(
                        f"{self._config.url} refused a question ({reason}: {detail}): check the model's name, "
                        "the key and what the endpoint allows"
                    )
            if attempt < self._config.retries:
                time.sleep(min(_LONGEST_WAIT, max(wait, self._config.backoff * 2**attempt)))
        raise JudgeStopped(
            f"{self._config.url} gave no answer in {self._config.retries + 1} tries (the last: {reason}); what it "
            "answered before is kept, and the same command goes on from there"
        )

    def _post(self, question: Question) -> requests.Response:
        content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        content += [{"type": "image_url", "image_url": {"url": _data(path)}} for path in question.images]
        return requests.post(
            f"{self._config.url.rstrip('/')}/chat/completions",
            json={
                "model": self._config.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": self._config.max_tokens,
                "temperature": 0,
            },
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=self._config.timeout,
            # A redirect would take the question, and with it the person, to another address.
            allow_redirects=False,
        )

    def _detail(self, response: requests.Response) -> str:
        """Return what an endpoint says of itself, short and in one line."""
        return " ".join(self._without_key(response.text).split())[:200]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _content(response: requests.Response, url: str) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise JudgeStopped(f"{url} answered something that is no chat completion: is the address right?") from None
    return "" if content is None else str(content)


def _asked_wait(response: requests.Response) -> float:
    """Return how many seconds a busy endpoint asks to wait, 0 if it does not say."""
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _data(path: Path) -> str:
    """Return a picture as a data URL, without its file name and whatever else the file says of itself."""
    buffer = io.BytesIO()
    with PIL.Image.open(path) as image:
        PIL.Image.frombytes("RGB", image.size, image.convert("RGB").tobytes()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

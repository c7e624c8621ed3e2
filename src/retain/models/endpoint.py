"""Writing through an OpenAI-compatible server: vLLM, llama.cpp, SGLang, or a hosted one. Standard library only."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from retain.errors import ConfigError, ModelError
from retain.models.generation import Generated

#: Answers that a busy or restarting server gives; asked again after a pause.
_BUSY = {408, 429, 500, 502, 503, 504}


def check_url(url: str) -> None:
    """Raises ConfigError where `url` is no http address."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"endpoint.url: '{url}' given. Give an address such as http://127.0.0.1:8000/v1.")


class Endpoint:
    """A server as an engine that writes rows (`own_rows.Engine`): turns go to the chat route, plain text to the other.

    Args:
        url: base of the routes, such as `http://127.0.0.1:8000/v1`.
        model: name of the model on the server.
        key: name of the environment variable that holds the key; one that is not set means no key.
        parallel: requests at a time; the server batches them.
        timeout: seconds until a request is given up.
        pauses: seconds before each further try.

    Raises:
        ConfigError: `url` is no http address.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "OPENAI_API_KEY",
        parallel: int = 16,
        timeout: float = 300.0,
        pauses: tuple[float, ...] = (1.0, 4.0, 15.0),
    ) -> None:
        check_url(url)
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.parallel, self.timeout, self.pauses = parallel, timeout, pauses

    def __call__(self, prompts: list[Any], limit: int, temperature: float, top_p: float, draw: int) -> list[Generated]:
        """Answers to all prompts, in their order.

        Raises:
            ModelError: the server cannot be reached, refuses, or says something that is no answer.
        """
        drawn = {"temperature": temperature, "seed": draw} | ({"top_p": top_p} if temperature > 0 else {})
        common = {"model": self.model, "max_tokens": limit, **drawn}
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda prompt: self._answer(prompt, common), prompts))

    def _answer(self, prompt: Any, common: dict[str, Any]) -> Generated:
        if isinstance(prompt, str):
            # the prompt holds its special tokens already; the field is read by vLLM and SGLang
            route, body = "completions", {**common, "prompt": prompt, "add_special_tokens": False}
        else:
            route, body = "chat/completions", {**common, "messages": prompt}
        answer = self._post(f"{self.url}/{route}", body)
        try:
            choice = answer["choices"][0]
            text = choice["text"] if isinstance(prompt, str) else choice["message"]["content"]
            tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
            return Generated((text or "").strip(), tokens, choice.get("finish_reason") == "stop")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self.url}/{route}: the answer is not of the OpenAI form ({json.dumps(answer)[:120]}). "
                "Check endpoint.url; it usually ends in /v1."
            ) from error

    def _post(self, url: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for pause in (*self.pauses, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(200).decode(errors="replace").split())
                problem = f"answered {error.code} ({said})"
                if error.code in (401, 403):
                    problem += f". The key is read from the environment variable {self.key}"
                again = error.code in _BUSY
            except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
                problem = f"no usable answer ({getattr(error, 'reason', None) or error or type(error).__name__})"
                again = isinstance(error, OSError)
            if pause is None or not again:
                raise ModelError(f"{url}: {problem}. Start the server, or correct `endpoint` (url, model, key).")
            time.sleep(pause)
        raise AssertionError("unreachable")

"""A real ComfyUI as an engine: queues workflows over its API, fetches images; starts its server with this pack."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import websocket

from .errors import ComfyUIError

PACK = Path(__file__).parents[1]
PACK_FOLDER = "ComfyUI-PSA"

Prompt = dict[str, dict[str, Any]]

# The server is on this machine: no proxy that the environment names has a part in it.
_http = requests.Session()
_http.trust_env = False

_START_SECONDS = 180
_REQUEST_SECONDS = 60
_MUTED = 2  # LiteGraph's mode "never"


@dataclass(frozen=True)
class Image:
    """A saved image: its name on the server and the bytes of the file."""

    name: str
    content: bytes


def check_comfyui(folder: Path) -> None:
    """Raise ComfyUIError unless a ComfyUI lies in ``folder``."""
    if not (folder / "main.py").is_file():
        raise ComfyUIError(f"There is no ComfyUI in {folder}: expected its main.py. Name the folder that has it.")


def prepare_base(base: Path) -> Path:
    """Make a folder with ComfyUI's layout in which this pack is the one custom node; return it."""
    models = ("checkpoints", "psa_adapters", "psa_embeddings", "psa_compiled", "LLM")
    for name in ("custom_nodes", *(f"models/{folder}" for folder in models)):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK_FOLDER
    if not link.exists():
        try:
            link.symlink_to(PACK, target_is_directory=True)
        except OSError:  # Windows without the right to make links
            shutil.copytree(PACK, link, ignore=shutil.ignore_patterns(".*", "tests"))
    return base


class ComfyUIClient:
    """A ComfyUI that answers somewhere."""

    def __init__(self, url: str) -> None:
        """Talk to the server at ``url``, which is not asked yet."""
        self.url = url.rstrip("/")

    def get(self, path: str, **params: str) -> Any:
        """Return the JSON answer to a GET request."""
        response = _http.get(f"{self.url}{path}", params=params, timeout=_REQUEST_SECONDS)
        response.raise_for_status()
        return response.json()

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON answer to a POST request with a JSON body."""
        response = _http.post(f"{self.url}{path}", json=body, timeout=_REQUEST_SECONDS)
        response.raise_for_status()
        return response.json()

    def delete(self, path: str) -> None:
        """Send a DELETE request."""
        _http.delete(f"{self.url}{path}", json={}, timeout=_REQUEST_SECONDS).raise_for_status()

    def run(
        self, prompt: Prompt, workflow: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> list[Image]:
        """Queue a prompt (API format), wait for its end, and return the images that it saved.

        ``workflow`` (the frontend's format) is saved into the images, as the frontend does; ``headers`` go with the
        request that queues.

        Raises:
            ComfyUIError: the server refused the prompt or a node failed; ``details`` holds its report.
        """
        client = uuid.uuid4().hex
        socket_url = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client}"
        connection = websocket.create_connection(socket_url, timeout=_REQUEST_SECONDS * 10)
        try:
            body: dict[str, Any] = {"prompt": prompt, "client_id": client}
            if workflow is not None:
                body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
            response = _http.post(f"{self.url}/prompt", json=body, headers=headers, timeout=_REQUEST_SECONDS)
            if response.status_code != 200:
                raise ComfyUIError(f"ComfyUI refused the workflow: {response.text}", response.json())
            prompt_id = response.json()["prompt_id"]
            _wait(connection, prompt_id)
        finally:
            connection.close()
        outputs = self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        return [self._image(entry) for output in outputs.values() for entry in output.get("images", [])]

    def _image(self, entry: Mapping[str, str]) -> Image:
        response = _http.get(f"{self.url}/view", params=dict(entry), timeout=_REQUEST_SECONDS)
        response.raise_for_status()
        return Image(entry["filename"], response.content)

    def answers(self) -> bool:
        """Return whether a ComfyUI answers there."""
        try:
            return _http.get(f"{self.url}/system_stats", timeout=_REQUEST_SECONDS).ok
        except requests.RequestException:
            return False


class ComfyUIServer(ComfyUIClient):
    """A ComfyUI server in a process of its own; use it as a context manager.

    ``comfyui`` is a folder with ComfyUI's ``main.py``, ``base`` the folder with models and output.
    """

    def __init__(self, comfyui: Path, base: Path, *options: str) -> None:
        """Remember what to start; ``options`` go to ComfyUI's command line."""
        super().__init__("")
        self.comfyui = comfyui
        self.base = base
        self.options = options
        self.log = base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyUIServer:
        """Start the server and wait until it answers."""
        check_comfyui(self.comfyui)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)),
            *("--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"),
            *("--disable-api-nodes", "--disable-auto-launch", *self.options),
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise ComfyUIError(f"ComfyUI did not start; the end of {self.log}:\n{self.read_log()[-2000:]}")
            time.sleep(0.25)
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop the server."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def read_log(self) -> str:
        """Return everything that the server has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def _wait(connection: websocket.WebSocket, prompt_id: str) -> None:
    error: ComfyUIError | None = None
    while True:
        message = connection.recv()
        event = json.loads(message) if isinstance(message, str) else {}
        data = event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        if event["type"] in ("execution_error", "execution_interrupted"):
            error = ComfyUIError(f"{data.get('node_type')} failed: {data.get('exception_message')}", data)
        elif event["type"] == "executing" and data["node"] is None:  # sent last, when the history is written
            break
    if error is not None:
        raise error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> Prompt:
    """Turn a workflow (the frontend's format) into a prompt (the API's), as the frontend does when it queues.

    Covers what this pack's examples use: nodes, links and widgets, muted nodes; no subgraphs, no bypassed nodes.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in object_info or node.get("mode") == _MUTED:  # notes live in the browser only
            continue
        info = object_info[node["type"]]["input"]
        values = deque(node.get("widgets_values", []))
        linked = {entry["name"]: links[entry["link"]] for entry in node.get("inputs", []) if entry.get("link")}
        inputs: dict[str, Any] = {}
        for name, spec in {**info.get("required", {}), **info.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            if _is_widget(spec[0]):
                # A workflow of an older version lacks widgets that came later: they keep their defaults.
                inputs[name] = values.popleft() if values else options["default"]
                if options.get("control_after_generate"):
                    values.popleft()
            if name in linked:
                inputs[name] = linked[name]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _is_widget(kind: object) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

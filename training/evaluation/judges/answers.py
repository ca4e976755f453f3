"""Judges' raw answers, kept beside the manifest: what was answered is not asked again, what was refused is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from ...errors import TrainingError
from .judge import Judge, JudgeStopped, Question, is_refusal

ANSWERS = "answers.jsonl"
_TRIED = 8  # as many refusals before any answer say that a judge takes no question at all


class Answers:
    """The file of answers of an evaluation, one JSON object per line: ``key``, ``judge``, ``images``, ``answer``.

    The key is a hash of the judge with its settings, of the question (which has the person and the prompt), and of the
    pictures themselves: a picture that was drawn anew is judged anew.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is there; a refusal and a line that was cut off are asked again."""
        self._folder = folder
        self._path = folder / ANSWERS
        self._known: dict[str, str] = {}
        self._heard: set[str] = set()  # judges that have answered something
        self._digests: dict[Path, str] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                    key, answer = str(row["key"]), str(row["answer"])
                except (ValueError, LookupError, TypeError):
                    continue
                if not is_refusal(answer):
                    self._known[key] = answer

    def of(self, judge: Judge, questions: Sequence[Question], progress: Progress) -> list[str]:
        """Return a judge's answers, asking only what is not known; each is written as it comes.

        Raises:
            JudgeStopped: the judge cannot go on, or takes no question. What it answered before is kept.
            TrainingError: the file cannot be written. What is in it is kept.
        """
        keys = [self._key(judge, question) for question in questions]
        # In the order of hashes: the first few are of all kinds, and not only what a filter for content refuses.
        asked = sorted(zip(keys, questions, strict=True), key=lambda pair: pair[0])
        new = {key: question for key, question in asked if key not in self._known}
        task = progress.add_task(f"Judging ({judge.name})", total=len(set(keys)), state="")
        progress.update(task, advance=len(set(keys)) - len(new))
        if new:
            if self._path.is_file() and self._path.stat().st_size:
                self._write("\n")  # behind a line that was cut off
            heard = judge.identity in self._heard or len(new) < len(set(keys))
            replies = zip(new.items(), judge.answer(list(new.values())), strict=True)
            for number, ((key, question), answer) in enumerate(replies, start=1):
                images = [path.relative_to(self._folder).as_posix() for path in question.images]
                row = {"key": key, "judge": judge.name, "images": images, "answer": answer}
                self._write(json.dumps(row, ensure_ascii=False) + "\n")
                self._known[key] = answer
                heard = heard or not is_refusal(answer)
                if not heard and number == min(_TRIED, len(new)):
                    # Not in the endpoint's words, which may repeat what it was told about a person.
                    raise JudgeStopped(
                        f"it refused all of its first questions, {number} so far (why: {ANSWERS}): check the name of "
                        "the model, whether it takes pictures, and what the endpoint allows. The same command "
                        "asks again"
                    )
                progress.update(task, advance=1)
        self._heard.add(judge.identity)
        return [self._known[key] for key in keys]

    def _write(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise TrainingError(
                f"{self._path} cannot be written ({error.strerror or error}). Make room there, or make it writable. "
                "What was answered before is kept and not asked again: psa evaluate CONFIG --only-assess."
            ) from None

    def digest(self, path: Path) -> str:
        """Return a hash of a picture file, which is read once."""
        if path not in self._digests:
            self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[path]

    def _key(self, judge: Judge, question: Question) -> str:
        parts = (judge.identity, question.text, *(self.digest(path) for path in question.images))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
